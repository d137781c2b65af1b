"""RAR: an autoregressive transformer on visual tokens that is trained in random orders, annealed to raster order."""

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from .causal_attention import CausalSelfAttention, KeyValueCache, run_blocks
from .transformer_autoregressive import AutoregressiveOutput


def sample_orders(
    batch_size: int, num_positions: int, random_share: float, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Draw the orders of a training batch.

    Args:
        batch_size: Samples.
        num_positions: Of a grid.
        random_share: Probability that a sample's order is random instead of raster; see `random_share_at`.
        generator: On the CPU.

    Returns:
        `(batch_size, num_positions)` int64: the position that comes first, second, ...
    """
    random = torch.rand(batch_size, num_positions, generator=generator).argsort(dim=1)
    chosen = torch.rand(batch_size, 1, generator=generator) < random_share
    return torch.where(chosen, random, torch.arange(num_positions))


def random_share_at(step: int, start: int, end: int) -> float:
    """Return the share of random orders at a training step: 1 up to `start`, 0 from `end`, linear between (RAR, 3.2).

    Raises:
        ValueError: If `end` is not after `start`.
    """
    if end <= start:
        raise ValueError(f"Annealing must end after its start, got start={start}, end={end}.")
    return min(max((end - step) / (end - start), 0.0), 1.0)


class RandomOrderCache:
    """The state of one generation with a `RandomAutoregressiveTransformer2DModel`; see its `allocate_cache`.

    Attributes:
        body: Keys and values of all tokens so far.
        condition: `(B, hidden_size)`: the class embedding, which modulates every token; `None` before the start.
    """

    def __init__(self, body: KeyValueCache):
        self.body = body
        self.condition: Any = None


class ModulatedBlock(nn.Module):
    """Pre-norm block whose shifts, scales and gates come from a condition of each token (adaLN-zero).

    Args:
        hidden_size: Width.
        intermediate_size: Width inside the feed-forward layer.
        num_heads: Heads.
        dropout: Of the outputs, and inside the feed-forward layer.
        attention_dropout: Of the attention weights.
    """

    def __init__(
        self, hidden_size: int, intermediate_size: int, num_heads: int, dropout: float, attention_dropout: float
    ):
        super().__init__()
        self.attention_norm = nn.LayerNorm(hidden_size, eps=1e-6)
        self.attention = CausalSelfAttention(
            hidden_size, num_heads, dropout, attention_dropout, bias=True, normalize=True
        )
        self.feed_forward_norm = nn.LayerNorm(hidden_size, eps=1e-6)
        self.feed_forward = nn.Sequential(
            nn.Linear(hidden_size, intermediate_size),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(intermediate_size, hidden_size),
            nn.Dropout(dropout),
        )
        self.modulation = nn.Linear(hidden_size, 6 * hidden_size)

    def forward(
        self,
        hidden: torch.Tensor,
        condition: torch.Tensor,
        mask: torch.Tensor | None = None,
        cache: KeyValueCache | None = None,
        layer: int = 0,
    ) -> torch.Tensor:
        """Map `(B, N, hidden_size)` to the same shape; `condition` has it too, the rest is `CausalSelfAttention`'s."""
        shift, scale, gate, shift_2, scale_2, gate_2 = self.modulation(condition).chunk(6, dim=-1)
        attended = self.attention(self.attention_norm(hidden) * (1 + scale) + shift, None, mask, cache, layer)
        hidden = hidden + gate * attended
        return hidden + gate_2 * self.feed_forward(self.feed_forward_norm(hidden) * (1 + scale_2) + shift_2)


class RandomAutoregressiveTransformer2DModel(ModelMixin, ConfigMixin, PeftAdapterMixin):
    """Class-conditional decoder-only transformer trained on permuted indices (RAR, Yu et al., arXiv 2411.00776).

    Every token knows its own position and, by a second embedding, the position it has to predict. Training starts with
    random orders, so that each position learns to use all others, and is annealed to raster order (`sample_orders`,
    `random_share_at`); generation is in raster order. VFMTok-RAR is this model on the indices of VFMTok.

    It is called as `AutoregressiveTransformer2DModel` is and takes its place in pipelines. Positions are learned, so
    there is one grid; there is one index per position.

    Args:
        codebook_sizes: Codes of the one codebook.
        num_classes: Classes; label `num_classes` is the null class of classifier-free guidance.
        sample_size: Rows and columns of the token grid.
        hidden_size: Width.
        num_layers: Blocks.
        num_attention_heads: Heads.
        intermediate_size: Width inside the feed-forward layers.
        dropout: In training, of attention outputs and feed-forward layers.
        attention_dropout: In training, of attention weights.

    Raises:
        ValueError: If there is more than one codebook, or the heads do not divide the width.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["ModulatedBlock"]
    _repeated_blocks = ["ModulatedBlock"]
    _skip_layerwise_casting_patterns = ["embedding", "norm"]
    main_input_name = "indices"

    @register_to_config
    def __init__(
        self,
        codebook_sizes: Sequence[int] = (16384,),
        num_classes: int = 1000,
        sample_size: Sequence[int] = (16, 16),
        hidden_size: int = 1024,
        num_layers: int = 24,
        num_attention_heads: int = 16,
        intermediate_size: int = 4096,
        dropout: float = 0.1,
        attention_dropout: float = 0.1,
    ):
        super().__init__()
        if len(codebook_sizes) != 1:
            raise ValueError(f"This model predicts one index per position, but codebook_sizes={list(codebook_sizes)}.")
        if hidden_size % num_attention_heads:
            raise ValueError(
                f"hidden_size={hidden_size} is not a multiple of num_attention_heads={num_attention_heads}."
            )
        positions = prod(sample_size)
        self.code_embedding = nn.Embedding(codebook_sizes[0], hidden_size)
        self.class_embedding = nn.Embedding(num_classes + 1, hidden_size)
        self.start_embedding = nn.Parameter(torch.zeros(hidden_size))
        self.position_embedding = nn.Parameter(torch.zeros(2 + positions, hidden_size))  # start, class, then the grid
        self.target_embedding = nn.Parameter(torch.zeros(positions, hidden_size))
        self.step_embedding = nn.Parameter(torch.zeros(1 + positions, hidden_size))
        self.blocks = nn.ModuleList(
            ModulatedBlock(hidden_size, intermediate_size, num_attention_heads, dropout, attention_dropout)
            for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(hidden_size, eps=1e-6, elementwise_affine=False)
        self.norm_modulation = nn.Linear(hidden_size, 2 * hidden_size)
        self.output = nn.Linear(hidden_size, codebook_sizes[0])
        self.gradient_checkpointing = False
        self._initialize_weights()

    def _initialize_weights(self) -> None:
        """Truncated normal weights of standard deviation 0.02; modulations start at zero (adaLN-zero)."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias") or "modulation" in name or name == "start_embedding":
                nn.init.zeros_(parameter)
            elif "norm" not in name:
                nn.init.trunc_normal_(parameter, std=0.02)

    # ------------------------------------------------------------------------------------------------------ calling

    def forward(
        self,
        indices: torch.Tensor | None = None,
        class_labels: torch.Tensor | None = None,
        cache: RandomOrderCache | None = None,
        orders: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> AutoregressiveOutput | tuple[tuple[torch.Tensor, ...]]:
        """Score the indices of whole grids, in any order, or with a cache, the next index in raster order.

        Args:
            indices: `(B, 1, h, w)`, or with a cache those that follow what it holds, `(B, n)`.
            class_labels: `(B,)` integers in [0, `num_classes`]; with a cache, at the start alone.
            cache: From `allocate_cache`; it is changed.
            orders: `(B, h * w)` from `sample_orders`, without a cache; raster order by default.
            return_dict: Return an output object rather than a tuple.

        Returns:
            `.logits`, see `AutoregressiveOutput`. Those of a whole grid stand at the positions they predict, and
            depend on the class and on the indices of positions that are earlier in the order.

        Raises:
            ValueError: If the shapes are others, or the grid is full.
        """
        if cache is None:
            logits = self._score(indices, class_labels, orders)
        elif orders is not None:
            raise ValueError("With a cache the order is raster order.")
        else:
            logits = self._next_logits(indices, class_labels, cache)
        return AutoregressiveOutput(logits=(logits,)) if return_dict else ((logits,),)

    def allocate_cache(self, batch_size: int, sample_size: Sequence[int] | None = None) -> RandomOrderCache:
        """Make room for one generation.

        Args:
            batch_size: Sequences decoded together; guidance doubles them.
            sample_size: Rows and columns: those of the config, if any.

        Returns:
            An empty cache in the model's dtype.

        Raises:
            ValueError: If the grid is another.
        """
        config = self.config
        self._check_grid(config.sample_size if sample_size is None else sample_size)
        heads, positions = config.num_attention_heads, prod(config.sample_size)
        shape = (config.num_layers, batch_size, heads, 1 + positions, config.hidden_size // heads)
        return RandomOrderCache(KeyValueCache(*shape, dtype=self.dtype, device=self.device))

    def _score(
        self, indices: torch.Tensor | None, class_labels: torch.Tensor | None, orders: torch.Tensor | None
    ) -> torch.Tensor:
        """Logits `(B, h, w, codes)`."""
        if indices is None or class_labels is None:
            raise ValueError("Without a cache, both indices and class_labels are needed.")
        if indices.ndim != 4 or indices.shape[1] != 1:
            raise ValueError(f"Indices must have shape (B, 1, h, w), got {tuple(indices.shape)}.")
        self._check_grid(indices.shape[2:])
        indices = indices.flatten(1)  # (B, h * w)
        if orders is None:
            orders = torch.arange(indices.shape[1]).expand_as(indices)
        if orders.shape != indices.shape:
            raise ValueError(f"Orders must have shape {tuple(indices.shape)}, got {tuple(orders.shape)}.")
        orders = orders.to(indices.device)
        condition = self.class_embedding(class_labels)
        tokens = torch.cat([self._start(condition), self.code_embedding(indices.gather(1, orders[:, :-1]))], dim=1)
        tokens[:, 2:] += self.position_embedding[2 + orders[:, :-1]]
        tokens[:, 1:] += self.target_embedding[orders]
        logits = self._body(tokens, condition)[:, 1:]  # (B, h * w, codes) in the order
        back = orders.argsort(dim=1)[..., None].expand_as(logits)
        return logits.gather(1, back).unflatten(1, tuple(self.config.sample_size))

    def _next_logits(
        self, indices: torch.Tensor | None, class_labels: torch.Tensor | None, cache: RandomOrderCache
    ) -> torch.Tensor:
        """Logits `(B, codes)` of the index after those that the cache has seen and the new ones."""
        if (cache.condition is None) != (class_labels is not None):
            raise ValueError("class_labels start a sequence: they go with an empty cache, and with no other.")
        past, tokens = cache.body.length, []
        if class_labels is not None:
            cache.condition = self.class_embedding(class_labels)
            tokens.append(self._start(cache.condition))
        start = past + 2 * len(tokens)
        end = start if indices is None else start + indices.shape[1]
        cache.body.check_room(end - past)
        if indices is not None:
            tokens.append(self.code_embedding(indices) + self.position_embedding[start:end])
        targets = F.pad(self.target_embedding, (0, 0, 1, 0))[past:end]  # none for the start
        return self._body(torch.cat(tokens, dim=1) + targets, cache.condition, cache.body)[:, -1]

    def _start(self, condition: torch.Tensor) -> torch.Tensor:
        """The two tokens before the grid, `(B, 2, hidden_size)`: a learned one and the class."""
        start = self.start_embedding.expand_as(condition)
        return torch.stack([start, condition], dim=1) + self.position_embedding[:2]

    def _body(self, hidden: torch.Tensor, condition: torch.Tensor, cache: KeyValueCache | None = None) -> torch.Tensor:
        """`(B, N, hidden_size)` tokens, positions added, to logits `(B, N, codes)`, float32."""
        past, count = (cache.length if cache else 0), hidden.shape[1]
        condition = F.silu(condition[:, None] + self.step_embedding[past : past + count])
        hidden = run_blocks(self, hidden, condition, cache)
        scale, shift = self.norm_modulation(condition).chunk(2, dim=-1)  # the other way round than in the blocks
        return self.output(self.norm(hidden) * (1 + scale) + shift).float()

    def _check_grid(self, grid: Sequence[int]) -> None:
        if tuple(grid) != tuple(self.config.sample_size):
            raise ValueError(f"The grid must be {tuple(self.config.sample_size)}, got {tuple(grid)}: it is learned.")
