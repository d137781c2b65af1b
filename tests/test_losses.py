import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dinotok.losses import (
    AdversarialSchedule,
    StepGuard,
    adaptive_weight,
    discriminator_loss,
    generator_loss,
    hinge_discriminator_loss,
    non_saturating_discriminator_loss,
    pixel_loss,
    semantic_loss,
)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# Pixels and features


@pytest.mark.parametrize(("kind", "power"), [("l1", 1), ("l2", 2)])
def test_pixel_loss_is_a_mean_power(kind, power):
    pixels, target = randn(2, 3, 5, 7), randn(2, 3, 5, 7, seed=1)
    loss = pixel_loss(pixels, target, kind)
    torch.testing.assert_close(loss, (pixels - target).abs().pow(power).mean())
    torch.testing.assert_close(pixel_loss(3 * pixels, 3 * target, kind), 3**power * loss)
    assert pixel_loss(-torch.ones(1, 3, 2, 4), torch.ones(1, 3, 2, 4), kind).item() == 2**power
    assert pixel_loss(pixels.bfloat16(), target.bfloat16(), kind).dtype == torch.float32


def test_semantic_loss_depends_on_angles_only():
    features, other = randn(2, 8, 3, 5), randn(2, 8, 3, 5, seed=1)
    assert semantic_loss(features, features).item() == pytest.approx(0, abs=1e-6)
    assert semantic_loss(-2 * features, features).item() == pytest.approx(2, abs=1e-6)
    lengths = randn(2, 1, 3, 5, seed=2).abs() + 0.5
    torch.testing.assert_close(semantic_loss(features * lengths, other), semantic_loss(features, other))
    expected = torch.tensor(
        [
            1 - torch.dot(f, o) / (f.norm() * o.norm())
            for f, o in zip(
                features.permute(0, 2, 3, 1).reshape(-1, 8), other.permute(0, 2, 3, 1).reshape(-1, 8), strict=True
            )
        ]
    )
    torch.testing.assert_close(semantic_loss(features, other), expected.mean())
    orthogonal = torch.zeros(1, 2, 1, 3), torch.zeros(1, 2, 1, 3)
    orthogonal[0][:, 0], orthogonal[1][:, 1] = 2, 5
    assert semantic_loss(*orthogonal).item() == 1
    assert semantic_loss(torch.zeros(1, 2, 1, 3), orthogonal[1]).item() == 1
    assert semantic_loss(features.bfloat16(), other.bfloat16()).dtype == torch.float32


def test_wrong_shapes_and_kinds_are_named():
    with pytest.raises(ValueError, match=r"pixels \(1, 3, 4, 5\) and target \(1, 3, 5, 4\) differ"):
        pixel_loss(torch.zeros(1, 3, 4, 5), torch.zeros(1, 3, 5, 4))
    with pytest.raises(ValueError, match=r"predicted_features \(1, 3, 4, 5\).*\(1, 4, 4, 5\) differ"):
        semantic_loss(torch.zeros(1, 3, 4, 5), torch.zeros(1, 4, 4, 5))
    with pytest.raises(ValueError, match=r"\(1, 3, 4\); expected \(B, D, h, w\)"):
        semantic_loss(torch.zeros(1, 3, 4), torch.zeros(1, 3, 4))
    with pytest.raises(ValueError, match="kind='l3' is not one of l1, l2"):
        pixel_loss(torch.zeros(1), torch.zeros(1), "l3")
    with pytest.raises(ValueError, match="kind='wgan' is not one of hinge, non_saturating"):
        discriminator_loss(torch.zeros(1), torch.zeros(1), "wgan")
    with pytest.raises(ValueError, match="kind='wgan' is not one of hinge, non_saturating"):
        generator_loss(torch.zeros(1), "wgan")


# Adversarial


def test_hinge_loss_has_its_closed_form():
    real, fake = torch.tensor([-1.0, 0.0, 0.5, 1.0, 7.0]), torch.tensor([[-3.0, -1.0], [0.0, 2.0]])
    expected = 0.5 * ((2 + 1 + 0.5 + 0 + 0) / 5 + (0 + 0 + 1 + 3) / 4)
    assert hinge_discriminator_loss(real, fake).item() == pytest.approx(expected)
    assert hinge_discriminator_loss(torch.zeros(3), torch.zeros(2)).item() == 1
    assert hinge_discriminator_loss(torch.full((3,), 1.5), torch.full((2,), -1.5)).item() == 0
    assert discriminator_loss(real, fake, "hinge") == hinge_discriminator_loss(real, fake)


def test_non_saturating_loss_is_the_binary_cross_entropy():
    real, fake = randn(2, 1, 3, 4) * 3, randn(2, 1, 3, 4, seed=1) * 3
    cross_entropy = nn.functional.binary_cross_entropy_with_logits
    expected = cross_entropy(torch.cat([real, fake]), torch.cat([torch.ones_like(real), torch.zeros_like(fake)]))
    torch.testing.assert_close(non_saturating_discriminator_loss(real, fake), expected)
    zero = torch.zeros(3)
    assert non_saturating_discriminator_loss(zero, zero).item() == pytest.approx(math.log(2))
    assert discriminator_loss(real, fake, "non_saturating") == non_saturating_discriminator_loss(real, fake)
    assert non_saturating_discriminator_loss(zero - 1e4, zero + 1e4).item() == pytest.approx(1e4)  # no overflow


def test_generator_gradients_have_their_closed_forms():
    logits = (randn(2, 1, 3, 4) * 4).requires_grad_()
    (hinge,) = torch.autograd.grad(generator_loss(logits, "hinge"), logits)
    (saturating,) = torch.autograd.grad(generator_loss(logits, "non_saturating"), logits)
    torch.testing.assert_close(hinge, torch.full_like(logits, -1 / logits.numel()))
    torch.testing.assert_close(saturating, -torch.sigmoid(-logits.detach()) / logits.numel())


@pytest.mark.parametrize("kind", ["hinge", "non_saturating"])
def test_adversarial_losses_are_float32_and_pull_logits_apart(kind):
    real, fake = torch.zeros(2, dtype=torch.bfloat16).requires_grad_(), torch.zeros(3).bfloat16().requires_grad_()
    loss = discriminator_loss(real, fake, kind)
    loss.backward()
    assert loss.dtype == generator_loss(fake, kind).dtype == torch.float32
    assert (real.grad < 0).all() and (fake.grad > 0).all()


# The adaptive weight


def linear_losses(first: torch.Tensor, second: torch.Tensor) -> tuple[nn.Parameter, torch.Tensor, torch.Tensor]:
    """Two losses that are linear in a layer's weight, so their gradients are `first` and `second`."""
    layer = nn.Parameter(randn(*first.shape))
    return layer, (layer * first).sum(), (layer * second).sum()


@settings(deadline=None, max_examples=30)
@given(scale=st.floats(0.1, 100), other_scale=st.floats(0.1, 100), seed=st.integers(0, 99))
def test_the_adaptive_weight_is_the_ratio_of_gradient_norms(scale, other_scale, seed):
    first, second = scale * randn(3, 4, seed=seed), other_scale * randn(3, 4, seed=seed + 100)
    layer, reconstruction_loss, adversarial_loss = linear_losses(first, second)
    weight = adaptive_weight(reconstruction_loss, adversarial_loss, layer)
    assert weight.item() == pytest.approx((first.norm() / (second.norm() + 1e-6)).item(), rel=1e-5)
    assert not weight.requires_grad
    assert layer.grad is None
    (reconstruction_loss + weight * adversarial_loss).backward()  # the graphs are still there
    pulls = first.norm(), (layer.grad - first).norm()
    assert pulls[0].item() == pytest.approx(pulls[1].item(), rel=1e-4)


def test_the_adaptive_weight_is_clamped_and_finite():
    one, zero = torch.ones(2, 3), torch.zeros(2, 3)

    def weight(first, second, **arguments):
        layer, reconstruction_loss, adversarial_loss = linear_losses(first, second)
        return adaptive_weight(reconstruction_loss, adversarial_loss, layer, **arguments).item()

    assert weight(one, 1e-3 * one, max_weight=10) == 10
    assert weight(one, zero) == 1e4
    assert weight(zero, one) == weight(zero, zero) == 0
    for bad in (math.nan, math.inf):
        assert weight(bad * one, one) == weight(one, bad * one) == weight(bad * one, zero) == 0
    with pytest.raises(ValueError, match="max_weight=nan"):
        weight(one, one, max_weight=math.nan)


def test_the_adaptive_weight_needs_losses_of_that_layer():
    layer, loss, _ = linear_losses(torch.ones(2, 3), torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"adversarial_loss does not depend on last_layer of shape \(2, 3\)"):
        adaptive_weight(loss, torch.zeros(()), layer)
    with pytest.raises(ValueError, match="reconstruction_loss does not depend"):
        adaptive_weight(nn.Parameter(torch.ones(())) * 2, loss, layer)


def test_with_a_reduction_the_adaptive_weight_is_that_of_all_pictures():
    # Two processes with half of the pictures each: their gradients are averaged before the norms are taken.
    layer = nn.Parameter(randn(4, 3))
    inputs = randn(6, 4, seed=1)

    def losses(batch):
        return (batch @ layer).square().mean(), -(batch @ layer).sin().mean()

    halves = inputs.split(3)
    whole = adaptive_weight(*losses(inputs), layer)
    others = iter([torch.autograd.grad(loss, layer)[0] for loss in losses(halves[1])])
    reduced = adaptive_weight(*losses(halves[0]), layer, reduce=lambda gradient: (gradient + next(others)) / 2)
    torch.testing.assert_close(reduced, whole)
    assert abs(adaptive_weight(*losses(halves[0]), layer) - whole) > 1e-3


# The schedule


def test_the_discriminator_starts_warms_up_and_ramps():
    schedule = AdversarialSchedule(start_step=3, warmup_steps=2, ramp_steps=4, final_weight=0.5)
    assert [schedule.trains_discriminator(step) for step in range(6)] == [False] * 3 + [True] * 3
    weights = [schedule.weight(step) for step in range(12)]
    assert weights == pytest.approx([0] * 6 + [0.125, 0.25, 0.375, 0.5, 0.5, 0.5])


def test_without_a_ramp_the_weight_jumps_and_zero_turns_all_off():
    schedule = AdversarialSchedule(start_step=2, warmup_steps=1, final_weight=0.7)
    assert [schedule.weight(step) for step in range(5)] == [0, 0, 0, 0.7, 0.7]
    off = AdversarialSchedule(final_weight=0)
    assert not off.trains_discriminator(100) and off.weight(100) == 0


@given(start=st.integers(0, 9), warmup=st.integers(0, 9), ramp=st.integers(0, 9), final=st.floats(0.1, 2))
def test_the_weight_never_falls_and_never_comes_before_the_discriminator_has_learned(start, warmup, ramp, final):
    schedule = AdversarialSchedule(start, warmup, ramp, final)
    weights = [schedule.weight(step) for step in range(40)]
    assert weights == sorted(weights) and weights[-1] == final
    entered = next(step for step, weight in enumerate(weights) if weight > 0)
    assert sum(map(schedule.trains_discriminator, range(entered))) >= warmup


@pytest.mark.parametrize("name", ["start_step", "warmup_steps", "ramp_steps", "final_weight"])
def test_the_schedule_refuses_negative_numbers(name):
    with pytest.raises(ValueError, match=f"{name}=-1 is not"):
        AdversarialSchedule(**{name: -1})


# The guard

GOOD, NAN, INFINITE = torch.tensor(1.0), torch.tensor(math.nan), torch.tensor([0.0, math.inf])


def test_the_guard_lets_finite_steps_pass_and_counts_others():
    guard = StepGuard()
    answers = [guard.ok(*values) for values in ([GOOD], [NAN], [GOOD, INFINITE], [GOOD, GOOD * 2], [-INFINITE])]
    assert answers == [True, False, False, True, False]
    assert (guard.skipped, guard.consecutive) == (3, 1)
    with pytest.raises(ValueError, match="no values"):
        guard.ok()


def test_the_guard_stops_after_too_many_in_a_row():
    guard = StepGuard(max_consecutive=2, max_total=100)
    for values in (NAN, NAN, GOOD, NAN, NAN):
        guard.ok(values)
    with pytest.raises(FloatingPointError, match="after 3 skipped steps in a row; the limit is 2"):
        guard.ok(NAN)


def test_the_guard_stops_after_too_many_in_total():
    guard = StepGuard(max_consecutive=2, max_total=3)
    for values in (NAN, GOOD, NAN, GOOD, NAN, GOOD):
        guard.ok(values)
    with pytest.raises(FloatingPointError, match="after 4 skipped steps in total; the limit is 3"):
        guard.ok(NAN)
    with pytest.raises(FloatingPointError, match="after 1 skipped steps in a row"):
        StepGuard(max_consecutive=0).ok(NAN)
    with pytest.raises(ValueError, match="max_total=-1 is negative"):
        StepGuard(max_total=-1)


def test_the_guard_skips_where_another_process_has_to():
    others = iter([0.0, 2.0, 0.0])
    guard = StepGuard(reduce=lambda flag: flag + next(others))
    assert [guard.ok(GOOD), guard.ok(GOOD), guard.ok(NAN)] == [True, False, False]
    assert guard.skipped == 2


def test_the_state_of_the_guard_is_plain_and_continues():
    guard = StepGuard(max_consecutive=2)
    guard.ok(NAN)
    guard.ok(GOOD)
    guard.ok(NAN)
    guard.ok(NAN)
    state = guard.state_dict()
    assert state == {"skipped": 3, "consecutive": 2}
    restored = StepGuard(max_consecutive=2)
    restored.load_state_dict(state)
    assert restored.state_dict() == state
    with pytest.raises(FloatingPointError, match="3 skipped steps in a row"):
        restored.ok(NAN)


def test_a_guarded_run_keeps_its_weights_finite():
    weight = nn.Parameter(torch.ones(3))
    optimizer, guard = torch.optim.SGD([weight], lr=0.1), StepGuard()
    for factor in (1.0, math.nan, 1.0, math.inf):
        loss = (factor * weight).square().sum()
        optimizer.zero_grad()
        loss.backward()
        if guard.ok(loss, nn.utils.clip_grad_norm_([weight], 1.0)):
            optimizer.step()
    assert weight.isfinite().all()
    assert guard.skipped == 2
