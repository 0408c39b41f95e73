"""What SEED-2's tokenizer is trained on (arXiv 2307.08041, 2310.01218; AILab-CVC/SEED), in two stages.

1. `ContrastiveObjective`: the last query's output and the caption meet in one space. The caption is read by
   the same Q-Former: its self-attention, with embeddings and feed-forward layers of the text's own, which
   belong to this stage alone. (BLIP-2's matching and caption losses are switched off in the release.)
2. `SeedObjective`: the codes learn to give the queries' outputs and a frozen CLIP's image embedding again.

b batch · m batches of all processes together · l caption tokens · n queries · w Q-Former width · f embedding
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.distributed as distributed
import torch.nn.functional as F
from torch import Tensor, nn

from lexel.data.example import Example, stack_captioned
from lexel.errors import LexelError
from lexel.hub import mismatches
from lexel.tokenizers.seed import SeedConfig, SeedOutput, SeedTokenizer
from lexel.train.objectives.base import Metrics, Objective
from lexel.train.objectives.teachers import VisionTeacher
from lexel.train.processes import several
from lexel.types import Codes

PAD, START = 0, 1
BYTES = 256


@dataclass(frozen=True)
class SeedObjectiveConfig:
    """Stage 2. Defaults are the published ones.

    teacher: hub id or local folder of the CLIP (or SigLIP) whose image embedding the codes stand for; size:
    side of the pictures it is shown (None: its own). encoder: weights of the tokenizer's vision model, see
    `SeedTokenizer.load_vision` (None: those it has, from ``stages.tokenizer.init`` or random ones).
    embedding: weight of the squared distance of embeddings. queries: of 1 - cosine between the Q-Former's
    outputs and what the codes tell of them. quantizer: of the codebook's own losses, in which `codebook`
    weighs the term that moves the rows. unrounded_steps: steps at the start during which codes are not
    rounded, for a Q-Former that learns along.
    """

    teacher: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    size: int | None = None
    encoder: str | None = None
    embedding: float = 0.5
    queries: float = 2.0
    quantizer: float = 5.0
    codebook: float = 0.25
    unrounded_steps: int = 0
    adversarial: ClassVar[float] = 0.0  # there is no discriminator

    def build(self) -> SeedObjective:
        """The objective, with its teacher loaded. Raises LexelError when that cannot be had."""
        return SeedObjective(self, VisionTeacher(self.teacher, self.size, "embedding"))


class SeedObjective(Objective):
    """See `SeedObjectiveConfig`. teacher: frozen module, pixels to image embeddings ``[b, f]``; it is part of
    no state dict, no optimizer and no checkpoint."""

    def __init__(self, config: SeedObjectiveConfig, teacher: nn.Module) -> None:
        super().__init__()
        self.config = config
        self._teacher = (teacher.eval().requires_grad_(False),)  # in a tuple it is no submodule

    def prepare(self, network: Any) -> None:
        """Load the vision model's weights. Raises LexelError for another tokenizer and for one whose
        embeddings are not as wide as the teacher's."""
        _load_encoder(network, self.config.encoder)
        width = getattr(self._teacher[0], "width", network.config.features)
        if width != network.config.features:
            raise LexelError(
                f"the teacher's embeddings are {width} wide, the tokenizer's {network.config.features}; set "
                f"tokenizer.features={width}."
            )

    def predict(self, network: Any, batch: Tensor, step: int) -> SeedOutput:
        """The tokenizer's training pass."""
        return network(batch, quantize=step >= self.config.unrounded_steps)

    def generator_loss(
        self, output: SeedOutput, batch: Tensor, step: int, last_layer: Tensor
    ) -> tuple[Tensor, Metrics]:
        """The weighted sum (scalar) and its terms, detached and unweighted."""
        terms = self._distances(output, batch)
        loss = self.config.embedding * terms["embedding"] + self.config.queries * terms["queries"]
        for name, value in output.quantizer.losses.items():
            terms[name] = value
            scale = self.config.codebook if name == "codebook" else 1.0
            loss = loss + self.config.quantizer * scale * value
        metrics = {name: value.detach() for name, value in terms.items()}
        return loss, {**metrics, **output.quantizer.metrics, "loss": loss.detach()}

    def measure(self, output: Any, batch: Tensor) -> Metrics:
        """How near the codes come to the teacher's embedding (squared distance, and `cosine`) and to the
        queries' outputs."""
        cosine = F.cosine_similarity(output.reconstruction[:, 0].float(), self._target(batch), dim=-1).mean()
        return {**self._distances(output, batch), "cosine": cosine}

    def _target(self, pixels: Tensor) -> Tensor:
        with torch.no_grad():
            return self._teacher[0].to(pixels.device)(pixels).float()

    def _distances(self, output: SeedOutput, pixels: Tensor) -> dict[str, Tensor]:
        queries = output.queries.detach().float()
        return {
            "embedding": F.mse_loss(output.reconstruction[:, 0].float(), self._target(pixels)),
            "queries": 1 - F.cosine_similarity(output.rebuilt.float(), queries, dim=-1).mean(),
        }


@dataclass(frozen=True)
class ContrastiveObjectiveConfig:
    """Stage 1. text_tokenizer: hub id or local folder of the caption's tokenizer (None: its UTF-8 bytes).
    blip2: hub id or local folder of a BLIP-2 after its first stage (`Blip2ForImageTextRetrieval`), from which
    Q-Former, queries and text branch start (None: fresh weights). length: captions are cut to so many tokens.
    width: of the common space. smoothing: of the labels. temperature: at the start. encoder: as in
    `SeedObjectiveConfig`."""

    text_tokenizer: str | None = "bert-base-uncased"
    blip2: str | None = "Salesforce/blip2-itm-vit-g"
    length: int = 32
    width: int = 256
    smoothing: float = 0.1
    temperature: float = 0.07
    encoder: str | None = None
    adversarial: ClassVar[float] = 0.0  # there is no discriminator

    def build(self) -> ContrastiveObjective:
        """The objective, with its text tokenizer loaded. Raises LexelError when that cannot be had."""
        words = ByteWords() if self.text_tokenizer is None else PublishedWords(self.text_tokenizer)
        return ContrastiveObjective(self, words)


@dataclass(frozen=True)
class Met:
    """What `ContrastiveObjective` looks at: normalised `pictures` and `captions` ``[b, width]``, and in
    validation the codes."""

    pictures: Tensor
    captions: Tensor
    codes: Codes | None = None


class ContrastiveObjective(Objective):
    """Cross-entropy, in both directions, of finding a picture's own caption among those of all processes.
    Holds the text branch, which learns with the Q-Former and is part of no exported network."""

    def __init__(self, config: ContrastiveObjectiveConfig, words: Words) -> None:
        super().__init__()
        self.config = config
        self.words = words
        self.temperature = nn.Parameter(torch.tensor(config.temperature))
        self.text: Any = None
        self.picture_projection: Any = None

    def prepare(self, network: Any) -> None:
        """Load the vision model's weights and make the text branch. Raises LexelError for another tokenizer
        and for weights that do not fit."""
        _load_encoder(network, self.config.encoder)
        self.text = TextBranch(network.config, self.words.count, self.config.length, self.config.width)
        self.picture_projection = nn.Linear(network.config.width, self.config.width)
        if self.config.blip2 is not None:
            load_blip2(self, network, self.config.blip2)

    def collate(self, examples: Sequence[Example]) -> tuple[Tensor, list[str]]:
        """Pixels and the first caption of each example. Raises ValueError for an example without one."""
        pixels, captions = stack_captioned(examples)
        if None in captions:
            name = examples[captions.index(None)].key
            raise ValueError(f"Example {name!r} has no caption, which contrastive training needs.")
        return pixels, [caption for caption in captions if caption is not None]

    def predict(self, network: Any, batch: tuple[Tensor, list[str]], step: int) -> Met:
        """The two embeddings."""
        pixels, captions = batch
        last = network.read(network.see(pixels))[:, -1]
        ids, visible = self.words(captions, self.config.length)
        told = self.text(network.qformer, ids.to(pixels.device), visible.to(pixels.device))
        return Met(F.normalize(self.picture_projection(last).float(), dim=-1), F.normalize(told, dim=-1))

    def generator_loss(
        self, output: Met, batch: Any, step: int, last_layer: Tensor
    ) -> tuple[Tensor, Metrics]:
        """The mean of both directions (nats) and the share of pictures whose own caption is the nearest."""
        all_pictures, first = _from_all(output.pictures)
        all_captions, _ = _from_all(output.captions)
        target = torch.arange(len(output.pictures), device=output.pictures.device) + first
        forth = output.pictures @ all_captions.T / self.temperature
        back = output.captions @ all_pictures.T / self.temperature
        smoothing = self.config.smoothing
        loss = F.cross_entropy(forth, target, label_smoothing=smoothing)
        loss = (loss + F.cross_entropy(back, target, label_smoothing=smoothing)) / 2
        accuracy = (forth.argmax(1) == target).float().mean()
        metrics = {"loss": loss.detach(), "accuracy": accuracy, "temperature": self.temperature.detach()}
        return loss, metrics

    def observe(self, network: Any, batch: tuple[Tensor, list[str]]) -> Any:
        """The two embeddings, and the codes (of a codebook that this stage does not train)."""
        met = self.predict(network, batch, 0)
        return Met(met.pictures, met.captions, network.encode(batch[0]))

    def measure(self, output: Any, batch: Any) -> Metrics:
        """The loss, and `accuracy` among the batch."""
        loss, metrics = self.generator_loss(output, batch, 0, output.pictures)
        return {"loss": loss, "accuracy": metrics["accuracy"]}


class TextBranch(nn.Module):
    """What reads captions beside the Q-Former's self-attention: embeddings, a feed-forward layer per layer
    (BERT's, after the norm) and the projection of the first token."""

    def __init__(self, config: SeedConfig, words: int, length: int, width: int) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(words, config.width)
        self.position_embeddings = nn.Embedding(length, config.width)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(
            FeedForward(config.width, config.hidden, config.dropout) for _ in range(config.layers)
        )
        self.projection = nn.Linear(config.width, width)
        for table in (self.word_embeddings, self.position_embeddings):
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, qformer: Any, ids: Tensor, visible: Tensor) -> Tensor:
        """Long and bool ``[b, l]`` to ``[b, width]``."""
        positions = self.position_embeddings.weight[: ids.shape[1]]
        x = self.dropout(qformer.layernorm(self.word_embeddings(ids) + positions))
        mask = visible[:, None, None, :].expand(-1, 1, ids.shape[1], -1)
        for layer, feed_forward in zip(qformer.encoder.layer, self.layers, strict=True):
            x = feed_forward(layer.attention(hidden_states=x, attention_mask=mask))
        return self.projection(x[:, 0]).float()


class FeedForward(nn.Module):
    """``norm(x + drop(fc2(gelu(fc1 x))))``."""

    def __init__(self, width: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(width, 1e-12)

    def forward(self, x: Tensor) -> Tensor:
        """``[b, l, w] -> [b, l, w]``."""
        return self.norm(x + self.dropout(self.fc2(F.gelu(self.fc1(x)))))


class Words(ABC):
    """Captions to ids ``[b, l]``, a start token first and PAD behind, and where there are tokens (bool
    ``[b, l]``). count: how many ids there are."""

    count: int

    def __call__(self, captions: Sequence[str], length: int) -> tuple[Tensor, Tensor]:
        """See the class; l is at most `length`."""
        rows = [self.ids(caption)[:length] for caption in captions]
        longest = max(map(len, rows))
        ids = torch.tensor([row + [PAD] * (longest - len(row)) for row in rows])
        kept = torch.tensor([[True] * len(row) + [False] * (longest - len(row)) for row in rows])
        return ids, kept

    @abstractmethod
    def ids(self, caption: str) -> list[int]:
        """Of one caption, with its start token."""


class ByteWords(Words):
    """A caption's UTF-8 bytes."""

    count = 2 + BYTES

    def ids(self, caption: str) -> list[int]:
        """See `Words.ids`."""
        return [START, *(2 + byte for byte in caption.encode())]


class PublishedWords(Words):
    """The tokenizer of a folder or hub id, such as `bert-base-uncased`. Raises LexelError when it cannot be
    had. Where it does not begin with a token of its own, the start is one more id behind all others."""

    def __init__(self, name: str) -> None:
        from transformers import AutoTokenizer

        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        except (OSError, ValueError, KeyError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise LexelError(f"the text tokenizer {name} cannot be loaded: {reason}") from error
        self.start = self.tokenizer.cls_token_id
        self.count = len(self.tokenizer) + 1

    def ids(self, caption: str) -> list[int]:
        """See `Words.ids`."""
        ids: list[int] = self.tokenizer(caption)["input_ids"]
        return ids if self.start is not None else [self.count - 1, *ids]


def load_blip2(objective: ContrastiveObjective, network: SeedTokenizer, name: str) -> None:
    """Start from BLIP-2's first stage: Q-Former, queries, the norm before it, and what reads captions. Raises
    LexelError when the weights cannot be had or are of other sizes."""
    from transformers import Blip2ForImageTextRetrieval

    try:
        found = Blip2ForImageTextRetrieval.from_pretrained(name, trust_remote_code=False).state_dict()
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise LexelError(f"the BLIP-2 {name} cannot be loaded: {reason}") from error
    length = len(objective.text.position_embeddings.weight)
    found["embeddings.position_embeddings.weight"] = found["embeddings.position_embeddings.weight"][:length]
    ours = {f"network.{key}": value for key, value in network.state_dict().items() if key.startswith(BLIP2)}
    ours |= {key: value for key, value in objective.state_dict().items() if key != "temperature"}
    theirs = {key: found[name] for key in ours if (name := _blip2_name(key)) in found}
    if problems := mismatches(*({k: tuple(v.shape) for k, v in state.items()} for state in (ours, theirs))):
        raise LexelError(f"the BLIP-2 {name} does not fit: {problems}.")
    with torch.no_grad():
        for key, value in ours.items():
            value.copy_(theirs[key])


BLIP2 = ("qformer.", "query_tokens", "ln_vision.")
"""Parts of the tokenizer that BLIP-2 has too."""
BLIP2_NAMES = (
    (r"^network\.ln_vision", "vision_model.post_layernorm"),
    (r"^network\.", ""),
    (r"^text\.(word|position)_", r"embeddings.\1_"),
    (r"^text\.layers\.(\d+)\.", r"qformer.encoder.layer.\1."),
    (r"\.fc1\.", ".intermediate.dense."),
    (r"\.fc2\.", ".output.dense."),
    (r"\.norm\.", ".output.LayerNorm."),
    (r"^text\.projection", "text_projection"),
    (r"^picture_projection", "vision_projection"),
)


def _blip2_name(key: str) -> str:
    """What transformers' BLIP-2 calls a tensor of `load_blip2`."""
    for pattern, replacement in BLIP2_NAMES:
        key = re.sub(pattern, replacement, key)
    return key


def _load_encoder(network: Any, encoder: str | None) -> None:
    if not isinstance(network, SeedTokenizer):
        raise LexelError(
            "SEED's objectives (objective/tokenizer=seed, seed_contrastive) train tokenizer=seed."
        )
    if encoder is not None:
        network.load_vision(encoder)


def _from_all(rows: Tensor) -> tuple[Tensor, int]:
    """Rows ``[b, d]`` of every process behind each other, ``[m, d]``, and where this process's begin. The
    gradient reaches its own."""
    if not several():
        return rows, 0
    parts = [torch.empty_like(rows) for _ in range(distributed.get_world_size())]
    distributed.all_gather(parts, rows.detach().contiguous())
    rank = distributed.get_rank()
    parts[rank] = rows
    return torch.cat(parts), rank * len(rows)
