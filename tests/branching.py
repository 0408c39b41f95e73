"""Chance as a tree: the decode loop runs once for every outcome of every random decision, so that the
distribution of what it generates is computed and not estimated.

Uniforms are used in three ways: to invert a cumulative sum (`lexel.sample.logits.draw`), to test a drafted
token (`lexel.sample.acceptance.passes`), and times a whole number to choose among so many ids. `Path` stands
in for a row's source of randomness, and each use becomes a decision among outcomes of known probability. A
run takes the first outcome where its script ends, and notes the other ones for later runs. Many paths run
side by side, as the rows of one batch."""

import sys
from collections import defaultdict

import numpy as np
import pytest
import torch

from lexel.sample import acceptance, logits

ROWS = 512
CODE = 2.0**20  # the path's number, as a uniform
NEVER = 1e-12  # probabilities below this are rounding


class Path:
    """One way through all decisions; used in the place of `Row.random`."""

    def __init__(self, number, script):
        self.number, self.script = number, script
        self.taken, self.weight, self.others = [], 1.0, []

    def choose(self, weights):
        """A column of `weights`; those of weight 0 are never taken."""
        total = sum(weights)
        able = [column for column, weight in enumerate(weights) if weight > NEVER * total]
        if len(able) == 1:
            return able[0]
        place = len(self.taken)
        if place < len(self.script):
            column = self.script[place]
        else:
            column, *others = able
            self.others += [[*self.taken, other] for other in others]
        self.taken.append(column)
        self.weight *= weights[column] / total
        return column

    def random(self, size=None):
        code = (self.number + 0.5) / CODE
        return Share(code, self) if size is None else np.full(size, code)


class Share(float):
    """A single uniform: times n it becomes a choice among n."""

    def __new__(cls, code, path):
        share = super().__new__(cls, code)
        share.path = path
        return share

    def __mul__(self, count):
        return self.path.choose([1.0] * count) + 0.5


class Paths(acceptance.Rule):
    """The paths of one batch, in the place of the two functions that use uniforms; and exact acceptance,
    whose tests of padding behind a row's tree decide nothing."""

    def __init__(self):
        self.now, self.used = [], None

    def __call__(self, target, draft, uniforms, relaxed=None):
        nodes = torch.arange(draft.ids.shape[1])
        self.used = (nodes < draft.lengths[:, None]).flatten().tolist()
        try:
            return super().__call__(target, draft, uniforms, relaxed)
        finally:
            self.used = None

    def of(self, uniform):
        return self.now[int(uniform * CODE)]

    def draw(self, weights, uniforms):
        lines = zip(weights.tolist(), uniforms.tolist())
        columns = [self.of(u).choose(line) if sum(line) > 0 else len(line) for line, u in lines]
        return torch.tensor(columns, dtype=torch.long)

    def passes(self, uniform, over, under):
        if isinstance(uniform, torch.Tensor):
            used = self.used or [True] * len(uniform)
            lines = zip(used, uniform.tolist(), over.tolist(), under.tolist())
            return torch.tensor([use and self.passes(*line) for use, *line in lines], dtype=torch.bool)
        if over >= under or over <= 0:
            return over > 0
        return bool(self.of(uniform).choose([1 - over / under, over / under]))


def explore(run, most=50_000):
    """The probability of every result of ``run(paths, acceptance)``, which generates one for each path."""
    paths, found, scripts = Paths(), defaultdict(float), [[]]
    originals = {"draw": logits.draw, "passes": acceptance.passes}
    modules = [module for name, module in sys.modules.items() if name.startswith("lexel.sample")]
    with pytest.MonkeyPatch.context() as patch:
        for name, original in originals.items():
            for module in modules:
                if getattr(module, name, None) is original:
                    patch.setattr(module, name, getattr(paths, name))
        while scripts:
            now, scripts = scripts[-ROWS:], scripts[:-ROWS]
            paths.now = [Path(number, script) for number, script in enumerate(now)]
            for path, result in zip(paths.now, run(paths.now, paths)):
                found[result] += path.weight
                scripts += path.others
            most -= len(now)
            assert most > 0, "too many ways through; take a smaller case"
    return dict(found)
