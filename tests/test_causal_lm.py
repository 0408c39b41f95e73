"""Laws of the language model: the cache, the batch, packing and nesting change nothing but the cost."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lexel.errors import LexelError
from lexel.models.causal_lm import CausalLM, CausalLMConfig
from lexel.models.kv_cache import KVCache
from lexel.nn.attention import attend
from lexel.nn.decoder import nested_width
from lexel.nn.norm import RMSNorm
from lexel.nn.rope import Rotary, rotate
from lexel.types import TokenBatch

VOCAB = 40
TINY = CausalLMConfig(
    VOCAB,
    dim=32,
    layers=2,
    heads=4,
    kv_heads=2,
    ffn_dim=48,
    rope_axes=(0.5, 0.25, 0.25),
    qk_norm=True,
    ffn_widths=(0.25, 0.5, 1.0),
    max_length=64,
)
CLOSE = {"atol": 2e-5, "rtol": 1e-4}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def build(config: CausalLMConfig = TINY, seed: int = 0) -> CausalLM:
    """A model whose weights are large enough for its logits to differ."""
    torch.manual_seed(seed)
    model = config.build().eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            parameter.mul_(6)
        elif "norm" in name:
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def batch_of(ids: torch.Tensor, start: int = 0, **fields: torch.Tensor) -> TokenBatch:
    """Positions as a picture four tokens wide would have them, from index `start` on."""
    index = torch.arange(start, start + ids.shape[1])
    positions = torch.stack((index, index // 4, index % 4), -1).expand(ids.shape[0], -1, 3)
    return TokenBatch(ids, torch.zeros(ids.shape[:2], dtype=torch.long), positions, **fields)


def take(batch: TokenBatch, rows: slice, columns: slice) -> TokenBatch:
    return TokenBatch(batch.ids[rows, columns], batch.modality[rows, columns], batch.positions[rows, columns])


def ragged(batch: TokenBatch, starts: list[int], length: int) -> TokenBatch:
    """The next `length` tokens of each row, each row from its own start."""
    index = torch.tensor(starts)[:, None] + torch.arange(length)
    rows = torch.arange(len(starts))[:, None]
    return TokenBatch(batch.ids[rows, index], batch.modality[rows, index], batch.positions[rows, index])


@pytest.fixture(scope="module")
def model() -> CausalLM:
    return build()


def transformers_pair(kind: str, tie: bool) -> tuple[torch.nn.Module, CausalLM]:
    """A tiny random model of transformers and ours with its weights."""
    import transformers

    theirs_config = getattr(transformers, f"{kind}Config")(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
        rms_norm_eps=1e-6,
        tie_word_embeddings=tie,
        initializer_range=0.3,
    )
    torch.manual_seed(1)
    theirs = getattr(transformers, f"{kind}ForCausalLM")(theirs_config).eval()
    for name, parameter in theirs.named_parameters():
        if "norm" in name:
            parameter.data.add_(0.2 * torch.randn_like(parameter))
    ours = CausalLMConfig(
        VOCAB,
        dim=32,
        layers=2,
        heads=4,
        kv_heads=2,
        head_dim=8,
        ffn_dim=64,
        norm_eps=1e-6,
        qk_norm=kind == "Qwen3",
        tie_embeddings=tie,
    ).build()
    state = theirs.state_dict()
    if tie:
        del state["lm_head.weight"]
    ours.load_state_dict(state)
    return theirs, ours.eval()


@pytest.mark.parametrize(("kind", "tie"), [("Llama", False), ("Llama", True), ("Qwen3", False)])
@torch.no_grad()
def test_weights_of_transformers_give_its_logits(kind: str, tie: bool):
    theirs, ours = transformers_pair(kind, tie)
    ids = torch.randint(VOCAB, (2, 20))
    expected = theirs(ids).logits
    assert expected.std() > 0.5
    torch.testing.assert_close(ours(batch_of(ids)).logits, expected, atol=1e-4, rtol=1e-4)


@given(st.data())
@settings(max_examples=25, deadline=None)
@torch.no_grad()
def test_cached_is_uncached_in_any_chunks(model: CausalLM, data: st.DataObject):
    length = data.draw(st.integers(2, 14))
    batch = batch_of(torch.randint(VOCAB, (2, length)))
    cache, done, parts = model.new_cache(2), 0, []
    while done < length:
        step = data.draw(st.integers(1, length - done))
        parts.append(model(take(batch, slice(None), slice(done, done + step)), cache).logits)
        done += step
    torch.testing.assert_close(torch.cat(parts, 1), model(batch).logits, **CLOSE)


@given(st.data())
@settings(max_examples=25, deadline=None)
@torch.no_grad()
def test_rows_of_different_lengths_roll_back_and_go_on(model: CausalLM, data: st.DataObject):
    """Padded prefill, wrong guesses rolled back by crop, different tokens afterwards: as a fresh run."""
    batch = batch_of(torch.randint(VOCAB, (3, 16)))
    full = model(batch).logits
    lengths = [data.draw(st.integers(1, 6)) for _ in range(3)]
    cache = model.new_cache(3)
    model(take(batch, slice(None), slice(0, max(lengths))), cache)
    cache.crop(torch.tensor(lengths))
    for _ in range(2):
        guess = data.draw(st.integers(1, 4))
        model(batch_of(torch.randint(VOCAB, (3, guess)), 3), cache)
        cache.crop(lengths)
        new = data.draw(st.integers(1, 4))
        output = model(ragged(batch, lengths, new), cache)
        for row, start in enumerate(lengths):
            torch.testing.assert_close(output.logits[row], full[row, start : start + new], **CLOSE)
        lengths = [length + new for length in lengths]
        assert cache.host_lengths == tuple(lengths)


@torch.no_grad()
def test_a_tree_is_its_branches(model: CausalLM):
    """Two branches verified in one forward with a mask; the kept one continues as if it were alone."""
    prefix, branches = torch.randint(VOCAB, (1, 5)), torch.randint(VOCAB, (2, 2))
    cache = model.new_cache(1)
    model(batch_of(prefix), cache)
    positions = batch_of(prefix.new_zeros(1, 7)).positions[:, [5, 6, 5, 6]]
    mask = torch.zeros(1, 4, 20, dtype=torch.bool)
    mask[:, :, :5] = True
    mask[0, :, 5:9] = torch.block_diag(torch.ones(2, 2).tril(), torch.ones(2, 2).tril()).bool()
    tree = TokenBatch(branches.reshape(1, 4), prefix.new_zeros(1, 4), positions, mask)
    logits = model(tree, cache).logits
    for branch in range(2):
        alone = model(batch_of(torch.cat((prefix, branches[branch : branch + 1]), 1))).logits
        torch.testing.assert_close(logits[0, 2 * branch : 2 * branch + 2], alone[0, 5:], **CLOSE)
    cache.gather(0, 5, [2, 3])
    cache.crop([7])
    last = torch.tensor([[7]])
    expected = model(batch_of(torch.cat((prefix, branches[1:], last), 1))).logits[:, -1:]
    torch.testing.assert_close(model(batch_of(last, 7), cache).logits, expected, **CLOSE)


@torch.no_grad()
def test_a_row_of_a_batch_is_that_row_alone(model: CausalLM):
    batch = batch_of(torch.randint(VOCAB, (4, 12)))
    together = model(batch).logits
    for row in range(4):
        alone = model(take(batch, slice(row, row + 1), slice(None))).logits
        torch.testing.assert_close(together[row : row + 1], alone, **CLOSE)


@torch.no_grad()
def test_packed_documents_are_separate_documents(model: CausalLM):
    documents = [batch_of(torch.randint(VOCAB, (1, length))) for length in (5, 1, 7)]
    blocks = torch.block_diag(*(torch.ones(d.ids.shape[1], d.ids.shape[1]).tril() for d in documents))
    packed = TokenBatch(
        torch.cat([d.ids for d in documents], 1),
        torch.cat([d.modality for d in documents], 1),
        torch.cat([d.positions for d in documents], 1),
        blocks.bool()[None],
    )
    alone = torch.cat([model(d).logits for d in documents], 1)
    torch.testing.assert_close(model(packed).logits, alone, **CLOSE)
    additive = torch.zeros_like(blocks).masked_fill(~blocks.bool(), float("-inf"))[None]
    torch.testing.assert_close(
        model(dataclasses.replace(packed, attention_mask=additive)).logits, alone, **CLOSE
    )


@torch.no_grad()
def test_greedy_chain_is_the_same_with_and_without_cache(model: CausalLM):
    ids = torch.randint(VOCAB, (2, 3))
    cache, cached = model.new_cache(2), ids
    new = ids
    for _ in range(12):
        choice = model(batch_of(new, cached.shape[1] - new.shape[1]), cache).logits[:, -1:].argmax(-1)
        assert torch.equal(choice, model(batch_of(cached)).logits[:, -1:].argmax(-1))
        cached, new = torch.cat((cached, choice), 1), choice


@torch.no_grad()
def test_select_computes_the_same_logits_only_where_asked(model: CausalLM):
    batch = batch_of(torch.randint(VOCAB, (2, 9)))
    select = torch.rand(2, 9) < 0.4
    torch.testing.assert_close(model(batch, select=select).logits, model(batch).logits[select], **CLOSE)


def narrow_copy(model: CausalLM, units: int) -> CausalLM:
    """A really smaller model made of copied slices."""
    small = dataclasses.replace(model.config, ffn_dim=units, ffn_widths=(1.0,)).build().eval()
    state = {}
    for name, value in model.state_dict().items():
        if name.endswith(("gate_proj.weight", "up_proj.weight")):
            value = value[:units]
        elif name.endswith("down_proj.weight"):
            value = value[:, :units]
        state[name] = value.clone()
    small.load_state_dict(state)
    return small


@pytest.mark.parametrize("width", [0.25, 0.5])
@torch.no_grad()
def test_a_nested_width_is_a_smaller_model(model: CausalLM, width: float):
    batch = batch_of(torch.randint(VOCAB, (2, 10)))
    units = model.submodel_units(width)
    assert units % 8 == 0
    assert units < model.config.hidden_width
    nested = model(batch, width=width).logits
    torch.testing.assert_close(nested, narrow_copy(model, units)(batch).logits, **CLOSE)
    assert torch.equal(model(batch, width=1.0).logits, model(batch).logits)
    assert not torch.allclose(nested, model(batch).logits, atol=1e-2)


def test_nested_widths_round_to_eight_and_refuse_nonsense():
    assert [nested_width(512, w) for w in (None, 1.0, 0.5, 0.25, 0.001)] == [512, 512, 256, 128, 8]
    assert nested_width(4, 0.5) == 4
    for width in (0.0, -0.5, 1.5):
        with pytest.raises(ValueError, match="fraction of the feed-forward"):
            nested_width(64, width)


def test_only_the_nested_part_is_trained_by_a_narrow_step():
    model = build().requires_grad_(True)
    model(batch_of(torch.randint(VOCAB, (2, 6))), width=0.25).logits.square().mean().backward()
    units = model.submodel_units(0.25)
    for layer in model.model.layers:
        gradient = layer.mlp.gate_proj.weight.grad
        assert gradient[:units].abs().sum() > 0
        assert gradient[units:].abs().sum() == 0


@torch.no_grad()
def test_rows_and_columns_of_a_picture_matter_only_when_they_have_a_share():
    ids = torch.randint(VOCAB, (1, 8))
    batch = batch_of(ids)
    moved = dataclasses.replace(
        batch, positions=batch.positions + torch.tensor([0, 0, 1]) * (ids[..., None] % 3)
    )
    shifted = dataclasses.replace(batch, positions=batch.positions + torch.tensor([5, 2, 3]))
    plain = build(dataclasses.replace(TINY, rope_axes=(1.0, 0.0, 0.0)))
    mixed = build()
    assert torch.equal(plain(moved).logits, plain(batch).logits)
    assert not torch.allclose(mixed(moved).logits, mixed(batch).logits, atol=1e-3)
    # Attention sees differences of positions only.
    torch.testing.assert_close(mixed(shifted).logits, mixed(batch).logits, atol=1e-4, rtol=1e-4)


def test_rotation_keeps_lengths_and_shares_out_every_pair():
    rotary = Rotary(10, axes=(0.4, 0.3, 0.3))
    assert sum(rotary.pairs) == 5
    x = torch.randn(2, 3, 6, 10)
    rotated = rotate(x, rotary(torch.randint(50, (2, 6, 3))))
    torch.testing.assert_close(rotated.norm(dim=-1), x.norm(dim=-1))
    assert not torch.allclose(rotated, x)
    rounded = Rotary(8).to(torch.bfloat16)
    assert torch.equal(rounded(torch.full((1, 1, 3), 777))[0], Rotary(8)(torch.full((1, 1, 3), 777))[0])
    for bad in ((0.5, 0.5, 0.5), (1.5, -0.5, 0.0)):
        with pytest.raises(ValueError, match="add up to 1"):
            Rotary(8, axes=bad)


def test_rms_norm_takes_statistics_in_float32():
    norm = RMSNorm(64)
    x = torch.randn(5, 64)
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(norm(x), expected)
    half = 1000 * x.bfloat16()
    reference = norm(half.float()).bfloat16()
    assert torch.equal(norm(half), reference)
    assert torch.equal(norm.to(torch.bfloat16)(half), reference)


@torch.no_grad()
def test_bfloat16_autocast_and_bfloat16_weights_stay_near(model: CausalLM):
    batch = batch_of(torch.randint(VOCAB, (2, 10)))
    exact = model(batch).logits
    with torch.autocast("cpu", torch.bfloat16):
        near = model(batch).logits.float()
        cache = model.new_cache(2)
        cached = [model(take(batch, slice(None), slice(i, i + 5)), cache).logits for i in (0, 5)]
    spread = exact.std()
    assert (near - exact).abs().max() < 0.2 * spread
    assert (torch.cat(cached, 1).float() - near).abs().max() < 0.05 * spread
    half = build().to(torch.bfloat16)
    assert (half(batch).logits.float() - exact).abs().max() < 0.3 * spread


def test_attention_in_the_dtype_of_a_smaller_cache():
    q, k, v = (torch.randn(1, 2, 4, 8) for _ in range(3))
    near = attend(q, k.bfloat16(), v.bfloat16(), causal=True)
    assert near.dtype == torch.float32
    torch.testing.assert_close(near, attend(q, k, v, causal=True), atol=0.05, rtol=0.05)


@torch.no_grad()
def test_continuous_inputs_replace_embeddings(model: CausalLM):
    ids = torch.randint(VOCAB, (2, 6))
    other = ids.clone()
    other[1, 2], other[0, 4] = 3, 5
    swapped = dataclasses.replace(
        batch_of(ids),
        embeds=model.model.embed_tokens.weight[[3, 5]],
        embed_index=torch.tensor([[1, 2], [0, 4]]),
    )
    torch.testing.assert_close(model(swapped).logits, model(batch_of(other)).logits)


def test_dropout_acts_in_training_only():
    model = build(dataclasses.replace(TINY, dropout=0.5))
    batch = batch_of(torch.randint(VOCAB, (1, 6)))
    assert torch.equal(model(batch).logits, model(batch).logits)
    model.train()
    assert not torch.equal(model(batch).logits, model(batch).logits)


def test_initial_logits_are_small_and_residual_projections_scaled():
    torch.manual_seed(0)
    model = CausalLMConfig(VOCAB, dim=256, layers=8, heads=4, tie_embeddings=False).build()
    assert model(batch_of(torch.randint(VOCAB, (1, 16)))).logits.std() < 0.5
    layer = model.model.layers[3]
    assert layer.mlp.up_proj.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert layer.mlp.down_proj.weight.std().item() == pytest.approx(0.005, rel=0.05)
    assert layer.self_attn.o_proj.weight.std().item() == pytest.approx(0.005, rel=0.05)


@torch.no_grad()
def test_save_and_load_are_bit_exact(tmp_path, model: CausalLM):
    model.save_pretrained(tmp_path)
    again = CausalLM.from_pretrained(tmp_path)
    assert again.config == model.config
    assert again.fingerprint() == model.fingerprint()
    batch = batch_of(torch.randint(VOCAB, (1, 9)))
    assert torch.equal(again(batch).logits, model(batch).logits)


@torch.no_grad()
def test_a_full_cache_and_a_short_mask_say_what_to_do(model: CausalLM):
    cache = model.new_cache(1, max_length=4)
    model(batch_of(torch.zeros(1, 4, dtype=torch.long)), cache)
    with pytest.raises(LexelError, match=r"holds 4 positions, asked for 5; build it with max_length=5"):
        model(batch_of(torch.zeros(1, 1, dtype=torch.long)), cache)
    cache.crop(3)
    short = batch_of(torch.zeros(1, 1, dtype=torch.long), attention_mask=torch.ones(1, 1, 3).bool())
    with pytest.raises(ValueError, match="covers 3 slots, 4 are in use"):
        model(short, cache)
    with pytest.raises(ValueError, match="reads 1 codes per position, got 2"):
        model(batch_of(torch.zeros(1, 3, 2, dtype=torch.long)))
    assert isinstance(cache, KVCache)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dim": 30}, "does not divide into 4 heads"),
        ({"ffn_widths": [1.0, 0.5]}, "ascend"),
        ({"ffn_widths": (0.5,)}, "end in 1.0"),
        ({"head": "double"}, "single, parallel or factorized"),
        ({"codebook_sizes": (4, 4)}, "need head=parallel"),
        ({"head": "parallel", "codebook_sizes": (4, 4)}, "code_offsets of two or more"),
    ],
)
def test_configs_that_disagree_are_refused(fields: dict, message: str):
    with pytest.raises(ValueError, match=message):
        CausalLMConfig(VOCAB, **fields)


def test_config_takes_lists_and_fills_in_sizes():
    config = CausalLMConfig(VOCAB, dim=192, heads=4, rope_axes=[0.5, 0.25, 0.25])  # type: ignore[arg-type]
    assert config.rope_axes == (0.5, 0.25, 0.25)
    assert (config.head_width, config.key_heads, config.hidden_width) == (48, 4, 512)
    with pytest.raises(ValueError, match="cannot share 3"):
        CausalLMConfig(VOCAB, dim=32, heads=4, kv_heads=3).build()
