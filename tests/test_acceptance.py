"""Acceptance by exact enumeration: every draft and every outcome of the tests, with its probability.

A process over a tiny vocabulary: p1 for the first token, p2[x] for the second after x, p3[x, y] for the
third; q likewise. The uniform that draws the last token is integrated by taking the distribution that it is
drawn from.
"""

import itertools

import numpy as np
import pytest
import torch

from lexel.sample.acceptance import (
    Draft,
    Grouped,
    Lantern,
    Rule,
    Target,
    Trial,
    exact,
    gumbel,
    maximal,
    neighbour_table,
    without_replacement,
)
from lexel.sample.logits import Distribution, SamplingConfig, target_distribution

BELOW_ONE = 1 - 2.0**-53
CONFIGS = {
    "plain": SamplingConfig(),
    "guided": SamplingConfig(guidance=2.0),
    "top-k": SamplingConfig(temperature=0.8, top_k=3),
    "top-p": SamplingConfig(top_p=0.7, guidance=1.5),
    "min-p": SamplingConfig(temperature=1.3, min_p=0.2),
    "greedy": SamplingConfig(temperature=0, guidance=1.5),
}


def rows(count, size, seed, config=CONFIGS["plain"], scale=1.0):
    """Random distributions in float64."""
    generator = torch.Generator().manual_seed(seed)
    cond, uncond = (
        torch.randn(count, size, generator=generator, dtype=torch.float64) * scale for _ in range(2)
    )
    return target_distribution(cond, uncond, config)


def of(*weights):
    """One distribution given by its probabilities."""
    probs = torch.tensor([weights], dtype=torch.float64)
    return Distribution(torch.arange(len(weights))[None], probs / probs.sum(), len(weights))


def tv(p, q):
    return float((p - q).abs().sum()) / 2


def one_draft(tokens, parents, probs=None):
    return Draft(
        torch.tensor(tokens, dtype=torch.long).reshape(1, len(tokens), 1),
        torch.tensor([parents], dtype=torch.long),
        torch.tensor([len(tokens)]),
        probs,
    )


def outcomes(rule, target, draft, relaxed=None):
    """Every outcome of one row's tests: (probability, verdict). The rule is called with uniforms that pass or
    fail each test, and the ratios that it compares them with give the probabilities."""
    ratios = []
    odds = rule.odds

    def recorded(trial):
        over, under = odds(trial)
        ratios.extend(torch.where(under > 0, over / under, 0).clamp(max=1).tolist())
        return over, under

    rule.odds = recorded
    total, waiting = draft.ids[0].numel(), [[]]
    try:
        while waiting:
            u = waiting.pop()
            ratios.clear()
            filled = [0.5, *u, *[BELOW_ONE] * (total - len(u))]
            verdict = rule(target, draft, lambda n, f=filled: torch.tensor([f[:n]]).double(), relaxed)
            tested = verdict.tested[0]
            if tested > len(u):
                waiting += [[*u, 0.0], [*u, BELOW_ONE]]
                continue
            # A chain's ratios come column by column, and all of them.
            line = np.array(ratios).reshape(draft.ids.shape[2], -1).T.reshape(-1)[:tested]
            chance = 1.0
            for ratio, uniform in zip(line, u):
                chance *= ratio if uniform == 0 else 1 - ratio
            if chance > 0:
                yield chance, verdict
    finally:
        del rule.odds


def emitted(draft, verdict):
    """The accepted tokens and the distribution of the next one."""
    return [draft.ids[0, node, 0].item() for node in verdict.path[0]], verdict.rest.dense()[0]


class Process:
    """Its joint distribution of two tokens, and that of what speculation puts out."""

    def __init__(self, size, seed, config):
        self.size = size
        self.first = rows(1, size, seed, config)
        self.second = rows(size, size, seed + 1, config)
        self.third = rows(size * size, size, seed + 2, config)

    @property
    def joint(self):
        return self.first.dense()[0][:, None] * self.second.dense()

    def after(self, tokens):
        """The distribution after up to two tokens."""
        if not tokens:
            return self.first
        if len(tokens) == 1:
            return self.second[torch.tensor(tokens)]
        return self.third[torch.tensor([tokens[0] * self.size + tokens[1]])]

    def target(self, tokens, parents):
        """Around a drafted tree of depth at most 2."""
        entries = [self.first]
        for node in range(len(tokens)):
            line, at = [], node
            while at >= 0:
                line.insert(0, tokens[at])
                at = parents[at]
            entries.append(self.after(line))
        return Target(Distribution.cat(entries))

    def add(self, joint, weight, tokens, rest):
        """What one outcome adds to the joint distribution of the first two tokens; if there is only one, the
        second is drawn by plain sampling."""
        if len(tokens) >= 2:
            joint[tokens[0], tokens[1]] += weight
        elif len(tokens) == 1:
            joint[tokens[0]] += weight * rest
        else:
            joint += weight * rest[:, None] * self.second.dense()

    def speculated(self, drafts, rule=exact):
        """drafts: (probability, tokens, parents, probs)."""
        joint, whole = torch.zeros(self.size, self.size, dtype=torch.float64), 0.0
        for weight, tokens, parents, probs in drafts:
            draft = one_draft(tokens, parents, probs)
            for chance, verdict in outcomes(rule, self.target(tokens, parents), draft):
                self.add(joint, weight * chance, *emitted(draft, verdict))
            whole += weight
        assert whole == pytest.approx(1)
        return joint


def sampled_chains(q, length):
    for tokens in itertools.product(range(q.size), repeat=length):
        probs = Distribution.cat([q.after(tokens[:j]) for j in range(length)])
        weight = float(probs.at(torch.tensor(tokens)).prod())
        if weight:
            yield weight, list(tokens), list(range(-1, length - 1)), (probs,)


def sampled_trees(q, shape):
    """Siblings drawn without replacement; shape: parents."""

    def extend(weight, tokens, probs):
        node = len(tokens)
        if node == len(shape):
            if weight:
                yield weight, tokens, list(shape), (Distribution.cat(probs),)
            return
        parent = shape[node]
        drawn_from = q.after([tokens[parent]] if parent >= 0 else [])
        earlier = [tokens[other] for other in range(node) if shape[other] == parent]
        left = drawn_from.without(torch.tensor([earlier or [-1]]))
        for token, chance in enumerate(left.dense()[0].tolist()):
            if chance:
                yield from extend(weight * chance, [*tokens, token], [*probs, drawn_from])
        if not bool(left.probs.any()):  # nothing is left to draw: any token, of draft probability 0
            yield from extend(weight, [*tokens, (earlier[0] + 1) % q.size], [*probs, drawn_from])

    yield from extend(1.0, [], [])


@pytest.mark.parametrize("name", CONFIGS)
class TestExactness:
    """What comes out has the target's distribution, to rounding."""

    @pytest.mark.parametrize("length", [1, 2])
    @pytest.mark.parametrize("drafting", ["same", "plain"])
    def test_sampled_chains(self, name, length, drafting):
        p = Process(4, 0, CONFIGS[name])
        q = Process(4, 10, CONFIGS[name if drafting == "same" else "plain"])
        found = p.speculated(sampled_chains(q, length))
        torch.testing.assert_close(found, p.joint, rtol=0, atol=1e-12)

    @pytest.mark.parametrize("tokens", [[2], [1, 3], [0, 0]])
    def test_chosen_chains(self, name, tokens):
        p = Process(5, 3, CONFIGS[name])
        found = p.speculated([(1.0, tokens, list(range(-1, len(tokens) - 1)), None)])
        torch.testing.assert_close(found, p.joint, rtol=0, atol=1e-12)

    @pytest.mark.parametrize(
        ("tokens", "parents"),
        [
            ([4, 1, 2], [-1, -1, -1]),
            ([3, 0, 3, 1, 2], [-1, -1, 0, 0, 1]),
            ([0, 1, 2, 3, 4, 5], [-1] * 6),  # all of them
            ([2, 2, 5, 5], [-1, -1, 0, 0]),  # the same one twice
        ],
    )
    def test_trees_of_chosen_siblings(self, name, tokens, parents):
        p = Process(6, 5, CONFIGS[name])
        found = p.speculated([(1.0, tokens, parents, None)])
        torch.testing.assert_close(found, p.joint, rtol=0, atol=1e-12)

    @pytest.mark.parametrize("shape", [(-1, -1), (-1, -1, -1), (-1, -1, 0, 0)])
    @pytest.mark.parametrize("drafting", ["plain", "greedy"])
    def test_trees_of_sampled_siblings(self, name, shape, drafting):
        p, q = Process(3, 7, CONFIGS[name]), Process(3, 17, CONFIGS[drafting])
        found = p.speculated(sampled_trees(q, shape))
        torch.testing.assert_close(found, p.joint, rtol=0, atol=1e-12)

    def test_two_columns(self, name):
        """A position of two codes, the second given the first."""
        p, q = Process(4, 20, CONFIGS[name]), Process(4, 30, CONFIGS["plain"])
        joint = torch.zeros(4, 4, dtype=torch.float64)
        for a, b in itertools.product(range(4), repeat=2):
            drafted = q.first, q.after([a])
            weight = float(drafted[0].at(torch.tensor([a])) * drafted[1].at(torch.tensor([b])))
            target = Target(Distribution.cat([p.first, p.first]), (p.after([a]),))
            draft = Draft(
                torch.tensor([[[a, b]]]), torch.tensor([[-1]]), torch.tensor([1]), (drafted[0], drafted[1])
            )
            for chance, verdict in outcomes(exact, target, draft):
                rest = verdict.rest.dense()[0]
                if verdict.path[0]:
                    joint[a, b] += weight * chance
                elif verdict.column[0]:
                    assert (verdict.column[0], verdict.node[0]) == (1, 0)
                    joint[a] += weight * chance * rest
                else:  # the second code of a new position is sampled plainly
                    joint += weight * chance * rest[:, None] * p.second.dense()
        torch.testing.assert_close(joint, p.joint, rtol=0, atol=1e-12)

    def test_maximal_coupling(self, name):
        """The residual's own draw is integrated over the breakpoints of its cumulative sum."""
        p, q = rows(1, 5, 1, CONFIGS[name]), rows(1, 5, 2)
        found, kept = torch.zeros(5, dtype=torch.float64), 0.0
        for token, weight in enumerate(q.dense()[0].tolist()):
            x = torch.tensor([token])
            ratio = float((p.at(x) / q.at(x)).clamp(max=1))
            found[token] += weight * ratio
            kept += weight * ratio
            breaks = [0.0, *p.minus(q).dense()[0].cumsum(0).tolist()]
            for low, high in itertools.pairwise(breaks):
                if high > low:
                    u = torch.tensor([(low + high) / 2], dtype=torch.float64)
                    new = int(maximal(p, q, x, torch.tensor([False]), u))
                    found[new] += weight * (1 - ratio) * (high - low)
            assert int(maximal(p, q, x, torch.tensor([True]), torch.tensor([0.3]))) == token
        torch.testing.assert_close(found, p.dense()[0], rtol=0, atol=1e-9)
        assert kept == pytest.approx(1 - tv(p.dense(), q.dense()))


def test_a_sampled_tree_of_one_child_each_is_the_chain():
    p, q = Process(4, 0, CONFIGS["plain"]), Process(4, 10, CONFIGS["plain"])
    for _, tokens, parents, probs in sampled_chains(q, 2):
        draft = one_draft(tokens, parents, probs)
        tree = one_draft([*tokens, 0], [*parents, -1], (Distribution.cat([probs[0], q.first]),))
        assert (draft.chain, tree.chain) == (True, False)
        for u in ([0.5, 0.1, 0.2, 1], [0.5, 0.5, 0.7, 1], [0.5, 0.9, 0.9, 1]):
            source = torch.tensor([u], dtype=torch.float64)
            one = exact(p.target(tokens, parents), draft, lambda n, s=source: s[:, :n])
            other = exact(p.target([*tokens, 0], [*parents, -1]), tree, lambda n, s=source: s[:, :n])
            if one.path[0]:  # else the tree goes on to the other child
                assert (one.path, one.extra) == (other.path, other.extra)


def test_rows_of_a_batch_are_those_rows_alone():
    """Chains of 0 to 3 tokens, one that ends the generation, and trees beside them."""
    generator = torch.Generator().manual_seed(0)
    lengths = [3, 0, 2, 1]
    first, probs = rows(16, 6, 1, scale=0.5), rows(12, 6, 2, scale=0.5)
    empty = torch.arange(16) == 3 * 4 + 1
    first = Distribution(first.ids, first.probs.masked_fill(empty[:, None], 0), 6)
    ids = torch.randint(6, (4, 3, 1), generator=generator)
    uniforms = torch.rand(30, 4, 4, generator=generator, dtype=torch.float64)
    ended = 0
    for parents in ([-1, 0, 1], [-1, -1, 0]):
        for u in uniforms:
            draft = Draft(ids, torch.tensor([parents] * 4), torch.tensor(lengths), (probs,))
            together = exact(Target(first), draft, lambda n, u=u: u[:, :n])
            for row, length in enumerate(lengths):
                before = first[row * 4 : row * 4 + length + 1]
                own = (probs[row * 3 : row * 3 + length],)
                small = one_draft(ids[row, :length].tolist(), parents[:length], own)
                alone = exact(Target(before), small, lambda n, u=u, row=row: u[row : row + 1, :n])
                assert together.path[row] == alone.path[0]
                assert together.extra[row] == alone.extra[0]
                assert together.tested[row] == alone.tested[0]
                torch.testing.assert_close(together.rest.dense()[row], alone.rest.dense()[0])
            ended += together.path[3] == [0]
            assert (together.extra[3] == 6) == (together.path[3] == [0])
    assert ended


def test_without_a_draft_it_is_plain_sampling():
    p = rows(3, 6, 1)
    u = torch.rand(3, 1, dtype=torch.float64)
    draft = Draft(torch.zeros(3, 0, 1).long(), torch.zeros(3, 0).long(), torch.zeros(3).long())
    verdict = exact(Target(p), draft, lambda n: u[:, :n])
    assert verdict.extra == p.draw(u[:, 0]).tolist()
    assert verdict.path == [[], [], []]


def test_each_position_is_also_tested_on_its_own():
    p, q = of(1, 1, 2), of(2, 1, 1)
    draft = one_draft([0, 2, 0], [-1, 0, 1], (Distribution.cat([q, q, q]),))
    u = torch.tensor([[0.5, 0.51, 0.9, 0.49]]).double()
    verdict = exact(Target(Distribution.cat([p] * 4)), draft, lambda n: u)
    assert verdict.kept.tolist() == [[False, True, True]]
    assert (verdict.path, verdict.tested) == ([[]], [1])


def test_an_empty_residual_falls_back_to_the_target():
    p = of(1, 1, 0)
    torch.testing.assert_close(exact.residual(Trial(p, p, torch.tensor([0]), None, 0)).dense(), p.dense())
    sure = of(0, 1, 0)
    rest = exact.residual(Trial(sure, None, torch.tensor([1]), None, 0))
    torch.testing.assert_close(rest.dense(), sure.dense())


def test_trees_of_several_codes_are_refused():
    draft = Draft(torch.zeros(1, 2, 2).long(), torch.tensor([[-1, -1]]), torch.tensor([2]))
    with pytest.raises(ValueError, match="this model has 2"):
        exact(Target(of(1, 1), (of(1, 1),)), draft, lambda n: torch.zeros(1, n))


def line(size):
    """Codes on a line: the nearest are the numbers beside."""
    return neighbour_table(torch.arange(size)[:, None].float() ** 1.01)


def output(rule, p, token, q=None):
    """The first token's distribution after one drafted token; with q, over all drafts from q."""
    found = torch.zeros(p.size, dtype=torch.float64)
    for x in [token] if q is None else range(p.size):
        draft = one_draft([x], [-1], None if q is None else (q,))
        weight = 1.0 if q is None else float(q.at(torch.tensor([x])))
        for chance, verdict in outcomes(rule, Target(Distribution.cat([p, p])), draft):
            tokens, rest = emitted(draft, verdict)
            if tokens:
                found[tokens[0]] += weight * chance
            else:
                found += weight * chance * rest
    return found


class TestLantern:
    def test_neighbours_come_nearest_first_without_the_code_itself(self):
        codebook = torch.tensor([[0.0, 0], [0, 2], [0, 0], [3, 0]])
        assert neighbour_table(codebook).tolist() == [[2, 1, 3], [0, 2, 3], [0, 1, 3], [0, 2, 1]]
        assert neighbour_table(codebook, count=1).tolist() == [[2], [0], [0], [0]]
        turned = torch.tensor([[1.0, 0], [0, 5], [4, 3]])
        assert neighbour_table(turned, normalise=True, count=1).tolist() == [[2], [2], [0]]

    def test_the_bounds(self):
        p, token = of(5, 4, 1, 2, 8), torch.tensor([1])
        table = torch.tensor([[1, 2, 3, 4], [2, 0, 3, 4], [1, 3, 0, 4], [2, 4, 1, 0], [3, 2, 1, 0]])
        for k, bound, count, mass in [
            *((4, 0.04, 0, 0), (4, 0.06, 1, 1), (4, 0.31, 2, 6), (4, 0.41, 3, 8), (2, 0.41, 2, 6)),
            *((4, 1.2, 0, 0), (4, 1.3, 1, 1), (4, 2.6, 2, 6), (1, 9.0, 1, 1), (9, 9.0, 4, 16)),
        ]:
            rule = Lantern(table, k, bound, "bounded")
            trial = Trial(p, None, token, None, 0)
            assert int(rule.absorbed(trial)[2]) == count
            assert float(rule.odds(trial)[0]) == pytest.approx((4 + mass) / 20)
            kept = trial._replace(relaxed=torch.tensor([False]))
            assert float(rule.odds(kept)[0]) == pytest.approx(4 / 20)

    def test_without_relaxation_it_is_exact(self):
        p, q = rows(1, 6, 0, scale=2.0), rows(1, 6, 1)
        for rule in (Lantern(line(6), 3, 0.3), Lantern(line(6), 3, 3.0, "none")):
            torch.testing.assert_close(output(rule, p, 2), p.dense()[0])
            torch.testing.assert_close(output(rule, p, None, q), p.dense()[0])

    @pytest.mark.parametrize("mode", ["bounded", "released"])
    def test_unmarked_nodes_are_exact(self, mode):
        p = rows(1, 6, 0)
        rule = Lantern(line(6), 3, 0.5, mode)
        found = torch.zeros(6, dtype=torch.float64)
        for chance, verdict in outcomes(
            rule, Target(Distribution.cat([p, p])), one_draft([2], [-1]), torch.tensor([[False]])
        ):
            found += chance * (torch.eye(6)[2] if verdict.path[0] else verdict.rest.dense()[0])
        torch.testing.assert_close(found, p.dense()[0])

    def test_bounded_stays_within_delta_and_released_does_not(self):
        """One token chosen without chance, 240 random cases."""
        beyond = 0
        for seed, bound in itertools.product(range(40), (0.01, 0.1, 0.3)):
            p = rows(1, 6, seed, CONFIGS["top-k" if seed % 2 else "plain"], scale=2.0)
            for token in (0, 3):
                distance = {
                    mode: tv(output(Lantern(line(6), 3, bound, mode), p, token), p.dense()[0])
                    for mode in ("bounded", "released")
                }
                assert distance["bounded"] <= bound + 1e-9
                beyond += distance["released"] > bound + 0.05
        assert beyond > 10

    def test_bounded_moves_exactly_what_it_grants(self):
        p, token = rows(1, 6, 5), torch.tensor([2])
        rule = Lantern(line(6), 4, 0.4, "bounded")
        granted = float(rule.absorbed(Trial(p, None, token, None, 0))[1])
        assert granted > 0.1
        assert tv(output(rule, p, 2), p.dense()[0]) == pytest.approx(granted)

    @pytest.mark.parametrize("mode", ["bounded", "released"])
    def test_more_is_accepted_of_sampled_drafts_and_at_most_their_distance_lost(self, mode):
        p, q = rows(1, 6, 0, scale=2.0), rows(1, 6, 1)
        rule = Lantern(line(6), 3, 0.2, mode)
        strict, loose = (
            sum(
                chance * float(q.at(torch.tensor([x])))
                for x in range(6)
                for chance, verdict in outcomes(
                    r, Target(Distribution.cat([p, p])), one_draft([x], [-1], (q,))
                )
                if verdict.path[0]
            )
            for r in (exact, rule)
        )
        assert strict == pytest.approx(1 - tv(p.dense(), q.dense()))
        assert loose > strict + 0.05
        found = output(rule, p, None, q)
        assert float(found.sum()) == pytest.approx(1)
        assert tv(found, p.dense()[0]) > 0.01

    def test_an_empty_released_residual_is_uniform_over_the_codes_only(self):
        """Ids 0 and 1 are text; the published code would go on with any id of the vocabulary."""
        rule = Lantern(line(3), 2, 0.5, "released", ids=torch.tensor([4, 2, 3]))
        trial = Trial(of(0, 0, 1, 1, 0), None, torch.tensor([2]), None, 0)
        assert rule.residual(trial).dense().tolist() == [pytest.approx([0, 0, 1 / 3, 1 / 3, 1 / 3])]
        bounded = Lantern(line(3), 2, 0.5, "bounded", ids=torch.tensor([4, 2, 3]))
        assert bounded.residual(trial).dense().tolist() == [[0, 0, 0.5, 0.5, 0]]

    def test_ids_of_the_vocabulary_and_tables_per_column(self):
        """Code c of column 0 is id 5 − c, of column 1 id 6 + c; other ids are not relaxed."""
        blocks = torch.tensor([5, 4, 3, 2]), torch.tensor([6, 7, 8])
        rule = Lantern((line(4), line(3)), 1, 0.5, "bounded", ids=blocks)
        p = of(*[1] * 9)
        for column, token, near in [(0, 5, 4), (0, 2, 3), (1, 6, 7), (0, 1, None), (1, 5, None)]:
            found, _, count = rule.absorbed(Trial(p, None, torch.tensor([token]), None, column))
            assert int(count) == (near is not None)
            assert near is None or int(found[0, 0]) == near

    def test_greedy_takes_the_deepest_path(self):
        """Node 0 is the arg-max, but node 1 is relaxed and so is its child."""
        first = Distribution.cat([of(4, 5, 1, 0), of(9, 1, 1, 1), of(1, 5, 4, 1), of(1, 2, 3, 4)])
        draft = one_draft([1, 0, 2], [-1, -1, 1])
        strict = Lantern(line(4), 1, 1.1, "released", greedy=True)
        loose = Lantern(line(4), 1, 0.5, "released", greedy=True)
        paths = []
        for rule in (strict, loose):
            verdict = rule(Target(first), draft, lambda n: torch.zeros(1, n))
            paths.append((verdict.path[0], verdict.extra[0]))
        assert paths == [([0], 0), ([1, 2], 3)]
        verdict = loose(Target(first), draft, lambda n: torch.zeros(1, n), torch.zeros(1, 3).bool())
        assert verdict.path == [[0]]

    @pytest.mark.parametrize(
        ("wrong", "named"),
        [({"k": 0}, "k of at least 1"), ({"bound": -1}, "bound"), ({"residual": "all"}, "'all'")],
    )
    def test_wrong_settings_are_refused(self, wrong, named):
        with pytest.raises(ValueError, match=named):
            Lantern(line(4), **wrong)
        with pytest.raises(ValueError, match=r"\[4\].*\[3\]"):
            Lantern(line(4), ids=torch.arange(3))


class TestGrouped:
    def test_a_group_is_tested_together(self):
        p, q = of(1, 2, 3, 4, 10), of(4, 4, 4, 4, 4)
        trial = Trial(p, q, torch.tensor([2]), None, 0)
        over, under = Grouped(size=3).odds(trial)  # one below, one above
        assert (float(over), float(under)) == pytest.approx((9 / 20, 12 / 20))
        over, under = Grouped(size=3, gap=0.04).odds(trial)
        assert (float(over), float(under)) == pytest.approx((3 / 20, 4 / 20))
        # Two below are there, two above too; for the first and the last the order ends too soon.
        assert [
            float(Grouped(size=3).odds(trial._replace(tokens=torch.tensor([x])))[0]) * 20 for x in (0, 4)
        ] == (pytest.approx([1, 10]))
        marked = trial._replace(relaxed=torch.tensor([False]))
        assert float(Grouped(size=3).odds(marked)[0]) == pytest.approx(3 / 20)

    def test_the_embedding_restricts_groups_it_knows(self):
        p, q = of(1, 2, 3, 4, 10), of(4, 4, 4, 4, 4)
        trial = Trial(p, q, torch.tensor([2]), None, 0)
        embedding = torch.tensor([[0.0], [0.5], [0.0], [1.0]])
        over, _ = Grouped(embedding, size=3).odds(trial)  # id 3 is too far from id 2
        assert float(over) == pytest.approx(5 / 20)
        over, _ = Grouped(embedding[:3], size=3).odds(trial)  # id 3 is not known
        assert float(over) == pytest.approx(9 / 20)

    def test_the_residual_is_the_lossless_one(self):
        p, q = rows(1, 6, 0), rows(1, 6, 1)
        trial = Trial(p, q, torch.tensor([2]), None, 0)
        assert torch.equal(Grouped().residual(trial).dense(), Rule().residual(trial).dense())

    def test_chosen_tokens_have_all_of_q(self):
        over, under = Grouped(size=3).odds(Trial(of(1, 2, 3, 4, 10), None, torch.tensor([2]), None, 0))
        assert (float(over), float(under)) == pytest.approx((9 / 20, 1))

    def test_an_empty_group_is_refused(self):
        with pytest.raises(ValueError, match="at least 1"):
            Grouped(size=0)


class TestCouplings:
    @pytest.mark.parametrize("weights", [(1, 3), (7, 2)])
    def test_gumbel_has_the_targets_distribution(self, weights):
        """For each noise of one id the breakpoint in the other's is found by bisection; Gauss-Legendre."""
        p = of(*weights)
        places, shares = (torch.from_numpy(x) for x in np.polynomial.legendre.leggauss(400))
        other = (places + 1) / 2
        low, high = torch.zeros(400).double(), torch.ones(400).double()
        many = p[torch.zeros(400, dtype=torch.long)]
        for _ in range(60):
            middle = (low + high) / 2
            first = gumbel(many, torch.stack([middle, other], dim=1)) == 0
            low, high = torch.where(first, low, middle), torch.where(first, middle, high)
        assert float((shares / 2 * (1 - high)).sum()) == pytest.approx(float(p.probs[0, 0]), abs=1e-6)

    def test_gumbel_over_supports(self):
        """200 000 draws over five ids of which a filter keeps three; six standard errors."""
        p, count = rows(1, 5, 3, CONFIGS["top-k"]), 200_000
        noise = torch.rand(count, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        found = gumbel(p[torch.zeros(count, dtype=torch.long)], noise).bincount(minlength=5) / count
        torch.testing.assert_close(found.double(), p.dense()[0], rtol=0, atol=6 * 0.5 / count**0.5)
        nothing = Distribution(p.ids, torch.zeros_like(p.probs), 5)
        assert int(gumbel(nothing, noise[:1])) == 5

    def test_equal_noise_makes_equal_tokens_likely(self):
        p, q = of(1, 2, 3, 4, 5, 6), of(2, 2, 3, 4, 5, 5)
        every = torch.zeros(4000, dtype=torch.long)
        noise = torch.rand(4000, 6, generator=torch.Generator().manual_seed(1))
        same = float((gumbel(p[every], noise) == gumbel(q[every], noise)).double().mean())
        assert same > 0.85 > 0.25 > float((p.dense() * q.dense()).sum())

    def test_without_replacement(self):
        """Ordered pairs of four ids, by cells between all breakpoints of the two uniforms."""
        p, size = rows(1, 4, 2, CONFIGS["plain"]), 4
        weights = p.dense()[0]
        found = torch.zeros(size, size, dtype=torch.float64)
        firsts = [0.0, *weights.cumsum(0).tolist()]
        for low, high in itertools.pairwise(firsts):
            x = int(p.draw(torch.tensor([(low + high) / 2])))
            seconds = [0.0, *p.without(torch.tensor([x])).dense()[0].cumsum(0).tolist()]
            for lower, higher in itertools.pairwise(seconds):
                if higher - lower > 1e-12:
                    u = torch.tensor([[(low + high) / 2, (lower + higher) / 2]]).double()
                    one, two = without_replacement(p, 2, u)[0].tolist()
                    found[one, two] += (high - low) * (higher - lower)
        expected = weights[:, None] * weights / (1 - weights[:, None])
        torch.testing.assert_close(found, expected.fill_diagonal_(0), rtol=0, atol=1e-9)

    def test_without_replacement_ends_with_the_support(self):
        p = of(0, 3, 0, 1)
        found = without_replacement(p, 3, torch.tensor([[0.1, 0.9, 0.5]]).double())
        assert found.tolist() == [[1, 3, 4]]
