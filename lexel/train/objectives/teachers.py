"""Frozen vision models that say what is in a picture: CLIP, SigLIP, DINOv2, BEiT, ViT, any of transformers'.

They come from the hub or a local folder through transformers' `AutoModel`, without running code of theirs.

b batch · n patches · f feature width
"""

from __future__ import annotations

import inspect
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lexel.errors import LexelError

PUBLISHED_SIZE = 224
# Of pixels in [0, 1], by red, green and blue: where a model comes without a preprocessor file.
CLIP_STATISTICS = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
SIGLIP_STATISTICS = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
IMAGENET_STATISTICS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

Output = Literal["class", "patches", "projected_patches", "embedding"]


class VisionTeacher(nn.Module):
    """Pixels ``[b, 3, h, w]`` in [-1, 1] to what a frozen vision model makes of them.

    name: hub id or local folder. size: side of the pictures the model is shown (None: that of its
    preprocessor file, else its own). output:

    * ``class``: the class token, ``[b, f]``;
    * ``patches``: the patch tokens in raster order, without class and register tokens, ``[b, n, f]``;
    * ``projected_patches``: CLIP's patch tokens through its last norm and its image projection (TokenFlow's
      teacher), ``[b, n, p]``;
    * ``embedding``: the picture's place among texts, ``[b, p]``: CLIP's projected class token, SigLIP's
      pooled one.

    layer: the hidden state whose tokens `class` and `patches` are, counted as in transformers (0: the
    embedded patches, -2: before the last layer, SigLIP in TokenFlow); -1 is each model's `last_hidden_state`:
    for CLIP before the final norm, for SigLIP and DINOv2 after it.
    Pictures are resized to nearest neighbours for `class` (as in FQGAN), else bilinearly with antialiasing.
    Raises LexelError for a model that cannot be had or that has no such output, ValueError for an output of
    another name and a layer where no hidden state is chosen.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, name: str, size: int | None = None, output: Output = "class", layer: int = -1) -> None:
        super().__init__()
        if output not in get_args(Output):
            raise ValueError(f"output must be one of {', '.join(get_args(Output))}, got {output!r}.")
        if layer != -1 and output not in ("class", "patches"):
            raise ValueError(f"a layer is chosen for class and patches, not for {output}.")
        self.name, self.output, self.layer = name, output, layer
        model = _load(name)
        # CLIP files hold a text model too.
        self.network: Any = getattr(model, "vision_model", model)
        self.projection = _projection(name, model, output)
        values = _preprocessing(name)
        mean, std = _statistics(self.network.config.model_type)
        self.size = size or _side(values, self.network.config)
        self.register_buffer("mean", torch.tensor(values.get("image_mean", mean)).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(values.get("image_std", std)).view(3, 1, 1))
        self.eval().requires_grad_(False)

    @property
    def width(self) -> int:
        """Width f or p of what `forward` gives."""
        if isinstance(self.projection, nn.Linear):
            return self.projection.out_features
        return int(self.network.config.hidden_size)

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of the patches. Raises LexelError for a model without square patches."""
        patch = getattr(self.network.config, "patch_size", None)
        if not isinstance(patch, int) or self.size < patch:
            raise LexelError(f"the teacher {self.name} has no square patches at {self.size} pixels.")
        return (self.size // patch,) * 2

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> Tensor:
        """See the class."""
        shown = (self._resize((pixels.float() + 1) / 2) - self.mean) / self.std
        if self.output == "embedding":
            return self.projection(self.network(shown, **self._own_size()).pooler_output)
        tokens = self._tokens(shown)
        if self.output == "class":
            return self._class_token(tokens)
        count = self.grid[0] * self.grid[1]
        if tokens.ndim != 3 or tokens.shape[1] < count:
            raise LexelError(
                f"the teacher {self.name} gives no tokens of {self.grid[0]}x{self.grid[1]} patches."
            )
        # Class and register tokens stand in front.
        patches = tokens[:, -count:]
        if self.output == "patches":
            return patches
        return self.projection(self.network.post_layernorm(patches))

    def _resize(self, pixels: Tensor) -> Tensor:
        size = (self.size, self.size)
        if pixels.shape[2:] == size:
            return pixels
        if self.output == "class":
            return F.interpolate(pixels, size, mode="nearest")
        return F.interpolate(pixels, size, mode="bilinear", antialias=True)

    def _tokens(self, shown: Tensor) -> Tensor:
        """All tokens of the chosen hidden state, ``[b, t, f]``."""
        if self.layer == -1:
            return self.network(shown, **self._own_size()).last_hidden_state
        states = self.network(shown, output_hidden_states=True, **self._own_size()).hidden_states
        if not -len(states) <= self.layer < len(states):
            raise LexelError(f"the teacher {self.name} has {len(states)} hidden states, no {self.layer}.")
        return states[self.layer]

    def _own_size(self) -> dict[str, bool]:
        """What CLIP-like models must be told about a size they were not made for."""
        native = getattr(self.network.config, "image_size", self.size)
        accepts = "interpolate_pos_encoding" in inspect.signature(self.network.forward).parameters
        return {"interpolate_pos_encoding": True} if accepts and native != self.size else {}

    def _class_token(self, tokens: Tensor) -> Tensor:
        patch = getattr(self.network.config, "patch_size", None)
        if tokens.ndim != 3 or (isinstance(patch, int) and tokens.shape[1] == (self.size // patch) ** 2):
            raise LexelError(f"the teacher {self.name} has no class token; use a model like CLIP or DINOv2.")
        return tokens[:, 0]


def _load(name: str) -> Any:
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
        # `AutoModel` would drop the projection of folders with a vision tower alone (unCLIP's image encoder).
        architecture = (getattr(config, "architectures", None) or [""])[0]
        projected = architecture.endswith("VisionModelWithProjection")
        loader = getattr(transformers, architecture if projected else "AutoModel")
        return loader.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, KeyError, AttributeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise LexelError(
            f"the teacher {name} cannot be loaded; give a local folder or a hub id: {reason}"
        ) from error


def _projection(name: str, model: Any, output: Output) -> nn.Module:
    """What follows the vision tower for this output."""
    projection = getattr(model, "visual_projection", None)
    if output in ("class", "patches"):
        return nn.Identity()
    if projection is not None and (output == "embedding" or hasattr(model.vision_model, "post_layernorm")):
        return projection
    if output == "embedding" and "siglip" in model.config.model_type:
        return nn.Identity()  # pooled by attention, with no projection
    likes = "CLIP or SigLIP" if output == "embedding" else "CLIP"
    raise LexelError(
        f"the teacher {name} has no image projection for {output}; use a whole model like {likes}."
    )


def _statistics(model_type: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    if "siglip" in model_type:
        return SIGLIP_STATISTICS
    return CLIP_STATISTICS if "clip" in model_type else IMAGENET_STATISTICS


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
