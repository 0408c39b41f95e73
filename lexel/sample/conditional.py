"""Pictures from a `RasterLM`: a class label, a caption's features or given codes as the prompt, and exactly
one picture's codes behind it, through the sampler that everything else goes through (`generator.py`).

n code positions · k codes per position · l positions of a condition · f width of caption features
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lexel.document import DocumentCodec, Grammar, TokenSequence
from lexel.errors import LexelError
from lexel.models.raster_lm import SPECIAL, CaptionProjection, RasterLM, RasterLMConfig
from lexel.sample.acceptance import Acceptance, exact
from lexel.sample.decode import run, seeds
from lexel.sample.drafters.base import Drafter
from lexel.sample.generator import Generator, Request
from lexel.sample.logits import SamplingConfig
from lexel.sample.policy import Policy
from lexel.tokenizers.layout import CodeLayout
from lexel.types import Codes, TokenBatch
from lexel.vocabulary import CodeBlock, Vocabulary

MODALITY = "image"

# A class label, a caption's features float [l, f], or codes long [l]; of RasterLMConfig.condition.
Condition = int | Tensor


class NoText:
    """The text tokenizer of a model without text."""

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Raises LexelError."""
        raise LexelError("a class- or caption-conditional model reads no text ids.")

    def decode(self, token_ids: list[int]) -> str:
        """Raises LexelError."""
        raise LexelError("a class- or caption-conditional model writes no text.")


def raster_codec(config: RasterLMConfig) -> DocumentCodec:
    """The ids of a `RasterLM` as a vocabulary with one modality and no text."""
    blocks = [
        CodeBlock(MODALITY, column, size, offset)
        for column, (size, offset) in enumerate(zip(config.codebook_sizes, config.code_offsets))
    ]
    special = {role: config.pad_id + number for number, role in enumerate(SPECIAL)}
    return DocumentCodec(Vocabulary(0, special, tuple(blocks)), NoText(), {MODALITY: raster_layout(config)})


def raster_layout(config: RasterLMConfig) -> CodeLayout:
    """How a picture's codes lie: row by row, or in a line where they are no grid."""
    if config.length is None:
        return CodeLayout(config.codebook_sizes, grid=(config.side, config.side))
    return CodeLayout(config.codebook_sizes, length=config.length)


def conditional_prompts(
    lm: RasterLM, conditions: Sequence[Condition]
) -> tuple[list[TokenSequence], list[TokenSequence] | None]:
    """The prompts of `conditions` and guidance's unconditional twins (None for a condition in codes, which
    has no null form). Features that a caption does not use are left out: attention cannot see them, so
    nothing changes. Raises LexelError for a condition that the model does not take."""
    config = lm.config
    if config.condition == "class":
        labels = [_label(config, condition) for condition in conditions]
        null = config.class_offset + config.num_classes
        ids = [torch.tensor([config.class_offset + label]) for label in labels]
        return [_prompt(config, one) for one in ids], [_prompt(config, torch.tensor([null])) for _ in ids]
    if config.condition == "tokens":
        return [_prompt(config, _codes(config, condition)) for condition in conditions], None
    pairs = [_caption(lm, condition) for condition in conditions]
    return [prompt for prompt, _ in pairs], [null for _, null in pairs]


def _label(config: RasterLMConfig, condition: Condition) -> int:
    if isinstance(condition, Tensor) and condition.numel() != 1:
        raise LexelError(f"this model draws a class label, got a tensor {list(condition.shape)}.")
    label = int(condition)
    if not 0 <= label <= config.num_classes:
        raise LexelError(
            f"class labels run from 0 to {config.num_classes - 1} ({config.num_classes} is the null class), "
            f"got {label}."
        )
    return label


def _codes(config: RasterLMConfig, condition: Condition) -> Tensor:
    """The codes of a condition with the separator behind them."""
    wanted, size = config.condition_length - 1, config.codebook_sizes[0]
    codes = torch.as_tensor(condition).flatten().cpu()
    if len(codes) == wanted + 1 and int(codes[-1]) == config.class_offset:
        codes = codes[:-1]
    if len(codes) != wanted or codes.is_floating_point() or int(codes.min()) < 0 or int(codes.max()) >= size:
        raise LexelError(f"this model goes on from {wanted} codes below {size}, got {list(codes.shape)}.")
    return torch.cat([codes, torch.tensor([config.class_offset])])


def _caption(lm: RasterLM, condition: Condition) -> tuple[TokenSequence, TokenSequence]:
    """A caption's features stand at the last positions of the condition, the unconditional ones in the same
    places: guidance's twin sees as many of them as the caption has words."""
    config, project = lm.config, lm.model.condition
    assert isinstance(project, CaptionProjection)
    features = torch.as_tensor(condition)
    length = len(features) if features.ndim == 2 else 0
    if not 1 <= length <= config.condition_length or features.shape[1] != config.caption_dim:
        raise LexelError(
            f"a caption is features [1 to {config.condition_length}, {config.caption_dim}], "
            f"got {list(features.shape)}."
        )
    first = config.condition_length - length
    uncond = project.uncond[first : config.condition_length]
    with torch.inference_mode():
        given, null = (project(x.to(project.uncond)) for x in (features, uncond))
    ids = torch.full((length,), config.pad_id)
    return _prompt(config, ids, given), _prompt(config, ids, null)


def _prompt(config: RasterLMConfig, first: Tensor, embeds: Tensor | None = None) -> TokenSequence:
    """The ids of column 0, long ``[l]``, at the last positions of the condition; the other columns are pads.
    embeds: ``[l, d]`` in place of all of them."""
    length = len(first)
    ids = torch.full((length, config.columns), config.pad_id)
    ids[:, 0] = first
    positions = torch.zeros(length, 3, dtype=torch.long)
    positions[:, 0] = torch.arange(config.condition_length - length, config.condition_length)
    return TokenSequence(
        ids=first if config.columns == 1 else ids,
        modality=torch.zeros(length, dtype=torch.long),
        positions=positions,
        loss_mask=torch.zeros(length, dtype=torch.bool),
        embeds=embeds,
        embed_index=None if embeds is None else torch.arange(length),
    )


def continued(prompt: TokenSequence, ids: Tensor) -> TokenSequence:
    """A prompt with ids long ``[n, k]`` behind it, on which the loss falls."""
    first = int(prompt.positions[-1, 0]) + 1
    index = torch.arange(first, first + len(ids))
    return TokenSequence(
        ids=torch.cat([prompt.ids, ids[:, 0] if prompt.ids.ndim == 1 else ids]),
        modality=torch.cat([prompt.modality, torch.ones_like(index)]),
        positions=torch.cat([prompt.positions, F.pad(index[:, None], (0, 2))]),
        loss_mask=torch.cat([prompt.loss_mask, torch.ones_like(index, dtype=torch.bool)]),
        embeds=prompt.embeds,
        embed_index=prompt.embed_index,
    )


def conditional_batch(lm: RasterLM, conditions: Sequence[Condition], codes: Codes) -> TokenBatch:
    """Pictures behind their conditions, to train on or to score: ``lm(batch)`` tells every code, given its
    condition and the codes before it, and `lexel.train.objectives.lm.NextTokenObjective` the loss. For later
    guidance some labels must be the null class, `num_classes` (LlamaGen: one in ten). Features of captions
    are projected here, without a gradient.
    Raises LexelError for a condition that the model does not take, ValueError for codes that do not fit."""
    codec = raster_codec(lm.config)
    layout = codec.layouts[MODALITY]
    prompts, _ = conditional_prompts(lm, conditions)
    ids = codec.vocabulary.to_ids(layout.flatten(codes.to("cpu")), layout, MODALITY)
    return codec.collate([continued(prompt, row) for prompt, row in zip(prompts, ids, strict=True)])


def draw(
    lm: RasterLM,
    conditions: Sequence[Condition],
    *,
    sampling: SamplingConfig | None = None,
    seed: int = 0,
    drafter: Drafter | None = None,
    acceptance: Acceptance = exact,
    rows: int = 64,
) -> Codes:
    """The codes of one picture per condition: class labels, caption features float ``[l, f]`` (of the words
    alone, no padding) or codes long ``[l]``, as `RasterLMConfig.condition` says.

    sampling: settings of column 0, and of the others where it has `further`; None: temperature 1 and nothing
    else. drafter, acceptance: a decoding strategy, as for any language model. rows: pictures drawn side by
    side at most. Equal seeds give equal pictures. Raises LexelError for a condition that the model does not
    take, or guidance where it has no null form."""
    sampling = sampling or SamplingConfig()
    codec = raster_codec(lm.config)
    prompts, nulls = conditional_prompts(lm, conditions)
    if not prompts:
        raise LexelError("there is nothing to draw; give at least one condition.")
    policy = Policy(Grammar(codec, (MODALITY,)), {MODALITY: sampling}, device=next(lm.parameters()).device)
    if policy.guided and nulls is None:
        raise LexelError(f"guidance {sampling.guidance}: a model that goes on from codes has no null form.")
    queue = Generator(lm, drafter=drafter, acceptance=acceptance, rows=rows)
    every = seeds(len(prompts), torch.Generator().manual_seed(seed))
    twins: Sequence[TokenSequence | None] = [None] * len(prompts) if nulls is None else nulls
    tickets = [
        queue.submit(Request(prompt, null, policy, one)) for prompt, null, one in zip(prompts, twins, every)
    ]
    ids = torch.stack(run(queue, tickets)[0])
    flat = codec.vocabulary.to_codes(ids if ids.ndim == 3 else ids[..., None], codec.layouts[MODALITY])
    return codec.layouts[MODALITY].unflatten(flat)
