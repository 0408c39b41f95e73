"""The packed language model gives the unpacked one's numbers, by every kind of product."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.floor import memory_floor, weight_bytes
from lexel.errors import LexelError
from lexel.models import packed as packing
from lexel.models.causal_lm import CausalLM, CausalLMConfig
from lexel.models.graphs import GraphedStep
from lexel.models.packed import PackedLayer, PackedLM, pack
from lexel.models.raster_lm import RasterLMConfig
from lexel.nn import kernels as compiled
from lexel.nn import products
from lexel.nn.kernels import load_kernels, quantize_rows
from lexel.nn.products import Product
from lexel.types import TokenBatch

VOCAB = 72
TINY = CausalLMConfig(
    VOCAB,
    dim=40,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=24,
    ffn_dim=72,
    rope_axes=(0.5, 0.25, 0.25),
    qk_norm=True,
    ffn_widths=(0.25, 0.5, 1.0),
    max_length=64,
)
CLOSE = {"atol": 1e-5, "rtol": 1e-5}
compiler = pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler")
BOTH = pytest.mark.parametrize("compile", [False, pytest.param(True, marks=compiler)])


def build(config: CausalLMConfig = TINY) -> CausalLM:
    torch.manual_seed(0)
    model = config.build().eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            parameter.mul_(5)
        elif "norm" in name:
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def batch_of(ids: Tensor, starts: list[int] | None = None, **fields: Tensor) -> TokenBatch:
    rows, new = ids.shape[:2]
    index = torch.tensor(starts or [0] * rows)[:, None] + torch.arange(new)
    positions = torch.stack((index, index // 4, index % 4), -1)
    return TokenBatch(ids, torch.zeros(rows, new, dtype=torch.long), positions, **fields)


@pytest.fixture(scope="module")
def model() -> CausalLM:
    return build()


@pytest.fixture(autouse=True)
def _panels_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled kernels are used wherever they exist, whatever this machine's timing says."""
    monkeypatch.setattr(products, "TIE", 0.0)
    monkeypatch.setattr(products, "COLD", 0)


@BOTH
@pytest.mark.parametrize("length", [1, 7, 40])
@pytest.mark.parametrize("width", [None, 0.25, 0.5])
def test_without_a_cache(model: CausalLM, compile: bool, length: int, width: float | None):
    ids = torch.randint(VOCAB, (2, length))
    expected = model(batch_of(ids), width=width)
    got = pack(model, compile=compile)(batch_of(ids), width=width)
    torch.testing.assert_close(got.logits, expected.logits, **CLOSE)
    torch.testing.assert_close(got.hidden, expected.hidden, **CLOSE)


@BOTH
def test_ragged_rows_and_trees_in_a_cache(model: CausalLM, compile: bool):
    """Prefill, cut the rows to different lengths, one more token each, then a tree."""
    outputs = []
    ids = torch.randint(VOCAB, (3, 20))
    tree = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 1, 1]], dtype=torch.bool)
    for lm in (model, pack(model, compile=compile)):
        cache = lm.new_cache(3, 32)
        found = [lm.decode(batch_of(ids), cache)[0]]
        cache.crop([20, 5, 11])
        found.append(lm.decode(batch_of(ids[:, :1], [20, 5, 11]), cache)[0])
        lengths = cache.host_lengths
        mask = torch.zeros(3, 4, max(lengths) + 4, dtype=torch.bool)
        for row, length in enumerate(lengths):
            mask[row, :, :length] = True
            mask[row, :, length : length + 4] = tree
        batch = batch_of(ids[:, :4], list(lengths), attention_mask=mask)
        hidden, inputs = lm.decode(batch, cache, layers=(0, 1))
        found += [hidden, *inputs, lm.project(hidden), lm.project(hidden, 10, 45)]
        outputs.append((found, cache.keys, cache.host_lengths))
    (expected, keys, lengths), (got, packed_keys, packed_lengths) = outputs
    assert lengths == packed_lengths == (25, 10, 16)
    for a, b in zip(expected, got):
        torch.testing.assert_close(b, a, **CLOSE)
    torch.testing.assert_close(packed_keys, keys, **CLOSE)


@BOTH
@pytest.mark.parametrize("interleaved", [False, True])
def test_shares_of_a_layer(compile: bool, interleaved: bool):
    """Odd sizes: heads that are no multiple of a register, more rows than a tile, no norms of heads; and rows
    that see nothing but themselves."""
    from lexel.nn.rope import rotate_interleaved

    config = dataclasses.replace(TINY, dim=26, heads=3, kv_heads=1, head_dim=10, ffn_dim=36, qk_norm=False)
    lm = build(config)
    if interleaved:
        for layer in lm.model.layers:
            layer.self_attn.turn = rotate_interleaved  # type: ignore[union-attr]
    ids = torch.randint(VOCAB, (5, 11))
    mask = torch.eye(11, dtype=torch.bool).expand(5, -1, -1)
    batch = batch_of(ids, [3, 0, 9, 1, 2], attention_mask=mask)
    packed = pack(lm, compile=compile)
    assert any(isinstance(part, PackedLayer) for part in packed.modules()) == compile
    torch.testing.assert_close(packed(batch).logits, lm(batch).logits, **CLOSE)


@BOTH
@pytest.mark.parametrize("head", ["parallel", "factorized"])
def test_several_codes_per_position(compile: bool, head: str):
    config = dataclasses.replace(TINY, head=head, codebook_sizes=(16, 8, 12), code_offsets=(8, 24, 32))
    lm = build(config)
    packed = pack(lm, compile=compile)
    ids = torch.randint(8, 24, (2, 6, 3))
    expected, got = lm(batch_of(ids)), packed(batch_of(ids))
    for a, b in zip(expected.code_logits, got.code_logits):
        torch.testing.assert_close(b, a, **CLOSE)
    chosen = torch.randint(8, (2, 2))
    assert lm.head is not None
    assert packed.head is not None
    hidden = expected.hidden[:, -1]
    torch.testing.assert_close(
        packed.head.next_logits(hidden, chosen), lm.head.next_logits(hidden, chosen), **CLOSE
    )


@BOTH
def test_future_heads_and_an_own_output_table(compile: bool):
    lm = build(dataclasses.replace(TINY, future_heads=2, tie_embeddings=False))
    assert lm.future is not None
    for parameter in lm.future.parameters():
        parameter.copy_(torch.randn_like(parameter) / 8)
    ids = torch.randint(VOCAB, (2, 6))
    expected, got = (m(batch_of(ids), future=True) for m in (lm, pack(lm, compile=compile)))
    torch.testing.assert_close(got.logits, expected.logits, **CLOSE)
    for a, b in zip(expected.future_logits, got.future_logits):
        torch.testing.assert_close(b, a, **CLOSE)


# Bounds on the largest error, as a share of the logits' standard deviation.
@BOTH
@pytest.mark.parametrize(("dtype", "bound"), [("bfloat16", 0.06), ("int8", 0.12)])
def test_rounded_weights(model: CausalLM, compile: bool, dtype: products.Precision, bound: float):
    ids = torch.randint(VOCAB, (2, 30))
    expected = model(batch_of(ids)).logits
    got = pack(model, dtype, compile)(batch_of(ids)).logits
    assert got.dtype == torch.float32
    error = (got - expected).abs().max() / expected.std()
    assert 1e-4 < error < bound  # they are rounded, but not by much


@compiler
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("rows", [1, 5, 12, 13, 37])
def test_compiled_products_equal_the_eager_ones(dtype: products.Precision, rows: int):
    weights = torch.randn(33, 560), torch.randn(40, 560)
    x = torch.randn(rows, 560)
    product = Product(weights, dtype, 0, load_kernels())
    both = [product.method(name)(x) for name in ("panels", "rows")]
    scale = float(both[1].abs().max())
    # "rows" rounds its bfloat16 results once more.
    torch.testing.assert_close(both[0], both[1], atol=scale * (1e-5 if dtype == "float32" else 0.01), rtol=0)


@pytest.mark.parametrize("name", ["blocked", "transposed", "rows"])
@pytest.mark.parametrize("rows", [0, 1, 3, 9])
def test_eager_products(name: str, rows: int):
    weight, x = torch.randn(24, 16), torch.randn(rows, 16)
    torch.testing.assert_close(Product([weight], "float32", 0).method(name)(x), x @ weight.t(), **CLOSE)


def test_quantized_rows_are_the_nearest_levels():
    weight = torch.randn(6, 50) * torch.tensor([1e-3, 1, 50, 0, 1, 1])[:, None]
    levels, scale = quantize_rows(weight)
    assert (levels.abs().amax(1)[[0, 1, 2, 4, 5]] == 127).all()
    assert ((levels * scale[:, None] - weight).abs() <= scale[:, None] * 0.50001).all()


def test_the_quickest_method_is_chosen_once(monkeypatch: pytest.MonkeyPatch):
    calls = []

    def measured(*arguments: object) -> dict[str, float]:
        calls.append(arguments)
        return {"blocked": 1.0, "transposed": 0.9, "rows": 0.5 if arguments[3] == 4 else 2.0}

    monkeypatch.setattr(products, "measure", measured)
    monkeypatch.setattr(products, "TIE", 0.8)
    monkeypatch.setattr(products, "_CHOSEN", {})
    product = Product([torch.randn(24, 16)], "float32", 0)
    assert product.best(2) == "blocked"  # a tie: the preferred one
    assert product.best(4) == "rows"
    assert product.best(5) == product.best(8) == "blocked"
    assert len(calls) == 3


def test_a_wrong_method_is_left_out(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(products, "_blocked", lambda weight: lambda x: x @ weight.t() * 1.01)
    monkeypatch.setattr(products, "_FAILED", {})
    assert set(products.measure(24, 16, "float32", 2, 0)) == {"transposed", "rows"}
    assert "wrong by" in products.failures()["float32", "blocked"]


def test_without_a_compiler_the_eager_products_remain(
    model: CausalLM, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    load_kernels.cache_clear()
    monkeypatch.setattr(compiled.shutil, "which", lambda name: None)
    lm = pack(model, compile=True)
    assert "no C++ compiler" in caplog.text
    ids = torch.randint(VOCAB, (1, 3))
    torch.testing.assert_close(lm(batch_of(ids)).logits, model(batch_of(ids)).logits, **CLOSE)


@compiler
def test_what_the_compiler_cannot_build_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = tmp_path / "kernels.cpp"
    source.write_text("int lexel_product( {")
    monkeypatch.setattr(compiled, "SOURCE", source)
    load_kernels.cache_clear()
    with pytest.raises(LexelError, match=r"could not build kernels\.cpp"):
        load_kernels()


@compiler
def test_a_wrong_kernel_is_not_used(
    model: CausalLM, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(packing, "_triangle", lambda length: torch.zeros(1, 1, length, length))
    lm = pack(model, compile=True)
    assert "a compiled block is wrong" in caplog.text
    assert not any(isinstance(part, PackedLayer) for part in lm.modules())


@BOTH
@pytest.mark.parametrize("positions", ["raster", "learned"])
def test_models_of_pictures_alone_keep_their_own_tables(compile: bool, positions: Any):
    form = {"side": 3} if positions == "raster" else {"side": 0, "length": 9}
    config = RasterLMConfig((24,), dim=32, layers=2, heads=4, num_classes=5, positions=positions, **form)
    lm = config.build().eval().requires_grad_(False)
    for parameter in lm.parameters():
        parameter.normal_(std=0.3)
    batch = batch_of(torch.cat([torch.full((2, 1), 27), torch.randint(24, (2, 8))], dim=1))
    packed = pack(lm, compile=compile)
    (expected, _), (found, _) = (one.decode(batch) for one in (lm, packed))
    torch.testing.assert_close(found, expected, **CLOSE)
    torch.testing.assert_close(packed.project(found), lm.project(expected), **CLOSE)
    assert packed.fingerprint() == lm.fingerprint()
    with pytest.raises(LexelError, match="trained"):
        packed.train()


def test_packing_leaves_the_model_alone():
    lm = build().train()
    packed = pack(lm)
    assert all(part.training for part in lm.modules())
    assert not any(part.training for part in packed.modules())
    assert type(lm) is CausalLM
    assert isinstance(packed, PackedLM)
    assert packed.model.embed_tokens.weight is lm.model.embed_tokens.weight
    assert packed.fingerprint() == lm.fingerprint()


def test_what_a_packed_model_refuses(model: CausalLM, tmp_path: Path):
    lm = pack(model)
    with pytest.raises(LexelError, match="trained"):
        lm.train()
    with pytest.raises(LexelError, match="saved"):
        lm.save_pretrained(tmp_path)
    with pytest.raises(LexelError, match="moved"):
        lm.to(torch.float64)
    with pytest.raises(LexelError, match="float16"):
        pack(model, "float16")  # type: ignore[arg-type]


def test_further_ranges_of_ids_are_sliced(model: CausalLM):
    lm = pack(model)
    hidden = torch.randn(2, TINY.dim)
    for start in range(packing.RANGES + 3):
        torch.testing.assert_close(lm.project(hidden, start, 50), model.project(hidden, start, 50), **CLOSE)
    assert len(lm._ranges) == packing.RANGES  # type: ignore[attr-defined]


def test_any_network_can_be_packed():
    layer = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 3)).requires_grad_(False)
    x = torch.randn(4, 6)
    torch.testing.assert_close(pack(layer)(x), layer(x), **CLOSE)


def stepped(lm: CausalLM, device: str = "cpu", calls: int = 1) -> None:
    """A graphed step equals `decode`, for ragged rows and a tree."""
    ids = torch.randint(VOCAB, (2, 12), device=device)
    cache = lm.new_cache(2, 40)
    lm.decode(batch_of(ids.cpu()) if device == "cpu" else _on(batch_of(ids.cpu()), device), cache)
    cache.crop([12, 7])
    tree = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 0, 1]], dtype=torch.bool).expand(2, -1, -1)
    new = batch_of(ids[:, :3].cpu(), [12, 7])
    step = GraphedStep(lm, cache, 3, lambda hidden: lm.project(hidden).softmax(-1))
    for _ in range(calls):
        got = step(new.ids, new.positions, tree)
    assert cache.host_lengths == (12, 7)
    mask = torch.zeros(2, 3, 15, dtype=torch.bool)
    for row, length in enumerate((12, 7)):
        mask[row, :, :length] = True
        mask[row, :, length : length + 3] = tree[row]
    batch = dataclasses.replace(new, attention_mask=mask)
    expected = lm.decode(batch if device == "cpu" else _on(batch, device), cache)[0]
    torch.testing.assert_close(got, lm.project(expected).softmax(-1), **CLOSE)


def _on(batch: TokenBatch, device: str) -> TokenBatch:
    values = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    return TokenBatch(**{k: v.to(device) if isinstance(v, Tensor) else v for k, v in values.items()})


def test_graphed_step_equals_decode(model: CausalLM):
    stepped(model)


@pytest.mark.gpu
def test_graphed_step_on_cuda():
    stepped(build().cuda(), "cuda", calls=3)


def test_a_graphed_step_never_asks_the_host(model: CausalLM):
    """Traced whole, with shapes alone: a value read on the host would break the graph."""
    cache = model.new_cache(2, 16)
    step = GraphedStep(model, cache, 3, model.project)
    lengths, ids = torch.tensor([4, 9]), torch.randint(VOCAB, (2, 3))
    tree = torch.ones(3, 3, dtype=torch.bool).tril().expand(2, -1, -1)
    arguments = ids, batch_of(ids, [4, 9]).positions, lengths, tree
    with torch.no_grad():
        expected = step.run(*arguments)
        got = torch.compile(step.run, fullgraph=True, backend="eager", dynamic=False)(*arguments)
    torch.testing.assert_close(got, expected)


def test_memory_floor(model: CausalLM):
    config = model.config
    block = config.dim * config.head_width * (2 * config.heads + 2 * config.key_heads) + 3 * 40 * 72
    assert weight_bytes(model) == 4 * (2 * block + VOCAB * config.dim)
    assert weight_bytes(model, "bfloat16") * 2 == weight_bytes(model)
    big = CausalLMConfig(256, dim=256, layers=4, heads=4).build()
    assert 0 < memory_floor(model, "int8") < memory_floor(big)
