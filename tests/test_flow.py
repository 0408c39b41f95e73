"""The rectified-flow detokenizer: solver, determinism, conditioning, training, saving."""

import pytest
import torch

from lexel.errors import LexelError
from lexel.models.detokenizers import from_pretrained
from lexel.models.detokenizers.diffusion import DiffusionDetokenizer, DiffusionDetokenizerConfig
from lexel.nn.flow import integrate
from lexel.types import Codes

SIZES = {"patch": 2, "channels": (8, 16), "condition_dim": 16, "image_size": (16, 16)}
CONFIGS = {
    "raster": DiffusionDetokenizerConfig((7,), (4, 4), **SIZES),
    "two": DiffusionDetokenizerConfig((7, 5), (2, 2), **SIZES),
    "line": DiffusionDetokenizerConfig((7,), (4, 4), length=6, **SIZES),
}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def build(name="raster", seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return CONFIGS[name].build().eval()


def codes(name="raster", count=3, seed=0):
    config = CONFIGS[name]
    columns = [
        torch.randint(0, k, (count, config.positions), generator=seeded(seed)) for k in config.codebook_sizes
    ]
    return Codes(torch.stack(columns, dim=2), None if config.length else config.grid)


def test_the_solver_carries_noise_to_a_gaussian():
    """For data N(m, s²) the optimal velocity is known, and its flow maps noise z to m + s·z. Euler's error
    falls in proportion to the number of steps."""
    mean, spread = 0.3, 0.2
    noise = torch.randn(2, 3, 4, 4, generator=seeded())

    def velocity(x, t):
        variance = (1 - t) ** 2 * spread**2 + t**2
        offset = (x - (1 - t) * mean) / variance
        return t * offset - (mean + (1 - t) * spread**2 * offset)

    errors = [
        float((integrate(velocity, noise, n) - (mean + spread * noise)).abs().max()) for n in (50, 100, 800)
    ]
    assert errors[2] < 5e-3
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.15)


def test_the_solver_takes_equal_steps_from_one_to_zero():
    times = []

    def velocity(x, t):
        times.append(t)
        return torch.ones_like(x)

    end = integrate(velocity, torch.zeros(1, 3, 2, 2), 4)
    assert times == pytest.approx([1.0, 0.75, 0.5, 0.25])
    assert end.unique().tolist() == [-1.0]
    with pytest.raises(ValueError, match="steps"):
        integrate(velocity, torch.zeros(1, 3, 2, 2), 0)


@pytest.mark.parametrize("steps", [3, 7, 20, 23])
def test_the_times_of_the_steps_are_exact_quotients(steps):
    """To the last digit of a float: FlexTok's time embedding multiplies times by up to 1000."""
    times = []
    integrate(lambda x, t: times.append(t) or x, torch.zeros(1, 3, 2, 2), steps)
    expected = [step / steps for step in range(steps, 0, -1)]
    assert torch.equal(torch.tensor(times), torch.tensor(expected))


@pytest.mark.parametrize("name", CONFIGS)
def test_the_same_noise_gives_the_same_picture(name):
    net = build(name)
    noise = torch.randn(3, 3, 16, 16, generator=seeded(1))
    first = net.decode(codes(name), steps=3, noise=noise)
    assert torch.equal(first, net.decode(codes(name), steps=3, noise=noise))
    assert torch.equal(first, net.decode(codes(name), steps=3, generator=seeded(1)))
    assert not torch.equal(first, net.decode(codes(name), steps=3, generator=seeded(2)))
    assert not torch.equal(first, net.decode(codes(name, seed=5), steps=3, noise=noise))
    assert float(first.abs().max()) <= 1


@pytest.mark.parametrize("name", CONFIGS)
def test_a_row_of_a_batch_is_that_row_alone(name):
    net, batch = build(name), codes(name)
    noise = torch.randn(3, 3, 16, 16, generator=seeded(1))
    together = net.decode(batch, steps=2, guidance=2.0, noise=noise)
    for row in range(3):
        alone = net.decode(batch[row : row + 1], steps=2, guidance=2.0, noise=noise[row : row + 1])
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-4, atol=1e-5)


def test_unused_codes_of_a_shorter_line_do_not_matter():
    net, batch = build("line"), codes("line")
    lengths = torch.tensor([2, 6, 4])
    beyond = torch.arange(6) >= lengths[:, None]
    other = batch.indices.masked_fill(beyond[..., None], 0)
    noise = torch.randn(3, 3, 16, 16, generator=seeded(1))
    first, second = (
        net.decode(Codes(indices, lengths=lengths), steps=2, noise=noise)
        for indices in (batch.indices, other)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, net.decode(batch, steps=2, noise=noise))


def test_guidance_extrapolates_from_the_null_condition():
    net, noise = build(), torch.randn(3, 3, 16, 16, generator=seeded(1)) * 0.1
    given_codes, times = net.given(codes()), torch.ones(3)
    given = net.denoise(noise, times, given_codes)
    free = net.denoise(noise, times, net.nothing(given_codes))
    expected = (free + 2.5 * (given - free)).clamp(-1, 1)
    torch.testing.assert_close(net.decode(codes(), steps=1, guidance=2.5, noise=noise), expected)
    plain = net.decode(codes(), steps=1, noise=noise)
    torch.testing.assert_close(plain, given.clamp(-1, 1))


def test_the_loss_is_the_velocitys_squared_error():
    net = build()
    pixels = torch.rand(3, 3, 16, 16, generator=seeded(3)) * 2 - 1
    noise, times = torch.randn(3, 3, 16, 16, generator=seeded(4)), torch.tensor([0.1, 0.5, 0.9])
    t = times[:, None, None, None]
    noisy = (1 - t) * pixels + t * noise
    clean = net.denoise(noisy, times, net.given(codes()))
    loss, metrics = net.loss(pixels, codes(), noise=noise, times=times)
    torch.testing.assert_close(loss, ((noisy - clean) / t - (noise - pixels)).square().mean())
    torch.testing.assert_close(metrics["x0_mse"], (clean - pixels).square().mean())
    assert torch.equal(
        net.loss(pixels, codes(), generator=seeded(1))[0], net.loss(pixels, codes(), generator=seeded(1))[0]
    )


def test_dropped_conditions_train_the_null_map():
    net = DiffusionDetokenizerConfig((7,), (4, 4), null_dropout=0.5, **SIZES).build().train()
    pixels = torch.rand(8, 3, 16, 16, generator=seeded(3)) * 2 - 1
    net.loss(pixels, codes(count=8), generator=seeded(0))[0].backward()
    assert float(net.null.grad.abs().sum()) > 0
    net.zero_grad(set_to_none=True)
    net.eval().loss(pixels, codes(count=8), generator=seeded(0))[0].backward()
    assert net.null.grad is None


def test_saving_keeps_every_bit(tmp_path):
    net = build("line")
    net.save_pretrained(tmp_path)
    again = from_pretrained(tmp_path)
    assert isinstance(again, DiffusionDetokenizer)
    assert again.config == net.config
    assert again.fingerprint() == net.fingerprint()
    first, second = (x.decode(codes("line"), steps=2, generator=seeded(1)) for x in (net, again))
    assert torch.equal(first, second)
    (tmp_path / "config.json").write_text('{"model_type": "vq"}')
    with pytest.raises(LexelError, match="known detokenizers"):
        from_pretrained(tmp_path)


def test_codes_and_pictures_of_another_shape_are_refused():
    net = build()
    with pytest.raises(ValueError, match="reads codes"):
        net.decode(codes("line"))
    with pytest.raises(ValueError, match="draws"):
        net.loss(torch.zeros(3, 3, 32, 32), codes())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": (18, 16)}, "image_size"),
        ({"grid": (3, 4)}, "image_size"),
        ({"channels": (12,)}, "multiples of 8"),
        ({"null_dropout": 1.0}, "null_dropout"),
        ({"codebook_sizes": ()}, "codebook_sizes"),
        ({"length": 0}, "length"),
        ({"length": 4, "condition_dim": 24}, "divisible by 16"),
    ],
)
def test_contradictory_configs_are_refused(change, message):
    values = {"codebook_sizes": (7,), "grid": (4, 4), **SIZES, **change}
    with pytest.raises(ValueError, match=message):
        DiffusionDetokenizerConfig(**values)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["raster", "line"])
def test_one_batch_is_learned_by_heart(name):
    """Four pictures, told apart by their codes alone, are drawn from fresh noise."""
    net = build(name).train()
    pixels = torch.rand(4, 3, 4, 4, generator=seeded(6)) * 1.6 - 0.8
    pixels = torch.nn.functional.interpolate(pixels, size=(16, 16))
    batch = codes(name, count=4, seed=2)
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    generator = seeded(0)
    for _ in range(250):
        rows = torch.arange(32) % 4
        loss, _ = net.loss(pixels[rows], batch[rows], generator=generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    drawn = net.eval().decode(batch, steps=16, generator=seeded(9))
    distance = (drawn[:, None] - pixels[None]).square().mean(dim=(2, 3, 4))
    assert distance.argmin(dim=1).tolist() == [0, 1, 2, 3]
    assert float(distance.diagonal().max()) < 0.02
