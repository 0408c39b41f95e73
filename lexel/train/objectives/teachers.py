"""Frozen vision models that say what is in a picture: CLIP, DINOv2, any of transformers' with a class token.

They come from the hub or a local folder through transformers' `AutoModel`, without running code of theirs.

b batch · f feature width
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lexel.errors import LexelError

PUBLISHED_SIZE = 224
# Of pixels in [0, 1], by red, green and blue: where a model comes without a preprocessor file.
CLIP_STATISTICS = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
IMAGENET_STATISTICS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class VisionTeacher(nn.Module):
    """Pixels ``[b, 3, h, w]`` in [-1, 1] to the class token of the last layer, ``[b, f]``.

    name: hub id or local folder. size: side of the pictures the model is shown (None: that of its
    preprocessor file, else its own). For CLIP this is the token before the final norm (`hidden_states[-1]`),
    for DINOv2 after it: each model's `last_hidden_state`. Pictures are resized to nearest neighbours, as in
    FQGAN.
    Raises LexelError for a model that cannot be had, or that has no class token.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, name: str, size: int | None = None) -> None:
        super().__init__()
        self.name = name
        self.network = _load(name)
        values = _preprocessing(name)
        is_clip = "clip" in self.network.config.model_type
        mean, std = CLIP_STATISTICS if is_clip else IMAGENET_STATISTICS
        self.size = size or _side(values, self.network.config)
        self.register_buffer("mean", torch.tensor(values.get("image_mean", mean)).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(values.get("image_std", std)).view(3, 1, 1))
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> Tensor:
        """See the class."""
        shown = F.interpolate((pixels.float() + 1) / 2, (self.size, self.size), mode="nearest")
        tokens = self.network((shown - self.mean) / self.std).last_hidden_state
        patch = getattr(self.network.config, "patch_size", None)
        if tokens.ndim != 3 or (isinstance(patch, int) and tokens.shape[1] == (self.size // patch) ** 2):
            raise LexelError(f"the teacher {self.name} has no class token; use a model like CLIP or DINOv2.")
        return tokens[:, 0]


def _load(name: str) -> Any:
    from transformers import AutoModel

    try:
        model: Any = AutoModel.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise LexelError(
            f"the teacher {name} cannot be loaded; give a local folder or a hub id: {reason}"
        ) from error
    # CLIP files hold a text model too.
    return getattr(model, "vision_model", model)


def _preprocessing(name: str) -> dict[str, Any]:
    """The model's `preprocessor_config.json`, as data; empty when it has none."""
    from transformers.image_processing_base import ImageProcessingMixin

    try:
        return dict(ImageProcessingMixin.get_image_processor_dict(name)[0])
    except OSError:
        return {}


def _side(values: dict[str, Any], config: Any) -> int:
    """The picture side of a preprocessor file (what it crops to, else resizes to), else the model's own."""
    for key in ("crop_size", "size"):
        found = values.get(key)
        side = found.get("height", found.get("shortest_edge")) if isinstance(found, dict) else found
        if isinstance(side, int):
            return side
    own = getattr(config, "image_size", PUBLISHED_SIZE)
    return own if isinstance(own, int) else own[0]
