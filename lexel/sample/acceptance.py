"""What of a draft is accepted. Speculation has two halves: a drafter proposes, an acceptance decides.

* `exact` is lossless speculative sampling (Leviathan et al., arXiv 2211.17192; Chen et al., arXiv 2302.01318)
  for chains, trees with chosen siblings (EAGLE-2, arXiv 2406.16858) and trees with siblings drawn without
  replacement: what comes out is distributed exactly as the target's own tokens, whatever is proposed.
* `Lantern` relaxes it between neighbouring codes (arXiv 2410.03355, LANTERN++ 2502.06352), `Grouped` between
  tokens of similar probability and embedding (GSD). Both are lossy.

They differ in two formulas, the odds of a drafted token and the residual after its rejection; the rest is
shared. At the end of the file: couplings, which redraw a Jacobi window.

b rows · g drafted positions (padded) · k columns (codes per position) · n distributions · v vocabulary
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from lexel.sample.logits import Distribution, draw

# How many → float64 [b, how many] in [0, 1), every row from its own source.
Uniforms = Callable[[int], Tensor]


@dataclass(frozen=True)
class Draft:
    """Drafted tokens of each row: a forest below the row's last known token.

    ids: long ``[b, g, k]``. parents: long ``[b, g]``, the index of the parent node, -1 below the last known
    token; parents precede children, siblings lie in the order in which they are tried. lengths: long ``[b]``,
    nodes in use (both may stay on the host, which saves waiting for a device). probs: per column ``b · g``
    distributions, row by row: what each token was drawn from, before its earlier siblings were excluded; None
    when all were chosen without chance (q = 1). A column that a token does not have is
    `Distribution.certain` of some padding id in draft and target.
    """

    ids: Tensor
    parents: Tensor
    lengths: Tensor
    probs: tuple[Distribution, ...] | None = None

    @cached_property
    def chain(self) -> bool:
        """Whether every row is a chain; looked at on the host, once."""
        places = torch.arange(self.ids.shape[1], device=self.parents.device)
        unused = places >= self.lengths.to(places.device)[:, None]
        return bool(((self.parents == places - 1) | unused).all())


@dataclass(frozen=True)
class Target:
    """The target's distributions around a draft.

    first: ``b · (g + 1)`` rows: entry 0 after the last known token, entry j + 1 after node j; an empty row
    where nothing may follow. further: of columns 1..k-1, ``b · g`` rows each: of node j's own column, given
    its drafted columns before."""

    first: Distribution
    further: tuple[Distribution, ...] = ()


@dataclass(frozen=True)
class Verdict:
    """path: the accepted nodes of each row, root to leaf. extra: the id that the target puts after them, v
    where there is none. column: the column of `extra`, 0 normally; c > 0 when the first c codes of the next
    drafted position stand and its column c was redrawn. node: with column > 0 that position (else -1).
    kept: for chains, bool ``[b, g]``, the test of each position on its own (for Jacobi decoding). rest: the
    b distributions that `extra` was drawn from. tested: how many drafted codes of each row were tested.
    """

    path: list[list[int]]
    extra: list[int]
    column: list[int]
    node: list[int]
    kept: Tensor | None
    rest: Distribution
    tested: list[int]


class Acceptance(Protocol):
    """Decides which drafted tokens stand. greedy: it is to be given the softmax of the guided logits, without
    temperature and filters, and takes the most probable id where nothing else is said."""

    greedy: bool

    def __call__(
        self, target: Target, draft: Draft, uniforms: Uniforms, relaxed: Tensor | None = None
    ) -> Verdict:
        """uniforms is called once, for 1 + g · k numbers: the first draws `extra`, the others are used up by
        the tests in turn. relaxed: bool ``[b, g]``, nodes that a lossy rule may relax (picture tokens); None:
        all of them. Raises ValueError for a tree with several codes per position."""
        ...


class Trial(NamedTuple):
    """n drafted codes put to the test: their distributions in the target and in the draft (None: chosen
    without chance), the ids long ``[n]``, which of them may be relaxed (None: all) and their column."""

    p: Distribution
    q: Distribution | None
    tokens: Tensor
    relaxed: Tensor | None
    column: int


def passes(uniform: Any, over: Any, under: Any) -> Any:
    """Whether a test with probability over / under succeeds: of tensors of equal shape, or of numbers."""
    return uniform * under < over


class Rule:
    """`exact`, and the frame of the lossy rules, which replace its two formulas."""

    greedy: bool = False

    def odds(self, trial: Trial) -> tuple[Tensor, Tensor]:
        """Numerator and denominator ``[n]`` of the probability of acceptance (at most 1 is meant)."""
        p = trial.p.at(trial.tokens)
        return p, torch.ones_like(p) if trial.q is None else trial.q.at(trial.tokens)

    def residual(self, trial: Trial) -> Distribution:
        """What n tokens are drawn from after the rejections of `trial`; never empty unless p is."""
        if trial.q is not None:
            return trial.p.minus(trial.q)
        return trial.p.zeroed(trial.tokens).normalised(trial.p)

    def __call__(
        self, target: Target, draft: Draft, uniforms: Uniforms, relaxed: Tensor | None = None
    ) -> Verdict:
        """See `Acceptance`."""
        columns = draft.ids.shape[2]
        if draft.chain:
            return _chain(self, target, draft, uniforms, relaxed)
        if columns > 1:
            raise ValueError(f"trees are for one code per position, this model has {columns}: draft chains.")
        return _tree(self, target, draft, uniforms, relaxed)


exact = Rule()


def _chain(rule: Rule, target: Target, draft: Draft, uniforms: Uniforms, relaxed: Tensor | None) -> Verdict:
    """All tests at once, position by position and column by column; the host waits for the device once."""
    rows, length, columns = draft.ids.shape
    device = draft.ids.device
    lengths = draft.lengths.to(device)
    u = uniforms(1 + length * columns)
    if not length:
        nothing = torch.zeros(rows, dtype=torch.long, device=device)
        return _chain_verdict(target.first, u[:, 0], nothing, lengths, None, columns)
    tests = u[:, 1:].reshape(rows * length, columns)
    node = torch.arange(rows * length, device=device)
    # Leave out the entry after each row's last node; of one row a view, without a copy.
    before = target.first[:length] if rows == 1 else target.first[node + node // length]
    passed = []
    for column, p in enumerate((before, *target.further)):
        over, under = rule.odds(_trial(p, draft, column, slice(None), relaxed))
        passed.append(passes(tests[:, column], over, under))
    inside = torch.arange(length, device=device) < lengths[:, None]
    stands = torch.stack(passed, dim=-1).reshape(rows, length, columns) & inside[..., None]
    count = stands.reshape(rows, -1).long().cumprod(dim=1).sum(dim=1)
    rest = _chain_rest(rule, target, draft, count, lengths, relaxed)
    return _chain_verdict(rest, u[:, 0], count, lengths, stands.all(dim=-1), columns)


def _trial(
    p: Distribution, draft: Draft, column: int, nodes: Tensor | slice, relaxed: Tensor | None
) -> Trial:
    """The tests of a column at some of the b · g nodes, given the target's distributions there."""
    q = None if draft.probs is None else draft.probs[column][nodes]
    tokens = draft.ids[..., column].reshape(-1)[nodes]
    return Trial(p, q, tokens, None if relaxed is None else relaxed.reshape(-1)[nodes], column)


def _chain_rest(
    rule: Rule, target: Target, draft: Draft, count: Tensor, lengths: Tensor, relaxed: Tensor | None
) -> Distribution:
    """What each row draws from after `count` codes that stand: the residual of the rejected one, or what the
    target says after the last."""
    rows, length, columns = draft.ids.shape
    row = torch.arange(rows, device=count.device)
    place, column = count // columns, count % columns
    node = row * length + place.clamp(max=length - 1)
    after = target.first[row * (length + 1) + place]
    parts = [after]
    for c, p in enumerate((after, *(further[node] for further in target.further))):
        parts.append(rule.residual(_trial(p, draft, c, node, relaxed)))
    return _select(parts, torch.where(place < lengths, column + 1, 0))


def _select(parts: Sequence[Distribution], which: Tensor) -> Distribution:
    """Row i of part ``which[i]``."""
    if len(parts) == 2 and parts[0].ids is parts[1].ids:
        one, other = parts
        return Distribution(one.ids, torch.where(which[:, None] == 0, one.probs, other.probs), one.size)
    return Distribution.cat(parts)[which * len(which) + torch.arange(len(which), device=which.device)]


def _chain_verdict(
    rest: Distribution, uniforms: Tensor, count: Tensor, lengths: Tensor, kept: Tensor | None, columns: int
) -> Verdict:
    counts, extra, ends = torch.stack([count, rest.draw(uniforms), lengths]).tolist()
    return Verdict(
        path=[list(range(c // columns)) for c in counts],
        extra=extra,
        column=[c % columns for c in counts],
        node=[c // columns if c % columns else -1 for c in counts],
        kept=kept,
        rest=rest,
        tested=[min(c + 1, end * columns) for c, end in zip(counts, ends)],
    )


def _tree(rule: Rule, target: Target, draft: Draft, uniforms: Uniforms, relaxed: Tensor | None) -> Verdict:
    """Row by row on the host: from each accepted node on, its children are tried in turn, the target's
    distribution being replaced by the residual after each rejection."""
    length = draft.ids.shape[1]
    first = target.first.to("cpu")
    probs = None if draft.probs is None else draft.probs[0].to("cpu")
    u, tokens = uniforms(1 + length).cpu(), draft.ids[..., 0].cpu()
    loose = None if relaxed is None else relaxed.cpu()
    paths, rests, tested = [], [], []
    for row, children in enumerate(_children(draft)):
        walk = _Walk(rule, tokens[row], None if loose is None else loose[row], iter(u[row, 1:].tolist()))
        path = list[int]()
        node: int | None = -1
        while node is not None:
            start = row * (length + 1) + node + 1
            p = first[start : start + 1]
            offered = children.get(node, ())
            q = None if probs is None else probs[row * length : (row + 1) * length]
            node, p = walk.step(p, q, offered)
            path += [] if node is None else [node]
        paths.append(path)
        rests.append(p)
        tested.append(walk.tested)
    rest = Distribution.cat(rests)
    return _tree_verdict(paths, rest, rest.draw(u[:, 0]), tested)


def _children(draft: Draft) -> Iterator[dict[int, list[int]]]:
    """Of each row: node → its children, in the order in which they are tried."""
    for parents, length in zip(draft.parents.tolist(), draft.lengths.tolist()):
        children: dict[int, list[int]] = {}
        for node, parent in enumerate(parents[:length]):
            children.setdefault(parent, []).append(node)
        yield children


def _tree_verdict(paths: list[list[int]], rest: Distribution, extra: Tensor, tested: list[int]) -> Verdict:
    rows = len(paths)
    return Verdict(paths, extra.tolist(), [0] * rows, [-1] * rows, None, rest, tested)


@dataclass
class _Walk:
    """One row's way down its tree, all on the host."""

    rule: Rule
    tokens: Tensor
    relaxed: Tensor | None
    uniforms: Iterator[float]
    tested: int = 0

    def step(
        self, p: Distribution, probs: Distribution | None, offered: Sequence[int]
    ) -> tuple[int | None, Distribution]:
        """The first child that is accepted, or None; and what is left of p after the rejections before it."""
        tried = list[int]()
        for child in offered:
            token = self.tokens[child : child + 1]
            if int(token) in tried:  # nothing of it is left in p
                continue
            q = None if probs is None else probs[child : child + 1]
            if q is not None and tried:  # drawn without replacement
                q = q.without(torch.tensor([tried]))
            loose = None if self.relaxed is None else self.relaxed[child : child + 1]
            trial = Trial(p, q, token, loose, 0)
            tried.append(int(token))
            self.tested += 1
            u = next(self.uniforms)
            over, under = (float(value) for value in self.rule.odds(trial))
            if under <= 0:  # never drawn, so that its residual is not to be taken either
                continue
            if passes(u, over, under):
                return child, p
            p = self.rule.residual(trial)
        return None, p


def neighbour_table(codebook: Tensor, normalise: bool = False, count: int | None = None) -> Tensor:
    """Int32 ``[v, count]``: the other codes nearest to each in a codebook ``[v, d]`` by Euclidean distance,
    nearest first (all v − 1 by default). normalise: between rows of length 1, the space that tokenizers with
    a normalised codebook decode; LANTERN's published tables are of the raw rows."""
    rows = codebook.detach().float()
    if normalise:
        rows = torch.nn.functional.normalize(rows, dim=-1)
    size = len(rows)
    count = size - 1 if count is None else min(count, size - 1)
    table = torch.empty(size, count, dtype=torch.int32, device=rows.device)
    for start in range(0, size, 1024):  # the whole matrix of distances would be large
        some = rows[start : start + 1024]
        distance = torch.cdist(some, rows, compute_mode="donot_use_mm_for_euclid_dist")
        own = torch.arange(start, start + len(some), device=rows.device)
        distance[own - start, own] = torch.inf  # itself is last, also among equal rows
        table[start : start + 1024] = distance.sort(dim=-1, stable=True).indices[:, :count]
    return table


class Lantern(Rule):
    """LANTERN's relaxed acceptance: a code x is tested with the probability of its nearest codes added to its
    own, ``p̃(x) = p(x) + Σ p(b)``, over the longest run of nearest neighbours that stays within a bound.

    neighbours: `neighbour_table` ``[codes, ≥ k]`` (the published ``top_*_indices.npy``), or one per column.
    ids: the vocabulary's id of each code, ``vocabulary.block("image", column)``, one per column like
    `neighbours`; None where codes are ids. k: neighbours at most. bound: the added probability is at most δ
    for a bound ≤ 1 (LANTERN), at most (λ − 1) · p(x) for a bound λ > 1 (LANTERN++).
    residual, after a rejection:

    * "none": nothing is relaxed, lossless;
    * "bounded": the added neighbours lose their probability in p, as they would in the p̃ that x was tested
      with. With one drafted token chosen without chance the result is within total variation δ of p;
    * "released": what the published code does: all k + 1 nearest codes are excluded from p (chosen drafts),
      or kept from being lowered by q (sampled ones), and an empty residual becomes uniform over the codes.
      The total variation may exceed δ by far.

    With sampled drafts δ bounds each p̃ and not what comes out: measure. greedy: the published rule for
    temperature 0; the target must then be the plain softmax of the guided logits (temperature 1, no filter),
    x is accepted when p̃(x) exceeds every probability, and what follows is the most probable id.
    Only ids of the tables are relaxed, in nodes marked as `relaxed`. Raises ValueError for values out of
    range.
    """

    def __init__(
        self,
        neighbours: Tensor | Sequence[Tensor],
        k: int = 1000,
        bound: float = 0.1,
        residual: Literal["released", "bounded", "none"] = "none",
        *,
        ids: Tensor | Sequence[Tensor] | None = None,
        greedy: bool = False,
    ) -> None:
        tables = (neighbours,) if isinstance(neighbours, Tensor) else tuple(neighbours)
        if ids is None:
            ids = tuple(torch.arange(len(table)) for table in tables)
        blocks = (ids,) if isinstance(ids, Tensor) else tuple(ids)
        if k < 1:
            raise ValueError(f"LANTERN needs k of at least 1 neighbour, got {k}.")
        if not 0 <= bound < float("inf"):
            raise ValueError(f"LANTERN's bound must be δ in [0, 1] or λ above 1, got {bound}.")
        if residual not in ("released", "bounded", "none"):
            raise ValueError(f"residual must be released, bounded or none, got {residual!r}.")
        sizes = [len(table) for table in tables], [len(block) for block in blocks]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"the neighbour tables have {sizes[0]} codes, the vocabulary's blocks {sizes[1]}."
            )
        self.k, self.bound, self.mode, self.greedy = k, float(bound), residual, greedy
        self._books = [_Book(table[:, : k + 1], block) for table, block in zip(tables, blocks)]

    def odds(self, trial: Trial) -> tuple[Tensor, Tensor]:
        """p̃(x) over q(x)."""
        over, under = super().odds(trial)
        if self.mode == "none":
            return over, under
        return over + self.absorbed(trial)[1], under

    def residual(self, trial: Trial) -> Distribution:
        """See the class."""
        if self.mode == "none":
            return super().residual(trial)
        near, _, count = self.absorbed(trial)
        place = torch.arange(near.shape[1], device=near.device)
        p, q = trial.p, trial.q
        if self.mode == "bounded":
            out = torch.where(place < count[:, None], near, -1)
            left = p.zeroed(torch.cat([out, trial.tokens[:, None]], dim=1) if q is None else out)
            return (left if q is None else left.excess(q)).normalised(p)
        out = torch.where(count[:, None] > 0, near, -1)
        if q is None:
            left = p.zeroed(torch.cat([out, trial.tokens[:, None]], dim=1))
        else:
            left = p.excess(q.zeroed(out))
        return self._or_uniform(left, trial)

    def _or_uniform(self, left: Distribution, trial: Trial) -> Distribution:
        """Normalised; where nothing is left, uniform over the codes for a code that might be relaxed."""
        uniform = self._books[trial.column].uniform(trial.p)
        relaxed = self._books[trial.column].holds(trial.tokens)
        if trial.relaxed is not None:
            relaxed = relaxed & trial.relaxed
        # Not where p itself is no distribution.
        empty = (left.probs.sum(dim=-1) == 0) & (trial.p.probs.sum(dim=-1) > 0) & relaxed
        return _select([left.normalised(trial.p), uniform], empty.long())

    def absorbed(self, trial: Trial) -> tuple[Tensor, Tensor, Tensor]:
        """The k + 1 nearest ids ``[n, k + 1]`` of each token, the probability that it is granted of them
        ``[n]``, and how many of them that takes (0 where nothing may be relaxed)."""
        near, relaxed = self._books[trial.column].near(trial.tokens)
        if trial.relaxed is not None:
            relaxed = relaxed & trial.relaxed
        mass = trial.p.at(near[:, : self.k]).cumsum(dim=-1)
        bound = (self.bound - 1) * trial.p.at(trial.tokens) if self.bound > 1 else self.bound
        within = mass <= (bound[:, None] if isinstance(bound, Tensor) else bound)
        count = within.sum(dim=-1) * relaxed
        granted = mass.gather(1, (count - 1).clamp(min=0)[:, None])[:, 0]
        return near, torch.where(count > 0, granted, 0), count

    def __call__(
        self, target: Target, draft: Draft, uniforms: Uniforms, relaxed: Tensor | None = None
    ) -> Verdict:
        """See `Acceptance`."""
        if not self.greedy:
            return super().__call__(target, draft, uniforms, relaxed)
        if draft.ids.shape[2] > 1:
            raise ValueError(f"greedy LANTERN is for one code per position, not {draft.ids.shape[2]}.")
        return self._greedily(target.first, draft, relaxed)

    def _greedily(self, first: Distribution, draft: Draft, relaxed: Tensor | None) -> Verdict:
        """All nodes at once; the deepest path of accepted nodes wins, the first of equal ones."""
        rows, length, _ = draft.ids.shape
        row = torch.arange(rows, device=draft.ids.device)
        best = first.ids.gather(1, first.probs.argmax(dim=-1, keepdim=True))[:, 0]
        best = torch.where(first.probs.sum(dim=-1) > 0, best, first.size)
        before = (row[:, None] * (length + 1) + draft.parents.to(row.device) + 1).reshape(-1)
        trial = _trial(first[before], draft, 0, slice(None), relaxed)
        stands = (trial.tokens == best[before]) | (self.odds(trial)[0] > trial.p.probs.amax(dim=-1))
        flags = stands.reshape(rows, length).tolist()
        paths = [_deepest(children, flag) for children, flag in zip(_children(draft), flags)]
        ends = torch.tensor([path[-1] + 1 if path else 0 for path in paths], device=row.device)
        extra = best[row * (length + 1) + ends]
        rest = Distribution.certain(extra, first.size)
        return _tree_verdict(paths, rest, extra, draft.lengths.tolist())


def _deepest(children: dict[int, list[int]], stands: Sequence[bool], node: int = -1) -> list[int]:
    """The longest path of nodes that stand below `node`, the first of equally long ones."""
    paths = [[c, *_deepest(children, stands, c)] for c in children.get(node, ()) if stands[c]]
    return max(paths, key=len, default=[])


class _Book:
    """One codebook's neighbours in the vocabulary's ids, on whatever device they are asked for."""

    def __init__(self, table: Tensor, ids: Tensor) -> None:
        codes = torch.full((int(ids.max()) + 1,), -1, device=ids.device)
        codes[ids] = torch.arange(len(ids), device=ids.device)
        self._tables = table, ids.long(), codes
        self._placed: dict[torch.device, tuple[Tensor, Tensor, Tensor]] = {}

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        if device not in self._placed:
            self._placed[device] = (
                self._tables[0].to(device),
                self._tables[1].to(device),
                self._tables[2].to(device),
            )
        return self._placed[device]

    def _codes(self, tokens: Tensor) -> Tensor:
        """The code of each id, -1 for other ids."""
        codes = self._on(tokens.device)[2]
        return torch.where(tokens < len(codes), codes[tokens.clamp(max=len(codes) - 1)], -1)

    def holds(self, tokens: Tensor) -> Tensor:
        """Which ids are codes."""
        return self._codes(tokens) >= 0

    def near(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest ids ``[n, k + 1]`` of each token ``[n]``, and whether it is a code at all."""
        table, ids, _ = self._on(tokens.device)
        codes = self._codes(tokens)
        return ids[table[codes.clamp(min=0)].long()], codes >= 0

    def uniform(self, like: Distribution) -> Distribution:
        """The uniform distribution over the codes, as often as `like` has rows."""
        ids = self._on(like.ids.device)[1].sort().values
        probs = torch.full((len(like), len(ids)), 1 / len(ids), dtype=like.probs.dtype, device=ids.device)
        return Distribution(ids.expand(len(like), -1), probs, like.size)


class Grouped(Rule):
    """Grouped speculative decoding (GSD): x is tested with its group's probability, ``Σ p / Σ q`` over the
    group, so it is lossy; the residual is the lossless one.

    The group: `size` ids in the order of the target's probability, half of them just below x and the others x
    and just above, of those the ids whose probability differs from x's by less than `gap` and whose input
    embedding lies within squared `distance` of x's. embedding: float ``[v', d]``, the language model's own
    (the published code uses the first 10000 ids); groups with a larger id are not restricted by distance.
    Where the order ends before the group does, the test is the lossless one. Ids that a filter removed from
    the target are not in the order (the published code ranks all logits). Raises ValueError for an empty
    group.
    """

    def __init__(
        self, embedding: Tensor | None = None, *, size: int = 14, gap: float = 0.15, distance: float = 0.5
    ) -> None:
        if size < 1:
            raise ValueError(f"a group needs at least 1 id, got {size}.")
        self.embedding = None if embedding is None else embedding.detach().float()
        self.size, self.gap, self.distance = size, gap, distance

    def odds(self, trial: Trial) -> tuple[Tensor, Tensor]:
        """Σ p over Σ q of each token's group."""
        over, under = super().odds(trial)
        group, usable = self._group(trial.p, trial.tokens)
        if trial.relaxed is not None:
            usable = usable & trial.relaxed
        p = trial.p.at(group)
        member = (p - over[:, None]).abs() < self.gap
        member = (member & self._close(group, trial.tokens)) | (group == trial.tokens[:, None])
        # A token that was chosen without chance has all of q.
        q = p.new_zeros(p.shape) if trial.q is None else trial.q.at(group)
        total = under if trial.q is None else (q * member).sum(dim=-1)
        return torch.where(usable, (p * member).sum(dim=-1), over), torch.where(usable, total, under)

    def _group(self, p: Distribution, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The ids ``[n, size]`` around each token in the order of p, and whether the order holds them all."""
        width = p.ids.shape[1]
        order = p.probs.argsort(dim=-1, stable=True)
        ranked = p.ids.gather(1, order)
        found = ranked == tokens[:, None]
        place = found.long().argmax(dim=-1)
        lowest = width - (p.probs > 0).sum(dim=-1)
        start = place - self.size // 2
        usable = found.any(dim=-1) & (start >= lowest) & (start + self.size <= width)
        span = start[:, None] + torch.arange(self.size, device=tokens.device)
        return ranked.gather(1, span.clamp(0, width - 1)), usable

    def _close(self, group: Tensor, tokens: Tensor) -> Tensor:
        """Bool ``[n, size]``: whose embedding is near the token's; all of a group that has an unknown id."""
        if self.embedding is None:
            return torch.ones_like(group, dtype=torch.bool)
        if self.embedding.device != group.device:
            self.embedding = self.embedding.to(group.device)
        known = len(self.embedding)
        outside = (group >= known).any(dim=-1, keepdim=True) | (tokens >= known)[:, None]
        rows = self.embedding[group.clamp(max=known - 1)]
        own = self.embedding[tokens.clamp(max=known - 1)]
        return outside | ((rows - own[:, None]).square().sum(dim=-1) < self.distance)


def maximal(
    target: Distribution, draft: Distribution | None, tokens: Tensor, kept: Tensor, uniforms: Tensor
) -> Tensor:
    """Maximal coupling (MC-SJD): `tokens` long ``[n]``, drawn from `draft` (None: chosen), stay where they
    passed their own test (`kept` ``[n]``, `Verdict.kept`) and are drawn from the residual elsewhere: long
    ``[n]`` distributed as `target`, and each equal to the old token with probability 1 − TV(p, q)."""
    lost, fresh = ~kept, tokens.clone()
    trial = Trial(target[lost], None if draft is None else draft[lost], tokens[lost], None, 0)
    fresh[lost] = exact.residual(trial).draw(uniforms[lost])
    return fresh


def gumbel(target: Distribution, noise: Tensor) -> Tensor:
    """Gumbel coupling: long ``[n]`` distributed as `target`, a fixed function of it and of `noise` ``[n, v]``
    uniform in (0, 1): the same noise under similar distributions makes equal tokens likely. Id v where there
    is no distribution."""
    own = noise.gather(1, target.ids.clamp(max=noise.shape[1] - 1))
    # arg max of log p − log(−log u), as the earliest of exponential clocks of rate p.
    clock = torch.where(target.probs > 0, -own.double().log() / target.probs, torch.inf)
    first, column = clock.min(dim=-1, keepdim=True)
    return torch.where(first < torch.inf, target.ids.gather(1, column), target.size)[:, 0]


def without_replacement(distribution: Distribution, count: int, uniforms: Tensor) -> Tensor:
    """Ids long ``[n, count]`` drawn one after the other, each from what the earlier ones left, with
    `uniforms` ``[n, count]``; v from where nothing is left on."""
    probs, width = distribution.probs.clone(), distribution.ids.shape[1]
    ids = torch.cat([distribution.ids, distribution.ids.new_full((len(probs), 1), distribution.size)], dim=1)
    drawn = []
    for j in range(count):
        column = draw(probs, uniforms[:, j])[:, None]
        drawn.append(ids.gather(1, column))
        probs.scatter_(1, column.clamp(max=width - 1), 0)
    return torch.cat(drawn, dim=1)
