"""Lossy acceptance for a whole model: which rule, and its tables made of the model's own parts.

`AcceptanceConfig` is what a user chooses; `make_acceptance` builds the rule of `lexel.sample.acceptance` for
a tokenizer and a language model. Only codes of pictures are relaxed, never text. Lossy rules gain speed only
together with a drafter, and what they cost must be measured: their bounds are per decision.

K codes of one codebook · k codebooks · d width of the codes' vectors
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lexel.errors import LexelError
from lexel.models.causal_lm import CausalLM
from lexel.sample.acceptance import Acceptance, Grouped, Lantern, exact, neighbour_table
from lexel.sample.policy import Policy
from lexel.tokenizers.base import Tokenizer
from lexel.tokenizers.layout import CodeLayout
from lexel.types import Codes
from lexel.vocabulary import Vocabulary

RULES = ("exact", "lantern", "grouped")


@dataclass(frozen=True)
class AcceptanceConfig:
    """Which drafted tokens stand.

    rule: "exact" (lossless), "lantern" (a code may stand for its neighbours in the codebook) or "grouped"
    (for codes of similar probability and embedding, GSD); the rules' own documentation is in
    `lexel.sample.acceptance`. neighbours (at most, per code), bound (δ up to 1, λ above), residual and
    normalise (measure distance between rows of length 1) belong to "lantern"; size, gap and distance to
    "grouped". A bound δ (published: 0.1, with 1000 neighbours) suits drafts chosen without chance. Where
    drafts are drawn from a flat q, as in a Jacobi window, any code passes that q gives less than δ.
    Raises ValueError for a rule or value that there is not.
    """

    rule: str = "exact"
    neighbours: int = 1000
    bound: float = 3.0
    residual: Literal["released", "bounded", "none"] = "bounded"
    normalise: bool = False
    size: int = 14
    gap: float = 0.15
    distance: float = 0.5

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise ValueError(f"acceptance is one of {', '.join(RULES)}, got {self.rule!r}.")
        if self.neighbours < 1:
            raise ValueError(f"acceptance needs at least 1 neighbour, got {self.neighbours}.")
        if not 0 <= self.bound < float("inf"):
            raise ValueError(f"the bound must be δ in [0, 1] or λ above 1, got {self.bound}.")
        if self.residual not in ("released", "bounded", "none"):
            raise ValueError(f"residual must be released, bounded or none, got {self.residual!r}.")
        if self.size < 1:
            raise ValueError(f"a group needs at least 1 id, got {self.size}.")

    @classmethod
    def of(cls, choice: AcceptanceConfig | str) -> AcceptanceConfig:
        """A rule's name stands for the rule with its usual values."""
        return cls(choice) if isinstance(choice, str) else choice


def make_acceptance(
    config: AcceptanceConfig,
    tokenizer: Tokenizer,
    lm: CausalLM,
    vocabulary: Vocabulary,
    *,
    greedy: bool = False,
) -> Acceptance:
    """The rule for pictures of `tokenizer` written in `vocabulary`. greedy: LANTERN's rule for temperature 0
    (`Generator` then gives it the guided softmax). Raises LexelError where that rule cannot be applied."""
    if config.rule == "exact":
        return exact
    if config.rule == "grouped":
        embedding = lm.model.embed_tokens.weight
        return Grouped(embedding, size=config.size, gap=config.gap, distance=config.distance)
    layout = tokenizer.layout
    if greedy and layout.columns > 1:
        raise LexelError(
            f"LANTERN at temperature 0 is for one code per position, this model has {layout.columns}; "
            "set a temperature above 0."
        )
    # Equal widths, so that codebooks can share a table.
    count = min(config.neighbours + 1, min(layout.codebook_sizes) - 1)
    tables = [
        neighbour_table(code_vectors(tokenizer, book), normalise=config.normalise, count=count)
        for book in range(layout.k)
    ]
    ids = [vocabulary.block("image", book) for book in range(layout.k)]
    if layout.columns == 1:
        tables, ids = [_joined(tables)], [torch.cat(ids)]
    return Lantern(tables, config.neighbours, config.bound, config.residual, ids=ids, greedy=greedy)


def greedy_rule(config: AcceptanceConfig, policies: Iterable[Policy]) -> bool:
    """Whether LANTERN's rule for temperature 0 is the one for `policies`: their pictures are greedy. Raises
    ValueError where something else that they generate is not, since that rule is for everything."""
    zero = dict[str, set[bool]]()
    for policy in policies:
        names = policy.grammar.codec.vocabulary.modalities
        for name in policy.grammar.plan:
            zero.setdefault(name, set()).add(policy.configs[names.index(name)].temperature == 0)
    if config.rule != "lantern" or zero.get("image") != {True}:
        return False
    if any(False in values for values in zero.values()):
        raise ValueError("LANTERN with pictures at temperature 0 needs temperature 0 for the texts as well.")
    return True


@torch.no_grad()
def code_vectors(tokenizer: Tokenizer, codebook: int = 0) -> Tensor:
    """The vectors ``[K, d]`` of a codebook's codes as the decoder receives them, the other codebooks held at
    their code 0."""
    layout = tokenizer.layout
    size = layout.codebook_sizes[codebook]
    pictures = -(-size // layout.positions)
    device = next(tokenizer.parameters()).device
    indices = torch.zeros(pictures * layout.positions, layout.k, dtype=torch.long, device=device)
    indices[:size, codebook] = torch.arange(size, device=device)
    shaped = indices.reshape(pictures, layout.positions, layout.k)
    return tokenizer.embed(_codes(layout, shaped)).flatten(0, 1)[:size]


def _codes(layout: CodeLayout, indices: Tensor) -> Codes:
    return Codes(indices, layout.grid, layout.scales)


def _joined(tables: list[Tensor]) -> Tensor:
    """One table of codebooks that take turns in one column: neighbours stay within their codebook."""
    starts = [0]
    for table in tables[:-1]:
        starts.append(starts[-1] + len(table))
    return torch.cat([table + start for table, start in zip(tables, starts)])
