"""One scene in many modalities: each view and value says what the scene says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lexel.data.example import Example
from lexel.data.modalities import (
    CLASSES,
    FIELDS,
    VIEWS,
    edges,
    read_depth,
    read_edges,
    read_segmentation,
    render_view,
    structured_codecs,
    structured_values,
)
from lexel.data.scene import PALETTE, SHAPES, Background, Scene, SceneObject
from lexel.data.shapes import ShapesConfig
from lexel.data.tokenized import TokenizedDataset, tokenize_values
from lexel.errors import LexelError
from lexel.tokenizers.structured import Box

LIGHT = Background("light", (0.94, 0.93, 0.91))


def thing(shape: str, color: str, x: float, y: float) -> SceneObject:
    return SceneObject.of(shape, color, "large", (x, y), 0.19, PALETTE[color])


SCENE = Scene((thing("square", "red", 0.25, 0.25), thing("ring", "blue", 0.75, 0.6)), LIGHT)
EXAMPLE = Example("scene", ("a red square and a blue ring",), SCENE.render(32), SCENE)


def test_a_segmentation_is_read_back_exactly() -> None:
    for size in (32, 48):
        labels = SCENE.segmentation(size)
        wanted = torch.tensor([0, SHAPES.index("square") + 1, SHAPES.index("ring") + 1])[labels]
        assert torch.equal(read_segmentation(render_view(SCENE, "segmentation", size)), wanted)


def test_lower_objects_are_nearer() -> None:
    near = read_depth(render_view(SCENE, "depth", 32))
    labels = SCENE.segmentation(32)
    for number, one in enumerate(SCENE.objects, 1):
        assert near[labels == number].sub(one.box[3]).abs().max() < 1e-6
    assert near[labels == 0].max() == 0
    assert structured_values("layers", EXAMPLE) == ["blue ring", "red square"]


def test_edges_of_a_step_are_one_line() -> None:
    picture = -torch.ones(3, 32, 32)
    picture[:, 8:20, 10:24] = 1
    found = read_edges(edges(picture))
    # Of the two columns beside a step the left one, of the two rows the upper one.
    assert found[12, :].nonzero().flatten().tolist() == [9, 23]
    assert found[:, 16].nonzero().flatten().tolist() == [7, 19]
    assert not read_edges(edges(torch.full((3, 32, 32), 0.3))).any()
    assert not read_edges(edges(picture * 0.15)).any(), "a step of 0.15 is below the threshold"
    blue = torch.zeros(3, 32, 32)
    blue[2, :, 16:] = 1
    assert read_edges(edges(blue)).any(), "one channel is enough"
    assert set(edges(SCENE.render(32)).unique().tolist()) == {-1.0, 1.0}


def test_edges_of_a_scene_lie_on_its_outlines() -> None:
    found = read_edges(render_view(SCENE, "edges", 64))
    labels = SCENE.segmentation(64).float()[None, None]
    wide = torch.nn.functional.max_pool2d(labels, 5, 1, 2) != -torch.nn.functional.max_pool2d(
        -labels, 5, 1, 2
    )
    assert found.any()
    assert not (found & ~wide[0, 0]).any()


def test_values_of_a_scene() -> None:
    boxes = structured_values("boxes", EXAMPLE)
    assert boxes == [Box(*SCENE.objects[0].box, "red square"), Box(*SCENE.objects[1].box, "blue ring")]
    background, *colors = structured_values("palette", EXAMPLE)
    assert all(abs(x - y) <= 10 for x, y in zip(background, (240, 237, 232)))
    for color, name in zip(colors, ("red", "blue")):
        assert max(abs(x - 255 * y) for x, y in zip(color, PALETTE[name])) < 25
    metadata = dict(structured_values("metadata", EXAMPLE))
    assert tuple(metadata) == FIELDS
    assert metadata["n_coco_instances"] == 2
    assert metadata["coco_instance_diversity"] == 2
    for name, codec in structured_codecs().items():
        values = structured_values(name, EXAMPLE)
        assert codec.decode(codec.encode([values]))[0] is not None
    assert len(CLASSES) == 64
    with pytest.raises(ValueError, match="has no scene"):
        structured_values("boxes", replace(EXAMPLE, truth=None))
    with pytest.raises(ValueError, match="boxes, palette, metadata, layers"):
        structured_values("smell", EXAMPLE)


def test_the_source_shows_any_view_of_the_same_scenes() -> None:
    config = ShapesConfig(count=4)
    plain = config.build("train")
    for view in VIEWS:
        shown = replace(config, view=view).build("train")
        assert torch.equal(shown[3].pixels, render_view(plain.scene(3), view, 32))
        assert shown[3].captions == plain[3].captions
        assert shown[3].truth == plain[3].truth
        assert replace(config, view=view).scenes("two", 1)[0].truth == config.scenes("two", 1)[0].truth
    with pytest.raises(ValueError, match="view is one of picture, segmentation, edges, depth, got 'x-ray'"):
        ShapesConfig(view="x-ray")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a view is one of"):
        render_view(SCENE, "x-ray", 32)


def test_values_are_stored_row_by_row(tmp_path: Path) -> None:
    source = ShapesConfig(count=5).build("train")
    codec = structured_codecs(64)["boxes"]
    for _ in range(2):  # the second call finds it finished
        stored = tokenize_values(
            codec, source, lambda e: structured_values("boxes", e), tmp_path, shard_size=2
        )
    assert [row.key for row in stored] == [source[i].key for i in range(5)]
    for row in range(5):
        (found,) = codec.decode(stored[row].batch(codec.layout))
        wanted = codec.decode(codec.encode([structured_values("boxes", source[row])]))[0]
        assert found == wanted
        assert stored[row].captions == source[row].captions
    with pytest.raises(LexelError, match="tokenizer"):
        TokenizedDataset(tmp_path, structured_codecs(65)["boxes"].fingerprint())
