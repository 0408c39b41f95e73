"""Noise paths and samplers: rectified flow and the variance-preserving diffusions of diffusers.

A path says how a picture and noise are mixed at time t, ``x_t = a(t) * clean + b(t) * noise``, t = 1 being
(almost) pure noise. Whatever a network predicts, samplers here are given its estimate of the clean picture.

b batch · c channels · h w picture or latent grid
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

from torch import Tensor

from lexel.nn.flow import integrate

# How pictures are mixed with noise: rectified flow, or a beta schedule of diffusers.
PATHS = ("flow", "linear", "scaled_linear", "squaredcos_cap_v2")
STEPS = 1000
"""Times of a diffusion are the multiples of 1 / STEPS; t is its step (t * STEPS) - 1."""

# (state [b, c, h, w], time float in (0, 1]) -> the estimated clean picture, of the same shape.
Denoise = Callable[[Tensor, float], Tensor]


def schedulers(path: str) -> tuple[str, ...]:
    """The samplers of a path, the default first. Raises ValueError for an unknown path."""
    if path not in PATHS:
        raise ValueError(f"path must be one of {', '.join(PATHS)}, got {path!r}.")
    return ("euler", "heun", "dpm") if path == "flow" else ("ddim", "dpm")


def mixing(path: str, times: Tensor) -> tuple[Tensor, Tensor]:
    """a and b at `times` in (0, 1], each of their shape. A diffusion rounds times up to its next step."""
    if path == "flow":
        return 1 - times, times
    squared = _alphas(path).to(times)[_step(times)]
    return squared.sqrt(), (1 - squared).sqrt()


def network_times(path: str, times: Tensor) -> Tensor:
    """`times` as diffusers' sinusoidal embeddings, made for steps 0..1000, expect them."""
    return times * STEPS if path == "flow" else _step(times).to(times)


def sample(denoise: Denoise, noise: Tensor, path: str, scheduler: str, steps: int) -> Tensor:
    """Follow a path from `noise` at t = 1 to a clean picture in `steps` steps (Heun's take two estimates each
    but the last). Raises ValueError for fewer than one step or a scheduler that the path does not have."""
    if scheduler not in schedulers(path):
        raise ValueError(f"path {path!r} is sampled by {', '.join(schedulers(path))}, got {scheduler!r}.")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}.")
    if path == "flow" and scheduler == "euler":
        return integrate(lambda x, time: (x - denoise(x, time)) / time, noise, steps)
    return (
        _sample_flow(denoise, noise, scheduler, steps)
        if path == "flow"
        else _sample_diffusion(denoise, noise, path, scheduler, steps)
    )


def _sample_flow(denoise: Denoise, noise: Tensor, scheduler: str, steps: int) -> Tensor:
    if scheduler == "heun":
        from diffusers.schedulers.scheduling_flow_match_heun_discrete import FlowMatchHeunDiscreteScheduler

        solver: Any = FlowMatchHeunDiscreteScheduler(shift=1.0)
        solver.set_timesteps(steps, device=noise.device)
    else:
        solver = _dpm(steps, noise, use_flow_sigmas=True, prediction_type="flow_prediction")
    x = noise
    # The solvers' own time steps are rounded; their noise levels, which are the times, are not.
    for timestep, time in zip(solver.timesteps, solver.sigmas.tolist()):
        x = solver.step((x - denoise(x, time)) / time, timestep, x).prev_sample
    return x


def _sample_diffusion(denoise: Denoise, noise: Tensor, path: str, scheduler: str, steps: int) -> Tensor:
    if scheduler == "ddim":
        solver = _ddim(path)
        solver.set_timesteps(steps, device=noise.device)
    else:
        # The cosine's first steps would be all noise; the bound is the one that diffusers documents.
        least = -5.1 if path == "squaredcos_cap_v2" else -float("inf")
        solver = _dpm(steps, noise, beta_schedule=path, prediction_type="sample", lambda_min_clipped=least)
    x = noise
    for timestep in solver.timesteps:
        x = solver.step(denoise(x, (int(timestep) + 1) / STEPS), timestep, x).prev_sample
    return x


def _dpm(steps: int, like: Tensor, **options: Any) -> Any:
    from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler

    solver = DPMSolverMultistepScheduler(timestep_spacing="trailing", **options)
    with warnings.catch_warnings():  # it makes an array of a tensor in a way that numpy is about to drop
        warnings.simplefilter("ignore", DeprecationWarning)
        solver.set_timesteps(steps, device=like.device)
    return solver


def _step(times: Tensor) -> Tensor:
    # A hair less, so that k / STEPS in floats is step k - 1 and not k.
    return (times * STEPS - 1e-3).ceil().long().sub(1).clamp(0, STEPS - 1)


@cache
def _alphas(path: str) -> Tensor:
    return _ddim(path).alphas_cumprod


def _ddim(path: str) -> Any:
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    return DDIMScheduler(
        beta_schedule=path, prediction_type="sample", timestep_spacing="trailing", clip_sample=False
    )
