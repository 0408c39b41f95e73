"""Frozen vision teachers: which tokens of which model they give."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lexel.errors import LexelError
from lexel.train.objectives.teachers import CLIP_STATISTICS, SIGLIP_STATISTICS, VisionTeacher

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
PICTURE = {"image_size": 32, "patch_size": 8}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    """Tiny vision models of several families by name."""
    from transformers import (
        BeitConfig,
        BeitModel,
        CLIPConfig,
        CLIPModel,
        CLIPVisionConfig,
        CLIPVisionModelWithProjection,
        Dinov2WithRegistersConfig,
        Dinov2WithRegistersModel,
        ResNetConfig,
        ResNetModel,
        SiglipConfig,
        SiglipModel,
        SiglipVisionConfig,
        SiglipVisionModel,
        ViTConfig,
        ViTModel,
    )

    torch.manual_seed(0)
    text = {**SIZES, "vocab_size": 50, "bos_token_id": 0, "eos_token_id": 1}
    vision = {**SIZES, **PICTURE}
    odd = {**vision, "image_size": 35}
    models = {
        "clip": CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)),
        "tower": CLIPVisionModelWithProjection(CLIPVisionConfig(**vision, projection_dim=8)),
        "siglip": SiglipModel(SiglipConfig(text_config=text, vision_config=odd)),
        "siglip-tower": SiglipVisionModel(SiglipVisionConfig(**odd)),
        "registers": Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**vision, num_register_tokens=4)),
        "beit": BeitModel(BeitConfig(**vision, use_relative_position_bias=True)),
        "vit": ViTModel(ViTConfig(**vision)),
        "resnet": ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1])),
    }
    folder = tmp_path_factory.mktemp("teachers")
    for name, model in models.items():
        model.save_pretrained(folder / name)
    return {name: str(folder / name) for name in models}


@pytest.fixture
def pixels() -> Tensor:
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1


def shown(pixels: Tensor, statistics=CLIP_STATISTICS) -> Tensor:
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in statistics)
    return ((pixels + 1) / 2 - mean) / std


@pytest.mark.parametrize("name", ["clip", "tower", "registers", "beit", "vit"])
def test_patches_come_without_class_and_register_tokens(folders, pixels: Tensor, name: str) -> None:
    teacher = VisionTeacher(folders[name], output="patches")
    patches = teacher(pixels)
    assert patches.shape == (2, *[teacher.grid[0] * teacher.grid[1]], teacher.width) == (2, 16, 16)
    statistics = (teacher.mean.flatten().tolist(), teacher.std.flatten().tolist())
    tokens = teacher.network(shown(pixels, statistics)).last_hidden_state
    front = {"registers": 5}.get(name, 1)
    torch.testing.assert_close(patches, tokens[:, front:])
    torch.testing.assert_close(VisionTeacher(folders[name])(pixels), tokens[:, 0])


def test_a_layer_is_counted_as_in_transformers(folders, pixels: Tensor) -> None:
    from transformers import SiglipVisionModel

    pixels = F.pad(pixels, (0, 3, 0, 3))
    own = SiglipVisionModel.from_pretrained(folders["siglip-tower"]).eval()
    states = own(shown(pixels, SIGLIP_STATISTICS), output_hidden_states=True).hidden_states
    for layer in (0, 1, -2):
        teacher = VisionTeacher(folders["siglip-tower"], output="patches", layer=layer)
        torch.testing.assert_close(teacher(pixels), states[layer])
    with pytest.raises(LexelError, match=r"has 4 hidden states, no 4"):
        VisionTeacher(folders["siglip-tower"], output="patches", layer=4)(pixels)


@pytest.mark.parametrize("name", ["clip", "tower"])
def test_clips_projected_outputs(folders, pixels: Tensor, name: str) -> None:
    from transformers import CLIPModel, CLIPVisionModelWithProjection

    kind = CLIPModel if name == "clip" else CLIPVisionModelWithProjection
    own = kind.from_pretrained(folders[name]).eval()
    output = own.vision_model(shown(pixels))
    teacher = VisionTeacher(folders[name], output="embedding")
    assert teacher.width == 8
    torch.testing.assert_close(teacher(pixels), own.visual_projection(output.pooler_output))
    patches = own.vision_model.post_layernorm(output.last_hidden_state[:, 1:])
    teacher = VisionTeacher(folders[name], output="projected_patches")
    torch.testing.assert_close(teacher(pixels), own.visual_projection(patches))


@pytest.mark.parametrize("name", ["siglip", "siglip-tower"])
def test_siglips_embedding_is_pooled(folders, pixels: Tensor, name: str) -> None:
    pixels = F.pad(pixels, (0, 3, 0, 3))
    teacher = VisionTeacher(folders[name], output="embedding")
    expected = teacher.network(shown(pixels, SIGLIP_STATISTICS)).pooler_output
    torch.testing.assert_close(teacher(pixels), expected)
    assert teacher.grid == (4, 4)  # of 35 pixels three are left over


def test_other_sizes_interpolate_positions(folders, pixels: Tensor) -> None:
    teacher = VisionTeacher(folders["clip"], 48, "patches")
    assert teacher(pixels).shape == (2, 36, 16)
    large = F.interpolate(pixels, (48, 48), mode="bilinear", antialias=True)
    torch.testing.assert_close(teacher(pixels), teacher(large))


def test_teachers_are_frozen_and_say_what_they_lack(folders, pixels: Tensor) -> None:
    teacher = VisionTeacher(folders["clip"], output="embedding").requires_grad_(False)
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    for name, output in (("vit", "embedding"), ("siglip", "projected_patches")):
        with pytest.raises(LexelError, match=rf"has no image projection for {output}"):
            VisionTeacher(folders[name], output=output)
    with pytest.raises(LexelError, match=r"resnet has no square patches"):
        VisionTeacher(folders["resnet"], output="patches")(pixels)
    with pytest.raises(ValueError, match="output must be one of"):
        VisionTeacher(folders["vit"], output="tokens")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a layer is chosen for class and patches"):
        VisionTeacher(folders["clip"], output="embedding", layer=-2)
