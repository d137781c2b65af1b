"""The parts of VFMTok and VFMAE (arXiv 2507.08441, 2605.18390): region sampler, token decoder, resizing.

Written after the released code (github.com/CVMI-Lab/VFMTok2, Apache-2.0), with which it agrees numerically; what in it
is unusual, and kept because released weights depend on it, is named where it is.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from .deformable_attention import MultiScaleDeformableAttention, out_of_autocast
from .transformer_layers import SwiGLU


class Attention(nn.Module):
    """Multi-head self-attention.

    Args:
        hidden_size: Width of input and output.
        num_heads: Must divide it.
        causal: Let a token see itself and those before it only.
        dropout: Of the attention weights, in training.

    Raises:
        ValueError: If `hidden_size` is not a multiple of `num_heads`.
    """

    def __init__(self, hidden_size: int, num_heads: int, causal: bool, dropout: float = 0.0):
        super().__init__()
        if hidden_size % num_heads:
            raise ValueError(f"hidden_size={hidden_size} is not a multiple of num_heads={num_heads}.")
        self.num_heads = num_heads
        self.causal = causal
        self.dropout = dropout
        self.to_q = nn.Linear(hidden_size, hidden_size)
        self.to_k = nn.Linear(hidden_size, hidden_size)
        self.to_v = nn.Linear(hidden_size, hidden_size)
        self.to_out = nn.Linear(hidden_size, hidden_size)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Map `(B, N, hidden_size)` to the same shape."""
        query, key, value = (
            layer(hidden).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for layer in (self.to_q, self.to_k, self.to_v)
        )  # (B, heads, N, head_dim)
        dropout = self.dropout if self.training else 0.0
        hidden = F.scaled_dot_product_attention(query, key, value, is_causal=self.causal, dropout_p=dropout)
        return self.to_out(hidden.transpose(1, 2).flatten(2))


class FeatureProjector(nn.Sequential):
    """One level's features to the width of the queries.

    Two normalisations in a row at the end are the release's: redundant in effect, but both have weights.

    Args:
        feature_channels: Of the frozen encoder.
        hidden_size: Of the queries.
    """

    def __init__(self, feature_channels: int, hidden_size: int):
        super().__init__(
            nn.Linear(feature_channels, hidden_size, bias=False),
            nn.LayerNorm(hidden_size),
            nn.ReLU(),
            nn.Linear(hidden_size, hidden_size, bias=False),
            nn.LayerNorm(hidden_size),
            nn.LayerNorm(hidden_size),
        )


class RegionLayer(nn.Module):
    """Queries gather features, talk to each other and pass a feed-forward layer, normalised after each.

    The positions are added in both attentions; in the self-attention to the values, too, unlike in DETR. Both
    attentions are float32 under autocast, as in the release.

    Args:
        hidden_size: Width.
        num_heads: Of both attentions.
        num_levels: Feature grids.
        num_points: For each head and level.
        intermediate_size: Width inside the feed-forward layer.
        causal: Self-attention over the raster order of the queries.
        adaptive: See `MultiScaleDeformableAttention`.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_levels: int,
        num_points: int,
        intermediate_size: int,
        causal: bool,
        adaptive: bool,
    ):
        super().__init__()
        self.cross_attention = MultiScaleDeformableAttention(hidden_size, num_heads, num_levels, num_points, adaptive)
        self.norm_cross_attention = nn.LayerNorm(hidden_size)
        self.self_attention = Attention(hidden_size, num_heads, causal)
        self.norm_self_attention = nn.LayerNorm(hidden_size)
        self.feed_forward = nn.Sequential(
            nn.Linear(hidden_size, intermediate_size), nn.ReLU(), nn.Linear(intermediate_size, hidden_size)
        )
        self.norm_feed_forward = nn.LayerNorm(hidden_size)

    def forward(
        self,
        hidden: torch.Tensor,
        positions: torch.Tensor,
        reference_points: torch.Tensor,
        features: Sequence[torch.Tensor],
    ) -> torch.Tensor:
        """Update queries `(B, Q, hidden_size)`; the rest as in `MultiScaleDeformableAttention`."""
        gathered = self.cross_attention(hidden + positions, reference_points, features)
        hidden = self.norm_cross_attention(hidden + gathered)
        hidden = self.norm_self_attention(hidden + self._attend(hidden + positions))
        return self.norm_feed_forward(hidden + self.feed_forward(hidden))

    def _attend(self, hidden: torch.Tensor) -> torch.Tensor:
        context, (hidden,) = out_of_autocast(self.self_attention.to_q, hidden)
        with context:
            return self.self_attention(hidden)


class RegionSampler(nn.Module):
    """Learned queries on a grid, each of which gathers a region of several levels of features.

    Args:
        feature_channels: Of the frozen encoder.
        hidden_size: Width of the queries.
        query_grid: Rows and columns of queries; each looks around its place on it.
        num_layers: How often they look.
        num_heads: Of all attentions.
        num_levels: Feature grids.
        num_points: For each head and level.
        intermediate_size: Width inside the feed-forward layers.
        causal: Self-attention of the queries over their raster order: VFMTok, for the sake of autoregressive models;
            VFMAE's sees all.
        adaptive: See `MultiScaleDeformableAttention`.
    """

    def __init__(
        self,
        feature_channels: int,
        hidden_size: int,
        query_grid: tuple[int, int],
        num_layers: int,
        num_heads: int,
        num_levels: int,
        num_points: int,
        intermediate_size: int,
        causal: bool,
        adaptive: bool,
    ):
        super().__init__()
        self.query_grid = query_grid
        count = query_grid[0] * query_grid[1]
        self.queries = nn.Parameter(torch.randn(1, count, hidden_size) * hidden_size**-0.5)
        self.query_positions = nn.Parameter(torch.randn(1, count, hidden_size) * hidden_size**-0.5)
        self.norm_queries = nn.LayerNorm(hidden_size)
        self.projectors = nn.ModuleList(FeatureProjector(feature_channels, hidden_size) for _ in range(num_levels))
        self.layers = nn.ModuleList(
            RegionLayer(hidden_size, num_heads, num_levels, num_points, intermediate_size, causal, adaptive)
            for _ in range(num_layers)
        )
        self.gradient_checkpointing = False
        self._gradient_checkpointing_func: Callable = torch.utils.checkpoint.checkpoint

    def forward(self, features: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the regions.

        Args:
            features: For every level, a grid `(B, feature_channels, h, w)`.

        Returns:
            `(B, rows * columns, hidden_size)`, in raster order.
        """
        grids = [
            projector(level.permute(0, 2, 3, 1)) for projector, level in zip(self.projectors, features, strict=True)
        ]  # (B, h, w, hidden_size) each
        hidden = self.norm_queries(self.queries).expand(len(grids[0]), -1, -1).to(grids[0].dtype)
        references = grid_centres(self.query_grid, hidden.device)
        for layer in self.layers:
            arguments = (hidden, self.query_positions, references, grids)
            if self.gradient_checkpointing and torch.is_grad_enabled():
                hidden = self._gradient_checkpointing_func(layer, *arguments)
            else:
                hidden = layer(*arguments)
        return hidden


class TokenDecoderLayer(nn.Module):
    """A transformer layer, normalised before attention and gated feed-forward.

    Args:
        hidden_size: Width.
        num_heads: Of the attention.
        intermediate_size: Width inside the feed-forward layer.
        causal: See `Attention`.
        dropout: Likewise.
    """

    def __init__(self, hidden_size: int, num_heads: int, intermediate_size: int, causal: bool, dropout: float):
        super().__init__()
        self.norm_attention = nn.LayerNorm(hidden_size)
        self.attention = Attention(hidden_size, num_heads, causal, dropout)
        self.norm_feed_forward = nn.LayerNorm(hidden_size)
        self.feed_forward = SwiGLU(hidden_size, intermediate_size, bias=True)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Map `(B, N, hidden_size)` to the same shape."""
        hidden = hidden + self.attention(self.norm_attention(hidden))
        return hidden + self.feed_forward(self.norm_feed_forward(hidden))


class TokenDecoder(nn.Module):
    """Mask tokens on a grid read what the region tokens say: about pixels, and about the encoder's features.

    The sequence is `[regions | class token | masks | registers]`. Pixels and features have a mask token each, and
    share class token, registers and positions. Kept from the release: the regions pass the pixels' norm in both
    branches; the positions of a grid other than the table's are bicubic with a scale factor of (side + 0.1) / table
    side, which is not the same as resizing to that side; and in a causal sequence the registers come last, so nothing
    depends on them.

    Args:
        hidden_size: Width.
        num_regions: Region tokens.
        num_layers: Of the transformer.
        num_heads: Of its attentions.
        intermediate_size: Width inside its feed-forward layers.
        num_feature_layers: Of a second transformer for the features; 0 to share the first.
        num_register_tokens: At the end of the sequence.
        position_grid: Side of the table of positions.
        feature_channels: Of the frozen encoder.
        causal: See `Attention`.
        dropout: Likewise.
    """

    def __init__(
        self,
        hidden_size: int,
        num_regions: int,
        num_layers: int,
        num_heads: int,
        intermediate_size: int,
        num_feature_layers: int,
        num_register_tokens: int,
        position_grid: int,
        feature_channels: int,
        causal: bool,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.position_grid = position_grid
        scale = hidden_size**-0.5
        self.region_positions = nn.Parameter(torch.randn(1, num_regions, hidden_size) * scale)
        self.positions = nn.Parameter(torch.randn(1, 1 + position_grid**2, hidden_size) * scale)  # class token first
        self.pixel_mask_token = nn.Parameter(torch.randn(1, 1, hidden_size) * scale)
        self.feature_mask_token = nn.Parameter(torch.randn(1, 1, hidden_size) * scale)
        self.class_token = nn.Parameter(torch.randn(1, 1, hidden_size) * scale)
        self.register_tokens = None
        if num_register_tokens:
            self.register_tokens = nn.Parameter(torch.zeros(1, num_register_tokens, hidden_size))
        self.norm_pixels = nn.LayerNorm(hidden_size)
        self.norm_features = nn.LayerNorm(hidden_size)

        def layers(count: int) -> nn.ModuleList:
            arguments = (hidden_size, num_heads, intermediate_size, causal, dropout)
            return nn.ModuleList(TokenDecoderLayer(*arguments) for _ in range(count))

        self.layers = layers(num_layers)
        self.feature_layers = layers(num_feature_layers)
        self.feature_head = nn.Linear(hidden_size, feature_channels)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        self.gradient_checkpointing = False
        self._gradient_checkpointing_func: Callable = torch.utils.checkpoint.checkpoint

    def forward(self, regions: torch.Tensor, side: int) -> torch.Tensor:
        """Return what the pixel decoder starts from.

        Args:
            regions: `(B, num_regions, hidden_size)`.
            side: Of the grid.

        Returns:
            `(B, hidden_size, side, side)`.
        """
        hidden = self._run(self.layers, regions, self.pixel_mask_token, self.norm_pixels, side)
        return hidden[:, 1:].transpose(1, 2).unflatten(2, (side, side))

    def predict_features(self, regions: torch.Tensor) -> torch.Tensor:
        """Return what the regions say about the encoder's last layer.

        Args:
            regions: `(B, num_regions, hidden_size)`.

        Returns:
            `(B, 1 + position_grid ** 2, feature_channels)`: the class token, then the patches in raster order.
        """
        layers = self.feature_layers or self.layers
        side = self.position_grid
        hidden = self._run(layers, regions, self.feature_mask_token, self.norm_features, side)
        return self.feature_head(hidden)

    def _run(
        self, layers: nn.ModuleList, regions: torch.Tensor, mask_token: torch.Tensor, norm: nn.Module, side: int
    ) -> torch.Tensor:
        """The class token and the masks of a grid, `(B, 1 + side * side, hidden_size)`, after the transformer."""
        positions = resize_positions(self.positions, side)
        masks = [self.class_token + positions[:, :1], mask_token + positions[:, 1:]]
        if self.register_tokens is not None:
            masks.append(self.register_tokens)
        queries = norm(torch.cat(masks, dim=1)).expand(len(regions), -1, -1)
        memory = self.norm_pixels(regions + self.region_positions)
        hidden = torch.cat([memory, queries.to(memory.dtype)], dim=1)
        for layer in layers:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                hidden = self._gradient_checkpointing_func(layer, hidden)
            else:
                hidden = layer(hidden)
        return hidden[:, regions.shape[1] :][:, : 1 + side * side]


def grid_centres(grid: tuple[int, int], device: torch.device) -> torch.Tensor:
    """Return the centres of the cells of a grid over the unit square: `(rows * columns, 2)`, x and y, float32."""
    rows, columns = ((torch.arange(side, dtype=torch.float32, device=device) + 0.5) / side for side in grid)
    return torch.stack([columns.repeat(grid[0]), rows.repeat_interleave(grid[1])], dim=-1)


def resize_positions(positions: torch.Tensor, side: int) -> torch.Tensor:
    """Interpolate a table of positions to another grid as DINO does, with its 0.1 against rounding down.

    Args:
        positions: `(1, 1 + n * n, D)`; the first is the class token's and stays.
        side: Of the wanted grid.

    Returns:
        `(1, 1 + side * side, D)`.
    """
    table = math.isqrt(positions.shape[1] - 1)
    if table == side:
        return positions
    grid = positions[:, 1:].transpose(1, 2).unflatten(2, (table, table))
    resized = F.interpolate(grid.float(), scale_factor=(side + 0.1) / table, mode="bicubic").to(grid.dtype)
    return torch.cat([positions[:, :1], resized.flatten(2).transpose(1, 2)], dim=1)


def resize_for_encoder(pixels: torch.Tensor, side: int) -> torch.Tensor:
    """Resize pixels as the release does before its encoder: kornia's bicubic, corners aligned, antialiased by a blur.

    The blur's deviation is (factor - 1) / 2 in pixels: no effect at the released sizes, 336 to 336 and 256 to 224.

    Args:
        pixels: `(B, 3, H, W)` in [-1, 1].
        side: Height and width of the result.

    Returns:
        `(B, 3, side, side)` float32, clamped to [-1, 1].
    """
    pixels = pixels.float()
    if pixels.shape[2:] == (side, side):
        return pixels.clamp(-1, 1)
    factors = [size / side for size in pixels.shape[2:]]
    if max(factors) > 1:
        rows, columns = (_blur_kernel(factor).to(pixels.device) for factor in factors)
        kernel = torch.outer(rows, columns).expand(3, 1, -1, -1)
        padding = (len(columns) // 2, len(columns) // 2, len(rows) // 2, len(rows) // 2)
        with torch.autocast(pixels.device.type, enabled=False):
            pixels = F.conv2d(F.pad(pixels, padding, mode="reflect"), kernel, groups=3)
    return F.interpolate(pixels, size=(side, side), mode="bicubic", align_corners=True).clamp(-1, 1)


def _blur_kernel(factor: float) -> torch.Tensor:
    """The normalised Gaussian of kornia's `resize(antialias=True)`, of odd length."""
    deviation = max((factor - 1) / 2, 0.001)
    length = int(max(4 * deviation, 3)) // 2 * 2 + 1
    offsets = torch.arange(length, dtype=torch.float32) - length // 2
    weights = torch.exp(-offsets.square() / (2 * deviation**2))
    return weights / weights.sum()
