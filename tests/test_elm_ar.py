"""ELM's autoregressive models: parallel sub-codes of a binary autoencoder's codes."""

from __future__ import annotations

import json
from math import cos, pi, sqrt
from pathlib import Path
from typing import cast

import pytest
import torch
from raster_columns import (
    GOLDEN,
    assert_a_damaged_weight_is_noticed,
    assert_export_is_exact,
    tiny,
)

from lexel.errors import LexelError
from lexel.models import export_published, find_published, load_published, published_systems
from lexel.sample.conditional import conditional_prompts, continued, draw, raster_codec
from lexel.sample.drafters import JacobiDrafter
from lexel.sample.logits import SamplingConfig
from lexel.tokenizers.bae import BAE, BAETokenizer
from lexel.tokenizers.factorizer import CodeFactorizer
from lexel.types import Codes
from lexel.verify import verify

SMALL = {"dim": 32, "n_layer": 2, "n_head": 2, "num_classes": 4, "block_size": 9}
PARTS = {**SMALL, "token_each": 2, "code_dim": 3}


@pytest.mark.parametrize("name", json.loads((GOLDEN / "elm_ar" / "published_keys.json").read_text()))
def test_full_size_key_lists_are_consumed_exactly(name: str) -> None:
    keys = json.loads((GOLDEN / "elm_ar" / "published_keys.json").read_text())[name]
    system, row = find_published(f"elm-ar-{name.lower()}")
    with torch.device("meta"):
        model = system.config(row.arguments).build()
    assert system.layouts[0].shapes(model) == {key: tuple(shape) for key, shape in keys}
    assert sum(p.numel() for p in model.parameters()) == row.parameters
    assert row.file == f"gpt/{name}.pth"


def test_verification_passes() -> None:
    report = verify("elm_ar", GOLDEN / "elm_ar")
    assert report.passed, "\n" + report.table()


@pytest.mark.parametrize("key", ["proj.weight", "output.1.weight"])
def test_a_damaged_weight_is_noticed(key: str, tmp_path: Path) -> None:
    assert_a_damaged_weight_is_noticed("elm_ar", key, tmp_path)


def test_export_is_exact(tmp_path: Path) -> None:
    assert_export_is_exact("elm_ar", "elm-ar-l-2-10", tmp_path)


def test_a_whole_code_has_one_table_and_one_output_of_its_own_names(tmp_path: Path) -> None:
    arguments = {**SMALL, "code_dim": 5}
    lm = tiny("elm_ar_whole", **arguments)
    export_published(lm, "elm-ar-l-1-16", tmp_path / "weights.pth")
    stored = torch.load(tmp_path / "weights.pth", weights_only=True)
    assert stored["tok_embedder.weight"].shape == stored["output.weight"].shape == (32, 32)
    assert "proj.weight" not in stored
    again = load_published("elm-ar-l-1-16", tmp_path / "weights.pth", arguments)
    assert again.fingerprint() == lm.fingerprint()
    with pytest.raises(LexelError, match="another kind of model"):
        export_published(lm, "elm-ar-l-2-10", tmp_path / "parts.pth")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pos_type": "rope1d"}, "pos_type is always 'rope2d'"),
        ({"use_adaLN": True}, "use_adaLN is always False"),
        ({"token_each": 0}, "at least 1"),
        ({"block_size": 8}, "square"),
    ],
)
def test_arguments_that_cannot_be_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(LexelError, match=message):
        published_systems()["elm_ar"].config({**PARTS, **arguments})


def test_sub_codes_of_a_position_do_not_see_each_other() -> None:
    lm = tiny("elm_ar", **{**PARTS, "token_each": 3})
    hidden = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    codes = torch.randint(8, (4, 2), generator=torch.Generator().manual_seed(1))
    for one, other in zip(lm.head(hidden, codes), lm.head(hidden, 7 - codes)):
        assert torch.equal(one, other)
    assert torch.equal(lm.head.next_logits(hidden, codes), lm.head(hidden, codes)[1])


def test_any_number_of_sub_codes_is_drawn() -> None:
    for parts in (1, 2, 4):
        lm = tiny("elm_ar" if parts > 1 else "elm_ar_whole", **{**PARTS, "token_each": parts})
        assert draw(lm, [1], sampling=SamplingConfig(guidance=2.0, top_k=3)).indices.shape == (1, 9, parts)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "square_root"])
def test_pictures_under_a_schedule_are_those_of_a_plain_loop(schedule: str) -> None:
    """Greedy, against one uncached pass per position with the published formula written out."""
    lm = tiny("elm_ar", **PARTS)
    sampling = SamplingConfig(temperature=0.0, guidance=4.0, schedule=schedule)
    found = draw(lm, [2, 0], sampling=sampling).indices
    assert torch.equal(found, plain_loop(lm, [2, 0], 4.0, schedule))
    drafted = draw(lm, [2, 0], sampling=sampling, drafter=JacobiDrafter(3)).indices
    assert torch.equal(drafted, found)
    constant = SamplingConfig(temperature=0.0, guidance=4.0)
    assert not torch.equal(draw(lm, [2, 0], sampling=constant).indices, found)


@torch.no_grad()
def plain_loop(lm, labels: list[int], scale: float, schedule: str) -> torch.Tensor:
    prompts, nulls = conditional_prompts(lm, labels)
    chosen = [torch.empty(0, 2, dtype=torch.long) for _ in labels]
    codec = raster_codec(lm.config)
    for step in range(9):
        r = (step + 1) / 9
        share = {"linear": r, "cosine": cos(-pi / 2 + r * pi / 2), "square_root": sqrt(step / 9)}[schedule]
        for row in range(len(labels)):
            ids = chosen[row] + torch.tensor(lm.config.code_offsets)
            cond, uncond = (
                lm.decode(codec.collate([continued(some[row], ids)]))[0][0, -1] for some in (prompts, nulls)
            )
            scores = [
                output(uncond) + (output(cond) - output(uncond)) * (1 + (scale - 1) * share)
                for output in lm.outputs
            ]
            chosen[row] = torch.cat([chosen[row], torch.stack([s.argmax() for s in scores])[None]])
    return torch.stack(chosen)


def test_what_is_drawn_the_autoencoder_decodes() -> None:
    """Sub-codes merge into the whole codes of the same autoencoder, most significant bit first."""
    torch.manual_seed(0)
    arguments = {
        "nf": 8, "res_blocks": 1, "codebook_size": 6, "emb_dim": 16, "ch_mult": (1, 2), "img_size": 6,
        "attn_resolutions": (3,),
    }  # fmt: skip
    parts = cast(BAETokenizer, BAE.config({**arguments, "token_each": 2}).build().eval())
    whole = cast(BAETokenizer, BAE.config(arguments).build().eval())
    whole.load_state_dict(parts.state_dict())
    codes = draw(tiny("elm_ar", **PARTS), [0, 3], sampling=SamplingConfig(guidance=2.0), seed=1)
    pictures = parts.decode(codes)
    assert pictures.shape == (2, 3, 6, 6)
    factorizer = CodeFactorizer((3, 3), msb_first=True)
    assert torch.equal(factorizer.merge(codes.indices)[..., 0], codes.indices @ torch.tensor([8, 1]))
    merged = Codes(factorizer.merge(codes.indices), codes.grid)
    assert torch.equal(whole.decode(merged), pictures)
    assert not torch.equal(whole.decode(Codes(merged.indices.flip(1), codes.grid)), pictures)
