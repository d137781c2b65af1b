"""The denoiser: a class-conditional diffusion transformer on latents, with an optional wide and shallow head."""

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin, AttentionModuleMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import set_weights_and_activate_adapters
from torch import nn

from .buffers import Float32Module
from .transformer_layers import SwiGLU, rotary_angles, sincos_positions

_NUM_FREQUENCIES = 256


class DiffusionTransformer2DModel(ModelMixin, AttentionMixin, ConfigMixin, PeftAdapterMixin):
    """Predict the velocity of noisy latents: LightningDiT (arXiv 2501.01423), and on request RAE's DiT-DH.

    The body is a DiT with RMSNorm, SwiGLU, rotary positions on both axes beside a fixed sine-cosine table, and
    adaLN-Zero conditioning on time and class. In the usual form its tokens are projected to the velocity. With
    `head_hidden_size` they only condition, token by token, a second transformer, which reads the noisy latents again
    and is wide and shallow: a denoiser should not be narrower than the latents have channels (RAE, arXiv 2510.11690).
    Grids may have any size and shape; nothing in the weights depends on it.

    Untrained, it predicts zero everywhere.

    Args:
        in_channels: Channels of the latents.
        num_classes: Classes; the label `num_classes` stands for none of them (classifier-free guidance).
        sample_size: Rows and columns of the latents it is trained on: a pipeline's default, no limit.
        patch_size: Side of the square of latents that makes a token.
        hidden_size: Width of the body.
        num_layers: Its blocks.
        num_attention_heads: Its heads; their width must be a multiple of 4.
        mlp_ratio: Width of a plain feed-forward layer over that of the tokens; the gated one has two thirds of it, and
            so as many parameters.
        qk_norm: RMSNorm on queries and keys.
        head_hidden_size: Width of the head; `None` for no head.
        head_num_layers: Its blocks.
        head_num_attention_heads: Its heads.

    Raises:
        ValueError: If a width does not fit its number of heads.
    """

    main_input_name = "hidden_states"
    _supports_gradient_checkpointing = True
    _supports_group_offloading = True
    _no_split_modules = ["DiffusionTransformerBlock"]
    _repeated_blocks = ["DiffusionTransformerBlock"]
    _keep_in_fp32_modules = ["time_embedding"]
    _skip_layerwise_casting_patterns = ["patch_embedding", "time_embedding", "class_embedding", "norm"]

    @register_to_config
    def __init__(
        self,
        in_channels: int = 832,
        num_classes: int = 1000,
        sample_size: int = 16,
        patch_size: int = 1,
        hidden_size: int = 1152,
        num_layers: int = 28,
        num_attention_heads: int = 16,
        mlp_ratio: float = 4.0,
        qk_norm: bool = False,
        head_hidden_size: int | None = None,
        head_num_layers: int = 2,
        head_num_attention_heads: int = 16,
    ):
        super().__init__()
        _check_heads("hidden_size", hidden_size, num_attention_heads)
        patch_channels = in_channels * patch_size**2
        self.patch_embedding = nn.Linear(patch_channels, hidden_size)
        self.time_embedding = TimeEmbedding(hidden_size)
        self.class_embedding = nn.Embedding(num_classes + 1, hidden_size)
        self.blocks = nn.ModuleList(
            DiffusionTransformerBlock(hidden_size, num_attention_heads, mlp_ratio, qk_norm) for _ in range(num_layers)
        )
        self.has_head = head_hidden_size is not None
        if head_hidden_size is not None:
            _check_heads("head_hidden_size", head_hidden_size, head_num_attention_heads)
            same = head_hidden_size == hidden_size
            self.head_projection = nn.Identity() if same else nn.Linear(hidden_size, head_hidden_size)
            self.head_patch_embedding = nn.Linear(patch_channels, head_hidden_size)
            self.head_blocks = nn.ModuleList(
                DiffusionTransformerBlock(head_hidden_size, head_num_attention_heads, mlp_ratio, qk_norm)
                for _ in range(head_num_layers)
            )
        self.output = ModulatedOutput(head_hidden_size or hidden_size, patch_channels)
        self.gradient_checkpointing = False
        self._initialize()

    def _initialize(self) -> None:
        """Xavier-uniform matrices, small embeddings, and zeros where a block or the output begins to act."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for weight in (self.class_embedding.weight, *(p for p in self.time_embedding.parameters() if p.ndim == 2)):
            nn.init.normal_(weight, std=0.02)
        for module in self.modules():
            if isinstance(module, DiffusionTransformerBlock | ModulatedOutput):
                nn.init.zeros_(module.modulation.weight)
                nn.init.zeros_(module.modulation.bias)
        nn.init.zeros_(self.output.projection.weight)
        nn.init.zeros_(self.output.projection.bias)

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        class_labels: torch.Tensor,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[torch.Tensor]:
        """Predict `noise - latents` from `(1 - t) latents + t noise`.

        Args:
            hidden_states: `(B, in_channels, h, w)` noisy latents; h and w multiples of `patch_size`.
            timestep: `(B,)` or a scalar: the time t in [0, 1], 1 is noise. Schedulers of diffusers count to
                `num_train_timesteps`: divide by it.
            class_labels: `(B,)` int64 in [0, num_classes]; `num_classes` is the null class.
            return_dict: Return an output object rather than a tuple.

        Returns:
            `.sample` of the shape of `hidden_states`.

        Raises:
            ValueError: If the latents have another shape, or the time is an integer.
        """
        self._check_input(hidden_states, timestep)
        batch, _, height, width = hidden_states.shape
        rows, columns = height // self.config.patch_size, width // self.config.patch_size
        patches = _patchify(hidden_states, self.config.patch_size)  # (B, N, patch_channels)
        time = self.time_embedding(timestep.expand(batch))  # (B, D)
        condition = time + self.class_embedding(class_labels)  # (B, D)
        positions = sincos_positions(rows, columns, self.config.hidden_size, device=patches.device)  # (N, D)
        tokens = self.patch_embedding(patches)
        tokens = tokens + positions.to(tokens.dtype)  # (B, N, D)
        condition = (F.silu(condition) if self.has_head else condition)[:, None].to(tokens.dtype)  # (B, 1, D)
        tokens = self._run(self.blocks, tokens, condition, self._turns(rows, columns, head=False))  # (B, N, D)
        if self.has_head:
            condition = self.head_projection(F.silu(time[:, None] + tokens).to(tokens.dtype))  # (B, N, D_head)
            tokens = self.head_patch_embedding(patches)  # (B, N, D_head)
            tokens = self._run(self.head_blocks, tokens, condition, self._turns(rows, columns, head=True))
        velocity = self.output(tokens, condition)  # (B, N, patch_channels)
        sample = _unpatchify(velocity, rows, columns, self.config.patch_size)  # (B, in_channels, h, w)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def _check_input(self, latents: torch.Tensor, timestep: torch.Tensor) -> None:
        channels, patch_size = self.config.in_channels, self.config.patch_size
        if latents.ndim != 4 or latents.shape[1] != channels:
            raise ValueError(f"Latents must have shape (B, {channels}, h, w), got {tuple(latents.shape)}.")
        if latents.shape[2] % patch_size or latents.shape[3] % patch_size:
            raise ValueError(f"Latents of {tuple(latents.shape[2:])} are no multiple of patch_size={patch_size}.")
        if not timestep.is_floating_point():
            raise ValueError(f"timestep must be a floating-point time in [0, 1], got {timestep.dtype}.")

    def _turns(self, rows: int, columns: int, head: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and signed sines of the rotary positions, `(N, 1, head_dim)` float32; see `_turn`."""
        config = self.config
        head_dim = config.hidden_size // config.num_attention_heads
        if head:
            head_dim = config.head_hidden_size // config.head_num_attention_heads
        angles = rotary_angles(rows, columns, head_dim, device=self.class_embedding.weight.device)[:, None]
        cos, sin = angles.cos(), angles.sin()
        return cos.repeat_interleave(2, dim=-1), torch.stack([-sin, sin], dim=-1).flatten(-2)

    def _run(
        self,
        blocks: nn.ModuleList,
        tokens: torch.Tensor,
        condition: torch.Tensor,
        turns: tuple[torch.Tensor, torch.Tensor],
    ) -> torch.Tensor:
        for block in blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                tokens = self._gradient_checkpointing_func(block, tokens, condition, *turns)
            else:
                tokens = block(tokens, condition, *turns)
        return tokens

    def set_adapters(self, adapter_names: list[str] | str, weights: float | list[float | None] | None = None) -> None:
        """Activate loaded LoRA adapters with the given strengths.

        diffusers' method looks the model's class up in a table of its own classes.

        Args:
            adapter_names: One or several names.
            weights: One strength for all or one for each; 1 by default.

        Raises:
            ValueError: If the numbers of names and weights differ, or a name is not loaded.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        strengths = weights if isinstance(weights, list) else [weights] * len(names)
        if len(names) != len(strengths):
            raise ValueError(f"{len(names)} adapters were named, but {len(strengths)} weights given.")
        loaded = sorted(getattr(self, "peft_config", {}))
        for name in names:
            if name not in loaded:
                raise ValueError(f"There is no adapter {name!r}; loaded are {loaded}.")
        strengths = [1.0 if strength is None else strength for strength in strengths]
        set_weights_and_activate_adapters(self, names, strengths)


class TimeEmbedding(nn.Module):
    """Random Fourier features of the time (Tancik et al., arXiv 2006.10739), then two layers, all in float32.

    Args:
        hidden_size: Width of the result.
    """

    def __init__(self, hidden_size: int):
        super().__init__()
        self.features = FourierFeatures(_NUM_FREQUENCIES)
        self.inner = Float32Linear(2 * _NUM_FREQUENCIES, hidden_size)
        self.outer = Float32Linear(hidden_size, hidden_size)

    def forward(self, timestep: torch.Tensor) -> torch.Tensor:
        """Map `(B,)` times in [0, 1] to `(B, hidden_size)`."""
        return self.outer(F.silu(self.inner(self.features(timestep))))


class FourierFeatures(Float32Module):
    """Sines and cosines of `2 pi w t` for fixed frequencies w drawn from N(0, 1).

    The frequencies are a frozen parameter, not a buffer: diffusers' `EMAModel` saves parameters only.

    Args:
        num_frequencies: Half the width of the result.
    """

    def __init__(self, num_frequencies: int):
        super().__init__()
        self.frequencies = nn.Parameter(torch.randn(num_frequencies), requires_grad=False)

    def forward(self, timestep: torch.Tensor) -> torch.Tensor:
        """Map `(B,)` to `(B, 2 * num_frequencies)` float32."""
        angles = 2 * torch.pi * timestep.float()[:, None] * self.frequencies.detach().float()
        return torch.cat([angles.sin(), angles.cos()], dim=-1)


class Float32Linear(Float32Module, nn.Linear):
    """A linear layer that keeps float32."""


class DiffusionTransformerBlock(nn.Module):
    """Attention and a gated feed-forward layer, each shifted, scaled and gated by a condition (adaLN-Zero, DiT).

    Args:
        hidden_size: Width.
        num_attention_heads: Heads.
        mlp_ratio: See `DiffusionTransformer2DModel`.
        qk_norm: RMSNorm on queries and keys.
    """

    def __init__(self, hidden_size: int, num_attention_heads: int, mlp_ratio: float, qk_norm: bool):
        super().__init__()
        self.attention_norm = nn.RMSNorm(hidden_size, eps=1e-6)
        self.attention = RotaryAttention(hidden_size, num_attention_heads, qk_norm)
        self.feed_forward_norm = nn.RMSNorm(hidden_size, eps=1e-6)
        self.feed_forward = SwiGLU(hidden_size, feed_forward_width(hidden_size, mlp_ratio), bias=True)
        self.modulation = nn.Linear(hidden_size, 6 * hidden_size)

    def forward(
        self, tokens: torch.Tensor, condition: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> torch.Tensor:
        """Map `(B, N, D)` tokens under a condition `(B, 1, D)` or `(B, N, D)` to the same shape."""
        shift, scale, gate, shift_2, scale_2, gate_2 = self.modulation(F.silu(condition)).chunk(6, dim=-1)
        hidden = torch.addcmul(shift, self.attention_norm(tokens), 1 + scale)
        tokens = torch.addcmul(tokens, gate, self.attention(hidden, cos, sin))
        hidden = torch.addcmul(shift_2, self.feed_forward_norm(tokens), 1 + scale_2)
        return torch.addcmul(tokens, gate_2, self.feed_forward(hidden))


class RotaryAttentionProcessor:
    """Full self-attention through diffusers' dispatcher, so that `set_attention_backend` applies."""

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self, attention: "RotaryAttention", hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> torch.Tensor:
        """Map `(B, N, D)` to the same shape."""
        if attention.fused_projections:
            parts = attention.to_qkv(hidden).chunk(3, dim=-1)
        else:
            parts = attention.to_q(hidden), attention.to_k(hidden), attention.to_v(hidden)
        query, key, value = (
            part.unflatten(-1, (attention.num_heads, -1)) for part in parts
        )  # (B, N, heads, head_dim)
        query = _turn(attention.query_norm(query), cos, sin)
        key = _turn(attention.key_norm(key), cos, sin)
        mixed = dispatch_attention_fn(
            query, key, value, backend=self._attention_backend, parallel_config=self._parallel_config
        )
        return attention.to_out[0](mixed.flatten(2).to(hidden.dtype))


class RotaryAttention(nn.Module, AttentionModuleMixin):
    """Self-attention with rotary positions; its layers have the names that LoRA recipes for diffusers expect.

    Args:
        hidden_size: Width.
        num_attention_heads: Heads.
        qk_norm: RMSNorm on queries and keys, per head.
    """

    _default_processor_cls = RotaryAttentionProcessor
    _available_processors = [RotaryAttentionProcessor]
    _supports_qkv_fusion = True
    to_qkv: nn.Linear  # made by `fuse_projections`

    def __init__(self, hidden_size: int, num_attention_heads: int, qk_norm: bool):
        super().__init__()
        head_dim = hidden_size // num_attention_heads
        self.num_heads = num_attention_heads
        self.use_bias = True  # read by `fuse_projections`
        self.to_q = nn.Linear(hidden_size, hidden_size)
        self.to_k = nn.Linear(hidden_size, hidden_size)
        self.to_v = nn.Linear(hidden_size, hidden_size)
        self.query_norm = nn.RMSNorm(head_dim, eps=1e-6) if qk_norm else nn.Identity()
        self.key_norm = nn.RMSNorm(head_dim, eps=1e-6) if qk_norm else nn.Identity()
        self.to_out = nn.ModuleList([nn.Linear(hidden_size, hidden_size)])
        self.processor = RotaryAttentionProcessor()

    def forward(self, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Map `(B, N, D)` to the same shape; `cos` and `sin` are `(N, 1, head_dim)`."""
        return self.processor(self, hidden, cos, sin)


class ModulatedOutput(nn.Module):
    """Normalise, shift and scale by a condition, and project to the patches.

    Args:
        hidden_size: Width of the tokens.
        patch_channels: Width of the result.
    """

    def __init__(self, hidden_size: int, patch_channels: int):
        super().__init__()
        self.norm = nn.RMSNorm(hidden_size, eps=1e-6)
        self.modulation = nn.Linear(hidden_size, 2 * hidden_size)
        self.projection = nn.Linear(hidden_size, patch_channels)

    def forward(self, tokens: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """Map `(B, N, D)` to `(B, N, patch_channels)`."""
        shift, scale = self.modulation(F.silu(condition)).chunk(2, dim=-1)
        return self.projection(torch.addcmul(shift, self.norm(tokens), 1 + scale))


def _turn(values: torch.Tensor, cos: torch.Tensor, signed_sin: torch.Tensor) -> torch.Tensor:
    """What `rotate` computes, several times faster on a CPU, from tables with both members of each pair.

    `cos` holds every cosine twice, `signed_sin` `(-sin, sin)` for each pair.
    """
    real = values.float()
    swapped = real.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return torch.addcmul(real * cos, swapped, signed_sin).to(values.dtype)


def feed_forward_width(hidden_size: int, mlp_ratio: float) -> int:
    """Return the width of a gated feed-forward layer with the parameters of a plain one `mlp_ratio` times as wide."""
    return int(2 / 3 * int(hidden_size * mlp_ratio))


def _patchify(latents: torch.Tensor, size: int) -> torch.Tensor:
    """`(B, C, h, w)` to `(B, N, C * size ** 2)`, channels first within a patch."""
    patches = latents.unflatten(3, (-1, size)).unflatten(2, (-1, size))  # (B, C, rows, size, columns, size)
    return patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def _unpatchify(patches: torch.Tensor, rows: int, columns: int, size: int) -> torch.Tensor:
    """The inverse of `_patchify`."""
    patches = patches.unflatten(2, (-1, size, size)).unflatten(1, (rows, columns))  # (B, rows, columns, C, size, size)
    return patches.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


def _check_heads(name: str, width: int, heads: int) -> None:
    if width % heads or width // heads % 4:
        raise ValueError(f"{name}={width} does not give {heads} heads a width that is a multiple of 4.")
