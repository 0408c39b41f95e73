"""The language of the scene captions: claims, their wordings, and reading wordings back.

A `Claim` is what a caption says; `render_caption` words it in one of many ways and `parse_caption` inverts
every one of them. `satisfies` decides whether a list of objects shows what the caption names.

Meaning of the words: "top left" is a cell of the loose 3x3 grid, "top" the whole upper row (so for the
other sides), "center" the middle cell; relations hold between centres along their axis.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import NamedTuple

import numpy as np

from lexel.data.scene import COLORS, SHAPES, SIZES, SceneObject, place_of

PLACES = ("top left", "top right", "bottom left", "bottom right", "center", "top", "bottom", "left", "right")
RELATIONS = ("left", "right", "above", "below")

_SIZE_WORDS = {"small": ("small", "little"), "large": ("large", "big")}
_NOUNS: dict[str | None, tuple[str, ...]] = {
    **{shape: (shape,) for shape in SHAPES},
    None: ("shape", "object"),
}
_PLACE_WORDS: dict[str, tuple[str, ...]] = {
    **{place: (f"in the {place}", f"in the {place} corner") for place in PLACES[:4]},
    "center": ("in the center", "in the middle"),
    "top": ("at the top",),
    "bottom": ("at the bottom",),
    "left": ("on the left",),
    "right": ("on the right",),
}
# Subject first: "X left of Y".
_FORWARD = {
    "left": ("left of", "to the left of"),
    "right": ("right of", "to the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}
# Subject last: "Y with X to its left"; the second wording goes before the subject.
_BACKWARD = {"left": "to its left", "right": "to its right", "above": "above it", "below": "below it"}
_OPENINGS = ("", "", "there is ", "a picture of ")
_MORE = ("among other shapes", "and more")


class ObjectClaim(NamedTuple):
    """What a caption says of one object; None where it is silent."""

    shape: str | None = None
    color: str | None = None
    size: str | None = None
    place: str | None = None


@dataclass(frozen=True)
class Claim:
    """What a caption says: the objects in order of mention; relation (i, j, name), object i is `name`
    ("left" of, "right" of, "above", "below") object j, where i and j are 0 and 1; whether there is nothing
    else in the picture. Raises ValueError on an unknown name, no object, or a relation of other objects."""

    objects: tuple[ObjectClaim, ...]
    relation: tuple[int, int, str] | None = None
    exact_count: bool = True

    def __post_init__(self) -> None:
        if not self.objects:
            raise ValueError("A claim names at least one object.")
        for thing in self.objects:
            for name, known in zip(thing, (SHAPES, COLORS, SIZES, PLACES)):
                if name is not None and name not in known:
                    raise ValueError(f"{name!r} is not one of {', '.join(known)}.")
        if self.relation is not None:
            i, j, name = self.relation
            if {i, j} != {0, 1} or len(self.objects) < 2 or name not in RELATIONS:
                raise ValueError(f"A relation is (0, 1, name) or (1, 0, name), got {self.relation}.")


def _word_object(thing: ObjectClaim, rng: np.random.Generator) -> str:
    words = []
    if thing.size is not None:
        words.append(_pick(_SIZE_WORDS[thing.size], rng))
    if thing.color is not None:
        words.append(thing.color)
    words.append(_pick(_NOUNS[thing.shape], rng))
    phrase = ("an " if words[0][0] in "aeiou" else "a ") + " ".join(words)
    return phrase if thing.place is None else f"{phrase} {_pick(_PLACE_WORDS[thing.place], rng)}"


def _pick(options: Sequence[str], rng: np.random.Generator) -> str:
    return options[int(rng.integers(len(options)))] if len(options) > 1 else options[0]


def _word_relation(claim: Claim, phrases: list[str], opening: str, rng: np.random.Generator) -> str:
    assert claim.relation is not None
    i, _, name = claim.relation
    first, second = phrases[:2]
    if i == 0:
        verb = " is " if not opening and rng.random() < 0.25 else " "
        return f"{first}{verb}{_pick(_FORWARD[name], rng)} {second}"
    if rng.random() < 0.5:
        return f"{first} with {second} {_BACKWARD[name]}"
    return f"{first}, and {_BACKWARD[name]} {second}"


def render_caption(claim: Claim, rng: np.random.Generator) -> str:
    """One of the claim's wordings, lower case without a full stop, chosen by `rng`.

    A single placed object may have its place in front: "in the top left, a red circle".
    """
    place = claim.objects[0].place
    if len(claim.objects) == 1 and place is not None and rng.random() < 0.3:
        text = (
            f"{_pick(_PLACE_WORDS[place], rng)}, {_word_object(claim.objects[0]._replace(place=None), rng)}"
        )
        return text if claim.exact_count else f"{text} {_pick(_MORE, rng)}"
    opening = _pick(_OPENINGS, rng)
    phrases = [_word_object(thing, rng) for thing in claim.objects]
    if claim.relation is not None:
        text = ", and ".join([_word_relation(claim, phrases, opening, rng), *phrases[2:]])
    elif len(phrases) > 1:
        text = f"{', '.join(phrases[:-1])} and {phrases[-1]}"
    else:
        text = phrases[0]
    return opening + (text if claim.exact_count else f"{text} {_pick(_MORE, rng)}")


def _alternatives(words: dict[str, str]) -> str:
    return "|".join(sorted(words, key=len, reverse=True))


_SIZE_OF = {word: size for size, words in _SIZE_WORDS.items() for word in words}
_SHAPE_OF = {word: shape for shape, words in _NOUNS.items() for word in words}
_PLACE_OF = {word: place for place, words in _PLACE_WORDS.items() for word in words}
_FORWARD_OF = {word: name for name, words in _FORWARD.items() for word in words}
_BACKWARD_OF = {word: name for name, word in _BACKWARD.items()}
_PLACE = rf"(?:{_alternatives(_PLACE_OF)})\b"
_BARE = (
    rf"an? (?:(?:{_alternatives(_SIZE_OF)}) )?(?:(?:{'|'.join(COLORS)}) )?"
    rf"(?:{'|'.join(word for words in _NOUNS.values() for word in words)})\b"
)
_OBJECT = rf"{_BARE}(?: {_PLACE})?"
_OPENING = re.compile("^(?:there is |a picture of )")
_CLOSING = re.compile(rf" (?:{'|'.join(_MORE)})$")
_PLACE_FIRST = re.compile(rf"(?P<place>{_PLACE}), (?P<object>{_BARE})")
# Sentence form, its words for relations, and which of the two objects is the subject and which the other.
_RELATION_FORMS = (
    (
        re.compile(
            rf"(?P<first>{_OBJECT})(?: is)? (?P<word>{_alternatives(_FORWARD_OF)}) (?P<second>{_OBJECT})"
        ),
        _FORWARD_OF,
        (0, 1),
    ),
    (
        re.compile(
            rf"(?P<first>{_OBJECT}) with (?P<second>{_OBJECT}) (?P<word>{_alternatives(_BACKWARD_OF)})"
        ),
        _BACKWARD_OF,
        (1, 0),
    ),
    (
        re.compile(
            rf"(?P<first>{_OBJECT}), and (?P<word>{_alternatives(_BACKWARD_OF)}) (?P<second>{_OBJECT})"
        ),
        _BACKWARD_OF,
        (1, 0),
    ),
)
_NEXT = re.compile(rf"(?:, and |, | and )(?P<object>{_OBJECT})")
_FIRST = re.compile(_OBJECT)


def _read_object(phrase: str) -> ObjectClaim:
    place = next((place for word, place in _PLACE_OF.items() if phrase.endswith(" " + word)), None)
    words = re.match(rf"(.*?)(?: {_PLACE})?$", phrase)
    assert words is not None
    names = words[1].split()[1:]
    return ObjectClaim(
        _SHAPE_OF[names[-1]],
        next((name for name in names if name in COLORS), None),
        next((_SIZE_OF[name] for name in names if name in _SIZE_OF), None),
        place,
    )


def _read_start(text: str) -> tuple[list[ObjectClaim], tuple[int, int, str] | None, int]:
    """The objects and relation a sentence starts with, and where they end; no objects when it does not."""
    for form, words, (i, j) in _RELATION_FORMS:
        if (match := form.match(text)) is not None:
            things = [_read_object(match["first"]), _read_object(match["second"])]
            return things, (i, j, words[match["word"]]), match.end()
    match = _FIRST.match(text)
    return ([], None, 0) if match is None else ([_read_object(match[0])], None, match.end())


def parse_caption(text: str) -> Claim | None:
    """The claim a caption makes, or None when the text is not a sentence of the caption language.

    Case, spacing and a final full stop do not matter. ``parse_caption(render_caption(c, rng)) == c``.
    """
    text = " ".join(text.lower().split()).removesuffix(".")
    closing = _CLOSING.search(text)
    text = text if closing is None else text[: closing.start()]
    if (match := _PLACE_FIRST.fullmatch(text)) is not None:
        thing = _read_object(match["object"])._replace(place=_PLACE_OF[match["place"]])
        return Claim((thing,), None, closing is None)
    objects, relation, end = _read_start(text := _OPENING.sub("", text, count=1))
    while (match := _NEXT.match(text, end)) is not None:
        objects.append(_read_object(match["object"]))
        end = match.end()
    return Claim(tuple(objects), relation, closing is None) if objects and end == len(text) else None


def has_place(thing: SceneObject, place: str) -> bool:
    """Whether an object lies in a named place: a corner cell, the centre cell, or a whole row or column."""
    column, row = place_of(thing.center)
    if place == "center":
        return column == row == "center"
    return all(word in (column, row) for word in place.split())


def related(first: SceneObject, second: SceneObject, relation: str, margin: float = 0.05) -> bool:
    """Whether `first` is left of / right of / above / below `second` by more than `margin` of the side."""
    dx, dy = second.center[0] - first.center[0], second.center[1] - first.center[1]
    return {"left": dx, "right": -dx, "above": dy, "below": -dy}[relation] > margin


def _matches(claim: ObjectClaim, thing: SceneObject) -> bool:
    return (
        claim.shape in (None, thing.shape)
        and claim.color in (None, thing.color)
        and claim.size in (None, thing.size)
        and (claim.place is None or has_place(thing, claim.place))
    )


def satisfies(claim: Claim, objects: Sequence[SceneObject]) -> bool:
    """Whether the objects show all the claim names: some assignment gives each named object its attributes,
    the relation is true, and with `exact_count` there are no further objects."""
    if len(objects) < len(claim.objects) or (claim.exact_count and len(objects) != len(claim.objects)):
        return False
    for chosen in permutations(objects, len(claim.objects)):
        if all(_matches(named, thing) for named, thing in zip(claim.objects, chosen)):
            if claim.relation is None:
                return True
            i, j, name = claim.relation
            if related(chosen[i], chosen[j], name):
                return True
    return False


def describes_exactly(caption: str, objects: Sequence[SceneObject]) -> bool:
    """Whether a caption is true of the objects and names every one of them with colour and shape."""
    claim = parse_caption(caption)
    return (
        claim is not None
        and len(claim.objects) == len(objects)
        and all(named.shape is not None and named.color is not None for named in claim.objects)
        and satisfies(claim, objects)
    )
