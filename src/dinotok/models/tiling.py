"""Apply a function to overlapping tiles of a picture and blend the results."""

from collections.abc import Callable
from fractions import Fraction

import torch


def tiled_map(
    function: Callable[[torch.Tensor], torch.Tensor], values: torch.Tensor, tile: int, overlap: int, scale: Fraction
) -> torch.Tensor:
    """Return what `function` makes of `values`, computed tile by tile in bounded memory.

    All tiles have the same size, the last of a row or column is moved back to fit. Where tiles overlap, their results
    are averaged with weights that fall linearly towards each tile's inner edges, so no seam has a step.

    Args:
        function: Maps `(B, C, t_h, t_w)` to `(B, C', t_h * scale, t_w * scale)`.
        values: `(B, C, H, W)`; H and W are multiples of `scale.denominator`.
        tile: Side of a tile; a picture smaller than it, in one direction or both, is one tile in that direction.
        overlap: How far neighbouring tiles share, less than `tile`. Both are multiples of `scale.denominator`.
        scale: Output size over input size.

    Returns:
        `(B, C', H * scale, W * scale)`. Peak memory is that of one tile beside the input and the output.
    """
    size = values.shape[2:]
    tiles = [min(tile, side) for side in size]
    starts = [_starts(side, t, overlap) for side, t in zip(size, tiles, strict=True)]
    out_size = [int(side * scale) for side in size]
    out_tiles = [int(t * scale) for t in tiles]
    result = torch.empty(0)
    for top in starts[0]:
        rows = _ramp(top, tiles[0], size[0], overlap, scale)
        for left in starts[1]:
            part = function(values[:, :, top : top + tiles[0], left : left + tiles[1]])
            columns = _ramp(left, tiles[1], size[1], overlap, scale)
            weight = torch.outer(rows, columns).to(part.device)
            if top == left == 0:  # now the number of channels is known
                result = torch.zeros(*part.shape[:2], *out_size, dtype=torch.float32, device=part.device)
                total = torch.zeros(out_size, dtype=torch.float32, device=part.device)
            y, x = int(top * scale), int(left * scale)
            window = (slice(y, y + out_tiles[0]), slice(x, x + out_tiles[1]))
            result[:, :, window[0], window[1]] += part * weight
            total[window] += weight
    return result.div_(total).to(part.dtype)


def _starts(side: int, tile: int, overlap: int) -> list[int]:
    """Return where tiles begin so that they cover `side`, neighbours sharing at least `overlap`."""
    last = side - tile
    return [*range(0, last, tile - overlap), last] if last else [0]


def _ramp(start: int, tile: int, side: int, overlap: int, scale: Fraction) -> torch.Tensor:
    """Return a tile's weights along one side: 1, falling linearly over `overlap` at edges inside the picture."""
    length, fall = int(tile * scale), max(int(overlap * scale), 1)
    rise = (torch.arange(length, dtype=torch.float32) + 0.5).div(fall).clamp(max=1)
    weights = torch.ones(length)
    if start > 0:
        weights = weights * rise
    if start + tile < side:
        weights = weights * rise.flip(0)
    return weights
