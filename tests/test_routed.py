"""Weights of their own for picture tokens (LlamaFusion): equal at first, text untouched, sampled as ever."""

from dataclasses import replace

import pytest
import torch
from decoding_fakes import DRAFTERS, RASTER, codec, model, prompts, uncached
from torch.optim import AdamW

from lexel.document import Grammar, Image, Text
from lexel.errors import LexelError
from lexel.models.causal_lm import CausalLM
from lexel.models.graphs import capturable
from lexel.models.packed import pack
from lexel.models.routed import is_picture_weight, route
from lexel.nn.routing import parts
from lexel.sample.decode import generate
from lexel.sample.logits import SamplingConfig
from lexel.train.adapters import train_only
from lexel.train.blocks import recompute
from lexel.train.objectives.lm import NextTokenObjective
from lexel.types import Codes

KIT = codec(RASTER)
FAMILIES = {
    "llama": {},
    "qwen3": {"qk_norm": True},
    "gemma2": {
        "sandwich_norm": True,
        "activation": "gelu_tanh",
        "norm_offset": 1.0,
        "attention_softcap": 5.0,
        "windows": (4, None),
        "qkv_bias": True,
    },
}


def documents(count=4):
    made = []
    for seed in range(count):
        codes = torch.randint(6, (1, 6, 1), generator=torch.Generator().manual_seed(seed))
        made.append(KIT.build([Text("ab a"[: 1 + seed]), Image(Codes(codes, (2, 3)))]))
    return KIT.collate(made)


def texts():
    return KIT.collate([KIT.build([Text("ab ab a")]), KIT.build([Text("b")])])


def shaken(lm):
    """With other picture weights."""
    with torch.no_grad():
        for name, parameter in lm.named_parameters():
            if is_picture_weight(name):
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return lm


@pytest.mark.parametrize("family", FAMILIES)
def test_routing_changes_nothing_at_first(family):
    lm = model(KIT, **FAMILIES[family])
    made = route(lm)
    assert isinstance(made, CausalLM)
    torch.testing.assert_close(made(documents()).logits, lm(documents()).logits)
    assert sum(is_picture_weight(name) for name, _ in made.named_parameters()) > 2 * 7
    # Everything in a block is there twice.
    inside = sum(p.numel() for p in lm.model.layers.parameters())
    assert sum(p.numel() for p in made.model.layers.parameters()) == 2 * inside


@pytest.mark.parametrize("family", FAMILIES)
def test_text_does_not_notice_picture_weights(family):
    lm = model(KIT, **FAMILIES[family])
    made = shaken(route(lm))
    assert torch.equal(made(texts()).logits, lm(texts()).logits)
    before, after = lm(documents()).logits, made(documents()).logits
    first = int((documents().modality[0] > 0).nonzero()[0])
    torch.testing.assert_close(after[0, :first], before[0, :first])
    assert not torch.allclose(after[0, first:], before[0, first:])


def test_training_leaves_text_as_it_was():
    lm = model(KIT, dtype=torch.float32)
    made = route(lm).train()
    train_only(made, ["picture"])
    trained = [parameter for parameter in made.parameters() if parameter.requires_grad]
    optimizer = AdamW(trained, 1e-2, weight_decay=0.5)
    objective, losses = NextTokenObjective(KIT.vocabulary.modalities), []
    for _ in range(3):
        loss, _ = objective(made(documents()), documents())
        optimizer.zero_grad()
        loss.backward()
        assert all(parameter.grad is not None for parameter in trained)
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[2] < losses[0]
    assert torch.equal(made.eval()(texts()).logits, lm(texts()).logits)


def test_blocks_computed_again_know_their_pictures():
    plain, again = (shaken_alike(model(KIT, dtype=torch.float32)) for _ in range(2))
    recompute(again)
    grads = []
    for lm in (plain, again):
        lm.train()
        NextTokenObjective(KIT.vocabulary.modalities)(lm(documents()), documents())[0].backward()
        grads.append([parameter.grad for parameter in lm.parameters()])
    for one, other in zip(*grads):
        torch.testing.assert_close(one, other)


def shaken_alike(lm):
    torch.manual_seed(1)
    return shaken(route(lm))


def test_saved_and_loaded_as_any_language_model(tmp_path):
    made = shaken(route(model(KIT, dtype=torch.float32)))
    made.save_pretrained(tmp_path)
    again = CausalLM.from_pretrained(tmp_path)
    assert again.config == made.config
    assert again.config.routed == parts(again.model.layers[0])
    assert torch.equal(again(documents()).logits, made(documents()).logits)
    assert again.fingerprint() == made.fingerprint()


@pytest.mark.parametrize("name", ["plain", "jacobi", "pac-wide", "lookup", "nested", "eagle-static"])
def test_every_way_to_draft_gives_the_plain_picture(name):
    made = shaken(route(model(KIT)))
    sampling = {"image": SamplingConfig(temperature=0, guidance=2.0)}
    asked, null = prompts(KIT, ["a", "ab ba"]), prompts(KIT, ["a", "ab ba"], unconditional=True)
    grammar = Grammar(KIT, ("image",))
    options = {"unconditional": null, "sampling": sampling}
    found, _, _ = generate(made, asked, grammar, drafter=DRAFTERS[name](made, KIT, 3), **options)
    for prompt, other, row in zip(asked, null, found):
        probs = uncached(made, KIT, grammar, prompt, other, sampling, row)
        assert row.tolist() == probs.argmax(-1).tolist()


def test_log_probabilities_are_those_of_one_uncached_pass():
    made = shaken(route(model(KIT)))
    sampling = {"image": SamplingConfig(temperature=0.8)}
    asked, grammar = prompts(KIT, ["a", "b ab"]), Grammar(KIT, ("image",))
    ids, logprobs, _ = generate(
        made, asked, grammar, sampling=sampling, generator=torch.Generator().manual_seed(0)
    )
    for prompt, row, scores in zip(asked, ids, logprobs):
        probs = uncached(made, KIT, grammar, prompt, None, sampling, row)
        torch.testing.assert_close(probs.gather(1, row[:, None])[:, 0].log().float(), scores)


def test_packed_for_decoding():
    made = shaken(route(model(KIT, dtype=torch.float32)))
    torch.testing.assert_close(pack(made)(documents()).logits, made(documents()).logits, atol=1e-4, rtol=1e-4)


def test_graphs_are_left_to_models_without_routes():
    lm = model(KIT)
    assert capturable(lm)
    assert not capturable(route(lm))


def test_what_cannot_be_routed():
    lm = model(KIT)
    with pytest.raises(LexelError, match="routed already"):
        route(route(lm))
    with pytest.raises(LexelError, match=r"has no part mlp\.down; it has: self_attn.q_proj"):
        CausalLM(replace(lm.config, routed=("mlp.down",)))
    with pytest.raises(LexelError, match="only a CausalLM"):
        route(torch.nn.Linear(2, 2))
    with pytest.raises(LexelError, match="told which tokens"):
        route(lm).model.layers[0].mlp(torch.zeros(1, 2, 16, dtype=torch.float64))
