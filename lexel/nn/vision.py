"""Any vision model of transformers with square patches (CLIP, SigLIP, DINOv2, ViT …) as the frozen encoder
of a tokenizer, in place of EVA's ViT-g.

b batch · n patches · d width · h w picture
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lexel.errors import LexelError
from lexel.nn.eva_vit import CLIP_DEVIATION, CLIP_MEAN


@dataclass(frozen=True)
class VisionConfig:
    """One of them.

    architecture: its own config, `model_type` included; so the tokenizer's folder is complete without it.
    image_size: side of the pictures. mean, deviation: of pixels in [0, 1]. layer: the hidden state that is
    read (-1: `last_hidden_state`).
    """

    architecture: dict[str, Any]
    image_size: int = 224
    mean: tuple[float, ...] = CLIP_MEAN
    deviation: tuple[float, ...] = CLIP_DEVIATION
    layer: int = -1

    def __post_init__(self) -> None:
        for name in ("mean", "deviation"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        patch = self.architecture.get("patch_size")
        if not isinstance(patch, int) or self.image_size % patch:
            raise ValueError(
                f"the vision model needs square patches that divide {self.image_size}, got {patch}."
            )

    @classmethod
    def read(cls, name: str, **options: Any) -> VisionConfig:
        """The config of the vision model in a local folder or under a hub id; options: the other fields.
        Raises LexelError when there is none."""
        from transformers import AutoConfig

        try:
            found = AutoConfig.from_pretrained(name, trust_remote_code=False)
        except (OSError, ValueError, KeyError) as error:
            raise LexelError(f"the vision model {name} cannot be read: {error}") from error
        found = getattr(found, "vision_config", found)
        architecture = json.loads(found.to_json_string(use_diff=False))
        options = {"image_size": architecture.get("image_size", 224), **options}
        return cls({key: architecture[key] for key in sorted(architecture) if key not in UNUSED}, **options)

    @property
    def width(self) -> int:
        """d: width of its features."""
        return int(self.architecture["hidden_size"])

    @property
    def patches(self) -> int:
        """N: patches of a picture."""
        return (self.image_size // int(self.architecture["patch_size"])) ** 2

    def build(self) -> VisionEncoder:
        """The network, with random weights."""
        return VisionEncoder(self)


# Of a transformers config: who wrote it, and how its network was kept.
UNUSED = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures")


class VisionEncoder(nn.Module):
    """A vision model of transformers; normalised pixels ``[b, 3, h, w]`` to a class token (zeros where the
    model has none) and its patches, ``[b, 1 + n, d]``, as `EvaViT` gives them."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        from transformers import AutoConfig, AutoModel

        self.config = config
        model = AutoModel.from_config(AutoConfig.for_model(**config.architecture))
        self.network: Any = getattr(model, "vision_model", model)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        native = self.config.architecture.get("image_size", self.config.image_size)
        options = {} if native == self.config.image_size else {"interpolate_pos_encoding": True}
        if self.config.layer == -1:
            tokens = self.network(x, **options).last_hidden_state
        else:
            tokens = self.network(x, output_hidden_states=True, **options).hidden_states[self.config.layer]
        # Class and register tokens stand in front, the class token first.
        patches = tokens[:, -self.config.patches :]
        if tokens.shape[1] == self.config.patches:
            return F.pad(patches, (0, 0, 1, 0))
        return torch.cat([tokens[:, :1], patches], dim=1)


def vision_weights(name: str) -> dict[str, Tensor]:
    """The tensors of the vision model in a folder or under a hub id."""
    from transformers import AutoModel

    try:
        model = AutoModel.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise LexelError(f"the vision model {name} cannot be read: {error}") from error
    return getattr(model, "vision_model", model).state_dict()
