"""Class-conditional autoregressive transformer on visual tokens, with one or several indices per position."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from torch import nn

from .causal_attention import CausalSelfAttention, KeyValueCache, Rotary, causal_mask, run_blocks
from .transformer_layers import SwiGLU, rotary_angles


@dataclass
class AutoregressiveOutput(BaseOutput):
    """What the autoregressive transformers return.

    Attributes:
        logits: Float32. Of a whole grid, one tensor `(B, h, w, codes)` for each codebook, which scores the indices
            given, or of chosen positions `(B, P, codes)`; of a decoding step, a single `(B, codes)` for the next
            index.
    """

    logits: tuple[torch.Tensor, ...]


class AutoregressiveCache:
    """The state of one generation with an `AutoregressiveTransformer2DModel`; see its `allocate_cache`.

    Attributes:
        body: Keys and values of class token and positions.
        head: Keys and values of the present position's indices.
        rotary: Cosines and sines of the grid.
        hidden: `(B, 1, hidden_size)`: the state that predicts the present position; `None` before the start.
        pending: `(B, n)`: the indices of the present position that are chosen already; `None` before the start.
    """

    def __init__(self, body: KeyValueCache, head: KeyValueCache, rotary: Rotary):
        self.body = body
        self.head = head
        self.rotary = rotary
        self.hidden: Any = None
        self.pending: Any = None


class AutoregressiveBlock(nn.Module):
    """Pre-norm block: attention, then a gated feed-forward layer.

    Args:
        hidden_size: Width.
        intermediate_size: Width inside the feed-forward layer.
        num_heads: Heads.
        dropout: Of both branches.
        norm_eps: Of the norms.
    """

    def __init__(self, hidden_size: int, intermediate_size: int, num_heads: int, dropout: float, norm_eps: float):
        super().__init__()
        self.attention_norm = nn.RMSNorm(hidden_size, eps=norm_eps)
        self.attention = CausalSelfAttention(hidden_size, num_heads, dropout)
        self.feed_forward_norm = nn.RMSNorm(hidden_size, eps=norm_eps)
        self.feed_forward = SwiGLU(hidden_size, intermediate_size)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        hidden: torch.Tensor,
        rotary: Rotary | None = None,
        mask: torch.Tensor | None = None,
        cache: KeyValueCache | None = None,
        layer: int = 0,
    ) -> torch.Tensor:
        """Map `(..., N, hidden_size)` to the same shape; the arguments are those of `CausalSelfAttention`."""
        hidden = hidden + self.attention(self.attention_norm(hidden), rotary, mask, cache, layer)
        return hidden + self.dropout(self.feed_forward(self.feed_forward_norm(hidden)))


class TiedEmbedding(nn.Module):
    """The vectors of a codebook that belong to another module, brought to another width.

    Args:
        table: The codebook's embedding; it is not part of this module's weights.
        width: Of the result.
    """

    def __init__(self, table: nn.Embedding, width: int):
        super().__init__()
        self.projection = nn.Linear(table.embedding_dim, width, bias=False)
        self._table = (table,)

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        """Map `(...)` indices to `(..., width)`."""
        return self.projection(self._table[0](indices))


class TiedOutput(nn.Module):
    """Scores of codes: inner products with the vectors of a codebook that belong to another module.

    Args:
        width: Of the states.
        table: The codebook's embedding; it is not part of this module's weights.
    """

    def __init__(self, width: int, table: nn.Embedding):
        super().__init__()
        self.projection = nn.Linear(width, table.embedding_dim, bias=False)
        self._table = (table,)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Map `(..., width)` to `(..., codes)`."""
        return F.linear(self.projection(states), self._table[0].weight)


class IndexHead(nn.Module):
    """Predicts the indices of a position, each given those before it in the order of the codebooks.

    A causal transformer over the short sequence `[state, index 1, index 2, ...]` of one position, the design of MGVQ
    (arXiv 2507.07997). With `depth` 0 there is none: every index is predicted from the state alone, independently.

    Args:
        codebook_sizes: Codes of every codebook.
        hidden_size: Width.
        intermediate_size: As in `AutoregressiveBlock`, and so are `num_heads`, `dropout` and `norm_eps`.
        depth: Blocks.
        tables: Embeddings to tie the codebooks' vectors and scores to; the head has its own without.
    """

    def __init__(
        self,
        codebook_sizes: Sequence[int],
        hidden_size: int,
        intermediate_size: int,
        num_heads: int,
        depth: int,
        dropout: float,
        norm_eps: float,
        tables: Sequence[nn.Embedding] = (),
    ):
        super().__init__()
        self.embeddings = nn.ModuleList()
        self.norm: nn.Module = nn.Identity()
        if depth:
            if tables:
                self.embeddings.extend(TiedEmbedding(table, hidden_size) for table in tables[:-1])
            else:
                self.embeddings.extend(nn.Embedding(size, hidden_size) for size in codebook_sizes[:-1])
            self.positions = nn.Parameter(torch.zeros(len(codebook_sizes), hidden_size))
            self.norm = nn.RMSNorm(hidden_size, eps=norm_eps)
        self.blocks = nn.ModuleList(
            AutoregressiveBlock(hidden_size, intermediate_size, num_heads, dropout, norm_eps) for _ in range(depth)
        )
        self.outputs = nn.ModuleList(
            [TiedOutput(hidden_size, table) for table in tables]
            or [nn.Linear(hidden_size, size, bias=False) for size in codebook_sizes]
        )

    def forward(self, hidden: torch.Tensor, indices: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Score the indices of whole positions.

        Args:
            hidden: `(B, N, hidden_size)`, a state for each position.
            indices: `(B, K, N)`.

        Returns:
            Logits `(B, N, codes)` of every codebook, float32.
        """
        states = [hidden] * len(self.outputs)
        if self.blocks:
            tokens = self._tokens(hidden, indices[:, :-1].transpose(1, 2))  # (B, N, K, hidden_size)
            for block in self.blocks:
                tokens = block(tokens)
            states = list(self.norm(tokens).unbind(-2))
        return tuple(output(state).float() for output, state in zip(self.outputs, states, strict=True))

    def next_logits(self, hidden: torch.Tensor, chosen: torch.Tensor, cache: KeyValueCache) -> torch.Tensor:
        """Score the next index of one position.

        Args:
            hidden: `(B, 1, hidden_size)`, the position's state.
            chosen: `(B, n)`: its indices so far.
            cache: Tokens of this position that were seen already.

        Returns:
            `(B, codes)` of codebook `n`, float32.
        """
        count = chosen.shape[1]
        if not self.blocks:
            return self.outputs[count](hidden[:, 0]).float()
        tokens = self._tokens(hidden, chosen[:, None])[:, 0, cache.length :]  # (B, new, hidden_size)
        mask = causal_mask(tokens.shape[1], cache.length, tokens.device)
        for layer, block in enumerate(self.blocks):
            tokens = block(tokens, None, mask, cache, layer)
        cache.advance(tokens.shape[1])
        return self.outputs[count](self.norm(tokens[:, -1])).float()

    def _tokens(self, hidden: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """States `(B, N, D)` and indices `(B, N, n)` to the head's sequences `(B, N, 1 + n, D)`."""
        embedded = [self.embeddings[k](chosen[..., k]) for k in range(chosen.shape[-1])]
        return torch.stack([hidden, *embedded], dim=-2) + self.positions[: 1 + chosen.shape[-1]]


class AutoregressiveTransformer2DModel(ModelMixin, ConfigMixin, PeftAdapterMixin):
    """Class-conditional decoder-only transformer over the indices of an image tokenizer, in raster order.

    The body is that of LlamaGen (Sun et al., arXiv 2406.06525), which VFMTok uses too (arXiv 2507.08441): a class
    token, then one token per position; RMSNorm, SwiGLU, and rotary positions of row and column. The class token's
    rotary row is zero instead of a rotation by zero, so its queries and keys vanish: released weights were trained
    that way.

    A tokenizer with several codebooks has several indices per position. The code vectors of a position are
    concatenated and projected to one token, so the sequence is as long as with one index; a small causal head predicts
    the indices of a position one after another. With one codebook and `head_depth=0` the model is LlamaGen's.

    Args:
        codebook_sizes: Codes of every codebook, in the order of the indices.
        num_classes: Classes; label `num_classes` is the null class of classifier-free guidance.
        sample_size: Rows and columns of the token grid trained on; other grids are allowed.
        hidden_size: Width.
        num_layers: Blocks of the body.
        num_attention_heads: Heads; `hidden_size / num_attention_heads` is a multiple of 4.
        intermediate_size: Width inside the feed-forward layers.
        head_depth: Blocks of the head; 0 predicts the indices of a position independently of each other.
        code_dims: Widths of the code vectors, which an MLP projects to the body's width. By default one codebook has
            vectors of the body's width and no projection, and several share that width equally.
        tie_codes: Score codes by their vectors, projected, in place of separate output weights. With narrow
            `code_dims` this saves most of a small model's weights.
        dropout: In training, of tokens, attention outputs and feed-forward outputs.
        norm_eps: Of the RMSNorms.
        rope_theta: Base of the rotary wave lengths.

    Raises:
        ValueError: If sizes do not fit each other.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["AutoregressiveBlock"]
    _repeated_blocks = ["AutoregressiveBlock"]
    _skip_layerwise_casting_patterns = ["embedding", "positions", "norm"]
    main_input_name = "indices"

    @register_to_config
    def __init__(
        self,
        codebook_sizes: Sequence[int] = (16384,),
        num_classes: int = 1000,
        sample_size: Sequence[int] = (16, 16),
        hidden_size: int = 768,
        num_layers: int = 12,
        num_attention_heads: int = 12,
        intermediate_size: int = 2048,
        head_depth: int = 0,
        code_dims: Sequence[int] | None = None,
        tie_codes: bool = False,
        dropout: float = 0.1,
        norm_eps: float = 1e-5,
        rope_theta: float = 10000.0,
    ):
        super().__init__()
        if not codebook_sizes or min(codebook_sizes) < 1:
            raise ValueError(f"codebook_sizes={list(codebook_sizes)} must name at least one codebook that has codes.")
        if hidden_size % (4 * num_attention_heads):
            raise ValueError(
                f"hidden_size={hidden_size} is not a multiple of 4 x num_attention_heads={num_attention_heads}."
            )
        if len(codebook_sizes) > 1 and code_dims is None:
            code_dims = [hidden_size // len(codebook_sizes)] * len(codebook_sizes)
        widths = [hidden_size] if code_dims is None else list(code_dims)
        if len(widths) != len(codebook_sizes):
            raise ValueError(f"code_dims={widths} does not have a width for each of {len(codebook_sizes)} codebooks.")
        self.class_embedding = nn.Embedding(num_classes + 1, hidden_size)
        tables = [nn.Embedding(size, width) for size, width in zip(codebook_sizes, widths, strict=True)]
        self.code_embeddings = nn.ModuleList(tables)
        self.code_projection: nn.Module = nn.Identity()
        if code_dims is not None:
            self.code_projection = nn.Sequential(
                nn.Linear(sum(widths), hidden_size),
                nn.GELU(),
                nn.Linear(hidden_size, hidden_size),
                nn.LayerNorm(hidden_size),
            )
        self.token_dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            AutoregressiveBlock(hidden_size, intermediate_size, num_attention_heads, dropout, norm_eps)
            for _ in range(num_layers)
        )
        self.norm = nn.RMSNorm(hidden_size, eps=norm_eps)
        self.head = IndexHead(
            codebook_sizes,
            hidden_size,
            intermediate_size,
            num_attention_heads,
            head_depth,
            dropout,
            norm_eps,
            tables if tie_codes else (),
        )
        self.gradient_checkpointing = False
        self._initialize_weights()

    def _initialize_weights(self) -> None:
        """Normal weights of standard deviation 0.02, zero outputs: the first loss is that of uniform guessing."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
            if isinstance(module, IndexHead) and module.blocks:
                nn.init.normal_(module.positions, std=0.02)
        for weight in self.head.outputs.parameters():
            nn.init.zeros_(weight)

    # ------------------------------------------------------------------------------------------------------ calling

    def forward(
        self,
        indices: torch.Tensor | None = None,
        class_labels: torch.Tensor | None = None,
        cache: AutoregressiveCache | None = None,
        return_dict: bool = True,
        positions: torch.Tensor | None = None,
    ) -> AutoregressiveOutput | tuple[tuple[torch.Tensor, ...]]:
        """Score the indices of whole grids, or with a cache, the next index.

        Whole grids (training): `model(indices, class_labels)` with indices `(B, K, h, w)`; the logits of an index
        depend on the class and on the indices before it, and no others.

        Decoding: `model(class_labels=labels, cache=cache)` starts, and `model(chosen, cache=cache)` goes on with the
        indices that follow what the cache holds, `(B, n)`, in the order (position, codebook). A start may come with
        indices too.

        Args:
            indices: Integers below their codebook's size.
            class_labels: `(B,)` integers in [0, `num_classes`].
            cache: From `allocate_cache`; it is changed.
            return_dict: Return an output object rather than a tuple.
            positions: `(B, P)` integers below `h * w`: of whole grids, score these positions only. The scores of large
                codebooks are most of a small model's work.

        Returns:
            `.logits`, see `AutoregressiveOutput`.

        Raises:
            ValueError: If the shapes are others, or the grid is full.
        """
        if cache is None:
            logits = self._score(indices, class_labels, positions)
        elif positions is not None:
            raise ValueError("positions are chosen of whole grids: with a cache there is one at a time.")
        else:
            logits = (self._next_logits(indices, class_labels, cache),)
        return AutoregressiveOutput(logits=logits) if return_dict else (logits,)

    def allocate_cache(self, batch_size: int, sample_size: Sequence[int] | None = None) -> AutoregressiveCache:
        """Make room for one generation.

        Args:
            batch_size: Sequences decoded together; guidance doubles them.
            sample_size: Rows and columns of the grid; by default the one trained on.

        Returns:
            An empty cache in the model's dtype.
        """
        config = self.config
        height, width = sample_size or config.sample_size
        head_dim = config.hidden_size // config.num_attention_heads
        where = {"dtype": self.dtype, "device": self.device}
        body = KeyValueCache(
            config.num_layers, batch_size, config.num_attention_heads, height * width, head_dim, **where
        )
        head = KeyValueCache(
            config.head_depth, batch_size, config.num_attention_heads, len(config.codebook_sizes), head_dim, **where
        )
        return AutoregressiveCache(body, head, self._rotary(height, width, self.device))

    def _score(
        self, indices: torch.Tensor | None, class_labels: torch.Tensor | None, positions: torch.Tensor | None
    ) -> tuple[torch.Tensor, ...]:
        """Logits of every codebook, `(B, h, w, codes)` or `(B, P, codes)`."""
        books = len(self.code_embeddings)
        if indices is None or class_labels is None:
            raise ValueError("Without a cache, both indices and class_labels are needed.")
        if indices.ndim != 4 or indices.shape[1] != books:
            raise ValueError(f"Indices must have shape (B, {books}, h, w), got {tuple(indices.shape)}.")
        height, width = indices.shape[2:]
        indices = indices.flatten(2)  # (B, K, h * w)
        tokens = torch.cat([self.class_embedding(class_labels)[:, None], self._embed(indices[:, :, :-1])], dim=1)
        hidden = self._body(tokens, self._rotary(height, width, tokens.device))  # (B, h * w, hidden_size)
        if positions is None:
            return tuple(logits.unflatten(1, (height, width)) for logits in self.head(hidden, indices))
        hidden = hidden.take_along_dim(positions[..., None], dim=1)
        return self.head(hidden, indices.take_along_dim(positions[:, None], dim=2))

    def _next_logits(
        self, indices: torch.Tensor | None, class_labels: torch.Tensor | None, cache: AutoregressiveCache
    ) -> torch.Tensor:
        """Logits `(B, codes)` of the index after those that the cache has seen and the new ones."""
        if (cache.hidden is None) != (class_labels is not None):
            raise ValueError("class_labels start a sequence: they go with an empty cache, and with no other.")
        tokens, pending = [], [cache.pending]
        if class_labels is not None:
            tokens.append(self.class_embedding(class_labels)[:, None])
            pending = [class_labels.new_empty(len(class_labels), 0)]
        if indices is not None:
            pending.append(indices)
        books = len(self.code_embeddings)
        chosen = torch.cat(pending, dim=1)
        complete = chosen.shape[1] - chosen.shape[1] % books
        if complete:
            tokens.append(self._embed(chosen[:, :complete].unflatten(1, (-1, books)).transpose(1, 2)))
        if tokens:
            cache.hidden = self._body(torch.cat(tokens, dim=1), cache.rotary, cache.body)[:, -1:]
            cache.head.reset()
        cache.pending = chosen[:, complete:]
        return self.head.next_logits(cache.hidden, cache.pending, cache.head)

    def _embed(self, indices: torch.Tensor) -> torch.Tensor:
        """`(B, K, N)` indices to `(B, N, hidden_size)` tokens."""
        vectors = [embedding(indices[:, k]) for k, embedding in enumerate(self.code_embeddings)]
        return self.code_projection(torch.cat(vectors, dim=-1))

    def _body(self, tokens: torch.Tensor, rotary: Rotary, cache: KeyValueCache | None = None) -> torch.Tensor:
        """`(B, N, hidden_size)` tokens to states; each predicts the position after it."""
        past, count = (cache.length if cache else 0), tokens.shape[1]
        if cache is not None:
            cache.check_room(count)
        rotary = (rotary[0][past : past + count], rotary[1][past : past + count])
        return self.norm(run_blocks(self, self.token_dropout(tokens), rotary, cache))

    def _rotary(self, height: int, width: int, device: torch.device) -> Rotary:
        """Cosines and sines `(1 + h * w, head_dim / 2)`: a zero row for the class token, then the grid."""
        head_dim = self.config.hidden_size // self.config.num_attention_heads
        angles = rotary_angles(height, width, head_dim, self.config.rope_theta, device)
        return F.pad(angles.cos(), (0, 0, 1, 0)), F.pad(angles.sin(), (0, 0, 1, 0))
