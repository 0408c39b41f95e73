"""LaVIT: the published files, dynamic lengths, the continuous path and its training, at debug size."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import resolved, train
from torch import Tensor

from lexel import tokenizers
from lexel.document import Image, Text
from lexel.errors import LexelError
from lexel.nn.eva_vit import EvaConfig
from lexel.prompts import make_codec
from lexel.tokenizers import export_published, load_published
from lexel.tokenizers.lavit import (
    ENCODER,
    HIGHRES,
    LAVIT,
    LOWRES,
    VISUAL_WEIGHT,
    VIT,
    LaVIT,
    LaVITConfig,
    VisionConfig,
    gumbel_like,
    policy_attend,
    select,
)
from lexel.tokenizers.quantizers import QuantizerConfig
from lexel.train.objectives.lavit import LaVITObjectiveConfig
from lexel.train.settings import TokenizerStage
from lexel.train.tokenizer_module import TokenizerModule
from lexel.types import Codes
from lexel.verify.fixture import Fixture
from lexel.vocabulary import preset

GOLDEN = Path(__file__).parent / "golden" / "lavit"
ROW = "lavit-7b-v2"
SMALL = LaVITConfig(
    vit=EvaConfig(image_size=16, patch=4, width=32, layers=1, heads=2),
    layers=1, heads=2, mlp_ratio=2.0, code_dim=8,
    quantizer=QuantizerConfig("learned", codebook_size=32, cosine=False, entropy=0.0),
    decoder_layers=1, lowres=24, highres=(12, 20, 28), llm_dim=40, understanding=("vit_proj",),
)  # fmt: skip


def awake(config: LaVITConfig, seed: int = 0) -> LaVIT:
    """A tokenizer with weights so large that its decisions and codes differ from place to place, and that
    keeps about half of the positions."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = config.build()
        for value in model.parameters():
            if value.ndim > 1:
                torch.nn.init.normal_(value, std=2 * value.shape[-1] ** -0.5)
    with torch.no_grad():
        scores = model.eval().token_predictor(model.features(pictures())[:, 1:])
        model.token_predictor.out_conv[4].bias[0] -= (scores[..., 0] - scores[..., 1]).median() + 0.1
    return model


def pictures(count: int = 3, side: int = 16) -> Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.fixture(scope="module")
def model() -> LaVIT:
    return awake(SMALL)


# ---- published files -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    """The folder of the fixture's files and its arguments."""
    fixture = Fixture(GOLDEN, tmp_path_factory.mktemp("weights"))
    return fixture.weights_folder(), LAVIT.known(fixture.config)


def test_the_full_size_key_lists_are_consumed_exactly() -> None:
    config = replace(LAVIT.config({}), vit_proj=True, understanding=())
    with torch.device("meta"):
        shapes = LAVIT.layouts[0].shapes(config.build())
    lists = json.loads((GOLDEN / "published_keys.json").read_text())
    expected = {
        f"{name.split()[0]}:{key}": tuple(shape) for name, keys in lists.items() for key, shape in keys
    }
    assert shapes == expected


def test_export_and_load_again_changes_nothing(published, tmp_path: Path) -> None:
    folder, arguments = published
    loaded = load_published(ROW, folder, arguments)
    export_published(loaded, ROW, tmp_path)
    for name in (VIT, ENCODER, LOWRES, HIGHRES, VISUAL_WEIGHT):
        ours, theirs = (torch.load(place / name, weights_only=True) for place in (tmp_path, folder))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs), name
    assert load_published(ROW, tmp_path, arguments).fingerprint() == loaded.fingerprint()


def test_lexel_format_round_trip(published, tmp_path: Path) -> None:
    loaded = load_published(ROW, *published)
    loaded.save_pretrained(tmp_path)
    assert tokenizers.from_pretrained(tmp_path).fingerprint() == loaded.fingerprint()


@pytest.fixture
def copy(published, tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    folder, arguments = published
    return Path(shutil.copytree(folder, tmp_path / "copy")), arguments


def test_decoders_and_the_language_models_weights_may_be_missing(copy, tmp_path: Path) -> None:
    folder, arguments = copy
    (folder / VISUAL_WEIGHT).unlink()
    (folder / HIGHRES).unlink()
    loaded = load_published(ROW, folder, arguments)
    assert loaded.config.pixel_decoding == "lowres"
    codes = loaded.encode(pictures(side=56))
    assert loaded.decode_features(codes).shape == (3, 16, arguments["unet_dim"])
    with pytest.raises(LexelError, match="no token decoder 'highres'; it has: lowres"):
        loaded.decode_features(codes, "highres")
    with pytest.raises(LexelError, match="no projection to a language model"):
        loaded.understand(pictures(side=56))
    (folder / LOWRES).unlink()
    encoder = load_published(ROW, folder, arguments)
    assert not encoder.has_decoder
    assert torch.equal(encoder.encode(pictures(side=56)).indices, codes.indices)
    with pytest.raises(LexelError, match="no token decoder"):
        encoder.decode_features(codes)
    export_published(encoder, ROW, tmp_path / "encoder")
    assert not (tmp_path / "encoder" / LOWRES).exists()


def test_a_missing_required_file_is_named(copy) -> None:
    folder, arguments = copy
    (folder / VIT).unlink()
    with pytest.raises(LexelError, match=VIT):
        load_published(ROW, folder, arguments)


def test_the_projection_may_lie_in_either_file(copy, tmp_path: Path) -> None:
    """Where the publisher keeps it is not documented; what counts is what its loader would use."""
    folder, arguments = copy
    before = load_published(ROW, folder, arguments)
    pixels = pictures(side=56)
    visual = torch.load(folder / VISUAL_WEIGHT, weights_only=True)
    encoder = torch.load(folder / ENCODER, weights_only=True)
    projection = {key: value for key, value in visual.items() if key.startswith("vit_proj")}
    torch.save({key: v for key, v in visual.items() if key not in projection}, folder / VISUAL_WEIGHT)
    torch.save(encoder | projection, folder / ENCODER)
    moved = load_published(ROW, folder, arguments)
    assert torch.equal(moved.understand(pixels), before.understand(pixels))
    # In both files: the later one is laid over the earlier one.
    torch.save(visual, folder / VISUAL_WEIGHT)
    torch.save(encoder | {key: v + 1 for key, v in projection.items()}, folder / ENCODER)
    both = load_published(ROW, folder, arguments)
    assert torch.equal(both.understand(pixels), before.understand(pixels))
    export_published(both, ROW, tmp_path / "both")
    assert torch.load(tmp_path / "both" / ENCODER, weights_only=True).keys() == (encoder | projection).keys()


def test_the_continuous_path_has_a_merger_of_its_own(copy) -> None:
    folder, arguments = copy
    own = load_published(ROW, folder, arguments)
    pixels = pictures(side=56)
    visual = torch.load(folder / VISUAL_WEIGHT, weights_only=True)
    shared = {key: value for key, value in visual.items() if key.startswith("vit_proj")}
    torch.save(shared, folder / VISUAL_WEIGHT)
    without = load_published(ROW, folder, arguments)
    assert torch.equal(own.encode(pixels).indices, without.encode(pixels).indices)
    assert not torch.allclose(own.understand(pixels), without.understand(pixels), atol=1e-2)
    assert without.understand(pixels).shape == (3, 16, arguments["llm_embed_dim"])


def test_pixel_decoding_chooses_the_condition(published) -> None:
    folder, arguments = published
    codes = load_published(ROW, folder, arguments).encode(pictures(side=56))
    low = load_published("lavit-7b-v2-lowres", folder, arguments)
    assert low.decode_features(codes).shape == (3, 16, arguments["unet_dim"])
    with pytest.raises(LexelError, match="pixel_decoding must be highres or lowres"):
        load_published(ROW, folder, {**arguments, "pixel_decoding": "middle"})


# ---- the selector and its noise --------------------------------------------------------------------------


def test_selection_is_deterministic_without_noise_and_varies_with_it(model: LaVIT) -> None:
    pixels = pictures()
    codes = model.encode(pixels)
    assert torch.equal(codes.indices, model.encode(pixels).indices)
    assert 1 <= int(codes.lengths.min()) < 16
    scores = model.token_predictor(model.features(pixels)[:, 1:])
    assert torch.equal(codes.keep, scores.argmax(-1) == 0)
    quiet = model.encode_with(pixels, gumbel=torch.zeros_like(scores))
    assert torch.equal(quiet.indices, codes.indices)

    def drawn(seed: int) -> Codes:
        return model.encode_with(pixels, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(drawn(3).keep, drawn(3).keep)
    assert not torch.equal(drawn(3).keep, drawn(4).keep)
    noise = gumbel_like(scores, torch.Generator().manual_seed(3))
    assert torch.equal(drawn(3).indices, model.encode_with(pixels, gumbel=noise).indices)
    with pytest.raises(ValueError, match=r"gumbel must be \[3, 16, 2\], got \[3, 16\]"):
        model.encode_with(pixels, gumbel=noise[..., 0])


def test_gumbel_noise_is_standard() -> None:
    noise = gumbel_like(torch.zeros(50_000), torch.Generator().manual_seed(0))
    assert abs(float(noise.mean()) - 0.5772) < 0.02
    assert abs(float(noise.var()) - 1.6449) < 0.05


def test_codes_are_the_kept_positions_in_raster_order(model: LaVIT) -> None:
    pixels = pictures()
    codes = model.encode(pixels)
    features = model.features(pixels)[:, 1:]
    merged = model.causal_encoder(features, codes.keep)
    for row, keep, merged_row, length in zip(codes.indices, codes.keep, merged, codes.lengths):
        latents = torch.nn.functional.normalize(model.encode_task_layer(merged_row[keep]), dim=-1)
        distances = torch.cdist(latents, model.quantize.embedding.weight)
        assert torch.equal(row[:length, 0], distances.argmin(1))
        assert not row[length:].any()
    assert torch.equal(model.layout.unflatten(model.layout.flatten(codes)).indices, codes.indices)


def test_a_picture_that_would_keep_nothing_keeps_its_best_position(model: LaVIT) -> None:
    pixels = pictures()
    scores = model.token_predictor(model.features(pixels)[:, 1:])
    gumbel = torch.zeros_like(scores)
    gumbel[1, :, 1] = 1e4
    codes = model.encode_with(pixels, gumbel=gumbel)
    assert codes.lengths.tolist()[1] == 1
    assert int(codes.keep[1].nonzero()) == int((scores[1, :, 0] - scores[1, :, 1]).argmax())
    assert model.decode_features(codes).isfinite().all()
    everything = model.encode_with(pixels, gumbel=-gumbel)
    assert everything.lengths.tolist()[1] == 16
    assert model.decode_features(everything).isfinite().all()


def test_a_length_keeps_the_most_probable_positions(model: LaVIT) -> None:
    pixels = pictures()
    scores = model.token_predictor(model.features(pixels)[:, 1:])
    codes = model.encode(pixels, length=5)
    assert codes.lengths.tolist() == [5, 5, 5]
    best = (scores[..., 0] - scores[..., 1]).topk(5, dim=1).indices.sort(1).values
    assert torch.equal(codes.keep.nonzero()[:, 1].view(3, 5), best)
    with pytest.raises(ValueError, match="length=17 was asked for"):
        model.encode(pixels, length=17)


def test_an_unsure_selector_keeps_as_many_as_it_expects() -> None:
    model = awake(replace(SMALL, selection="expected"))
    with torch.no_grad():
        for value in model.token_predictor.out_conv[4].parameters():
            value *= 0.1
        model.token_predictor.out_conv[4].bias.copy_(torch.tensor([0.0, 0.8]))
        scores = model.token_predictor(model.features(pictures())[:, 1:])
    assert not (scores[..., 0] >= scores[..., 1]).any()  # by argmax nothing would be left
    codes = model.encode(pictures())
    assert codes.lengths.tolist() == scores[..., 0].exp().sum(1).round().long().tolist()
    assert int(codes.lengths.min()) > 3
    best = scores[0, :, 0].topk(int(codes.lengths[0])).indices
    assert set(codes.keep[0].nonzero()[:, 0].tolist()) == set(best.tolist())
    assert (model.understand(pictures())[0].abs().sum(-1) > 0).sum() == codes.lengths[0]
    assert model.encode(pictures(), length=2).lengths.tolist() == [2, 2, 2]


def test_a_row_of_a_batch_equals_that_row_alone(model: LaVIT) -> None:
    pixels = pictures()
    codes, understood = model.encode(pixels), model.understand(pixels)
    features = {name: model.decode_features(codes, name) for name in ("lowres", "highres")}
    assert len(set(codes.lengths.tolist())) > 1
    for i in range(3):
        alone = model.encode(pixels[i : i + 1])
        assert torch.equal(alone.indices[0], codes.indices[i])
        assert torch.allclose(model.understand(pixels[i : i + 1])[0], understood[i], atol=1e-5)
        assert not understood[i, codes.lengths[i] :].any()
        for name, value in features.items():
            assert torch.allclose(model.decode_features(alone, name)[0], value[i], atol=1e-4)


def test_decoders_read_ranks_not_places(model: LaVIT) -> None:
    codes = model.encode(pictures())
    written = Codes(codes.indices, lengths=codes.lengths)  # as a language model writes them
    assert torch.equal(model.decode_features(written), model.decode_features(codes))
    beyond = codes.indices.clone()
    beyond[torch.arange(16) >= codes.lengths[:, None]] = 7
    other = Codes(beyond, lengths=codes.lengths)
    assert torch.allclose(model.decode_features(other), model.decode_features(codes), atol=1e-5)


def test_masked_positions_keep_a_small_weight() -> None:
    """(w + eps / N) / (sum w + eps), against the formula written out for one query."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, 4, 2, generator=generator) for _ in range(3))
    policy = torch.tensor([1.0, 0.0, 1.0, 0.0])
    scores = (q[0, 0, 0] @ k[0, 0].T) / 2**0.5
    weights = (scores - scores.max()).exp() * policy
    weights = (weights + 1e-6 / 4) / (weights.sum() + 1e-6)
    mixed = policy_attend(q, k, v, policy.expand(1, 1, 1, 4))
    assert torch.allclose(mixed[0, 0], weights @ v[0, 0], atol=1e-6)
    # Nothing to look at: all alike.
    assert torch.allclose(policy_attend(q, k, v, torch.zeros(1, 1, 1, 4))[0, 2], v[0, 0].mean(0), atol=1e-6)


def test_half_precision_runs_too() -> None:
    model = awake(SMALL)
    exact = model.understand(pictures())
    model.bfloat16()
    codes = model.encode(pictures())
    assert model.decode_features(codes).isfinite().all()
    kept = model.understand(pictures())
    assert kept.dtype == torch.bfloat16
    assert kept.shape == exact.shape


def test_rows_of_the_codebook_are_used_as_they_are() -> None:
    model = awake(SMALL)
    with torch.no_grad():
        model.quantize.embedding.weight[3] *= 0.01
    codes = model.encode(pictures())
    assert torch.equal(model.embed(codes), model.quantize.embedding.weight[codes.indices[..., 0]])


def test_pixels_need_a_detokenizer(model: LaVIT) -> None:
    assert not model.draws_pixels
    with pytest.raises(LexelError, match="detokenizer"):
        model.decode(model.encode(pictures()))


def test_the_condition_holds_prompt_and_pooled(model: LaVIT) -> None:
    codes = model.encode(pictures())
    both = model.decode_features(codes)
    assert both.shape == (3, 17, 32)
    features = model.reconstruct_features(codes)
    decoder = model.highres_decoder
    prompt = torch.cat([decoder.unet_proj_1(features), decoder.unet_proj_2(features)], -1)
    assert torch.equal(both[:, :-1], prompt)
    assert torch.equal(both[:, -1, :28], decoder.unet_attnpool(features))
    assert not both[:, -1, 28:].any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vit": None}, "exactly one of vit and vision"),
        ({"highres": (3, 4)}, "two condition widths and a pooled one"),
        ({"understanding": ("encoder",)}, "understanding names"),
        ({"selection": "best"}, "selection must be argmax or expected"),
        ({"heads": 5}, "5 heads do not divide a width of 32"),
    ],
)
def test_contradictions_are_refused(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **options)


def test_other_sizes_are_refused(model: LaVIT) -> None:
    with pytest.raises(ValueError, match="reads 16x16 pictures, got 20x16"):
        model.encode(torch.zeros(1, 3, 20, 16))


# ---- in a language model's sequence ---------------------------------------------------------------------


class Letters:
    """A text tokenizer of single letters."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [ord(letter) for letter in text]

    def decode(self, token_ids: list[int]) -> str:
        return "".join(map(chr, token_ids))


def test_codes_of_any_number_travel_through_lavits_sequences() -> None:
    """Written by the published form and read again, they are the same codes and draw the same."""
    model = awake(replace(SMALL, quantizer=replace(SMALL.quantizer, codebook_size=16384)))
    codec = make_codec(preset("lavit"), Letters(), {"image": model.layout})
    codes = model.encode(pictures())
    assert len(set(codes.lengths.tolist())) > 1
    for i, length in enumerate(codes.lengths.tolist()):
        one = codes[i : i + 1]
        sequence = codec.build([Image(one), Text("a dog")])
        assert sequence.ids[: length + 2].tolist() == [
            32000, *(codes.indices[i, :length, 0] + 32002).tolist(), 32001,
        ]  # fmt: skip
        picture, text = codec.parse(sequence.ids)
        assert text == Text("a dog")
        assert isinstance(picture, Image)
        assert torch.equal(picture.codes.indices, one.indices)
        assert torch.equal(picture.codes.lengths, one.lengths)
        assert torch.equal(model.decode_features(picture.codes), model.decode_features(one))


# ---- any frozen vision model -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vision(tmp_path_factory) -> Path:
    """A tiny CLIP vision model in a folder of transformers'."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=16,
        patch_size=4,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("vision")
    CLIPVisionModel(config).save_pretrained(folder)
    return folder


def test_any_vision_model_may_be_the_encoder(vision: Path, tmp_path: Path) -> None:
    config = replace(SMALL, vit=None, vision=VisionConfig.read(str(vision)))
    model = awake(config)
    pixels = pictures()
    assert model.features(pixels).shape == (3, 17, 32)
    codes = model.encode(pixels)
    model.save_pretrained(tmp_path)
    shutil.copytree(vision, tmp_path / "elsewhere")
    again = tokenizers.from_pretrained(tmp_path)  # the folder of the vision model is not needed
    assert torch.equal(again.encode(pixels).indices, codes.indices)
    assert again.fingerprint() == model.fingerprint()


def test_select_prefers_keeping_on_ties() -> None:
    assert select(torch.zeros(1, 3, 2)).all()


# ---- training --------------------------------------------------------------------------------------------

TRAINED = replace(
    SMALL, lowres=0, highres=None, pixel_decoding="lowres", understanding=(),
    quantizer=QuantizerConfig("vq", codebook_size=16, cosine=True, kmeans_init=True, decay=0.9),
)  # fmt: skip


def fresh(keeps: float = 0.0) -> LaVIT:
    """A network to train: usual weights but for an encoder whose features differ from place to place;
    keeps: bias of the selector."""
    torch.manual_seed(0)
    model = TRAINED.build()
    model.encoder.load_state_dict(awake(SMALL).encoder.state_dict())
    with torch.no_grad():
        model.token_predictor.out_conv[4].bias[0] += keeps
    return model


def learn(module: TokenizerModule, batches: list[Tensor], lr: float = 3e-3) -> list[dict[str, float]]:
    """One step on each batch; the metrics of each."""
    network: Any = module.network.train()
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr)
    records = []
    for i, batch in enumerate(batches):
        torch.manual_seed(i)
        loss, metrics = module.compute(network, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        records.append({name: float(value) for name, value in metrics.items()})
    network.eval()
    return records


def module_of(network: LaVIT, frozen: tuple[str, ...] = (), **settings: Any) -> TokenizerModule:
    stage = TokenizerStage(ema=0.0, frozen=list(frozen))
    return TokenizerModule(network, LaVITObjectiveConfig(**settings).build(), stage)


def mean(records: list[dict[str, float]], name: str) -> float:
    return sum(record[name] for record in records) / len(records)


@pytest.mark.parametrize("quantize", [False, True])
def test_overfits_one_batch(quantize: bool) -> None:
    records = learn(module_of(fresh(), quantize=quantize), [pictures(8)] * 120)
    assert mean(records[-10:], "cosine") < 0.45 * mean(records[:3], "cosine")
    assert ("commitment" in records[0]) == quantize


@pytest.mark.parametrize("start", [3.0, -3.0])
def test_the_keep_rate_reaches_its_share(start: float) -> None:
    """From almost all or almost nothing kept to a third, within 0.06, on other pictures in every step."""
    generator = torch.Generator().manual_seed(2)
    batches = [torch.rand(8, 3, 16, 16, generator=generator) * 2 - 1 for _ in range(80)]
    records = learn(module_of(fresh(start), quantize=False), batches)
    assert abs(records[0]["keep_rate"] - 1 / 3) > 0.2
    assert abs(mean(records[-20:], "keep_rate") - 1 / 3) < 0.06


def test_the_selector_learns_from_the_features_too() -> None:
    model = fresh().train()
    module = module_of(model, rate_weight=0.0, quantize=True)
    output = module.objective.predict(model, pictures(), 0)
    assert set(output.keep.unique().tolist()) <= {0.0, 1.0}
    loss, _ = module.objective.generator_loss(output, pictures(), 0, model.last_layer)
    loss.backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all(p.grad is not None and p.grad.any() for p in trained.values())
    assert not any(name.startswith("encoder") for name in trained)


def test_frozen_parts_do_not_move() -> None:
    model = fresh()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    learn(module_of(model, frozen=("token_predictor",)), [pictures(8)] * 3)
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    parts = {name.split(".")[0] for name in moved}
    assert parts == {"causal_encoder", "encode_task_layer", "quantize", "lowres_decoder"}


def test_the_codebook_sees_kept_positions_only() -> None:
    model = fresh().train()
    output = model(pictures(), generator=torch.Generator().manual_seed(3))
    count = int(output.codes.lengths.sum())
    assert output.quantizer.indices.shape == (1, count, 1)
    assert int((output.codes.indices >= 0).sum()) == count
    again = model(pictures(), generator=torch.Generator().manual_seed(3))
    other = model(pictures(), generator=torch.Generator().manual_seed(4))
    assert torch.equal(again.keep, output.keep)
    assert not torch.equal(other.keep, output.keep)


def test_the_evaluation_pass_is_what_the_codes_say() -> None:
    model = fresh()
    learn(module_of(model), [pictures(8)] * 2)
    with torch.no_grad():
        output = model(pictures())
    codes = model.encode(pictures())
    assert torch.equal(output.codes.keep, codes.keep)
    assert torch.allclose(output.reconstruction, model.reconstruct_features(codes), atol=1e-5)
    assert torch.equal(model.decode_features(codes), model.reconstruct_features(codes))


def test_the_encoders_weights_come_from_a_file(tmp_path: Path) -> None:
    donor = awake(SMALL).encoder.state_dict()
    extra = {"norm.weight": torch.ones(32), "head.weight": torch.ones(3, 32)}
    torch.save(donor | extra, tmp_path / "eva.bin")
    model = TRAINED.build()
    LaVITObjectiveConfig(encoder=str(tmp_path / "eva.bin")).build().prepare(model)
    assert all(torch.equal(value, donor[name]) for name, value in model.encoder.state_dict().items())
    other = replace(TRAINED, vit=replace(TRAINED.vit, layers=2)).build()
    with pytest.raises(LexelError, match=r"does not fit the encoder: missing blocks\.1"):
        LaVITObjectiveConfig(encoder=str(tmp_path / "eva.bin")).build().prepare(other)


def test_any_vision_model_is_the_frozen_teacher(vision: Path) -> None:
    from lexel.train.objectives.teachers import VisionTeacher

    config = replace(TRAINED, vit=None, vision=VisionConfig.read(str(vision)))
    torch.manual_seed(0)
    model = config.build()
    module = module_of(model, encoder=str(vision), quantize=False)
    teacher = VisionTeacher(str(vision), output="patches")
    assert torch.allclose(model.features(pictures())[:, 1:], teacher(pictures()), atol=1e-5)
    before = {name: value.clone() for name, value in model.encoder.state_dict().items()}
    records = learn(module, [pictures(8)] * 30)
    assert records[-1]["cosine"] < records[0]["cosine"]
    assert all(torch.equal(value, before[name]) for name, value in model.encoder.state_dict().items())


def test_the_objective_refuses_what_it_cannot_train() -> None:
    objective = LaVITObjectiveConfig().build()
    with pytest.raises(LexelError, match="tokenizer=lavit"):
        objective.prepare(torch.nn.Linear(1, 1))
    with pytest.raises(LexelError, match="feature_dim"):
        objective.prepare(replace(TRAINED, feature_dim=20).build())
    with pytest.raises(LexelError, match="no token decoder"):
        objective.prepare(replace(TRAINED, lowres=None).build())
    with pytest.raises(ValueError, match="rate is a share"):
        LaVITObjectiveConfig(rate=0.0)


def test_the_debug_recipe_trains_and_its_tokenizer_loads(tmp_path: Path) -> None:
    stage = "stages.tokenizer"
    train(
        "experiment=lavit_debug", f"output={tmp_path}", "tokenizer.vit.patch=8", "threads=1", "examples=16",
        "tokenizer.vit.width=32", "tokenizer.vit.layers=1", "tokenizer.layers=1",
        "tokenizer.decoder_layers=1", "quantizer.codebook_size=16", f"{stage}.steps=3",
        f"{stage}.batch_size=8", f"{stage}.validate_every=3", f"{stage}.validation_batches=1",
        f"{stage}.sample_every=3",
    )  # fmt: skip
    loaded = tokenizers.from_pretrained(tmp_path / "tokenizer")
    assert loaded.encode(pictures(side=32)).lengths.shape == (3,)
    header = (tmp_path / "tokenizer" / "metrics.csv").read_text().splitlines()[0]
    assert {"validation/cosine", "validation/keep_rate_argmax"} <= set(header.split(","))


def test_the_published_recipe_has_the_published_tokenizer(tmp_path: Path) -> None:
    for experiment in ("lavit_stage1", "lavit_stage2"):
        config = resolved(f"experiment={experiment}", f"data.root={tmp_path}").tokenizer
        published = LAVIT.config({})
        assert (config.vit, config.layers, config.heads) == (published.vit, published.layers, published.heads)
        with torch.device("meta"):
            ours, theirs = config.build(), published.build()
        shapes = {name: p.shape for name, p in ours.named_parameters()}
        assert shapes.items() <= {name: p.shape for name, p in theirs.named_parameters()}.items()
