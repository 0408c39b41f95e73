"""LaVIT's detokenizers (arXiv 2309.04669, jy0205/LaVIT): diffusion in the latents of a VAE, given the
features that LaVIT's token decoders make of its codes in place of a text.

Two of them, both networks and scheduler of diffusers in its own folders:

* 512 pixels, like Stable Diffusion 1.5: the condition is ``[b, m, d]``; without a condition the U-Net is
  given a stored embedding in the first rows and a mask that hides the others;
* 1024 pixels, like SDXL: the condition is ``[b, m + 1, f]``, the last row the pooled one (the shorter rows
  are filled up with zeros, as LaVIT's `decode_features` makes them); without a condition both are zero.

b batch · m condition positions · d condition width · c latent channels · h w latent grid · H W picture
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor

from lexel.catalog import Published, System
from lexel.errors import LexelError
from lexel.hub import write_atomically
from lexel.models.detokenizers.base import Condition, Detokenizer

SIZES = ((1024, 1024), (896, 1152), (832, 1216), (768, 1344), (1216, 832), (1152, 896))
"""(H, W) that the publishers' 1024-pixel U-Net draws."""
NULL_FILE = "uncond_embeddings.bin"


@dataclass(frozen=True)
class LaVITDetokenizerConfig:
    """unet, vae, scheduler: diffusers' own configs of its `UNet2DConditionModel`, `AutoencoderKL` and
    `DDIMScheduler`. null_rows: rows of the stored embedding that stands for no condition, 0: zeros do. steps,
    guidance: of `decode` unless told otherwise (the publishers take 50 and 5 to reconstruct, 25 and 7 to draw
    what a language model wrote)."""

    unet: dict[str, Any]
    vae: dict[str, Any]
    scheduler: dict[str, Any]
    null_rows: int = 0
    steps: int = 50
    guidance: float = 5.0

    @property
    def is_pooled(self) -> bool:
        """Whether the U-Net is given a pooled condition and sizes too (SDXL)."""
        return self.unet.get("addition_embed_type") == "text_time"

    @property
    def condition_width(self) -> int:
        """d: of a row of the condition."""
        return int(self.unet["cross_attention_dim"])

    @property
    def pooled_width(self) -> int:
        """Of the pooled condition: what the six sizes leave of its embedding's input."""
        if not self.is_pooled:
            return 0
        return int(
            self.unet["projection_class_embeddings_input_dim"] - 6 * self.unet["addition_time_embed_dim"]
        )

    @property
    def downsampling(self) -> int:
        """Pixels per latent cell side."""
        return 2 ** (len(self.vae["block_out_channels"]) - 1)

    def build(self) -> LaVITDetokenizer:
        """The networks, with random weights."""
        return LaVITDetokenizer(self)


class LaVITDetokenizer(Detokenizer):
    """Features to pictures. `noise` is the start of the sampler, ``[b, c, h, w]`` of the latents."""

    model_type: ClassVar[str] = "lavit"
    config_class: ClassVar[type] = LaVITDetokenizerConfig
    config: LaVITDetokenizerConfig
    reads: Literal["codes", "features"] = "features"
    null: Tensor

    def __init__(self, config: LaVITDetokenizerConfig) -> None:
        super().__init__()
        from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel

        self.config = config
        self.unet: Any = UNet2DConditionModel.from_config(config.unet)
        self.vae: Any = AutoencoderKL.from_config(config.vae)
        self.scheduler: Any = DDIMScheduler.from_config(config.scheduler)
        self.register_buffer("null", torch.zeros(config.null_rows, config.condition_width))

    @property
    def image_size(self) -> tuple[int, int]:
        """See `Detokenizer.image_size`: unless `decode` is told another."""
        side = int(self.config.unet["sample_size"]) * self.config.downsampling
        return side, side

    @torch.no_grad()
    def decode(
        self,
        condition: Condition,
        *,
        steps: int | None = None,
        guidance: float | None = None,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
        size: tuple[int, int] | None = None,
        original_size: tuple[int, int] | None = None,
        crop: tuple[int, int] = (0, 0),
    ) -> Tensor:
        """See `Detokenizer.decode`. size: (H, W) of the pictures, multiples of the VAE's and the U-Net's
        downsampling (the published 1024-pixel U-Net was made for `SIZES`). original_size, crop: what it is
        told of the picture before it was cut, (H, W) and (top, left); read by that U-Net alone."""
        size = size or self.image_size
        self._check(condition, size)
        condition = cast(Tensor, condition)
        steps = self.config.steps if steps is None else steps
        guidance = self.config.guidance if guidance is None else guidance
        shape = (len(condition), self.unet.config.in_channels, *(n // self.config.downsampling for n in size))
        if noise is None:
            # On the generator's own device, CPU by default: the same draw whatever the network's device.
            device = "cpu" if generator is None else generator.device
            noise = torch.randn(shape, generator=generator, device=device)
        elif noise.shape != shape:
            raise ValueError(f"noise must be {list(shape)}, got {list(noise.shape)}.")
        predict = self._predictor(condition, guidance, (*(original_size or size), *crop, *size))
        self.scheduler.set_timesteps(steps)
        x = noise.to(condition.device, torch.float32) * self.scheduler.init_noise_sigma
        for time in self.scheduler.timesteps:
            scaled = self.scheduler.scale_model_input(x, time)
            x = self.scheduler.step(predict(scaled, time), time, x).prev_sample
        return self._draw(x).clamp(-1, 1)

    def _predictor(
        self, condition: Tensor, guidance: float, sizes: tuple[int, ...]
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """The guided prediction of a state ``[b, c, h, w]`` at a time step."""
        guided = guidance != 1
        states, options = self._inputs(condition, sizes, guided)

        def predict(x: Tensor, time: Tensor) -> Tensor:
            both = (torch.cat([x, x]) if guided else x).to(self.unet.dtype)
            out = self.unet(both, time, encoder_hidden_states=states, **options).sample.float()
            if not guided:
                return out
            null, given = out.chunk(2)
            return null + guidance * (given - null)

        return predict

    def _inputs(
        self, condition: Tensor, sizes: tuple[int, ...], guided: bool
    ) -> tuple[Tensor, dict[str, Any]]:
        """What the U-Net reads beside the noisy latents: states ``[b, m, d]``, twice as many with guidance,
        those without a condition first; and its further arguments."""
        condition = condition.to(self.unet.dtype)
        if self.config.is_pooled:
            states = condition[:, :-1, : self.config.condition_width]
            pooled = condition[:, -1, : self.config.pooled_width]
            if guided:
                states, pooled = (torch.cat([torch.zeros_like(x), x]) for x in (states, pooled))
            times = condition.new_tensor(sizes).expand(len(states), -1)
            return states, {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": times}}
        if not guided:
            return condition, {}
        null = torch.zeros_like(condition)
        rows = self.config.null_rows
        null[:, :rows] = self.null.to(null)
        if not rows:
            return torch.cat([null, condition]), {}
        seen = torch.ones(condition.shape[:2], dtype=torch.bool, device=condition.device)
        first = seen.clone()
        first[:, rows:] = False
        return torch.cat([null, condition]), {"encoder_attention_mask": torch.cat([first, seen])}

    def _draw(self, latents: Tensor) -> Tensor:
        """Latents ``[b, c, h, w]`` to pixels."""
        with self._exact_vae(), torch.autocast(latents.device.type, enabled=False):
            scaled = latents / self.vae.config.scaling_factor
            return self.vae.decode(scaled.to(self.vae.dtype)).sample.float()

    @contextmanager
    def _exact_vae(self) -> Any:
        """The VAE in float32 inside, where its config says that it overflows in half precision."""
        dtype = self.vae.dtype
        if dtype != torch.float16 or not self.vae.config.force_upcast:
            yield
            return
        self.vae.float()
        try:
            yield
        finally:
            self.vae.to(dtype)

    def _check(self, condition: Condition, size: tuple[int, int]) -> None:
        config = self.config
        width = max(config.condition_width, config.pooled_width)
        rows = "m + 1" if config.is_pooled else "m"
        least = max(2 if config.is_pooled else 1, config.null_rows)
        if not isinstance(condition, Tensor) or condition.ndim != 3 or condition.shape[2] != width:
            got = list(condition.shape) if isinstance(condition, Tensor) else type(condition).__name__
            other = "lowres" if not config.is_pooled else "highres"
            raise ValueError(
                f"this detokenizer reads features [b, {rows}, {width}] of LaVIT's {other} token decoder, got "
                f"{got}; load the tokenizer with pixel_decoding={other!r}."
            )
        if condition.shape[1] < least:
            raise ValueError(f"the condition needs at least {least} rows, got {condition.shape[1]}.")
        unit = config.downsampling * 2 ** (len(config.unet["block_out_channels"]) - 1)
        if any(n < unit or n % unit for n in size):
            raise ValueError(f"size must be multiples of {unit}, got {size}.")


# Published checkpoints: folders of diffusers in the repository of the language model.
VAE: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "latent_channels": 4,
    "norm_num_groups": 32,
}
SCHEDULER: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
SD15: dict[str, Any] = {
    "sample_size": 64,
    "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
SDXL: dict[str, Any] = {
    "sample_size": 128,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "block_out_channels": [320, 640, 1280],
    "layers_per_block": 2,
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "use_linear_projection": True,
    "cross_attention_dim": 2048,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


def opens(part: str, path: str | Path) -> LaVITDetokenizer:
    """Read `part` (a folder of LaVIT's repository) of a local copy of that repository, or of the hub's;
    `path` may be the part itself. Raises LexelError for missing or unreadable files."""
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel

    folder = _folder(part, path)
    try:
        unet: Any = UNet2DConditionModel.from_pretrained(folder, **_subfolder(folder, "unet"))
        vae: Any = AutoencoderKL.from_pretrained(folder, **_subfolder(folder, "vae"))
        scheduler: Any = DDIMScheduler.from_pretrained(folder, subfolder="scheduler")
    except (OSError, ValueError, RuntimeError) as error:
        raise LexelError(f"{folder} cannot be read: {error}") from error
    null = _null(folder / NULL_FILE, unet.config.cross_attention_dim)
    config = LaVITDetokenizerConfig(
        unet=_plain(unet.config),
        vae=_plain(vae.config),
        scheduler=_plain(scheduler.config),
        null_rows=len(null),
    )
    with torch.device("meta"):  # the weights are those just read
        model = LaVITDetokenizer(config)
    model.unet, model.vae, model.scheduler, model.null = unet, vae, scheduler, null
    return model.eval()


def writes(part: str, model: LaVITDetokenizer, path: str | Path) -> None:
    """Write the folder `part` into `path`; the U-Net as a torch file, as the publishers' code needs it."""
    folder = Path(path) / part
    model.unet.save_pretrained(folder / "unet", safe_serialization=False)
    model.vae.save_pretrained(folder / "vae")
    model.scheduler.save_pretrained(folder / "scheduler")
    if model.config.null_rows:
        null = model.null.detach().cpu()[None].clone()
        write_atomically(folder / NULL_FILE, lambda target: torch.save(null, target))


def _folder(part: str, path: str | Path) -> Path:
    """The local folder that holds `unet`, `vae` and `scheduler`."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        try:
            folder = Path(snapshot_download(str(path), allow_patterns=[f"{part}/*"]))
        except Exception as error:  # the hub client raises a wide family: offline, not found, gated, bad name
            raise LexelError(
                f"{path} is neither a local folder nor reachable on the hub ({type(error).__name__})."
            ) from error
    found = folder / part if (folder / part).is_dir() else folder
    if not (found / "unet").is_dir():
        raise LexelError(f"{folder} holds no {part}/unet.")
    return found


def _subfolder(folder: Path, name: str) -> dict[str, Any]:
    """What diffusers must be told to read a network there: the published U-Nets are torch files, which it
    opens for tensors alone."""
    return {"subfolder": name, "use_safetensors": any((folder / name).glob("*.safetensors*"))}


def _null(file: Path, width: int) -> Tensor:
    """The stored embedding ``[rows, d]``, no rows where there is no such file."""
    if not file.is_file():
        return torch.zeros(0, width)
    try:
        value = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or hostile file fails in many ways
        raise LexelError(f"{file} is not a readable tensor ({type(error).__name__}).") from error
    if not isinstance(value, Tensor) or value.ndim != 3 or value.shape[2] != width:
        raise LexelError(f"{file} must hold one tensor [1, rows, {width}].")
    return value[0].float().clone()


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """A diffusers config as JSON has it, without notes on its origin."""
    return {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in config.items()
        if not key.startswith("_")
    }


def _system(name: str, part: str, arguments: dict[str, Any], size: int, parameters: int) -> System:
    return System(
        name=name,
        arguments=arguments,
        configure=lambda given: LaVITDetokenizerConfig(**given),
        opens=partial(opens, part),
        writes=partial(writes, part),
        rows=(
            Published(
                name=f"lavit-7b-v2-{size}",
                repository="rain1011/LaVIT-7B-v2",
                file="",
                arguments={},
                parameters=parameters,
                tokens="1-256",
                codebook="features of lavit-7b-v2" + ("" if size > 512 else "-lowres"),
                code_licence="LaVIT Community License",
                weight_licence="LaVIT Community License",
                source="arXiv 2309.04669, github.com/jy0205/LaVIT",
                size=size,
            ),
        ),
    )


SYSTEMS = (
    _system(
        "lavit_lowres",
        "pixel_decoding",
        {"unet": SD15, "vae": {**VAE, "sample_size": 512}, "scheduler": SCHEDULER, "null_rows": 77},
        512,
        943_174_827,
    ),
    _system(
        "lavit_highres",
        "highres_pixel_decoding",
        {
            "unet": SDXL,
            "vae": {**VAE, "sample_size": 1024, "scaling_factor": 0.13025},
            "scheduler": SCHEDULER,
        },
        1024,
        2_651_117_547,
    ),
)
