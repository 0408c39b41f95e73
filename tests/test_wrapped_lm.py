"""Networks of transformers behind Lexel's calls: equal to their own logits and to their own `generate`."""

from functools import partial

import pytest
import torch
from decoding_fakes import RASTER, codec, prompts
from torch.optim import AdamW
from wrapped_fakes import FAMILIES, GPT, network, wrapped

from lexel.data.packing import pack
from lexel.document import Grammar, Image, Text
from lexel.errors import LexelError
from lexel.models.wrapped_lm import WrappedLM
from lexel.sample.decode import generate
from lexel.sample.drafters import JacobiDrafter, LookupDrafter, PacDrafter
from lexel.sample.generator import Generator, Request
from lexel.sample.logits import SamplingConfig
from lexel.sample.lossy import AcceptanceConfig, make_acceptance
from lexel.sample.pipeline import Pipeline
from lexel.sample.policy import Policy
from lexel.train.lm_module import LMModule
from lexel.train.objectives.lm import NextTokenObjective
from lexel.train.settings import LMStage
from lexel.types import Codes, TokenBatch

KIT = codec(RASTER)
TEXTS = ["a", "ab ba", "b a b a b"]
GREEDY = {"image": SamplingConfig(temperature=0)}
GUIDED = {"image": SamplingConfig(temperature=0, guidance=2.0)}
THREE = ["GPT2", "GPTNeoX", "OPT"]


def batch(ids, first=0):
    positions = torch.zeros(*ids.shape, 3, dtype=torch.long)
    positions[..., 0] = first + torch.arange(ids.shape[1])
    return TokenBatch(ids, torch.zeros_like(ids), positions)


def some_ids(rows=2, length=9, seed=3):
    return torch.randint(KIT.vocabulary.size, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_and_cached_steps_are_the_networks_own(name):
    lm = wrapped(name, KIT)
    ids = some_ids()
    with torch.no_grad():
        own = lm.network(ids).logits
        torch.testing.assert_close(lm(batch(ids)).logits, own, atol=1e-4, rtol=1e-4)
        cache = lm.new_cache(2, 12)
        steps = [
            lm(batch(ids[:, :4]), cache),
            lm(batch(ids[:, 4:5], 4), cache),
            lm(batch(ids[:, 5:], 5), cache),
        ]
        cached = torch.cat([step.logits for step in steps], dim=1)
        torch.testing.assert_close(cached, own, atol=1e-4, rtol=1e-4)
        hidden = lm.decode(batch(ids))[0]
        torch.testing.assert_close(lm.project(hidden, 3, 7), own[..., 3:7], atol=1e-4, rtol=1e-4)
    assert cache.host_lengths == (9, 9)
    assert own.std() > 0.05


def plain_generate(lm, prompt, steps):
    """What transformers' own loop generates greedily under the same grammar."""
    grammar = Grammar(KIT, ("image",))

    def allowed(_, ids):
        state = grammar.start(prompt)
        for token in ids[len(prompt) :].tolist():
            state = grammar.advance(state, token)
        return grammar.allowed(state).nonzero()[:, 0].tolist()

    out = lm.network.generate(
        prompt.ids[None],
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=steps,
        do_sample=False,
        prefix_allowed_tokens_fn=allowed,
        pad_token_id=0,
        eos_token_id=None,
    )
    return out[0, len(prompt) :]


@pytest.mark.parametrize("name", [*THREE, "Cohere2"])
def test_greedy_pictures_equal_those_of_transformers_generate(name):
    lm = wrapped(name, KIT)
    asked = prompts(KIT, TEXTS)
    for drafter in (None, JacobiDrafter(3), LookupDrafter(3), PacDrafter(3, 2, 1)):
        ids, _, _ = generate(lm, asked, Grammar(KIT, ("image",)), sampling=GREEDY, drafter=drafter)
        for prompt, row in zip(asked, ids):
            assert row.tolist() == plain_generate(lm, prompt, len(row)).tolist()
    assert len({tuple(row.tolist()) for row in ids}) > 1


@pytest.mark.parametrize("name", [*THREE, "Cohere2", "GPTJ"])
def test_every_way_to_draft_gives_the_plain_result_with_guidance(name):
    lm = wrapped(name, KIT)
    run = partial(
        generate,
        lm,
        prompts(KIT, TEXTS),
        Grammar(KIT, ("image", "text"), text_limit=6),
        unconditional=prompts(KIT, TEXTS, unconditional=True),
        sampling={**GUIDED, "text": SamplingConfig(temperature=0)},
    )
    wanted = run()[0]
    for make in (lambda: JacobiDrafter(4), lambda: LookupDrafter(4), lambda: PacDrafter(4, 3, 2)):
        for row, found in zip(wanted, run(drafter=make())[0]):
            assert row.tolist() == found.tolist()


def test_a_row_of_a_batch_equals_the_row_alone():
    lm = wrapped("Phi", KIT)
    sampling = {"image": SamplingConfig(temperature=1.0, top_k=4)}
    asked, grammar = prompts(KIT, TEXTS), Grammar(KIT, ("image",))
    together, scores, _ = generate(
        lm, asked, grammar, sampling=sampling, generator=torch.Generator().manual_seed(5)
    )
    seeds = torch.randint(2**62, (len(asked),), generator=torch.Generator().manual_seed(5)).tolist()
    for prompt, seed, row, score in zip(asked, seeds, together, scores):
        queue = Generator(lm)
        ticket = queue.submit(Request(prompt, None, Policy(grammar, sampling), seed))
        queue.wait([ticket])
        assert ticket.ids.tolist() == row.tolist()
        torch.testing.assert_close(ticket.logprobs, score, atol=1e-4, rtol=1e-4)


def test_inputs_of_blocks_serve_draft_heads():
    lm = wrapped("GPTNeoX", KIT)
    seen = {}
    for number, block in enumerate(lm.network.gpt_neox.layers):
        block.register_forward_pre_hook(lambda _, args, number=number: seen.__setitem__(number, args[0]))
    _, inputs = lm.decode(batch(some_ids()), layers=(0, 1))
    for number, value in enumerate(inputs):
        assert torch.equal(value, seen[number])


def documents(count=6):
    made = []
    for seed in range(count):
        codes = torch.randint(6, (1, 6, 1), generator=torch.Generator().manual_seed(seed))
        made.append(KIT.build([Text("ab"[: 1 + seed % 2]), Image(Codes(codes, (2, 3)))]))
    return made


@pytest.mark.parametrize("name", THREE)
def test_training_by_the_same_calls(name):
    lm = wrapped(name, KIT)
    stage = LMStage(ema=0.0, optimizer=AdamW, schedule="constant", warmup=0)
    module = LMModule(lm, NextTokenObjective(KIT.vocabulary.modalities), stage)
    optimizer = module.optimizer_for(lm.named_parameters(), 1e-2)["optimizer"]
    losses = []
    for _ in range(3):
        loss, metrics = module.compute(lm, KIT.collate(documents()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[2] < losses[1] < losses[0]
    assert "loss_image" in metrics


@pytest.mark.parametrize("name", THREE)
def test_packed_documents_do_not_see_each_other(name):
    lm = wrapped(name, KIT)
    several = documents(4)
    module = LMModule(lm, NextTokenObjective(KIT.vocabulary.modalities), LMStage(ema=0.0))
    with torch.no_grad():
        packed, _ = module.compute(lm, pack(several, 32, KIT.vocabulary.special["pad"]))
        padded, _ = module.compute(lm, KIT.collate(several))
    assert float(packed) == pytest.approx(float(padded), rel=1e-5)


def test_saved_as_transformers_does_and_loaded(tmp_path):
    from transformers import AutoModelForCausalLM

    lm = wrapped("GPT2", KIT)
    ids = some_ids()
    lm.save_pretrained(tmp_path / "a")
    again = WrappedLM.from_pretrained(tmp_path / "a")
    assert torch.equal(again(batch(ids)).logits, lm(batch(ids)).logits)
    assert again.fingerprint() == lm.fingerprint()
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    torch.testing.assert_close(theirs(ids).logits, lm(batch(ids)).logits)
    lm.save_pretrained(tmp_path / "b", dtype=torch.bfloat16)
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    assert small.dtype == torch.bfloat16
    assert small.lm_head.weight.data_ptr() == small.transformer.wte.weight.data_ptr()
    half = (tmp_path / "b/model.safetensors").stat().st_size / (
        tmp_path / "a/model.safetensors"
    ).stat().st_size
    assert half < 0.8


@pytest.mark.parametrize("tied", [True, False])
def test_the_vocabulary_grows(tied):
    lm = WrappedLM(network("GPT2", 20, tie_word_embeddings=tied))
    ids = some_ids() % 20
    before = lm(batch(ids)).logits
    lm.resize_token_embeddings(31)
    after = lm(batch(ids)).logits
    assert lm.config.vocab_size == after.shape[-1] == 31
    assert torch.equal(after[..., :20], before)
    assert (lm.network.lm_head.weight is lm.network.transformer.wte.weight) == tied


def test_continuous_inputs_stand_in_place_of_ids():
    lm = wrapped("GPT2", KIT)
    ids = some_ids(1)
    table = lm.network.get_input_embeddings().weight
    other = batch(ids.clone())
    other.ids[0, 4] = 0
    given = TokenBatch(
        other.ids,
        other.modality,
        other.positions,
        embeds=table[ids[0, 4]][None],
        embed_index=torch.tensor([[0, 4]]),
    )
    torch.testing.assert_close(lm(given).logits, lm(batch(ids)).logits)
    assert not torch.allclose(lm(other).logits, lm(batch(ids)).logits)


def test_no_longer_than_what_its_windows_see():
    assert wrapped("Starcoder2", KIT).config.max_length == 40
    assert wrapped("GPT2", KIT).config.max_length == 64
    # Windows that go into the masks do not shorten anything.
    assert wrapped("Cohere2", KIT).config.max_length == 64


@pytest.mark.parametrize("name", ["Cohere2", "Gemma3Text"])
def test_windows_are_those_of_the_network(name):
    """Of tokens that are cached one by one, in rows of different lengths, and packed."""
    lm, wide = wrapped(name, KIT), wrapped(name, KIT, sliding_window=60)
    ids = some_ids(1, 16)
    with torch.no_grad():
        own = lm.network(ids).logits
        assert not torch.allclose(own, wide.network(ids).logits, atol=1e-2)
        torch.testing.assert_close(lm(batch(ids)).logits, own, atol=1e-4, rtol=1e-4)
        cache = lm.new_cache(2, 20)
        lm(batch(ids[:, :8].expand(2, -1)), cache)
        cache.crop([8, 5])
        pair = TokenBatch(
            torch.cat([ids[:, 8:12], ids[:, 5:9]]),
            torch.zeros(2, 4, dtype=torch.long),
            torch.tensor([[[n, 0, 0] for n in range(start, start + 4)] for start in (8, 5)]),
        )
        found = lm(pair, cache).logits
    torch.testing.assert_close(found, torch.cat([own[:, 8:12], own[:, 5:9]]), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("Bloom", {"hidden_size": 16, "n_layer": 2, "n_head": 2}),
        ("Mpt", {"d_model": 16, "n_layers": 2, "n_heads": 2, "max_seq_len": 64}),
        ("Falcon", {"alibi": True}),
        ("Mamba", {"hidden_size": 16, "num_hidden_layers": 2}),
        ("OpenAIGPT", GPT),
    ],
)
def test_what_cannot_be_steered_is_refused_by_name(name, changes):
    with pytest.raises(LexelError, match=f"^{name}[A-Za-z]*LM.* wrapped"):
        WrappedLM(network(name, 30, **changes))


def test_a_head_of_another_form_is_refused():
    built = network("GPT2", 30)

    def forward(input_ids=None, **options):
        output = type(built).forward(built, input_ids, **options)
        output.logits = output.logits.sin()
        return output

    built.forward = forward
    with pytest.raises(LexelError, match="GPT2LMHeadModel are not its output table"):
        WrappedLM(built)


def test_a_network_that_ignores_the_mask_is_refused():
    built = network("GPT2", 30)
    inner = built.transformer.forward
    built.transformer.forward = lambda *args, attention_mask=None, **options: inner(*args, **options)
    with pytest.raises(LexelError, match="GPT2LMHeadModel"):
        WrappedLM(built)


def test_bad_calls_are_refused():
    lm = wrapped("GPT2", KIT)
    with pytest.raises(LexelError, match="no nested widths"):
        lm.decode(batch(some_ids()), width=0.5)
    with pytest.raises(LexelError, match="one code per position"):
        lm.decode(TokenBatch(some_ids()[..., None], some_ids(), torch.zeros(2, 9, 3, dtype=torch.long)))
    with pytest.raises(LexelError, match="holds 4 positions"):
        lm.decode(batch(some_ids()), lm.new_cache(2, 4))
    with pytest.raises(LexelError, match="network of transformers"):
        WrappedLM(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("name", ["GPT2", "GPTJ"])
def test_in_a_bundle(tiny_pipeline, tmp_path, name):
    """Saved, loaded, packed for decoding, with every strategy of its own."""
    size = tiny_pipeline.codec.vocabulary.size
    lm = WrappedLM(network(name, size, n_positions=128)).eval()
    made = Pipeline(tiny_pipeline.tokenizer, lm, tiny_pipeline.codec)
    made.save_pretrained(tmp_path)
    again = Pipeline.from_pretrained(tmp_path)
    assert isinstance(again.lm, WrappedLM)
    assert {"jacobi", "lookup", "pac"} <= set(again.strategies)
    asked = [[Text("a red circle"), Image.blank()]]
    options = {"seed": 0, "sampling": {"image": SamplingConfig(temperature=0)}}
    wanted = made.generate(asked, decoding="plain", **options).ids[0]
    for decoding in ("plain", "jacobi", "pac"):
        assert again.generate(asked, decoding=decoding, **options).ids[0].tolist() == wanted.tolist()
    again.dtype = "float32"
    assert again.generate(asked, decoding="plain", **options).ids[0].tolist() == wanted.tolist()


def test_what_needs_the_parts_of_a_native_model_says_so(tiny_pipeline):
    lm = wrapped("GPT2", KIT)
    config = AcceptanceConfig("grouped")
    with pytest.raises(LexelError, match="GPT2LMHeadModel is not made of a CausalLM's parts"):
        make_acceptance(config, tiny_pipeline.tokenizer, lm, KIT.vocabulary)
