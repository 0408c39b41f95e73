"""How far a model drifts when it reads its own tokens instead of the data's.

In training every token is predicted from true ones; in use from the model's own. What goes wrong early makes
what follows improbable, so that samples are less likely than data to whoever knows the true distribution. A
judge stands for that: another language model over the same vocabulary, best of all the one that wrote the
data, for then the figures are exact.

b documents · l positions · n generated codes
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from lexel.document import Document, DocumentCodec, Grammar, Image
from lexel.models.causal_lm import CausalLM
from lexel.sample.decode import generate
from lexel.sample.logits import SamplingConfig


@dataclass(frozen=True)
class Exposure:
    """Nats per code. own: of the data, by the model itself, from true tokens (its loss); data: of the data,
    by the judge; samples: of the model's own pictures for the same captions, by the judge, at each of the n
    places float ``[n]`` in order."""

    own: float
    data: float
    samples: Tensor

    @property
    def gap(self) -> float:
        """Free-running minus teacher-forced: how much less likely its samples are than the data, to the
        judge. 0 for a model that has learned the distribution; below 0 for one that draws only the
        likeliest."""
        return float(self.samples.mean()) - self.data

    @property
    def drift(self) -> float:
        """How much more the second half of a sample suffers than the first: the gap that accumulates."""
        half = len(self.samples) // 2
        return float(self.samples[half:].mean() - self.samples[:half].mean())


@torch.no_grad()
def exposure(
    lm: CausalLM,
    judge: CausalLM,
    codec: DocumentCodec,
    documents: Sequence[Document],
    *,
    seed: int = 0,
    batch_size: int = 64,
) -> Exposure:
    """Measure on `documents` that end in a picture with codes; the model draws them anew at temperature 1.
    Raises ValueError when one ends otherwise."""
    if not documents or not all(isinstance(document[-1], Image) for document in documents):
        raise ValueError("exposure is measured on documents that end in a picture.")
    own, data, samples = [], [], []
    random = torch.Generator().manual_seed(seed)
    for start in range(0, len(documents), batch_size):
        batch = documents[start : start + batch_size]
        drawn = _redrawn(lm, codec, batch, random)
        own.append(code_losses(lm, codec, batch))
        data.append(code_losses(judge, codec, batch))
        samples.append(code_losses(judge, codec, drawn))
    return Exposure(float(torch.cat(own).mean()), float(torch.cat(data).mean()), torch.cat(samples).mean(0))


def _redrawn(
    lm: CausalLM, codec: DocumentCodec, documents: Sequence[Document], random: torch.Generator
) -> list[Document]:
    """The same documents with pictures of the model's own."""
    modality = documents[0][-1].modality
    blanks = [[*document[:-1], Image.blank(modality)] for document in documents]
    plain = {modality: SamplingConfig()}
    ids, _, _ = generate(
        lm,
        [codec.prompt(blank) for blank in blanks],
        Grammar(codec, (modality,)),
        sampling=plain,
        generator=random,
    )
    opening = torch.tensor(codec.scripts[modality][0])
    drawn: list[Document] = []
    for document, row in zip(documents, ids):
        picture = codec.parse(torch.cat([opening, row]))[0]
        drawn.append([*document[:-1], replace(document[-1], codes=picture.codes, pixels=None)])  # type: ignore[arg-type, union-attr]
    return drawn


@torch.no_grad()
def code_losses(lm: CausalLM, codec: DocumentCodec, documents: Sequence[Document]) -> Tensor:
    """Cross-entropy in nats of each code of the last picture among the codes of its modality, float
    ``[b, n]``, with one code per position."""
    batch = codec.collate([codec.build(document) for document in documents])
    assert batch.loss_mask is not None
    codes = codec.vocabulary.mask(documents[0][-1].modality)
    wanted = (batch.loss_mask & codes[batch.ids])[:, 1:]
    device = next(lm.parameters()).device
    logits = lm(batch.to(device)).logits[:, :-1][wanted.to(device)].float().cpu()
    logits = logits.masked_fill(~codes, -torch.inf)
    losses = F.cross_entropy(logits, batch.ids[:, 1:][wanted], reduction="none")
    return losses.view(len(documents), -1)
