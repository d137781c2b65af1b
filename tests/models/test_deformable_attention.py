"""Deformable attention equals its definition by grid_sample, on grids of equal and unequal sizes."""

import math

import pytest
import torch
import torch.nn.functional as F

from dinotok.models.deformable_attention import MultiScaleDeformableAttention, sample_regions
from dinotok.models.vfmtok_layers import grid_centres
from tests.conftest import randomize

EQUAL, UNEQUAL = [(6, 5), (6, 5), (6, 5)], [(6, 5), (3, 9), (1, 1)]


def random_values(sizes, batch=3, heads=2, head_dim=4, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(batch, *size, heads, head_dim, generator=generator, dtype=dtype) for size in sizes]


def random_places(levels, batch=3, queries=7, heads=2, points=3, dtype=torch.float32):
    """Locations inside and outside of the picture, and weights."""
    generator = torch.Generator().manual_seed(1)
    shape = (batch, queries, heads, levels, points)
    locations = torch.rand(*shape, 2, generator=generator, dtype=dtype) * 1.6 - 0.3
    return locations, torch.rand(shape, generator=generator, dtype=dtype)


def sample_level_by_level(values, locations, weights):
    """The definition: bilinear samples of one level after the other, then their weighted sum."""
    result = 0
    for level, grid in enumerate(values):
        maps = grid.permute(0, 3, 4, 1, 2).flatten(0, 1)  # (B * heads, head_dim, h, w)
        places = locations[:, :, :, level].transpose(1, 2).flatten(0, 1) * 2 - 1  # (B * heads, Q, points, 2)
        samples = F.grid_sample(maps, places, mode="bilinear", padding_mode="zeros", align_corners=False)
        samples = samples.unflatten(0, (len(grid), -1))  # (B, heads, head_dim, Q, points)
        result = result + torch.einsum("bhdqp,bqhp->bqhd", samples, weights[:, :, :, level])
    return result


@pytest.mark.parametrize("sizes", [EQUAL, UNEQUAL])
@pytest.mark.parametrize("batch", [1, 65])
def test_samples_are_those_of_grid_sample(sizes, batch):
    values = random_values(sizes, batch)
    locations, weights = random_places(len(sizes), batch)
    expected = sample_level_by_level(values, locations, weights)
    torch.testing.assert_close(sample_regions(values, locations, weights), expected, rtol=0, atol=1e-5)


def test_gradients_are_those_of_grid_sample():
    values = [value.requires_grad_() for value in random_values(UNEQUAL, dtype=torch.float64)]
    locations, weights = (place.requires_grad_() for place in random_places(3, dtype=torch.float64))
    inputs = [*values, locations, weights]
    scale = torch.arange(8, dtype=torch.float64).view(2, 4)
    ours = torch.autograd.grad((sample_regions(values, locations, weights) * scale).sum(), inputs)
    theirs = torch.autograd.grad((sample_level_by_level(values, locations, weights) * scale).sum(), inputs)
    for mine, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, expected)


def test_a_feature_is_itself_at_its_centre_and_nothing_far_outside():
    (grid,) = values = random_values([(4, 6)], heads=1)
    centres = grid_centres((4, 6), grid.device)[None, :, None, None, None].expand(3, -1, -1, -1, -1, -1)
    ones = torch.ones(3, 24, 1, 1, 1)
    torch.testing.assert_close(sample_regions(values, centres, ones)[:, :, 0], grid.flatten(1, 2)[:, :, 0])
    assert not sample_regions(values, centres + 1.2, ones).any()


def test_nan_stays_where_it_is():
    values, (locations, weights) = random_values(EQUAL), random_places(3)
    locations[1, 2, 0, 1, 1, 0] = math.nan
    result = sample_regions(values, locations, weights)
    assert result[1, 2, 0].isnan().all() and int(result.isnan().sum()) == 4


def test_it_starts_as_in_deformable_detr():
    attention = MultiScaleDeformableAttention(32, num_heads=4, num_levels=2, num_points=3)
    queries, features = torch.randn(2, 6, 32), [torch.randn(2, 5, 7, 32), torch.randn(2, 3, 3, 32)]
    references = grid_centres((2, 3), queries.device)
    locations, weights = attention.locations_and_weights(queries, references, features)
    torch.testing.assert_close(weights, torch.full_like(weights, 1 / 6))
    offsets = (locations - references[:, None, None, None]) * torch.tensor([[7.0, 5.0], [3.0, 3.0]])[:, None]
    rays = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])
    expected = rays[:, None, None] * torch.tensor([1.0, 2.0, 3.0])[:, None]  # heads, levels, points, xy
    torch.testing.assert_close(offsets, expected.expand_as(offsets), rtol=0, atol=1e-5)


def test_without_adaptation_queries_read_where_they_stand():
    attention = randomize(MultiScaleDeformableAttention(16, num_heads=2, num_levels=2, num_points=4, adaptive=False))
    features = [torch.randn(2, 3, 4, 16) for _ in range(2)]
    queries = torch.randn(2, 12, 16)
    _, weights = attention.locations_and_weights(queries, grid_centres((3, 4), queries.device), features)
    values = torch.stack([attention.value_projection(level).flatten(1, 2) for level in features], 2)  # (B, Q, L, C)
    gathered = torch.einsum("bqlhc,bqhl->bqhc", values.unflatten(-1, (2, 8)), weights[..., 0])
    expected = attention.output_projection(gathered.flatten(2))
    torch.testing.assert_close(attention(queries, grid_centres((3, 4), queries.device), features), expected)


def test_autocast_changes_nothing_and_bfloat16_little():
    attention = randomize(MultiScaleDeformableAttention(32, num_heads=4))
    queries, features = torch.randn(2, 6, 32), [torch.randn(2, 5, 5, 32) for _ in range(4)]
    references = grid_centres((2, 3), queries.device)
    expected = attention(queries, references, features)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(attention(queries, references, features), expected)
    half = attention.bfloat16()(queries.bfloat16(), references, [level.bfloat16() for level in features])
    assert half.dtype == torch.bfloat16 and (half - expected).abs().mean() < 0.05 * expected.abs().mean()


def test_widths_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="hidden_size=30 is not a multiple of num_heads=4"):
        MultiScaleDeformableAttention(30, num_heads=4)
