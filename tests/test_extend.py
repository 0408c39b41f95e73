"""Added rows of a language model's tables: how they start, and that nothing else changes."""

from typing import Any

import pytest
import torch
import transformers

from lexel.errors import LexelError
from lexel.models.causal_lm import CausalLM, CausalLMConfig
from lexel.models.extend import INITS, SPREAD, extend_vocabulary
from lexel.types import TokenBatch

ROWS, TEXT, SIZE, DIM = 210, 200, 4200, 8


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def lm(request: pytest.FixtureRequest) -> CausalLM:
    torch.manual_seed(0)
    config = CausalLMConfig(ROWS, dim=DIM, layers=1, heads=2, tie_embeddings=request.param)
    lm = config.build().eval().requires_grad_(False)
    scale = torch.linspace(0.1, 3, DIM)
    for table in tables(lm):
        table.copy_(torch.randn(ROWS, DIM) * scale + torch.arange(DIM))
        table[TEXT:] = 100.0  # padding that means nothing
    return lm


def tables(lm: CausalLM) -> list[torch.Tensor]:
    return [lm.model.embed_tokens.weight] + ([] if lm.lm_head is None else [lm.lm_head.weight])


def logits(lm: Any, ids: torch.Tensor) -> torch.Tensor:
    positions = torch.zeros(*ids.shape, 3, dtype=torch.long)
    positions[..., 0] = torch.arange(ids.shape[1])
    return lm(TokenBatch(ids, torch.zeros_like(ids), positions)).logits


@pytest.mark.parametrize("init", INITS)
def test_text_is_read_and_written_as_before(lm: CausalLM, init: Any):
    ids = torch.randint(TEXT, (2, 6))
    before = logits(lm, ids)
    extend_vocabulary(lm, SIZE, TEXT, init, torch.Generator().manual_seed(3))
    after = logits(lm, ids)
    assert after.shape[-1] == lm.config.vocab_size == lm.model.embed_tokens.num_embeddings == SIZE
    torch.testing.assert_close(after[..., :TEXT], before[..., :TEXT])
    assert lm.config.build().state_dict().keys() == lm.state_dict().keys()
    assert not any(parameter.requires_grad for parameter in lm.parameters())


def test_the_mean_is_that_of_the_text(lm: CausalLM):
    means = [table[:TEXT].mean(0) for table in tables(lm)]
    extend_vocabulary(lm, SIZE, TEXT)
    for table, mean in zip(tables(lm), means):
        torch.testing.assert_close(table[TEXT:], mean.expand(SIZE - TEXT, -1))


def test_mean_and_covariance(lm: CausalLM):
    """4000 rows: a covariance is known to a few percent of its diagonal."""
    old = [table[:TEXT].clone().double() for table in tables(lm)]
    for table in tables(lm):
        table.data = table.double()  # beside the mean the draws are small
    extend_vocabulary(lm, SIZE, TEXT, "mean_covariance", torch.Generator().manual_seed(3))
    for table, before in zip(tables(lm), old):
        drawn = (table[TEXT:] - before.mean(0)) / SPREAD**0.5
        expected = torch.cov(before.T, correction=0)
        scale = expected.diagonal().sqrt()
        error = (torch.cov(drawn.T) - expected) / (scale[:, None] * scale)
        assert error.abs().max() < 0.1
        assert (drawn.mean(0) / scale).abs().max() < 0.06


def test_fewer_rows_than_their_width_have_no_covariance_to_draw_from():
    lm = CausalLMConfig(5, dim=DIM, layers=1, heads=2).build().requires_grad_(False)
    mean = lm.model.embed_tokens.weight.mean(0)
    extend_vocabulary(lm, 9, 5, "mean_covariance")
    torch.testing.assert_close(lm.model.embed_tokens.weight[5:], mean.expand(4, -1))


def test_random_rows(lm: CausalLM):
    extend_vocabulary(lm, SIZE, TEXT, "random", torch.Generator().manual_seed(3))
    drawn = [table[TEXT:] for table in tables(lm)]
    for rows in drawn:
        assert float(rows.std()) == pytest.approx(0.02, rel=0.02)
        assert float(rows.mean()) == pytest.approx(0, abs=5e-4)
    if len(drawn) == 2:
        assert not torch.equal(*drawn)


def test_the_generator_decides(lm: CausalLM):
    found = []
    for seed in (3, 3, 4):
        extend_vocabulary(lm, SIZE, TEXT, "random", torch.Generator().manual_seed(seed))
        found.append(lm.model.embed_tokens.weight.clone())
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[1], found[2])


def test_the_rows_are_those_of_transformers(lm: CausalLM):
    """Its `mean_resizing` on a table without padding, up to the draws, which are a hundred-thousandth."""
    rows = lm.model.embed_tokens.weight[:TEXT]
    config = transformers.LlamaConfig(
        vocab_size=TEXT, hidden_size=DIM, num_attention_heads=2, num_hidden_layers=1, intermediate_size=8
    )
    theirs = transformers.LlamaForCausalLM(config).requires_grad_(False)
    theirs.get_input_embeddings().weight.copy_(rows)
    theirs.resize_token_embeddings(250)
    extend_vocabulary(lm, 250, TEXT, "mean_covariance")
    expected = theirs.get_input_embeddings().weight
    torch.testing.assert_close(lm.model.embed_tokens.weight, expected, atol=1e-3, rtol=0)
    assert not torch.equal(lm.model.embed_tokens.weight[TEXT], lm.model.embed_tokens.weight[TEXT + 1])


def test_a_smaller_vocabulary_drops_the_padding(lm: CausalLM):
    extend_vocabulary(lm, TEXT + 4, TEXT)
    assert all(len(table) == TEXT + 4 for table in tables(lm))


@pytest.mark.parametrize("tie", [True, False])
def test_networks_of_transformers_are_extended_alike(tie: bool):
    from lexel.models.wrapped_lm import WrappedLM

    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=ROWS, n_embd=DIM, n_layer=1, n_head=2, n_positions=32, tie_word_embeddings=tie
    )
    wrapped = WrappedLM(transformers.GPT2LMHeadModel(config).eval().requires_grad_(False))
    both = [wrapped.network.get_input_embeddings().weight, wrapped.network.get_output_embeddings().weight]
    means = [table[:TEXT].mean(0) for table in both]
    ids = torch.randint(TEXT, (2, 6))
    before = logits(wrapped, ids)
    extend_vocabulary(wrapped, SIZE, TEXT)
    torch.testing.assert_close(logits(wrapped, ids)[..., :TEXT], before[..., :TEXT])
    assert wrapped.config.vocab_size == SIZE
    both = [wrapped.network.get_input_embeddings().weight, wrapped.network.get_output_embeddings().weight]
    assert (both[0] is both[1]) == tie
    for table, mean in zip(both, means):
        torch.testing.assert_close(table[TEXT:], mean.expand(SIZE - TEXT, -1))


def test_what_does_not_fit(lm: CausalLM):
    with pytest.raises(LexelError, match="has 211 ids, but the backbone's table holds 210"):
        extend_vocabulary(lm, SIZE, 211)
    with pytest.raises(LexelError, match="a vocabulary of 100 ids cannot hold the 200"):
        extend_vocabulary(lm, 100, TEXT)
    with pytest.raises(LexelError, match="mean, mean_covariance, random, got 'xavier'"):
        extend_vocabulary(lm, SIZE, TEXT, "xavier")  # type: ignore[arg-type]
