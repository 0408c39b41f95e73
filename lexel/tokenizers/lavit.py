"""LaVIT (arXiv 2309.04669, jy0205/LaVIT): pictures as a line of 1 to N codes, as many as they need.

A frozen ViT makes N patch features. A selector keeps some of them; a merger lets the kept ones read from the
dropped ones; each kept feature becomes one code, in raster order. Token decoders turn codes back into ViT
features and into the condition of a diffusion model, which draws the picture
(`lexel.models.detokenizers.lavit`). They number the codes by rank: where a kept patch stood is not passed on
(`Codes.keep` says it, for who wants to know). Beside this there is a continuous path for understanding: the
merged features, unrounded and with weights of their own, in the width of a language model.
Module names are the published ones. The publishers draw Gumbel noise when they select, at inference too;
`encode` leaves it out and `encode_with` takes it.

b batch · n patches, N of them · m codes kept in a row, 1 to N · t codes kept in a batch · d width
c code width · g heads · l queries · s keys
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from lexel.catalog import Layout, Published, System
from lexel.checkpoints import read_checkpoint
from lexel.errors import LexelError
from lexel.hub import mismatches
from lexel.nn.eva_vit import CLIP_DEVIATION, CLIP_MEAN, Attention, EvaConfig, EvaViT, Mlp
from lexel.nn.vision import VisionConfig, VisionEncoder, vision_weights
from lexel.tokenizers.base import Tokenizer, needs_detokenizer
from lexel.tokenizers.layout import EMPTY, CodeLayout
from lexel.tokenizers.quantizers import QuantizerConfig
from lexel.types import Codes, QuantizerOutput, TokenizerOutput, check_pixels

NORM_EPS = 1e-5
POLICY_EPS = 1e-6
UNDERSTANDING = ("token_predictor", "causal_encoder", "vit_proj")
"""Parts that the continuous path may have of its own."""


@dataclass(frozen=True)
class LaVITConfig:
    """Defaults are the published LaVIT-7B-v2 with all its files.

    vit, vision: the frozen encoder, exactly one of the two. layers, heads, mlp_ratio: of the merger; heads
    and mlp_ratio are the decoders' too. code_dim: c. decoder_layers: of each token decoder. feature_dim:
    width of the features that a decoder reconstructs (0: the encoder's).
    lowres: width of the condition of a 512-pixel U-Net, 0: the reconstructed features are the condition (what
    training here makes); None: without that decoder. highres: widths of the 1024-pixel U-Net's condition, in
    two parts, and of its pooled one; None: without. pixel_decoding: "highres" or "lowres", the decoder that
    `decode_features` uses.
    selection: how `encode` selects without noise: "argmax", the positions that are rather kept than dropped
    (published); "expected", as many of the most probable ones as their probabilities add up to, for a
    selector that is not sure of itself (one trained for a short time keeps next to nothing by argmax).
    llm_dim: width of the continuous features. vit_proj: whether there is a projection to them beside those
    that `understanding` names: parts that the continuous path has of its own, of `UNDERSTANDING`; it shares
    the others.
    Raises ValueError for contradictions.
    """

    vit: EvaConfig | None = field(default_factory=lambda: EvaConfig(projection=1024))
    vision: VisionConfig | None = None
    layers: int = 12
    heads: int = 16
    mlp_ratio: float = 4.3637
    code_dim: int = 32
    quantizer: QuantizerConfig = field(
        default_factory=lambda: QuantizerConfig("learned", codebook_size=16384, cosine=False, entropy=0.0)
    )
    decoder_layers: int = 12
    feature_dim: int = 0
    lowres: int | None = 768
    highres: tuple[int, ...] | None = (768, 1280, 1280)
    pixel_decoding: str = "highres"
    selection: str = "argmax"
    llm_dim: int = 4096
    vit_proj: bool = False
    understanding: tuple[str, ...] = ("causal_encoder", "vit_proj")

    def __post_init__(self) -> None:
        object.__setattr__(self, "understanding", tuple(self.understanding))
        if self.highres is not None:
            object.__setattr__(self, "highres", tuple(self.highres))
        if (self.vit is None) == (self.vision is None):
            raise ValueError("give exactly one of vit and vision.")
        if self.highres is not None and len(self.highres) != 3:
            raise ValueError(f"highres has two condition widths and a pooled one, got {self.highres}.")
        if self.pixel_decoding not in ("highres", "lowres"):
            raise ValueError(f"pixel_decoding must be highres or lowres, got {self.pixel_decoding!r}.")
        if self.selection not in ("argmax", "expected"):
            raise ValueError(f"selection must be argmax or expected, got {self.selection!r}.")
        if unknown := set(self.understanding) - set(UNDERSTANDING):
            raise ValueError(
                f"understanding names {sorted(unknown)}; it may name {', '.join(UNDERSTANDING)}."
            )
        if self.encoder.width % self.heads:
            raise ValueError(f"{self.heads} heads do not divide a width of {self.encoder.width}.")

    @property
    def encoder(self) -> EvaConfig | VisionConfig:
        """The frozen encoder's config."""
        config = self.vit or self.vision
        assert config is not None  # checked in __post_init__
        return config

    @property
    def features(self) -> int:
        """Width of what a decoder reconstructs."""
        return self.feature_dim or self.encoder.width

    def build(self) -> LaVIT:
        """The network, with random weights."""
        return LaVIT(self)


def policy_attend(q: Tensor, k: Tensor, v: Tensor, policy: Tensor) -> Tensor:
    """DynamicViT's attention of ``[b, g, l, e]`` by a policy ``[b, 1, 1 or l, s]`` of ones and zeros, with a
    gradient to the policy; heads are put together, ``[b, l, d]``.

    Of N keys each gets (exp(score - max) * policy + eps / N) / (sum + eps), where the maximum is over all
    keys: those that are masked keep a weight of eps / N.
    """
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    weights = (scores - scores.amax(-1, keepdim=True)).float().exp() * policy.float()
    keys = k.shape[2]
    weights = (weights + POLICY_EPS / keys) / (weights.sum(-1, keepdim=True) + POLICY_EPS)
    return rearrange(weights.to(v.dtype) @ v, "b g l e -> b l (g e)")


class KeptAttention(Attention):
    """Causal self-attention in which only kept tokens, and each token itself, are seen."""

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:  # type: ignore[override]
        """``[b, n, d] -> [b, n, d]``; keep: float ``[b, n]`` of ones and zeros."""
        kept = keep[:, None, None, :]
        own = torch.eye(x.shape[1], dtype=keep.dtype, device=keep.device)
        policy = (kept + (1 - kept) * own).tril()
        return self.proj(policy_attend(*self.project(x), policy))


class CrossAttention(nn.Module):
    """Attention to other tokens: `query`, `key`, `value`, `proj`."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.proj = nn.Linear(width, width)

    def project(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of ``[b, l, d]``, keys and values of ``[b, s, d]``, split into heads."""
        q, k, v = (
            rearrange(part, "b l (g e) -> b g l e", g=self.heads)
            for part in (self.query(x), self.key(context), self.value(context))
        )
        return q, k, v

    def forward(self, x: Tensor, context: Tensor, visible: Tensor) -> Tensor:
        """``[b, l, d], [b, s, d] -> [b, l, d]``; visible: bool ``[b, s]``."""
        q, k, v = self.project(x, context)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=visible[:, None, None, :])
        return self.proj(rearrange(mixed, "b g l e -> b l (g e)"))


class DroppedAttention(CrossAttention):
    """Attention to the features of dropped tokens only; where none was dropped, to all of them alike."""

    def forward(self, x: Tensor, context: Tensor, keep: Tensor) -> Tensor:
        """``[b, n, d], [b, n, d] -> [b, n, d]``; keep: float ``[b, n]``."""
        dropped = 1 - keep
        # Where nothing was dropped the weights' sum is 0 and the gradient to the policy 1 / eps.
        dropped = torch.where(dropped.detach().any(1, keepdim=True), dropped, dropped.detach())
        return self.proj(policy_attend(*self.project(x, context), dropped[:, None, None, :]))


class MergerBlock(nn.Module):
    """One step of `TokenMerger`."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm0 = nn.LayerNorm(width, NORM_EPS)
        self.token_causal_attn = KeptAttention(width, heads)
        self.norm1 = nn.LayerNorm(width, NORM_EPS)
        self.token_cross_attn = DroppedAttention(width, heads)
        self.norm2 = nn.LayerNorm(width, NORM_EPS)
        self.mlp = Mlp(width, hidden)

    def forward(self, x: Tensor, origin: Tensor, keep: Tensor) -> Tensor:
        """``[b, n, d] -> [b, n, d]``; origin: the normalised ViT features, keep: float ``[b, n]``."""
        x = x + self.token_causal_attn(self.norm0(x), keep)
        x = x + self.token_cross_attn(self.norm1(x), origin, keep)
        return x + self.mlp(self.norm2(x))


class TokenMerger(nn.Module):
    """Features ``[b, n, d]`` and the decisions ``[b, n]`` to merged features ``[b, n, d]``; only those of
    kept positions mean something."""

    def __init__(self, width: int, heads: int, layers: int, hidden: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(MergerBlock(width, heads, hidden) for _ in range(layers))
        self.ln_vision = nn.LayerNorm(width, NORM_EPS)
        self.norm = nn.LayerNorm(width, NORM_EPS)

    def forward(self, features: Tensor, keep: Tensor) -> Tensor:
        """See the class; keep: bool, or float of ones and zeros."""
        keep = keep.to(features.dtype)
        x, origin = features, self.ln_vision(features)
        for block in self.blocks:
            x = block(x, origin, keep)
        return self.norm(x)


class TokenPredictor(nn.Module):
    """Features ``[b, n, d]`` to log-probabilities of keeping and dropping each, float ``[b, n, 2]``. Half of
    the channels stay a token's own, the other half become their mean over all tokens."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.in_conv = nn.Sequential(nn.LayerNorm(width, NORM_EPS), nn.Linear(width, width), nn.GELU())
        self.out_conv = nn.Sequential(
            nn.Linear(width, width // 2),
            nn.GELU(),
            nn.Linear(width // 2, width // 4),
            nn.GELU(),
            nn.Linear(width // 4, 2),
            nn.LogSoftmax(dim=-1),
        )

    def forward(self, features: Tensor) -> Tensor:
        """See the class. Never in half precision by autocast: it decides how many codes there are."""
        with torch.autocast(features.device.type, enabled=False):
            x = self.in_conv(features.to(next(self.parameters()).dtype))
            own, shared = x.chunk(2, dim=-1)
            mean = shared.sum(1, keepdim=True) / shared.shape[1]
            return self.out_conv(torch.cat([own, mean.expand_as(shared)], dim=-1))


class DecoderBlock(nn.Module):
    """Self-attention of the queries, cross-attention to the codes, MLP; all pre-norm."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm0 = nn.LayerNorm(width, NORM_EPS)
        self.self_attn = Attention(width, heads)
        self.norm1 = nn.LayerNorm(width, NORM_EPS)
        self.cross_attn = CrossAttention(width, heads)
        self.norm2 = nn.LayerNorm(width, NORM_EPS)
        self.mlp = Mlp(width, hidden)

    def forward(self, x: Tensor, context: Tensor, visible: Tensor) -> Tensor:
        """``[b, l, d], [b, s, d] -> [b, l, d]``; visible: bool ``[b, s]``."""
        x = x + self.self_attn(self.norm0(x))
        x = x + self.cross_attn(self.norm1(x), context, visible)
        return x + self.mlp(self.norm2(x))


class TokenDecoder(nn.Module):
    """Code vectors, numbered by rank, to the ViT features of all patches."""

    def __init__(self, config: LaVITConfig) -> None:
        super().__init__()
        width, patches = config.encoder.width, config.encoder.patches
        self.in_proj = nn.Linear(config.code_dim, width)
        self.pos_embed = nn.Parameter(torch.zeros(1, patches, width))
        self.query_embed = nn.Parameter(torch.zeros(1, patches, width))
        hidden = int(width * config.mlp_ratio)
        self.blocks = nn.ModuleList(
            DecoderBlock(width, config.heads, hidden) for _ in range(config.decoder_layers)
        )
        self.norm = nn.LayerNorm(width, NORM_EPS)
        self.decode_task_layer = nn.Sequential(
            nn.Linear(width, width), nn.Tanh(), nn.Linear(width, config.features)
        )
        for table in (self.pos_embed, self.query_embed):
            nn.init.trunc_normal_(table, std=0.02)

    def reconstruct(self, latents: Tensor, lengths: Tensor) -> Tensor:
        """Code vectors ``[b, m, c]`` of which the first `lengths` (long ``[b]``) count, to ViT features
        ``[b, n, f]``."""
        longest = int(lengths.max())
        latents = latents[:, :longest].to(self.in_proj.weight.dtype)
        context = self.in_proj(latents) + self.pos_embed[:, :longest]
        visible = torch.arange(longest, device=lengths.device) < lengths[:, None]
        x = self.query_embed.expand(len(latents), -1, -1)
        for block in self.blocks:
            x = block(x, context, visible)
        return self.decode_task_layer(self.norm(x))


class VQDecoder(TokenDecoder):
    """The token decoder of the 512-pixel U-Net."""

    def __init__(self, config: LaVITConfig) -> None:
        super().__init__(config)
        self.unet_proj = nn.Linear(config.features, config.lowres) if config.lowres else nn.Identity()

    def condition(self, features: Tensor) -> Tensor:
        """Reconstructed features ``[b, n, f]`` to the U-Net's condition ``[b, n, d]``."""
        return self.unet_proj(features)


class HighresVQDecoder(TokenDecoder):
    """The token decoder of the 1024-pixel U-Net."""

    def __init__(self, config: LaVITConfig) -> None:
        super().__init__(config)
        assert config.highres is not None
        first, second, pooled = config.highres
        self.unet_proj_1 = nn.Linear(config.features, first)
        self.unet_proj_2 = nn.Linear(config.features, second)
        self.unet_attnpool = AttentionPool(config.encoder.patches, config.features, config.heads, pooled)

    def condition(self, features: Tensor) -> Tensor:
        """Reconstructed features ``[b, n, f]`` to the U-Net's two conditions in one tensor, see
        `LaVIT.decode_features`."""
        prompt = torch.cat([self.unet_proj_1(features), self.unet_proj_2(features)], dim=-1)
        pooled = self.unet_attnpool(features)[:, None]
        width = max(prompt.shape[2], pooled.shape[2])
        return torch.cat([F.pad(part, (0, width - part.shape[2])) for part in (prompt, pooled)], dim=1)


class AttentionPool(nn.Module):
    """CLIP-ResNet's pooling: ``[b, n, f] -> [b, p]``, the mean attending to itself and all tokens."""

    def __init__(self, tokens: int, width: int, heads: int, out: int) -> None:
        super().__init__()
        self.heads = heads
        self.positional_embedding = nn.Parameter(torch.randn(tokens + 1, width) / width**0.5)
        self.k_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.c_proj = nn.Linear(width, out)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        x = torch.cat([x.mean(1, keepdim=True), x], dim=1) + self.positional_embedding
        parts = (self.q_proj(x[:, :1]), self.k_proj(x), self.v_proj(x))
        q, k, v = (rearrange(part, "b l (g e) -> b g l e", g=self.heads) for part in parts)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.c_proj(rearrange(mixed, "b g 1 e -> b (g e)"))


@dataclass(frozen=True)
class LaVITOutput(TokenizerOutput):
    """A training pass: `reconstruction` ``[b, n, f]`` of the frozen ViT's features `target` ``[b, n, d]``.
    `quantizer` and `latents` are of the batch's kept positions alone, ``[1, t, c]``. scores: of keeping and
    dropping, without noise, ``[b, n, 2]``; keep: the decisions, float ``[b, n]`` of ones and zeros with a
    straight-through gradient to the selector."""

    target: Tensor = field(kw_only=True)
    scores: Tensor = field(kw_only=True)
    keep: Tensor = field(kw_only=True)


class LaVIT(Tokenizer):
    """The tokenizer. Codes are ``[b, N, 1]`` whose first `lengths` entries are the kept positions' codes in
    raster order, and `keep` ``[b, N]`` says where those stood. A picture of which the selector keeps nothing
    keeps its most probable position, so that every picture has a code (the publishers have no such guard).
    Reads square pictures of `image_size`."""

    model_type: ClassVar[str] = "lavit"
    config_class: ClassVar[type] = LaVITConfig
    config: LaVITConfig
    encoder: EvaViT | VisionEncoder

    def __init__(self, config: LaVITConfig) -> None:
        super().__init__()
        self.config = config
        encoder = config.encoder
        self.image_size = (encoder.image_size, encoder.image_size)
        self.layout = CodeLayout(config.quantizer.codebook_sizes, length=encoder.patches, flexible=True)
        width = encoder.width
        self.encoder = EvaViT(config.vit) if config.vit is not None else encoder.build()  # type: ignore[union-attr]
        self.encoder.requires_grad_(False)
        self.token_predictor = self._part("token_predictor")
        self.causal_encoder = self._part("causal_encoder")
        self.encode_task_layer = nn.Sequential(
            nn.Linear(width, width), nn.Tanh(), nn.Linear(width, config.code_dim)
        )
        self.quantize = config.quantizer.build(config.code_dim)
        self.vit_proj = self._part("vit_proj") if config.vit_proj else None
        self.understanding = nn.ModuleDict({name: self._part(name) for name in config.understanding})
        self.lowres_decoder = None if config.lowres is None else VQDecoder(config)
        self.highres_decoder = None if config.highres is None else HighresVQDecoder(config)

    def _part(self, name: str) -> nn.Module:
        """A new module of `UNDERSTANDING`."""
        config, width = self.config, self.config.encoder.width
        if name == "token_predictor":
            return TokenPredictor(width)
        if name == "vit_proj":
            return nn.Linear(width, config.llm_dim)
        return TokenMerger(width, config.heads, config.layers, int(width * config.mlp_ratio))

    def train(self, mode: bool = True) -> LaVIT:
        """The encoder is frozen and stays in eval mode."""
        super().train(mode)
        self.encoder.eval()
        return self

    @property
    def has_decoder(self) -> bool:
        """Whether it has a token decoder."""
        return self.lowres_decoder is not None or self.highres_decoder is not None

    @property
    def draws_pixels(self) -> bool:
        """False: a detokenizer draws."""
        return False

    def decoder(self, decoding: str | None = None) -> VQDecoder | HighresVQDecoder:
        """The token decoder ``highres`` or ``lowres`` (None: `config.pixel_decoding`). Raises LexelError
        without it."""
        decoders = {"lowres": self.lowres_decoder, "highres": self.highres_decoder}
        wanted = decoding or self.config.pixel_decoding
        if (chosen := decoders.get(wanted)) is None:
            has = ", ".join(name for name, decoder in decoders.items() if decoder is not None) or "none"
            raise LexelError(f"this LaVIT has no token decoder {wanted!r}; it has: {has}.")
        return chosen

    @property
    def last_layer(self) -> nn.Parameter:
        """See `Tokenizer.last_layer`: of the decoder's features."""
        return cast(nn.Parameter, self.decoder().decode_task_layer[-1].weight)

    def load_encoder(self, source: str) -> None:
        """Give the frozen encoder its weights. source: a file of EVA's ViT-g (`eva_vitg_psz14.bin`), or the
        folder or hub id of the vision model that the config describes. Raises LexelError when they cannot be
        read or do not fit."""
        if self.config.vit is not None:
            # What the file has beyond: a final norm and head that this encoder was built without.
            extra = () if self.config.vit.projection else ("norm.", "head.")
            state = {k: v for k, v in read_checkpoint(source).items() if not k.startswith(extra)}
        else:
            state = {f"network.{key}": value for key, value in vision_weights(source).items()}
        own = {key: tuple(value.shape) for key, value in self.encoder.state_dict().items()}
        if problems := mismatches(own, {key: tuple(value.shape) for key, value in state.items()}):
            raise LexelError(f"{source} does not fit the encoder: {problems}.")
        self.encoder.load_state_dict(state)

    # From pixels

    @torch.no_grad()
    def features(self, pixels: Tensor) -> Tensor:
        """Pixels ``[b, 3, h, w]`` in [-1, 1] to the frozen encoder's features ``[b, 1 + n, d]``, the class
        token first."""
        statistics = self.config.vision
        mean = CLIP_MEAN if statistics is None else statistics.mean
        deviation = CLIP_DEVIATION if statistics is None else statistics.deviation
        unit = (pixels + 1) / 2
        shown = (unit - unit.new_tensor(mean)[:, None, None]) / unit.new_tensor(deviation)[:, None, None]
        return self.encoder(shown.to(next(self.encoder.parameters()).dtype))

    @torch.no_grad()
    def encode_with(
        self, pixels: Tensor, *, gumbel: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Codes:
        """As `encode`, selecting with Gumbel noise as the publishers do: the given ``[b, N, 2]``, or drawn
        from `generator` (None: torch's own). Raises ValueError on a wrong shape or size."""
        self._check_size(check_pixels(pixels))
        features = self.features(pixels)[:, 1:]
        return self.code(features, select(_with_noise(self.token_predictor(features), gumbel, generator)))

    def _encode(self, pixels: Tensor, length: int | None) -> Codes:
        """length: keeps that many positions, the most probable ones."""
        features = self.features(pixels)[:, 1:]
        return self.code(features, self.select(self.token_predictor(features), length))

    def select(self, scores: Tensor, length: int | None = None) -> Tensor:
        """Decisions without noise, bool ``[b, n]``, of scores ``[b, n, 2]``: see `select` and
        `LaVITConfig.selection`."""
        if length is None and self.config.selection == "expected":
            return select(scores, scores[..., 0].float().exp().sum(1).round().clamp(min=1))
        return select(scores, length)

    def code(self, features: Tensor, keep: Tensor) -> Codes:
        """Codes of ViT features ``[b, n, d]`` at the positions that `keep` (bool ``[b, n]``) says."""
        latents = self.latents(features, keep)[None]
        indices = self.quantize.encode(latents.float())[0]
        return Codes(to_front(indices, keep), lengths=keep.sum(1), keep=keep)

    def latents(self, features: Tensor, keep: Tensor) -> Tensor:
        """What the quantizer is given: unit vectors ``[t, c]`` of all kept positions, picture by picture."""
        merged = self.causal_encoder(features, keep)
        return F.normalize(self.encode_task_layer(merged[keep]), dim=-1)

    # The continuous path

    @torch.no_grad()
    def understand(self, pixels: Tensor) -> Tensor:
        """Pixels to the continuous features ``[b, N, llm_dim]`` of the kept positions: those first, in raster
        order, zeros after them. Raises LexelError without a projection."""
        return self._understand(pixels, self.select)[0]

    @torch.no_grad()
    def understand_with(
        self, pixels: Tensor, *, gumbel: Tensor | None = None, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """As `understand`, with Gumbel noise as in `encode_with`; and the positions kept, bool ``[b, N]``."""
        return self._understand(pixels, lambda scores: select(_with_noise(scores, gumbel, generator)))

    def _understand(self, pixels: Tensor, decide: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        self._check_size(check_pixels(pixels))
        selector, merger, project = (self._understanding(name) for name in UNDERSTANDING)
        features = self.features(pixels)[:, 1:]
        keep = decide(selector(features))
        return to_front(project(merger(features, keep)[keep]), keep), keep

    def _understanding(self, name: str) -> nn.Module:
        part = self.understanding[name] if name in self.understanding else getattr(self, name)
        if part is None:
            raise LexelError(
                "this LaVIT has no projection to a language model: its files held no vit_proj "
                f"({VISUAL_WEIGHT})."
            )
        return part

    # From codes

    def embed(self, codes: Codes) -> Tensor:
        """See `Tokenizer.embed`; rows beyond a picture's length mean nothing."""
        return self.quantize.decode(codes.indices)

    @torch.no_grad()
    def decode_features(self, codes: Codes, decoding: str | None = None) -> Tensor:
        """Codes to the condition of a diffusion model; decoding: see `decoder`.

        lowres: ``[b, N, lowres]``. highres: ``[b, N + 1, f]``: N rows of the condition, whose width is the
        sum of its parts, then the pooled one; the narrower of the two is filled up with zeros.
        Raises LexelError without that decoder.
        """
        return self.decoder(decoding).condition(self.reconstruct_features(codes, decoding))

    @torch.no_grad()
    def reconstruct_features(self, codes: Codes, decoding: str | None = None) -> Tensor:
        """Codes to the ViT features ``[b, N, f]`` that they stand for; decoding: see `decoder`."""
        return self.decoder(decoding).reconstruct(self.embed(codes), self._lengths(codes))

    def _lengths(self, codes: Codes) -> Tensor:
        if codes.lengths is not None:
            return codes.lengths
        return torch.full((len(codes),), codes.indices.shape[1], device=codes.indices.device)

    def _decode(self, latents: Tensor, codes: Codes) -> Tensor:
        raise needs_detokenizer(self)

    def _check_size(self, pixels: Tensor) -> None:
        if tuple(pixels.shape[2:]) != self.image_size:
            raise ValueError(
                f"this LaVIT reads {self.image_size[0]}x{self.image_size[1]} pictures, got "
                f"{pixels.shape[2]}x{pixels.shape[3]}; resize them (bicubic)."
            )

    # Training

    def forward(
        self,
        pixels: Tensor,
        *,
        quantize: bool = True,
        generator: torch.Generator | None = None,
        noisy: bool | None = None,
    ) -> LaVITOutput:
        """Pixels through selector, merger, codes (with `quantize`) and token decoder back to ViT features.
        noisy: the selection is drawn with Gumbel noise from `generator` (None: in training mode)."""
        self._check_size(check_pixels(pixels))
        target = self.features(pixels)[:, 1:]
        scores = self.token_predictor(target)
        drawn = self.training if noisy is None else noisy
        choice = _with_noise(scores, None, generator) if drawn else scores
        kept = select(choice) if drawn else self.select(choice)
        share = choice.softmax(-1)[..., 0]
        keep = kept.to(share.dtype) + (share - share.detach())
        merged = self.causal_encoder(target, keep)
        latents = F.normalize(self.encode_task_layer(merged[kept]), dim=-1)[None]
        if quantize:
            rounded = self.quantize(latents)
        else:
            rounded = QuantizerOutput(latents, self.quantize.encode(latents.detach().float()))
        # Times one: a kept position's decision feels what its vector is worth to the decoder.
        vectors = to_front(rounded.quantized[0].to(keep.dtype) * keep[kept][:, None], kept)
        lengths = kept.sum(1)
        # Empty where there is no code, so that usage counts codes only.
        codes = Codes(to_front(rounded.indices[0], kept, EMPTY), lengths=lengths, keep=kept)
        features = self.decoder().reconstruct(vectors, lengths)
        return LaVITOutput(features, codes, rounded, latents, target=target, scores=scores, keep=keep)


def select(scores: Tensor, length: int | Tensor | None = None) -> Tensor:
    """Scores of keeping and dropping ``[b, n, 2]`` to decisions, bool ``[b, n]``: what is at least as good
    kept as dropped, and the best position where that is none; or the `length` best (of each row, ``[b]``)."""
    margin = scores[..., 0] - scores[..., 1]
    rank = margin.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    if length is None:
        return (margin >= 0) | (rank == 0)
    return rank < (length if isinstance(length, int) else length[:, None])


def gumbel_like(scores: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard Gumbel noise in the shape of `scores`, drawn on the generator's own device (None: CPU): the
    same draw whatever the pixels' device."""
    device = "cpu" if generator is None else generator.device
    noise = -torch.empty(scores.shape, device=device).exponential_(generator=generator).log()
    return noise.to(scores)


def _with_noise(scores: Tensor, gumbel: Tensor | None, generator: torch.Generator | None) -> Tensor:
    """Scores with the given noise, or with noise from the generator."""
    if gumbel is None:
        gumbel = gumbel_like(scores, generator)
    if gumbel.shape != scores.shape:
        raise ValueError(f"gumbel must be {list(scores.shape)}, got {list(gumbel.shape)}.")
    return scores + gumbel.to(scores)


def to_front(rows: Tensor, keep: Tensor, fill: int = 0) -> Tensor:
    """Rows ``[t, f]`` of the kept positions, picture by picture, to ``[b, n, f]``: each picture's rows first,
    `fill` after them. keep: bool ``[b, n]``."""
    first = torch.arange(keep.shape[1], device=keep.device) < keep.sum(1, keepdim=True)
    front = rows.new_full((*keep.shape, rows.shape[1]), fill)
    return front.masked_scatter(first[..., None], rows)


# Published checkpoints.
VIT = "visual_tokenizer/eva_vitg_psz14.bin"
ENCODER = "visual_tokenizer/tokenizer_encoder.bin"
LOWRES = "visual_tokenizer/tokenizer_decoder.bin"
HIGHRES = "visual_tokenizer/highres_tokenizer_decoder.bin"
VISUAL_WEIGHT = "language_model/visual_weight.bin"

ARGUMENTS: dict[str, Any] = {
    "img_size": 224,
    "patch_size": 14,
    "width": 1408,
    "vit_layers": 40,
    "vit_head_width": 88,
    "head_dim": 1024,
    "layers": 12,
    "heads": 16,
    "mlp_ratio": 4.3637,
    "n_code": 16384,
    "code_dim": 32,
    # Constants of the published code.
    "llm_embed_dim": 4096,
    "dec_depth": 12,
    "decoder_out_dim": 1408,
    "unet_dim": 768,
    "unet_dim_1": 768,
    "unet_dim_2": 1280,
    "pooled_dim": 1280,
    "pixel_decoding": "highres",
}
LAYOUT = Layout(
    rules=(
        (r"^encoder\.", f"{VIT}:"),
        (r"^lowres_decoder\.", f"{LOWRES}:"),
        (r"^highres_decoder\.", f"{HIGHRES}:"),
        (r"^understanding\.", f"{VISUAL_WEIGHT}:"),
        (r"^(?!visual_tokenizer/|language_model/)", f"{ENCODER}:"),
    ),
    ignored={
        rf"{ENCODER}:encoder\..*": "the ViT once more, which has a file of its own",
        rf"{VISUAL_WEIGHT}:(encoder|quantize|encode_task_layer)\..*": "not part of the continuous path",
    },
)


def configure(arguments: Mapping[str, Any]) -> LaVITConfig:
    """The reference's arguments → our config, with every part that a checkpoint may have."""
    vit = EvaConfig(
        image_size=arguments["img_size"],
        patch=arguments["patch_size"],
        width=arguments["width"],
        layers=arguments["vit_layers"],
        heads=arguments["width"] // arguments["vit_head_width"],
        mlp_ratio=arguments["mlp_ratio"],
        projection=arguments["head_dim"],
    )
    same = arguments["decoder_out_dim"] == arguments["width"]
    return LaVITConfig(
        vit=vit,
        layers=arguments["layers"],
        heads=arguments["heads"],
        mlp_ratio=arguments["mlp_ratio"],
        code_dim=arguments["code_dim"],
        quantizer=QuantizerConfig("learned", codebook_size=arguments["n_code"], cosine=False, entropy=0.0),
        decoder_layers=arguments["dec_depth"],
        feature_dim=0 if same else arguments["decoder_out_dim"],
        lowres=arguments["unet_dim"],
        highres=tuple(arguments[name] for name in ("unet_dim_1", "unet_dim_2", "pooled_dim")),
        pixel_decoding=arguments["pixel_decoding"],
        llm_dim=arguments["llm_embed_dim"],
    )


def as_stored(config: LaVITConfig, names: Container[str]) -> LaVITConfig:
    """The config of what the files hold. Their token decoders are optional, and where they keep the
    projection to the language model is not documented: wherever it is, it is read."""
    probes = {
        "token_predictor": "token_predictor.in_conv.0.weight",
        "causal_encoder": "causal_encoder.norm.weight",
        "vit_proj": "vit_proj.weight",
    }
    lowres, highres = (f"{file}:in_proj.weight" in names for file in (LOWRES, HIGHRES))
    chosen = config.pixel_decoding
    if lowres != highres:
        chosen = "lowres" if lowres else "highres"
    return replace(
        config,
        lowres=config.lowres if lowres else None,
        highres=config.highres if highres else None,
        pixel_decoding=chosen,
        vit_proj=f"{ENCODER}:vit_proj.weight" in names,
        understanding=tuple(name for name in UNDERSTANDING if f"{VISUAL_WEIGHT}:{probes[name]}" in names),
    )


def _row(name: str, decoding: str) -> Published:
    return Published(
        name=name,
        repository="rain1011/LaVIT-7B-v2",
        file="",
        arguments={"pixel_decoding": decoding},
        parameters=2_638_759_810,
        tokens="1-256",
        codebook="16384 x 32",
        code_licence="LaVIT Community License",
        weight_licence="LaVIT Community License",
        source="arXiv 2309.04669, github.com/jy0205/LaVIT",
        size=224,
    )


LAVIT = System(
    name="lavit",
    arguments=ARGUMENTS,
    configure=configure,
    layouts=(LAYOUT,),
    container="",
    as_stored=as_stored,
    files=dict.fromkeys((VIT, ENCODER, LOWRES, HIGHRES, VISUAL_WEIGHT), ""),
    optional=(LOWRES, HIGHRES, VISUAL_WEIGHT),
    rows=(_row("lavit-7b-v2", "highres"), _row("lavit-7b-v2-lowres", "lowres")),
)
SYSTEMS = (LAVIT,)
