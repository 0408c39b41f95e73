"""Slide-LoRA: the released formula with a gate per token, and its export as a routed model."""

import pytest
import torch
from decoding_fakes import DRAFTERS, RASTER, codec, model, prompts
from test_adapters import document, rows, stage, trained
from wrapped_fakes import wrapped

from lexel.document import Grammar, Text
from lexel.errors import LexelError
from lexel.models.causal_lm import CausalLM
from lexel.models.routed import route
from lexel.models.slide_lora import PICTURE, SHARED, TEXT, SlideLoRA, add_slide_lora
from lexel.nn.routing import _TOKENS, Tokens
from lexel.sample.decode import generate
from lexel.sample.logits import SamplingConfig
from lexel.train.adapters import added_ids, merged
from lexel.train.settings import AdapterSettings

KIT = codec(RASTER)
SLIDE = AdapterSettings("slide_lora", r=2, alpha=4.0)


def network(**options):
    return model(KIT, dtype=torch.float32, **options)


def batch():
    return KIT.collate([document(seed) for seed in range(4)])


def test_the_formula():
    """``W x + alpha / r · (1/2 B_task A_task x + 1/2 B_shared A_shared x)``."""
    torch.manual_seed(0)
    layer = SlideLoRA(torch.nn.Linear(5, 3), r=2, alpha=6.0, dropout=0.0)
    torch.nn.init.normal_(layer.lora_out)
    x = torch.randn(1, 4, 5)
    before = _TOKENS.set(Tokens.of(torch.tensor([[0, 1, 2, 0]])))
    y = layer(x)
    _TOKENS.reset(before)
    for place, expert in enumerate((TEXT, PICTURE, PICTURE, TEXT)):
        wanted = layer.base(x[0, place])
        for e in (expert, SHARED):
            wanted = wanted + 3.0 * 0.5 * layer.lora_out[e] @ (layer.lora_in[e] @ x[0, place])
        torch.testing.assert_close(y[0, place], wanted)
    torch.testing.assert_close(layer.merged(PICTURE)(x[0, 1:3]), y[0, 1:3])
    torch.testing.assert_close(layer.merged(TEXT)(x[0, ::3]), y[0, ::3])
    with pytest.raises(LexelError, match="told which tokens"):
        layer(x)


def test_it_begins_as_the_network_it_is_put_on():
    lm, other = network(), network()
    add_slide_lora(other, (), 2, 4.0)
    torch.testing.assert_close(other(batch()).logits, lm(batch()).logits)
    # +2 % of the parameters in the paper; here three experts of rank 2 on four projections of two blocks.
    count = sum(p.numel() for name, p in other.named_parameters() if "lora_" in name)
    assert count == 2 * 4 * 3 * 2 * (16 + 16)


@pytest.mark.parametrize("targets", [(), ("q_proj", "down_proj")])
def test_trained_and_exported_as_a_routed_model(targets, tmp_path):
    lm = network()
    before = rows(lm)
    settings = AdapterSettings("slide_lora", r=2, alpha=4.0, targets=list(targets))
    module = trained(lm, stage(adapter=settings))
    made = merged(module.exported)
    assert type(made) is CausalLM
    names = ("self_attn.q_proj", "mlp") if targets else tuple(f"self_attn.{x}_proj" for x in "qkvo")
    assert made.config.routed == names
    assert not any("lora" in key or "parametriz" in key for key in made.state_dict())
    made.save_pretrained(tmp_path)
    again = CausalLM.from_pretrained(tmp_path)
    text = KIT.collate([KIT.build([Text("ab a")])])
    with torch.no_grad():
        for given in (batch(), text):
            wanted = lm(given).logits
            torch.testing.assert_close(made(given).logits, wanted, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(again(given).logits, wanted, atol=1e-4, rtol=1e-4)
            assert not torch.allclose(wanted, network()(given).logits, atol=1e-2)
    layer = made.model.layers[0].self_attn.q_proj
    assert not torch.allclose(layer.text.weight, layer.picture.weight)
    after = rows(made)
    added = added_ids(KIT.vocabulary)
    for table in before:
        assert torch.equal(after[table][:3], before[table][:3])
        assert (after[table][added] != before[table][added]).any()
    assert any(isinstance(part, SlideLoRA) for part in lm.modules())  # training can go on


@pytest.mark.parametrize("name", ["plain", "jacobi", "pac-wide"])
def test_sampling_before_and_after_the_export_agrees(name):
    lm = network()
    made = merged(trained(lm, stage(adapter=SLIDE)).exported)
    found = [
        generate(
            one,
            prompts(KIT, ["a", "ab ba"]),
            Grammar(KIT, ("image",)),
            sampling={"image": SamplingConfig(temperature=0)},
            drafter=DRAFTERS[name](one, KIT, 3),
        )[0]
        for one in (lm, made)
    ]
    assert [row.tolist() for row in found[0]] == [row.tolist() for row in found[1]]


def test_what_does_not_fit_is_refused():
    with pytest.raises(LexelError, match="routed already"):
        add_slide_lora(route(network()), (), 2, 4.0)
    with pytest.raises(LexelError, match="needs a CausalLM, which routes tokens, got WrappedLM"):
        add_slide_lora(wrapped("GPT2", KIT), (), 2, 4.0)
    with pytest.raises(LexelError, match=r"targets names \['c_attn'\]; the blocks' linear layers are q_proj"):
        add_slide_lora(network(), ("c_attn",), 2, 4.0)
