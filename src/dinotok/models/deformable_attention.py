"""Multi-scale deformable attention (Zhu et al., arXiv 2010.04159), in PyTorch alone: no compiled operator."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn


def sample_regions(values: Sequence[torch.Tensor], locations: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Return weighted sums of bilinear samples of feature grids (eq. 3 without its projections).

    A bilinear sample is a weighted sum of four features, so the result is one weighted sum of rows of a table, with
    four times as many terms as there are points: no sample is ever stored. Features outside a grid are zero.
    Everything is float32 (or float64, if the values are).

    Args:
        values: For every level, features `(B, h, w, heads, head_dim)`; sizes may differ between levels.
        locations: `(B, Q, heads, levels, points, 2)`: x and y, where (0, 0) is the upper left corner of the
            picture and (1, 1) the lower right one.
        weights: `(B, Q, heads, levels, points)`.

    Returns:
        `(B, Q, heads, head_dim)`.
    """
    batch, num_queries, heads = locations.shape[:3]
    dtype = torch.promote_types(values[0].dtype, torch.float32)
    rows = [level.shape[1] * level.shape[2] for level in values]
    table = torch.cat([level.flatten(1, 2) for level in values], dim=1).to(dtype)  # (B, S, heads, head_dim)
    sizes = locations.new_tensor([[level.shape[2], level.shape[1]] for level in values], dtype=dtype)  # width, height
    starts = locations.new_tensor([sum(rows[:index]) for index in range(len(rows))], dtype=torch.long)

    position = locations.to(dtype) * sizes[:, None] - 0.5  # in features: whole numbers are their centres
    corner = position.floor()
    corners = torch.stack([corner, corner + 1], dim=-1)  # (B, Q, heads, levels, points, xy, 2)
    inside = (corners >= 0) & (corners < sizes[:, None, :, None])
    share = torch.stack([corner + 1 - position, position - corner], dim=-1) * inside
    near = corners.nan_to_num().clamp(min=0).minimum(sizes[:, None, :, None] - 1).long()  # NaN stays in the shares
    share_x, share_y = share.unbind(-2)  # (B, Q, heads, levels, points, 2) each
    near_x, near_y = near.unbind(-2)
    widths = sizes[:, 0].long()[:, None, None, None]
    index = starts[:, None, None, None] + near_y[..., :, None] * widths + near_x[..., None, :]
    share = weights.to(dtype)[..., None, None] * share_y[..., :, None] * share_x[..., None, :]

    first = torch.arange(batch, device=table.device)[:, None, None, None] * table.shape[1]
    index = (first + index.flatten(3)) * heads + torch.arange(heads, device=table.device)[:, None]
    sums = F.embedding_bag(
        index.flatten(0, 2), table.flatten(0, 2), per_sample_weights=share.flatten(3).flatten(0, 2), mode="sum"
    )
    return sums.view(batch, num_queries, heads, -1)


class MultiScaleDeformableAttention(nn.Module):
    """Every query looks at a few points of every feature grid, at learned offsets from where it stands.

        out(q) = W' concat_m sum_lk A_mlqk * bilinear(W x^l; p_q + dp_mlqk / (w_l, h_l))        (eq. 3)

    with offsets dp and weights A, which a softmax makes sum to 1 over levels and points, linear in the query. Batches
    of any size, grids of any sizes. Locations and samples are float32 whatever the precision around them: in bfloat16
    a location is off by up to a tenth of a feature. Under autocast the projections are float32, too.

    Args:
        hidden_size: Width of queries, features and output.
        num_heads: M.
        num_levels: L.
        num_points: K, for each head and level.
        adaptive: False is a control: no offsets, so each query reads the features where it stands, one point a level.

    Raises:
        ValueError: If `hidden_size` is not a multiple of `num_heads`.
    """

    def __init__(
        self, hidden_size: int, num_heads: int = 8, num_levels: int = 4, num_points: int = 4, adaptive: bool = True
    ):
        super().__init__()
        if hidden_size % num_heads:
            raise ValueError(f"hidden_size={hidden_size} is not a multiple of num_heads={num_heads}.")
        self.num_heads = num_heads
        self.num_levels = num_levels
        self.num_points = num_points if adaptive else 1
        points = num_heads * num_levels * self.num_points
        self.sampling_offsets = nn.Linear(hidden_size, 2 * points) if adaptive else None
        self.attention_weights = nn.Linear(hidden_size, points)
        self.value_projection = nn.Linear(hidden_size, hidden_size)
        self.output_projection = nn.Linear(hidden_size, hidden_size)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start as in Deformable DETR: equal weights, and each head's points on a ray of its own."""
        if self.sampling_offsets is not None:
            angles = torch.arange(self.num_heads, dtype=torch.float32) * (2 * math.pi / self.num_heads)
            rays = torch.stack([angles.cos(), angles.sin()], dim=-1)
            rays = rays / rays.abs().amax(-1, keepdim=True)  # (heads, 2), on the unit square
            steps = torch.arange(1, self.num_points + 1, dtype=torch.float32)
            offsets = rays[:, None, None] * steps[:, None]  # (heads, 1, points, 2)
            nn.init.zeros_(self.sampling_offsets.weight)
            with torch.no_grad():
                self.sampling_offsets.bias.copy_(offsets.expand(-1, self.num_levels, -1, -1).flatten())
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for projection in (self.value_projection, self.output_projection):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def forward(
        self, queries: torch.Tensor, reference_points: torch.Tensor, features: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        """Return what the queries gather.

        Args:
            queries: `(B, Q, hidden_size)`, positions included.
            reference_points: `(Q, 2)`: x and y in [0, 1], float32.
            features: `num_levels` grids `(B, h, w, hidden_size)`, channels last.

        Returns:
            `(B, Q, hidden_size)`.
        """
        context, (queries, *features) = out_of_autocast(self.value_projection, queries, *features)
        with context:
            values = [self.value_projection(level).unflatten(-1, (self.num_heads, -1)) for level in features]
            gathered = sample_regions(values, *self.locations_and_weights(queries, reference_points, features))
            return self.output_projection(gathered.flatten(2).to(queries.dtype))

    def locations_and_weights(
        self, queries: torch.Tensor, reference_points: torch.Tensor, features: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return where the queries look, and how much each place counts.

        Args:
            queries: As in `forward`, and so are the others.
            reference_points: Likewise.
            features: Likewise; only their sizes matter.

        Returns:
            Locations `(B, Q, heads, levels, points, 2)` in [0, 1] and weights `(B, Q, heads, levels, points)` that sum
            to 1 over levels and points.
        """
        shape = (self.num_heads, self.num_levels, self.num_points)
        dtype = torch.promote_types(queries.dtype, torch.float32)
        scores = self.attention_weights(queries).to(dtype).unflatten(-1, (self.num_heads, -1))
        weights = scores.softmax(-1).unflatten(-1, shape[1:])
        references = reference_points.to(dtype)[:, None, None, None]
        if self.sampling_offsets is None:
            return references.expand(len(queries), -1, *shape, -1), weights
        sizes = reference_points.new_tensor([[level.shape[2], level.shape[1]] for level in features], dtype=dtype)
        offsets = self.sampling_offsets(queries).to(dtype).unflatten(-1, (*shape, 2))
        return references + offsets / sizes[:, None], weights


def out_of_autocast(layer: nn.Linear, *tensors: torch.Tensor) -> tuple[torch.autocast, tuple[torch.Tensor, ...]]:
    """Return a context where float32 layers compute in float32 under autocast, too, and the tensors as it needs them.

    Weights stored in fewer bits than they compute in (diffusers' layerwise casting) stay under autocast, which
    makes precisions meet.
    """
    device = tensors[0].device.type
    is_enabled = torch.is_autocast_enabled(device)
    leaves = is_enabled and layer.weight.dtype == torch.float32
    context = torch.autocast(device, enabled=is_enabled and not leaves)
    return context, tuple(tensor.float() for tensor in tensors) if leaves else tensors
