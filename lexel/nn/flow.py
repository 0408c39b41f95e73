"""Integrating a rectified flow.

b batch · c channels · h w picture or latent grid
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

# (state [b, c, h, w], time float in [0, 1]) -> velocity of the same shape.
Velocity = Callable[[Tensor, float], Tensor]


def integrate(velocity: Velocity, noise: Tensor, steps: int) -> Tensor:
    """Follow ``dx/dt = velocity(x, t)`` from `noise` at t = 1 to t = 0 in `steps` equal Euler steps.
    Raises ValueError for fewer than one step."""
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}.")
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    # Its own schedule ends at 1/1000 before 0 (linspace(1, 1/1000, N)); equal steps must be given. As exact
    # quotients: torch.linspace is off in its last digit, which FlexTok's time embedding magnifies 1000 times.
    times = [step / steps for step in range(steps, 0, -1)]
    scheduler.set_timesteps(sigmas=times, device=noise.device)
    x = noise
    for sigma, timestep in zip(scheduler.sigmas.tolist(), scheduler.timesteps):
        x = scheduler.step(velocity(x, sigma), timestep, x).prev_sample
    return x
