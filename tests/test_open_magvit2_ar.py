"""Open-MAGVIT2's autoregressive models: two parts of a code through an intra transformer."""

from __future__ import annotations

import json
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

from lexel.cli import main
from lexel.errors import LexelError
from lexel.models import export_published, load_published, published_systems
from lexel.sample.conditional import draw
from lexel.sample.drafters import JacobiDrafter
from lexel.sample.logits import SamplingConfig
from lexel.tokenizers import export_published as export_tokenizer
from lexel.tokenizers import find_published as find_tokenizer
from lexel.tokenizers.factorizer import CodeFactorizer
from lexel.tokenizers.open_magvit2 import OpenMagvit2Config
from lexel.tokenizers.quantizers import QuantizerConfig
from lexel.types import Codes
from lexel.verify import verify

SMALL = {
    "dim": 32, "spatial_n_layer": 2, "factorized_n_layer": 1, "n_head": 2, "class_num": 4,
    "factorized_bits": [2, 4], "block_size": 9,
}  # fmt: skip
# Guidance of the two parts as published for the smallest model.
GUIDED = SamplingConfig(
    temperature=0.0, guidance=1.9, further=(SamplingConfig(temperature=0.0, guidance=2.0),)
)


def test_full_size_key_lists_are_consumed_exactly() -> None:
    rows = {f"AR_256_{size}": f"open-magvit2-ar-{size.lower()}" for size in ("B", "L", "XL")}
    assert_keys_are_consumed_exactly("open_magvit2_ar", rows)


def test_verification_passes() -> None:
    report = verify("open_magvit2_ar", GOLDEN / "open_magvit2_ar")
    assert report.passed, "\n" + report.table()


@pytest.mark.parametrize("key", ["pre_emb.weight", "factorized_blocks.0.attention.wqkv.weight"])
def test_a_damaged_weight_is_noticed(key: str, tmp_path: Path) -> None:
    assert_a_damaged_weight_is_noticed("open_magvit2_ar", key, tmp_path)


def test_export_is_exact(tmp_path: Path) -> None:
    assert_export_is_exact("open_magvit2_ar", "open-magvit2-ar-b", tmp_path)


def test_a_lightning_file_holds_the_tokenizer_too(tmp_path: Path) -> None:
    lm = tiny("open_magvit2_ar", **SMALL)
    export_published(lm, "open-magvit2-ar-b", tmp_path / "weights.ckpt")
    content = torch.load(tmp_path / "weights.ckpt", weights_only=True)["state_dict"]
    assert all(name.startswith("transformer.") for name in content)
    content["first_stage_model.encoder.conv_in.weight"] = torch.zeros(1)
    torch.save({"state_dict": content, "global_step": 7}, tmp_path / "weights.ckpt")
    again = load_published("open-magvit2-ar-b", tmp_path / "weights.ckpt", SMALL)
    assert again.fingerprint() == lm.fingerprint()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"token_factorization": False}, "always true"),
        ({"factorized_bits": [6, 6, 6]}, "two parts"),
        ({"block_size": 8}, "square"),
    ],
)
def test_arguments_that_cannot_be_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(LexelError, match=message):
        published_systems()["open_magvit2_ar"].config({**SMALL, **arguments})


def test_the_second_part_depends_on_the_first() -> None:
    lm = tiny("open_magvit2_ar", **SMALL)
    hidden = torch.randn(1, 32, generator=torch.Generator().manual_seed(0)).expand(4, -1)
    (post,) = lm.head(hidden, torch.arange(4)[:, None])
    assert post.shape == (4, 16)
    assert all(not torch.allclose(post[0], other) for other in post[1:])


def test_speculation_keeps_greedy_pictures() -> None:
    lm = tiny("open_magvit2_ar", **SMALL)
    plain = draw(lm, [0, 4, 2], sampling=GUIDED)
    assert plain.indices.shape == (3, 9, 2)
    assert torch.equal(draw(lm, [0, 4, 2], sampling=GUIDED, drafter=JacobiDrafter(3)).indices, plain.indices)
    assert bool((plain.indices.amax((0, 1)) < torch.tensor([4, 16])).all())


def test_what_is_drawn_the_tokenizer_decodes() -> None:
    """Parts merge into the whole codes of the same tokenizer, least significant bit first."""

    def tokenizer(**groups):
        torch.manual_seed(0)
        return OpenMagvit2Config(
            image_size=6, channels=8, channel_mult=(1, 2), res_blocks=1, embed_dim=6, norm_groups=4,
            quantizer=QuantizerConfig("sign", codebook_size=64, **groups),
        ).build().eval()  # fmt: skip

    parts, whole = tokenizer(groups=(2, 4)), tokenizer()
    codes = draw(tiny("open_magvit2_ar", **SMALL), [0, 3], sampling=SamplingConfig(guidance=2.0), seed=1)
    pictures = parts.decode(codes)
    assert pictures.shape == (2, 3, 6, 6)
    factorizer = CodeFactorizer((2, 4), msb_first=False)
    merged = factorizer.merge(codes.indices)
    assert torch.equal(merged[..., 0], codes.indices @ torch.tensor([1, 4]))
    assert torch.equal(whole.decode(Codes(merged, codes.grid)), pictures)
    assert not torch.equal(whole.decode(Codes(merged.flip(1), codes.grid)), pictures)


def test_the_command_draws_with_settings_of_each_part(tmp_path: Path, capsys) -> None:
    """The row knows how its tokenizer's codes are cut."""
    sizes = {
        "ddconfig": {"z_channels": 6, "resolution": 32, "ch": 32, "ch_mult": [1, 2], "num_res_blocks": 1},
        "n_embed": 64, "embed_dim": 6, "factorized_bits": [2, 4],
    }  # fmt: skip
    system, _ = find_tokenizer("open-magvit2-256")
    export_tokenizer(system.config(sizes).build(), "open-magvit2-256", tmp_path / "tokenizer.ckpt")
    export_published(tiny("open_magvit2_ar", **SMALL), "open-magvit2-ar-b", tmp_path / "model.ckpt")
    sampling = {"guidance": 1.9, "schedule": "linear", "further": [{"guidance": 2.0, "top_k": 3}]}
    for name, values in (("model", SMALL), ("tokenizer", sizes), ("sampling", sampling)):
        (tmp_path / f"{name}.json").write_text(json.dumps(values))
    command = [
        "draw", "open-magvit2-ar-b", "--checkpoint", str(tmp_path / "model.ckpt"),
        "--config", str(tmp_path / "model.json"), "--tokenizer-checkpoint", str(tmp_path / "tokenizer.ckpt"),
        "--tokenizer-config", str(tmp_path / "tokenizer.json"), "--classes", "1,3", "--device", "cpu",
        "--sampling", str(tmp_path / "sampling.json"), "--out", str(tmp_path / "pictures"),
    ]  # fmt: skip
    assert main(command) == 0, capsys.readouterr().err
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == ["0000.png", "0001.png"]
    (tmp_path / "sampling.json").write_text(json.dumps({"shedule": "linear"}))
    assert main(command) == 2
    assert "no option shedule" in capsys.readouterr().err


FAMILIES = (
    "llamagen_gpt_c2i", "llamagen_gpt_t2i", "fqgan_ar_dual", "fqgan_ar_triple", "elm_ar", "elm_ar_whole",
    "open_magvit2_ar",
)  # fmt: skip
ROWS = [(system, row) for system in map(published_systems().get, FAMILIES) for row in system.rows]


@pytest.mark.parametrize(("system", "row"), ROWS, ids=[row.name for _, row in ROWS])
def test_every_row_names_the_tokenizer_of_its_codes(system, row) -> None:
    tokenizer_system, published = find_tokenizer(row.tokenizer)
    with torch.device("meta"):
        tokenizer = tokenizer_system.config(published.arguments, row.tokenizer_arguments).build()
    assert tokenizer.codebook_sizes == system.config(row.arguments).codebook_sizes
