"""Prompt lookup: drafting a text by copying what followed its last few tokens before.

Saxena, "Prompt Lookup Decoding" (2023, github.com/apoorvumang/prompt-lookup-decoding); transformers has it as
`PromptLookupCandidateGenerator`. That one takes the first occurrence, this one the latest, which in a text
that goes on repeating itself is the one most alike.
"""

from __future__ import annotations

from collections.abc import Sequence


def continuation(ids: Sequence[int], most: int, longest: int = 4) -> list[int]:
    """At most `most` tokens that followed the latest earlier occurrence of the longest ending of `ids` (up to
    `longest` tokens) that occurs earlier; it may overlap the ending. Empty when the last token is new, or
    `most` is 0. Raises ValueError when `longest` is below 1."""
    if longest < 1:
        raise ValueError(f"an ending to look up has at least 1 token, got longest={longest}.")
    if most < 1 or len(ids) < 2:
        return []
    past = list(ids)[::-1]  # latest first, so that `index`, which is quick, finds the latest occurrence
    best, length = 0, 0
    place = 0
    while length < longest:
        try:
            place = past.index(past[0], place + 1)
        except ValueError:
            break
        if past[place : place + length + 1] == past[: length + 1]:  # longer than the best so far
            best = place
            while length < longest and place + length < len(past) and past[place + length] == past[length]:
                length += 1
    return past[max(0, best - most) : best][::-1]
