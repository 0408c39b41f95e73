"""Next-all against its formula written out by hand, and the exposure gap where it is known."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from lexel.data.packing import pack
from lexel.data.text_tokenizer import train_text_tokenizer
from lexel.document import DocumentCodec, Image, Text
from lexel.evaluate.exposure import code_losses, exposure
from lexel.models.causal_lm import CausalLM, CausalLMConfig
from lexel.tokenizers.layout import CodeLayout
from lexel.train.lm_module import LMModule
from lexel.train.objectives.lm import NextTokenObjective, predicting
from lexel.train.objectives.next_all import NextAllObjective, bag_loss, spans
from lexel.train.settings import LMStage
from lexel.types import Codes, LMOutput, TokenBatch
from lexel.vocabulary import Vocabulary

VOCAB = 12


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def a_batch() -> TokenBatch:
    index = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7, 8], [0, 1, 2, 3, 0, 1, 2, 3, 4]])
    return TokenBatch(
        torch.randint(VOCAB, (2, 9)),
        torch.tensor([[0, 0, 0, 1, 1, 1, 1, 0, 0], [0, 0, 0, 0, 0, 0, 0, 1, 1]]),
        torch.stack([index, index * 0, index * 0], -1),
        loss_mask=torch.tensor([[0, 1, 1, 1, 1, 0, 1, 1, 1], [0, 1, 1, 1, 0, 1, 1, 1, 1]]).bool(),
    )


# What follows is a span of targets together, by row: places in the sequence.
SPANS = [[[1, 2], [3, 4], [6], [7, 8]], [[1, 2, 3], [5, 6], [7, 8]]]


def test_spans_end_with_modality_document_and_targets():
    found = spans(a_batch())
    for row, expected in enumerate(SPANS):
        for span in expected:
            assert len(set(found[row, span].tolist())) == 1
        numbers = [int(found[row, span[0]]) for span in expected]
        assert len(set(numbers)) == len(numbers)
        rest = [place for place in range(9) if not any(place in span for span in expected)]
        assert (found[row, rest] == -1).all()


def by_hand(logits: torch.Tensor, batch: TokenBatch) -> dict[tuple[int, int], torch.Tensor]:
    """-1/(n-i+1) sum_{j>=i} log q(x_j), for each target (row, i)."""
    terms = {}
    for row, expected in enumerate(SPANS):
        for span in expected:
            for number, place in enumerate(span):
                log_q = logits[row, place - 1].log_softmax(-1)
                terms[row, place] = -torch.stack([log_q[batch.ids[row, j]] for j in span[number:]]).mean()
    return terms


def test_the_term_is_its_formula_and_the_weights_hold():
    batch, hidden = a_batch(), torch.randn(2, 9, 6)
    table = torch.randn(VOCAB, 6)
    objective = NextAllObjective(weights={"image": 3.0}, z_loss=0.0, next_all=0.5)
    objective.prepare(6)
    objective.head.weight.data.normal_()
    logits = torch.randn(2, 9, VOCAB)
    output = LMOutput(logits, hidden)
    project = partial(torch.nn.functional.linear, weight=table)
    loss, metrics = objective(output, batch, project=project)
    bag = project(hidden + torch.nn.functional.silu(objective.head(hidden)))
    terms = by_hand(bag, batch)
    weight = {key: 3.0 if batch.modality[key] == 1 else 1.0 for key in terms}
    expected = sum(weight[key] * terms[key] for key in terms) / sum(weight.values())
    torch.testing.assert_close(metrics["next_all"], expected.detach())
    plain, _ = NextTokenObjective(weights={"image": 3.0})(output, batch)
    torch.testing.assert_close(loss, plain + 0.5 * expected)


def test_the_last_token_of_a_span_is_next_token_prediction():
    batch, logits = a_batch(), torch.randn(2, 9, VOCAB)
    select = predicting(batch)
    terms = bag_loss(logits[select], batch, select)
    order = [(row, place + 1) for row, place in select.nonzero().tolist()]
    for row, expected in enumerate(SPANS):
        for span in expected:
            own = -logits[row, span[-1] - 1].log_softmax(-1)[batch.ids[row, span[-1]]]
            torch.testing.assert_close(terms[order.index((row, span[-1]))], own)


def test_packed_documents_do_not_see_each_other():
    layout = CodeLayout((8,), grid=(2, 2))
    text = train_text_tokenizer(["a b c"], 270)
    codec = DocumentCodec(Vocabulary.build(len(text), {"image": (8,)}), text, {"image": layout})
    sequences = [
        codec.build([Text("a b"), Image(Codes(torch.randint(8, (1, 4, 1)), (2, 2)))], supervise="all")
        for _ in range(3)
    ]
    special = codec.vocabulary.special
    packed = pack(sequences, 64, special["pad"])
    table = torch.randn(codec.vocabulary.size, codec.vocabulary.size)  # logits that depend on the id alone
    totals = []
    for batch in (packed, codec.collate(sequences)):
        select = predicting(batch)
        totals.append(bag_loss(table[batch.ids][select], batch, select).sort().values)
    torch.testing.assert_close(*totals)


def test_the_head_learns_and_is_not_exported(tmp_path):
    config = CausalLMConfig(VOCAB, dim=16, layers=1, heads=2)
    stage = LMStage(optimizer=partial(torch.optim.AdamW, weight_decay=0.0), steps=3, ema=0.5)
    module = LMModule(config.build(), NextAllObjective(z_loss=0.0), stage)
    loss, metrics = module.compute(module.network, a_batch())
    assert loss > metrics["next_all"] * 0.1
    loss.backward()
    assert module.objective.head.weight.grad.abs().sum() > 0
    learned = {
        id(p) for group in module.configure_optimizers()["optimizer"].param_groups for p in group["params"]
    }
    assert {id(p) for p in module.objective.parameters()} <= learned
    assert len(learned) == len(list(module.network.parameters())) + 2
    module.network.save_pretrained(tmp_path)
    assert CausalLM.from_pretrained(tmp_path).state_dict().keys() == config.build().state_dict().keys()
    plain = LMModule(config.build(), NextTokenObjective(), stage)
    groups = plain.configure_optimizers()["optimizer"].param_groups
    assert sum(len(group["params"]) for group in groups) == len(list(plain.network.parameters()))


def test_a_wrong_objective_is_refused():
    with pytest.raises(ValueError, match="next_all must not be negative"):
        NextAllObjective(next_all=-1)
    with pytest.raises(ValueError, match="needs its head"):
        NextAllObjective()(LMOutput(torch.randn(2, 9, VOCAB), torch.randn(2, 9, 6)), a_batch())


def a_codec() -> DocumentCodec:
    text = train_text_tokenizer(["a b c"], 270)
    layout = CodeLayout((8,), grid=(3, 4))
    return DocumentCodec(Vocabulary.build(len(text), {"image": (8,)}), text, {"image": layout})


def a_model(codec: DocumentCodec, seed: int) -> CausalLM:
    torch.manual_seed(seed)
    lm = CausalLMConfig(codec.vocabulary.size, dim=16, layers=1, heads=2, max_length=64).build().eval()
    torch.nn.init.normal_(lm.model.embed_tokens.weight, 0.0, 0.8)
    return lm


def test_a_model_judged_by_itself_has_no_gap():
    """The data are the judge's own samples: mean losses of 300 pairs within 4.5 standard errors."""
    codec = a_codec()
    judge = a_model(codec, 1)
    blank = [[Text("a b"), Image(Codes(torch.zeros(1, 12, 1, dtype=torch.long), (3, 4)))]] * 300
    from lexel.evaluate.exposure import _redrawn

    data = _redrawn(judge, codec, blank, torch.Generator().manual_seed(5))
    same = exposure(judge, judge, codec, data, seed=6, batch_size=150)
    error = float(code_losses(judge, codec, data).mean(1).std()) * (2 / 300) ** 0.5
    assert abs(same.gap) < 4.5 * error
    assert same.own == same.data
    assert same.samples.shape == (12,)
    other = exposure(a_model(codec, 2), judge, codec, data, seed=6, batch_size=150)
    assert other.gap > 10 * error
    with pytest.raises(ValueError, match="end in a picture"):
        exposure(judge, judge, codec, [[Text("a")]])


def test_losses_are_those_of_the_codes_alone():
    codec = a_codec()
    judge = a_model(codec, 1)
    document = [Text("a b"), Image(Codes(torch.arange(12)[None, :, None] % 8, (3, 4)))]
    sequence = codec.build(document)
    with torch.no_grad():
        logits = judge(codec.collate([sequence])).logits[0]
    block = codec.vocabulary.block("image")
    start = sequence.ids.tolist().index(codec.vocabulary.special["boi"])
    expected = [
        -logits[start + i][block].log_softmax(-1)[sequence.ids[start + 1 + i] - block[0]] for i in range(12)
    ]
    torch.testing.assert_close(code_losses(judge, codec, [document])[0], torch.stack(expected))
