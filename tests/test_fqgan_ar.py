"""FQGAN's autoregressive models: two or three codes per position through a factorized head."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from raster_columns import (
    GOLDEN,
    assert_a_damaged_weight_is_noticed,
    assert_export_is_exact,
    assert_keys_are_consumed_exactly,
    tiny,
)

from lexel.errors import LexelError
from lexel.models import export_published, find_published, load_published, published_systems
from lexel.models.packed import pack
from lexel.models.raster_lm import RasterLM, RasterLMConfig
from lexel.sample.conditional import conditional_batch, draw
from lexel.sample.drafters import JacobiDrafter, LookupDrafter, ModelDrafter
from lexel.sample.logits import SamplingConfig
from lexel.tokenizers.factorized import FactorizedTokenizerConfig
from lexel.tokenizers.quantizers import QuantizerConfig
from lexel.train.objectives.lm import NextTokenObjective, predicting
from lexel.types import Codes
from lexel.verify import verify
from lexel.verify.fixture import Fixture

SMALL = {
    "dim": 32, "n_layer": 2, "ar_n_layer": 1, "n_head": 2, "num_classes": 4, "vocab_size": 12,
    "block_size": 9,
}  # fmt: skip
KINDS = ("dual", "triple")
GUIDED = SamplingConfig(
    temperature=0.0, guidance=2.5, schedule="linear", further=(SamplingConfig(temperature=0.0, guidance=1.5),)
)


@pytest.mark.parametrize("kind", KINDS)
def test_full_size_key_lists_are_consumed_exactly(kind: str) -> None:
    rows = {f"FAR-{size}": f"fqgan-ar-{kind}-{size.lower()}" for size in "BL"}
    assert_keys_are_consumed_exactly(f"fqgan_ar_{kind}", rows)


@pytest.mark.parametrize("kind", KINDS)
def test_export_is_exact(kind: str, tmp_path: Path) -> None:
    assert_export_is_exact(f"fqgan_ar_{kind}", f"fqgan-ar-{kind}-b", tmp_path)


@pytest.mark.parametrize("key", ["ar_head.0.attention.wqkv.weight", "tok_embeddings_2.weight"])
def test_a_damaged_weight_is_noticed(key: str, tmp_path: Path) -> None:
    assert_a_damaged_weight_is_noticed("fqgan_ar_dual", key, tmp_path)


def test_a_file_may_hold_what_the_reference_leaves_behind(tmp_path: Path) -> None:
    lm = tiny("fqgan_ar_dual", **SMALL)
    export_published(lm, "fqgan-ar-dual-b", tmp_path / "weights.pt")
    content = torch.load(tmp_path / "weights.pt", weights_only=True)["model"]
    content["layers.0.attention.kv_cache.k_cache"] = torch.zeros(1)
    torch.save({"module": content}, tmp_path / "weights.pt")
    again = load_published("fqgan-ar-dual-b", tmp_path / "weights.pt", SMALL)
    assert again.fingerprint() == lm.fingerprint()
    content["layers.0.attention.other"] = torch.zeros(1)
    torch.save(content, tmp_path / "weights.pt")
    with pytest.raises(LexelError, match=r"unknown layers\.0\.attention\.other"):
        load_published("fqgan-ar-dual-b", tmp_path / "weights.pt", SMALL)


def test_without_a_file_the_row_says_that_there_are_no_weights() -> None:
    with pytest.raises(LexelError, match="not published"):
        load_published("fqgan-ar-triple-l")


def test_a_dual_file_is_no_triple_model(tmp_path: Path) -> None:
    export_published(tiny("fqgan_ar_dual", **SMALL), "fqgan-ar-dual-b", tmp_path / "weights.pt")
    with pytest.raises(LexelError, match=r"missing tok_embeddings_3\.weight"):
        load_published("fqgan-ar-triple-b", tmp_path / "weights.pt", SMALL)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"block_size": 10}, "square"),
        ({"model_type": "t2i"}, "always 'c2i'"),
        ({"n_head": 3}, "does not divide"),
        ({"ar_layers": 2}, "no argument ar_layers"),
    ],
)
def test_arguments_that_cannot_be_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(LexelError, match=message):
        published_systems()["fqgan_ar_dual"].config({**SMALL, **arguments})


def test_a_later_code_depends_on_the_earlier_ones_of_its_position() -> None:
    lm = tiny("fqgan_ar_triple", **SMALL)
    hidden = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    codes = torch.tensor([[1, 2], [1, 3], [4, 2]])
    second, third = lm.head(hidden, codes)
    changed = codes.clone()
    changed[:, 1] = 7
    again = lm.head(hidden, changed)
    assert torch.equal(again[0], second)
    assert not torch.allclose(again[1], third)
    torch.testing.assert_close(lm.head.next_logits(hidden, codes[:, :1]), second)
    torch.testing.assert_close(lm.head.next_logits(hidden, codes), third)
    with pytest.raises(ValueError, match=r"columns 1\.\.2"):
        lm.head.next_logits(hidden, codes[:, :0])


def test_column_0_passes_through_the_head() -> None:
    lm = tiny("fqgan_ar_dual", **SMALL)
    hidden = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0))
    logits = lm.project(hidden)
    assert logits.shape == (2, 3, lm.config.vocab_size)
    assert bool(logits[..., 12:].isneginf().all())
    torch.testing.assert_close(lm.project(hidden, 3, 9), logits[..., 3:9])
    with torch.no_grad():
        lm.head.layers[0].mlp.down_proj.weight.mul_(2)
    assert not torch.allclose(lm.project(hidden)[..., :12], logits[..., :12])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["jacobi", "gumbel", "lookup", "model"])
def test_speculation_keeps_greedy_pictures(kind: str, name: str) -> None:
    system = f"fqgan_ar_{kind}"
    lm, little = tiny(system, **SMALL), tiny(system, seed=1, **{**SMALL, "n_layer": 1, "dim": 16})
    settings = GUIDED if kind == "dual" else replace(GUIDED, further=GUIDED.further * 2)
    plain = draw(lm, [0, 3, 4], sampling=settings)
    drafter = {
        "jacobi": lambda: JacobiDrafter(4),
        "gumbel": lambda: JacobiDrafter(4, coupling="gumbel"),
        "lookup": lambda: LookupDrafter(3),
        "model": lambda: ModelDrafter(little, 3),
    }[name]()
    assert torch.equal(draw(lm, [0, 3, 4], sampling=settings, drafter=drafter).indices, plain.indices)
    assert not torch.equal(plain.indices[0], plain.indices[1])


def test_a_picture_is_the_same_alone_and_in_company() -> None:
    lm = tiny("fqgan_ar_triple", **SMALL)
    settings = SamplingConfig(temperature=0.0, guidance=2.0)
    together = draw(lm, [2, 0, 1], sampling=settings, rows=2).indices
    assert torch.equal(draw(lm, [1], sampling=settings).indices[0], together[2])
    assert together.shape == (3, 9, 3)


def test_copies_and_packed_models_share_nothing_with_the_original() -> None:
    lm = tiny("fqgan_ar_dual", **SMALL)
    plain = draw(lm, [1, 2], sampling=GUIDED).indices
    twin = copy.deepcopy(lm)
    packed = pack(lm)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(-1.5)
    assert torch.equal(draw(lm, [1, 2], sampling=GUIDED).indices, plain)
    assert not torch.equal(draw(twin, [1, 2], sampling=GUIDED).indices, plain)
    assert torch.equal(draw(packed, [1, 2], sampling=GUIDED).indices, plain)


def test_what_is_drawn_the_tokenizer_decodes() -> None:
    torch.manual_seed(0)
    tokenizer = FactorizedTokenizerConfig(
        image_size=6, channels=8, channel_mult=(1, 2), decoder_mult=(1, 1), res_blocks=1, z_channels=8,
        embed_dim=4, norm_groups=4, adapter_layers=1, adapter_heads=2,
        quantizer=QuantizerConfig("learned", codebook_size=12),
    ).build().eval()  # fmt: skip
    codes = draw(tiny("fqgan_ar_dual", **SMALL), [0, 1], sampling=SamplingConfig(guidance=2.0))
    assert codes.grid == (3, 3)
    assert tokenizer.decode(codes).shape == (2, 3, 6, 6)


def test_the_recorded_loss_is_that_of_training(tmp_path: Path) -> None:
    """The objective's mean over positions and columns is the published one: the mean of the sub-codes'."""
    fixture = Fixture(GOLDEN / "fqgan_ar_triple", tmp_path)
    row = "fqgan-ar-triple-b"
    lm = load_published(row, fixture.weights(), find_published(row)[0].known(fixture.config))
    tokens = torch.stack([fixture.input(f"tokens_{i}") for i in (1, 2, 3)], dim=-1)
    loss = loss_of(lm, fixture.input("cond_idx").tolist(), tokens).detach()
    assert float(loss) == pytest.approx(float(fixture.recorded["loss"]), rel=1e-5)


def loss_of(lm: RasterLM, labels: list[int], tokens: torch.Tensor) -> torch.Tensor:
    batch = conditional_batch(lm, labels, Codes(tokens, (lm.config.side,) * 2))
    output = lm(batch, select=predicting(batch))
    objective = NextTokenObjective()
    return objective(output, batch, code_offsets=lm.config.code_offsets, pad_id=lm.config.pad_id)[0]


def test_one_batch_is_learned_by_heart() -> None:
    torch.manual_seed(0)
    lm: RasterLM = published_systems()["fqgan_ar_dual"].config(SMALL).build()
    tokens = torch.randint(12, (3, 9, 2))
    optimizer = torch.optim.AdamW(lm.parameters(), lr=5e-3)
    first = None
    for _ in range(80):
        loss = loss_of(lm, [0, 1, 4], tokens)
        first = first or float(loss.detach())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert first == pytest.approx(torch.tensor(12.0).log().item(), abs=1e-3)  # outputs start at zero
    assert float(loss.detach()) < 0.05
    drawn = draw(lm.eval(), [0, 1, 4], sampling=SamplingConfig(temperature=0.0))
    assert torch.equal(drawn.indices, tokens)


def test_a_factorized_head_needs_the_raster() -> None:
    with pytest.raises(ValueError, match="rotary table"):
        RasterLMConfig((4, 4), 32, 1, 2, head="factorized", positions="learned")


@pytest.mark.parametrize("kind", KINDS)
def test_verification_passes(kind: str) -> None:
    report = verify(f"fqgan_ar_{kind}", GOLDEN / f"fqgan_ar_{kind}")
    assert report.passed, "\n" + report.table()
