"""Flow matching on a straight line between data and noise: times, noise levels and targets, as functions.

The time t runs from 0 (data) to 1 (noise): `x_t = (1 - t) data + t noise`, and the velocity is `noise - data`
(Liu et al., arXiv 2209.03003). That is the convention of diffusers' flow-matching schedulers, whose sigma is t and
whose timesteps are `num_train_timesteps * sigma`.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch

REFERENCE_DIMENSION = 4096  # the size of latents (channels x height x width) for which no shift is needed


def dimension_shift(dimension: int, reference: int = REFERENCE_DIMENSION) -> float:
    """Return the time shift for latents of a size, `sqrt(dimension / reference)` (RAE, arXiv 2510.11690).

    More numbers carry more signal at the same noise level, so larger latents need more time at high noise: 7.21 for
    DINO-Tok's 832 x 16 x 16, 6.93 for RAE's 768 x 16 x 16.

    Args:
        dimension: Channels times height times width of the latents.
        reference: The dimension with shift 1.

    Raises:
        ValueError: If a number is not positive.
    """
    if dimension <= 0 or reference <= 0:
        raise ValueError(f"dimension={dimension} and reference={reference} must be positive.")
    return math.sqrt(dimension / reference)


def shift_time(time: torch.Tensor, shift: float) -> torch.Tensor:
    """Move times towards noise, `t' = a t / (1 + (a - 1) t)` (Esser et al., arXiv 2403.03206, eq. 23).

    Args:
        time: Times in [0, 1], any shape.
        shift: The factor a > 0 by which the odds `t / (1 - t)` are multiplied; 1 changes nothing.

    Returns:
        Times in [0, 1]; 0 and 1 stay where they are.

    Raises:
        ValueError: If `shift` is not positive.
    """
    if shift <= 0:
        raise ValueError(f"shift={shift} must be positive.")
    return shift * time / (shift * time + (1 - time))  # the same denominator, and exact at both ends


def unshift_time(time: torch.Tensor, shift: float) -> torch.Tensor:
    """Return the inverse of `shift_time`, which is the shift by `1 / shift`."""
    if shift <= 0:
        raise ValueError(f"shift={shift} must be positive.")
    return shift_time(time, 1 / shift)


def sample_times(
    count: int,
    distribution: Literal["uniform", "logit_normal"] = "uniform",
    shift: float = 1.0,
    mean: float = 0.0,
    std: float = 1.0,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """Draw training times.

    Args:
        count: How many.
        distribution: `uniform` on [0, 1), or `logit_normal`: the sigmoid of a normal variable (arXiv 2403.03206,
            section 3.1).
        shift: Applied afterwards, see `shift_time`.
        mean: Of the normal variable.
        std: Likewise.
        generator: Source of the random numbers.
        device: Of the result.

    Returns:
        `(count,)` float32 in [0, 1].

    Raises:
        ValueError: If the distribution is unknown or `shift` is not positive.
    """
    if distribution == "uniform":
        times = torch.rand(count, generator=generator, device=device)
    elif distribution == "logit_normal":
        times = torch.sigmoid(mean + std * torch.randn(count, generator=generator, device=device))
    else:
        raise ValueError(f"distribution={distribution!r} is neither 'uniform' nor 'logit_normal'.")
    return shift_time(times, shift)


def interpolate(latents: torch.Tensor, noise: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
    """Return `(1 - t) latents + t noise`.

    Args:
        latents: `(B, ...)`.
        noise: Likewise.
        time: `(B,)` in [0, 1].

    Returns:
        The shape of `latents`, float32.
    """
    time = time.float().view(-1, *[1] * (latents.ndim - 1))
    return (1 - time) * latents.float() + time * noise.float()


def velocity_target(latents: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Return what a denoiser learns to predict, `noise - latents`: the derivative of `interpolate` by the time."""
    return noise.float() - latents.float()


def sigma_grid(num_steps: int, shift: float = 1.0) -> list[float]:
    """Return the noise levels of sampling: equal steps from 1 to 0, shifted.

    The scheduler's own `set_timesteps(num_steps)` puts its smallest level, which is shifted already, through the shift
    once more; this is the grid that is meant.

    Args:
        num_steps: Evaluations of the denoiser by a first-order solver.
        shift: See `shift_time`.

    Returns:
        `num_steps + 1` falling numbers, the first 1, the last 0.

    Raises:
        ValueError: If there is no step.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps={num_steps} must be at least 1.")
    return shift_time(torch.linspace(1, 0, num_steps + 1, dtype=torch.float64), shift).tolist()


def reference_sigma_grid(num_points: int, shift: float) -> list[float]:
    """Return the noise levels at which the samplers of RAE and VFMAE stop: they make no last step to 0.

    Their ODE solver is given `num_points` times (100 in the published settings), `1 - t` in equal steps from 0 to
    0.999, and so makes `num_points - 1` steps and ends at the shift of 0.001. Pass the result as `sigmas` to the
    pipeline to reproduce their samples; `sigma_grid` is the default.

    Args:
        num_points: The reference's `num_steps`, one more than the evaluations.
        shift: 4 for VFMAE, 6.93 for RAE at 256 px.

    Returns:
        `num_points` falling numbers, the first 1.

    Raises:
        ValueError: If there is no step.
    """
    if num_points < 2:
        raise ValueError(f"num_points={num_points} must be at least 2.")
    return shift_time(1 - torch.linspace(0, 0.999, num_points, dtype=torch.float64), shift).tolist()


def set_sigmas(scheduler, sigmas: Sequence[float], device: torch.device | str | None = None) -> None:
    """Make a flow-matching scheduler of diffusers walk exactly these noise levels.

    `FlowMatchEulerDiscreteScheduler` would shift what it is given and always ends at 0, and
    `FlowMatchHeunDiscreteScheduler` takes no levels at all.

    Args:
        scheduler: One of those two, or another with their `sigmas`, `timesteps` and `order`; `order` 2 evaluates every
            inner level twice, as predictor and corrector.
        sigmas: Falling numbers in [0, 1], the last one is where sampling ends.
        device: Of the timesteps.

    Raises:
        ValueError: If the numbers do not fall, or leave [0, 1].
    """
    levels = torch.tensor(sigmas, dtype=torch.float32)
    if len(levels) < 2 or not (levels.diff() < 0).all() or levels[0] > 1 or levels[-1] < 0:
        raise ValueError(f"sigmas must be at least two falling numbers in [0, 1], got {list(sigmas)}.")
    dynamic = {"mu": 1.0} if scheduler.config.get("use_dynamic_shifting") and scheduler.order == 1 else {}
    scheduler.set_timesteps(len(levels) - 1, device=device, **dynamic)  # resets the scheduler's counters
    first, inner, last = levels[:1], levels[1:-1], levels[-1:]
    inner = inner.repeat_interleave(scheduler.order)
    scheduler.sigmas = torch.cat([first, inner, last])
    scheduler.timesteps = torch.cat([first, inner]).to(device) * scheduler.config.num_train_timesteps
