"""The procedural scenes: determinism, truth, and what training never shows."""

from __future__ import annotations

import math
from collections import Counter
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lexel.data.captions import describes_exactly, parse_caption, related, satisfies
from lexel.data.scene import COLORS, DISTANCES, PALETTE, SHAPES, Background, Scene, SceneObject, shape_moments
from lexel.data.shapes import (
    SEEN_PAIRS,
    UNSEEN_PAIRS,
    ShapesConfig,
    chance_accuracy,
    heldout_combinations,
)

SPLITS = ("train", "validation")
PLAIN = Background("grey", (0.6, 0.6, 0.6))


def pairs_of(scene: Scene) -> list[tuple[str, str]]:
    return [(thing.color, thing.shape) for thing in scene.objects]


def combinations_of(scene: Scene) -> set[tuple]:
    return {tuple(sorted(both)) for both in combinations(pairs_of(scene), 2)}


class TestDeterminism:
    @settings(max_examples=25)
    @given(st.integers(0, 2**63), st.integers(0, 999), st.sampled_from(SPLITS))
    def test_an_example_is_a_pure_function_of_seed_split_and_index(self, seed, index, split):
        config = ShapesConfig(count=8000, seed=seed)
        first, again = config.build(split)[index], config.build(split)[index]
        assert first.captions == again.captions == config.build(split).captions(index)
        assert first.truth == again.truth == config.build(split).scene(index)
        assert torch.equal(first.pixels, again.pixels)

    def test_seeds_splits_and_indices_differ(self):
        scenes = [
            ShapesConfig(seed=seed).build(split).scene(index)
            for seed in range(3) for split in SPLITS for index in range(20)
        ]  # fmt: skip
        assert len(set(scenes)) == len(scenes)

    def test_more_examples_leave_the_first_ones_alone(self):
        assert ShapesConfig(count=10).build("train").scene(7) == ShapesConfig(count=99).build("train").scene(
            7
        )

    @pytest.mark.parametrize("size", [48, 64, 256])
    def test_every_resolution_shows_the_same_scene(self, size):
        small, large = (ShapesConfig(size=s, textured=0).build("train")[3] for s in (32, size))
        assert small.truth == large.truth
        assert small.captions == large.captions
        shrunk = torch.nn.functional.interpolate(large.pixels[None], size=32, mode="area")[0]
        assert (shrunk - small.pixels).abs().mean() < 0.01


class TestTruth:
    @settings(max_examples=40)
    @given(st.integers(0, 9999))
    def test_captions_are_true_and_the_first_is_complete(self, index):
        data = ShapesConfig(captions_per_picture=6).build("train")
        objects, captions = data.scene(index).objects, data.captions(index)
        assert all(satisfies(parse_caption(caption), objects) for caption in captions)
        assert describes_exactly(captions[0], objects)

    @settings(max_examples=40)
    @given(st.integers(0, 9999), st.sampled_from(SPLITS))
    def test_objects_stay_apart_and_inside(self, index, split):
        scene = ShapesConfig(count=80000).build(split).scene(index)
        labels = scene.segmentation(128)
        for number, thing in enumerate(scene.objects, start=1):
            assert min(thing.box) > 0
            assert max(thing.box) < 1
            alone = Scene((thing,), scene.background).segmentation(128) > 0
            assert torch.equal(labels == number, alone)
            # A ring of one thirty-second of the side around the object is free of others.
            wide = torch.nn.functional.max_pool2d(alone[None].float(), 9, 1, 4)[0] > 0
            assert set(labels[wide].unique().tolist()) <= {0, number}

    @given(st.integers(0, 9999))
    @settings(max_examples=20)
    def test_boxes_bound_the_segmentation(self, index):
        scene, size = ShapesConfig().build("train").scene(index), 256
        labels = scene.segmentation(size)
        for number, thing in enumerate(scene.objects, start=1):
            ys, xs = (labels == number).nonzero(as_tuple=True)
            measured = (xs.min() / size, ys.min() / size, (xs.max() + 1) / size, (ys.max() + 1) / size)
            assert max(abs(float(a) - b) for a, b in zip(measured, thing.box)) < 2.5 / size

    @pytest.mark.parametrize("shape", SHAPES)
    def test_rendered_coverage_equals_the_area(self, shape):
        """Anti-aliasing keeps the area whatever the subpixel place: the mean over 16 places is within 2 %."""
        areas = []
        for shift in np.linspace(0, 1 / 32, 16, endpoint=False):
            thing = SceneObject.of(shape, "red", "large", (0.5 + shift, 0.5 + 3 * shift / 7), 0.19, (1, 1, 1))
            picture = Scene((thing,), Background("dark", (0, 0, 0))).render(32)
            areas.append(float(((picture[0] + 1) / 2).sum()) / 32**2)
        assert np.mean(areas) == pytest.approx(shape_moments(shape).area * 0.19**2, rel=0.02)

    @pytest.mark.parametrize("shape", SHAPES)
    def test_distances_have_unit_slope_at_the_outline(self, shape):
        """Otherwise the outline's softness would depend on the shape."""
        axis = np.linspace(-1.3, 1.3, 1301, dtype=np.float64)
        distance = DISTANCES[shape](*np.meshgrid(axis, axis))
        slope = np.hypot(*np.gradient(distance, axis[1] - axis[0]))
        assert np.median(np.abs(slope[np.abs(distance) < 0.02] - 1)) < 0.01

    def test_pixels_are_the_named_colours(self):
        thing = SceneObject.of("circle", "cyan", "large", (0.5, 0.5), 0.19, PALETTE["cyan"])
        picture = Scene((thing,), PLAIN).render(64)
        assert torch.allclose(picture[:, 32, 32], torch.tensor(PALETTE["cyan"]) * 2 - 1)
        assert torch.allclose(picture[:, 2, 2], torch.full((3,), 0.2), atol=1e-6)

    @settings(max_examples=30)
    @given(st.integers(0, 500), st.sampled_from([32, 50, 64]))
    def test_pictures_stay_in_range(self, index, size):
        pixels = ShapesConfig(size=size, textured=1.0).build("train")[index].pixels
        assert pixels.shape == (3, size, size)
        assert pixels.dtype == torch.float32
        assert pixels.abs().max() <= 1


class TestCompositions:
    def test_each_colour_and_shape_is_held_out_once(self):
        assert sorted(color for color, _ in UNSEEN_PAIRS) == sorted(COLORS)
        assert sorted(shape for _, shape in UNSEEN_PAIRS) == sorted(SHAPES)
        assert not set(SEEN_PAIRS) & set(UNSEEN_PAIRS)

    def test_training_shows_no_unseen_pair_and_no_heldout_combination(self):
        scenes = [ShapesConfig().build("train").scene(index) for index in range(1500)]
        assert {pair for scene in scenes for pair in pairs_of(scene)} == set(SEEN_PAIRS)
        assert not any(combinations_of(scene) & heldout_combinations() for scene in scenes)

    def test_validation_holds_a_new_combination_wherever_there_are_two_objects(self):
        scenes = [ShapesConfig().build("validation").scene(index) for index in range(300)]
        for scene in scenes:
            assert set(pairs_of(scene)) <= set(SEEN_PAIRS)
            assert len(scene.objects) == 1 or combinations_of(scene) & heldout_combinations()

    def test_object_counts_follow_the_weights(self):
        """800 draws; a share is off by 0.07 with probability below 1e-4 (normal approximation, 4 sigma)."""
        config = ShapesConfig(object_weights=[0.5, 0.3, 0.2])
        counts = Counter(len(config.build("train").scene(index).objects) for index in range(800))
        for number, weight in zip((1, 2, 3), (0.5, 0.3, 0.2)):
            assert abs(counts[number] / 800 - weight) < 0.07
        assert {len(ShapesConfig(max_objects=1).build("train").scene(i).objects) for i in range(50)} == {1}

    @pytest.mark.parametrize(("kind", "number"), [("one", 1), ("two", 2), ("three", 3), ("unseen", 1)])
    def test_prompts_and_scenes_of_each_kind(self, kind, number):
        config = ShapesConfig()
        prompts, examples = config.prompts(kind, 60, seed=3), config.scenes(kind, 20, seed=3)
        assert prompts == config.prompts(kind, 60, seed=3)
        assert prompts[:20] == config.prompts(kind, 20, seed=3) != config.prompts(kind, 20, seed=4)
        pool = UNSEEN_PAIRS if kind == "unseen" else SEEN_PAIRS
        for text, claim in prompts:
            assert parse_caption(text) == claim
            assert len(claim.objects) == number
            assert all((named.color, named.shape) in pool for named in claim.objects)
            assert (claim.relation is not None) == (number > 1)
            if number == 2:
                both = tuple(sorted((named.color, named.shape) for named in claim.objects))
                assert both in heldout_combinations()
        for example in examples:
            assert describes_exactly(example.captions[0], example.truth.objects)
            assert set(pairs_of(example.truth)) <= set(pool)

    def test_captioned_relations_hold_with_a_margin(self):
        config = ShapesConfig()
        for index in range(100):
            objects = config.build("train").scene(index).objects
            for caption in config.build("train").captions(index):
                claim = parse_caption(caption)
                if claim.relation is not None:
                    i, j, name = claim.relation
                    first, second = claim.objects[i], claim.objects[j]
                    assert any(
                        related(a, b, name, margin=0.15)
                        for a in objects for b in objects
                        if first.shape in (None, a.shape) and second.shape in (None, b.shape)
                    )  # fmt: skip

    def test_chance_levels(self):
        """One object: about 1 / 64, less for sizes and places. 160,000 dependent trials, so a wide band."""
        assert 0.005 < chance_accuracy("one") < 1 / 64
        assert 0.005 < chance_accuracy("unseen") < 1 / 64
        assert 0 < chance_accuracy("two") < 1e-3


class TestConfig:
    @pytest.mark.parametrize(
        "values",
        [{"size": 31}, {"size": 257}, {"count": 0}, {"max_objects": 4}, {"object_weights": (1.0,)},
         {"object_weights": (0, 0, 0)}, {"textured": 1.5}, {"partial": -0.1}, {"captions_per_picture": 0}],
    )  # fmt: skip
    def test_bad_values_are_refused(self, values):
        with pytest.raises(ValueError, match=r"\d"):
            ShapesConfig(**values)

    def test_unknown_names_and_indices_are_refused(self):
        config = ShapesConfig(count=10)
        with pytest.raises(ValueError, match="test"):
            config.build("test")
        with pytest.raises(ValueError, match="four"):
            config.prompts("four", 1)
        with pytest.raises(IndexError):
            config.build("train")[10]
        assert config.build("train").scene(-1) == config.build("train").scene(9)

    def test_texture_is_light(self):
        """Least contrast of a texture stays far below that of any object."""
        config = ShapesConfig(textured=1.0)
        for index in range(30):
            example = config.build("train")[index]
            free = example.pixels[:, example.truth.segmentation(32) == 0]
            middle = free.median(1, keepdim=True).values
            assert float((free - middle).abs().median()) < 0.1
        assert not math.isclose(float(free.std()), 0)
