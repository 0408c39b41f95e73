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

from lexel import models, tokenizers
from lexel.catalog import Layout
from lexel.checkpoints import dotless_copy
from lexel.errors import LexelError
from lexel.models import detokenizers
from lexel.models.discriminator import PatchDiscriminatorConfig
from lexel.tokenizers import (
    export_published,
    find_published,
    fourm,
    fourm_divae,
    from_pretrained,
    larp,
    list_published,
    load_published,
    maskgit_vqgan,
    open_magvit2,
    published_systems,
    published_table,
    titok,
)
from lexel.verify.fixture import Fixture

GOLDEN = Path(__file__).parent / "golden"
# (fixture, list in its published_keys.json) → (row, layout) that must consume it exactly.
KEY_LISTS = {
    ("llamagen_vq", "VQ-16"): ("llamagen-vq-16", "published"),
    ("llamagen_vq", "VQ-8"): ("llamagen-vq-8", "published"),
    ("janus_vq", "janus_pro"): ("janus-vq-16", "published"),
    ("janus_vq", "transformers"): ("janus-vq-16", "transformers"),
    ("fqgan_dual", "VQ-16"): ("fqgan-dual-16", "published"),
    ("fqgan_dual", "VQ-8"): ("fqgan-dual-8", "published"),
    ("fqgan_triple", "VQ-16"): ("fqgan-triple-16", "published"),
    ("fqgan_triple", "VQ-8"): ("fqgan-triple-8", "published"),
    ("chameleon_vq", "chameleon_vqgan_original"): ("chameleon-vq", "published"),
    ("chameleon_vq", "chameleon_vqvae_transformers"): ("chameleon-vq", "transformers"),
    ("emu3_vq", "BAAI/Emu3-VisionTokenizer"): ("emu3-vision-tokenizer", "published"),
    ("emu3_vq", "transformers"): ("emu3-vision-tokenizer", "transformers"),
    ("elm_bae", "bae_16"): ("elm-bae-16", "published"),
    ("elm_bae", "bae_20"): ("elm-bae-20", "published"),
    ("elm_bae", "bae_24"): ("elm-bae-24", "published"),
    ("titok", "titok_l32"): ("titok-l-32", "published"),
    ("titok", "titok_b64"): ("titok-b-64", "published"),
    ("titok", "titok_s128"): ("titok-s-128", "published"),
    ("titok", "titok_bl64_vq8k"): ("titok-bl-64-vq", "published"),
    ("titok", "titok_bl128_vq8k"): ("titok-bl-128-vq", "published"),
    ("titok", "titok_sl256_vq8k"): ("titok-sl-256-vq", "published"),
    ("titok", "titok_ll32_vae_c16"): ("titok-ll-32-vae", "published"),
    ("titok", "titok_bl64_vae_c16"): ("titok-bl-64-vae", "published"),
    ("titok", "titok_bl128_vae_c16"): ("titok-bl-128-vae", "published"),
    ("titok", "tatitok_bl32_vq"): ("tatitok-bl-32-vq", "published"),
    ("titok", "tatitok_bl64_vq"): ("tatitok-bl-64-vq", "published"),
    ("titok", "tatitok_bl128_vq"): ("tatitok-bl-128-vq", "published"),
    ("titok", "tatitok_bl32_vae"): ("tatitok-bl-32-vae", "published"),
    ("titok", "tatitok_bl64_vae"): ("tatitok-bl-64-vae", "published"),
    ("titok", "tatitok_sl128_vae"): ("tatitok-sl-128-vae", "published"),
    ("titok", "maskgit-vqgan-imagenet-f16-256"): ("maskgit-vqgan-f16", "published"),
    ("one_d_piece", "One-D-Piece-S-256"): ("one-d-piece-s-256", "published"),
    ("one_d_piece", "One-D-Piece-B-256"): ("one-d-piece-b-256", "published"),
    ("one_d_piece", "One-D-Piece-L-256"): ("one-d-piece-l-256", "published"),
    ("flextok", "flextok_d12_d12_in1k"): ("flextok-d12-d12-in1k", "published"),
    ("flextok", "flextok_d18_d18_in1k"): ("flextok-d18-d18-in1k", "published"),
    ("flextok", "flextok_d18_d28_in1k"): ("flextok-d18-d28-in1k", "published"),
    ("flextok", "flextok_d18_d28_dfn"): ("flextok-d18-d28-dfn", "published"),
}
KEY_LISTS |= {
    ("open_magvit2_lfq", "IN256_Large"): ("open-magvit2-256", "published"),
    ("open_magvit2_lfq", "Pretrain_256_16384"): ("open-magvit2-pretrain-16384", "published"),
    ("open_magvit2_lfq", "Pretrain_256_262144"): ("open-magvit2-pretrain-262144", "published"),
    ("open_magvit2_video", "Video_128_262144"): ("open-magvit2-video", "published"),
    **{("ibq", f"IBQ-Tokenizer-{k}"): (f"ibq-{k}", "published") for k in (1024, 8192, 16384, 262144)},
    ("tokenflow", "tokenflow_clipb_32k_enhanced.pt"): ("tokenflow-clipb-32k", "published"),
    ("tokenflow", "tokenflow_siglip_32k.pt"): ("tokenflow-siglip-32k", "published"),
    ("larp", "LARP-L-long-tokenizer"): ("larp-l-long", "published"),
}
KEY_LISTS |= {
    (system, f"4M_tokenizers_{name}"): ("4m-" + name.replace("_", "-").lower(), "published")
    for system, names in {
        "fourm_vq": [
            "semseg_4k_224-448", "CLIP-B16_8k_224-448", "DINOv2-B14_8k_224-448", "ImageBind-H14_8k_224-448",
            "DINOv2-B14-global_8k_16_224", "ImageBind-H14-global_8k_16_224", "human-poses_1k_8",
            "sam-instance_1k_64",
        ],
        "fourm_divae": ["rgb_16k_224-448", "depth_8k_224-448", "normal_8k_224-448", "edge_8k_224-512"],
    }.items()
    for name in names
}  # fmt: skip
# System → how the arguments are found in a fixture's config.json, and a row of it.
FIXTURES = {
    "llamagen_vq": ("llamagen-vq-16", lambda config: config),
    "janus_vq": ("janus-vq-16", lambda config: config["reference_args"]),
    "fqgan_dual": ("fqgan-dual-16", lambda config: config),
    "fqgan_triple": ("fqgan-triple-16", lambda config: config),
    "chameleon_vq": ("chameleon-vq", lambda config: config["vqgan_params"]),
    "emu3_vq": ("emu3-vision-tokenizer", lambda config: config["reference_config"]),
    "open_magvit2_lfq": ("open-magvit2-256", lambda config: open_magvit2.flatten(config["args"])),
    "open_magvit2_video": ("open-magvit2-video", lambda config: open_magvit2.flatten(config["args"])),
    "ibq": ("ibq-1024", lambda config: open_magvit2.flatten(config["args"])),
    "elm_bae": ("elm-bae-16", lambda config: {**config["args"], "token_each": config["token_each"]}),
    "titok": ("titok-s-128", titok.flatten),
    "titok/direct_rgb": ("titok-bl-64-vq", titok.flatten),
    "titok/vae": ("titok-bl-64-vae", titok.flatten),
    "titok/tatitok": ("tatitok-bl-64-vq", titok.flatten),
    "titok/proxy_vqgan": ("maskgit-vqgan-f16", maskgit_vqgan.flatten),
    "one_d_piece": ("one-d-piece-s-256", titok.flatten),
    "flextok": ("flextok-d18-d28-in1k", lambda config: config),
    "larp": ("larp-l-long", larp.flatten),
    "fourm_vq": ("4m-semseg-4k-224-448", lambda config: fourm_arguments(fourm.FOURM_VQ, config)),
    "fourm_vq_semseg": ("4m-semseg-4k-224-448", lambda config: fourm_arguments(fourm.FOURM_VQ, config)),
    "fourm_vq_featuremap": ("4m-semseg-4k-224-448", lambda config: fourm_arguments(fourm.FOURM_VQ, config)),
    "fourm_vq_global": ("4m-human-poses-1k-8", lambda config: fourm_arguments(fourm.FOURM_VQ, config)),
    "fourm_divae": ("4m-rgb-16k-224-448", lambda config: fourm_arguments(fourm_divae.FOURM_DIVAE, config)),
    "tokenflow": ("tokenflow-clipb-32k", lambda config: config),
    "tokenflow_siglip": ("tokenflow-siglip-32k", lambda config: config),
}


def fourm_arguments(system, config) -> dict[str, object]:
    """Nothing of the row, which may be of another modality."""
    sizes = {name: config[name] for name in ("vit_sizes", "unet") if name in config}
    return {**system.arguments, **config["args"], **sizes}


def key_list(system: str, name: str) -> dict[str, tuple[int, ...]]:
    """One of the full-size lists, most of which leave prefixes out. A name may be cut to its first word."""
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
    named = layout_named(system, layout)
    expected = {key.removeprefix(named.prefix): shape for key, shape in key_list(*fixture).items()}
    stored = replace(named, prefix="").shapes(model)
    if system.dotless_ema:
        stored |= {key: tuple(value.shape) for key, value in dotless_copy(named.export(model)).items()}
    assert stored == expected


def test_the_discriminator_has_the_published_keys() -> None:
    shapes = {
        key: tuple(value.shape) for key, value in PatchDiscriminatorConfig().build().state_dict().items()
    }
    assert shapes == key_list("llamagen_vq", "discriminator_patchgan")


def test_no_recorded_key_list_goes_unchecked() -> None:
    elsewhere = {"discriminator_patchgan", "VQ-16-no_feat_head", "VQ-8-no_feat_head", "_note"}
    elsewhere |= {f"flextok_vae_c{channels}" for channels in (4, 8, 16)}
    # Models have test files of their own.
    for path in GOLDEN.glob("*/published_keys.json"):
        if path.parent.name in {"eagle_head", "lavit", "seed", *models.published_systems()}:
            continue
        for name in json.loads(path.read_text()):
            short = (path.parent.name, name.split()[0])
            assert {short, (short[0], name)} & set(KEY_LISTS) or name in elsewhere, (path.parent.name, name)


@pytest.mark.parametrize("row", [*list_published(), *models.list_published()], ids=lambda row: row.name)
def test_rows_state_what_they_are(row) -> None:
    system, _ = (models if row in models.list_published() else tokenizers).find_published(row.name)
    with torch.device("meta"):
        model = system.config(row.arguments).build()
    assert sum(p.numel() for p in model.parameters()) == row.parameters
    assert row.code_licence
    assert row.weight_licence
    assert row.source
    assert row.tokens
    assert row.codebook


def test_the_documented_table_is_what_the_code_knows() -> None:
    page = (Path(__file__).parents[1] / "docs" / "published.md").read_text()
    assert published_table(list_published()) in page
    assert models.published_table(models.list_published()) in page
    assert detokenizers.published_table(detokenizers.list_published()) in page


def test_names_are_unique() -> None:
    names = [row.name for row in [*list_published(), *models.list_published()]]
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
