"""The decoder of published class- and caption-conditional models; the numbers of the published code are
checked by test_verify.py, several codes per position in the tests of the models that have them."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from lexel.models.raster_lm import RasterLM, RasterLMConfig
from lexel.types import TokenBatch

SMALL = RasterLMConfig((24,), dim=32, layers=2, heads=4, side=3, num_classes=5)
KINDS = {
    "class": SMALL,
    "grouped": replace(SMALL, kv_heads=2),
    "caption": replace(SMALL, condition="caption", condition_length=4, caption_dim=6),
    "learned": replace(SMALL, positions="learned", side=0, length=7),
    "tokens": replace(
        SMALL, positions="learned", side=0, length=7, condition="tokens", condition_length=8
    ),
}  # fmt: skip


def built(config: RasterLMConfig) -> RasterLM:
    torch.manual_seed(0)
    lm = config.build()
    for parameter in lm.parameters():
        parameter.data.normal_(std=0.3)
    return lm.eval()


def whole(lm: RasterLM, rows: int = 2) -> TokenBatch:
    """A batch of full sequences, all but their last codes."""
    config = lm.config
    torch.manual_seed(1)
    condition = torch.randint(24, (rows, config.condition_length))
    condition[:, -1] = config.class_offset
    ids = torch.cat([condition, torch.randint(24, (rows, config.steps - 1))], dim=1)
    positions = F.pad(torch.arange(ids.shape[1]).expand_as(ids)[..., None], (0, 2))
    batch = TokenBatch(ids, torch.zeros_like(ids), positions)
    if config.condition != "caption":
        return batch
    embeds = lm.model.condition(torch.randn(rows * config.condition_length, config.caption_dim))
    index = torch.cartesian_prod(torch.arange(rows), torch.arange(config.condition_length))
    return replace(batch, embeds=embeds.detach(), embed_index=index)


class TestNetwork:
    @pytest.mark.parametrize("kind", KINDS)
    def test_a_cache_changes_nothing(self, kind: str) -> None:
        lm = built(KINDS[kind])
        batch, first = whole(lm), lm.config.condition_length
        with torch.no_grad():
            expected, _ = lm.decode(batch)
            cache, pieces = lm.new_cache(2), []
            cuts = [0, *range(first, batch.ids.shape[1] + 1)]
            for start, stop in pairwise(cuts):
                piece = TokenBatch(
                    batch.ids[:, start:stop],
                    batch.modality[:, start:stop],
                    batch.positions[:, start:stop],
                    embeds=None if start else batch.embeds,
                    embed_index=None if start else batch.embed_index,
                )
                pieces.append(lm.decode(piece, cache)[0])
        torch.testing.assert_close(torch.cat(pieces, dim=1), expected, atol=1e-5, rtol=1e-5)

    def test_the_class_decides_and_only_the_class(self) -> None:
        lm = built(SMALL)
        batch = whole(lm)
        ids = batch.ids.clone()
        ids[:, 1:] = ids[:1, 1:]
        ids[0, 0], ids[1, 0] = SMALL.class_offset + 1, SMALL.class_offset + SMALL.num_classes
        logits = lm(replace(batch, ids=ids)).logits
        assert not torch.allclose(logits[0], logits[1])
        ids[:, 0] = SMALL.class_offset + 1
        logits = lm(replace(batch, ids=ids)).logits
        torch.testing.assert_close(logits[0], logits[1])

    def test_places_of_codes_matter(self) -> None:
        """A picture of one code only says where it is by its rotation, or by its learned position."""
        for kind in ("class", "learned"):
            lm = built(KINDS[kind])
            batch = whole(lm)
            batch = replace(batch, ids=torch.cat([batch.ids[:, :1], torch.full_like(batch.ids[:, 1:], 3)], 1))
            hidden, _ = lm.decode(batch)
            assert (hidden[:, 2:] - hidden[:, 1:-1]).abs().amax() > 1e-2

    def test_logits_are_of_codes_alone(self) -> None:
        lm = built(SMALL)
        hidden = torch.randn(2, 32)
        every = lm.project(hidden)
        assert every.shape == (2, SMALL.vocab_size)
        assert every.isfinite().sum(1).tolist() == [24, 24]
        for start, stop in ((3, 9), (20, 27), (25, 27)):
            torch.testing.assert_close(lm.project(hidden, start, stop), every[:, start:stop])

    def test_it_learns_with_the_loss_of_any_language_model(self) -> None:
        lm = SMALL.build()
        batch = whole(lm, rows=4)
        optimiser = torch.optim.Adam(lm.parameters(), 1e-2)
        losses = []
        for _ in range(30):
            logits = lm(batch).logits[:, :-1]
            loss = F.cross_entropy(logits.flatten(0, 1), batch.ids[:, 1:].flatten())
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
        assert losses[0] == pytest.approx(math.log(24))  # outputs start at zero
        assert losses[-1] < 0.5 * losses[0]

    @pytest.mark.parametrize("kind", KINDS)
    def test_saved_and_loaded_again(self, kind: str, tmp_path: Path) -> None:
        lm = built(KINDS[kind])
        lm.save_pretrained(tmp_path)
        again = RasterLM.from_pretrained(tmp_path)
        assert again.config == lm.config
        assert again.fingerprint() == lm.fingerprint()


class TestConfig:
    def test_ids_in_order(self) -> None:
        config = KINDS["class"]
        assert (config.class_offset, config.labels, config.pad_id, config.vocab_size) == (24, 6, 30, 36)
        assert (KINDS["tokens"].labels, KINDS["tokens"].max_length) == (1, 15)
        assert (config.steps, config.max_length) == (9, 10)

    @pytest.mark.parametrize(
        ("wrong", "message"),
        [
            ({"heads": 5}, "does not divide"),
            ({"condition": "clas"}, "condition is one of"),
            ({"positions": "none"}, "positions is one of"),
            ({"head": "parallel"}, "one codebook"),
            ({"codebook_sizes": (24, 24)}, "one codebook"),
            ({"length": 10}, "side \\* side"),
            ({"dim": 24}, "divisible by 4"),
            ({"condition_length": 2}, "one position"),
        ],
    )
    def test_fields_that_disagree_are_refused(self, wrong, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            replace(SMALL, **wrong)
