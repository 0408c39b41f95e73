"""Nested models: taken out they are themselves, and how much they agree with the whole is what it says."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lexel.evaluate.consistency import consistency
from lexel.models.causal_lm import CausalLM, CausalLMConfig
from lexel.models.matformer import extract
from lexel.nn.decoder import nested_width
from lexel.types import TokenBatch

TINY = {"vocab_size": 50, "dim": 32, "layers": 2, "heads": 4, "ffn_dim": 96, "ffn_widths": (0.25, 0.5, 1.0)}


def a_model(**options: object) -> CausalLM:
    torch.manual_seed(0)
    lm = CausalLMConfig(**{**TINY, **options}).build().eval()  # type: ignore[arg-type]
    for name, value in lm.named_parameters():  # as far from the initial state as a trained model
        torch.nn.init.normal_(value, 1.0 if "norm" in name else 0.0, 0.2)
    return lm


def a_batch(columns: int = 1) -> TokenBatch:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(8, 50, (3, 12, columns), generator=generator)
    positions = torch.randint(12, (3, 12, 3), generator=generator)
    return TokenBatch(ids[..., 0] if columns == 1 else ids, torch.zeros(3, 12).long(), positions)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"qk_norm": True, "tie_embeddings": False, "rope_axes": (0.5, 0.25, 0.25)},
        {"kv_heads": 2, "head_dim": 12, "ffn_dim": None, "future_heads": 2},
        {"head": "parallel", "codebook_sizes": (16, 16), "code_offsets": (8, 24)},
    ],
)
@pytest.mark.parametrize("width", [0.25, 0.5, 1.0])
def test_an_extracted_model_is_the_nested_forward_bit_for_bit(options, width, tmp_path):
    lm = a_model(**options)
    batch = a_batch(lm.config.columns)
    small = extract(lm, width)
    units = nested_width(lm.config.hidden_width, width)
    assert small.config.hidden_width == units
    assert small.model.layers[0].mlp.up_proj.weight.shape == (units, 32)
    assert width == 1.0 or sum(p.numel() for p in small.parameters()) < sum(
        p.numel() for p in lm.parameters()
    )
    small.save_pretrained(tmp_path)
    loaded = CausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        expected = lm(batch, width=width, future=True)
        for model in (small, loaded):
            found = model(batch, future=True)
            assert torch.equal(found.logits, expected.logits)
            for ours, theirs in zip(
                (*found.code_logits, *found.future_logits),
                (*expected.code_logits, *expected.future_logits),
                strict=True,
            ):
                assert torch.equal(ours, theirs)
    small.model.layers[0].mlp.up_proj.weight.data.zero_()
    with torch.no_grad():
        assert torch.equal(lm(batch, width=width).logits, expected.logits), "no memory is shared"


def test_what_cannot_stand_alone_is_refused():
    lm = a_model(head="factorized", codebook_sizes=(16, 16), code_offsets=(8, 24))
    with pytest.raises(ValueError, match="factorized head"):
        extract(lm, 0.25)
    with pytest.raises(ValueError, match=r"in \(0, 1\]"):
        extract(a_model(), 1.5)


def test_consistency_is_the_share_of_equal_guesses_and_the_divergence():
    lm, batch = a_model(), a_batch()
    select = torch.zeros(3, 12, dtype=torch.bool)
    select[:, 4:9] = True
    found = consistency(lm, [(batch, select), (batch, ~select)], 0.25)
    with torch.no_grad():
        whole, nested = lm(batch).logits.flatten(0, 1), lm(batch, width=0.25).logits.flatten(0, 1)
    p, q = whole.softmax(-1), nested.softmax(-1)
    assert found.positions == 36
    assert found.agreement == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).float().mean()))
    assert 0 < found.agreement < 1
    expected = (p * (p.log() - q.log())).sum(-1).mean()
    assert found.divergence == pytest.approx(float(expected), rel=1e-4)
    same = consistency(lm, [(batch, select)], 1.0)
    assert (same.agreement, same.divergence) == (1.0, 0.0)
    with pytest.raises(ValueError, match="no position"):
        consistency(lm, [(batch, torch.zeros_like(select))], 0.25)


def test_only_the_units_in_use_learn_in_a_narrow_step():
    lm = a_model()
    logits = lm(a_batch(), width=0.25).logits
    F.cross_entropy(logits.flatten(0, 1), a_batch().ids.flatten()).backward()
    mlp, units = lm.model.layers[0].mlp, nested_width(96, 0.25)
    for gradient in (mlp.gate_proj.weight.grad, mlp.up_proj.weight.grad, mlp.down_proj.weight.grad.T):
        assert gradient[:units].abs().sum() > 0
        assert gradient[units:].abs().sum() == 0


def test_the_report_names_the_agreement_of_every_nested_width(tiny_pipeline):
    from rich.progress import Progress

    from lexel.data.example import stack_pixels
    from lexel.data.shapes import ShapesConfig
    from lexel.evaluate.card import figures
    from lexel.evaluate.evaluate import Evaluation

    examples = ShapesConfig(count=64).scenes("two", 4)
    evaluation = Evaluation(tiny_pipeline, 4, 0, 3, Progress(disable=True))
    with torch.inference_mode():
        evaluation.measure_likelihood(examples, tiny_pipeline.encode(stack_pixels(examples)))
    report = evaluation.report
    entries = report["nested"]["50_percent"]
    assert set(entries) == {"agreement_image", "kl_image", "agreement_text", "kl_text"}
    assert 0 <= entries["agreement_image"] <= 1
    assert entries["kl_text"] > 0
    rows = {row.name: row.value for row in figures(report)}
    assert rows["nested.50_percent.agreement_text"].endswith("%")
