"""LANTERN: every recorded decision, recomputed by the sampler's own rules and filters.

The folder holds no weights but records: acceptance of single drafted tokens (`single`, `greedy`), of trees
of chosen tokens (`tree`), of trees drawn without replacement (`static_tree`) and of chains (`chain`), next to
the codebook and its neighbours. The records give the uniforms; what follows a rejection is compared as the
whole distribution that the next token is drawn from.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lexel.checkpoints import read_safetensors
from lexel.errors import LexelError
from lexel.sample.acceptance import Draft, Lantern, Rule, Target, Trial, Verdict, exact, neighbour_table
from lexel.sample.logits import Distribution, SamplingConfig, target_distribution
from lexel.verify.fixture import Fixture

TENSORS = ("single", "greedy", "tree", "static_tree", "chain")
LISTS = ("tree", "static_tree", "chain")  # a JSON list of cases; the tensors are named by the case's id
# The last part of the names of what is given and not computed.
INPUTS = {
    *("codebook", "logits", "node_logits", "target_logits", "draft_logits", "temperature", "top_k", "top_p"),
    *("token", "tokens", "draft_tokens", "node_tokens", "k", "delta", "u", "parents", "retrieve_indices"),
    *("tree_choices", "level_rows"),
}
PLAIN, GREEDY = SamplingConfig(), SamplingConfig(temperature=0)
Case = Mapping[str, Any]


class Records(Fixture):
    """The folder's tensors and JSON lists under names of one form, ``<file>.<name>`` or
    ``<file>.<id>.<name>``. Raises LexelError when a file is missing."""

    def __init__(self, folder: Path, scratch: Path) -> None:
        self.folder, self.scratch, self.config = folder, scratch, {}
        self.tensors = {name: read_safetensors(self._file(f"{name}.safetensors")) for name in TENSORS}
        self.codebook = read_safetensors(self._file("codebook.safetensors"))
        self.cases: dict[str, list[Case]] = {
            name: json.loads(self._file(f"{name}.json").read_text()) for name in LISTS
        }
        self.recorded = {f"codebook.{name}": value for name, value in self.codebook.items()}
        for file, tensors in self.tensors.items():
            self.recorded |= {f"{file}.{name}": value for name, value in tensors.items()}
        for file, cases in self.cases.items():
            for case in cases:
                values = {name: value for name, value in case.items() if name != "id"}
                self.recorded |= _flat(f"{file}.{case['id']}", values)
        parts = {name: name.split(".") for name in self.recorded}
        self.inputs = {name for name, part in parts.items() if part[-1] in INPUTS or "draft_probs" in part}

    def _file(self, name: str) -> Path:
        if not (self.folder / name).is_file():
            raise LexelError(f"{self.folder} holds no {name}; is it a fixture folder of lantern?")
        return self.folder / name


FIXTURE = Records


def _flat(name: str, value: Any) -> dict[str, Tensor]:
    """A JSON value as tensors: dictionaries by key, ragged lists without their inner brackets."""
    if isinstance(value, Mapping):
        return {k: v for key, one in value.items() for k, v in _flat(f"{name}.{key}", one).items()}
    return {name: torch.tensor(_numbers(value) if isinstance(value, list) else value)}


def _numbers(value: Any) -> list[float]:
    return [number for one in value for number in _numbers(one)] if isinstance(value, list) else [value]


def lantern(records: Records) -> dict[str, Tensor]:
    """Every recorded result by name, see `Records`."""
    near = records.codebook["neighbours"]
    ours = {"codebook.neighbours": neighbour_table(records.codebook["codebook"])}
    for file, rule in (("single", _single), ("greedy", _greedy)):
        tensors = records.tensors[file]
        rows = [rule(dict(zip(tensors, values)), near) for values in zip(*tensors.values())]
        for name in rows[0]:
            ours[f"{file}.{name}"] = torch.stack([torch.as_tensor(row[name]) for row in rows])
    for file, judge in (("tree", _tree), ("static_tree", _static_tree), ("chain", _chain)):
        for case in records.cases[file]:
            start = f"{case['id']}."
            tensors = {
                name.removeprefix(start): value
                for name, value in records.tensors[file].items()
                if name.startswith(start)
            }
            for name, value in judge(case, tensors, near).items():
                ours[f"{file}.{start}{name}"] = torch.as_tensor(value)
    return ours


def _distribution(logits: Tensor, case: Case) -> Distribution:
    """The publisher's order of filters; 0 is off."""
    top_p = float(case["top_p"]) or 1.0
    config = SamplingConfig(float(case["temperature"]), int(case["top_k"]), top_p, top_p_first=True)
    return target_distribution(logits, None, config)


def _dense(probs: Tensor) -> Distribution:
    """Recorded distributions ``[n, v]``."""
    return Distribution(torch.arange(probs.shape[1]).expand(len(probs), -1), probs, probs.shape[1])


def _rule(near: Tensor, case: Case, *, greedy: bool = False) -> Lantern:
    return Lantern(near, int(case["k"]), float(case["delta"]), "released", greedy=greedy)


def _judge(
    rule: Rule,
    first: Distribution,
    tokens: Sequence[int],
    parents: Iterable[int],
    uniforms: Sequence[float] = (),
    probs: Distribution | None = None,
) -> Verdict:
    """One row's verdict, its tests using up `uniforms`."""
    draft = Draft(
        ids=torch.tensor(tokens)[None, :, None],
        parents=torch.tensor(list(parents))[None],
        lengths=torch.tensor([len(tokens)]),
        probs=None if probs is None else (probs,),
    )

    def source(count: int) -> Tensor:
        # The first is for drawing the next token, which is not recorded.
        return torch.tensor([[0.0, *uniforms, *[0.0] * count][:count]], dtype=torch.float64)

    return rule(Target(first), draft, source)


def _single(case: Case, near: Tensor) -> dict[str, Any]:
    """One token chosen without chance. After an accepted one nothing follows."""
    p = _distribution(case["logits"][None], case)
    rule, token = _rule(near, case), int(case["token"])
    trial = Trial(p, None, torch.tensor([token]), None, 0)
    nothing = Distribution(p.ids, torch.zeros_like(p.probs), p.size)
    verdict = _judge(rule, Distribution.cat([p, nothing]), [token], [-1], [float(case["u"])])
    rest = verdict.rest.dense()[0]
    return {
        "p": p.dense()[0],
        "prefix_len": rule.absorbed(trial)[2][0],
        "aggregated": rule.odds(trial)[0][0],
        "accept": len(verdict.path[0]),
        "next_dist": rest,
        "fallback": int(bool((rest > 0).all() and (rest == rest[0]).all())),
    }


def _greedy(case: Case, near: Tensor) -> dict[str, Any]:
    """One token at temperature 0. The logits after it are recorded only where it was accepted."""
    p = target_distribution(torch.stack([case["logits"], case["next_logits"]]), None, PLAIN)
    rule, token = _rule(near, case, greedy=True), int(case["token"])
    trial = Trial(p[:1], None, torch.tensor([token]), None, 0)
    verdict = _judge(rule, p, [token], [-1])
    accepted = len(verdict.path[0])
    return {
        "prefix_len": rule.absorbed(trial)[2][0],
        "aggregated": rule.odds(trial)[0][0],
        "accept": accepted,
        "next_logits": case["next_logits"] if accepted else case["logits"],
    }


def _path(verdict: Verdict, case: Case) -> dict[str, Any]:
    """A verdict on a tree as it is recorded, where node 0 is the last known token."""
    path = [0, *(node + 1 for node in verdict.path[0])]
    lines = [line[: len(path)] for line in case["retrieve_indices"]]
    return {"path": path, "accept_length": len(path) - 1, "best_candidate": lines.index(path)}


def _tree(case: Case, tensors: Mapping[str, Tensor], near: Tensor) -> dict[str, Any]:
    """Chosen tokens, relaxed and not, at the case's temperature and greedily."""
    logits, found = tensors["node_logits"], dict[str, Any]()
    tokens, parents = case["tokens"][1:], [parent - 1 for parent in case["parents"][1:]]
    p = _distribution(logits, case)
    for mode, rule in (("lantern", _rule(near, case)), ("lossless", exact)):
        verdict = _judge(rule, p, tokens, parents, case["u"])
        results = _path(verdict, case) | {
            "uniforms_used": verdict.tested[0],
            "next_dist": verdict.rest.dense()[0],
        }
        found |= {f"{mode}.{name}": value for name, value in results.items()}
    plain, greedy = target_distribution(logits, None, PLAIN), target_distribution(logits, None, GREEDY)
    for mode, rule, first in (
        ("lantern_greedy", _rule(near, case, greedy=True), plain),
        ("lossless_greedy", exact, greedy),
    ):
        verdict = _judge(rule, first, tokens, parents)
        results = _path(verdict, case)
        results["next_logits"] = logits[results["path"][-1]]
        found |= {f"{mode}.{name}": value for name, value in results.items()}
    return found


def _static_tree(case: Case, tensors: Mapping[str, Tensor], near: Tensor) -> dict[str, Any]:
    """Siblings drawn without replacement. The distributions lie by level, one per expanded node."""
    choices = [tuple(choice) for choice in case["tree_choices"]]
    number = {(): -1, **{choice: node for node, choice in enumerate(choices)}}
    rows = [[tuple(choice) for choice in level] for level in case["level_rows"]]
    drawn_from = [
        tensors[f"draft_probs.{len(choice) - 1}"][rows[len(choice) - 1].index(choice[:-1])]
        for choice in choices
    ]
    q, tokens = _dense(torch.stack(drawn_from)), case["node_tokens"][1:]
    parents = [number[choice[:-1]] for choice in choices]
    p, found = _distribution(tensors["node_logits"], case), dict[str, Any]()
    for mode, rule in (("lantern", _rule(near, case)), ("lossless", exact)):
        verdict = _judge(rule, p, tokens, parents, case["u"], q)
        results = _path(verdict, case) | {
            "uniforms_used": verdict.tested[0],
            "next_dist": verdict.rest.dense()[0],
        }
        found |= {f"{mode}.{name}": value for name, value in results.items()}
    # Each token's probability among what its earlier siblings left; 1 for node 0 and padding.
    chances = [1.0]
    for node, parent in enumerate(parents):
        earlier = [tokens[other] for other in range(node) if parents[other] == parent]
        one = q[node : node + 1].without(torch.tensor([earlier or [-1]]))
        chances.append(
            float(exact.odds(Trial(p[:1], one, torch.tensor(tokens[node : node + 1]), None, 0))[1])
        )
    lines = torch.tensor(case["retrieve_indices"])
    found["candidate_probs"] = torch.tensor([*chances, 1.0])[lines]
    return found


def _chain(case: Case, tensors: Mapping[str, Tensor], near: Tensor) -> dict[str, Any]:
    """Lossless; `near` is not used."""
    p, q = (_distribution(tensors[name], case) for name in ("target_logits", "draft_logits"))
    tokens = case["draft_tokens"]
    verdict = _judge(exact, p, tokens, range(-1, len(tokens) - 1), case["u"], q)
    return {
        "p": p.dense(),
        "q": q.dense(),
        "n_accepted": len(verdict.path[0]),
        "next_dist": verdict.rest.dense()[0],
    }
