"""LARP: a clip as a line of codes, read out of a transformer by learned queries, which see the whole clip.

Paper 2410.21264, github.com/hywang66/LARP (MIT). Encoder: patches of a few frames and n queries attend to
each other, and the queries become latents. Quantizer: `stochastic`, a row drawn by likeness in training and
the nearest one otherwise. Decoder: the codes and one query per patch attend to each other, and these become
pixels. Positions are fixed sines and cosines, which published files hold. Codes have no place in the clip, so
their order is free: in training a small autoregressive prior (`prior_loss.py`, `prior_model.*` of the file)
makes it one that a language model can predict.

A shorter clip has fewer patches and just as many codes. A single picture is no clip: see `LARP`.

b batch · t frames · u = t / frame_patch groups of frames · h w patch grid · m = u*h*w patches · n codes ·
d latent width · w transformer width
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NoReturn, cast

import torch
from einops import rearrange
from torch import Tensor, nn

from lexel.catalog import Layout, Published, System
from lexel.errors import LexelError
from lexel.nn.positions import BASE, clip_positions, line_positions
from lexel.nn.vit import VisionBlock
from lexel.tokenizers.base import VideoTokenizer
from lexel.tokenizers.layout import CodeLayout
from lexel.tokenizers.prior_loss import PriorConfig
from lexel.tokenizers.quantizers import QuantizerConfig
from lexel.tokenizers.quantizers.stochastic import Stochastic
from lexel.types import Codes, TokenizerOutput, check_video

NORMS = ("none", "bn_bn", "bn_b", "ln_d", "ln_nd", "ln_d_na")
INPUTS = ("patches", "queries", "latents", "patch_queries")
KIND_STD = 0.02  # of the vectors that tell kinds of tokens apart


@dataclass(frozen=True)
class LARPConfig:
    """Sizes of the network; the defaults are the published ones.

    image_size, frames: of the longest clip, a square in pixels. patch, frame_patch: pixels and frames of a
    patch. latents: n, whatever the clip. width, layers, heads: of both transformers; `decoder_*` where the
    decoder's differ (0: the same). latent_width: d.
    norm: of the latents before they are rounded: ``none``, ``bn_bn`` (batch statistics of each channel),
    ``bn_b`` (of each channel of each position), ``ln_d`` (layer norm over channels), ``ln_nd`` (over
    positions and channels); the reference's ``ln_d_na`` does nothing, as there.
    learned: which of the inputs' positions are learned, `typed`: which inputs get a vector that names their
    kind: ``patches`` and ``queries`` of the encoder, ``latents`` and ``patch_queries`` of the decoder.
    query_std: of fresh learned queries (0: they start from sines); position_base: of the sines of a line.
    prior: the autoregressive prior of the training (None: there is none).
    Raises ValueError for sizes that the network cannot have.
    """

    image_size: int = 128
    frames: int = 16
    patch: int = 8
    frame_patch: int = 4
    latents: int = 1024
    width: int = 768
    layers: int = 12
    heads: int = 12
    decoder_width: int = 0
    decoder_layers: int = 0
    decoder_heads: int = 0
    latent_width: int = 16
    norm: str = "none"
    learned: tuple[str, ...] = ("queries",)
    typed: tuple[str, ...] = ("patch_queries",)
    query_std: float = 0.02
    position_base: float = BASE
    quantizer: QuantizerConfig = field(
        default_factory=lambda: QuantizerConfig(
            "stochastic", codebook_size=8192, temperature=0.03, entropy=0.0
        )
    )
    prior: PriorConfig | None = field(default_factory=PriorConfig)

    def __post_init__(self) -> None:
        object.__setattr__(self, "learned", tuple(self.learned))
        object.__setattr__(self, "typed", tuple(self.typed))
        if self.image_size % self.patch or self.frames % self.frame_patch:
            raise ValueError(
                f"clips of {self.frames} frames of {self.image_size} pixels are no multiple of patches of "
                f"{self.frame_patch} frames and {self.patch} pixels."
            )
        if self.norm not in NORMS:
            raise ValueError(f"norm must be one of {', '.join(NORMS)}, got {self.norm!r}.")
        if unknown := sorted({*self.learned, *self.typed} - set(INPUTS)):
            raise ValueError(f"learned and typed name {unknown}; the inputs are {', '.join(INPUTS)}.")
        if self.prior is not None and self.latents - 1 > self.prior.max_length:
            raise ValueError(f"the prior has {self.prior.max_length} positions for {self.latents} codes.")

    @property
    def side(self) -> int:
        """Patches per row and column."""
        return self.image_size // self.patch

    @property
    def groups(self) -> int:
        """Patches along time in the longest clip."""
        return self.frames // self.frame_patch

    def build(self) -> LARP:
        """The tokenizer with fresh weights."""
        return LARP(self)


class Positions(nn.Module):
    """What is added to a line of tokens: a table, fixed or learned, and with `typed` one more vector for all.
    table: its values at first, ``[(1,) m, w]``."""

    table: Tensor

    def __init__(self, table: Tensor, learned: bool, typed: bool) -> None:
        super().__init__()
        if learned:
            self.table = nn.Parameter(table)
        else:
            self.register_buffer("table", table)
        self.kind = _kind(table.shape[-1], typed)

    def forward(self) -> Tensor:
        """``[(1,) m, w]``."""
        return self.table if self.kind is None else self.table + self.kind


class ClipPositions(nn.Module):
    """Learned positions of patches: the sum of one vector per row, column and group of frames."""

    def __init__(self, width: int, groups: int, side: int, typed: bool) -> None:
        super().__init__()
        self.rows = nn.Parameter(line_positions(width, side)[None, None, :, None])
        self.columns = nn.Parameter(line_positions(width, side)[None, None, None])
        self.times = nn.Parameter(line_positions(width, groups)[None, :, None, None])
        self.kind = _kind(width, typed)

    def forward(self) -> Tensor:
        """``[1, m, w]``."""
        table = rearrange(self.rows + self.columns + self.times, "1 u h w d -> 1 (u h w) d")
        return table if self.kind is None else table + self.kind


def _kind(width: int, typed: bool) -> nn.Parameter | None:
    return nn.Parameter(KIND_STD * torch.randn(1, 1, width)) if typed else None


def _patch_positions(config: LARPConfig, name: str, width: int) -> Positions | ClipPositions:
    """Of the patches that are read (`patches`) or drawn (`patch_queries`)."""
    typed = name in config.typed
    if name in config.learned:
        return ClipPositions(width, config.groups, config.side, typed)
    return Positions(clip_positions(width, config.groups, config.side)[None], False, typed)


def _blocks(width: int, heads: int, layers: int) -> nn.ModuleList:
    return nn.ModuleList(VisionBlock(width, heads, in_bias=False) for _ in range(layers))


class ClipEncoder(nn.Module):
    """Patches and n queries attend to each other; only the queries are read out.
    ``[b, t, 3, h, w] in [0, 1] -> [b, n, w]``, for any t up to `frames` that is a multiple of `frame_patch`.
    """

    def __init__(self, config: LARPConfig) -> None:
        super().__init__()
        width = config.width
        sides = (config.patch, config.patch)
        self.is_flat = config.frame_patch == 1
        size = sides if self.is_flat else (config.frame_patch, *sides)
        self.embed = (nn.Conv2d if self.is_flat else nn.Conv3d)(3, width, size, stride=size)  # type: ignore[arg-type]
        self.patches = _patch_positions(config, "patches", width)
        learned = "queries" in config.learned
        if learned and config.query_std:
            queries = config.query_std * torch.randn(config.latents, width)
        else:
            queries = line_positions(width, config.latents, BASE if learned else config.position_base)
        self.queries = Positions(queries, learned, "queries" in config.typed)
        self.blocks = _blocks(width, config.heads, config.layers)

    def forward(self, video: Tensor) -> Tensor:
        """See the class."""
        if self.is_flat:
            maps = self.embed(rearrange(video, "b t c h w -> (b t) c h w"))
            tokens = rearrange(maps, "(b t) d h w -> b (t h w) d", b=len(video))
        else:
            tokens = rearrange(self.embed(video.transpose(1, 2)), "b d u h w -> b (u h w) d")
        tokens = tokens + self.patches()[:, : tokens.shape[1]]
        queries = self.queries()
        x = torch.cat([tokens, queries.expand(len(video), -1, -1)], 1)
        for block in self.blocks:
            x = block(x)
        return x[:, -queries.shape[-2] :]


class Bottleneck(nn.Module):
    """Encoder states to latents ``[b, n, w] -> [b, n, d]``, and codes to the decoder's ``[b, n, d] ->
    [b, n, w]``; holds the quantizer."""

    def __init__(self, config: LARPConfig) -> None:
        super().__init__()
        d, n = config.latent_width, config.latents
        self.norm = config.norm
        self.in_linear = nn.Linear(config.width, d)
        self.out_linear = nn.Linear(d, config.decoder_width or config.width)
        self.norm_layer: nn.Module = nn.Identity()
        if config.norm in ("bn_bn", "bn_b"):
            self.norm_layer = nn.BatchNorm1d(d if config.norm == "bn_bn" else d * n)
        elif config.norm in ("ln_d", "ln_nd"):
            self.norm_layer = nn.LayerNorm(d if config.norm == "ln_d" else (n, d))
        self.quantize = config.quantizer.build(d)

    def forward(self, states: Tensor) -> Tensor:
        """``[b, n, w] -> [b, n, d]``, normalised in float32."""
        latents = self.in_linear(states)
        if self.norm in ("none", "ln_d_na"):
            return latents
        with torch.autocast(latents.device.type, enabled=False):
            latents = latents.float()
            if self.norm == "bn_bn":
                return rearrange(self.norm_layer(rearrange(latents, "b n d -> b d n")), "b d n -> b n d")
            if self.norm == "bn_b":
                n = latents.shape[1]
                flat = self.norm_layer(rearrange(latents, "b n d -> b (n d)"))
                return rearrange(flat, "b (n d) -> b n d", n=n)
            return self.norm_layer(latents)


class ClipDecoder(nn.Module):
    """Codes and patch queries attend to each other; the queries become pixels.
    ``[b, n, w], groups u -> [b, t, 3, h, w]`` in about [0, 1]."""

    def __init__(self, config: LARPConfig) -> None:
        super().__init__()
        width = config.decoder_width or config.width
        self.side, self.patch, self.frame_patch = config.side, config.patch, config.frame_patch
        learned = "latents" in config.learned
        if learned:
            latents = KIND_STD * torch.randn(1, config.latents, width)
        else:
            latents = line_positions(width, config.latents, config.position_base)[None]
        self.latents = Positions(latents, learned, "latents" in config.typed)
        self.patches = _patch_positions(config, "patch_queries", width)
        self.blocks = _blocks(
            width, config.decoder_heads or config.heads, config.decoder_layers or config.layers
        )
        self.norm_final = nn.LayerNorm(width, eps=1e-6)
        self.linear = nn.Linear(width, config.frame_patch * config.patch**2 * 3)

    def forward(self, states: Tensor, groups: int) -> Tensor:
        """See the class."""
        queries = self.patches()[:, : groups * self.side**2].expand(len(states), -1, -1)
        x = torch.cat([states + self.latents(), queries], 1)
        for block in self.blocks:
            x = block(x)
        pixels = self.linear(self.norm_final(x[:, states.shape[1] :]))
        return rearrange(
            pixels,
            "b (u h w) (f p q c) -> b (u f) c (h p) (w q)",
            u=groups, h=self.side, f=self.frame_patch, p=self.patch, q=self.patch,
        )  # fmt: skip


class LARP(VideoTokenizer):
    """See the module docstring. ``encode_video: [b, t, 3, h, w] -> Codes [b, n, 1]`` with `Codes.frames`, the
    groups of frames, by which `decode_video` knows the clip's length.

    `encode` and `decode` raise LexelError: a picture repeated to a clip is a choice of the caller's.
    `prior_model` takes part in training only (`lexel.train.objectives.larp`)."""

    model_type: ClassVar[str] = "larp"
    config_class: ClassVar[type] = LARPConfig
    config: LARPConfig

    def __init__(self, config: LARPConfig) -> None:
        super().__init__()
        self.config = config
        self.image_size = (config.image_size, config.image_size)
        self.layout = CodeLayout(config.quantizer.codebook_sizes, length=config.latents)
        self.encoder = ClipEncoder(config)
        self.bottleneck = Bottleneck(config)
        self.decoder = ClipDecoder(config)
        self.prior_model = None if config.prior is None else config.prior.build(config.latent_width)
        self.apply(_initialise)
        nn.init.zeros_(self.decoder.linear.weight)

    @property
    def last_layer(self) -> nn.Parameter:
        """See `Tokenizer.last_layer`."""
        return self.decoder.linear.weight  # type: ignore[return-value]

    def forward(
        self, pixels: Tensor, *, quantize: bool = True, generator: torch.Generator | None = None
    ) -> TokenizerOutput:
        """See `Tokenizer.forward`, with clips ``[b, t, 3, h, w]``; in training the codes are drawn from
        `generator`."""
        latents = self.latents(check_video(pixels))
        if isinstance(self.bottleneck.quantize, Stochastic):
            self.bottleneck.quantize.generator = generator
        output = self.bottleneck.quantize(latents, quantize)
        codes = self._codes(output.indices, pixels)
        return TokenizerOutput(self._decode_video(output.quantized, codes), codes, output, latents)

    def latents(self, video: Tensor) -> Tensor:
        """What is quantized: clips ``[b, t, 3, h, w]`` in [-1, 1] to ``[b, n, d]``.
        Raises ValueError for another size, or frames that are no multiple of `frame_patch` or too many."""
        self._check_size(video)
        t, most, each = video.shape[1], self.config.frames, self.config.frame_patch
        if not 0 < t <= most or t % each:
            raise ValueError(f"clips must have a multiple of {each} frames, at most {most}, got {t}.")
        return self.bottleneck(self.encoder((video + 1) / 2))

    def usable_frames(self, frames: int) -> int:
        """See `VideoTokenizer.usable_frames`."""
        return min(frames - frames % self.config.frame_patch, self.config.frames)

    def embed(self, codes: Codes) -> Tensor:
        """See `Tokenizer.embed`."""
        return self.bottleneck.quantize.decode(codes.indices)

    @torch.no_grad()
    def draw(self, video: Tensor, generator: torch.Generator | None = None) -> Codes:
        """Clips ``[b, t, 3, h, w]`` to codes drawn by likeness, as in training (`encode_video` takes the
        nearest). Raises LexelError when the quantizer draws nothing."""
        quantize = self.bottleneck.quantize
        if not isinstance(quantize, Stochastic):
            raise LexelError("this LARP's quantizer is not stochastic: use encode_video.")
        drawn = quantize.draw(self.latents(check_video(video)), generator)
        return self._codes(drawn[..., None], video)

    def _encode_video(self, video: Tensor) -> Codes:
        return self._codes(self.bottleneck.quantize.encode(self.latents(video).float()), video)

    def _decode_video(self, latents: Tensor, codes: Codes) -> Tensor:
        groups = cast(int, codes.frames)
        if latents.shape[1] != self.config.latents or not 0 < groups <= self.config.groups:
            raise ValueError(
                f"a clip is {self.config.latents} codes of 1 to {self.config.groups} groups of frames "
                f"(Codes.frames), got {latents.shape[1]} codes of {groups}."
            )
        return self.decoder(self.bottleneck.out_linear(latents), groups) * 2 - 1

    def _codes(self, indices: Tensor, video: Tensor) -> Codes:
        return Codes(indices, frames=video.shape[1] // self.config.frame_patch)

    def _encode(self, pixels: Tensor, length: int | None) -> NoReturn:
        raise self._no_picture()

    def _decode(self, latents: Tensor, codes: Codes) -> NoReturn:
        raise self._no_picture()

    def _no_picture(self) -> LexelError:
        return LexelError(
            f"LARP's codes are of clips of a multiple of {self.config.frame_patch} frames; use encode_video "
            "and decode_video (a picture can be repeated to a clip)."
        )

    def _check_size(self, pixels: Tensor) -> None:
        if tuple(pixels.shape[-2:]) != self.image_size:
            raise ValueError(f"pictures must be {self.image_size}, got {tuple(pixels.shape[-2:])}.")


def _initialise(module: nn.Module) -> None:
    """The published start: Xavier's for all matrices, the patches' too, and no bias."""
    if isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d):
        nn.init.xavier_uniform_(module.weight.view(len(module.weight), -1))
        if module.bias is not None:
            nn.init.zeros_(module.bias)


# Published checkpoints.
LAYOUT = Layout(
    rules=(
        (r"^encoder\.embed\.", "x_embedder.proj."),
        (r"^encoder\.patches\.table", "encoder_patch_pe"),
        (r"^encoder\.patches\.columns", "encode_w_embed"),  # sic
        (r"^encoder\.patches\.kind", "encoder_patch_token_type_embed"),
        (r"^encoder\.queries\.table", "encoder_latent_query_embed"),
        (r"^encoder\.queries\.kind", "encoder_latent_query_token_type_embed"),
        (r"^decoder\.latents\.table", "decoder_latent_pe"),
        (r"^decoder\.latents\.kind", "decoder_latent_token_type_embed"),
        (r"^decoder\.patches\.table", "decoder_patch_query_embed"),
        (r"^decoder\.patches\.columns", "decoder_w_embed"),
        (r"^decoder\.patches\.kind", "decoder_patch_query_token_type_embed"),
        (r"^(encoder|decoder)\.patches\.rows", r"\1_h_embed"),
        (r"^(encoder|decoder)\.patches\.times", r"\1_t_embed"),
        (r"^decoder\.(norm_final|linear)\.", r"final_layer.\1."),
        (r"^bottleneck\.quantize\.inverse_temperature", "bottleneck.regularizer.stochastic_temperature_inv"),
        (r"^bottleneck\.quantize\.", "bottleneck.regularizer."),
        (r"\.ln_(1|2)\.", r".norm\1."),
        (r"\.attn\.in_proj_weight", ".attn.qkv.weight"),
        (r"\.attn\.out_proj\.", ".attn.proj."),
        (r"\.mlp\.c_fc\.", ".mlp.fc1."),
        (r"\.mlp\.c_proj\.", ".mlp.fc2."),
    )
)
PRIORS = {
    "gptc-L": (24, 16, 1024),
    "gptc-B": (12, 12, 768),
    "gptc-M": (12, 8, 512),
    "gptc-S": (12, 6, 384),
    "gptc-XS": (6, 6, 384),
    "gptc-XXS": (6, 4, 256),
}
"""The reference's priors by name: layers, heads, width."""
FLAGS = {
    "patches": ("learned_encoder_patch_pe", "use_encoder_patch_token_type_embed"),
    "queries": ("learned_encoder_latent_query_embed", "use_encoder_latent_query_token_type_embed"),
    "latents": ("learned_decoder_latent_pe", "use_decoder_latent_token_type_embed"),
    "patch_queries": ("learned_decoder_patch_query_embed", "use_decoder_patch_query_token_type_embed"),
}
"""Which of the reference's flags say that an input's positions are learned, and that it has a vector of its
kind."""
BOTTLENECK: dict[str, Any] = {
    "bottleneck_dim": 16,
    "norm": None,
    "regularizer": "vq",
    "codebook_size": 8192,
    "commitment_loss_weight": 0.25,
    "codebook_loss_weight": 1.0,
    "entropy_loss_weight": 0.0,
    "entropy_loss_temperature": 0.01,
    "l2_normalized": False,
    "stochastic": False,
    "stochastic_temperature": 1.0,
}
PRIOR: dict[str, Any] = {
    "prior_name": "gptc-S",
    "prior_n_layer": None,
    "prior_n_head": None,
    "prior_n_embd": None,
    "prior_use_mix_ss": True,
    "prior_mix_ss_max_ratio": 0.5,
    "prior_mix_ss_peak_steps_ratio": 0.3,
    "prior_n_rounds": 2,
    "prior_avg_loss_over_rounds": True,
    "prior_no_grad_before_last_round": False,
    "prior_no_dropout": False,
    "prior_latent_ce_temperature": 1.0,
    "prior_l2_normalized": True,
    "prior_max_seq_len": 1024,
    "prior_embd_pdrop": 0.1,
    "prior_resid_pdrop": 0.1,
    "prior_attn_pdrop": 0.1,
}
ARGUMENTS: dict[str, Any] = {
    "bottleneck_token_num": 1024,
    "input_size": 128,
    "frame_num": 16,
    "temporal_patch_size": 4,
    "patch_size": 8,
    "decoder_temporal_patch_size": 4,
    "decoder_patch_size": 8,
    "in_channels": 3,
    "transformer_name": "transformer_encoder_parallel",
    "encoder_name": None,
    "decoder_name": None,
    "latent_pe_scale_factor": 10000,
    "query_init_std": 0.02,
    "encoder_hidden_size": 768,
    "decoder_hidden_size": 768,
    "encoder_num_heads": 12,
    "decoder_num_heads": 12,
    "encoder_depth": 6,
    "decoder_depth": 6,
    **{flag: flag == "learned_encoder_latent_query_embed" for pair in FLAGS.values() for flag in pair},
    "encoder_query_gaussian_init": True,
    **BOTTLENECK,
    **PRIOR,
}
"""The arguments of the reference's `LARPTokenizer`, those of its bottleneck, of the regularizer in it and,
with the prefix `prior_`, of its prior beside them."""
NOTHING = ("none", "no", "null", "")


def flatten(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The reference's nested arguments (of a hub repository, or under "args" in a training file) → flat ones;
    flat names stay as they are. `prior_tiny`: sizes of a prior whose name stands for none of `PRIORS`."""
    flat = dict(config.get("args", config))
    tiny = config.get("prior_tiny", flat.pop("prior_tiny", {}))
    if isinstance(bottleneck := flat.pop("bottleneck", None), Mapping):
        inner = dict(bottleneck["args"])
        regularizer = inner.pop("regularizer")
        flat |= inner | {"regularizer": regularizer["name"], **regularizer["args"]}
    if isinstance(prior := flat.pop("prior_model", None), Mapping):
        options = {**prior, **prior.get("args", {})}
        flat |= {f"prior_{name}": value for name, value in options.items() if name != "args"}
        sizes = {name: tiny[name] for name in ("n_layer", "n_head", "n_embd") if name in tiny}
        flat |= {f"prior_{name}": value for name, value in sizes.items()}
    return {name: value for name, value in flat.items() if name not in DERIVED}


DERIVED = ("dim", "token_nums", "same_index_shape", "prior_n_ind", "prior_n_classes", "param_names")
"""Arguments that the reference itself fills in, or never reads."""


def configure(arguments: Mapping[str, Any]) -> LARPConfig:
    """The reference's arguments → our config. Raises ValueError for what it could not run either."""
    for name in ("transformer_name", "encoder_name", "decoder_name"):
        if str(arguments[name] or "none").lower() not in (*NOTHING, ARGUMENTS["transformer_name"]):
            raise ValueError(f"{name} must be {ARGUMENTS['transformer_name']}, got {arguments[name]!r}.")
    for name in ("patch_size", "temporal_patch_size"):
        if arguments[name] != arguments[f"decoder_{name}"]:
            raise ValueError(
                f"decoder_{name} must equal {name}: pixels are laid out by the encoder's patches."
            )
    if arguments["in_channels"] != 3:
        raise ValueError(f"in_channels must be 3, got {arguments['in_channels']}.")
    gaussian = arguments["encoder_query_gaussian_init"]
    if gaussian and not arguments["learned_encoder_latent_query_embed"]:
        raise ValueError("encoder_query_gaussian_init needs learned_encoder_latent_query_embed.")
    width = int(arguments["encoder_hidden_size"])
    dim = arguments["bottleneck_dim"]
    return LARPConfig(
        image_size=arguments["input_size"],
        frames=arguments["frame_num"],
        patch=arguments["patch_size"],
        frame_patch=arguments["temporal_patch_size"],
        latents=arguments["bottleneck_token_num"],
        width=width,
        layers=arguments["encoder_depth"],
        heads=int(arguments["encoder_num_heads"]),
        decoder_width=int(arguments["decoder_hidden_size"]),
        decoder_layers=arguments["decoder_depth"],
        decoder_heads=int(arguments["decoder_num_heads"]),
        latent_width=dim if dim > 0 else width,
        norm="none" if str(arguments["norm"] or "none").lower() in NOTHING else arguments["norm"].lower(),
        learned=tuple(name for name, (flag, _) in FLAGS.items() if arguments[flag]),
        typed=tuple(name for name, (_, flag) in FLAGS.items() if arguments[flag]),
        query_std=arguments["query_init_std"] if gaussian else 0.0,
        position_base=float(arguments["latent_pe_scale_factor"]),
        quantizer=_quantizer(arguments),
        prior=_prior(arguments),
    )


def _quantizer(arguments: Mapping[str, Any]) -> QuantizerConfig:
    if arguments["regularizer"] != "vq":
        raise ValueError(f"the regularizer must be vq, which has codes, got {arguments['regularizer']!r}.")
    if arguments["entropy_loss_weight"] and arguments["entropy_loss_temperature"] != 0.01:
        raise ValueError("entropy_loss_temperature must be 0.01.")
    return QuantizerConfig(
        "stochastic" if arguments["stochastic"] else "learned",
        codebook_size=arguments["codebook_size"],
        cosine=arguments["l2_normalized"],
        commitment=arguments["commitment_loss_weight"],
        pull=arguments["codebook_loss_weight"],
        entropy=arguments["entropy_loss_weight"],
        temperature=arguments["stochastic_temperature"],
    )


def _prior(arguments: Mapping[str, Any]) -> PriorConfig | None:
    name = str(arguments["prior_name"] or "none")
    if name.lower() in NOTHING:
        return None
    given = tuple(arguments[f"prior_{size}"] for size in ("n_layer", "n_head", "n_embd"))
    if name not in PRIORS and None in given:
        raise ValueError(f"prior_model must be one of {', '.join(PRIORS)} or none, got {name!r}.")
    layers, heads, width = (own or size for own, size in zip(given, PRIORS.get(name, given)))
    mixes = arguments["prior_use_mix_ss"]
    dropped = not arguments["prior_no_dropout"]
    if arguments["prior_embd_pdrop"] != arguments["prior_resid_pdrop"]:
        raise ValueError("the prior's embd_pdrop and resid_pdrop must be equal.")
    return PriorConfig(
        width=width,
        layers=layers,
        heads=heads,
        max_length=arguments["prior_max_seq_len"],
        dropout=arguments["prior_resid_pdrop"] if dropped else 0.0,
        attention_dropout=arguments["prior_attn_pdrop"] if dropped else 0.0,
        cosine=arguments["prior_l2_normalized"],
        rounds=arguments["prior_n_rounds"],
        average=arguments["prior_avg_loss_over_rounds"],
        last_only=arguments["prior_no_grad_before_last_round"],
        mix=arguments["prior_mix_ss_max_ratio"] if mixes else 1.0,
        ramp=arguments["prior_mix_ss_peak_steps_ratio"] if mixes else 0.0,
        temperature=arguments["prior_latent_ce_temperature"],
    )


def as_stored(config: LARPConfig, names: Container[str]) -> LARPConfig:
    """Without the prior where the file has none."""
    has_prior = any(f"{prefix}prior_model.pos_emb" in names for prefix in ("", "module."))
    return config if has_prior else replace(config, prior=None)


LARP_TOKENIZER = System(
    name="larp",
    arguments=ARGUMENTS,
    configure=configure,
    layouts=(LAYOUT,),
    nestings=("model", "sd"),
    container="",
    as_stored=as_stored,
    flatten=flatten,
    reads_config=True,
    rows=(
        Published(
            name="larp-l-long",
            repository="hywang66/LARP-L-long-tokenizer",
            file="",
            arguments={
                "encoder_depth": 12,
                "decoder_depth": 12,
                "use_decoder_patch_query_token_type_embed": True,
                "l2_normalized": True,
                "stochastic": True,
                "stochastic_temperature": 0.03,
            },
            parameters=193_880_224,
            tokens="1024 of 16 frames",
            codebook="8192 x 16",
            code_licence="MIT",
            weight_licence="not stated",
            source="arXiv 2410.21264, github.com/hywang66/LARP",
            size=128,
        ),
    ),
)
SYSTEMS = (LARP_TOKENIZER,)
