"""Codes of any tokenizer through any detokenizer: the tokenizer computes what the detokenizer reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lexel.models.detokenizers.base import Condition, Detokenizer
from lexel.tokenizers.base import Tokenizer
from lexel.types import Codes


@torch.no_grad()
def condition_of(tokenizer: Tokenizer, detokenizer: Detokenizer, codes: Codes) -> Condition:
    """What `detokenizer` reads of these codes: themselves, or the features ``[b, m, f]`` that their tokenizer
    computes of them. Raises LexelError when it has none."""
    return codes if detokenizer.reads == "codes" else tokenizer.decode_features(codes)


@torch.no_grad()
def detokenize(
    tokenizer: Tokenizer,
    detokenizer: Detokenizer,
    codes: Codes,
    *,
    text: Sequence[str | None] | None = None,
    **options: Any,
) -> Tensor:
    """Pictures ``[b, 3, H, W]`` in [-1, 1] of codes. text: what each picture shows, where it is known; given
    to detokenizers that read text, left out for others. options: of `Detokenizer.decode`."""
    if text is not None and detokenizer.reads_text:
        options["text"] = text
    return detokenizer.decode(condition_of(tokenizer, detokenizer, codes), **options)
