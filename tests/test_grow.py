"""Widened language models give the narrow one's logits, at every nested width, and can go their own way."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lexel.models.causal_lm import CausalLM, CausalLMConfig
from lexel.models.grow import widen
from lexel.nn.decoder import nested_width
from lexel.types import TokenBatch

ROOT = Path(__file__).parents[1]
TINY = {"vocab_size": 50, "dim": 32, "layers": 2, "heads": 4, "ffn_dim": 64, "rope_axes": (0.5, 0.25, 0.25)}


def _lm(**options: object) -> CausalLM:
    torch.manual_seed(0)
    lm = CausalLMConfig(**{**TINY, **options}).build().eval()  # type: ignore[arg-type]
    for name, value in lm.named_parameters():  # as far from the initial state as a trained model
        torch.nn.init.normal_(value, 1.0 if "norm" in name else 0.0, 0.2)
    return lm


def _batch() -> TokenBatch:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(50, (2, 12), generator=generator)
    positions = torch.randint(12, (2, 12, 3), generator=generator)
    return TokenBatch(ids=ids, modality=torch.zeros_like(ids), positions=positions)


@pytest.mark.parametrize("noise", [0.0, 0.7])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"qk_norm": True, "tie_embeddings": False},
        {"kv_heads": 2, "head_dim": 12, "ffn_dim": None},
        {"ffn_widths": (0.25, 0.5, 1.0), "qk_norm": True, "future_heads": 2},
    ],
)
def test_logits_are_the_narrow_models(options: dict[str, object], noise: float) -> None:
    lm, batch = _lm(**options), _batch()
    grown = widen(lm, 3, layers=1, noise=noise)
    assert grown.config.dim == 96
    assert len(grown.model.layers) == 3
    with torch.no_grad():
        for narrow, wide in zip(lm.config.ffn_widths, grown.config.ffn_widths, strict=True):
            expected = lm(batch, width=narrow).logits
            assert expected.std() > 0.3
            found = grown(batch, width=wide).logits
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_nested_widths_keep_their_units() -> None:
    lm = _lm(ffn_dim=40, ffn_widths=(0.25, 1.0), qk_norm=True)
    assert nested_width(40, 0.25) == 8
    grown, batch = widen(lm, 3), _batch()
    assert nested_width(120, 0.25) == 32, "a quarter of the wide network is not three times eight units"
    assert grown.config.ffn_widths == (0.2, 1.0)
    with torch.no_grad():
        found, expected = grown(batch, width=0.2).logits, lm(batch, width=0.25).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_noise_parts_the_copies(noise: float) -> None:
    grown, batch = widen(_lm(), 2, noise=noise).train(), _batch()
    grown(batch).logits.square().mean().backward()
    layer = grown.model.layers[0]
    for gradient, copies in (
        (layer.mlp.gate_proj.weight.grad, (64, 2)),
        (layer.self_attn.q_proj.weight.grad, None),
    ):
        first, second = gradient.unflatten(0, copies).unbind(1) if copies else gradient.chunk(2)
        assert torch.allclose(first, second, atol=1e-6) == (noise == 0)


def test_dtype_and_global_random_state_are_kept() -> None:
    lm = _lm().to(torch.bfloat16)
    state = torch.get_rng_state()
    assert next(widen(lm, 2, layers=1).parameters()).dtype == torch.bfloat16
    assert torch.equal(state, torch.get_rng_state())


def test_what_cannot_be_grown_is_refused() -> None:
    codes = {"codebook_sizes": (8, 8), "code_offsets": (10, 18)}
    for head in ("factorized", "parallel"):
        with pytest.raises(ValueError, match=f"a {head} head for 2 codes"):
            widen(_lm(head=head, **codes), 2)
    for arguments in ((0, 0), (2, -1)):
        with pytest.raises(ValueError, match="a factor of at least 1"):
            widen(_lm(), *arguments)


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.grow import main
    from lexel.train.codec import load_codec

    main(["--factor", "2", "--layers", "1", "--out", str(tmp_path / "grown")])
    lm = CausalLM.from_pretrained(tmp_path / "grown")
    assert (lm.config.dim, lm.config.layers, lm.config.ffn_widths) == (256, 6, (0.25, 1.0))
    assert load_codec(tmp_path / "grown").vocabulary.size == lm.config.vocab_size
    assert "width 128 to 256" in capsys.readouterr().out
