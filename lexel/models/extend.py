"""More ids for a trained language model: rows of its tables that are added for codes and special tokens.

v rows · d width · m added rows
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from lexel.errors import LexelError
from lexel.models.causal_lm import CausalLM
from lexel.nn.decoder import INIT_STD

if TYPE_CHECKING:
    from lexel.models.wrapped_lm import WrappedLM

Init = Literal["mean", "mean_covariance", "random"]
INITS = ("mean", "mean_covariance", "random")

SPREAD = 1e-9
"""Factor of the old rows' covariance from which "mean_covariance" draws (`mean_resizing` of transformers)."""

CHUNK = 16384
"""Rows of a table that are held in float64 at once while its statistics are taken."""


@torch.no_grad()
def extend_vocabulary(
    lm: CausalLM | WrappedLM,
    size: int,
    text_size: int,
    init: Init = "mean",
    generator: torch.Generator | None = None,
) -> None:
    """Give `lm` tables of exactly `size` rows, in place: rows 0 .. text_size - 1 stay as they are, the rows
    behind them start anew, in the embedding and, where it is not tied to it, in the output table.

    Tables are often longer than their text tokenizer (a multiple of 64, say): such rows mean nothing and are
    taken for the added ids, or dropped. init: how the added rows of a table start from its rows
    0 .. text_size - 1.

    - "mean": all at their mean, so that added ids are as likely as an average one (Hewitt 2021).
    - "mean_covariance": drawn from N(mean, 1e-9 · covariance), what transformers' ``mean_resizing`` does and
      Liquid was trained from; the mean itself where the covariance is not positive definite.
    - "random": drawn from N(0, 0.02²), as in a model that has not been trained.

    generator: of the draws, on the CPU. Raises LexelError when the tables hold fewer than `text_size` ids,
    `size` is smaller than `text_size`, or for another `init`.
    """
    tables = _tables(lm)
    if init not in INITS:
        raise LexelError(f"added rows start as {', '.join(INITS)}, got {init!r}.")
    if not 1 <= text_size <= len(tables[0]):
        raise LexelError(
            f"the text tokenizer has {text_size} ids, but the backbone's table holds {len(tables[0])}: they "
            "do not belong together; take the text tokenizer of the backbone."
        )
    if size < text_size:
        raise LexelError(f"a vocabulary of {size} ids cannot hold the {text_size} ids of the text tokenizer.")
    added = [_rows(table[:text_size], size - text_size, init, generator) for table in tables]
    lm.resize_token_embeddings(size)
    for table, rows in zip(_tables(lm), added, strict=True):
        table[text_size:] = rows.to(table)


def _tables(lm: CausalLM | WrappedLM) -> list[Tensor]:
    """The embedding and, where it is another, the output table: ``[v, d]`` each."""
    if isinstance(lm, CausalLM):
        return [lm.model.embed_tokens.weight] + ([] if lm.lm_head is None else [lm.lm_head.weight])
    tables = [lm.network.get_input_embeddings().weight, lm.network.get_output_embeddings().weight]
    return tables[:1] if tables[0] is tables[1] else tables


def _rows(old: Tensor, count: int, init: Init, generator: torch.Generator | None) -> Tensor:
    """``[m, d]`` on the CPU."""
    shape = count, old.shape[1]
    if init == "random":
        return INIT_STD * torch.randn(shape, generator=generator)
    mean = torch.stack([chunk.double().sum(0) for chunk in old.split(CHUNK)]).sum(0) / len(old)
    rows = mean.cpu().expand(shape)
    if init == "mean":
        return rows
    covariance = torch.zeros(len(mean), len(mean), dtype=torch.float64, device=old.device)
    for chunk in old.split(CHUNK):
        centred = chunk.double() - mean
        covariance += centred.T @ centred / len(old)
    root, failed = torch.linalg.cholesky_ex(covariance)
    if failed:
        return rows
    drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
    return rows + SPREAD**0.5 * drawn @ root.cpu().T
