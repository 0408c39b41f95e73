"""TiTok: a picture as a short line of codes, read out of a transformer by learned queries.

Paper 2406.07550 (bytedance/1d-tokenizer, Apache-2.0). One network, in the forms that are published:

- legacy (`proxy` set): the decoder predicts codes of MaskGIT-VQGAN, whose decoder then paints the picture
  (L-32, B-64, S-128);
- direct: the decoder's patches are the picture (`titok-*-vq`), the form for trainings of one's own;
- One-D-Piece (2501.10064, turingmotors/One-D-Piece, Apache-2.0): legacy with tail token drop. In training the
  quantized latents are cut to a random length, so early codes learn to carry the whole picture and later ones
  detail; any prefix decodes. Nothing is padded: the decoder's sequence gets shorter;
- TA-TiTok (2501.07730): direct, and the decoder also reads the states of CLIP's text tower;
- VAE (`TiTokVAE`): latents instead of codes.

Module names are the published ones. Fresh weights follow torch's defaults (the published standard deviation
of 0.02 leaves narrow networks at the mean picture for hundreds of steps).

b batch · n codes · N their maximum · d latent width · w transformer width · k proxy codes · h w grid, picture
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NoReturn, cast

import torch
from einops import rearrange
from torch import Tensor, nn

from lexel.catalog import Layout, Published, System
from lexel.errors import LexelError
from lexel.hub import Pretrained
from lexel.nn.vit import VisionBlock
from lexel.tokenizers import maskgit_vqgan
from lexel.tokenizers.base import Tokenizer
from lexel.tokenizers.layout import CodeLayout
from lexel.tokenizers.maskgit_vqgan import MaskGITConfig, PixelDecoder
from lexel.tokenizers.quantizers import QuantizerConfig
from lexel.tokenizers.quantizers.learned import Learned
from lexel.types import Codes, QuantizerOutput, TokenizerOutput, check_pixels

LOG_VARIANCE = (-30.0, 20.0)


@dataclass(frozen=True)
class TextGuidance:
    """context, width: of the text states ``[b, context, width]`` that TA-TiTok's decoder reads. tower: folder
    or hub id of the CLIP text tower that makes them, in transformers' format."""

    context: int = 77
    width: int = 768
    tower: str = "openai/clip-vit-large-patch14-336"

    def load(self) -> ClipText:
        """The tower (needs transformers). Raises LexelError when it cannot be had."""
        return ClipText(self)


@dataclass(frozen=True)
class TiTokSizes:
    """What all forms share.

    image_size, patch: picture and patch side in pixels. latents: N, the longest code. width, layers, heads:
    of both transformers; `decoder_*` where the decoder's differ (0: the same). token_size: d.
    proxy: the VQGAN of the legacy form, whose decoder and codebook are then part of the network unless
    pixel_decoder is off (files of the first training stage): such a network encodes, but cannot draw.
    text: what the decoder reads beside the codes (TA-TiTok).
    Raises ValueError when image_size is no multiple of a patch, the proxy's cells are no patches, or its
    quantizer has no codebook of rows to mix.
    """

    image_size: int = 256
    patch: int = 16
    latents: int = 128
    width: int = 512
    layers: int = 8
    heads: int = 8
    decoder_patch: int = 0
    decoder_width: int = 0
    decoder_layers: int = 0
    decoder_heads: int = 0
    token_size: int = 12
    proxy: MaskGITConfig | None = None
    pixel_decoder: bool = True
    text: TextGuidance | None = None

    def __post_init__(self) -> None:
        for patch in (self.patch, self.drawn_patch):
            if self.image_size % patch:
                raise ValueError(f"image_size {self.image_size} is no multiple of patch {patch}.")
        if self.proxy is not None and self.proxy.downsampling != self.drawn_patch:
            raise ValueError(
                f"the proxy's cells are {self.proxy.downsampling} pixels wide, the decoder's patches "
                f"{self.drawn_patch}."
            )
        if self.proxy is not None and self.proxy.quantizer.kind != "learned":
            raise ValueError(f"the proxy's quantizer must be learned, got {self.proxy.quantizer.kind!r}.")

    @property
    def drawn_patch(self) -> int:
        """The decoder's patch side."""
        return self.decoder_patch or self.patch


@dataclass(frozen=True)
class TiTokConfig(TiTokSizes):
    """TiTokSizes, and of the codes: tail_drop: what draws their number in training: `batch` (one draw per
    call, One-D-Piece), `sample` (one per picture) or `none` (TiTok: always N).
    Raises ValueError when tail_drop is unknown."""

    tail_drop: str = "none"
    quantizer: QuantizerConfig = field(
        default_factory=lambda: QuantizerConfig("learned", codebook_size=4096, entropy=0.0)
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tail_drop not in ("batch", "sample", "none"):
            raise ValueError(f"tail_drop must be batch, sample or none, got {self.tail_drop!r}.")

    def build(self) -> TiTok:
        """The tokenizer with fresh weights."""
        return TiTok(self)


@dataclass(frozen=True)
class TiTokVAEConfig(TiTokSizes):
    """TiTokSizes of the continuous form."""

    def build(self) -> TiTokVAE:
        """The network with fresh weights."""
        return TiTokVAE(self)


class Trunk(nn.Module):
    """What encoder and decoder share: a class token, positions of patches and latents, and the blocks."""

    def __init__(self, cells: int, latents: int, width: int, layers: int, heads: int) -> None:
        super().__init__()
        scale = width**-0.5
        self.class_embedding = nn.Parameter(scale * torch.randn(1, width))
        self.positional_embedding = nn.Parameter(scale * torch.randn(cells + 1, width))
        self.latent_token_positional_embedding = nn.Parameter(scale * torch.randn(latents, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = nn.ModuleList(VisionBlock(width, heads) for _ in range(layers))
        self.ln_post = nn.LayerNorm(width)

    def placed(self, patches: Tensor) -> Tensor:
        """``[b, h*w, w] -> [b, 1 + h*w, w]``: class token first, positions added."""
        start = self.class_embedding.expand(len(patches), 1, -1)
        return torch.cat([start, patches], 1) + self.positional_embedding

    def mixed(self, x: Tensor, visible: Tensor | None = None) -> Tensor:
        """``[b, l, w] -> [b, l, w]``; visible: bool ``[b, l]``, tokens that may be looked at (None: all)."""
        x = self.ln_pre(x)
        for block in self.transformer:
            x = block(x, visible)
        return x


class LatentEncoder(Trunk):
    """Patches and N queries attend to each other; only the queries are read out.
    ``[b, 3, h, w] in [0, 1], [N, w] -> [b, N, channels]``."""

    def __init__(self, config: TiTokSizes, channels: int) -> None:
        cells = (config.image_size // config.patch) ** 2
        super().__init__(cells, config.latents, config.width, config.layers, config.heads)
        self.legacy = config.proxy is not None
        self.patch_embed = nn.Conv2d(3, config.width, config.patch, stride=config.patch)
        self.conv_out = nn.Conv2d(config.width, channels, 1)

    def forward(self, pixels: Tensor, queries: Tensor) -> Tensor:
        """See the class."""
        patches = rearrange(self.patch_embed(pixels), "b w h v -> b (h v) w")
        latents = (queries + self.latent_token_positional_embedding).expand(len(pixels), -1, -1)
        x = self.mixed(torch.cat([self.placed(patches), latents], 1))
        x = self.ln_post(x[:, -len(queries) :])
        if self.legacy:
            # Published before the missing transpose was noticed: [N, w] is read as if it were [w, N], so each
            # code mixes entries of all queries.
            x = x.reshape(len(x), x.shape[2], x.shape[1], 1)
        else:
            x = rearrange(x, "b n w -> b w n 1")
        return rearrange(self.conv_out(x), "b c n 1 -> b n c")


class LatentDecoder(Trunk):
    """Mask tokens on the patch grid, latents and text states attend to each other; the mask tokens become the
    picture ``[b, 3, h, w]`` in about [0, 1] or, with a proxy, logits ``[b, k, h/f, w/f]`` over its codes.
    Latents are ``[b, n, d]`` with any n up to N. Raises ValueError where text states are missing, unwanted or
    of another shape."""

    def __init__(self, config: TiTokSizes) -> None:
        width = config.decoder_width or config.width
        layers, heads = config.decoder_layers or config.layers, config.decoder_heads or config.heads
        self.patch = config.drawn_patch
        self.grid = config.image_size // self.patch
        super().__init__(self.grid**2, config.latents, width, layers, heads)
        scale = width**-0.5
        self.decoder_embed = nn.Linear(config.token_size, width)
        self.mask_token = nn.Parameter(scale * torch.randn(1, 1, width))
        self.text = config.text
        if config.text is not None:
            self.text_guidance_proj = nn.Linear(config.text.width, width)
            self.text_guidance_positional_embedding = nn.Parameter(
                scale * torch.randn(config.text.context, width)
            )
        self.conv_out: nn.Conv2d | None = None
        if config.proxy is None:
            self.ffn = nn.Sequential(nn.Conv2d(width, 3 * self.patch**2, 1))
            self.conv_out = nn.Conv2d(3, 3, 3, padding=1)
        else:
            codes = config.proxy.quantizer.codebook_size
            self.ffn = nn.Sequential(
                nn.Conv2d(width, 2 * width, 1), nn.Tanh(), nn.Conv2d(2 * width, codes, 1)
            )

    def forward(self, latents: Tensor, lengths: Tensor | None = None, text: Tensor | None = None) -> Tensor:
        """See the class. lengths: long ``[b]``, latents of each row that exist; the rest is not looked at.
        text: ``[b, context, width]``."""
        count, n, _ = latents.shape
        cells = self.grid**2
        states = self.decoder_embed(latents) + self.latent_token_positional_embedding[:n]
        x = torch.cat([self.placed(self.mask_token.expand(count, cells, -1)), states], 1)
        visible = None
        if lengths is not None:
            visible = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
            visible[:, 1 + cells :] = torch.arange(n, device=x.device) < lengths[:, None]
        if self._reads(text, count):
            guidance = self.text_guidance_proj(text) + self.text_guidance_positional_embedding
            x = torch.cat([x, guidance], 1)
            if visible is not None:
                visible = torch.cat([visible, visible.new_ones(guidance.shape[:2])], 1)
        x = self.ln_post(self.mixed(x, visible)[:, 1 : 1 + cells])
        x = self.ffn(rearrange(x, "b (h v) w -> b w h v", h=self.grid))
        if self.conv_out is None:
            return x
        # Channel fastest, unlike nn.PixelShuffle.
        x = rearrange(x, "b (p q c) h w -> b c (h p) (w q)", p=self.patch, q=self.patch)
        return self.conv_out(x)

    def _reads(self, text: Tensor | None, count: int) -> bool:
        if self.text is None:
            if text is not None:
                raise ValueError("this decoder reads no text; leave `text` out.")
            return False
        wanted = (count, self.text.context, self.text.width)
        if text is None or tuple(text.shape) != wanted:
            given = "none were given" if text is None else f"got {list(text.shape)}"
            raise ValueError(
                f"this decoder reads text states {list(wanted)}, {given}; see TextGuidance.load."
            )
        return True


class TiTokNetwork(nn.Module):
    """The two transformers and, in the legacy form, the proxy's codebook and decoder."""

    def __init__(self, config: TiTokSizes, channels: int) -> None:
        super().__init__()
        self.image_size = (config.image_size, config.image_size)
        self.encoder = LatentEncoder(config, channels)
        self.latent_tokens = nn.Parameter(config.width**-0.5 * torch.randn(config.latents, config.width))
        self.decoder = LatentDecoder(config)
        self.has_pixel_decoder = config.proxy is not None and config.pixel_decoder
        if config.proxy is not None and config.pixel_decoder:
            self.pixel_quantize = config.proxy.quantizer.build(config.proxy.z_channels)
            self.pixel_decoder = PixelDecoder(config.proxy)

    @property
    def has_decoder(self) -> bool:
        """Whether it can draw: always, but for a legacy network without the proxy's decoder."""
        return self.has_pixel_decoder or self.decoder.conv_out is not None

    @property
    def last_layer(self) -> nn.Parameter:
        """See `Tokenizer.last_layer`."""
        head = self.pixel_decoder.conv_out if self.has_pixel_decoder else self.decoder.conv_out
        return cast(nn.Parameter, cast(nn.Conv2d, head).weight)

    def latents(self, pixels: Tensor) -> Tensor:
        """``[b, 3, h, w] -> [b, N, channels]``, what the encoder says."""
        return self.encoder((pixels + 1) / 2, self.latent_tokens)

    def pixel_states(self, logits: Tensor) -> Tensor:
        """Logits over the proxy's codes ``[b, k, h, w]`` to its decoder's input ``[b, d, h, w]``: the
        expected code. The likeliest one would be another picture."""
        codebook = cast(Learned, self.pixel_quantize).codebook
        return torch.einsum("bkhw,kd->bdhw", logits.float().softmax(1), codebook)

    def draw(self, latents: Tensor, lengths: Tensor | None = None, text: Tensor | None = None) -> Tensor:
        """Latents ``[b, n, d]`` to pixels ``[b, 3, h, w]``, see `LatentDecoder`.
        Raises ValueError without the proxy's decoder."""
        if not self.has_decoder:
            raise ValueError("this TiTok ends at logits over proxy codes (first stage): it cannot draw.")
        decoded = self.decoder(latents, lengths, text)
        if self.has_pixel_decoder:
            decoded = self.pixel_decoder(self.pixel_states(decoded))
        return decoded * 2 - 1  # the published network works in [0, 1]

    def _check_size(self, pixels: Tensor) -> None:
        if tuple(pixels.shape[2:]) != self.image_size:
            raise ValueError(f"pictures must be {self.image_size}, got {tuple(pixels.shape[2:])}.")


@dataclass(frozen=True)
class ProxyOutput:
    """A legacy network's training pass without pixels: logits over the proxy's codes ``[b, k, h, w]``, the
    codes and what the quantizer says."""

    logits: Tensor
    codes: Codes
    quantizer: QuantizerOutput


class TiTok(TiTokNetwork, Tokenizer):
    """See the module docstring. ``encode: [b, 3, h, w] -> Codes [b, N, k]``; tail drop adds `lengths`."""

    model_type: ClassVar[str] = "titok"
    config_class: ClassVar[type] = TiTokConfig
    config: TiTokConfig

    def __init__(self, config: TiTokConfig) -> None:
        super().__init__(config, config.token_size)
        self.config = config
        self.layout = CodeLayout(
            config.quantizer.codebook_sizes, length=config.latents, flexible=config.tail_drop != "none"
        )
        self.quantize = config.quantizer.build(config.token_size)

    def forward(
        self,
        pixels: Tensor,
        *,
        quantize: bool = True,
        generator: torch.Generator | None = None,
        text: Tensor | None = None,
    ) -> TokenizerOutput:
        """See `Tokenizer.forward`. In training mode, lengths are drawn uniformly from 1..N. The quantizer
        sees all N latents whatever is dropped. text: see `LatentDecoder`."""
        latents = self.latents(pixels)
        output = self.quantize(latents, quantize)
        codes = self._codes(output.indices, generator)
        return TokenizerOutput(self.draw(*_cut(output.quantized, codes), text), codes, output, latents)

    def predict_proxy(
        self, pixels: Tensor, *, quantize: bool = True, generator: torch.Generator | None = None
    ) -> ProxyOutput:
        """The first training stage's pass: as `forward`, up to the logits over the proxy's codes."""
        output = self.quantize(self.latents(pixels), quantize)
        codes = self._codes(output.indices, generator)
        return ProxyOutput(self.decoder(*_cut(output.quantized, codes)), codes, output)

    @torch.no_grad()
    def decode(self, codes: Codes, text: Tensor | None = None) -> Tensor:
        """See `Tokenizer.decode`; text: see `LatentDecoder`."""
        return self.draw(*_cut(self.embed(codes), codes), text)

    def embed(self, codes: Codes) -> Tensor:
        """See `Tokenizer.embed`; positions beyond a row's length are embedded like any code and ignored by
        `decode`."""
        return self.quantize.decode(codes.indices)

    def _encode(self, pixels: Tensor, length: int | None) -> Codes:
        indices = self.quantize.encode(self.latents(pixels).float())
        if not self.layout.flexible:
            return Codes(indices)
        return Codes(indices, lengths=indices.new_full((len(pixels),), self.layout_length(length)))

    def _decode(self, latents: Tensor, codes: Codes) -> Tensor:
        return self.draw(*_cut(latents, codes))

    def _codes(self, indices: Tensor, generator: torch.Generator | None) -> Codes:
        """Codes of a forward pass, their lengths drawn."""
        if not self.layout.flexible:
            return Codes(indices)
        return Codes(indices, lengths=self._draw_lengths(len(indices), generator).to(indices.device))

    def _draw_lengths(self, count: int, generator: torch.Generator | None) -> Tensor:
        full, kind = self.config.latents, self.config.tail_drop
        if not self.training or kind == "none":
            return torch.full((count,), full)
        # On the generator's own device, CPU by default: the same draw whatever the pixels' device.
        device = "cpu" if generator is None else generator.device
        draws = 1 if kind == "batch" else count
        return torch.randint(1, full + 1, (draws,), generator=generator, device=device).expand(count)


def _cut(latents: Tensor, codes: Codes) -> tuple[Tensor, Tensor | None]:
    """The latents ``[b, n, d]`` that some row still has, and the rows' lengths where they differ."""
    if codes.lengths is None:
        return latents, None
    longest = int(codes.lengths.max())
    alike = bool((codes.lengths == longest).all())
    return latents[:, :longest], None if alike else codes.lengths


@dataclass(frozen=True)
class VAEOutput:
    """A training pass of `TiTokVAE`: reconstruction ``[b, 3, h, w]``; mean and logvar ``[b, N, d]``."""

    reconstruction: Tensor
    mean: Tensor
    logvar: Tensor


class TiTokVAE(TiTokNetwork, Pretrained):
    """TiTok's continuous form: a Gaussian over latents ``[b, N, d]`` in place of codes. It is no `Tokenizer`:
    what needs codes refuses it."""

    model_type: ClassVar[str] = "titok_vae"
    config_class: ClassVar[type] = TiTokVAEConfig
    config: TiTokVAEConfig

    def __init__(self, config: TiTokVAEConfig) -> None:
        super().__init__(config, 2 * config.token_size)
        self.config = config

    def moments(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance (clamped to [-30, 20]), each ``[b, N, d]``, of pixels ``[b, 3, h, w]``."""
        mean, logvar = self.latents(pixels).chunk(2, dim=-1)
        return mean, logvar.clamp(*LOG_VARIANCE)

    def forward(
        self, pixels: Tensor, *, generator: torch.Generator | None = None, text: Tensor | None = None
    ) -> VAEOutput:
        """Training pass through a drawn latent (the mean in eval mode)."""
        mean, logvar = self.moments(pixels)
        latents = _sample(mean, logvar, generator) if self.training else mean
        return VAEOutput(self.draw(latents, text=text), mean, logvar)

    @torch.no_grad()
    def encode_latents(
        self, pixels: Tensor, *, sample: bool = False, generator: torch.Generator | None = None
    ) -> Tensor:
        """Float ``[b, 3, h, w]`` in [-1, 1] to the mean ``[b, N, d]``, or with `sample` a draw.
        Raises ValueError on a wrong shape or size."""
        self._check_size(check_pixels(pixels))
        mean, logvar = self.moments(pixels)
        return _sample(mean, logvar, generator) if sample else mean

    @torch.no_grad()
    def decode_latents(self, latents: Tensor, text: Tensor | None = None) -> Tensor:
        """``[b, N, d]`` to float ``[b, 3, h, w]`` in about [-1, 1] (not clamped)."""
        return self.draw(latents, text=text)

    def encode(self, *_: Any, **__: Any) -> NoReturn:
        """Raises LexelError: there are no codes."""
        raise LexelError(NO_CODES)

    def decode(self, *_: Any, **__: Any) -> NoReturn:
        """Raises LexelError: there are no codes."""
        raise LexelError(NO_CODES)

    @property
    def layout(self) -> NoReturn:
        """Raises LexelError: there are no codes."""
        raise LexelError(NO_CODES)


NO_CODES = (
    "this TiTok is a VAE: it makes continuous latents, not codes; use encode_latents and decode_latents, or "
    "a checkpoint with a codebook where codes are needed."
)


def _sample(mean: Tensor, logvar: Tensor, generator: torch.Generator | None) -> Tensor:
    # On the generator's own device, CPU by default: the same draw whatever the pixels' device.
    device = "cpu" if generator is None else generator.device
    noise = torch.randn(mean.shape, generator=generator, device=device).to(mean)
    return mean + (logvar / 2).exp() * noise


class ClipText(nn.Module):
    """Captions to the states that TA-TiTok's decoder reads: CLIP's text tower after its final norm, one state
    per token, neither pooled nor projected. Raises LexelError when transformers or the tower are missing."""

    def __init__(self, guidance: TextGuidance) -> None:
        super().__init__()
        self.context = guidance.context
        try:
            from transformers import CLIPTextModel, CLIPTokenizer

            self.tokenizer = CLIPTokenizer.from_pretrained(guidance.tower)
            self.tower = CLIPTextModel.from_pretrained(guidance.tower).eval().requires_grad_(False)
        except (ImportError, OSError, ValueError) as error:
            raise LexelError(f"the CLIP text tower {guidance.tower} cannot be loaded: {error}") from error

    @torch.no_grad()
    def forward(self, captions: Sequence[str]) -> Tensor:
        """Captions (cut to `context` tokens) to float ``[b, context, width]``."""
        rows = self.tokenizer(list(captions), truncation=True, max_length=self.context)["input_ids"]
        # CLIP's own tokenizer pads with id 0, transformers' with the end token. The tower is causal, so this
        # changes the padding's states only, but the decoder reads those too.
        ids = torch.tensor([row + [0] * (self.context - len(row)) for row in rows])
        device = next(self.tower.parameters()).device
        return self.tower(input_ids=ids.to(device)).last_hidden_state


# Published checkpoints.
VIT_SIZES = {
    "small": {"width": 512, "num_layers": 8, "num_heads": 8},
    "base": {"width": 768, "num_layers": 12, "num_heads": 12},
    "large": {"width": 1024, "num_layers": 24, "num_heads": 16},
}
PROXY = maskgit_vqgan.ARGUMENTS
# What the reference assumes where its config is silent; the rest of its config must be given.
SILENT = {"finetune_decoder": True, "is_legacy": True, "quantize_mode": "vq"}
TITOK_ARGUMENTS: dict[str, Any] = {
    **SILENT,
    "codebook_size": 4096,
    "token_size": 12,
    "use_l2_norm": True,
    "commitment_cost": 0.25,
    "clustering_vq": False,
    "vit_enc_model_size": "small",
    "vit_dec_model_size": "small",
    "vit_enc_patch_size": 16,
    "vit_dec_patch_size": 16,
    "num_latent_tokens": 128,
    "crop_size": 256,
    # Constants of the reference's code.
    "vit_sizes": VIT_SIZES,
    "pixel_decoder": {k: v for k, v in PROXY.items() if k not in ("num_embeddings", "embedding_dim")},
    "proxy_codebook": {k: PROXY[k] for k in ("num_embeddings", "embedding_dim")},
}
TATITOK_ARGUMENTS = TITOK_ARGUMENTS | {"text_context_length": 77, "text_embed_dim": 768}
ONE_D_PIECE_ARGUMENTS = TITOK_ARGUMENTS | {"strict_length_assertion": False}
LAYOUT = Layout(
    ignored={r"quantize\.embed_prob": "how often each code was used, for trainings that move dead codes"}
)


def flatten(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The reference's nested config (`model.vq_model`, `dataset.preprocessing`) → its arguments; flat names
    stay as they are. `_reduced` holds what the reference's code fixes: `vit_sizes`, `pixel_decoder`,
    `proxy_codebook`."""
    if not {"model", "dataset"} & set(config):
        return config
    crop = config.get("dataset", {}).get("preprocessing", {}).get("crop_size")
    return {
        **SILENT,
        **config.get("model", {}).get("vq_model", {}),
        **({} if crop is None else {"crop_size": crop}),
        **config.get("_reduced", {}),
    }


def configure(arguments: Mapping[str, Any]) -> TiTokConfig | TiTokVAEConfig:
    """TiTok's own arguments → our config. Raises ValueError where they contradict each other."""
    return _configure(arguments)


def configure_text(arguments: Mapping[str, Any]) -> TiTokConfig | TiTokVAEConfig:
    """TA-TiTok's own arguments → our config."""
    return _configure(
        arguments, text=TextGuidance(arguments["text_context_length"], arguments["text_embed_dim"])
    )


def configure_flexible(arguments: Mapping[str, Any]) -> TiTokConfig | TiTokVAEConfig:
    """One-D-Piece's own arguments → our config. `strict_length_assertion` is its name for refusing other
    lengths than N; its tokenizers never do."""
    return _configure(arguments, tail_drop="batch")


def _configure(
    arguments: Mapping[str, Any], text: TextGuidance | None = None, tail_drop: str = "none"
) -> TiTokConfig | TiTokVAEConfig:
    encoder, decoder = (_vit(arguments, f"vit_{part}_model_size") for part in ("enc", "dec"))
    if arguments["finetune_decoder"] and not arguments["is_legacy"]:
        raise ValueError("finetune_decoder needs is_legacy: without proxy codes there is no pixel decoder.")
    sizes: dict[str, Any] = {
        "image_size": arguments["crop_size"],
        "patch": arguments["vit_enc_patch_size"],
        "latents": arguments["num_latent_tokens"],
        "width": encoder["width"],
        "layers": encoder["num_layers"],
        "heads": encoder["num_heads"],
        "decoder_patch": arguments["vit_dec_patch_size"],
        "decoder_width": decoder["width"],
        "decoder_layers": decoder["num_layers"],
        "decoder_heads": decoder["num_heads"],
        "token_size": arguments["token_size"],
        "proxy": _proxy(arguments) if arguments["is_legacy"] else None,
        "pixel_decoder": arguments["finetune_decoder"] or not arguments["is_legacy"],
        "text": text,
    }
    if arguments["quantize_mode"] == "vae":
        return TiTokVAEConfig(**sizes)
    if arguments["quantize_mode"] != "vq":
        raise ValueError(f"quantize_mode must be vq or vae, got {arguments['quantize_mode']!r}.")
    quantizer = QuantizerConfig(
        "learned",
        codebook_size=arguments["codebook_size"],
        cosine=arguments["use_l2_norm"],
        commitment=arguments["commitment_cost"],
        entropy=0.0,
    )
    return TiTokConfig(**sizes, tail_drop=tail_drop, quantizer=quantizer)


def _vit(arguments: Mapping[str, Any], name: str) -> Mapping[str, int]:
    sizes = VIT_SIZES | arguments["vit_sizes"]
    if arguments[name] not in sizes:
        raise ValueError(f"{name} must be one of {', '.join(sizes)}, got {arguments[name]!r}.")
    return sizes[arguments[name]]


def _proxy(arguments: Mapping[str, Any]) -> MaskGITConfig:
    given = {**arguments["pixel_decoder"], **arguments["proxy_codebook"]}
    config = maskgit_vqgan.MASKGIT.config(given)
    return cast(MaskGITConfig, config)


def _row(
    name: str, repository: str, parameters: int, rfid: str, arguments: dict[str, Any], file: str = ""
) -> Published:
    continuous = arguments.get("quantize_mode") == "vae"
    width = arguments.get("token_size", 12)
    codebook = (
        f"none: {width} channels" if continuous else f"{arguments.get('codebook_size', 4096)} x {width}"
    )
    papers = {
        "titok": "arXiv 2406.07550, github.com/bytedance/1d-tokenizer",
        "tatitok": "arXiv 2501.07730, github.com/bytedance/1d-tokenizer",
        "one": "arXiv 2501.10064, github.com/turingmotors/One-D-Piece",
    }
    return Published(
        name=name,
        repository=repository,
        file=file,
        arguments=arguments,
        parameters=parameters,
        tokens=("1 to " if name.startswith("one") else "") + str(arguments["num_latent_tokens"]),
        codebook=codebook,
        code_licence="Apache-2.0",
        weight_licence="not stated",
        source=papers[name.split("-")[0]],
        rfid=rfid,
    )


SIZE_LETTERS = {"s": "small", "b": "base", "l": "large"}


def _sizes(letters: str, latents: int, **arguments: Any) -> dict[str, Any]:
    """letters: encoder's and decoder's size."""
    return {
        "vit_enc_model_size": SIZE_LETTERS[letters[0]],
        "vit_dec_model_size": SIZE_LETTERS[letters[-1]],
        "num_latent_tokens": latents,
        **arguments,
    }


def _direct(letters: str, latents: int, mode: str) -> dict[str, Any]:
    codes = {"codebook_size": 8192, "token_size": 64, "use_l2_norm": False}
    own = codes if mode == "vq" else {"token_size": 16, "quantize_mode": "vae"}
    return _sizes(letters, latents, is_legacy=False, finetune_decoder=False, **own)


def _titok_row(letters: str, latents: int, mode: str, parameters: int, rfid: str) -> Published:
    """mode: `legacy`, `vq` or `vae`."""
    ending = {"legacy": "", "vq": "_vq8k", "vae": "_vae_c16"}[mode]
    name = f"titok-{letters}-{latents}" + ("" if mode == "legacy" else f"-{mode}")
    arguments = _sizes(letters, latents) if mode == "legacy" else _direct(letters, latents, mode)
    hub = f"yucornetto/tokenizer_titok_{letters}{latents}{ending}_imagenet"
    return _row(name, hub, parameters, rfid, arguments)


def _tatitok_row(letters: str, latents: int, mode: str, parameters: int, rfid: str) -> Published:
    hub = f"turkeyju/tokenizer_tatitok_{letters}{latents}_{mode}"
    arguments = _direct(letters, latents, mode)
    return _row(f"tatitok-{letters}-{latents}-{mode}", hub, parameters, rfid, arguments)


def _one_d_piece_row(letter: str, parameters: int, rfid: str) -> Published:
    hub = f"turing-motors/One-D-Piece-{letter.upper()}-256"
    arguments = _sizes(letter, 256)
    return _row(f"one-d-piece-{letter}-256", hub, parameters, rfid, arguments, "pytorch_model.bin")


TITOK = System(
    name="titok",
    arguments=TITOK_ARGUMENTS,
    configure=configure,
    layouts=(LAYOUT,),
    container="",
    flatten=flatten,
    reads_config=True,
    rows=(
        _titok_row("l", 32, "legacy", 641_054_735, "2.21"),
        _titok_row("b", 64, "legacy", 204_814_095, "1.70"),
        _titok_row("s", 128, "legacy", 83_674_639, "1.71"),
        _titok_row("bl", 64, "vq", 390_016_148, "2.06"),
        _titok_row("bl", 128, "vq", 390_179_988, "1.49"),
        _titok_row("sl", 256, "vq", 330_260_884, "1.03"),
        _titok_row("ll", 32, "vae", 606_879_604, "1.61"),
        _titok_row("bl", 64, "vae", 389_418_100, "1.25"),
        _titok_row("bl", 128, "vae", 389_581_940, "0.84"),
    ),
)
TATITOK = System(
    name="tatitok",
    arguments=TATITOK_ARGUMENTS,
    configure=configure_text,
    layouts=(LAYOUT,),
    container="",
    flatten=flatten,
    reads_config=True,
    rows=(
        _tatitok_row("bl", 32, "vq", 390_800_532, "3.95"),
        _tatitok_row("bl", 64, "vq", 390_882_452, "2.43"),
        _tatitok_row("bl", 128, "vq", 391_046_292, "1.53"),
        _tatitok_row("bl", 32, "vae", 390_202_484, "1.53"),
        _tatitok_row("bl", 64, "vae", 390_284_404, "1.47"),
        _tatitok_row("sl", 128, "vae", 330_275_188, "0.90"),
    ),
)
ONE_D_PIECE = System(
    name="one_d_piece",
    arguments=ONE_D_PIECE_ARGUMENTS,
    configure=configure_flexible,
    layouts=(LAYOUT,),
    container="",
    flatten=flatten,
    reads_config=True,
    rows=(
        _one_d_piece_row("s", 83_871_247, "1.48"),
        _one_d_piece_row("b", 205_256_463, "1.11"),
        _one_d_piece_row("l", 641_742_863, "1.08"),
    ),
)
SYSTEMS = (TITOK, TATITOK, ONE_D_PIECE)
