"""Causal self-attention, and the keys and values it has seen, in memory that is allocated once."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .transformer_layers import rotate

Rotary = tuple[torch.Tensor, torch.Tensor]


class KeyValueCache:
    """A static cache of keys and values, local to one generation.

    Every layer adds the new tokens with `extend`; after the last layer, `advance` counts them.

    Args:
        num_layers: Layers that keep keys and values.
        batch_size: Sequences decoded together.
        num_heads: Attention heads of a layer.
        capacity: Tokens there is room for.
        head_dim: Channels of a head.
        dtype: Of keys and values.
        device: Likewise.

    Attributes:
        length: Tokens that all layers have seen.
    """

    def __init__(
        self,
        num_layers: int,
        batch_size: int,
        num_heads: int,
        capacity: int,
        head_dim: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ):
        shape = (2, batch_size, num_heads, capacity, head_dim)
        self._layers = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(num_layers)]
        self.batch_size = batch_size
        self.capacity = capacity
        self.length = 0

    def extend(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Write a layer's keys and values of new tokens behind those it has.

        Args:
            layer: Which.
            keys: `(batch_size, num_heads, N, head_dim)`.
            values: Likewise.

        Returns:
            All keys and all values of the layer, `(batch_size, num_heads, length + N, head_dim)`: views.
        """
        end = self.length + keys.shape[2]
        stored_keys, stored_values = self._layers[layer].unbind(0)
        stored_keys[:, :, self.length : end] = keys
        stored_values[:, :, self.length : end] = values
        return stored_keys[:, :, :end], stored_values[:, :, :end]

    def advance(self, count: int) -> None:
        """Count tokens that every layer has seen now."""
        self.length += count

    def reset(self) -> None:
        """Forget all tokens; the memory stays."""
        self.length = 0

    def check_room(self, count: int) -> None:
        """Check that `count` more tokens fit.

        Raises:
            ValueError: If they do not.
        """
        if self.length + count > self.capacity:
            raise ValueError(
                f"{count} more tokens do not fit: the cache has room for {self.capacity} and holds {self.length}."
            )


def causal_mask(count: int, past: int, device: torch.device) -> torch.Tensor | None:
    """Return which keys each of `count` new tokens may see after `past` older ones.

    Returns:
        `(count, past + count)` booleans, or `None` where `scaled_dot_product_attention` needs none: for a single
        token, and (with `is_causal`) for the start of a sequence.
    """
    if count == 1 or past == 0:
        return None
    return torch.ones(count, past + count, dtype=torch.bool, device=device).tril(past)


class CausalSelfAttention(nn.Module):
    """Multi-head attention of every token to itself and those before it.

    Args:
        hidden_size: Width.
        num_heads: Heads.
        dropout: Of the output.
        attention_dropout: Of the attention weights.
        bias: Of both projections.
        normalize: Put a LayerNorm on the queries and on the keys of a head.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        bias: bool = False,
        normalize: bool = False,
    ):
        super().__init__()
        self.num_heads = num_heads
        self.attention_dropout = attention_dropout
        self.to_qkv = nn.Linear(hidden_size, 3 * hidden_size, bias=bias)
        self.query_norm, self.key_norm = (
            nn.LayerNorm(hidden_size // num_heads, eps=1e-6) if normalize else nn.Identity() for _ in range(2)
        )
        self.to_out = nn.Linear(hidden_size, hidden_size, bias=bias)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        hidden: torch.Tensor,
        rotary: Rotary | None = None,
        mask: torch.Tensor | None = None,
        cache: KeyValueCache | None = None,
        layer: int = 0,
    ) -> torch.Tensor:
        """Attend.

        Args:
            hidden: `(..., N, hidden_size)`: new tokens of one or many sequences.
            rotary: Cosines and sines of their positions, `(N, head_dim / 2)` each.
            mask: See `causal_mask`.
            cache: Where older tokens are, and the new ones go; then `hidden` has three dimensions.
            layer: Of the cache.

        Returns:
            The shape of `hidden`.
        """
        heads = self.to_qkv(hidden).unflatten(-1, (3, self.num_heads, -1)).movedim(-3, 0).transpose(-2, -3)
        queries, keys, values = heads.unbind(0)  # (..., heads, N, head_dim)
        queries, keys = self.query_norm(queries), self.key_norm(keys)
        if rotary is not None:
            queries, keys = rotate(queries, *rotary), rotate(keys, *rotary)
        if cache is not None:
            keys, values = cache.extend(layer, keys, values)
        # Sequences of one sample count as its heads: a fused kernel takes no more than 65,535 sequences.
        folded = [x.flatten(1, -3) for x in (queries, keys, values)]
        attended = F.scaled_dot_product_attention(
            folded[0],
            folded[1],
            folded[2],
            attn_mask=mask,
            dropout_p=self.attention_dropout if self.training else 0.0,
            is_causal=mask is None and queries.shape[-2] > 1,
        ).unflatten(1, queries.shape[1:-2])
        return self.dropout(self.to_out(attended.transpose(-2, -3).flatten(-2)))


def run_blocks(model: Any, hidden: torch.Tensor, condition: Any, cache: KeyValueCache | None) -> torch.Tensor:
    """Run the causal blocks of a model on new tokens.

    Args:
        model: Has `blocks`, called as `block(hidden, condition, mask, cache, layer)`; with its gradient checkpointing
            on, their activations are computed twice.
        hidden: `(B, N, hidden_size)`.
        condition: What every block gets besides: positions, or a modulation.
        cache: Where older tokens are, and the new ones go; they are counted.

    Returns:
        The shape of `hidden`.
    """
    count = hidden.shape[1]
    mask = causal_mask(count, cache.length if cache else 0, hidden.device)
    for layer, block in enumerate(model.blocks):
        if torch.is_grad_enabled() and model.gradient_checkpointing:
            hidden = model._gradient_checkpointing_func(block, hidden, condition, mask, cache, layer)
        else:
            hidden = block(hidden, condition, mask, cache, layer)
    if cache is not None:
        cache.advance(count)
    return hidden
