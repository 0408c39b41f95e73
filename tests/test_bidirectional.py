"""Given pictures seen in both directions: what may look where, and that sampling agrees with training."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from decoding_fakes import DRAFTERS, RASTER, codec, model
from wrapped_fakes import wrapped

from lexel.data.packing import pack
from lexel.document import Grammar, Image, Text
from lexel.errors import LexelError
from lexel.models.causal_lm import CausalLM, CausalLMConfig
from lexel.models.wrapped_lm import WrappedLM
from lexel.nn.spans import given_spans, picture_spans, see_given, span_mask
from lexel.sample.decode import generate
from lexel.sample.logits import SamplingConfig
from lexel.tokenizers.layout import CodeLayout
from lexel.train.codec import closing, complete_lm
from lexel.types import Codes, TokenBatch

KIT = codec(RASTER)
CLOSING = closing(["image"], KIT.vocabulary)


def picture(seed=0, kit=KIT):
    layout = kit.layouts["image"]
    size = layout.codebook_sizes[0]
    indices = torch.randint(
        size, (1, layout.positions, layout.k), generator=torch.Generator().manual_seed(seed)
    )
    return Image(Codes(indices, layout.grid))


def batch(*documents, kit=KIT, supervise="last"):
    return kit.collate([kit.build(document, supervise) for document in documents])


def seeing(lm):
    """The same model with the option."""
    made = CausalLM(replace(lm.config, bidirectional=CLOSING)).to(next(lm.parameters()).dtype)
    made.load_state_dict(lm.state_dict())
    return made.eval()


def changed(given, place):
    """The batch with another code at one place of every row."""
    ids = given.ids.clone()
    first = int(KIT.vocabulary.block("image")[0])
    ids[:, place] = first + (ids[:, place] - first + 1) % 6
    return replace(given, ids=ids)


def test_spans_are_the_finished_pictures():
    one = KIT.build([picture(), Text("ab")], "last")
    cut = KIT.build([Text("a"), picture(1)])
    short = replace(cut, **{name: value[:6] for name, value in vars(cut).items() if value is not None})
    given = KIT.collate([one, short])
    spans = picture_spans(given.ids, given.modality, CLOSING)
    assert spans.tolist() == [[0, 0, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0], [0] * 12]
    two = batch([picture(), Text("a"), picture(2), picture(3)])
    assert picture_spans(two.ids, two.modality, CLOSING).unique().tolist() == [0, 1, 2, 3]
    # The last picture is a target.
    assert given_spans(two, CLOSING).unique().tolist() == [0, 1, 2]
    assert not given_spans(batch([picture(), picture(1)], supervise="all"), CLOSING).any()
    assert see_given(two, ()) is two
    assert not picture_spans(two.ids, two.modality, [(2, 5)]).any()


def test_the_mask_is_causal_outside_and_full_inside():
    spans = torch.tensor([[0, 1, 1, 0, 2, 2]])
    mask = span_mask(spans)[0].int().tolist()
    assert mask == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 1, 1, 1, 1],
        [1, 1, 1, 1, 1, 1],
    ]
    rows = torch.eye(6, dtype=torch.bool)[None]
    assert span_mask(spans, rows).sum() == 6 + 4


@pytest.mark.parametrize("kind", ["native", "wrapped", "windowed"])
def test_a_later_code_reaches_an_earlier_one_only_with_the_option(kind):
    if kind == "wrapped":
        lm = wrapped("GPTNeoX", KIT)
        with_option = WrappedLM(lm.network, CLOSING).eval()
        lm = WrappedLM(wrapped("GPTNeoX", KIT).network).eval()
    else:
        lm = model(KIT, windows=(4, None) if kind == "windowed" else ())
        with_option = seeing(lm)
    given = batch([picture(), Text("ab")])
    target = batch([Text("ab"), picture()])
    with torch.no_grad():
        for network, reached in ((lm, False), (with_option, True)):
            one, other = (network(x).hidden for x in (given, changed(given, 6)))
            moved = (one - other).abs().amax(-1)[0] > 1e-6
            assert bool(moved[2:6].any()) == reached
            assert not moved[:2].any()  # what stands before the picture
            assert moved[6:].all()
            # A picture that is a target is causal, with the option or without.
            one, other = (network(x).hidden for x in (target, changed(target, 8)))
            assert torch.equal(one[:, :8], other[:, :8])


def test_without_given_pictures_the_option_changes_nothing():
    lm = model(KIT)
    target = batch([Text("ab"), picture()], [Text("b")])
    assert torch.equal(lm(target).logits, seeing(lm)(target).logits)


def test_documents_in_one_row_do_not_see_each_other():
    lm = seeing(model(KIT))
    documents = [KIT.build([picture(n), Text("ab")]) for n in range(3)]
    row = pack(documents, 36, KIT.vocabulary.special["pad"])
    alone = KIT.collate(documents)
    owner = row.positions[0, :, 0]
    starts = [int(x) for x in (owner == 0).nonzero()[:, 0]][:3]
    hidden, single = lm(row).hidden, lm(alone).hidden
    assert row.ids.shape == (1, 36)
    order = [int((alone.ids == row.ids[0, s : s + 12]).all(1).nonzero()[0]) for s in starts]
    assert sorted(order) == [0, 1, 2]
    for start, number in zip(starts, order):
        torch.testing.assert_close(hidden[0, start : start + 12], single[number])
    moved = (lm(changed(row, starts[1] + 5)).hidden - hidden).abs().amax(-1)[0] > 1e-9
    assert moved.nonzero()[:, 0].tolist() == list(range(starts[1] + 2, starts[1] + 12))


def uncached_next(lm, prompt, ids):
    """Logits at each generated position from one pass with an explicit mask."""
    whole = torch.cat([prompt.ids, ids])
    positions = torch.zeros(1, len(whole), 3, dtype=torch.long)
    positions[0, :, 0] = torch.arange(len(whole))
    positions[0, : len(prompt)] = prompt.positions
    modality = torch.zeros(1, len(whole), dtype=torch.long)
    modality[0, : len(prompt)] = prompt.modality
    spans = picture_spans(whole[None], modality, CLOSING)
    assert bool(spans.any())
    mask = span_mask(spans)
    output = lm(TokenBatch(whole[None], modality, positions, mask))
    return output.logits[0, len(prompt) - 1 : -1]


@pytest.mark.parametrize("name", ["plain", "jacobi", "pac-wide", "lookup", "model"])
@pytest.mark.parametrize("kind", ["native", "wrapped"])
def test_sampling_after_a_given_picture_agrees_with_one_uncached_pass(name, kind):
    lm = seeing(model(KIT)) if kind == "native" else WrappedLM(wrapped("GPT2", KIT).network, CLOSING).eval()
    prompts = [
        KIT.prompt([picture(1), Text.blank()]),
        KIT.prompt([Text("ab"), picture(2), Text("a"), picture(3), Text.blank()]),
    ]
    drafter = DRAFTERS[name](model(KIT, dtype=next(lm.parameters()).dtype) if name == "model" else lm, KIT, 3)
    grammar = Grammar(KIT, ("text",), text_limit=5)
    found, scores, _ = generate(
        lm, prompts, grammar, sampling={"text": SamplingConfig(temperature=0)}, drafter=drafter
    )
    text = KIT.vocabulary.mask("text").clone()
    text[KIT.vocabulary.special["eos"]] = True
    with torch.no_grad():
        for prompt, ids in zip(prompts, found):
            logits = uncached_next(lm, prompt, ids)[: len(ids)]
            allowed = torch.stack(
                [
                    logit.masked_fill(~_allowed(grammar, prompt, ids[:n]), -torch.inf)
                    for n, logit in enumerate(logits)
                ]
            )
            assert allowed.argmax(-1).tolist() == ids.tolist()
    assert all(bool(score.isfinite().all()) for score in scores)


def _allowed(grammar, prompt, ids):
    state = grammar.start(prompt)
    for token in ids.tolist():
        state = grammar.advance(state, token)
    return grammar.allowed(state)


def test_the_prompt_pass_sees_both_ways():
    """The hidden states of the prompt pass itself, with rows of different lengths and a prompt that ends
    inside of nothing."""
    from lexel.sample.stream import Stream

    lm = seeing(model(KIT))
    prompts = [KIT.prompt([picture(1), Text.blank()]), KIT.prompt([Text("ab"), picture(2), Image.blank()])]
    seen = Stream(lm).admit(prompts, [None, None], 40)
    for row, prompt in enumerate(prompts):
        one = replace(prompt, loss_mask=torch.zeros(len(prompt), dtype=torch.bool))
        wanted = lm(KIT.collate([one])).hidden[0, :-1]
        torch.testing.assert_close(seen.hidden[row, : len(prompt) - 1], wanted)


def test_flexible_pictures_are_closed_where_they_end():
    kit = codec(CodeLayout((5,), length=5, flexible=True))
    spans = closing(["image"], kit.vocabulary)
    codes = Codes(torch.randint(5, (1, 5, 1)), lengths=torch.tensor([3]))
    given = batch([Image(codes), Text("a")], kit=kit)
    assert picture_spans(given.ids, given.modality, spans).sum() == 3


def test_names_become_modalities_of_the_vocabulary():
    config = complete_lm(partial(CausalLMConfig, dim=16, heads=2, bidirectional=["image"]), KIT)
    assert config.bidirectional == CLOSING == ((1, KIT.vocabulary.end("image")),)
    with pytest.raises(LexelError, match=r"bidirectional names \['sound'\]"):
        closing(["sound"], KIT.vocabulary)


def test_kept_in_the_models_folder(tmp_path):
    lm = seeing(model(KIT, dtype=torch.float32))
    lm.save_pretrained(tmp_path / "native")
    assert CausalLM.from_pretrained(tmp_path / "native").config.bidirectional == CLOSING
    other = WrappedLM(wrapped("GPT2", KIT).network, CLOSING)
    other.save_pretrained(tmp_path / "wrapped")
    again = WrappedLM.from_pretrained(tmp_path / "wrapped")
    assert again.config.bidirectional == CLOSING
