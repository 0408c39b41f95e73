"""The model as its own judge: does a picture show what its caption says?

A document ``caption, picture, QUESTION, answer`` asks for one of two answers. `own_verdicts` compares their
likelihoods, and `draw_best` draws several pictures and keeps the one that the model itself believes in. A
model learns to answer in rounds of self-assessment (`lexel.train.self_assessment`).

b documents · l positions
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lexel.document import Document, Image, Text
from lexel.sample.pipeline import Pipeline
from lexel.types import Codes

QUESTION = "is the picture right?"
ANSWERS = ("no", "yes")


def verdict_document(caption: str, codes: Codes, answer: str) -> Document:
    """What a verdict looks like: the loss is on the answer, the last segment."""
    return [Text(caption), Image(codes), Text(QUESTION), Text(answer)]


@torch.no_grad()
def own_verdicts(
    pipeline: Pipeline, captions: Sequence[str], pictures: Sequence[Codes], batch_size: int = 64
) -> Tensor:
    """How much the model believes that each picture (a batch of one) shows its caption: float ``[b]``, the
    probability of "yes" where it can only answer yes or no."""
    scores = []
    for answer in ANSWERS:
        documents = [verdict_document(c, p, answer) for c, p in zip(captions, pictures, strict=True)]
        starts = range(0, len(documents), batch_size)
        parts = [_log_likelihoods(pipeline, documents[at : at + batch_size]) for at in starts]
        scores.append(torch.cat(parts))
    return torch.stack(scores, 1).softmax(1)[:, 1]


def _log_likelihoods(pipeline: Pipeline, documents: Sequence[Document]) -> Tensor:
    """Log-probability of the last segment and the end of each document, float ``[b]``."""
    batch = pipeline.codec.collate([pipeline.codec.build(document) for document in documents])
    batch = batch.to(pipeline.device)
    logits = pipeline.lm(batch).logits[:, :-1].float()
    losses = F.cross_entropy(logits.transpose(1, 2), batch.first[:, 1:], reduction="none")
    assert batch.loss_mask is not None
    return -(losses * batch.loss_mask[:, 1:]).sum(1).cpu()


def draw_best(pipeline: Pipeline, text: str, best_of: int, **options: Any) -> Image:
    """The picture of a text that the model itself judges best of `best_of` that it draws; options as for
    calling the pipeline. Whether a model gains from it is measured: `lexel.train.self_assessment.measure`."""
    output = pipeline([Text(text), Image.blank()], count=best_of, **options)
    pictures: list[Any] = [document[-1] for document in output.documents]
    belief = own_verdicts(pipeline, [text] * best_of, [picture.codes.to("cpu") for picture in pictures])
    return pictures[int(belief.argmax())]
