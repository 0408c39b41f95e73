"""The trainable detokenizer: conditions, networks, paths and samplers; frozen parts; large pictures."""

import json

import pytest
import torch
from torch import nn

from lexel.errors import LexelError
from lexel.models.detokenizers import CLASSES, from_pretrained, list_published, load_published
from lexel.models.detokenizers.diffusion import DiffusionDetokenizer, DiffusionDetokenizerConfig
from lexel.models.detokenizers.frozen import FrozenVAE, text_settings, vae_geometry, vae_settings
from lexel.nn.diffusion import PATHS, mixing, network_times, sample, schedulers
from lexel.nn.guidance import APG, make_guide
from lexel.nn.tiles import blend, places
from lexel.types import Codes

SIZES = {"patch": 2, "condition_dim": 16, "image_size": (16, 16)}
UNET = {"network": "unet", "channels": (8, 16)}
DIT = {"network": "dit", "channels": (32,), "layers": 2}
GEOMETRIES = {
    "raster": {"codebook_sizes": (7,), "grid": (4, 4)},
    "factorized": {"codebook_sizes": (7, 5), "grid": (4, 4)},
    "line": {"codebook_sizes": (7,), "length": 6},
    "flexible": {"codebook_sizes": (7,), "length": 6, "flexible": True},
    "scales": {"codebook_sizes": (7,), "scales": ((1, 1), (2, 2), (4, 4))},
    "features": {"reads": "features", "feature_dim": 5, "length": 6},
    "feature_grid": {"reads": "features", "feature_dim": 5, "grid": (4, 4)},
}
KINDS = {
    "concat-unet": {"condition": "concat", **UNET},
    "cross-unet": {"condition": "cross", **UNET},
    "concat-dit": {"condition": "concat", **DIT},
    "cross-dit": {"condition": "cross", **DIT},
    "joint-dit": {"condition": "joint", **DIT},
}
PAIRS = [(geometry, kind) for geometry in GEOMETRIES for kind in KINDS]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def configured(geometry="raster", kind="concat-unet", **changes):
    values = {**SIZES, **GEOMETRIES[geometry], **KINDS[kind]}
    if "concat" in kind:
        values.setdefault("grid", (4, 4))
    return DiffusionDetokenizerConfig(**{**values, **changes})


def build(geometry="raster", kind="concat-unet", seed=0, **changes):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return configured(geometry, kind, **changes).build().eval()


def condition(config, count=3, seed=0):
    """Random codes, or features, that a config reads."""
    if config.reads == "features":
        return torch.randn(count, config.positions, config.feature_dim, generator=seeded(seed))
    shape, sizes = (count, config.positions), config.codebook_sizes
    indices = torch.stack([torch.randint(0, k, shape, generator=seeded(seed)) for k in sizes], dim=2)
    return Codes(indices, config.grid if config.raster else None, config.scales)


def noises(net, count=3, seed=1):
    return torch.randn(count, net.config.space[1], *net.config.size, generator=seeded(seed))


# Conditions and networks


@pytest.mark.parametrize(("geometry", "kind"), PAIRS)
def test_every_condition_reaches_the_picture_and_every_weight_learns(geometry, kind):
    net = build(geometry, kind, null_dropout=0.5).train()
    given = condition(net.config, 4)
    pixels = torch.rand(4, 3, 16, 16, generator=seeded(3)) * 2 - 1
    generator = seeded(0)
    sum(net.loss(pixels, given, generator=generator)[0] for _ in range(3)).backward()
    still = [name for name, p in net.named_parameters() if p.grad is None or not bool(p.grad.abs().sum() > 0)]
    # Keys' biases change nothing (softmax); nothing reads the codes after the last joint block.
    idle = (
        "to_k.bias",
        "add_k_proj.bias",
        "blocks.1.attn.add_q_proj.weight",
        "blocks.1.attn.add_q_proj.bias",
    )
    assert [name for name in still if not name.endswith(idle)] == []
    net.eval()
    given, noise = given[:3], noises(net)
    first = net.decode(given, steps=2, noise=noise)
    assert first.shape == (3, 3, 16, 16)
    assert not torch.equal(first, net.decode(condition(net.config, seed=5), steps=2, noise=noise))
    together = net.decode(given, steps=2, guidance=2.0, noise=noise)
    alone = net.decode(given[1:2], steps=2, guidance=2.0, noise=noise[1:2])
    torch.testing.assert_close(together[1:2], alone, rtol=1e-4, atol=1e-5)
    assert torch.equal(first, net.decode(given, steps=2, generator=seeded(1)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("geometry", ["flexible", "scales"])
def test_codes_that_are_missing_do_not_matter(geometry, kind):
    net = build(geometry, kind)
    codes, noise = condition(net.config), noises(net)
    count = 5  # of the flexible line; the first two scales
    lengths = torch.full((3,), count)
    masked = Codes(codes.indices, lengths=lengths)
    other = codes.indices.clone()
    other[:, count:] = (other[:, count:] + 1) % 7
    first = net.decode(masked, steps=2, noise=noise)
    assert torch.equal(first, net.decode(Codes(other, lengths=lengths), steps=2, noise=noise))
    assert torch.equal(first, net.decode(Codes(codes.indices[:, :count]), steps=2, noise=noise))
    assert not torch.equal(first, net.decode(codes, steps=2, noise=noise))


@pytest.mark.parametrize("kind", KINDS)
def test_cells_that_a_selector_dropped_do_not_matter(kind):
    net = build("raster", kind)
    codes, noise = condition(net.config), noises(net)
    keep = torch.rand(3, 16, generator=seeded(2)) < 0.5
    other = codes.indices.where(keep[..., None], (codes.indices + 1) % 7)
    drawn = [net.decode(Codes(x, (4, 4), keep=keep), steps=2, noise=noise) for x in (codes.indices, other)]
    assert torch.equal(*drawn)


def test_training_cuts_flexible_codes_at_every_length():
    net = build("flexible", "joint-dit").train()
    codes = condition(net.config, 200)
    lengths = net.cut(codes, seeded(0)).lengths
    assert set(lengths.tolist()) == set(range(1, 7))
    few = Codes(codes.indices, lengths=torch.full((200,), 2))
    assert set(net.cut(few, seeded(0)).lengths.tolist()) == {1, 2}
    assert net.eval().cut(codes).lengths is None
    assert build("line", "joint-dit").train().cut(codes) is codes


def test_conditions_of_another_shape_are_refused():
    with pytest.raises(ValueError, match="reads codes, got Tensor"):
        build().decode(torch.zeros(1, 16, 5))
    with pytest.raises(ValueError, match=r"reads features \[b, 6, 5\]"):
        build("features", "cross-dit").decode(torch.zeros(1, 6, 4))
    with pytest.raises(ValueError, match="noise must be"):
        build().decode(condition(configured()), noise=torch.zeros(3, 3, 8, 8))
    with pytest.raises(ValueError, match="caption"):
        build().decode(condition(configured()), text=["a", "b", "c"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reads": "pixels"}, "reads"),
        ({"reads": "features"}, "feature_dim"),
        ({"condition": "sum"}, "condition"),
        ({"network": "mlp"}, "network"),
        ({"prediction": "score"}, "prediction"),
        ({"condition": "joint"}, "network=dit"),
        ({"network": "dit"}, "one width"),
        ({"network": "dit", "channels": (24,)}, "head_dim"),
        ({"channels": (16, 8)}, "head_dim"),
        ({"prediction": "noise"}, "take velocity"),
        ({"path": "sigmoid"}, "path"),
        ({"scheduler": "ddim"}, "sampled by euler"),
        ({"guider": "pag"}, "guider"),
        ({"grid": None}, "grid is needed"),
        ({"flexible": True}, "1D"),
        ({"length": 4, "scales": ((4, 4),)}, "not both"),
        ({"scale": 3}, "scale 3"),
        ({"image_size": (20, 16)}, "image_size"),
    ],
)
def test_choices_that_do_not_go_together_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        configured("raster", "concat-unet", **changes)


# Paths, predictions, samplers


@pytest.mark.parametrize(("path", "scheduler"), [(p, s) for p in PATHS for s in schedulers(p)])
def test_every_sampler_carries_noise_to_a_gaussian(path, scheduler):
    """For data N(m, s²) the best estimate of the clean picture is known, and the path's flow maps noise z to
    m + s·z. Errors fall with the number of steps."""
    mean, spread = 0.3, 0.2
    noise = torch.randn(2, 3, 4, 4, generator=seeded())

    def estimate(x, time):
        a, b = (float(v) for v in mixing(path, torch.tensor([time], dtype=torch.float64)))
        return mean + a * spread**2 / (a * a * spread**2 + b * b) * (x - a * mean)

    target = mean + spread * noise
    errors = [float((sample(estimate, noise, path, scheduler, n) - target).abs().max()) for n in (4, 50, 500)]
    assert errors[0] > 4 * errors[1]
    assert errors[2] < 0.011
    with pytest.raises(ValueError, match="steps"):
        sample(estimate, noise, path, scheduler, 0)


@pytest.mark.parametrize("path", PATHS)
def test_paths_go_from_the_picture_to_noise(path):
    times = torch.arange(1, 1001) / 1000
    a, b = mixing(path, times)
    assert bool((a.diff() < 0).all())
    assert bool((b.diff() > 0).all())
    assert float(a[0]) > 0.99
    assert float(a[-1]) < 0.07
    if path != "flow":
        torch.testing.assert_close(a**2 + b**2, torch.ones(1000))
        assert network_times(path, times).tolist() == list(range(1000))


PREDICTIONS = [("flow", "clean"), ("flow", "velocity")]
PREDICTIONS += [(path, kind) for path in PATHS[1:] for kind in ("clean", "velocity", "noise")]


@pytest.mark.parametrize(("path", "prediction"), PREDICTIONS)
def test_a_perfect_prediction_has_no_loss_and_gives_the_picture(path, prediction):
    net = build(path=path, prediction=prediction, times=None)
    clean = torch.rand(3, 3, 16, 16, generator=seeded(3)) * 1.8 - 0.9
    noise, times = noises(net), torch.tensor([0.1, 0.5, 0.9])
    a, b = (v[:, None, None, None] for v in mixing(path, times))
    if prediction == "velocity":
        target = noise - clean if path == "flow" else a * noise - b * clean
    else:
        target = clean if prediction == "clean" else noise
    net.predict = lambda x, t, given: target
    codes = condition(net.config)
    loss, metrics = net.loss(clean, codes, noise=noise, times=times)
    assert float(loss) == 0
    assert float(metrics["x0_mse"]) < 1e-8
    noisy = a * clean + b * noise
    torch.testing.assert_close(net.denoise(noisy, times, None), clean, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize(("path", "prediction"), PREDICTIONS)
def test_every_prediction_draws(path, prediction):
    for scheduler in schedulers(path):
        net = build(path=path, prediction=prediction, scheduler=scheduler)
        drawn = net.decode(condition(net.config), steps=3, generator=seeded())
        assert bool(drawn.isfinite().all())
        assert float(drawn.std()) > 0


def test_guidance_acts_on_the_estimate_inside_its_interval():
    net, codes = build(), condition(configured())
    noise, times = noises(net), torch.ones(3)
    given = net.given(codes)
    known, free = net.denoise(noise, times, given), net.denoise(noise, times, net.nothing(given))
    one = net.draw(codes, steps=1, guidance=3.0, noise=noise)
    torch.testing.assert_close(one, free + 3.0 * (known - free), atol=1e-5, rtol=1e-4)
    apg = net.draw(codes, steps=1, guidance=3.0, guider="apg", apg=APG(threshold=0.5), noise=noise)
    expected = make_guide("apg", 3.0, APG(threshold=0.5))(known, free, 1.0)
    torch.testing.assert_close(apg, expected, atol=1e-5, rtol=1e-4)
    late = build(interval=(0.0, 0.6))
    half = late.draw(codes, steps=2, guidance=3.0, noise=noise)
    assert torch.equal(
        late.draw(codes, steps=1, guidance=3.0, noise=noise), net.draw(codes, steps=1, noise=noise)
    )
    assert not torch.equal(half, net.draw(codes, steps=2, noise=noise))
    assert not torch.equal(half, net.draw(codes, steps=2, guidance=3.0, noise=noise))


# Saving


def test_the_shipped_detokenizer_loads_and_draws_what_it_drew():
    from lexel.sample.bundle import find_bundle

    folder = find_bundle(None) / "detokenizer"
    assert json.loads((folder / "config.json").read_text())["model_type"] == "flow"
    net = from_pretrained(folder)
    codes = Codes((torch.arange(64) * 7 % 512).reshape(1, 64, 1), (8, 8))
    noise = torch.linspace(-2, 2, 3 * 32 * 32).reshape(1, 3, 32, 32).sin() * 1.4
    drawn = net.decode(codes, steps=4, noise=noise)
    assert net.fingerprint() == "bc3afe722ec3332a"
    seen = [drawn[0, :, 5, 7], drawn[0, :, 20, 30]]
    expected = torch.tensor([[-0.8911205, -0.4192787, 0.5692471], [-0.7821635, -0.3646745, -0.1194905]])
    torch.testing.assert_close(torch.stack(seen), expected, atol=1e-4, rtol=0)
    assert float(drawn.mean()) == pytest.approx(-0.2929520, abs=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_saving_keeps_every_bit(kind, tmp_path):
    net = build("raster", kind)
    net.save_pretrained(tmp_path)
    again = from_pretrained(tmp_path)
    assert isinstance(again, DiffusionDetokenizer)
    assert (again.config, again.fingerprint()) == (net.config, net.fingerprint())
    codes = condition(net.config)
    assert torch.equal(*(x.decode(codes, steps=2, generator=seeded(1)) for x in (net, again)))


def test_the_registry_names_modules_that_exist():
    from importlib import import_module

    for place in CLASSES.values():
        module, name = place.split(":")
        assert hasattr(import_module(f"lexel.models.detokenizers.{module}"), name)
    names = [row.name for row in list_published()]
    assert len(set(names)) == len(names)
    with pytest.raises(LexelError, match="no published detokenizer"):
        load_published("nothing")


# Latents


VAES = {
    "AutoencoderKL": {
        "block_out_channels": [8, 8],
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "latent_channels": 4,
        "scaling_factor": 0.5,
        "shift_factor": 0.1,
    },
    "AutoencoderTiny": {
        "encoder_block_out_channels": [8, 8],
        "decoder_block_out_channels": [8, 8],
        "num_encoder_blocks": [1, 1],
        "num_decoder_blocks": [1, 1],
        "latent_channels": 4,
    },
    "AutoencoderDC": {
        "encoder_block_out_channels": [8, 8],
        "decoder_block_out_channels": [8, 8],
        "encoder_layers_per_block": [1, 1],
        "decoder_layers_per_block": [1, 1],
        "encoder_block_types": "ResBlock",
        "decoder_block_types": "ResBlock",
        "encoder_qkv_multiscales": [[], []],
        "decoder_qkv_multiscales": [[], []],
        "latent_channels": 4,
        "scaling_factor": 0.7,
    },
}


def vae_folder(name, folder):
    import diffusers

    with torch.random.fork_rng():
        torch.manual_seed(3)
        vae = getattr(diffusers, name)(**VAES[name]).eval()
    vae.save_pretrained(folder)
    return vae


@pytest.mark.parametrize("name", VAES)
def test_a_detokenizer_in_latents_loads_alone(name, tmp_path):
    original = vae_folder(name, tmp_path / "vae")
    settings = vae_settings(tmp_path / "vae")
    assert vae_geometry(settings) == (2, 4)
    net = build(vae=settings, patch=1)
    net.load_frozen(vae=tmp_path / "vae")
    assert (net.config.space, net.config.size) == ((2, 4), (8, 8))
    pixels = torch.rand(2, 3, 16, 16, generator=seeded(3)) * 2 - 1
    with torch.no_grad():
        found = original.encode(pixels)
        plain = found.latent_dist.mean if name == "AutoencoderKL" else found[0]
        latents = net.to_space(pixels)
        shift, scale = VAES[name].get("shift_factor", 0.0), VAES[name].get("scaling_factor", 1.0)
        torch.testing.assert_close(latents, (plain - shift) * scale)
        torch.testing.assert_close(
            net.vae.decode(latents), original.decode(plain).sample, atol=1e-5, rtol=1e-4
        )
    codes = condition(net.config, 2)
    net.train().loss(pixels, codes, generator=seeded())[0].backward()
    assert not net.vae.training
    assert all(p.grad is None and not p.requires_grad for p in net.vae.parameters())
    net.eval().save_pretrained(tmp_path / "net")
    again = from_pretrained(tmp_path / "net")
    drawn = again.decode(codes, steps=2, generator=seeded())
    assert drawn.shape == (2, 3, 16, 16)
    assert torch.equal(drawn, net.decode(codes, steps=2, generator=seeded()))


def test_other_vaes_and_broken_ones_are_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderOobleck"}')
    with pytest.raises(LexelError, match="AutoencoderKL"):
        vae_settings(tmp_path)
    vae_folder("AutoencoderTiny", tmp_path / "tiny")
    net = FrozenVAE({"_class_name": "AutoencoderKL", **VAES["AutoencoderKL"]})
    with pytest.raises(LexelError, match="VAE"):
        net.load(tmp_path / "tiny")


# Text


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory):
    from transformers import CLIPTextConfig, CLIPTextModel

    from lexel.data.text_tokenizer import train_text_tokenizer

    folder = tmp_path_factory.mktemp("text")
    words = train_text_tokenizer(["a red circle", "a blue ring"], 270)
    words.save_pretrained(folder)
    config = CLIPTextConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=8, bos_token_id=0, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        CLIPTextModel(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_captions_are_read_and_may_be_left_out(kind, text_folder, tmp_path):
    net = build("raster", kind, text=text_settings(text_folder), text_length=8)
    codes, noise = condition(net.config), noises(net)
    with pytest.raises(LexelError, match="text tokenizer"):
        net.decode(codes, steps=1, noise=noise)
    net.load_frozen(text=text_folder)
    assert net.reads_text
    captions = ["a red circle", None, "a blue ring"]
    drawn = net.decode(codes, steps=2, guidance=2.0, noise=noise, text=captions)
    silent = net.decode(codes, steps=2, guidance=2.0, noise=noise)
    assert torch.allclose(drawn[1], silent[1], atol=1e-5)
    assert not torch.allclose(drawn[0], silent[0], atol=1e-4)
    other = net.decode(codes, steps=2, guidance=2.0, noise=noise, text=["a blue ring", None, "a blue ring"])
    assert not torch.allclose(drawn[0], other[0], atol=1e-4)
    net.train()
    pixels = torch.rand(3, 3, 16, 16, generator=seeded(3)) * 2 - 1
    net.loss(pixels, codes, text=captions, generator=seeded())[0].backward()
    assert net.text_project[0].weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in net.text.parameters())
    net.eval().save_pretrained(tmp_path)
    again = from_pretrained(tmp_path)
    assert torch.equal(drawn, again.decode(codes, steps=2, guidance=2.0, noise=noise, text=captions))


# Large pictures


def test_tiles_cover_the_whole_and_blend_to_one():
    found = places((7, 4), (4, 4), 2)
    assert found == [(0, 0), (2, 0), (3, 0)]
    seen = torch.zeros(7, 4)
    for top, left in found:
        seen[top : top + 4, left : left + 4] += 1
    assert int(seen.min()) == 1
    whole = torch.rand(2, 3, 7, 4, generator=seeded())
    pieces = [whole[:, :, top : top + 4, left : left + 4] for top, left in found]
    torch.testing.assert_close(blend(pieces, found, (7, 4)), whole)
    with pytest.raises(ValueError, match="overlap"):
        places((7, 4), (4, 4), 4)
    with pytest.raises(ValueError, match="does not fit"):
        places((3, 4), (4, 4), 1)


@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_of_one_tile_is_drawn_as_ever_and_larger_ones_have_their_size(kind):
    net = build("raster", kind)
    codes, noise = condition(net.config), noises(net)
    plain = net.decode(codes, steps=2, noise=noise)
    assert torch.equal(plain, net.decode(Codes(codes.indices, (4, 4)), steps=2, noise=noise, overlap=1))
    large = Codes(torch.randint(0, 7, (2, 6 * 10, 1), generator=seeded(4)), (6, 10))
    noise = torch.randn(2, 3, 24, 40, generator=seeded(5))
    drawn = net.decode(large, steps=2, guidance=1.5, noise=noise)
    assert drawn.shape == (2, 3, 24, 40)
    alone = net.decode(large[1:2], steps=2, guidance=1.5, noise=noise[1:2])
    torch.testing.assert_close(drawn[1:2], alone, rtol=1e-4, atol=1e-5)


def test_tiles_leave_no_seams():
    """An estimate that depends on a place alone is drawn as if there were no tiles. One that is off by up to
    0.5 towards a tile's edges, as padding makes networks, jumps by 0.5 where tiles only touch; blended, its
    steps stay below 0.13."""
    net = build()
    large = Codes(torch.zeros(1, 12 * 12, 1, dtype=torch.long), (12, 12))
    noise = torch.randn(1, 3, 48, 48, generator=seeded(5))
    net.denoise = lambda x, times, given: x.tanh() * 0.5
    tiled = net.draw(large, steps=3, noise=noise)
    plain = sample(lambda x, time: x.tanh() * 0.5, noise, "flow", "euler", 3)
    torch.testing.assert_close(tiled, plain)
    ramp = torch.linspace(0, 0.5, 16).expand(1, 3, 16, 16)
    net.denoise = lambda x, times, given: ramp.expand(len(x), -1, -1, -1)
    steps = [net.draw(large, steps=1, noise=noise, overlap=n).diff(dim=-1).abs().max() for n in (0, 2)]
    assert float(steps[0]) == pytest.approx(0.5, abs=0.02)
    assert float(steps[1]) < 0.13


def test_latents_of_a_large_picture_are_decoded_in_tiles(tmp_path):
    vae_folder("AutoencoderTiny", tmp_path)
    net = build(vae=vae_settings(tmp_path), patch=1)
    net.load_frozen(vae=tmp_path)
    large = Codes(torch.zeros(1, 6 * 8, 1, dtype=torch.long), (6, 8))
    drawn = net.decode(large, steps=1, generator=seeded())
    assert drawn.shape == (1, 3, 24, 32)
    whole = net.vae.decode(net.draw(large, steps=1, generator=seeded())).clamp(-1, 1)
    torch.testing.assert_close(drawn[..., :6, :6], whole[..., :6, :6], atol=0.1, rtol=0)


# By heart


@pytest.mark.slow
@pytest.mark.parametrize(
    ("geometry", "kind"),
    [
        ("raster", "cross-unet"),
        ("raster", "cross-dit"),
        ("factorized", "joint-dit"),
        ("flexible", "joint-dit"),
        ("scales", "concat-dit"),
        ("features", "cross-dit"),
    ],
)
def test_one_batch_is_learned_by_heart(geometry, kind):
    """Four pictures, told apart by their condition alone, are drawn from fresh noise."""
    net = build(geometry, kind, flexible=False).train()
    pixels = torch.rand(4, 3, 4, 4, generator=seeded(6)) * 1.6 - 0.8
    pixels = nn.functional.interpolate(pixels, size=(16, 16))
    given = condition(net.config, 4, seed=2)
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    generator = seeded(0)
    for _ in range(250):
        rows = torch.arange(32) % 4
        loss, _ = net.loss(pixels[rows], given[rows], generator=generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    drawn = net.eval().decode(given, steps=16, generator=seeded(9))
    distance = (drawn[:, None] - pixels[None]).square().mean(dim=(2, 3, 4))
    assert distance.argmin(dim=1).tolist() == [0, 1, 2, 3]
    assert float(distance.diagonal().max()) < 0.05
