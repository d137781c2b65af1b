"""Tiles cover everything once, blend without steps, and never need the whole picture."""

from fractions import Fraction

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dinotok.models.tiling import tiled_map
from tests.conftest import random_pixels


@settings(max_examples=40, deadline=None)
@given(
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    tile=st.integers(2, 20),
    overlap=st.integers(0, 10),
    scale=st.sampled_from([Fraction(1, 2), Fraction(1), Fraction(3)]),
)
def test_a_local_function_is_reproduced(height, width, tile, overlap, scale):
    """Resampling by nearest neighbour does not look around, so tiling must not change it."""
    unit = scale.denominator
    overlap = min(overlap, tile - 1)
    values = random_pixels(2, 3, height * unit, width * unit)
    calls = []

    def function(part):
        calls.append(tuple(part.shape[2:]))
        part = part[:, :, ::unit, ::unit]
        return part.repeat_interleave(scale.numerator, 2).repeat_interleave(scale.numerator, 3)

    result = tiled_map(function, values, tile * unit, overlap * unit, scale)
    torch.testing.assert_close(result, function(values))
    assert {max(call) for call in calls[:-1]} <= {min(tile, s) * unit for s in (height, width)}


def test_half_precision_is_blended_in_float32():
    values = random_pixels(1, 3, 48, 80).bfloat16()
    result = tiled_map(lambda part: part, values, 32, 16, Fraction(1))
    assert torch.equal(result, values)


def test_disagreeing_tiles_meet_without_a_step():
    """Calls return different constants, the worst disagreement: outputs still change by 1 / overlap at most."""
    values = torch.zeros(1, 1, 64, 96)
    constants = iter([0.0, 1.0] * 100)
    result = tiled_map(lambda part: torch.full_like(part, next(constants)), values, 32, 16, Fraction(1))
    assert result.min() >= 0 and result.max() <= 1
    for direction in (2, 3):
        assert result.diff(dim=direction).abs().max() <= 1 / 16 + 1e-6
    constants = iter([0.0, 1.0] * 100)
    hard = tiled_map(lambda part: torch.full_like(part, next(constants)), values, 32, 0, Fraction(1))
    assert hard.diff(dim=3).abs().max() == 1
