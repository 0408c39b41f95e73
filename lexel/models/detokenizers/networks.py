"""The diffusers networks of the trained detokenizer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from lexel.models.detokenizers.diffusion import DiffusionDetokenizerConfig

WAVES = 16
"""Channels of fixed coordinates that a UNet sees where no map of codes tells it where it is."""


def build_network(config: DiffusionDetokenizerConfig) -> nn.Module:
    """The diffusers network of a config, over places of patch² cells."""
    _, channels = config.space
    seen = channels * config.patch**2
    given = config.condition_dim if config.condition == "concat" else 0
    size = (config.size[0] // config.patch, config.size[1] // config.patch)
    if config.network == "unet":
        return _unet(config, seen + (given or WAVES), seen, size)
    return _dit(config, seen + given, seen, max(size))


def _unet(config: DiffusionDetokenizerConfig, inputs: int, outputs: int, size: tuple[int, int]) -> nn.Module:
    from diffusers.models.unets.unet_2d import UNet2DModel
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    levels = len(config.channels)
    shape: dict[str, Any] = {
        "sample_size": size,
        "in_channels": inputs,
        "out_channels": outputs,
        "block_out_channels": config.channels,
        "layers_per_block": config.layers,
        "norm_num_groups": 8,
    }
    if not config.reads_tokens:
        return UNet2DModel(
            down_block_types=("DownBlock2D",) * levels,
            up_block_types=("UpBlock2D",) * levels,
            attention_head_dim=config.head_dim,
            **shape,
        )
    # Attention between all places of the first resolution would cost most of the time.
    return UNet2DConditionModel(
        down_block_types=("DownBlock2D",) + ("CrossAttnDownBlock2D",) * (levels - 1),
        up_block_types=("CrossAttnUpBlock2D",) * (levels - 1) + ("UpBlock2D",),
        cross_attention_dim=config.condition_dim,
        # What this class calls the heads' dimension is their number.
        attention_head_dim=tuple(max(1, c // config.head_dim) for c in config.channels),
        **shape,
    )


def _dit(config: DiffusionDetokenizerConfig, inputs: int, outputs: int, side: int) -> nn.Module:
    shape: dict[str, Any] = {
        "sample_size": side,
        "patch_size": 1,
        "in_channels": inputs,
        "out_channels": outputs,
        "num_layers": config.layers,
        "attention_head_dim": config.head_dim,
        "num_attention_heads": config.channels[0] // config.head_dim,
    }
    if config.condition == "joint":
        from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel

        return SD3Transformer2DModel(
            joint_attention_dim=config.condition_dim,
            caption_projection_dim=config.channels[0],
            pooled_projection_dim=config.condition_dim,
            pos_embed_max_size=side,
            **shape,
        )
    from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel

    return PixArtTransformer2DModel(
        cross_attention_dim=config.condition_dim if config.reads_tokens else None,
        use_additional_conditions=False,
        interpolation_scale=1,
        **shape,
    )
