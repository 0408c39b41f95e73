"""SEED-2: a picture as 32 codes in a causal line, for language models that read left to right.

Papers 2307.08041 and 2310.01218 (AILab-CVC/SEED, Apache-2.0). Learned queries read the tokens of a frozen
vision model through a Q-Former, each query looking at earlier queries only; their outputs are rounded to
codes. Codes decode to the image embedding of a CLIP model, not to pixels: a detokenizer draws those
(`lexel.models.detokenizers.unclip`).

The vision model is EVA's ViT-g as published, or any of transformers (`lexel.nn.vision`). The Q-Former is
transformers' `Blip2QFormerModel`, which gives the published one's values under the mask below. Two heads
exist: `down` (the released weights) and `qformer` (the released training code).

b batch · l vision tokens · n queries · d latent width · w Q-Former width · f width of the image embedding
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from lexel.catalog import Layout, Published, System
from lexel.checkpoints import read_checkpoint
from lexel.errors import LexelError
from lexel.hub import mismatches
from lexel.nn.eva_vit import CLIP_DEVIATION, CLIP_MEAN, Block, EvaConfig, EvaViT
from lexel.nn.vision import VisionConfig, vision_weights
from lexel.tokenizers.base import Tokenizer, needs_detokenizer
from lexel.tokenizers.layout import CodeLayout
from lexel.tokenizers.quantizers import QuantizerConfig
from lexel.types import Codes, TokenizerOutput

CROSS_EVERY = 2  # every second layer of a Q-Former looks at what it reads, the first one included
DOWN = (256, 128, 32)  # widths inside the `down` head
MLP_RATIO = 4.0


def vq(codes: int) -> QuantizerConfig:
    """Of SEED: plain distances, learned rows, terms of weight 1 for the objective to weigh."""
    return QuantizerConfig("learned", codebook_size=codes, cosine=False, commitment=1.0, entropy=0.0)


@dataclass(frozen=True)
class SeedConfig:
    """Defaults are SEED-2's.

    vit, vision: the vision model, exactly one of the two: EVA's ViT or another.
    queries: n. causal: whether a query looks at earlier queries only. width, layers, heads, hidden: of the
    Q-Formers (feed-forward `hidden`); dropout: inside them, in training. decode_layers: of each of the two
    stacks behind the codes; block_heads: their heads. token_size: d. head: `down` or `qformer`.
    features: f. quantizer: of the queries' outputs.
    Raises ValueError for no or two vision models, an unknown head and heads that do not divide the width.
    """

    vit: EvaConfig | None = field(default_factory=lambda: EvaConfig(layers=39))
    vision: VisionConfig | None = None
    queries: int = 32
    causal: bool = True
    width: int = 768
    layers: int = 12
    heads: int = 12
    hidden: int = 3072
    dropout: float = 0.1
    decode_layers: int = 4
    block_heads: int = 12
    token_size: int = 32
    head: Literal["down", "qformer"] = "down"
    features: int = 1024
    quantizer: QuantizerConfig = field(default_factory=lambda: vq(8192))

    def __post_init__(self) -> None:
        if (self.vit is None) == (self.vision is None):
            raise ValueError("set exactly one of vit and vision; the other is null.")
        if self.head not in ("down", "qformer"):
            raise ValueError(f"head must be down or qformer, got {self.head!r}.")
        for name in ("heads", "block_heads"):
            if self.width % getattr(self, name):
                raise ValueError(f"{name} {getattr(self, name)} must divide the width {self.width}.")

    @property
    def encoder(self) -> EvaConfig | VisionConfig:
        """The vision model's config."""
        config = self.vit or self.vision
        assert config is not None  # checked in __post_init__
        return config

    def build(self) -> SeedTokenizer:
        """The tokenizer with fresh weights."""
        return SeedTokenizer(self)


@dataclass(frozen=True, kw_only=True)
class SeedOutput(TokenizerOutput):
    """`reconstruction` is the image embedding ``[b, 1, f]``. queries: the Q-Former's outputs ``[b, n, w]``;
    rebuilt: the same, told from the codes (see `SeedTokenizer.rebuild`)."""

    queries: Tensor
    rebuilt: Tensor


class TaskLayer(nn.Sequential):
    """``Linear, Tanh, Linear``: between the Q-Former's width and the codes'."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, out))


class SeedTokenizer(Tokenizer):
    """See the module docstring. Fresh weights follow BERT's in the Q-Formers, torch's defaults elsewhere."""

    model_type: ClassVar[str] = "seed"
    config_class: ClassVar[type] = SeedConfig
    config: SeedConfig
    mean: Tensor
    deviation: Tensor

    def __init__(self, config: SeedConfig) -> None:
        super().__init__()
        self.config = config
        width, n = config.width, config.queries
        vision = config.encoder
        self.visual_encoder = EvaViT(vision) if isinstance(vision, EvaConfig) else vision.build()
        self.image_size = (vision.image_size, vision.image_size)
        self.ln_vision = nn.LayerNorm(vision.width, 1e-5)
        self.query_tokens = nn.Parameter(0.02 * torch.randn(1, n, width))
        self.qformer = build_qformer(config, vision.width)
        self.encode_task_layer = TaskLayer(width, config.token_size)
        self.quantize = config.quantizer.build(config.token_size)
        self.decode_task_layer = TaskLayer(config.token_size, width)
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, n, width))
        self.blocks = _blocks(config)
        self.pos_embed_image = nn.Parameter(0.02 * torch.randn(1, n, width))
        self.blocks_image = _blocks(config)
        if config.head == "down":
            self.image_down = _down(width)
            self.distill_image_proj = nn.Linear(n * DOWN[-1], config.features)
        else:
            self.reverse_tokens = nn.Parameter(0.02 * torch.randn(1, 1, width))
            self.reverse_qformer = build_qformer(config, width)
            self.distill_image_proj = nn.Linear(width, config.features)
        self.layout = CodeLayout(self.quantize.codebook_sizes, length=n)
        # Statistics belong to the config, not to the weights.
        for name, default in (("mean", CLIP_MEAN), ("deviation", CLIP_DEVIATION)):
            value = getattr(vision, name, default)
            self.register_buffer(name, torch.tensor(value).view(3, 1, 1), persistent=False)

    @property
    def draws_pixels(self) -> bool:
        """No: codes stand for an image embedding."""
        return False

    @property
    def last_layer(self) -> nn.Parameter:
        """See `Tokenizer.last_layer`."""
        return cast(nn.Parameter, self.distill_image_proj.weight)

    def see(self, pixels: Tensor) -> Tensor:
        """Pixels ``[b, 3, h, w]`` in [-1, 1] to the normed tokens of the vision model ``[b, l, width]``."""
        return self.ln_vision(self.visual_encoder(((pixels + 1) / 2 - self.mean) / self.deviation))

    def read(self, seen: Tensor) -> Tensor:
        """Normed vision tokens ``[b, l, width]`` to the queries' outputs ``[b, n, w]``."""
        queries = self.query_tokens.expand(len(seen), -1, -1)
        visible = None
        if self.config.causal:
            n = self.config.queries
            visible = torch.ones(n, n, dtype=torch.bool, device=seen.device).tril()
            visible = visible.expand(len(seen), 1, n, n)
        return self.qformer(
            query_embeds=queries, attention_mask=visible, encoder_hidden_states=seen
        ).last_hidden_state

    def latents(self, pixels: Tensor) -> Tensor:
        """Pixels to what is rounded, ``[b, n, d]``."""
        return self.encode_task_layer(self.read(self.see(pixels)))

    def image_embedding(self, quantized: Tensor) -> Tensor:
        """Quantized latents ``[b, n, d]`` to the image embedding ``[b, 1, f]``."""
        return self.head(self.mixed(self.decode_task_layer(quantized)))

    def mixed(self, told: Tensor) -> Tensor:
        """What the codes say ``[b, n, w]`` through the blocks before the head."""
        return _through(self.blocks_image, told + self.pos_embed_image)

    def head(self, states: Tensor) -> Tensor:
        """States ``[b, n, w]`` to the image embedding ``[b, 1, f]``."""
        if self.config.head == "down":
            return self.distill_image_proj(rearrange(self.image_down(states), "b n d -> b 1 (n d)"))
        tokens = self.reverse_tokens.expand(len(states), -1, -1)
        return self.distill_image_proj(
            self.reverse_qformer(query_embeds=tokens, encoder_hidden_states=states).last_hidden_state
        )

    def rebuild(self, quantized: Tensor) -> Tensor:
        """Quantized latents ``[b, n, d]`` to the queries' outputs ``[b, n, w]`` that they stand for: a loss
        of the training, read by nothing else."""
        return _through(self.blocks, self.decode_task_layer(quantized) + self.pos_embed)

    def forward(
        self, pixels: Tensor, *, quantize: bool = True, generator: torch.Generator | None = None
    ) -> SeedOutput:
        """See `Tokenizer.forward`."""
        queries = self.read(self.see(pixels))
        latents = self.encode_task_layer(queries)
        rounded = self.quantize(latents, quantize)
        return SeedOutput(
            reconstruction=self.image_embedding(rounded.quantized),
            codes=Codes(rounded.indices),
            quantizer=rounded,
            latents=latents,
            queries=queries,
            rebuilt=self.rebuild(rounded.quantized),
        )

    def embed(self, codes: Codes) -> Tensor:
        """Rows of the codebook ``[b, n, d]``. Raises ValueError for another number of codes."""
        n, k = self.config.queries, self.layout.k
        if codes.indices.shape[1:] != (n, k):
            raise ValueError(f"these codes are {list(codes.indices.shape)}, expected [b, {n}, {k}].")
        return self.quantize.decode(codes.indices)

    @torch.no_grad()
    def decode_features(self, codes: Codes) -> Tensor:
        """Codes to the image embedding ``[b, 1, f]``."""
        return self.image_embedding(self.embed(codes))

    def load_vision(self, source: str | Path) -> None:
        """Fill the vision model: from `eva_vit_g.pth` or another file in its layout, or, where `vision` is
        set, from the folder or hub id of a transformers model. Raises LexelError when it cannot be had or
        does not fit."""
        own = self.visual_encoder.state_dict()
        if self.config.vit is None:
            state = {f"network.{key}": value for key, value in vision_weights(str(source)).items()}
        else:
            # Files of the whole model end in a block, a norm and a head that are not used.
            found = resized(read_checkpoint(source), self.config.vit)
            state = {key: value for key, value in found.items() if key in own}
        expected = {key: tuple(value.shape) for key, value in own.items()}
        if problems := mismatches(expected, {key: tuple(value.shape) for key, value in state.items()}):
            raise LexelError(f"{source} is not built like the tokenizer's vision model: {problems}.")
        self.visual_encoder.load_state_dict(state)

    def _encode(self, pixels: Tensor, length: int | None) -> Codes:
        return Codes(self.quantize.encode(self.latents(pixels)))

    def _decode(self, latents: Tensor, codes: Codes) -> Tensor:
        raise needs_detokenizer(self)

    def _check_size(self, pixels: Tensor) -> None:
        if tuple(pixels.shape[2:]) != self.image_size:
            side = self.image_size[0]
            raise ValueError(
                f"this tokenizer reads {side}x{side} pictures, got {pixels.shape[2]}x{pixels.shape[3]}."
            )


def build_qformer(config: SeedConfig, reads: int) -> Any:
    """A Q-Former that looks at tokens of width `reads` (needs transformers)."""
    from transformers import Blip2QFormerConfig, Blip2QFormerModel

    return Blip2QFormerModel(
        Blip2QFormerConfig(
            hidden_size=config.width,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            intermediate_size=config.hidden,
            hidden_dropout_prob=config.dropout,
            attention_probs_dropout_prob=config.dropout,
            layer_norm_eps=1e-12,
            cross_attention_frequency=CROSS_EVERY,
            encoder_hidden_size=reads,
        )
    )


def resized(state: Mapping[str, Tensor], config: EvaConfig) -> dict[str, Tensor]:
    """A ViT's tensors with the positions of its patches resized (bicubic) to the config's grid, as the
    publishers' loaders do."""
    table = state.get("pos_embed")
    if table is None or table.ndim != 3 or table.shape[1] == config.patches + 1:
        return dict(state)
    side, wanted = round((table.shape[1] - 1) ** 0.5), round(config.patches**0.5)
    if side**2 != table.shape[1] - 1:
        return dict(state)
    grid = rearrange(table[:, 1:].float(), "1 (h w) d -> 1 d h w", h=side)
    grid = F.interpolate(grid, (wanted, wanted), mode="bicubic", align_corners=False)
    patches = rearrange(grid, "1 d h w -> 1 (h w) d").to(table.dtype)
    return {**state, "pos_embed": torch.cat([table[:, :1], patches], dim=1)}


def _blocks(config: SeedConfig) -> nn.ModuleList:
    hidden = int(config.width * MLP_RATIO)
    return nn.ModuleList(Block(config.width, config.block_heads, hidden) for _ in range(config.decode_layers))


def _through(blocks: nn.ModuleList, x: Tensor) -> Tensor:
    for block in blocks:
        x = block(x)
    return x


def _down(width: int) -> nn.Sequential:
    """The `down` head's map of each token, without biases."""
    first, second, last = DOWN
    return nn.Sequential(
        nn.Linear(width, first, bias=False),
        nn.ReLU(),
        nn.Linear(first, second, bias=False),
        nn.ReLU(),
        nn.Linear(second, last, bias=False),
    )


# Published checkpoints.
VIT_FILE = "eva_vit_g.pth"
REST_FILE = "seed_quantizer.pt"
# What the network's parts are called in REST_FILE.
OURS = (
    "query_tokens",
    "ln_vision",
    "Qformer",
    "quantize",
    "encode_task_layer",
    "decode_task_layer",
    "pos_embed",
    "blocks",
    "pos_embed_image",
    "blocks_image",
    "image_down",
    "reverse_tokens",
    "Reverse_Qformer",
    "distill_image_proj",
)
VIT_ADDRESS = f"https://storage.googleapis.com/sfr-vision-language-research/LAVIS/models/BLIP2/{VIT_FILE}"
ARGUMENTS: dict[str, Any] = {
    "img_size": 224,
    "patch_size": 14,
    "vit_embed_dim": 1408,
    "vit_depth": 39,
    "vit_num_heads": 16,
    "vit_mlp_ratio": 4.3637,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "intermediate_size": 3072,
    "num_query_token": 32,
    "codebook_embed_dim": 32,
    "n_embed": 8192,
    "decode_depth": 4,
    "use_qformer_image": False,
    "image_features_dim": 1024,
    # Constants of the reference's code.
    "qformer_num_attention_heads": 12,
    "num_heads_blocks": 12,
}


def configure(arguments: Mapping[str, Any]) -> SeedConfig:
    """SEED's own arguments → our config. The reference is causal with exactly 32 queries, and with no other
    number of them."""
    return SeedConfig(
        vit=EvaConfig(
            image_size=arguments["img_size"],
            patch=arguments["patch_size"],
            width=arguments["vit_embed_dim"],
            layers=arguments["vit_depth"],
            heads=arguments["vit_num_heads"],
            mlp_ratio=arguments["vit_mlp_ratio"],
        ),
        queries=arguments["num_query_token"],
        causal=arguments["num_query_token"] == 32,
        width=arguments["hidden_size"],
        layers=arguments["num_hidden_layers"],
        heads=arguments["qformer_num_attention_heads"],
        hidden=arguments["intermediate_size"],
        decode_layers=arguments["decode_depth"],
        block_heads=arguments["num_heads_blocks"],
        token_size=arguments["codebook_embed_dim"],
        head="qformer" if arguments["use_qformer_image"] else "down",
        features=arguments["image_features_dim"],
        quantizer=vq(arguments["n_embed"]),
    )


def fit_positions(config: SeedConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A checkpoint's tensors with the ViT's positions resized to the config's pictures."""
    assert config.vit is not None  # published ones have no other
    prefix = f"{VIT_FILE}:"
    vit = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    return {**state, **{prefix + key: value for key, value in resized(vit, config.vit).items()}}


def _layout(*qformers: str) -> Layout:
    """Of the two files together; qformers: published names of those that the network has."""
    rest, vit, ours = re.escape(f"{REST_FILE}:"), re.escape(f"{VIT_FILE}:"), "|".join(OURS)
    bert = rf"{rest}(Reverse_)?Qformer\.(bert\.)?"
    words = r"embeddings\.(\w+_embeddings|position_ids)"
    return Layout(
        rules=(
            (r"^visual_encoder\.", f"{VIT_FILE}:"),
            (rf"^(?!{vit})", f"{REST_FILE}:"),
            (r"reverse_qformer\.", "Reverse_Qformer.bert."),
            (r":qformer\.", ":Qformer.bert."),
            (r"bert\.layernorm\.", "bert.embeddings.LayerNorm."),
            (r"attention\.attention\.", "attention.self."),
        ),
        # The reference loads the file without checking names; 146 of the released one's are not known.
        ignored={
            rf"{bert}({words}|pooler|cls)\b.*": "text half of a Q-Former: embeddings and word head",
            rf"{bert}encoder\.layer\.\d+\.(intermediate|output)\..*": "the same: feed-forward layers",
            rf"{rest}(?!({ours})(\.|$)).*": "whole parts of the trainings that SEED's code does not have",
            rf"{vit}(blocks\.39|norm|fc_norm|head)\..*": "the end of the ViT, which SEED cuts off",
        },
        zeros={f"{REST_FILE}:{name}.bert.embeddings.position_ids": (1, 512) for name in qformers},
    )


def _system(name: str, row: Published, **arguments: Any) -> System:
    qformers = ["Qformer", "Reverse_Qformer"] if arguments.get("use_qformer_image") else ["Qformer"]
    return System(
        name=name,
        arguments=ARGUMENTS | arguments,
        configure=configure,
        layouts=(_layout(*qformers),),
        container="",
        files={REST_FILE: "", VIT_FILE: VIT_ADDRESS},
        fit=fit_positions,
        rows=(row,),
    )


ROW = Published(
    name="seed-2",
    repository="AILab-CVC/seed-tokenizer-2",
    file=REST_FILE,
    arguments={},
    parameters=1_149_998_528,
    tokens="32",
    codebook="8192 x 32",
    code_licence="Apache-2.0",
    weight_licence="Apache-2.0",
    source="arXiv 2310.01218, github.com/AILab-CVC/SEED",
    size=224,
)
SEED = _system("seed", ROW)
SEED_REVERSE = _system(
    "seed_reverse",
    replace(
        ROW, name="seed-2-reverse", repository="not published", weight_licence="–", parameters=1_248_743_104
    ),
    use_qformer_image=True,
)
SYSTEMS = (SEED, SEED_REVERSE)
