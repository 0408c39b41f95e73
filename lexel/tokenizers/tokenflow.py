"""TokenFlow: one index that names a semantic and a pixel vector at once, over residual scales, coarse first.

Paper 2412.03069, ByteFlow-AI/TokenFlow (code Apache-2.0, weights MIT); defaults are its CLIP-B configuration
at 224 pixels and module names its published ones (`*_vqkd` is the semantic side). A CLIP or SigLIP tower that
is trained along and LlamaGen's convolutions see the same picture; both latents, each of unit length, choose
one row of a codebook in two halves. What is left is coded again at the next scale; the first few scales alone
decode too.

b batch · n codes of all scales · k codebooks per position (published: 1) · d = semantic_dim + pixel_dim ·
g side of the latent grid · f width of the teacher's features
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import isqrt
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from lexel.catalog import Layout, Published, System
from lexel.errors import LexelError
from lexel.hub import mismatches
from lexel.nn.conv import ConvSizes, Decoder, Encoder
from lexel.nn.eva_vit import Block
from lexel.tokenizers.base import Tokenizer
from lexel.tokenizers.layout import CodeLayout
from lexel.tokenizers.quantizers import Quantizer, QuantizerConfig
from lexel.tokenizers.quantizers.learned import Learned
from lexel.types import Codes, QuantizerOutput, TokenizerOutput

T = TypeVar("T", bound=nn.Module)
KINDS = ("clip", "siglip")
# [-1, 1] → [0, 1], minus a half, over a half: the identity but for clamping; the published files hold both.
SIGLIP_SHIFT = SIGLIP_SCALE = 0.5


@dataclass(frozen=True)
class TowerConfig:
    """The semantic encoder, a vision tower of transformers.

    kind: `clip` (patch tokens after the last norm, of pixels as they come) or `siglip` (the tokens before the
    last layer). width, layers, heads, hidden (of the MLP), activation (transformers' name): its size.
    patch: side of a patch in pixels; side: patches per side that its position table is for.
    Raises ValueError for another kind.
    """

    kind: str = "clip"
    width: int = 768
    layers: int = 12
    heads: int = 12
    hidden: int = 3072
    activation: str = "quick_gelu"
    patch: int = 16
    side: int = 14

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"the tower's kind must be one of {', '.join(KINDS)}, got {self.kind!r}.")

    def build(self) -> nn.Module:
        """The tower with fresh weights."""
        import transformers

        name = "CLIPVision" if self.kind == "clip" else "SiglipVision"
        config = getattr(transformers, f"{name}Config")(
            hidden_size=self.width,
            intermediate_size=self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            hidden_act=self.activation,
            image_size=self.side * self.patch,
            patch_size=self.patch,
        )
        model = getattr(transformers, f"{name}Model")(config)
        return getattr(model, "vision_model", model)  # one level deeper before transformers 5


@dataclass(frozen=True)
class TokenFlowConfig:
    """Sizes of the tokenizer.

    image_size: picture side. tower: the semantic encoder; on a grid of another side than its own, positions
    are interpolated (`clip`). scales: sides of the code maps, coarse first, the last one that of the grid.
    semantic_dim, pixel_dim: widths of the two halves of a code vector. encoder, decoder: the convolutions;
    where their downsampling times the grid is not image_size, pictures are resized to it and back.
    feature_layers, feature_heads, feature_ratio (MLP width over width), feature_dim: of the semantic decoder
    and of the features that it predicts. output_size: side of decoded pictures (0: image_size).
    quantizer: `learned` with cosine is the published codebook of two halves under one index, any other kind
    rounds both halves together. drop: share of the training steps that leave out one scale, never the first.
    Raises ValueError on sizes that do not fit together.
    """

    image_size: int = 224
    tower: TowerConfig = field(default_factory=TowerConfig)
    scales: tuple[int, ...] = (1, 2, 4, 6, 8, 10, 12, 14)
    semantic_dim: int = 32
    pixel_dim: int = 8
    quantizer: QuantizerConfig = field(
        default_factory=lambda: QuantizerConfig("learned", codebook_size=32768, cosine=True, entropy=0.0)
    )
    encoder: ConvSizes = field(default_factory=ConvSizes)
    decoder: ConvSizes = field(default_factory=ConvSizes)
    feature_layers: int = 3
    feature_heads: int = 12
    feature_ratio: float = 4.0
    feature_dim: int = 512
    output_size: int = 0
    drop: float = 0.1

    def __post_init__(self) -> None:
        object.__setattr__(self, "scales", tuple(self.scales))
        for name in ("encoder", "decoder"):
            sizes = getattr(self, name)
            object.__setattr__(self, name, replace(sizes, channel_mult=tuple(sizes.channel_mult)))
        if not self.scales or self.scales[-1] != self.grid or sorted(set(self.scales)) != list(self.scales):
            raise ValueError(
                f"scales must grow to {self.grid}, the {self.image_size} pixels over patches of "
                f"{self.tower.patch}, got {list(self.scales)}."
            )
        if self.tower.kind == "siglip" and self.grid != self.tower.side:
            raise ValueError(
                f"a siglip tower reads {self.tower.side} patches per side; {self.image_size} pixels are "
                f"{self.grid}."
            )
        if _factor(self.encoder) != _factor(self.decoder):
            raise ValueError(
                f"the encoder makes {_factor(self.encoder)} pixels one cell, the decoder "
                f"{_factor(self.decoder)}."
            )
        if not 0 <= self.drop <= 1:
            raise ValueError(f"drop is a share of steps in [0, 1], got {self.drop}.")

    @property
    def grid(self) -> int:
        """g: cells per side of the latents."""
        return self.image_size // self.tower.patch

    @property
    def pixel_side(self) -> int:
        """Side of the pictures that the convolutions see."""
        return self.grid * _factor(self.encoder)

    def build(self) -> TokenFlow:
        """The tokenizer with fresh weights."""
        return TokenFlow(self)


def _factor(sizes: ConvSizes) -> int:
    return int(sizes.stem * 2 ** (len(sizes.channel_mult) - 1))


class SharedIndex(Learned):
    """A codebook whose rows have two halves, each of unit length as both halves of a latent are: the nearest
    row is the one with the largest sum of two cosines, and losses are those of `Learned`."""

    def __init__(self, semantic_dim: int, pixel_dim: int, config: QuantizerConfig) -> None:
        self.split = (semantic_dim, pixel_dim)  # first: `make_rows` reads it
        super().__init__(semantic_dim + pixel_dim, config)

    def make_rows(self, size: int, dim: int) -> None:
        """See `Learned.make_rows`: one table for each half."""
        self.embedding_vqkd, self.embedding_vqgan = (self.table(size, half) for half in self.split)

    @property
    def codebook(self) -> Tensor:
        """See `Learned.codebook`, ``[K, d]``."""
        rows = (self.embedding_vqkd.weight, self.embedding_vqgan.weight)
        return torch.cat([F.normalize(half.float(), dim=-1) for half in rows], dim=-1)

    def bypass(self, latents: Tensor) -> Tensor:
        """Both halves of the latents at unit length."""
        return torch.cat([F.normalize(half, dim=-1) for half in latents.split(self.split, dim=-1)], dim=-1)


class SemanticDecoder(nn.Module):
    """BEiT's transformer over the cells of the semantic latents, ``[b, semantic_dim, g, g]`` to
    ``[b, g * g, width]`` after `fc_norm`, without the class token."""

    def __init__(self, dim: int, width: int, layers: int, heads: int, ratio: float, side: int) -> None:
        super().__init__()
        self.patch_embed = nn.Sequential(OrderedDict(proj=nn.Conv2d(dim, width, 1)))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, side**2 + 1, width))
        self.blocks = nn.ModuleList(
            Block(width, heads, int(width * ratio), key_bias=False) for _ in range(layers)
        )
        self.fc_norm = nn.LayerNorm(width, 1e-6)
        for table in (self.cls_token, self.pos_embed):
            nn.init.trunc_normal_(table, std=0.02)
        _draw_linears(self)
        with torch.no_grad():
            for depth, block in enumerate(self.blocks, 1):
                for name in ("attn.proj.weight", "mlp.fc2.weight"):
                    block.get_parameter(name).div_((2 * depth) ** 0.5)

    def forward(self, latents: Tensor) -> Tensor:
        """See the class."""
        x = rearrange(self.patch_embed(latents), "b d h w -> b (h w) d")
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        x = x + positions_for(self.pos_embed[0], latents.shape[-1])
        for block in self.blocks:
            x = block(x)
        return self.fc_norm(x[:, 1:])


def positions_for(table: Tensor, grid: int) -> Tensor:
    """A table ``[1 + side * side, width]`` of the class token and square patches, for `grid` patches per
    side. Interpolated by a factor a little too large, as published (and in DINO): it shifts the sampled
    places, and a resize to the right size gives other codes."""
    side = isqrt(len(table) - 1)
    if side == grid:
        return table
    patches = rearrange(table[1:], "(h w) d -> 1 d h w", h=side)
    factor = (grid + 0.1) / side
    resized = F.interpolate(patches, scale_factor=(factor, factor), mode="bicubic")
    return torch.cat([table[:1], rearrange(resized, "1 d h w -> (h w) d")])


class ScalingLayer(nn.Module):
    """Pixels in [-1, 1], clamped, as SigLIP wants them."""

    shift: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", torch.full((1, 3, 1, 1), SIGLIP_SHIFT))
        self.register_buffer("scale", torch.full((1, 3, 1, 1), SIGLIP_SCALE))

    def forward(self, pixels: Tensor) -> Tensor:
        """``[b, 3, h, w] -> [b, 3, h, w]``."""
        return (((pixels + 1) * 127.5).clamp(0, 255) / 255 - self.shift) / self.scale


class TokenFlow(Tokenizer):
    """See the module docstring. ``encode: [b, 3, S, S] -> Codes [b, n, k]`` with S = image_size; its `length`
    may end any scale (1, 5, 21, …), and `decode` draws whole scales, however many."""

    model_type: ClassVar[str] = "tokenflow"
    config_class: ClassVar[type] = TokenFlowConfig
    config: TokenFlowConfig

    def __init__(self, config: TokenFlowConfig) -> None:
        super().__init__()
        self.config = config
        self.image_size = (config.image_size, config.image_size)
        self.layout = CodeLayout(
            config.quantizer.codebook_sizes, scales=tuple((side, side) for side in config.scales)
        )
        tower, width = config.tower, config.tower.width
        self.encoder = Encoder(config.encoder)
        self.decoder = Decoder(config.decoder)
        self.quant_conv = nn.Conv2d(config.encoder.z_channels, config.pixel_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.pixel_dim, config.decoder.z_channels, 1)
        self.encoder_vqkd: Any = tower.build()
        self.decoder_vqkd = SemanticDecoder(
            config.semantic_dim,
            width,
            config.feature_layers,
            config.feature_heads,
            config.feature_ratio,
            tower.side,
        )
        self.encode_task_layer = _two_layers(width, config.semantic_dim)
        self.decode_task_layer = _two_layers(width, config.feature_dim)
        halves = config.semantic_dim, config.pixel_dim
        shared = config.quantizer.kind == "learned" and config.quantizer.cosine
        self.quantize: Quantizer = (
            SharedIndex(*halves, config.quantizer) if shared else config.quantizer.build(sum(halves))
        )
        if tower.kind == "siglip":
            self.scaling_layer = ScalingLayer()
            # Nothing reads what follows the last hidden state but one; published files hold it.
            for unread in ("encoder.layers." + str(tower.layers - 1), "post_layernorm", "head"):
                self.encoder_vqkd.get_submodule(unread).requires_grad_(False)

    def forward(
        self, pixels: Tensor, *, quantize: bool = True, generator: torch.Generator | None = None
    ) -> TokenizerOutput:
        """See `Tokenizer.forward`; in training `generator` draws whether and which scale is left out.
        ``features["semantic"]``: what stands for the teacher's features, ``[b, g * g, f]``."""
        latents = self.latents(pixels)
        sides = self._drawn_scales(generator) if self.training else self.config.scales
        outputs: list[QuantizerOutput] = []

        def code(seen: Tensor) -> Tensor:
            outputs.append(self.quantize(seen, quantize))
            return outputs[-1].quantized

        total = _by_scales(latents, sides, code)
        indices = torch.cat([output.indices for output in outputs], dim=1)
        losses = {
            name: torch.stack([output.losses[name] for output in outputs]).mean()
            for name in outputs[0].losses
        }
        flat = rearrange(total, "b d h w -> b (h w) d")
        return TokenizerOutput(
            self.draw(total),
            Codes(indices, scales=tuple((side, side) for side in sides)),
            QuantizerOutput(flat, indices, losses, self.quantize.statistics(indices)),
            rearrange(latents, "b d h w -> b (h w) d"),
            {"semantic": self.features(total)},
        )

    def embed(self, codes: Codes) -> Tensor:
        """Each code's vector, both halves of unit length, ``[b, n, d]``: see `Tokenizer.embed`. What codes
        decode from is their sum over scales, `accumulate`."""
        return self.quantize.decode(codes.indices)

    @torch.no_grad()
    def decode_features(self, codes: Codes) -> Tensor:
        """What codes say of the teacher's features: of CLIP's patches in its space of pictures and texts, of
        SigLIP's patches before its last layer; ``[b, g * g, f]``."""
        return self.features(self.accumulate(self.embed(codes), codes))

    @torch.no_grad()
    def understand(self, pixels: Tensor) -> Tensor:
        """The latents that codes of all scales add up to, ``[b, g * g, d]``, semantic half first: what the
        published multimodal models read in place of ids."""
        codes = self.encode(pixels)
        return rearrange(self.accumulate(self.embed(codes), codes), "b d h w -> b (h w) d")

    @torch.no_grad()
    def next_scale_inputs(self, codes: Codes) -> Tensor:
        """What the published text-to-image model reads before it predicts scale s: the codes before it, each
        added at its own resolution and enlarged from scale to scale. Second scale to last, one behind the
        other, ``[b, n - 1, d]`` where the first scale is 1; `codes` are of all scales or of the first few (of
        which the last is not read)."""
        sides, read, inputs = self._sides(codes), torch.zeros(()), []
        for rows, following in zip(_pieces(self.embed(codes), sides), sides[1:]):
            read = F.interpolate(read.to(rows) + rows, (following, following), mode="bicubic")
            inputs.append(rearrange(read, "b d h w -> b (h w) d"))
        return torch.cat(inputs, dim=1) if inputs else self.embed(codes)[:, :0]

    @property
    def last_layer(self) -> nn.Parameter:
        """See `Tokenizer.last_layer`."""
        return self.decoder.conv_out.weight  # type: ignore[return-value]

    def load_tower(self, name: str | Path) -> None:
        """Take the weights of the vision tower of a CLIP or SigLIP (as `tower` says) from a local folder or
        hub id. Raises LexelError when it cannot be had or has another size, listing what does not fit."""
        import transformers

        kind = "CLIPVisionModel" if self.config.tower.kind == "clip" else "SiglipVisionModel"
        try:
            model = getattr(transformers, kind).from_pretrained(name, trust_remote_code=False)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise LexelError(f"the tower {name} cannot be loaded as a {kind}: {reason}") from error
        state = getattr(model, "vision_model", model).state_dict()
        expected = {key: tuple(value.shape) for key, value in self.encoder_vqkd.state_dict().items()}
        if problems := mismatches(expected, {key: tuple(value.shape) for key, value in state.items()}):
            raise LexelError(f"the tower {name} is not built as tokenizer.tower says: {problems}.")
        self.encoder_vqkd.load_state_dict(state)

    # Both encoders

    def latents(self, pixels: Tensor) -> Tensor:
        """``[b, 3, S, S] -> [b, d, g, g]``, semantic channels first, neither half of unit length yet."""
        semantic = self.encode_task_layer(self.read(pixels))
        seen = _resized(pixels, self.config.pixel_side)
        semantic = rearrange(semantic, "b (h w) d -> b d h w", h=self.config.grid)
        return torch.cat([semantic, self.quant_conv(self.encoder(seen))], dim=1)

    def read(self, pixels: Tensor) -> Tensor:
        """The tower's patch tokens, ``[b, 3, S, S] -> [b, g * g, width]``."""
        tower = self.encoder_vqkd
        if self.config.tower.kind == "siglip":
            states = tower(self.scaling_layer(pixels), output_hidden_states=True).hidden_states
            return states[-2]
        parts = tower.embeddings
        patches = rearrange(parts.patch_embedding(pixels), "b d h w -> b (h w) d")
        x = torch.cat([parts.class_embedding.expand(len(patches), 1, -1), patches], dim=1)
        x = x + positions_for(parts.position_embedding.weight, self.config.grid)
        x = tower.encoder(inputs_embeds=tower.pre_layrnorm(x)).last_hidden_state
        return tower.post_layernorm(x[:, 1:])

    # Scales

    def accumulate(self, rows: Tensor, codes: Codes) -> Tensor:
        """The vectors ``[b, n, d]`` of codes to their sum over scales, ``[b, d, g, g]``."""
        size = (self.config.grid, self.config.grid)
        return torch.stack(
            [F.interpolate(one, size, mode="bicubic") for one in _pieces(rows, self._sides(codes))]
        ).sum(0)

    def _sides(self, codes: Codes) -> tuple[int, ...]:
        """The scales of these codes: those they name, or the first few. Raises ValueError for other codes."""
        if codes.scales is not None:
            return tuple(h for h, _ in codes.scales)
        count = codes.indices.shape[1]
        if count not in self.layout.lengths:
            raise ValueError(f"{count} codes end within a scale; give {self.layout.described_lengths} codes.")
        return self.config.scales[: list(self.layout.lengths).index(count) + 1]

    def _drawn_scales(self, generator: torch.Generator | None) -> tuple[int, ...]:
        """All scales, or in a share `drop` of the calls all but one, which is never the first."""
        sides = self.config.scales
        device = None if generator is None else generator.device
        chance, which = torch.rand(2, generator=generator, device=device).tolist()
        if len(sides) < 2 or chance >= self.config.drop:
            return sides
        left_out = 1 + int(which * (len(sides) - 1))
        return sides[:left_out] + sides[left_out + 1 :]

    # Both decoders

    def draw(self, total: Tensor) -> Tensor:
        """Summed latents ``[b, d, g, g]`` to pixels ``[b, 3, S, S]``."""
        return _resized(self.draw_native(total), self.config.output_size or self.config.image_size)

    def draw_native(self, total: Tensor) -> Tensor:
        """The convolutional decoder's own picture, before it is resized."""
        return self.decoder(self.post_quant_conv(total[:, self.config.semantic_dim :]))

    def features(self, total: Tensor) -> Tensor:
        """Summed latents ``[b, d, g, g]`` to the teacher's features, ``[b, g * g, f]``."""
        return self.decode_task_layer(self.decoder_vqkd(total[:, : self.config.semantic_dim]))

    def _encode(self, pixels: Tensor, length: int | None) -> Codes:
        sides = self.config.scales[: list(self.layout.lengths).index(self.layout_length(length)) + 1]
        parts: list[Tensor] = []

        def code(seen: Tensor) -> Tensor:
            parts.append(self.quantize.encode(seen))
            return self.quantize.decode(parts[-1])

        _by_scales(self.latents(pixels), sides, code)
        return Codes(torch.cat(parts, dim=1), scales=tuple((side, side) for side in sides))

    def _decode(self, latents: Tensor, codes: Codes) -> Tensor:
        return self.draw(self.accumulate(latents, codes))

    def _check_size(self, pixels: Tensor) -> None:
        if tuple(pixels.shape[2:]) != self.image_size:
            side = self.config.image_size
            raise ValueError(f"this TokenFlow reads {side}x{side} pictures, got {tuple(pixels.shape[2:])}.")


def _by_scales(latents: Tensor, sides: Sequence[int], code: Callable[[Tensor], Tensor]) -> Tensor:
    """``[b, d, g, g]`` scale by scale: each codes what the ones before it left over, averaged to its size.
    code: such cells ``[b, s * s, d]`` to the vectors of their codes. The sum of these over scales, each
    enlarged to the grid."""
    rest = latents.float()
    total = torch.zeros_like(rest)
    for side in sides:
        cells = rearrange(F.interpolate(rest, (side, side), mode="area"), "b d h w -> b (h w) d")
        rows = rearrange(code(cells), "b (h w) d -> b d h w", h=side)
        rows = F.interpolate(rows, rest.shape[-2:], mode="bicubic")
        total, rest = total + rows, rest - rows.detach()
    return total


def _pieces(rows: Tensor, sides: Sequence[int]) -> list[Tensor]:
    """``[b, n, d]`` to one ``[b, d, s, s]`` for each scale s."""
    pieces = rows.split([side**2 for side in sides], dim=1)
    return [rearrange(piece, "b (h w) d -> b d h w", h=side) for piece, side in zip(pieces, sides)]


def _two_layers(width: int, out: int) -> nn.Sequential:
    return _draw_linears(nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, out)))


def _draw_linears(module: T) -> T:
    """BEiT's first weights."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.trunc_normal_(part.weight, std=0.02)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
    return module


def _resized(pixels: Tensor, side: int) -> Tensor:
    if tuple(pixels.shape[2:]) == (side, side):
        return pixels
    return F.interpolate(pixels, (side, side), mode="bicubic")


# Published checkpoints. CLIP's tower has the names of OpenAI's code, SigLIP's those of transformers 4.
USAGE_WINDOW = 131072
IDLE = {
    r"quantize\.embedding_(vqkd|vqgan)\.(initted|cluster_size|embed_avg)": "of averaged codebooks in training"
}
TRAINING = {"quantize.codebook_used": (USAGE_WINDOW,)}
CLIP_LAYOUT = Layout(
    rules=(
        (r"^encoder_vqkd\.embeddings\.class_embedding", "encoder_vqkd.class_embedding"),
        (r"^encoder_vqkd\.embeddings\.patch_embedding", "encoder_vqkd.conv1"),
        (r"^encoder_vqkd\.embeddings\.position_embedding\.weight", "encoder_vqkd.positional_embedding"),
        (r"^encoder_vqkd\.pre_layrnorm", "encoder_vqkd.ln_pre"),
        (r"^encoder_vqkd\.post_layernorm", "encoder_vqkd.ln_post"),
        (r"^encoder_vqkd\.encoder\.layers", "encoder_vqkd.transformer.resblocks"),
        (r"^(encoder_vqkd\..*)\.layer_norm", r"\1.ln_"),
        (r"^(encoder_vqkd\..*)\.self_attn\.[qkv]_proj\.", r"\1.attn.in_proj_"),
        (r"^(encoder_vqkd\..*)\.self_attn\.out_proj", r"\1.attn.out_proj"),
        (r"^(encoder_vqkd\..*)\.mlp\.fc1", r"\1.mlp.c_fc"),
        (r"^(encoder_vqkd\..*)\.mlp\.fc2", r"\1.mlp.c_proj"),
    ),
    fused=r"^encoder_vqkd\..*attn\.in_proj_",
    order=(".q_proj.", ".k_proj.", ".v_proj."),
    ignored=IDLE,
    zeros=TRAINING,
)
SIGLIP_LAYOUT = Layout(
    rules=((r"^encoder_vqkd\.", "encoder_vqkd.vision_model."),), ignored=IDLE, zeros=TRAINING
)
CLIP_SCALES = (1, 2, 4, 6, 8, 10, 12, 14)
SIGLIP_SCALES = (*range(1, 11), 12, 14, 17, 22, 27)
# None: as the teacher says. The first lines are literals of the published code.
ARGUMENTS: dict[str, Any] = {
    "teacher": "clipb_224",
    "img_size": None,
    "native_grid": 14,
    "patch_size": 16,
    "scales": None,
    "embed_dim": 768,
    "sem_layers": 12,
    "sem_heads": 12,
    "sem_mlp": None,
    "decoder_out_dim": 512,
    "decoder_vqkd": {"depth": 3, "num_heads": 12, "mlp_ratio": 4.0},
    "encoder_ch": 128,
    "encoder_num_res_blocks": 2,
    "decoder_ch": None,
    "decoder_num_res_blocks": None,
    "infer_interpolate": False,
    "enhanced_decoder": False,
    "encoder_ch_mult": (1, 1, 2, 2, 4),
    "decoder_ch_mult": (1, 1, 2, 2, 4),
    "z_channels": 256,
    "codebook_size": 32768,
    "codebook_embed_dim": 8,
    "semantic_code_dim": 32,
    "codebook_l2_norm": True,
    "commit_loss_beta": 0.25,
    "entropy_loss_ratio": 0.0,
    "dropout_p": 0.0,
}
SIGLIP_ARGUMENTS = ARGUMENTS | {
    "teacher": "siglip_384",
    "native_grid": 27,
    "patch_size": 14,
    "embed_dim": 1152,
    "sem_layers": 27,
    "sem_heads": 16,
    "sem_mlp": 4304,
    "decoder_out_dim": 1152,
}
SIGLIP_OUTPUT = 384  # a literal of the published code, whatever went in


def configure(arguments: Mapping[str, Any]) -> TokenFlowConfig:
    """TokenFlow's own arguments → our config. Raises ValueError for a teacher that is not here."""
    teacher, width, decoder = arguments["teacher"], arguments["embed_dim"], arguments["decoder_vqkd"]
    if teacher not in ("clipb_224", "siglip_384"):
        raise ValueError(
            f"teacher must be clipb_224 or siglip_384, got {teacher!r} (the ViTamin variant needs timm, and "
            "no weights of it were published)."
        )
    if not arguments["codebook_l2_norm"]:
        raise ValueError("codebook_l2_norm=False does not run in the published code either.")
    siglip, enhanced = teacher == "siglip_384", arguments["enhanced_decoder"]
    larger = (16,) if arguments["infer_interpolate"] else ()
    scales = tuple(arguments["scales"] or (SIGLIP_SCALES if siglip else CLIP_SCALES + larger))
    native = SIGLIP_OUTPUT if siglip else scales[-1] * arguments["patch_size"]
    encoder = ConvSizes(
        arguments["encoder_ch"],
        tuple(arguments["encoder_ch_mult"]),
        arguments["encoder_num_res_blocks"],
        arguments["z_channels"],
        dropout=arguments["dropout_p"],
    )
    return TokenFlowConfig(
        image_size=arguments["img_size"] or native,
        tower=TowerConfig(
            kind="siglip" if siglip else "clip",
            width=width,
            layers=arguments["sem_layers"],
            heads=arguments["sem_heads"],
            hidden=arguments["sem_mlp"] or 4 * width,
            activation="gelu_pytorch_tanh" if siglip else "quick_gelu",
            patch=arguments["patch_size"],
            side=arguments["native_grid"],
        ),
        scales=scales,
        semantic_dim=arguments["semantic_code_dim"],
        pixel_dim=arguments["codebook_embed_dim"],
        quantizer=QuantizerConfig(
            "learned",
            codebook_size=arguments["codebook_size"],
            cosine=True,
            commitment=arguments["commit_loss_beta"],
            entropy=arguments["entropy_loss_ratio"],
        ),
        encoder=encoder,
        decoder=replace(
            encoder,
            channels=arguments["decoder_ch"] or (256 if enhanced else 128),
            channel_mult=tuple(arguments["decoder_ch_mult"]),
            res_blocks=arguments["decoder_num_res_blocks"] or (4 if enhanced else 2),
        ),
        feature_layers=decoder["depth"],
        feature_heads=decoder["num_heads"],
        feature_ratio=decoder["mlp_ratio"],
        feature_dim=arguments["decoder_out_dim"],
        output_size=SIGLIP_OUTPUT if siglip else 0,
    )


def _row(name: str, file: str, parameters: int, tokens: str, size: int, **more: Any) -> Published:
    return Published(
        name=name,
        repository="ByteFlow-AI/TokenFlow",
        file=file,
        parameters=parameters,
        tokens=tokens,
        size=size,
        codebook="32768 x (32 + 8)",
        code_licence="Apache-2.0",
        weight_licence="MIT",
        source="arXiv 2412.03069, github.com/ByteFlow-AI/TokenFlow",
        **more,
    )


TOKENFLOW = System(
    name="tokenflow",
    arguments=ARGUMENTS,
    configure=configure,
    layouts=(CLIP_LAYOUT,),
    rows=(
        _row(
            "tokenflow-clipb-32k", "tokenflow_clipb_32k_enhanced.pt", 376_569_643, "817 in 9 scales", 256,
            arguments={"enhanced_decoder": True, "infer_interpolate": True},
        ),
    ),
)  # fmt: skip
TOKENFLOW_SIGLIP = System(
    name="tokenflow_siglip",
    arguments=SIGLIP_ARGUMENTS,
    configure=configure,
    layouts=(SIGLIP_LAYOUT,),
    rows=(
        _row(
            "tokenflow-siglip-32k", "tokenflow_siglip_32k.pt", 554_009_963, "2227 in 15 scales", 384,
            arguments={}, rfid="0.63 at 384 pixels",
        ),
    ),
)  # fmt: skip
SYSTEMS = (TOKENFLOW, TOKENFLOW_SIGLIP)
