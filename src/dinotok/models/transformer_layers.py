"""What the transformers of this library share: gated feed-forward layers and rotary positions."""

import torch
import torch.nn.functional as F
from torch import nn


class SwiGLU(nn.Module):
    """Gated feed-forward layer, `down(silu(gate(x)) * up(x))` (Shazeer, arXiv 2002.05202, eq. 6).

    Gate and up projection are one matrix, the gate's rows first.

    Args:
        hidden_size: Width of input and output.
        intermediate_size: Width inside.
        bias: Of all projections.
    """

    def __init__(self, hidden_size: int, intermediate_size: int, bias: bool = False):
        super().__init__()
        self.gate_up = nn.Linear(hidden_size, 2 * intermediate_size, bias=bias)
        self.down = nn.Linear(intermediate_size, hidden_size, bias=bias)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Map `(..., hidden_size)` to the same shape."""
        gate, up = self.gate_up(hidden).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


def rotary_angles(
    height: int, width: int, head_dim: int, theta: float = 10000.0, device: torch.device | str | None = None
) -> torch.Tensor:
    """Return the angles of axial two-dimensional rotary positions (Su et al., arXiv 2104.09864, per axis).

    The first half of a head's channel pairs turns by the row, the second by the column.

    Args:
        height: Rows of the grid.
        width: Columns of the grid.
        head_dim: Channels of a head, a multiple of 4.
        theta: Base of the wave lengths.
        device: Of the result.

    Returns:
        `(height * width, head_dim / 2)` float32 radians, raster order: one angle for each pair of channels.

    Raises:
        ValueError: If `head_dim` is not a multiple of 4.
    """
    if head_dim % 4:
        raise ValueError(f"head_dim={head_dim} is not a multiple of 4.")
    exponents = torch.arange(0, head_dim // 2, 2, dtype=torch.float32, device=device) / (head_dim // 2)
    frequencies = 1.0 / theta**exponents  # (head_dim / 4,)
    rows = torch.arange(height, dtype=torch.float32, device=device)[:, None] * frequencies
    columns = torch.arange(width, dtype=torch.float32, device=device)[:, None] * frequencies
    grid = torch.cat(
        [rows[:, None].expand(-1, width, -1), columns[None].expand(height, -1, -1)], dim=-1
    )  # (height, width, head_dim / 2)
    return grid.flatten(0, 1)


def rotate(values: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn neighbouring pairs of channels `(x0, x1) -> (x0 cos - x1 sin, x0 sin + x1 cos)`.

    Args:
        values: `(..., N, head_dim)` queries or keys.
        cos: Broadcastable to `(..., N, head_dim / 2)`, float32.
        sin: Likewise.

    Returns:
        The shape and dtype of `values`; computed in float32.
    """
    first, second = values.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([first * cos - second * sin, first * sin + second * cos], dim=-1)
    return turned.flatten(-2).to(values.dtype)


def sincos_positions(
    height: int, width: int, hidden_size: int, theta: float = 10000.0, device: torch.device | str | None = None
) -> torch.Tensor:
    """Return the fixed sine-cosine positions of a grid, as MAE and DiT lay them out.

    The first half of the channels encodes the column, the second the row; in each half, all sines come first.

    Args:
        height: Rows of the grid.
        width: Columns of the grid.
        hidden_size: Channels, a multiple of 4.
        theta: Base of the wave lengths.
        device: Of the result.

    Returns:
        `(height * width, hidden_size)` float32, raster order.

    Raises:
        ValueError: If `hidden_size` is not a multiple of 4.
    """
    if hidden_size % 4:
        raise ValueError(f"hidden_size={hidden_size} is not a multiple of 4.")
    quarter = hidden_size // 4
    frequencies = theta ** -(torch.arange(quarter, dtype=torch.float32, device=device) / quarter)
    rows = torch.arange(height, dtype=torch.float32, device=device)[:, None] * frequencies  # (height, quarter)
    columns = torch.arange(width, dtype=torch.float32, device=device)[:, None] * frequencies  # (width, quarter)
    waves = [
        torch.cat([angles.sin(), angles.cos()], dim=-1).expand(height, width, -1)
        for angles in (columns[None], rows[:, None])
    ]
    return torch.cat(waves, dim=-1).flatten(0, 1)
