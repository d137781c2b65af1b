"""Laws of the straight path between data and noise, and of the grids that samplers walk."""

import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler
from hypothesis import given
from hypothesis import strategies as st

from dinotok.flow_matching import (
    dimension_shift,
    interpolate,
    reference_sigma_grid,
    sample_times,
    set_sigmas,
    shift_time,
    sigma_grid,
    unshift_time,
    velocity_target,
)

shifts = st.floats(0.1, 20)
TIMES = torch.linspace(0, 1, 101, dtype=torch.float64)


@given(shifts)
def test_the_shift_has_an_inverse_keeps_the_ends_and_the_order(shift):
    shifted = shift_time(TIMES, shift)
    torch.testing.assert_close(unshift_time(shifted, shift), TIMES)
    assert shifted[0] == 0 and shifted[-1] == 1
    assert (shifted.diff() > 0).all()
    assert ((shifted >= TIMES) if shift >= 1 else (shifted <= TIMES)).all()


@given(shifts, shifts)
def test_shifts_compose_by_multiplication(first, second):
    torch.testing.assert_close(shift_time(shift_time(TIMES, first), second), shift_time(TIMES, first * second))


@given(shifts)
def test_the_shift_multiplies_the_odds(shift):
    times = TIMES[1:-1]
    shifted = shift_time(times, shift)
    torch.testing.assert_close(shifted / (1 - shifted), shift * times / (1 - times))


def test_the_shift_of_published_latents():
    assert dimension_shift(832 * 16 * 16) == pytest.approx(7.21, abs=0.005)
    assert dimension_shift(768 * 16 * 16) == pytest.approx(6.93, abs=0.005)
    assert dimension_shift(65536) == 4 and dimension_shift(4096) == 1


@pytest.mark.parametrize("call", [lambda: shift_time(TIMES, 0), lambda: unshift_time(TIMES, -1.0)])
def test_shifts_must_be_positive(call):
    with pytest.raises(ValueError, match="must be positive"):
        call()


@pytest.mark.parametrize("dimension", [0, -4])
def test_dimensions_must_be_positive(dimension):
    with pytest.raises(ValueError, match=f"dimension={dimension}"):
        dimension_shift(dimension)


def test_uniform_times_follow_the_shifted_line():
    times = sample_times(20000, shift=4, generator=torch.Generator().manual_seed(0))
    levels = torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9])
    expected = shift_time(levels, 4)
    torch.testing.assert_close(times.quantile(levels), expected, atol=0.02, rtol=0)
    assert times.min() >= 0 and times.max() <= 1 and times.dtype == torch.float32


def test_logit_normal_times_have_normal_log_odds():
    times = sample_times(20000, "logit_normal", mean=0.5, std=0.7, generator=torch.Generator().manual_seed(0))
    odds = torch.logit(times.double())
    assert odds.mean() == pytest.approx(0.5, abs=0.02) and odds.std() == pytest.approx(0.7, abs=0.02)
    shifted = sample_times(20000, "logit_normal", 3.0, 0.5, 0.7, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(torch.logit(shifted.double()), odds + math.log(3), atol=1e-3, rtol=1e-3)


def test_unknown_distributions_are_named():
    with pytest.raises(ValueError, match="distribution='cosine' is neither"):
        sample_times(2, "cosine")  # type: ignore[arg-type]


def test_the_path_joins_data_and_noise_and_the_target_is_its_derivative():
    latents, noise = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    assert torch.equal(interpolate(latents, noise, torch.zeros(2)), latents)
    assert torch.equal(interpolate(latents, noise, torch.ones(2)), noise)
    time, step = torch.tensor([0.2, 0.6]), 0.25
    moved = interpolate(latents, noise, time + step) - interpolate(latents, noise, time)
    torch.testing.assert_close(moved / step, velocity_target(latents, noise), atol=1e-5, rtol=1e-5)
    assert interpolate(latents.bfloat16(), noise.bfloat16(), time).dtype == torch.float32


# Grids

SCHEDULERS = (FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler)


@pytest.mark.parametrize("shift", [1.0, 7.2])
def test_the_grid_is_the_schedulers_own_given_plain_steps(shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=torch.linspace(1, 0.1, 10).tolist())
    torch.testing.assert_close(torch.tensor(sigma_grid(10, shift)).float(), scheduler.sigmas)


def test_the_grid_of_the_reference_stops_before_zero():
    grid = reference_sigma_grid(100, 4.0)
    assert len(grid) == 100 and grid[0] == 1
    assert grid[-1] == pytest.approx(0.003988, abs=1e-6)  # the shift of 0.001
    assert grid[1] == pytest.approx(4 * (1 - 0.999 / 99) / (1 + 3 * (1 - 0.999 / 99)))


@pytest.mark.parametrize("call", [lambda: sigma_grid(0), lambda: reference_sigma_grid(1, 4.0)])
def test_grids_need_a_step(call):
    with pytest.raises(ValueError, match="must be at least"):
        call()


def integrate(scheduler, sigmas, velocity, start: torch.Tensor) -> torch.Tensor:
    """Solve `dx/dt = velocity(x, t)` from the first level to the last."""
    set_sigmas(scheduler, sigmas)
    values = start
    for timestep in scheduler.timesteps:
        output = velocity(values, timestep / scheduler.config.num_train_timesteps)
        values = scheduler.step(output, timestep, values, return_dict=False)[0]
    return values


@pytest.mark.parametrize("kind", SCHEDULERS)
@pytest.mark.parametrize("options", [{}, {"shift": 3.0}])
@pytest.mark.parametrize("end", [0.0, 0.25])
def test_a_constant_velocity_is_integrated_exactly(kind, options, end):
    scheduler = kind(**options)
    for _ in range(2):  # a second walk starts afresh
        result = integrate(scheduler, [1.0, 0.7, 0.4, end], lambda x, t: torch.ones(2), torch.full((2,), 5.0))
        torch.testing.assert_close(result, torch.full((2,), 5.0 - (1 - end)))


def test_dynamic_shifting_does_not_shift_the_given_grid():
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    set_sigmas(scheduler, [1.0, 0.5, 0.0])
    assert scheduler.sigmas.tolist() == [1.0, 0.5, 0.0] and scheduler.timesteps.tolist() == [1000.0, 500.0]


def test_euler_meets_its_closed_form_on_a_linear_velocity():
    grid = sigma_grid(8, shift=3.0)
    result = integrate(FlowMatchEulerDiscreteScheduler(), grid, lambda x, t: -2 * x, torch.ones(1))
    expected = math.prod(1 - 2 * (low - high) for high, low in zip(grid[:-1], grid[1:], strict=True))
    assert result.item() == pytest.approx(expected, rel=1e-5)


def global_error(kind, steps: int) -> float:
    """Error for `dx/dt = x`, from t = 1 down to 0.2 so that every step has its corrector but the last."""
    grid = torch.linspace(1, 0.2, steps + 1, dtype=torch.float64).tolist()
    result = integrate(kind(), grid, lambda x, t: x, torch.ones(1))
    return abs(result.item() - math.exp(-0.8))


def test_heun_beats_euler_and_its_error_falls_faster():
    euler = [global_error(FlowMatchEulerDiscreteScheduler, n) for n in (8, 16)]
    heun = [global_error(FlowMatchHeunDiscreteScheduler, n) for n in (8, 16)]
    assert euler[0] / euler[1] == pytest.approx(2, abs=0.2)  # first order
    assert heun[0] / heun[1] == pytest.approx(4, abs=0.4)  # second order
    assert heun[0] < euler[1]


@pytest.mark.parametrize("sigmas", [[1.0], [0.5, 1.0], [1.0, 0.5, 0.5], [1.5, 0.0], [1.0, -0.1], [1.0, math.nan]])
def test_levels_must_fall_within_the_unit_interval(sigmas):
    with pytest.raises(ValueError, match="falling numbers in"):
        set_sigmas(FlowMatchEulerDiscreteScheduler(), sigmas)
