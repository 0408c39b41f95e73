"""Captions: reading inverts wording for every claim, and `satisfies` follows the scene."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lexel.data.captions import (
    PLACES,
    RELATIONS,
    Claim,
    ObjectClaim,
    describes_exactly,
    has_place,
    parse_caption,
    related,
    render_caption,
    satisfies,
)
from lexel.data.scene import COLORS, RADIUS, SHAPES, SIZES, SceneObject


def maybe(names: tuple[str, ...]) -> st.SearchStrategy[str | None]:
    return st.none() | st.sampled_from(names)


object_claims = st.builds(ObjectClaim, maybe(SHAPES), maybe(COLORS), maybe(SIZES), maybe(PLACES))


@st.composite
def claims(draw: st.DrawFn) -> Claim:
    objects = tuple(draw(st.lists(object_claims, min_size=1, max_size=3)))
    relation = None
    if len(objects) > 1 and draw(st.booleans()):
        i = draw(st.integers(0, 1))
        relation = (i, 1 - i, draw(st.sampled_from(RELATIONS)))
    return Claim(objects, relation, draw(st.booleans()))


scene_objects = st.builds(
    lambda shape, color, size, x, y: SceneObject.of(
        shape, color, size, (x, y), RADIUS[size], (0.5, 0.5, 0.5)
    ),
    st.sampled_from(SHAPES),
    st.sampled_from(COLORS),
    st.sampled_from(SIZES),
    st.floats(0.1, 0.9),
    st.floats(0.1, 0.9),
)


def thing(shape: str, color: str, x: float, y: float, size: str = "small") -> SceneObject:
    return SceneObject.of(shape, color, size, (x, y), RADIUS[size], (0.5, 0.5, 0.5))


@given(claims(), st.integers(0, 2**32 - 1))
def test_parse_inverts_render(claim, seed):
    assert parse_caption(render_caption(claim, np.random.default_rng(seed))) == claim


FRAGMENTS = [
    "a",
    "red",
    "circle",
    "left of",
    ", and",
    "and",
    "with",
    "in the",
    "top left",
    "to its left",
    "is",
]


@given(st.text() | st.lists(st.sampled_from(FRAGMENTS)).map(" ".join))
def test_parse_never_raises_and_its_claims_can_be_worded(text):
    claim = parse_caption(text)
    assert claim is None or parse_caption(render_caption(claim, np.random.default_rng(0))) == claim


@pytest.mark.parametrize(
    ("text", "claim"),
    [
        ("A red circle.", Claim((ObjectClaim("circle", "red"),))),
        (
            "a red circle left of a blue square",
            Claim((ObjectClaim("circle", "red"), ObjectClaim("square", "blue")), (0, 1, "left")),
        ),
        (
            "a blue square, and to its left a red circle",
            Claim((ObjectClaim("square", "blue"), ObjectClaim("circle", "red")), (1, 0, "left")),
        ),
        (
            "there is a big star at the top left of a heart",
            Claim((ObjectClaim("star", None, "large", "top"), ObjectClaim("heart")), (0, 1, "left")),
        ),
    ],
)
def test_known_sentences(text, claim):
    assert parse_caption(text) == claim


@pytest.mark.parametrize(
    "text",
    ["", "a", "red circle", "a circle red", "a red circle and", "a red circle left of", "a mauve circle",
     "a red circle a blue square", "in the top left, a red circle on the left"],
)  # fmt: skip
def test_other_texts_are_no_claim(text):
    assert parse_caption(text) is None


@given(st.lists(scene_objects, min_size=1, max_size=3), st.randoms())
def test_a_claim_of_everything_true_is_satisfied_in_any_order(objects, random):
    claim = Claim(tuple(ObjectClaim(o.shape, o.color, o.size) for o in objects))
    shuffled = random.sample(objects, len(objects))
    assert satisfies(claim, shuffled)
    assert not satisfies(claim, shuffled[1:])
    assert not satisfies(claim, [*shuffled, objects[0]])
    assert satisfies(replace(claim, exact_count=False), [*shuffled, objects[0]])


@given(
    st.lists(scene_objects, min_size=1, max_size=3), st.integers(0, 2), st.sampled_from(("shape", "color"))
)
def test_one_wrong_attribute_is_not_satisfied(objects, index, attribute):
    index %= len(objects)
    wrong = "unknown"
    claim = Claim(tuple(ObjectClaim(o.shape, o.color) for o in objects))
    seen = [replace(o, **{attribute: wrong}) if i == index else o for i, o in enumerate(objects)]
    assert not satisfies(claim, seen)


@given(scene_objects, scene_objects, st.sampled_from(RELATIONS))
def test_relations_are_antisymmetric(first, second, name):
    opposite = {"left": "right", "right": "left", "above": "below", "below": "above"}[name]
    assert related(first, second, name) == related(second, first, opposite)
    assert not (related(first, second, name) and related(second, first, name))


@given(scene_objects)
def test_every_object_has_a_place(seen):
    places = {place for place in PLACES if has_place(seen, place)}
    assert places
    assert all(has_place(seen, word) for place in places if " " in place for word in place.split())


def test_relation_decides_between_two_candidates():
    pair = [thing("circle", "red", 0.2, 0.5), thing("square", "blue", 0.8, 0.5)]
    assert satisfies(parse_caption("a red circle left of a blue square"), pair)
    assert satisfies(parse_caption("a blue square with a red circle to its left"), pair)
    assert not satisfies(parse_caption("a red circle right of a blue square"), pair)
    assert not satisfies(parse_caption("a red circle above a blue square"), pair)


def test_an_exact_description_names_all_colours_and_shapes():
    pair = [thing("circle", "red", 0.2, 0.5), thing("square", "blue", 0.8, 0.5)]
    assert describes_exactly("a blue square and a red circle", pair)
    assert describes_exactly("a small red circle left of a blue square", pair)
    incomplete = ("a red circle", "a red circle and more", "a red shape and a blue square")
    wrong = ("a red square and a blue circle", "a large red circle and a blue square", "nonsense")
    for text in incomplete + wrong:
        assert not describes_exactly(text, pair), text


@pytest.mark.parametrize(
    "arguments",
    [((),), ((ObjectClaim("blob"),),), ((ObjectClaim("circle"),), (0, 1, "left")),
     ((ObjectClaim("circle"), ObjectClaim("star")), (0, 0, "left")),
     ((ObjectClaim("circle"), ObjectClaim("star")), (0, 1, "near"))],
)  # fmt: skip
def test_impossible_claims_are_refused(arguments):
    with pytest.raises(ValueError, match=r"claim|is not one of|relation"):
        Claim(*arguments)
