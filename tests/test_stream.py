"""Partial results: what they show, that they end where `generate` does, and threads that share rounds."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from conftest import build_tiny_pipeline
from torch import Tensor

from lexel.document import Document, Image, Text
from lexel.sample.codes import codes_so_far, known_pixels
from lexel.sample.partial import Partial
from lexel.sample.pipeline import Pipeline
from lexel.tokenizers.layout import CodeLayout
from lexel.types import Codes

DRAW: Document = [Text("a red circle"), Image.blank()]


@pytest.fixture(scope="module")
def pixels() -> Tensor:
    return torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture(scope="module", params=["vq", "flexible", "factorized"])
def pipe(request: pytest.FixtureRequest) -> Pipeline:
    return build_tiny_pipeline(request.param)


def same(one: Document, other: Document) -> bool:
    """Equal in every bit."""
    if len(one) != len(other):
        return False
    for a, b in zip(one, other):
        if isinstance(a, Text) or isinstance(b, Text):
            if a != b:
                return False
        elif not (
            a.codes.indices.equal(b.codes.indices) and (a.pixels is b.pixels or a.pixels.equal(b.pixels))
        ):
            return False
    return True


class TestStream:
    @pytest.mark.parametrize("decoding", ["plain", "jacobi"])
    def test_each_row_ends_with_what_generate_returns(self, pipe, pixels, decoding):
        documents = [DRAW, [Image(pixels=pixels), Text.blank()], [Text("b"), Image.blank(), Text.blank()]]
        options = {"seed": 3, "decoding": decoding, "text_limit": 6}
        expected = pipe.generate(documents, **options)
        partials = pipe.stream(documents, **options)
        rows: list[list[Partial]] = [[], [], []]
        for partial in partials:
            rows[partial.row].append(partial)
        assert [ids.tolist() for ids in partials.output.ids] == [ids.tolist() for ids in expected.ids]
        for row, document, length in zip(rows, expected.documents, expected.lengths):
            assert same(row[-1].document, document)
            assert row[-1].tokens == length
            assert row[-1].done
            counts = [partial.tokens for partial in row]
            assert counts == sorted(counts)
            assert len(row) > 1, "there was something to see on the way"
            assert all(partial.tokens <= partial.total for partial in row)

    def test_one_document_several_times(self, tiny_pipeline):
        expected = tiny_pipeline(DRAW, count=3, seed=1)
        last = {partial.row: partial for partial in tiny_pipeline.stream(DRAW, count=3, seed=1)}
        assert [same(last[row].document, expected.documents[row]) for row in range(3)] == [True] * 3

    def test_rows_that_wait_for_room_are_streamed_too(self, tiny_pipeline):
        expected = tiny_pipeline(DRAW, count=3, seed=1, batch_size=1)
        seen = list(tiny_pipeline.stream(DRAW, count=3, seed=1, batch_size=1))
        order = [partial.row for partial in seen[:-3]]
        assert order == sorted(order)
        assert set(order) == {0, 1, 2}
        assert all(same(seen[row - 3].document, expected.documents[row]) for row in range(3))

    def test_a_picture_grows_row_by_row_and_is_grey_below(self, tiny_pipeline):
        partials = tiny_pipeline.stream(DRAW, seed=0, decoding="plain")
        seen = list(partials)
        assert [partial.tokens for partial in seen] == [4, 8, 12, 16]
        final = partials.output.documents[0][-1].codes.indices
        for partial in seen[:-1]:
            codes, shown = partial.segment.codes, partial.segment.pixels
            known = partial.tokens
            assert codes.lengths.tolist() == [known]
            assert codes.indices[:, :known].equal(final[:, :known])
            line = known // 4 * 8  # pixels: 4 codes of 8x8 in each row
            assert (shown[:, line:] == 0).all()
            filled = codes.indices.clone()
            drawn = tiny_pipeline.decode(Codes(filled, (4, 4)))[0]
            assert torch.allclose(shown[:, :line], drawn[:, :line], atol=1e-5)

    def test_every_says_how_often(self, tiny_pipeline):
        counts = [p.tokens for p in tiny_pipeline.stream(DRAW, seed=0, decoding="plain", every=5)]
        assert counts == [5, 10, 15, 16]
        with pytest.raises(ValueError, match="every must be at least 1"):
            tiny_pipeline.stream(DRAW, every=0)

    def test_a_text_is_told_token_by_token(self, tiny_pipeline, pixels):
        document = [Image(pixels=pixels), Text.blank()]
        seen = list(tiny_pipeline.stream(document, seed=0, decoding="plain", text_limit=8))
        texts = [partial.segment.text for partial in seen]
        assert len(seen) >= seen[-1].tokens - 1
        # The end of a letter of several bytes may be missing.
        assert all(texts[-1].startswith(text.rstrip("\ufffd")) for text in texts)
        assert len(texts[0]) < len(texts[-1])

    def test_a_finished_picture_stays_while_a_text_follows(self, tiny_pipeline):
        document = [Text("b"), Image.blank(), Text.blank()]
        seen = list(tiny_pipeline.stream(document, seed=0, decoding="plain", text_limit=6))
        pictures = [partial.document[1] for partial in seen if len(partial.document) == 3]
        assert len(pictures) > 3
        assert all(torch.allclose(picture.pixels, seen[-1].document[1].pixels) for picture in pictures)

    def test_the_generative_decoder_draws_the_last_one(self, tiny_pipeline):
        options = {"seed": 2, "detokenizer": True, "steps": 2}
        expected = tiny_pipeline(DRAW, count=2, **options)
        last = {partial.row: partial for partial in tiny_pipeline.stream(DRAW, count=2, **options)}
        assert all(same(last[row].document, expected.documents[row]) for row in range(2))

    def test_whoever_stops_listening_cancels(self, tiny_pipeline):
        partials = tiny_pipeline.stream(DRAW, count=2, seed=0, decoding="plain")
        next(partials)
        queue = partials.queue
        assert queue.tickets
        partials.close()
        assert not queue.tickets
        assert partials.output is None
        again = tiny_pipeline(DRAW, seed=0, decoding="plain")
        assert again.ids[0].equal(tiny_pipeline(DRAW, seed=0, decoding="plain").ids[0])

    def test_bad_documents_are_refused_at_once(self, tiny_pipeline):
        with pytest.raises(ValueError, match="no blank segment"):
            tiny_pipeline.stream([Text("a")])
        with pytest.raises(ValueError, match="at least 1"):
            tiny_pipeline.stream(DRAW, count=0)


class TestThreads:
    @pytest.mark.parametrize("decoding", ["plain", "jacobi"])
    def test_drawing_and_describing_share_rounds(self, pixels, decoding):
        pipe = build_tiny_pipeline()
        documents = [DRAW, [Image(pixels=pixels), Text.blank()], [Text("b"), Image.blank()]]
        options = {"temperature": 0.0, "decoding": decoding, "text_limit": 16}
        alone = [pipe(document, **options) for document in documents]
        queue = pipe.engine.queue(decoding, [], 64)
        before, together = queue.forwards, [None] * len(documents)
        # All have asked before the first one starts to work.
        asked = threading.Barrier(len(documents))
        submit = queue.submit

        def submit_and_wait(request):
            ticket = submit(request)
            asked.wait(timeout=30)
            return ticket

        queue.submit = submit_and_wait

        def ask(number: int) -> None:
            partials = pipe.stream(documents[number], **options)
            for _ in partials:
                pass
            together[number] = partials.output

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(documents))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
        for one, both in zip(alone, together):
            assert both is not None
            assert both.ids[0].equal(one.ids[0])
        longest = max(output.stats.target_forwards for output in alone)
        assert queue.forwards - before == longest, "every round served all of them"

    def test_one_engine_for_all_threads(self):
        pipe = build_tiny_pipeline()
        start, found = threading.Barrier(8), []

        def ask() -> None:
            start.wait(timeout=30)
            found.append(pipe.engine.queue("jacobi", [], 4))

        threads = [threading.Thread(target=ask) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=30)
        assert len(found) == 8
        assert len({id(queue) for queue in found}) == 1


class TestCodesSoFar:
    def test_unknown_cells_repeat_the_code_above(self):
        layout = CodeLayout((16,), grid=(3, 3))
        flat = torch.tensor([[5], [6], [7], [8]])
        codes = codes_so_far(flat, layout)
        assert codes.indices[0, :, 0].tolist() == [5, 6, 7, 8, 6, 7, 8, 6, 7]
        assert codes.lengths.tolist() == [4]
        first = codes_so_far(flat[:2], layout)
        assert first.indices[0, :, 0].tolist() == [5, 6, 6, 6, 6, 6, 6, 6, 6]

    def test_only_whole_positions_count(self):
        indices = torch.randint(16, (1, 4, 2), generator=torch.Generator().manual_seed(0))
        for pattern, known in (("parallel", [1, 2, 3, 4]), ("interleaved", [0, 1, 1, 2, 2, 3, 3, 4]),
                               ("delayed", [0, 1, 2, 3, 4])):  # fmt: skip
            layout = CodeLayout((16, 16), grid=(2, 2), pattern=pattern)
            flat = layout.flatten(Codes(indices, (2, 2)))[0]
            for steps, positions in enumerate(known, start=1):
                codes = codes_so_far(flat[:steps], layout)
                if positions == 0:
                    assert codes is None
                    continue
                assert codes.lengths.tolist() == [positions]
                assert codes.indices[:, :positions].equal(indices[:, :positions])
                assert ((codes.indices >= 0) & (codes.indices < 16)).all()

    def test_a_line_keeps_its_prefix(self):
        layout = CodeLayout((16,), length=5, flexible=True)
        codes = codes_so_far(torch.tensor([[3], [9]]), layout)
        assert codes.lengths.tolist() == [2]
        assert codes.indices[0, :2, 0].tolist() == [3, 9]
        assert known_pixels(codes, (4, 4)).all()

    def test_known_pixels(self):
        codes = Codes(torch.zeros(1, 4, 1, dtype=torch.long), (2, 2), lengths=torch.tensor([3]))
        expected = np.array([[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 0, 0]], dtype=bool)
        assert (known_pixels(codes, (4, 4))[0, 0].numpy() == expected).all()
