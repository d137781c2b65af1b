"""Rotary positions and gated layers obey their laws."""

import pytest
import torch
import torch.nn.functional as F

from dinotok.models.transformer_layers import SwiGLU, rotary_angles, rotate


def test_swiglu_is_its_formula():
    torch.manual_seed(0)
    layer = SwiGLU(6, 10, bias=True)
    hidden = torch.randn(2, 5, 6)
    gate, up = layer.gate_up.weight.split(10)
    gate_bias, up_bias = layer.gate_up.bias.split(10)
    expected = layer.down(F.silu(hidden @ gate.T + gate_bias) * (hidden @ up.T + up_bias))
    torch.testing.assert_close(layer(hidden), expected)


def test_scores_depend_on_relative_positions_of_each_axis_alone():
    torch.manual_seed(0)
    height, width, head_dim = 5, 7, 16
    angles = rotary_angles(height, width, head_dim)
    assert angles.shape == (35, 8)
    query, key = torch.randn(2, head_dim)
    turned = [rotate(x.expand(35, head_dim), angles.cos(), angles.sin()).view(height, width, -1) for x in (query, key)]

    def score(a, b):
        return turned[0][a] @ turned[1][b]

    torch.testing.assert_close(score((1, 2), (3, 5)), score((0, 1), (2, 4)))
    torch.testing.assert_close(turned[0].norm(dim=-1), query.norm().expand(height, width))
    assert not torch.allclose(score((1, 2), (2, 4)), score((2, 1), (4, 3)))  # the axes are told apart


def test_rotation_keeps_the_dtype_and_needs_whole_quadruples():
    angles = rotary_angles(2, 3, 8)
    assert rotate(torch.randn(6, 8).bfloat16(), angles.cos(), angles.sin()).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="head_dim=6"):
        rotary_angles(2, 3, 6)
