"""Published checkpoints: full-size key lists, two-way conversion, and bad files."""

from __future__ import annotations

import argparse
import json
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lexel.catalog import Layout
from lexel.errors import LexelError
from lexel.tokenizers import (
    export_published,
    find_published,
    from_pretrained,
    list_published,
    load_published,
    published_systems,
)
from lexel.verify.fixture import Fixture

GOLDEN = Path(__file__).parent / "golden"
# (fixture, list in its published_keys.json) → (row, layout) that must consume it exactly.
KEY_LISTS = {
    ("llamagen_vq", "VQ-16"): ("llamagen-vq-16", "published"),
    ("llamagen_vq", "VQ-8"): ("llamagen-vq-8", "published"),
    ("janus_vq", "janus_pro"): ("janus-vq-16", "published"),
    ("janus_vq", "transformers"): ("janus-vq-16", "transformers"),
}
# System → how the arguments are found in a fixture's config.json, and a row of it.
FIXTURES = {
    "llamagen_vq": ("llamagen-vq-16", lambda config: config),
    "janus_vq": ("janus-vq-16", lambda config: config["reference_args"]),
}


def key_list(system: str, name: str) -> dict[str, tuple[int, ...]]:
    """One of the full-size lists, which leave prefixes out. A name may be cut to its first word."""
    lists = json.loads((GOLDEN / system / "published_keys.json").read_text())
    found = next(value for key, value in lists.items() if name in (key, key.split()[0]))
    return {key: tuple(shape) for key, shape in (found["keys"] if isinstance(found, dict) else found)}


def layout_named(system, name: str) -> Layout:
    return next(layout for layout in system.layouts if layout.name == name)


@pytest.mark.parametrize(("fixture", "row", "layout"), [(key, *value) for key, value in KEY_LISTS.items()])
def test_full_size_key_lists_are_consumed_exactly(fixture, row: str, layout: str) -> None:
    system, published = find_published(row)
    with torch.device("meta"):
        model = system.config(published.arguments).build()
    assert replace(layout_named(system, layout), prefix="").shapes(model) == key_list(*fixture)


@pytest.mark.parametrize("row", list_published(), ids=lambda row: row.name)
def test_rows_state_what_they_are(row) -> None:
    system, _ = find_published(row.name)
    with torch.device("meta"):
        model = system.config(row.arguments).build()
    assert sum(p.numel() for p in model.parameters()) == row.parameters
    assert row.code_licence
    assert row.weight_licence
    assert row.source
    assert row.tokens
    assert row.codebook


def test_names_are_unique() -> None:
    names = [row.name for row in list_published()]
    assert len(set(names)) == len(names)


@pytest.fixture(scope="module", params=sorted(FIXTURES))
def small(request, tmp_path_factory):
    """(row name, arguments, tokenizer) of each system at fixture size."""
    name, arguments_of = FIXTURES[request.param]
    fixture = Fixture(GOLDEN / request.param, tmp_path_factory.mktemp("weights"))
    system, _ = find_published(name)
    arguments = {k: v for k, v in arguments_of(fixture.config).items() if k in system.arguments}
    return name, arguments, load_published(name, fixture.weights(), arguments)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_export_and_load_again_changes_nothing(small, suffix: str, tmp_path: Path) -> None:
    name, arguments, model = small
    export_published(model, name, tmp_path / f"weights{suffix}")
    again = load_published(name, tmp_path / f"weights{suffix}", arguments)
    assert again.fingerprint() == model.fingerprint()


def test_lexel_format_round_trip(small, tmp_path: Path) -> None:
    _, _, model = small
    model.save_pretrained(tmp_path)
    assert from_pretrained(tmp_path).fingerprint() == model.fingerprint()


# Bad input


@pytest.fixture
def weights(tmp_path: Path):
    """(path, arguments) of a good small LlamaGen file to damage."""
    fixture = Fixture(GOLDEN / "llamagen_vq", tmp_path)
    system = published_systems()["llamagen_vq"]
    return fixture.weights(), {k: v for k, v in fixture.config.items() if k in system.arguments}


def test_unknown_names_and_arguments_list_the_known_ones() -> None:
    with pytest.raises(LexelError, match="llamagen-vq-16"):
        load_published("llamagen-vq-99", "x.pt")
    with pytest.raises(LexelError, match=r"no argument codebok_size.*codebook_size"):
        load_published("llamagen-vq-16", "x.pt", {"codebok_size": 3})


def test_a_truncated_file_is_named(weights) -> None:
    path, arguments = weights
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(LexelError, match=f"{path}.*truncated"):
        load_published("llamagen-vq-16", path, arguments)


def test_a_pickle_that_would_run_code_is_not_opened(tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self):
            return (Path(tmp_path / "ran").touch, ())

    path = tmp_path / "weights.pt"
    torch.save({"model": {"encoder.conv_in.weight": Hostile()}}, path)
    with pytest.raises(LexelError, match="could run code"):
        load_published("llamagen-vq-16", path)
    path.write_bytes(pickle.dumps({"model": Hostile()}))
    with pytest.raises(LexelError):
        load_published("llamagen-vq-16", path)
    assert not (tmp_path / "ran").exists()


def test_training_files_with_their_arguments_load(weights) -> None:
    path, arguments = weights
    content = torch.load(path, weights_only=True)
    torch.save({**content, "steps": 5, "args": argparse.Namespace(lr=1e-4)}, path)
    assert load_published("llamagen-vq-16", path, arguments)


def test_ema_comes_first_and_key_chooses(weights) -> None:
    path, arguments = weights
    content = torch.load(path, weights_only=True)
    averaged = {k: v + 1 for k, v in content["model"].items()}
    torch.save({**content, "ema": averaged}, path)
    key = "encoder.conv_in.bias"
    assert torch.equal(load_published("llamagen-vq-16", path, arguments).state_dict()[key], averaged[key])
    raw = load_published("llamagen-vq-16", path, arguments, key="model")
    assert torch.equal(raw.state_dict()[key], content["model"][key])
    with pytest.raises(LexelError, match=r"no entry .best..*model, discriminator, ema"):
        load_published("llamagen-vq-16", path, arguments, key="best")


def test_missing_unknown_and_wrong_keys_are_listed(weights) -> None:
    path, arguments = weights
    content = torch.load(path, weights_only=True)
    state = content["model"]
    state["renamed"] = state.pop("quant_conv.bias")
    state["decoder.conv_in.bias"] = torch.zeros(7)
    torch.save(content, path)
    with pytest.raises(LexelError) as caught:
        load_published("llamagen-vq-16", path, arguments)
    for part in ("missing quant_conv.bias", "unknown renamed", "decoder.conv_in.bias is [7], expected"):
        assert part in str(caught.value)


def test_a_config_that_does_not_fit_the_weights(weights) -> None:
    path, arguments = weights
    with pytest.raises(LexelError, match=r"quantize.embedding.weight is \[128, 8\], expected \[64, 8\]"):
        load_published("llamagen-vq-16", path, {**arguments, "codebook_size": 64})


def test_entries_that_are_no_tensors_are_named(weights) -> None:
    path, arguments = weights
    content = torch.load(path, weights_only=True)
    content["model"]["note"] = "hello"
    torch.save(content, path)
    with pytest.raises(LexelError, match="'note' is a str, expected a tensor"):
        load_published("llamagen-vq-16", path, arguments)


def test_prefixes_of_wrappers_are_stripped(weights) -> None:
    path, arguments = weights
    state = torch.load(path, weights_only=True)["model"]
    wrapped = {f"module.{k}": v for k, v in state.items()}
    save_file(wrapped, path.with_suffix(".safetensors"))
    assert load_published("llamagen-vq-16", path.with_suffix(".safetensors"), arguments)


def test_wrong_picture_sizes_are_refused(weights) -> None:
    path, arguments = weights
    with pytest.raises(ValueError, match="multiples of 4"):
        load_published("llamagen-vq-16", path, arguments).encode(torch.zeros(1, 3, 30, 32))
