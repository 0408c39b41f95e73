"""The networks of a bundle in the form they decode in, and a queue per strategy."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch

from lexel.models.causal_lm import CausalLM
from lexel.sample.acceptance import Acceptance, exact
from lexel.sample.bundle import DecodingConfig
from lexel.sample.drafters import Drafter
from lexel.sample.generator import Generator, Request
from lexel.sample.strategies import PLAIN, make_drafter, strategies
from lexel.sample.tuning import Chosen, circumstances, race, recall, remember
from lexel.sample.zipar import ZIPAR, ZipAR

AUTO = "auto"


class Engine:
    """A language model and its trained drafters, ready to decode.

    dtype: None runs the networks as they are; "float32", "bfloat16" and "int8" pack their weights for small
    batches first (`lexel.models.packed`), which is a snapshot: train, and open a new engine.
    """

    def __init__(
        self,
        lm: CausalLM,
        drafters: Mapping[str, Any],
        decoding: DecodingConfig,
        dtype: str | None = None,
    ) -> None:
        self.source, self.decoding, self.dtype = lm, decoding, dtype
        self.lm = _packed(lm, dtype)
        self.drafters = {name: _packed(model, dtype) for name, model in drafters.items()}
        self.known = strategies(self.lm, self.drafters)
        self._queues: dict[object, Generator] = {}
        self._chosen: dict[str, Chosen] = {}
        self._lock = threading.Lock()

    @property
    def names(self) -> tuple[str, ...]:
        """Every strategy."""
        return (PLAIN, *self.known)

    def queue(
        self,
        decoding: str,
        requests: Sequence[Request],
        rows: int,
        acceptance: Acceptance = exact,
        key: object = None,
    ) -> Generator:
        """The queue of a strategy, kept from call to call, so that calls of several threads share their
        batches. key: what tells `acceptance` from others. Raises LexelError for an unknown strategy."""
        with self._lock:  # so that two threads make one queue, and races are not run at once
            if decoding == AUTO:
                decoding, window = self._auto(requests[:rows])
            else:
                window = None
            name = decoding, window, key
            if name not in self._queues:
                if decoding == ZIPAR:
                    self._queues[name] = ZipAR(self.lm, window)
                else:
                    drafter = self.drafter(decoding, window)
                    self._queues[name] = Generator(self.lm, drafter=drafter, acceptance=acceptance)
            queue = self._queues[name]
            queue.most = rows
            return queue

    def drafter(self, name: str, window: int | None = None) -> Drafter | None:
        """A new drafter of a strategy; None for plain decoding."""
        return make_drafter(self.known, self.lm, name, window)

    def _auto(self, requests: Sequence[Request]) -> tuple[str, int | None]:
        """The bundle's own choice, or the fastest on this machine (see `lexel.sample.tuning`)."""
        if self.decoding.strategy != AUTO:
            return self.decoding.strategy, self.decoding.window
        kinds = [modality for request in requests for modality in request.policy.grammar.plan]
        key = circumstances(self.lm, self._fingerprint, self.dtype or "as loaded", kinds, len(requests))
        key += f"; {len(self.known)} strategies"  # a new drafter is a new race
        if key not in self._chosen:
            chosen = recall(key, self.names)
            if chosen is None:
                chosen = race(self.lm, requests, self.known, self.drafter)
                remember(key, chosen)
            self._chosen[key] = chosen
        return self._chosen[key].strategy, self._chosen[key].window

    @cached_property
    def _fingerprint(self) -> str:
        return self.source.fingerprint()


def _packed(model: Any, dtype: str | None) -> Any:
    if dtype is None or not isinstance(model, torch.nn.Module):
        return model
    from lexel.models.packed import pack

    return pack(model, dtype, compile=True)  # type: ignore[arg-type]
