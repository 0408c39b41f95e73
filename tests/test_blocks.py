"""Blocks that are recomputed or compiled give what they gave before."""

import copy
from functools import partial

import pytest
import torch

from lexel.data.packing import pack
from lexel.models.causal_lm import CausalLM, CausalLMConfig
from lexel.train.blocks import blocks, compile_blocks, recompute
from lexel.train.objectives.lm import NextTokenObjective, predicting
from tests.test_flops import sequence

BATCH = pack([sequence(16, 0), sequence(9, 1)], length=16, pad=0)


@pytest.fixture
def lm() -> CausalLM:
    torch.manual_seed(0)
    return CausalLMConfig(40, dim=32, layers=3, heads=2, ffn_dim=64, dropout=0.1).build().train()


def gradients(lm: CausalLM) -> tuple[torch.Tensor, dict[str, torch.Tensor], int]:
    """Loss, gradients and the numbers kept between forward and backward."""
    kept = 0

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal kept
        kept += tensor.numel() if not isinstance(tensor, torch.nn.Parameter) else 0
        return tensor

    torch.manual_seed(1)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss, _ = NextTokenObjective(("text",))(lm(BATCH, select=predicting(BATCH)), BATCH)
    loss.backward()
    found = {name: parameter.grad for name, parameter in lm.named_parameters()}
    return loss.detach(), found, kept  # type: ignore[return-value]


def test_recomputing_changes_memory_and_nothing_else(lm: CausalLM):
    again = copy.deepcopy(lm)
    recompute(again)
    recompute(again)  # Lightning may ask twice
    loss, expected, kept = gradients(lm)
    loss_again, found, kept_again = gradients(again)
    assert torch.equal(loss, loss_again)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-6, atol=1e-8)
    assert kept_again < 0.5 * kept
    assert again.state_dict().keys() == lm.state_dict().keys()
    assert sum(isinstance(block.forward, partial) for block in blocks(again)) == 3


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of torch, about its own jit and what its tracing looks at
def test_compiled_blocks_give_the_same_gradients(lm: CausalLM):
    again = copy.deepcopy(lm)
    compile_blocks(again)
    for network in (lm, again):
        network.eval()  # compiled dropout draws other numbers
    loss, expected, _ = gradients(lm)
    loss_again, found, _ = gradients(again)
    torch.testing.assert_close(loss_again, loss, rtol=1e-5, atol=1e-6)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)
    assert again.state_dict().keys() == lm.state_dict().keys()
