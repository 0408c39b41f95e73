"""Draft heads: published layouts, drafting state and trees, training. The numbers of the published code are
checked by test_verify.py."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lexel.data.packing import pack
from lexel.document import TokenSequence
from lexel.errors import LexelError
from lexel.models import eagle, export_published, find_published, load_drafter, load_published
from lexel.models.causal_lm import CausalLMConfig
from lexel.models.eagle import Eagle, EagleConfig, EagleState, default_feature_layers
from lexel.sample.draft_trees import (
    TreeShape,
    chain,
    dynamic_tree,
    most_probable,
    static_tree,
    tree_shape,
)
from lexel.train.eagle_module import EagleModule, complete_eagle, imitation, take_over
from lexel.train.settings import DrafterStage
from lexel.types import TokenBatch
from lexel.verify.fixture import Fixture

GOLDEN = Path(__file__).parent / "golden" / "eagle_head"
KEY_LISTS = {
    "eagle1_llama_2_chat_7B": "eagle-llama-2-chat-7b",
    "eagle1_llama_2_chat_13B": "eagle-llama-2-chat-13b",
    "eagle1_llama_2_chat_70B": "eagle-llama-2-chat-70b",
    "eagle1_vicuna_7B": "eagle-vicuna-7b",
    "eagle1_vicuna_13B": "eagle-vicuna-13b",
    "eagle1_vicuna_33B": "eagle-vicuna-33b",
    "eagle3_llama3.1_8B": "eagle3-llama-3.1-8b",
    "lantern_llamagen_t2i": "lantern-llamagen-t2i",
    "lantern_llamagen_t2i2": "lantern-llamagen-t2i2",
}
ROWS = {
    "eagle2": "eagle-llama-2-chat-7b",
    "eagle3": "eagle3-llama-3.1-8b",
    "lantern_llamagen": "lantern-llamagen-t2i",
}
SMALL = EagleConfig(vocab_size=23, dim=16, heads=4, kv_heads=2, ffn_dim=24)
KINDS = {
    "eagle": replace(SMALL, layers=2, rope_axes=(0.5, 0.25, 0.25)),
    "eagle3": replace(SMALL, kind="eagle3", draft_vocab=11),
    "raster": replace(SMALL, raster=3, raster_start=4, kv_heads=None),
}


def built(config: EagleConfig) -> Eagle:
    torch.manual_seed(0)
    head = config.build()
    for parameter in head.parameters():
        parameter.data.normal_(std=0.3)
    if config.restricted:
        head.d2t.copy_(torch.arange(config.outputs))  # every second id
        head.t2d.copy_(torch.arange(config.vocab_size) % 2 == 0)
        head.t2d[2 * config.outputs :] = False
    return head.eval()


class TestPublished:
    @pytest.mark.parametrize("name", KEY_LISTS)
    def test_full_size_key_lists_are_consumed_exactly(self, name: str) -> None:
        recorded = json.loads((GOLDEN / "published_keys.json").read_text())[name]
        system, row = find_published(KEY_LISTS[name])
        with torch.device("meta"):
            model = system.config(row.arguments).build()
        assert system.layouts[0].shapes(model) == {key: tuple(shape) for key, shape in recorded}
        assert sum(p.numel() for p in model.parameters()) == row.parameters

    def test_every_list_and_row_is_checked(self) -> None:
        assert set(KEY_LISTS) == set(json.loads((GOLDEN / "published_keys.json").read_text()))
        assert set(KEY_LISTS.values()) == {row.name for system in eagle.SYSTEMS for row in system.rows}

    @pytest.fixture(params=ROWS)
    def loaded(self, request, tmp_path: Path):
        """(row, arguments, weight file, model)"""
        fixture = Fixture(GOLDEN / request.param, tmp_path)
        row = ROWS[request.param]
        arguments = find_published(row)[0].known(fixture.config)
        return row, arguments, fixture.weights(), load_published(row, fixture.weights(), arguments)

    @pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
    def test_export_and_load_again_changes_nothing(self, loaded, suffix: str, tmp_path: Path) -> None:
        row, arguments, _, model = loaded
        export_published(model, row, tmp_path / f"again{suffix}")
        again = load_published(row, tmp_path / f"again{suffix}", arguments)
        assert again.fingerprint() == model.fingerprint()
        model.save_pretrained(tmp_path / "own")
        assert load_drafter(tmp_path / "own").fingerprint() == model.fingerprint()

    def test_a_config_beside_the_weights_is_read(self, loaded, tmp_path: Path) -> None:
        row, arguments, path, model = loaded
        (tmp_path / "config.json").write_text(json.dumps({**arguments, "torch_dtype": "float16"}))
        assert load_published(row, path.parent).fingerprint() == model.fingerprint()

    def test_a_file_without_embedding_waits_for_the_targets(self, tmp_path: Path) -> None:
        model = built(replace(KINDS["eagle3"], draft_vocab=None))
        arguments = {
            "vocab_size": 23, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4,
            "num_key_value_heads": 2, "draft_vocab_size": 23, "rms_norm_eps": 1e-6,
        }  # fmt: skip
        state = {key: value for key, value in model.state_dict().items() if key != "embed_tokens.weight"}
        # Files may carry the identity maps of an unrestricted head.
        maps = {"d2t": torch.zeros(23, dtype=torch.long), "t2d": torch.ones(23, dtype=torch.bool)}
        save_file({**state, **maps}, tmp_path / "head.safetensors")
        bare = load_published("eagle3-llama-3.1-8b", tmp_path / "head.safetensors", arguments)
        ids, features = torch.randint(23, (2, 5)), torch.randn(2, 5, 48)
        with pytest.raises(LexelError, match="adopt_embedding"):
            bare(ids, features)
        with pytest.raises(LexelError, match="23 ids and width 16, got"):
            bare.adopt_embedding(torch.zeros(22, 16))
        bare.adopt_embedding(model.embed_tokens.weight)
        assert torch.equal(bare(ids, features), model(ids, features))
        assert bare.fingerprint() == model.fingerprint()

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling"),
            ({"qkv_bias": True}, "qkv_bias"),
            ({"hidden_act": "gelu"}, "gelu"),
            ({"biass": True}, "no argument biass"),
        ],
    )
    def test_what_is_not_supported_is_said(self, arguments, message: str) -> None:
        system, row = find_published("eagle-vicuna-7b")
        with pytest.raises(LexelError, match=message):
            system.config(row.arguments, arguments)

    def test_a_head_is_not_written_as_another_kind(self, tmp_path: Path) -> None:
        with pytest.raises(LexelError, match="another kind"):
            export_published(built(KINDS["eagle3"]), "eagle-vicuna-7b", tmp_path / "x.pt")
        with pytest.raises(LexelError, match="no published model 'eagle9'"):
            load_published("eagle9", tmp_path)


class TestConfig:
    @pytest.mark.parametrize(
        "wrong",
        [{"kind": "eagle2"}, {"heads": 3}, {"kind": "eagle3", "layers": 2}, {"draft_vocab": 5},
         {"kind": "eagle3", "draft_vocab": 24}, {"kind": "eagle3", "feature_layers": (1, 2)}],
    )  # fmt: skip
    def test_fields_that_disagree_are_refused(self, wrong) -> None:
        with pytest.raises(ValueError, match=r"got|belong|divide"):
            replace(SMALL, **wrong)

    def test_feature_layers(self) -> None:
        assert default_feature_layers(32) == (2, 16, 29)
        assert default_feature_layers(6) == (2, 3, 3)
        assert default_feature_layers(5) == (2, 3, 4)
        assert default_feature_layers(1) == (0, 0, 0)
        assert SMALL.layers_of(32) == ()
        assert replace(KINDS["eagle3"], feature_layers=(0, 1, 2)).layers_of(32) == (0, 1, 2)

    def test_an_eagle3_head_projects_features_by_their_width_alone(self) -> None:
        head = built(replace(KINDS["eagle3"], target_dim=8))
        ids = torch.randint(23, (1, 3))
        narrow, wide = torch.randn(1, 3, 16), torch.randn(1, 3, 24)
        head.fc.weight.data.zero_()
        assert not torch.equal(head(ids, narrow), head(ids, torch.zeros(1, 3, 16)))
        assert torch.equal(head(ids, wide), head(ids, torch.zeros(1, 3, 24)))

    def test_projection_onto_the_targets_ids(self) -> None:
        head, hidden = built(KINDS["eagle3"]), torch.randn(2, 3, 16)
        logits = head.project(hidden)
        assert torch.equal(logits[..., head.draft_ids()], head.draft_logits(hidden))
        assert logits.isfinite().sum() == 2 * 3 * 11
        assert torch.equal(head.project(hidden, None, 4, 9), logits[..., 4:9])
        with pytest.raises(ValueError, match="target's project"):
            built(KINDS["eagle"]).project(hidden)


def random_input(head: Eagle, rows: int, length: int):
    width = 3 * head.config.dim if head.config.kind == "eagle3" else head.config.dim
    return torch.randint(head.config.vocab_size, (rows, length)), torch.randn(rows, length, width)


class TestState:
    @pytest.mark.parametrize("kind", KINDS)
    def test_rows_of_different_length_and_their_trees_are_as_if_alone(self, kind: str) -> None:
        head = built(KINDS[kind])
        ids, features = random_input(head, 2, 9)
        state = EagleState(head, 2, 40)
        with torch.no_grad():
            state.read(ids[:, :5], features[:, :5], counts=[3, 5])
            more = torch.stack([ids[0, 3:7], ids[1, 5:9]]), torch.stack([features[0, 3:7], features[1, 5:9]])
            last = state.read(*more, counts=[4, 2])
            tokens, parents = torch.tensor([[1, 2], [3, 4]]), torch.zeros(2, 2, dtype=torch.long)
            first = state.expand(tokens, parents)
            second = state.expand(torch.tensor([[5, 6], [7, 8]]), torch.tensor([[1, 1], [1, 0]]))
            for row in range(2):
                whole = head(ids[row : row + 1, :7], features[row : row + 1, :7])
                torch.testing.assert_close(last[row], whole[0, -1], atol=1e-5, rtol=1e-5)
                # The way to the second level's first node, on its own.
                path = ids[row : row + 1, :7], features[row : row + 1, :7]
                branch = EagleState(head, 1, 40)
                branch.read(*path)
                upper = branch.expand(tokens[row : row + 1, 1:], torch.zeros(1, 1, dtype=torch.long))
                below = branch.expand(torch.tensor([[5 + 2 * row]]), torch.zeros(1, 1, dtype=torch.long))
                torch.testing.assert_close(first[row, 1], upper[0, 0], atol=1e-5, rtol=1e-5)
                torch.testing.assert_close(second[row, 0], below[0, 0], atol=1e-5, rtol=1e-5)
        assert state.known == [7, 7]

    def test_rows_come_and_go(self) -> None:
        head = built(KINDS["eagle"])
        ids, features = random_input(head, 3, 6)
        together, other = EagleState(head, 2, 20), EagleState(head, 1, 20)
        with torch.no_grad():
            together.read(ids[:2, :4], features[:2, :4])
            together.expand(torch.zeros(2, 1, dtype=torch.long), torch.zeros(2, 1, dtype=torch.long))
            other.read(ids[2:, :3], features[2:, :3])
            together.join(other)
            together.select([2, 0])
            assert together.known == [3, 4]
            now = torch.stack([ids[2, 3:5], ids[0, 4:6]]), torch.stack([features[2, 3:5], features[0, 4:6]])
            last = together.read(*now)
            torch.testing.assert_close(last[0], head(ids[2:, :5], features[2:, :5])[0, -1])
            torch.testing.assert_close(last[1], head(ids[:1], features[:1])[0, -1])

    def test_reading_nothing_or_expanding_nothing_is_refused(self) -> None:
        state = EagleState(built(KINDS["eagle"]), 1, 8)
        with pytest.raises(ValueError, match="call read first"):
            state.expand(torch.zeros(1, 1, dtype=torch.long), torch.zeros(1, 1, dtype=torch.long))
        with pytest.raises(ValueError, match="counts"):
            state.read(torch.zeros(1, 2, dtype=torch.long), torch.zeros(1, 2, 16), counts=[0])


class Table:
    """`expand` of a model without memory: row r after token t has the log-probabilities ``table[r, t]``."""

    def __init__(self, rows: int, size: int, blocked: float = 0.0) -> None:
        generator = torch.Generator().manual_seed(1)
        scores = 2 * torch.randn(rows, size + 1, size, generator=generator)
        scores[torch.rand(scores.shape, generator=generator) < blocked] = -torch.inf
        self.table = scores.log_softmax(-1)
        self.size = size

    @property
    def root(self) -> torch.Tensor:
        return self.table[:, self.size]

    def __call__(self, tokens: torch.Tensor, parents: torch.Tensor) -> torch.Tensor:
        return self.table[torch.arange(len(tokens))[:, None], tokens]


def words(tree, row: int) -> list[tuple[int, ...]]:
    """The nodes of a row as paths of tokens."""
    found: list[tuple[int, ...]] = []
    for token, parent in list(zip(tree.tokens[row].tolist(), tree.parents[row].tolist()))[
        : int(tree.lengths[row])
    ]:
        found.append((*(found[parent] if parent >= 0 else ()), token))
    return found


class TestDynamicTree:
    def test_with_width_to_spare_it_holds_the_most_probable_nodes(self) -> None:
        table = Table(2, 3)
        tree = dynamic_tree(table.root, table, width=27, depth=0, nodes=9)
        assert tree.lengths.tolist() == [3, 3]
        # A width of all ids prunes the frontier: compare with a search that does the same.
        tree = dynamic_tree(table.root, table, width=3, depth=2, nodes=7)
        for row in range(2):
            scores: dict[tuple[int, ...], float] = {(t,): float(table.root[row, t]) for t in range(3)}
            frontier = sorted(scores, key=lambda w: -scores[w])
            for _ in range(2):
                grown = {
                    (*w, t): scores[w] + float(table.table[row, w[-1], t]) for w in frontier for t in range(3)
                }
                scores |= grown
                frontier = sorted(grown, key=lambda w: -grown[w])[:3]
            assert set(words(tree, row)) == set(sorted(scores, key=lambda w: -scores[w])[:7])

    def test_rows_do_not_know_of_each_other(self) -> None:
        table = Table(3, 9, blocked=0.75)
        tree = dynamic_tree(table.root, table, width=4, depth=3, nodes=14)
        assert len(set(tree.lengths.tolist())) > 1
        for row in range(3):
            single = Table(3, 9, blocked=0.75)
            single.table = single.table[row : row + 1]
            alone = dynamic_tree(single.root, single, width=4, depth=3, nodes=14)
            assert words(alone, 0) == words(tree, row)

    def test_forbidden_tokens_are_never_drafted(self) -> None:
        table = Table(4, 6, blocked=0.8)
        table.table[0] = -torch.inf
        tree = dynamic_tree(table.root, table, width=4, depth=2, nodes=12)
        assert tree.lengths[0] == 0
        for row in range(4):
            for word in words(tree, row):
                ways = zip((6, *word), word)
                assert all(table.table[row, before, after] > -torch.inf for before, after in ways)

    def test_tables_of_a_tree(self) -> None:
        table = Table(1, 5)
        tree = dynamic_tree(table.root, table, width=2, depth=1, nodes=5)
        assert (tree.parents[0] < torch.arange(len(tree.parents[0]))).all()
        assert tree.depths[0].tolist() == [0, *(len(word) for word in words(tree, 0))]
        assert sorted({node for path in tree.paths(0) for node in path}) == list(range(6))
        for node, source in enumerate(tree.sources[0].tolist()):
            assert (source == 0) == (tree.parents[0, node] == -1)

    @pytest.mark.parametrize("wrong", [{"width": 0}, {"depth": -1}, {"nodes": 0}])
    def test_sizes_below_one_are_refused(self, wrong) -> None:
        table = Table(1, 5)
        with pytest.raises(ValueError, match="a tree needs"):
            dynamic_tree(table.root, table, **{"width": 2, "depth": 1, "nodes": 5, **wrong})


class TestStaticTree:
    @pytest.mark.parametrize(
        ("name", "nodes", "depth"),
        [("mc_sim_7b_63", 25, 5), ("mc_sim_7b_63_balanced", 25, 5), ("naive_extend_57", 57, 5),
         ("medusa_2_7b_63", 63, 4), ("reverse_balanced_25", 25, 5), ("chain", 5, 5)],
    )  # fmt: skip
    def test_published_shapes(self, name: str, nodes: int, depth: int) -> None:
        shape = tree_shape(name)
        assert (len(shape.choices), shape.depth) == (nodes, depth)
        assert shape == TreeShape.of(reversed([list(path) for path in shape.choices]))

    def test_unknown_and_broken_shapes(self) -> None:
        with pytest.raises(LexelError, match="no tree shape 'oak'"):
            tree_shape("oak")
        for wrong in ([[0, 1]], [], [[0], [0]], [[-1]], [[]]):
            with pytest.raises(LexelError, match="paths"):
                TreeShape.of(wrong)

    def test_children_are_the_best_in_their_order(self) -> None:
        table = Table(2, 12)
        shape = tree_shape("mc_sim_7b_63")
        tree = static_tree(table.root, table, shape, most_probable)
        for row in range(2):
            expected = []
            for path in shape.choices:
                word: tuple[int, ...] = ()
                for rank in path:
                    scores = table.table[row, word[-1] if word else 12]
                    word += (int(scores.argsort(descending=True)[rank]),)
                expected.append(word)
            assert words(tree, row) == expected

    def test_nodes_without_a_token_are_left_out_with_all_below(self) -> None:
        table = Table(5, 6, blocked=0.6)
        tree = static_tree(table.root, table, tree_shape("naive_extend_57"), most_probable)
        full = tree_shape("naive_extend_57")
        for row in range(5):
            ways = []
            for path in full.choices:
                word: tuple[int, ...] = ()
                for rank in path:
                    allowed = table.table[row, word[-1] if word else 6]
                    order = [int(t) for t in allowed.argsort(descending=True) if allowed[t] > -torch.inf]
                    if rank >= len(order):
                        break
                    word += (order[rank],)
                else:
                    ways.append(word)
            assert words(tree, row) == ways

    def test_sources_say_what_a_token_was_drawn_from(self) -> None:
        table, listed = Table(2, 12), []

        def choose(scores, count):
            listed.append(scores)
            return most_probable(scores, count)

        tree = static_tree(table.root, table, tree_shape("reverse_balanced_25"), choose)
        given = torch.cat(listed, dim=1)
        for row in range(2):
            for word, source in zip(words(tree, row), tree.sources[row].tolist()):
                before = word[-2] if len(word) > 1 else 12
                assert torch.equal(given[row, source], table.table[row, before])

    def test_a_chain_of_any_length(self) -> None:
        table = Table(1, 4)
        tree = static_tree(table.root, table, chain(3), most_probable)
        assert tree.parents.tolist() == [[-1, 0, 1]]


LM = CausalLMConfig(vocab_size=40, dim=16, layers=4, heads=2, rope_axes=(0.5, 0.25, 0.25), max_length=32)
STAGE = DrafterStage(steps=10, ema=0.0)


def documents(count: int, length: int = 10) -> list[TokenSequence]:
    generator = torch.Generator().manual_seed(2)
    sequences = []
    for number in range(count):
        size = length - number
        positions = torch.zeros(size, 3, dtype=torch.long)
        positions[:, 0] = torch.arange(size)
        positions[4:, 1:] = torch.stack([torch.arange(size - 4) // 2 + 1, torch.arange(size - 4) % 2 + 1], -1)
        ids = torch.randint(1, 40, (size,), generator=generator)
        mask = torch.arange(size) > 1
        sequences.append(TokenSequence(ids, (torch.arange(size) >= 4).long(), positions, mask))
    return sequences


def alone(sequence: TokenSequence) -> TokenBatch:
    return TokenBatch(
        sequence.ids[None],
        sequence.modality[None],
        sequence.positions[None],
        loss_mask=sequence.loss_mask[None],
    )


def module_of(kind: str, **stage) -> EagleModule:
    torch.manual_seed(0)
    lm = LM.build()
    for parameter in lm.parameters():
        parameter.data.add_(0.5 * torch.randn_like(parameter))
    head = complete_eagle(partial(EagleConfig, kind=kind), LM).build()
    return EagleModule(take_over(head, lm, output=True), lm, replace(STAGE, **stage))


class TestTraining:
    @pytest.mark.parametrize("kind", ["eagle", "eagle3"])
    def test_one_batch_is_learnt_by_every_parameter(self, kind: str) -> None:
        module = module_of(kind, noise=0.0, unroll=3)
        head, batch = module.network, pack(documents(4), 20, 0)
        learning = {name: p for name, p in head.named_parameters() if p.requires_grad}
        assert set(learning) == {name for name, _ in head.named_parameters()} - {"embed_tokens.weight"}
        optimizer = torch.optim.AdamW(learning.values(), lr=1e-2)
        losses, metrics = [], {}
        for _ in range(120):
            optimizer.zero_grad()
            loss, metrics = module.compute(head, batch)
            loss.backward()
            assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in learning.values())
            optimizer.step()
            losses.append(float(loss.detach()))
        assert losses[-1] < 0.4 * losses[0]
        if kind == "eagle":
            assert metrics["feature"] < 1e-3
            assert metrics["agreement"] == 1
        else:
            assert min(metrics[f"agreement_{step}"] for step in range(3)) > 0.8

    def test_the_target_stays_as_it_is_and_out_of_checkpoints(self) -> None:
        module = module_of("eagle")
        target = module._target[0]
        assert not any(p.requires_grad for p in target.parameters())
        assert {name.split(".")[0] for name in module.state_dict()} == {"network"}
        embedding = module.network.embed_tokens.weight
        assert torch.equal(embedding, target.model.embed_tokens.weight)
        assert embedding.data_ptr() != target.model.embed_tokens.weight.data_ptr()

    @pytest.mark.parametrize("kind", ["eagle", "eagle3"])
    def test_packed_documents_count_as_if_alone(self, kind: str) -> None:
        module = module_of(kind, noise=0.0, unroll=3)
        sequences = documents(3)
        with torch.no_grad():
            together = module.compute(module.network, pack(sequences, 40, 0))[1]
            singles = [module.compute(module.network, alone(sequence))[1] for sequence in sequences]
        for step in range(1 if kind == "eagle" else 3):
            key = "token" if kind == "eagle" else f"token_{step}"
            # Pairs that count: positions that predict, from the second pair on.
            counts = [float(s.loss_mask[2 + step :].sum()) for s in sequences]
            mean = sum(float(m[key]) * n for m, n in zip(singles, counts)) / sum(counts)
            assert float(together[key]) == pytest.approx(mean, rel=1e-4)

    @torch.no_grad()
    def test_noise_is_for_training_only(self) -> None:
        module = module_of("eagle", noise=0.2, ema=0.9)
        batch = pack(documents(2), 20, 0)
        module.average.load_state_dict(module.network.state_dict())
        calm = [float(module.compute(module.average, batch)[0]) for _ in range(2)]
        noisy = [float(module.compute(module.network, batch)[0]) for _ in range(2)]
        assert calm[0] == calm[1]
        assert noisy[0] != noisy[1]

    def test_the_training_time_test_is_what_drafting_does(self) -> None:
        """Step i at pair t = the i-th node of a chain of true tokens drafted after t + 1 tokens were read."""
        module = module_of("eagle3", unroll=4)
        head, sequence = module.network.eval(), documents(1)[0]
        batch = alone(sequence)
        outputs: list[torch.Tensor] = []
        head.register_forward_hook(lambda *call: outputs.append(call[-1]))
        with torch.no_grad():
            module.compute(head, batch)
            hidden, inputs = module._target[0].decode(batch, layers=module._layers)
            features = head.features(module._layers, hidden, inputs)
            outputs = outputs[:4]
            for t in (0, 3):
                state = EagleState(head, 1, 32)
                ids, positions = batch.ids[:, 1:], batch.positions[:, 1:]
                out = state.read(ids[:, : t + 1], features[:, : t + 1], positions[:, : t + 1])
                torch.testing.assert_close(out[0], outputs[0][0, t])
                for step in range(1, 4):
                    node = slice(t + step, t + step + 1)
                    out = state.expand(ids[:, node], torch.zeros(1, 1, dtype=torch.long), positions[:, node])
                    torch.testing.assert_close(out[0, 0], outputs[step][0, t], atol=1e-5, rtol=1e-4)

    def test_a_part_of_the_vocabulary(self) -> None:
        target = torch.tensor([[0.0, 5.0, 1.0], [4.0, 0.0, 1.0]])
        drafted = torch.tensor([False, True, True])
        loss, agreement = imitation(torch.tensor([[2.0, 1.0], [1.0, 2.0]]), target, drafted)
        wanted = -(torch.tensor([5.0, 1.0]).softmax(0) * torch.tensor([2.0, 1.0]).log_softmax(0)).sum()
        assert float(loss) == pytest.approx(float(wanted))
        assert agreement == 1

    def test_clipping_is_by_value_or_by_norm(self) -> None:
        DrafterStage(clip_by="value").check("drafter")
        with pytest.raises(ValueError, match="clip_by"):
            DrafterStage(clip_by="nrom").check("drafter")
        with pytest.raises(ValueError, match="unroll"):
            DrafterStage(unroll=0).check("drafter")
        seen = []
        module = module_of("eagle", clip_by="value")
        module.clip_gradients = lambda *args: seen.append(args)  # type: ignore[method-assign]
        module.configure_gradient_clipping("optimizer", 0.5)  # type: ignore[arg-type]
        assert seen == [("optimizer", 0.5, "value")]

    def test_targets_and_options_that_do_not_fit(self) -> None:
        several = replace(LM, head="parallel", codebook_sizes=(4, 4), code_offsets=(0, 4))
        with pytest.raises(LexelError, match="one code per position"):
            complete_eagle(partial(EagleConfig), several)
        with pytest.raises(LexelError, match=r"set drafter\.dim=null"):
            complete_eagle(partial(EagleConfig, dim=8), LM)
        with pytest.raises(LexelError, match="draft_vocab=null"):
            complete_eagle(partial(EagleConfig, kind="eagle3", draft_vocab=8), LM)
        with pytest.raises(LexelError, match=r"blocks are 0\.\.3"):
            complete_eagle(partial(EagleConfig, kind="eagle3", feature_layers=(1, 2, 4)), LM)
        assert complete_eagle(partial(EagleConfig, dim=None, heads=4), LM).head_width == 4
