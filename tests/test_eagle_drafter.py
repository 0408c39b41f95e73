"""Draft heads in the decode loop: lossless in all three forms, and what they have read is what was said."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from decoding_fakes import RASTER, codec, log_probabilities, model, prompts, whole_sequences

from lexel.document import Grammar, Image, Text
from lexel.errors import LexelError
from lexel.models.causal_lm import CausalLMConfig
from lexel.models.eagle import EagleConfig, EagleState
from lexel.sample.decode import generate
from lexel.sample.draft_trees import TreeShape
from lexel.sample.drafters import EagleDrafter, EagleStaticDrafter, EagleTreeDrafter
from lexel.sample.drafters.eagle import UNLIKELY
from lexel.sample.generator import Generator, Request
from lexel.sample.logits import SamplingConfig
from lexel.sample.pipeline import Pipeline
from lexel.sample.policy import Policy
from lexel.sample.strategies import make_drafter, strategies
from lexel.tokenizers.layout import CodeLayout
from lexel.train.finish import load_part
from lexel.types import TokenBatch

FLEXIBLE = CodeLayout((6,), length=7, flexible=True)
TEXTS = ["a", "ab ba", "", "b a b a b"]
SAMPLED = {"image": SamplingConfig(temperature=1.3, guidance=1.5, min_p=0.02), "text": SamplingConfig()}
SHAPE = TreeShape.of([(0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (0, 0, 0)])
KINDS = {
    "eagle": {},
    "deep": {"layers": 2, "rope_axes": (0.5, 0.25, 0.25)},
    "eagle3": {"kind": "eagle3"},
    "part": {"kind": "eagle3", "draft_vocab": 9},
}
FORMS = {
    "chain": lambda lm, head, window: EagleDrafter(lm, head, window),
    "guided": lambda lm, head, window: EagleDrafter(lm, head, window, guided=True),
    "tree": lambda lm, head, window: EagleTreeDrafter(lm, head, window, width=2, nodes=6, guided=True),
    "static": lambda lm, head, window: EagleStaticDrafter(lm, head, SHAPE.clipped(window)),
}


def head_for(lm, kind="eagle", seed=1, scale=0.4):
    """A random head; with a part of the vocabulary it drafts every id up to the part's size but the first."""
    config = EagleConfig(lm.config.vocab_size, lm.config.dim, heads=2, ffn_dim=32, **KINDS[kind])
    head = config.build().to(next(lm.parameters()).dtype).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) * scale)
    head.adopt_embedding(lm.model.embed_tokens.weight)
    if config.restricted:
        head.d2t.fill_(1)
        head.t2d.copy_(
            (torch.arange(config.vocab_size) > 0) & (torch.arange(config.vocab_size) <= config.outputs)
        )
    return head


def settings(temperature, guidance):
    return {name: SamplingConfig(temperature=temperature, guidance=guidance) for name in ("image", "text")}


def decode(lm, kit, plan, sampling, drafter=None, texts=TEXTS, **options):
    guided = any(config.guidance != 1 for config in sampling.values())
    return generate(
        lm,
        prompts(kit, texts),
        Grammar(kit, plan, text_limit=6),
        unconditional=prompts(kit, texts, unconditional=True) if guided else None,
        sampling=sampling,
        drafter=drafter,
        generator=torch.Generator().manual_seed(0),
        **options,
    )


@pytest.mark.parametrize("guidance", [1.0, 1.7])
@pytest.mark.parametrize("layout", [RASTER, FLEXIBLE], ids=["raster", "flexible"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["deep", "part"])
def test_greedy_drafts_change_no_token(kind, form, layout, guidance):
    """Text and pictures, prompts of different lengths, in float64."""
    kit = codec(layout)
    lm, greedy = model(kit, layers=3), settings(0, guidance)
    plan = ("image", "text", "image")
    plain, _, _ = decode(lm, kit, plan, greedy)
    ids, _, stats = decode(lm, kit, plan, greedy, FORMS[form](lm, head_for(lm, kind), 3))
    assert all(torch.equal(a, b) for a, b in zip(plain, ids, strict=True))
    assert sum(stats.accept_lengths) == sum(map(len, ids))
    assert stats.draft_forwards > 0


@pytest.mark.parametrize("form", FORMS)
def test_what_is_greedy_has_siblings_in_trees(form):
    """Drafted from the softmax, a random head's tree is right where its single guess is not; then a greedy
    text behind a drawn picture."""
    kit = codec(RASTER)
    lm, sampling = model(kit), settings(0, 1.0)
    head = head_for(lm)
    chain = decode(lm, kit, ("image",), sampling, EagleDrafter(lm, head, 3))[2]
    other = decode(lm, kit, ("image",), sampling, FORMS[form](lm, head, 3))[2]
    assert other.mean_accepted > chain.mean_accepted or form not in ("tree", "static")
    mixed = {"image": SamplingConfig(), "text": SamplingConfig(temperature=0)}
    decode(lm, kit, ("image", "text"), mixed, FORMS[form](lm, head, 3))


@pytest.mark.parametrize("form", FORMS)
def test_samples_have_the_targets_distribution(form):
    """Chi-square of flexible pictures and a letter after them with larger trees than can be enumerated, error
    rate 1e-3 by the Wilson-Hilferty quantile."""
    kit, count = codec(CodeLayout((2,), length=3, flexible=True)), 800
    lm, grammar = model(kit, scale=0.7), Grammar(kit, ("image", "text"), text_limit=1)
    prompt, null = prompts(kit, ["ab"])[0], prompts(kit, ["ab"], unconditional=True)[0]
    ids, _, stats = generate(
        lm,
        [prompt] * count,
        grammar,
        unconditional=[null] * count,
        sampling=SAMPLED,
        drafter=FORMS[form](lm, head_for(lm), 3),
        generator=torch.Generator().manual_seed(5),
    )
    every = list(whole_sequences(kit, grammar, prompt))
    numbers = {tuple(line.tolist()): number for number, line in enumerate(every)}
    found = torch.zeros(len(every))
    for row in ids:
        found[numbers[tuple(row.tolist())]] += 1
    logs = [log_probabilities(lm, kit, grammar, prompt, null, SAMPLED, line).sum() for line in every]
    share = torch.stack(logs).exp() * count
    rare = share < 5
    found, share = (torch.cat([x[~rare], x[rare].sum()[None]]) for x in (found, share))
    statistic = float(((found - share).square() / share).sum())
    freedom, spread = len(share) - 1, 2 / (9 * (len(share) - 1))
    assert statistic < freedom * (1 - spread + 3.0902 * spread**0.5) ** 3
    assert stats.mean_accepted > 1.2


def policies(kit):
    """Plans and settings that differ in everything."""
    greedy = settings(0, 1.4)
    return [
        Policy(Grammar(kit, ("image", "text"), text_limit=4), SAMPLED),
        Policy(Grammar(kit, ("text",), text_limit=9), {"text": SamplingConfig(temperature=0.8)}),
        Policy(Grammar(kit, ("image",)), greedy),
        Policy(Grammar(kit, ("text", "image"), text_limit=3), settings(1.0, 0.6)),
    ]


def request(kit, policy, text, seed):
    first = Text.blank() if policy.grammar.plan[0] == "text" else Image.blank()
    document = [Image.blank()] if not text else [Text(text), first]
    document = [first] if not text else document
    null = kit.unconditional(document) if policy.guided else None
    return Request(kit.prompt(document), null, policy, seed)


def fresh(drafter, lm, kit, row, twin):
    """A head's state that reads a row's whole known sequence, with the features of one uncached pass."""
    state, places = row.policy.grammar.start(row.prompt), []
    for (token,) in row.ids:
        places.append((row.policy.grammar.modality(state), row.policy.grammar.position(state)))
        state = row.policy.grammar.advance(state, token)
    shift = len(twin) - len(row.prompt)
    ids = torch.cat([twin.ids, torch.tensor([token for (token,) in row.ids], dtype=torch.long)])[None]
    modality = torch.cat([twin.modality, torch.tensor([m for m, _ in places], dtype=torch.long)])[None]
    moved = [(t + shift, r, c) for _, (t, r, c) in places]
    positions = torch.cat([twin.positions, torch.tensor(moved, dtype=torch.long).reshape(-1, 3)])[None]
    hidden, inputs = lm.decode(TokenBatch(ids, modality, positions), layers=drafter.layers)
    features = drafter.head.features(drafter.layers, hidden, inputs)
    read = EagleState(drafter.head, 1, ids.shape[1])
    if ids.shape[1] > 1:
        read.read(ids[:, 1:], features[:, :-1], positions[:, 1:])
    return read.cache, read.known[0]


@pytest.mark.parametrize("kind", ["deep", "eagle3"])
@pytest.mark.parametrize("form", FORMS)
def test_the_heads_cache_holds_what_a_fresh_reading_would(form, kind):
    """In every round, with other rows coming and leaving, prompts of one token among them, and random
    accepted paths. Nothing else of the past enters what is drafted."""
    kit = codec(FLEXIBLE)
    lm = model(kit, layers=3, scale=0.5)
    drafter = FORMS[form](lm, head_for(lm, kind), 3)
    compared = 0
    original = drafter._root

    def root(session):
        nonlocal compared
        growth = original(session)
        for row, lanes in zip(session.rows, drafter.rows, strict=True):
            twins = [row.prompt, row.null] if row.null and drafter.guided else [row.prompt]
            for lane, twin in zip(lanes, twins, strict=True):
                cache, known = fresh(drafter, lm, kit, row, twin)
                assert drafter.state.known[lane.number] == known
                for name in ("keys", "values"):
                    own = getattr(drafter.state.cache, name)[:, lane.number, :, :known]
                    torch.testing.assert_close(own, getattr(cache, name)[:, 0, :, :known])
                    compared += own.numel()
        return growth

    drafter._root = root
    queue = Generator(lm, drafter=drafter, rows=3)
    asked = [
        request(kit, policy, text, seed)
        for seed, (policy, text) in enumerate(
            zip([*policies(kit), *policies(kit)], ["", "a", "ab ba", "", *TEXTS])
        )
    ]
    queue.wait([queue.submit(one) for one in asked])
    assert compared > 5_000


@pytest.mark.parametrize("form", FORMS)
def test_a_row_does_not_notice_the_others(form):
    kit = codec(FLEXIBLE)
    lm = model(kit, scale=0.5)
    asked = [request(kit, policy, text, 7) for policy in policies(kit) for text in ("ab", "b a a")]

    def generated(rows):
        queue = Generator(lm, drafter=FORMS[form](lm, head_for(lm), 3), rows=rows)
        tickets = [queue.submit(one) for one in asked]
        queue.wait(tickets)
        return [ticket.ids for ticket in tickets]

    for alone, together in zip(generated(1), generated(5), strict=True):
        assert torch.equal(alone, together)


@pytest.mark.parametrize("form", FORMS)
def test_logits_processors_see_what_stands_before(form):
    """A processor that forbids repeating the last id, greedily: as in plain decoding."""
    kit = codec(RASTER)
    lm = model(kit)

    def never_twice(ids, scores):
        return scores.index_fill(1, ids[0, -1:], -torch.inf)

    sampling = settings(0, 1.0)
    plain, _, _ = decode(lm, kit, ("image",), sampling, processors=[never_twice])
    ids, _, _ = decode(
        lm, kit, ("image",), sampling, FORMS[form](lm, head_for(lm), 3), processors=[never_twice]
    )
    assert all(torch.equal(a, b) for a, b in zip(plain, ids, strict=True))
    assert all((row[1:] != row[:-1]).all() for row in ids)


@pytest.mark.parametrize("form", FORMS)
def test_after_an_error_the_next_generation_is_as_the_first(form):
    kit = codec(RASTER)
    lm = model(kit)
    drafter = FORMS[form](lm, head_for(lm), 3)
    first = decode(lm, kit, ("image",), SAMPLED, drafter)
    broken = lm.model.norm.weight.detach().clone()
    with torch.no_grad():
        lm.model.norm.weight.fill_(torch.nan)
    with pytest.raises(LexelError, match="not finite"):
        decode(lm, kit, ("image",), SAMPLED, drafter)
    with torch.no_grad():
        lm.model.norm.weight.copy_(broken)
    again = decode(lm, kit, ("image",), SAMPLED, drafter)
    assert all(torch.equal(a, b) for a, b in zip(first[0], again[0], strict=True))


def test_a_perfect_head_is_always_accepted():
    """A target without blocks says what follows from the last id alone, and so can a head."""
    kit = codec(RASTER)
    lm = model(kit, layers=1)
    head = head_for(lm)
    with torch.no_grad():
        for layer in (*lm.model.layers, *head.layers):
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        # The norm is left to the target: rows of the head's input are scaled as there.
        lm.model.norm.weight.fill_(1)
        table = lm.model.embed_tokens.weight
        table.div_(table.square().mean(-1, keepdim=True).sqrt())
        head.adopt_embedding(table)
        head.fc.weight.zero_()
        head.fc.weight[:, : lm.config.dim] = torch.eye(lm.config.dim)
        head.fc.bias.zero_()
    sampling = {"image": SamplingConfig(temperature=0.8, guidance=2.0)}
    _, _, stats = decode(lm, kit, ("image",), sampling, EagleDrafter(lm, head, 3))
    assert stats.accept_lengths == (4, 2) * len(TEXTS)
    # By round: 1 for the prompts, 3 in the first round, 1 in the second, whose last token comes for free.
    assert (stats.target_forwards, stats.draft_forwards) == (2, 5)


def test_ids_that_a_head_cannot_draft_are_unlikely_not_impossible():
    kit = codec(RASTER)
    lm = model(kit)
    drafter = EagleDrafter(lm, head_for(lm, "part"), 2)
    logits = drafter.output.project(torch.randn(2, lm.config.dim, dtype=torch.float64))
    assert logits.shape == (2, kit.vocabulary.size)
    assert (logits[:, 0] == UNLIKELY).all()
    assert (logits[:, 10:] == UNLIKELY).all()
    assert (logits[:, 1:10] > UNLIKELY).all()


def test_a_head_without_an_embedding_takes_the_targets():
    kit = codec(RASTER)
    lm = model(kit)
    given = head_for(lm)
    bare = replace(given.config, embedding=False).build().double()
    bare.load_state_dict({k: v for k, v in given.state_dict().items() if "embed" not in k}, strict=True)
    one = decode(lm, kit, ("image",), SAMPLED, EagleDrafter(lm, given))
    two = decode(lm, kit, ("image",), SAMPLED, EagleDrafter(lm, bare))
    assert all(torch.equal(a, b) for a, b in zip(one[0], two[0], strict=True))
    assert one[2].accept_lengths == two[2].accept_lengths


def test_unfit_heads_are_refused():
    kit = codec(RASTER)
    lm = model(kit)
    with pytest.raises(LexelError, match="must be the same"):
        EagleDrafter(lm, EagleConfig(5, 16, heads=2, ffn_dim=8).build())
    with pytest.raises(LexelError, match="features of width 8"):
        EagleDrafter(lm, EagleConfig(kit.vocabulary.size, 8, heads=2, ffn_dim=8).build())
    with pytest.raises(ValueError, match="width and nodes"):
        EagleTreeDrafter(lm, head_for(lm), width=0)
    several = codec(CodeLayout((3, 4), grid=(2, 2)))
    with pytest.raises(LexelError, match="one code per position, this model has 2"):
        EagleDrafter(model(several), EagleConfig(several.vocabulary.size, 16, heads=2, ffn_dim=8).build())


def test_strategies_are_named_after_the_part():
    kit = codec(RASTER)
    lm = model(kit)
    known = strategies(lm, {"swift": head_for(lm)})
    made = [make_drafter(known, lm, name, 2) for name in ("swift", "swift-tree", "swift-static")]
    assert [type(drafter) for drafter in made] == [EagleDrafter, EagleTreeDrafter, EagleStaticDrafter]
    assert [drafter.window for drafter in made] == [2, 2, 2]


def test_a_trained_head_becomes_a_part_of_the_bundle(tmp_path):
    """As the chain of training loads it, and as a bundle keeps it."""
    pipe = Pipeline.from_pretrained()
    head_for(pipe.lm.float()).save_pretrained(tmp_path / "run" / "drafter")
    chain = SimpleNamespace(part_folder=lambda name: tmp_path / "run" / name, fingerprint="")
    pipe.drafters["swift"] = load_part(chain, "drafter")
    pipe.save_pretrained(tmp_path / "bundle")
    again = Pipeline.from_pretrained(tmp_path / "bundle")
    assert {"swift", "swift-tree", "swift-static"} <= set(again.strategies)
    document, greedy = [Text("a red circle"), Image.blank()], SamplingConfig(temperature=0)
    plain = again(document, sampling=greedy, decoding="plain")
    assert torch.equal(again(document, sampling=greedy, decoding="swift-tree").ids[0], plain.ids[0])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_packed_heads_draft_too(dtype):
    from lexel.models.packed import pack

    kit = codec(RASTER)
    lm = model(kit, dim=32, heads=4).float()
    head = head_for(lm)
    small = pack(lm, dtype)
    greedy = settings(0, 1.5)
    plain, _, _ = decode(small, kit, ("image",), greedy)
    for make in FORMS.values():
        ids, _, stats = decode(small, kit, ("image",), greedy, make(small, pack(head, dtype), 3))
        assert all(torch.equal(a, b) for a, b in zip(plain, ids, strict=True)) or dtype != "float32"
        assert stats.mean_accepted > 1


def test_a_head_for_a_model_of_one_dimension():
    """As the published ones: positions are counted, pictures or not."""
    kit = codec(RASTER)
    assert CausalLMConfig(9, dim=8, heads=2).rope_axes == KINDS["eagle"].get("rope_axes", (1.0, 0.0, 0.0))
    lm = model(kit, rope_axes=(1.0, 0.0, 0.0))
    plain, _, _ = decode(lm, kit, ("image", "text"), settings(0, 1.0))
    ids, _, _ = decode(lm, kit, ("image", "text"), settings(0, 1.0), EagleDrafter(lm, head_for(lm), 4))
    assert all(torch.equal(a, b) for a, b in zip(plain, ids, strict=True))
