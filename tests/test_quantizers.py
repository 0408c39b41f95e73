"""Laws of every quantizer kind."""

from __future__ import annotations

import math

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor

from lexel.tokenizers.quantizers import Quantizer, QuantizerConfig, code_statistics, nearest_code

DIM = 4
CONFIGS = {
    "vq": QuantizerConfig("vq", codebook_size=32, cosine=False),
    "vq-cosine": QuantizerConfig("vq", codebook_size=32),
    "vq-rotation": QuantizerConfig("vq", codebook_size=32, rotation=True),
    "fsq": QuantizerConfig("fsq", levels=(5, 4, 3)),
    "fsq-square": QuantizerConfig("fsq", levels=(5, 4, 3, 3)),
    "lfq": QuantizerConfig("lfq", codebook_size=64),
    "lfq-square": QuantizerConfig("lfq", codebook_size=2**DIM),
    "simvq": QuantizerConfig("simvq", codebook_size=32),
    "bernoulli": QuantizerConfig("bernoulli", codebook_size=64, deterministic=True),
    "bernoulli-groups": QuantizerConfig("bernoulli", codebook_size=64, groups=(2, 4), deterministic=True),
    "bernoulli-tanh": QuantizerConfig("bernoulli", codebook_size=64, deterministic=True, tanh=True),
    "residual": QuantizerConfig("residual", codebook_size=32, depth=3, cosine=False),
    "sign": QuantizerConfig("sign", codebook_size=2**DIM),
    "sign-groups": QuantizerConfig("sign", codebook_size=2**DIM, groups=(1, 3)),
    "ibq": QuantizerConfig("ibq", codebook_size=32),
}
each_kind = pytest.mark.parametrize("name", CONFIGS)


def make(name: str) -> Quantizer:
    torch.manual_seed(0)
    return CONFIGS[name].build(DIM)


def latents(rows: int = 3, seed: int = 1) -> Tensor:
    return torch.randn(rows, 50, DIM, generator=torch.Generator().manual_seed(seed))


@each_kind
def test_eval_forward_is_decode_of_encode(name: str) -> None:
    quantizer = make(name).eval()
    output = quantizer(latents())
    codes = quantizer.encode(latents())
    assert codes.dtype == torch.long
    assert codes.shape == (3, 50, len(quantizer.codebook_sizes))
    assert (codes.amax((0, 1)) < torch.tensor(quantizer.codebook_sizes)).all()
    assert torch.equal(output.indices, codes)
    assert torch.equal(output.quantized, quantizer.decode(codes))
    assert output.losses == {}


@pytest.mark.parametrize("name", ["vq", "vq-cosine", "simvq", "lfq-square", "sign", "sign-groups"])
def test_codes_are_fixed_points(name: str) -> None:
    # Encoding a code's own vector gives the code back. (Not so through fsq's tanh, through linear maps
    # between latents and codes, or greedily level by level.)
    quantizer = make(name).eval()
    codes = quantizer.encode(latents())
    assert torch.equal(quantizer.encode(quantizer.decode(codes)), codes)


@each_kind
def test_training_chooses_the_codes_encode_would(name: str) -> None:
    quantizer = make(name).train()
    expected = quantizer.encode(latents())
    assert torch.equal(quantizer(latents()).indices, expected)


@each_kind
def test_encode_decode_and_eval_leave_the_state_alone(name: str) -> None:
    quantizer = make(name)
    before = {key: value.clone() for key, value in quantizer.state_dict().items()}
    quantizer.train()
    quantizer.decode(quantizer.encode(latents()))
    quantizer.eval()
    quantizer(latents())
    for key, value in quantizer.state_dict().items():
        assert torch.equal(value, before[key]), key


@each_kind
def test_a_row_of_a_batch_is_that_row_alone(name: str) -> None:
    quantizer = make(name).eval()
    together = quantizer.encode(latents())
    alone = torch.cat([quantizer.encode(row[None]) for row in latents()])
    assert torch.equal(together, alone)


@pytest.mark.parametrize("name", ["vq", "simvq", "residual", "lfq-square", "sign"])
def test_straight_through_gradient_is_the_identity(name: str) -> None:
    quantizer = make(name).train()
    x = latents().requires_grad_(True)
    upstream = latents(seed=2)
    (gradient,) = torch.autograd.grad(quantizer(x).quantized, x, upstream)
    torch.testing.assert_close(gradient, upstream)


@pytest.mark.parametrize("name", ["vq-cosine", "fsq-square", "bernoulli", "bernoulli-tanh"])
def test_straight_through_gradient_is_that_of_the_bypass(name: str) -> None:
    # Rounding passes the gradient unchanged; what bounds the latents (unit length, tanh) keeps its own.
    quantizer = make(name).train()
    x, upstream = latents().requires_grad_(True), latents(seed=2)
    (rounded,) = torch.autograd.grad(quantizer(x).quantized, x, upstream)
    (smooth,) = torch.autograd.grad(quantizer.bypass(x), x, upstream)
    torch.testing.assert_close(rounded, smooth)


def test_rotation_gradient_keeps_the_angle_between_latent_and_gradient() -> None:
    # The rotation trick's law: the angle of the gradient to the latent equals the angle of the upstream
    # gradient to the code. Unit-length codes and latents here.
    quantizer = make("vq-rotation").train()
    x = torch.nn.functional.normalize(latents(), dim=-1).requires_grad_(True)
    upstream = latents(seed=2)
    output = quantizer(x)
    (gradient,) = torch.autograd.grad(output.quantized, x, upstream)
    towards_code = (upstream * output.quantized).sum(-1)
    # The normalisation inside removes the radial part, so compare what is tangential at the latent.
    tangential = upstream.pow(2).sum(-1) - towards_code.pow(2)
    torch.testing.assert_close(gradient.pow(2).sum(-1), tangential, rtol=1e-3, atol=1e-4)


@each_kind
def test_unrounded_output_is_smooth_and_close(name: str) -> None:
    quantizer = make(name).train()
    x = latents().requires_grad_(True)
    smooth = quantizer(x, quantize=False).quantized
    distinct = smooth.detach().view(-1, DIM).unique(dim=0)
    assert len(distinct) == 150
    smooth.sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0


@each_kind
def test_statistics_stay_in_range(name: str) -> None:
    quantizer = make(name).eval()
    metrics = quantizer(latents()).metrics
    assert 0 < metrics["usage"] <= 1
    assert 1 <= metrics["perplexity"] <= max(quantizer.codebook_sizes) * (1 + 1e-4)


def test_code_statistics_of_known_frequencies() -> None:
    found = code_statistics(torch.tensor([[0, 0, 1, 1]]), size=8)
    assert found["usage"].item() == 0.25
    assert found["perplexity"].item() == pytest.approx(2.0)


@pytest.mark.parametrize("cosine", [False, True])
def test_nearest_code_agrees_with_the_definition(cosine: bool) -> None:
    codebook = torch.nn.functional.normalize(latents(seed=3)[0], dim=-1)
    if not cosine:
        codebook = codebook * torch.linspace(0.5, 2, len(codebook))[:, None]
    x = latents()
    similarity = x @ codebook.T if cosine else -torch.cdist(x, codebook)
    assert torch.equal(nearest_code(x, codebook, cosine), similarity.argmax(-1))


@pytest.mark.parametrize("name", ["vq", "vq-cosine", "residual", "simvq"])
def test_inference_lookup_agrees_with_the_library(name: str) -> None:
    quantizer = make(name).eval()
    _, expected, *_ = quantizer.library(latents())  # type: ignore[operator]
    assert torch.equal(quantizer.encode(latents()), expected.view(3, 50, -1))


def test_dead_codes_move_onto_the_batch_and_usage_recovers() -> None:
    # All latents near one point: one code wins everything, the others die and are moved onto latents.
    def usage(dead_below: float) -> float:
        torch.manual_seed(0)
        config = QuantizerConfig(codebook_size=32, cosine=False, decay=0.5, dead_below=dead_below)
        quantizer = config.build(DIM).train()
        for seed in range(12):
            output = quantizer(5 + 0.1 * latents(seed=seed))
        return output.metrics["usage"].item()

    assert usage(0.0) < 0.2
    assert usage(0.2) > 0.8


def test_codebook_learns_the_clusters_during_the_unrounded_start() -> None:
    torch.manual_seed(0)
    centres = torch.tensor([[4.0, 0, 0, 0], [0, 4.0, 0, 0], [0, 0, 4.0, 0], [0, 0, 0, 4.0]])
    quantizer = QuantizerConfig(codebook_size=16, cosine=False, decay=0.5, dead_below=0.1).build(DIM).train()
    for _ in range(30):
        x = centres[torch.randint(4, (2, 64))] + 0.01 * torch.randn(2, 64, DIM)
        quantizer(x, quantize=False)
    error = (quantizer.decode(quantizer.encode(centres[None])) - centres).norm(dim=-1)
    assert error.max() < 0.05


def test_autocast_does_not_lower_precision() -> None:
    quantizer = make("vq").eval()
    with torch.autocast("cpu", torch.bfloat16):
        output = quantizer(latents())
    assert output.quantized.dtype == torch.float32
    assert torch.equal(output.indices, quantizer.encode(latents()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "pq"}, "must be one of vq, fsq"),
        ({"kind": "fsq"}, "needs levels"),
        ({"levels": (3, 3)}, "levels belong to fsq"),
        ({"kind": "lfq", "codebook_size": 100}, "power of two"),
        ({"kind": "bernoulli", "codebook_size": 100}, "power of two"),
        ({"kind": "bernoulli", "codebook_size": 64, "groups": [2, 2]}, "do not fit bernoulli with 64"),
        ({"groups": [4, 4]}, "do not fit vq"),
        ({"depth": 2}, "belongs to residual"),
        ({"kind": "fsq", "levels": [5, 5], "rotation": True}, "rotation belongs"),
    ],
)
def test_contradictory_options_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QuantizerConfig(**options)


def test_sizes_of_fsq_and_residual() -> None:
    assert QuantizerConfig("fsq", levels=(8, 5, 5)).codebook_sizes == (math.prod((8, 5, 5)),)
    assert QuantizerConfig("residual", codebook_size=7, depth=3).codebook_sizes == (7, 7, 7)


def test_wrong_width_names_both() -> None:
    with pytest.raises(ValueError, match=r"\[b, n, 4\].*\(1, 2, 3\)"):
        make("vq")(torch.zeros(1, 2, 3))


def _codebook_after_two_steps(rank: int, port: int, results: mp.SimpleQueue) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2
    )
    for seed in (0, 1):
        torch.manual_seed(100 * rank + seed)
        _shared_quantizer.train()(latents(seed=10 * rank + seed))
    results.put(_shared_quantizer.state_dict()["library._codebook.embed"].numpy())
    torch.distributed.destroy_process_group()


torch.manual_seed(0)
_shared_quantizer = QuantizerConfig(codebook_size=64, cosine=False, decay=0.5, dead_below=0.3).build(DIM)


@pytest.mark.slow
def test_codebooks_of_two_processes_stay_equal() -> None:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    results = mp.get_context("spawn").SimpleQueue()
    mp.spawn(_codebook_after_two_steps, (port, results), nprocs=2)
    first, second = torch.from_numpy(results.get()), torch.from_numpy(results.get())
    assert torch.equal(first, second)
    assert not torch.equal(first, _shared_quantizer.state_dict()["library._codebook.embed"])
