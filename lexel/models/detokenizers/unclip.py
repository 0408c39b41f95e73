"""Stable unCLIP 2.1: an image embedding of CLIP ViT-H to a picture (arXiv 2204.06125, stabilityai's weights,
run by diffusers' `StableUnCLIPImg2ImgPipeline`). SEED draws its codes with it, unchanged.

The prompt is always empty, so of the text tower only that prompt's states are kept. The embedding is
normalised, noised to a level (0: a trace of noise), and reaches the U-Net beside a code of that level.

b batch · f width of the image embedding · t prompt tokens · c latent channels · h w latent grid · H W picture
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from einops import rearrange
from torch import Tensor

from lexel.catalog import Published, System
from lexel.errors import LexelError
from lexel.hub import resolve_folder
from lexel.models.detokenizers.base import Condition, Detokenizer

# Schedulers that a folder may name; each gives the same pictures from the same noise.
SCHEDULERS = ("PNDMScheduler", "DDIMScheduler", "DPMSolverMultistepScheduler", "EulerDiscreteScheduler")
FEATURE_NOISE = "DDPMScheduler"


@dataclass(frozen=True)
class UnClipConfig:
    """unet, vae: diffusers' own configs of its `UNet2DConditionModel` and `AutoencoderKL`. scheduler, levels:
    of the sampler (one of `SCHEDULERS`, as `kind`) and of the noise on embeddings (a `DDPMScheduler`).
    prompt_tokens: t. steps, guidance: of `decode` unless told otherwise; level: of the noise on embeddings.
    Raises ValueError for another kind of scheduler."""

    unet: dict[str, Any]
    vae: dict[str, Any]
    scheduler: dict[str, Any]
    levels: dict[str, Any]
    prompt_tokens: int = 77
    steps: int = 20
    guidance: float = 10.0
    level: int = 0

    def __post_init__(self) -> None:
        if self.scheduler.get("kind") not in SCHEDULERS:
            raise ValueError(
                f"scheduler.kind must be one of {', '.join(SCHEDULERS)}, got {self.scheduler.get('kind')!r}."
            )

    @property
    def features(self) -> int:
        """f: the U-Net is given as wide a code of the noise level beside it."""
        return int(self.unet["projection_class_embeddings_input_dim"]) // 2

    def build(self) -> UnClipDetokenizer:
        """The networks, with random weights."""
        return UnClipDetokenizer(self)


class UnClipDetokenizer(Detokenizer):
    """Image embeddings ``[b, 1, f]`` to pictures. `noise` is the start of the sampler, ``[b, c, h, w]``."""

    model_type: ClassVar[str] = "unclip"
    config_class: ClassVar[type] = UnClipConfig
    config: UnClipConfig
    reads: Literal["codes", "features"] = "features"
    prompt: Tensor

    def __init__(self, config: UnClipConfig) -> None:
        super().__init__()
        import diffusers
        from diffusers import AutoencoderKL, UNet2DConditionModel
        from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import (
            StableUnCLIPImageNormalizer,
        )

        self.config = config
        self.unet: Any = UNet2DConditionModel.from_config(config.unet)
        self.vae: Any = AutoencoderKL.from_config(config.vae)
        self.image_normalizer: Any = StableUnCLIPImageNormalizer(config.features)
        options = {key: value for key, value in config.scheduler.items() if key != "kind"}
        self.scheduler: Any = getattr(diffusers, config.scheduler["kind"]).from_config(options)
        self.levels: Any = getattr(diffusers, FEATURE_NOISE).from_config(config.levels)
        width = int(config.unet["cross_attention_dim"])
        self.register_buffer("prompt", torch.zeros(config.prompt_tokens, width))

    @property
    def image_size(self) -> tuple[int, int]:
        """See `Detokenizer.image_size`."""
        side = int(self.config.unet["sample_size"]) * 2 ** (len(self.config.vae["block_out_channels"]) - 1)
        return side, side

    @property
    def noise_shape(self) -> tuple[int, int, int]:
        """(c, h, w) of `noise`."""
        side = int(self.config.unet["sample_size"])
        return int(self.config.unet["in_channels"]), side, side

    @torch.no_grad()
    def decode(
        self,
        condition: Condition,
        *,
        steps: int | None = None,
        guidance: float | None = None,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
        feature_noise: Tensor | None = None,
        negative_features: Tensor | None = None,
    ) -> Tensor:
        """See `Detokenizer.decode`; pictures are clamped to [-1, 1].

        feature_noise: ``[b, f]`` for the level of noise on embeddings. None: drawn with `noise`, and zeros
        where `noise` is given, so that it alone decides. negative_features: ``[b, 1, f]`` (or ``[1, 1, f]``),
        an embedding to draw away from, in place of zeros (SEED's)."""
        features = self._check_features(condition, "condition")
        b, device = len(features), features.device
        if noise is None:
            noise = _drawn((b, *self.noise_shape), generator).to(features)
            feature_noise = (
                _drawn((b, self.config.features), generator) if feature_noise is None else feature_noise
            )
        if tuple(noise.shape) != (b, *self.noise_shape):
            raise ValueError(f"noise must be {[b, *self.noise_shape]}, got {list(noise.shape)}.")
        if feature_noise is None:
            feature_noise = torch.zeros_like(features)
        feature_noise = feature_noise.to(features)
        if feature_noise.shape != features.shape:
            raise ValueError(
                f"feature_noise must be {list(features.shape)}, got {list(feature_noise.shape)}."
            )
        guidance = self.config.guidance if guidance is None else guidance
        steps = steps or self.config.steps
        self.scheduler.set_timesteps(steps)  # which the size of its first noise may depend on
        pipeline = self._pipeline()
        labels = pipeline.noise_image_embeddings(features, self.config.level, feature_noise)
        if guidance > 1:
            without = torch.zeros_like(labels)
            if negative_features is not None:
                negative = self._check_features(negative_features, "negative_features").expand(b, -1)
                without = pipeline.noise_image_embeddings(negative, 0, feature_noise)
            labels = torch.cat([without, labels])
        prompt = self.prompt.to(features).expand(b, -1, -1)
        drawn = pipeline(
            image_embeds=labels,
            prompt_embeds=prompt,
            negative_prompt_embeds=prompt,
            num_inference_steps=steps,
            guidance_scale=guidance,
            latents=noise.to(device) * self.scheduler.init_noise_sigma,
            generator=generator,
            output_type="pt",
        ).images
        return 2 * drawn - 1

    def _check_features(self, features: Any, name: str) -> Tensor:
        """``[b, 1, f]`` as ``[b, f]``."""
        width = self.config.features
        if not isinstance(features, Tensor) or features.ndim != 3 or features.shape[1:] != (1, width):
            found = list(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise ValueError(f"{name} must be features [b, 1, {width}], got {found}.")
        return rearrange(features, "b 1 f -> b f").to(self.prompt.device, self.prompt.dtype)

    def _pipeline(self) -> Any:
        """diffusers' pipeline around the networks, given ready class labels as `image_embeds`."""
        from diffusers import StableUnCLIPImg2ImgPipeline

        class Pipeline(StableUnCLIPImg2ImgPipeline):
            def _encode_image(self, image_embeds: Tensor, **_: Any) -> Tensor:
                return image_embeds

        pipeline: Any = Pipeline(
            feature_extractor=None,
            image_encoder=None,
            image_normalizer=self.image_normalizer,
            image_noising_scheduler=self.levels,
            tokenizer=None,
            text_encoder=None,
            unet=self.unet,
            scheduler=self.scheduler,
            vae=self.vae,
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline


def _drawn(shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
    # On the generator's own device, CPU by default: the same draw whatever the networks' device.
    return torch.randn(shape, generator=generator, device="cpu" if generator is None else generator.device)


# Published checkpoints.
SD21_UNCLIP: dict[str, Any] = {
    "unet": {
        "sample_size": 96,
        "block_out_channels": [320, 640, 1280, 1280],
        "attention_head_dim": [5, 10, 20, 20],
        "cross_attention_dim": 1024,
        "in_channels": 4,
        "use_linear_projection": True,
        "class_embed_type": "projection",
        "projection_class_embeddings_input_dim": 2048,
    },
    "vae": {
        "sample_size": 768,
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "block_out_channels": [128, 256, 512, 512],
        "layers_per_block": 2,
    },
    "scheduler": {
        "kind": "PNDMScheduler",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "prediction_type": "v_prediction",
        "skip_prk_steps": True,
        "steps_offset": 1,
    },
    "levels": {"beta_schedule": "squaredcos_cap_v2"},
}


def opens(path: str | Path) -> UnClipDetokenizer:
    """Read a folder (or hub id) of diffusers' pipeline; its image encoder is left out, its text tower only
    says once what an empty prompt is. Raises LexelError when it cannot be had or is another pipeline."""
    from diffusers import StableUnCLIPImg2ImgPipeline

    folder = resolve_folder(path, "diffusers pipeline")
    try:
        read: Any = StableUnCLIPImg2ImgPipeline.from_pretrained(
            folder, image_encoder=None, feature_extractor=None
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise LexelError(f"{folder} is no folder of a stable unCLIP pipeline: {reason}") from error
    with torch.no_grad():
        prompt = read.encode_prompt("", torch.device("cpu"), 1, False)[0][0]
    config = UnClipConfig(
        unet=_plain(read.unet.config),
        vae=_plain(read.vae.config),
        scheduler={"kind": type(read.scheduler).__name__, **_plain(read.scheduler.config)},
        levels=_plain(read.image_noising_scheduler.config),
        prompt_tokens=len(prompt),
    )
    with torch.device("meta"):  # the weights are those just read
        model = UnClipDetokenizer(config)
    model.unet, model.vae, model.image_normalizer = read.unet, read.vae, read.image_normalizer
    model.scheduler, model.levels, model.prompt = read.scheduler, read.image_noising_scheduler, prompt
    return model.float().eval()


def writes(model: UnClipDetokenizer, path: str | Path) -> None:
    """Raises LexelError: the published folder holds a text tower and an image encoder, not kept here."""
    raise LexelError(
        "a folder of diffusers' unCLIP pipeline holds towers that drawing does not need; save the "
        "detokenizer in Lexel's format (save_pretrained), or copy the published folder."
    )


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """A diffusers config as JSON has it, without notes on its origin."""
    return {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in config.items()
        if not key.startswith("_")
    }


SYSTEM = System(
    name="unclip",
    arguments=SD21_UNCLIP,
    configure=lambda given: UnClipConfig(**given),
    opens=opens,
    writes=writes,
    rows=(
        Published(
            name="unclip-sd-2-1",
            repository="stabilityai/stable-diffusion-2-1-unclip",
            file="",
            arguments={},
            parameters=953_829_035,
            tokens="32",
            codebook="features of seed-2",
            code_licence="Apache-2.0",
            weight_licence="CreativeML Open RAIL++-M",
            source="arXiv 2204.06125, github.com/Stability-AI/stablediffusion",
            size=768,
        ),
    ),
)
SYSTEMS = (SYSTEM,)
