"""The detokenizer that is trained on any tokenizer's codes or features: from them and noise to pictures.

A diffusers network removes noise from pictures, in pixels or in the latents of a frozen diffusers VAE, given
what the tokenizer wrote. Every choice is an option of the config and they combine freely:

* path and prediction: rectified flow (arXiv 2209.03003, 2210.02747) or a variance-preserving diffusion; the
  network predicts the clean picture, the velocity (on a diffusion: v, arXiv 2202.00512) or the noise. With
  the clean picture the loss is taken on the velocity that follows and times are drawn as in JiT (arXiv
  2511.13720): a narrow network need not carry the noise of large patches.
* condition: ``concat``, a map of the codes beside the noisy picture (raster codes and scales lie on it, 1D
  ones are gathered onto it by cross-attention); ``cross``, cross-attention to one token per code; ``joint``,
  the codes' tokens in one sequence with the picture's (MM-DiT, arXiv 2403.03206).
* network: ``unet`` (UNet2DModel, or UNet2DConditionModel where tokens are read) or ``dit`` (PixArt's
  transformer, or Stable Diffusion 3's for ``joint``).
* text: a frozen text encoder's states as further tokens (TA-TiTok, arXiv 2501.07730).

Codes that are missing (a shorter line, cells a selector dropped, a null condition) are one learned vector.
The embedding tables are its own, so a detokenizer loads alone.

b batch · n code positions · m tokens · k codebooks · f feature width · d condition channels · h w code grid
H W picture · c x y channels, height and width of what is denoised: pixels or latents
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor, nn

from lexel.hub import resolve_folder
from lexel.models.detokenizers.base import Condition, Detokenizer
from lexel.models.detokenizers.condition import CodeMap, CodeTokens, Given, waves
from lexel.models.detokenizers.frozen import TEXT_FOLDER, FrozenText, FrozenVAE, vae_geometry
from lexel.models.detokenizers.networks import WAVES, build_network
from lexel.nn.diffusion import mixing, network_times, sample, schedulers
from lexel.nn.guidance import APG, check_guider, make_guide
from lexel.nn.tiles import blend, places
from lexel.types import Codes, check_pixels

SMALLEST_SHARE = 0.05
"""Of noise: bound on the weight 1 / b² of the loss on a predicted clean picture (JiT)."""
CONDITIONS = ("concat", "cross", "joint")
NETWORKS = ("unet", "dit")
PREDICTIONS = ("clean", "velocity", "noise")


@dataclass(frozen=True)
class DiffusionDetokenizerConfig:
    """Shape of a `DiffusionDetokenizer`.

    What it reads. reads: ``codes`` or ``features``; codebook_sizes: codes per codebook of the tokenizer,
    summed where a position has several; feature_dim: f, of features ``[b, n, f]``. grid: (h, w) of raster
    codes, or of the map that 1D codes are gathered onto (``concat``); length: positions of 1D codes or
    features; scales: grids of multi-scale codes. flexible: training keeps a random number of the first codes.
    condition: how the network sees it; condition_dim: d. text, text_length: settings of the text encoder
    (transformers' config file) and positions of a caption. null_dropout: share of training samples without
    condition, and as many without their text.

    What it draws. image_size: (H, W) of the pictures; scale: how many times larger they are than the
    tokenizer's. vae: settings of the VAE (diffusers' config file), None to draw pixels. patch: side of the
    square of pixels or latent cells that the network sees as one place.

    Network. network: ``unet`` or ``dit``; channels: width per resolution (a dit has one); layers: residual
    blocks per resolution, or transformer blocks; head_dim: of attention.

    Training and sampling. path, scheduler: see `lexel.nn.diffusion` (None: the path's first scheduler);
    prediction: ``clean``, ``velocity`` or ``noise``; times: mean and spread of the normal whose sigmoid
    training times are, None for uniform times; steps, guidance, guider, interval: defaults of `decode`, see
    `lexel.nn.guidance`; guidance acts at times inside the interval.
    Raises ValueError when sizes do not divide or choices do not go together.
    """

    codebook_sizes: tuple[int, ...] = ()
    grid: tuple[int, int] | None = None
    image_size: tuple[int, int] = (32, 32)
    length: int | None = None
    patch: int = 2
    channels: tuple[int, ...] = (32, 56)
    layers: int = 1
    condition_dim: int = 32
    null_dropout: float = 0.1
    steps: int = 8
    scales: tuple[tuple[int, int], ...] | None = None
    reads: str = "codes"
    feature_dim: int | None = None
    flexible: bool = False
    condition: str = "concat"
    network: str = "unet"
    head_dim: int = 16
    text: dict[str, Any] | None = None
    text_length: int = 77
    vae: dict[str, Any] | None = None
    scale: int = 1
    path: str = "flow"
    prediction: str = "clean"
    scheduler: str | None = None
    times: tuple[float, float] | None = (0.8, 0.8)
    guidance: float = 1.0
    guider: str = "cfg"
    interval: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        for name in ("codebook_sizes", "grid", "image_size", "channels", "times", "interval"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.scales is not None:
            object.__setattr__(self, "scales", tuple((h, w) for h, w in self.scales))
            object.__setattr__(self, "grid", self.grid or self.scales[-1])
        self._check_condition()
        self._check_choices()
        self._check_sizes()

    def _check_condition(self) -> None:
        if self.reads not in ("codes", "features"):
            raise ValueError(f"reads must be codes or features, got {self.reads!r}.")
        if self.reads == "features" and not self.feature_dim:
            raise ValueError("a detokenizer that reads features needs their width, feature_dim.")
        if self.reads == "codes" and (not self.codebook_sizes or min(self.codebook_sizes) < 1):
            raise ValueError(f"codebook_sizes must be positive, got {self.codebook_sizes}.")
        if not 0 <= self.null_dropout < 1:
            raise ValueError(f"null_dropout must lie in [0, 1), got {self.null_dropout}.")
        if self.length is not None and self.length < 1:
            raise ValueError(f"length must be positive or None for raster codes, got {self.length}.")
        if self.length is not None and self.scales is not None:
            raise ValueError("give length (1D codes) or scales, not both.")
        if self.grid is None and (self.length is None or self.condition == "concat"):
            raise ValueError("grid is needed for raster codes, and for condition=concat in any case.")
        if self.flexible and self.length is None:
            raise ValueError("flexible codes are 1D: give their length.")

    def _check_choices(self) -> None:
        for name, known in (("condition", CONDITIONS), ("network", NETWORKS), ("prediction", PREDICTIONS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}.")
        if self.network == "unet" and self.condition == "joint":
            raise ValueError("joint tokens need a transformer: network=dit.")
        if self.network == "dit" and len(self.channels) != 1:
            raise ValueError(f"a dit has one width, got channels {self.channels}.")
        if self.path == "flow" and self.prediction == "noise":
            raise ValueError(
                "noise cannot be predicted on a flow, whose start holds nothing else; take velocity."
            )
        samplers = schedulers(self.path)
        if self.scheduler not in (None, *samplers):
            raise ValueError(
                f"path {self.path!r} is sampled by {', '.join(samplers)}, got {self.scheduler!r}."
            )
        check_guider(self.guider)

    def _check_sizes(self) -> None:
        if any(c % 8 for c in self.channels):
            raise ValueError(f"channels must be multiples of 8, got {self.channels}.")
        if self.network == "dit" and self.channels[0] % self.head_dim:
            raise ValueError(f"channels {self.channels} must be a multiple of head_dim {self.head_dim}.")
        if self.network == "unet" and self.channels[-1] < self.head_dim:
            raise ValueError(
                f"the last of channels {self.channels} must not be below head_dim {self.head_dim}."
            )
        if self.length is not None and self.condition_dim % 16:
            raise ValueError(f"1D codes need a condition_dim divisible by 16, got {self.condition_dim}.")
        if self.reads_tokens and self.condition_dim % 4:
            raise ValueError(f"tokens need a condition_dim divisible by 4, got {self.condition_dim}.")
        factor, _ = self.space
        cell = factor * self.patch
        unit = cell * 2 ** (len(self.channels) - 1)
        if self.scale < 1 or any(size % self.scale for size in self.image_size):
            raise ValueError(f"scale {self.scale} must divide image_size {self.image_size}.")
        for size, cells in zip(self.image_size, self.grid or (1, 1)):
            lies = self.condition == "concat" or (self.grid is not None and self.raster)
            if size % unit or (lies and size % (cell * cells)):
                raise ValueError(
                    f"image_size {self.image_size} must be divisible by {unit} (patch, resolutions, VAE) and "
                    f"by {cell} (patch, VAE) times the grid {self.grid}."
                )

    @property
    def raster(self) -> bool:
        """Whether positions are cells of one grid."""
        return self.length is None and self.scales is None

    @property
    def positions(self) -> int:
        """Code positions n."""
        if self.length is not None:
            return self.length
        grids = self.scales or (cast("tuple[int, int]", self.grid),)
        return sum(h * w for h, w in grids)

    @property
    def reads_tokens(self) -> bool:
        """Whether the network is given a sequence of tokens."""
        return self.condition != "concat" or self.text is not None

    @property
    def space(self) -> tuple[int, int]:
        """(pixels per cell side, channels c) of what is denoised."""
        return (1, 3) if self.vae is None else vae_geometry(self.vae)

    @property
    def size(self) -> tuple[int, int]:
        """(x, y) of what is denoised."""
        factor, _ = self.space
        return self.image_size[0] // factor, self.image_size[1] // factor

    @property
    def tokenizer_size(self) -> tuple[int, int]:
        """(height, width) of the pictures that the tokenizer sees."""
        return self.image_size[0] // self.scale, self.image_size[1] // self.scale

    def build(self) -> DiffusionDetokenizer:
        """A detokenizer with random weights."""
        return DiffusionDetokenizer(self)


class DiffusionDetokenizer(Detokenizer):
    """Draws pictures from codes by removing noise step by step."""

    model_type: ClassVar[str] = "diffusion"
    former_types: ClassVar[tuple[str, ...]] = ("flow",)
    config_class: ClassVar[type] = DiffusionDetokenizerConfig
    waves: Tensor

    def __init__(self, config: DiffusionDetokenizerConfig) -> None:
        super().__init__()
        self.config = config
        self.reads = "codes" if config.reads == "codes" else "features"
        self.reads_text = config.text is not None
        d = config.condition_dim
        concat = config.condition == "concat"
        self.codes = CodeMap(config) if concat else CodeTokens(config)
        # The map's null, or that of the tokens.
        self.null = nn.Parameter(torch.zeros(d, 1, 1) if concat else torch.zeros(d))
        if config.text is not None:
            self.text = FrozenText(config.text, config.text_length)
            self.text_project = nn.Sequential(nn.Linear(self.text.width, d), nn.LayerNorm(d))
            self.text_places = nn.Parameter(torch.randn(config.text_length, d) * 0.02)
            self.text_null = nn.Parameter(torch.zeros(d))
        self.network = build_network(config)
        self.vae = None if config.vae is None else FrozenVAE(config.vae)
        if config.network == "unet" and not concat:
            cells = (config.size[0] // config.patch, config.size[1] // config.patch)
            plane = rearrange(waves(WAVES, cells), "(h w) d -> 1 d h w", h=cells[0])
            self.register_buffer("waves", plane, persistent=False)

    @property
    def image_size(self) -> tuple[int, int]:
        """(H, W) of the pictures it draws, those of one tile."""
        return self.config.image_size

    def train(self, mode: bool = True) -> DiffusionDetokenizer:
        """See `nn.Module.train`; frozen parts stay in eval mode."""
        super().train(mode)
        for part in (self.vae, getattr(self, "text", None)):
            if part is not None:
                part.eval()
        return self

    def load_frozen(self, vae: str | Path | None = None, text: str | Path | None = None) -> None:
        """Fill the VAE and the text encoder with the weights of folders or hub ids. Raises LexelError."""
        if vae is not None and self.vae is not None:
            self.vae.load(vae)
        if text is not None and self.reads_text:
            self.text.load(text)

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> None:
        """See `Pretrained`; a text encoder's tokenizer is saved too."""
        super().save_pretrained(save_directory, **options)
        if self.reads_text and self.text.tokenizer is not None:
            self.text.tokenizer.save_pretrained(str(Path(save_directory) / TEXT_FOLDER))

    @classmethod
    def from_pretrained(cls, name: str | Path, **_: Any) -> DiffusionDetokenizer:  # type: ignore[override]
        """See `Pretrained`; with the text encoder's tokenizer, where it has one."""
        folder = resolve_folder(name, "detokenizer")
        model: DiffusionDetokenizer = super().from_pretrained(folder)
        if model.reads_text and (folder / TEXT_FOLDER).is_dir():
            model.text.load_tokenizer(folder / TEXT_FOLDER)
        return model

    # Condition

    def given(self, condition: Condition, text: Sequence[str | None] | None = None) -> Given:
        """A condition as the network takes it. text: a caption or None per row, for detokenizers that read
        text. Raises ValueError for another shape, or text that cannot be read."""
        if text is not None and (not self.reads_text or len(text) != len(condition)):
            raise ValueError(
                f"text must be one caption or None for each of {len(condition)} pictures, given to a "
                "detokenizer that was trained with a text encoder."
            )
        condition = self.codes.whole(condition)
        made = self.codes(condition)
        plane, tokens, present = (made, [], []) if self.config.condition == "concat" else (None, [], [])
        if plane is None:
            there = self.codes.present(condition)
            tokens.append(torch.where(there[..., None], made, self.null))
            present.append(there)
        if self.reads_text:
            states, there = self.text(text or [None] * len(condition))
            words = self.text_project(states) + self.text_places
            tokens.append(torch.where(there[..., None], words, self.text_null))
            present.append(there)
        if not tokens:
            return Given(plane, None, None)
        return Given(plane, torch.cat(tokens, dim=1), torch.cat(present, dim=1))

    def nothing(self, like: Given) -> Given:
        """The null condition, with the rows of another."""
        if like.tokens is None or like.present is None:
            return Given(self.null.expand_as(cast(Tensor, like.plane)), None, None)
        n = 0 if self.config.condition == "concat" else self.config.positions
        tokens = [self.null.expand_as(like.tokens[:, :n])] if n else []
        if self.reads_text:
            tokens.append(self.text_null.expand_as(like.tokens[:, n:]))
        plane = None if like.plane is None else self.null.expand_as(like.plane)
        return Given(plane, torch.cat(tokens, dim=1), torch.zeros_like(like.present))

    # Prediction

    def predict(self, x: Tensor, times: Tensor, given: Given) -> Tensor:
        """What the network says, ``[b, c, x, y]``, of noisy ``[b, c, x, y]`` at times ``[b]`` in (0, 1]."""
        patches = F.pixel_unshuffle(x, self.config.patch)
        cells = patches.shape[-2:]
        if given.plane is not None:
            enlarged = F.interpolate(given.plane, size=cells, mode="nearest")
            patches = torch.cat([patches, enlarged], dim=1)
        elif self.config.network == "unet":
            patches = torch.cat([patches, self.waves.expand(len(x), -1, -1, -1)], dim=1)
        out = self._run(patches, network_times(self.config.path, times), given)
        return F.pixel_shuffle(out, self.config.patch)

    def _run(self, patches: Tensor, times: Tensor, given: Given) -> Tensor:
        if given.tokens is None or given.present is None:
            if self.config.network == "unet":
                return self.network(patches, times).sample
            return self.network(patches, timestep=times).sample
        if self.config.condition == "joint":  # absent tokens are the null vector: this network has no mask
            pooled = reduce(given.tokens, "b m d -> b d", "mean")
            return self.network(
                patches, encoder_hidden_states=given.tokens, pooled_projections=pooled, timestep=times
            ).sample
        # Attention to no token at all is not defined; then all are the null vector.
        seen = given.present | ~given.present.any(dim=1, keepdim=True)
        return self.network(
            patches, timestep=times, encoder_hidden_states=given.tokens, encoder_attention_mask=seen
        ).sample

    def denoise(self, x: Tensor, times: Tensor, given: Given) -> Tensor:
        """The estimated clean ``[b, c, x, y]`` behind noisy ``[b, c, x, y]`` at times ``[b]`` in (0, 1]."""
        a, b = (value[:, None, None, None] for value in mixing(self.config.path, times))
        return self._clean(self.predict(x, times, given), x, a, b)

    # Training

    def loss(
        self,
        pixels: Tensor,
        condition: Condition,
        *,
        text: Sequence[str | None] | None = None,
        generator: torch.Generator | None = None,
        noise: Tensor | None = None,
        times: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The denoising loss at random times, and detached metrics.

        pixels: ``[b, 3, H, W]`` in [-1, 1]; condition: theirs, from a frozen tokenizer; text: captions. noise
        ``[b, c, x, y]`` and times ``[b]`` in (0, 1] replace the random draws. In training mode conditions
        drop out and flexible codes are cut. Metrics: ``loss`` and ``x0_mse``, the error of the clean picture
        (or latents) estimated in one step."""
        clean, condition = self.to_space(pixels), self.cut(condition, generator)
        return self.loss_of(clean, condition, text=text, generator=generator, noise=noise, times=times)

    def loss_of(
        self,
        clean: Tensor,
        condition: Condition,
        *,
        text: Sequence[str | None] | None = None,
        generator: torch.Generator | None = None,
        noise: Tensor | None = None,
        times: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """As `loss`, of clean ``[b, c, x, y]`` in the space where noise is removed, and of all given
        codes."""
        noise = self._noise(len(clean), self.config.size, clean, generator) if noise is None else noise
        times = self._times(clean, generator) if times is None else times
        given = self._dropped(condition, text, clean, generator)
        a, b = (value[:, None, None, None] for value in mixing(self.config.path, times))
        noisy = a * clean + b * noise
        out = self.predict(noisy, times, given)
        target = self._target(clean, noise, a, b)
        # A clean picture's error over b is that of the velocity that follows from it.
        weight = b.clamp(min=SMALLEST_SHARE) if self.config.prediction == "clean" else 1.0
        loss = ((out - target) / weight).square().mean()
        with torch.no_grad():
            error = self._clean(out, noisy, a, b) - clean
        return loss, {"loss": loss.detach(), "x0_mse": error.detach().square().mean()}

    def cut(self, condition: Condition, generator: torch.Generator | None = None) -> Condition:
        """Flexible codes as training reads them: in training mode a random number of the first ones."""
        condition = self.codes.whole(condition)
        if not (self.training and self.config.flexible and isinstance(condition, Codes)):
            return condition
        device = condition.indices.device if generator is None else generator.device
        full = self.config.positions
        drawn = torch.randint(1, full + 1, (len(condition),), generator=generator, device=device)
        drawn = drawn.to(condition.indices.device)
        lengths = drawn if condition.lengths is None else torch.minimum(drawn, condition.lengths)
        return replace(condition, lengths=lengths)

    def to_space(self, pixels: Tensor) -> Tensor:
        """Pictures ``[b, 3, H, W]`` → what is denoised ``[b, c, x, y]``. Raises ValueError for another
        size."""
        check_pixels(pixels)
        if tuple(pixels.shape[-2:]) != tuple(self.config.image_size):
            raise ValueError(
                f"this detokenizer draws {self.config.image_size}, got {tuple(pixels.shape[-2:])}."
            )
        return pixels if self.vae is None else self.vae.encode(pixels)

    def _target(self, clean: Tensor, noise: Tensor, a: Tensor, b: Tensor) -> Tensor:
        if self.config.prediction == "clean":
            return clean
        if self.config.prediction == "noise":
            return noise
        return noise - clean if self.config.path == "flow" else a * noise - b * clean

    def _clean(self, out: Tensor, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """The clean picture that follows from the network's `out` of noisy `x`."""
        if self.config.prediction == "clean":
            return out
        if self.config.path == "flow":
            return x - b * out
        clean = a * x - b * out if self.config.prediction == "velocity" else (x - b * out) / a
        # Where almost all is noise, an error of the predicted noise is magnified beyond any picture.
        return clean.clamp(-1, 1) if self.vae is None else clean

    def _dropped(
        self,
        condition: Condition,
        text: Sequence[str | None] | None,
        like: Tensor,
        generator: torch.Generator | None,
    ) -> Given:
        """The condition of a training sample: null, or without its text, as often as the config says."""
        share = self.config.null_dropout if self.training else 0.0
        keep = None if share == 0 else self._uniform(like, generator) >= share
        if text is not None and share:
            silent = (self._uniform(like, generator) < share).tolist()
            text = [None if dropped else caption for caption, dropped in zip(text, silent)]
        given = self.given(condition, text)
        return given if keep is None else given.pick(keep, self.nothing(given))

    # Drawing

    @torch.no_grad()
    def decode(self, condition: Condition, *, overlap: int | None = None, **options: Any) -> Tensor:
        """Pictures ``[b, 3, H, W]`` in [-1, 1] from codes or features; options and errors as of `draw`."""
        return self._to_pixels(self.draw(condition, overlap=overlap, **options), overlap).clamp(-1, 1)

    @torch.no_grad()
    def draw(
        self,
        condition: Condition,
        *,
        steps: int | None = None,
        guidance: float | None = None,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
        text: Sequence[str | None] | None = None,
        guider: str | None = None,
        apg: APG | None = None,
        overlap: int | None = None,
    ) -> Tensor:
        """What is denoised, ``[b, c, x, y]``, not clamped: pixels or latents from codes or features.

        steps: of the sampler; guidance: scale of the conditional over the null estimate of the clean picture
        (1: conditional only, one network pass per step), by the `guider`, see `lexel.nn.guidance`; None takes
        the config's. noise ``[b, c, x, y]``: the start, else drawn from `generator`. text: captions or None.
        Raster codes on a larger grid than the config's make a larger picture, from tiles of the config's that
        share `overlap` code cells (None: half a tile) and are averaged at each step (MultiDiffusion,
        arXiv 2302.08113). Raises ValueError for a condition of another shape."""
        config = self.config
        whole, tiles = self._tiles(condition, overlap)
        x, y = config.size
        given = [self.given(part, text) for _, part in tiles]
        null = self.nothing(given[0])
        scale = config.guidance if guidance is None else guidance
        guide = make_guide(check_guider(guider or config.guider), scale, apg or APG())
        noise = self._noise(len(condition), whole, self.null, generator) if noise is None else noise
        if tuple(noise.shape[2:]) != whole:
            raise ValueError(
                f"noise must be [b, {config.space[1]}, {whole[0]}, {whole[1]}], got {tuple(noise.shape)}."
            )

        def estimate(state: Tensor, time: float) -> Tensor:
            guided = guide is not None and config.interval[0] <= time <= config.interval[1]
            pieces = []
            for ((top, left), _), known in zip(tiles, given):
                part = state[:, :, top : top + x, left : left + y]
                if guided:
                    part, known = part.repeat(2, 1, 1, 1), known.and_then(null)
                pieces.append(self.denoise(part, part.new_full((len(part),), time), known))
            clean = blend(pieces, [place for place, _ in tiles], whole)
            if guide is None or not guided:
                return clean
            known_clean, free_clean = clean.chunk(2)
            return guide(known_clean, free_clean, time)

        scheduler = config.scheduler or schedulers(config.path)[0]
        return sample(
            estimate, noise.to(self.null), config.path, scheduler, config.steps if steps is None else steps
        )

    def _tiles(
        self, condition: Condition, overlap: int | None
    ) -> tuple[tuple[int, int], list[tuple[tuple[int, int], Condition]]]:
        """(x, y) of the whole, and of every tile (top, left) in it and its part of the condition."""
        grid = self.config.grid
        large = None if isinstance(condition, Tensor) else condition.grid
        if not self.config.raster or grid is None or large is None or large == grid:
            return self.config.size, [((0, 0), condition)]
        codes = cast(Codes, condition)
        units = (self.config.size[0] // grid[0], self.config.size[1] // grid[1])
        cells = torch.arange(large[0] * large[1], device=codes.indices.device).reshape(large)
        tiles: list[tuple[tuple[int, int], Condition]] = []
        for top, left in places(large, grid, min(grid) // 2 if overlap is None else overlap):
            window = cells[top : top + grid[0], left : left + grid[1]].flatten()
            keep = None if codes.keep is None else codes.keep[:, window]
            part = Codes(codes.indices[:, window], grid, keep=keep)
            tiles.append(((top * units[0], left * units[1]), part))
        return (large[0] * units[0], large[1] * units[1]), tiles

    def _to_pixels(self, drawn: Tensor, overlap: int | None) -> Tensor:
        """What was drawn ``[b, c, x, y]`` → pictures; latents of a large picture tile by tile."""
        if self.vae is None:
            return drawn
        size, factor = self.config.size, self.config.space[0]
        whole = (drawn.shape[2], drawn.shape[3])
        if whole == size:
            return self.vae.decode(drawn)
        units = min(side // cells for side, cells in zip(size, cast("tuple[int, int]", self.config.grid)))
        shared = min(size) // 2 if overlap is None else overlap * units
        found = places(whole, size, shared)
        pieces = [self.vae.decode(drawn[:, :, t : t + size[0], u : u + size[1]]) for t, u in found]
        return blend(
            pieces, [(t * factor, u * factor) for t, u in found], (whole[0] * factor, whole[1] * factor)
        )

    def _noise(
        self, count: int, size: tuple[int, int], like: Tensor, generator: torch.Generator | None
    ) -> Tensor:
        device = generator.device if generator is not None else like.device
        shape = (count, self.config.space[1], *size)
        return torch.randn(shape, generator=generator, device=device).to(like)

    def _times(self, like: Tensor, generator: torch.Generator | None) -> Tensor:
        """Uniform, or logit-normal times: by default mostly on the noisy side, where the picture is
        decided."""
        if self.config.times is None:
            return 1 - self._uniform(like, generator)
        mean, spread = self.config.times
        device = generator.device if generator is not None else like.device
        normal = torch.randn(len(like), generator=generator, device=device).to(like)
        return (mean + spread * normal).sigmoid()

    @staticmethod
    def _uniform(like: Tensor, generator: torch.Generator | None) -> Tensor:
        device = generator.device if generator is not None else like.device
        return torch.rand(len(like), generator=generator, device=device).to(like)
