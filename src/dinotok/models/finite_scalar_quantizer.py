"""Finite scalar quantization: a quantizer without a codebook to learn."""

import math

import torch
from torch import nn

from .quantizers import QuantizerOutput, checked_indices, straight_through


class FiniteScalarQuantizer(nn.Module):
    """Round every channel to a few levels (FSQ, Mentzer et al. 2023, section 3.1 and appendix A.1).

    The implied codebook is the product of the levels; nothing is trained, and there is no loss.

    Args:
        levels: How many values each channel can take, at least 2 each; `[8, 5, 5, 5]` is the paper's for 1,000 codes.

    Raises:
        ValueError: If a channel has fewer than 2 levels.
    """

    def __init__(self, levels: list[int]):
        super().__init__()
        if not levels or min(levels) < 2:
            raise ValueError(f"levels={levels} must be at least 2 each.")
        self.levels = list(levels)
        self.codebook_size = math.prod(levels)

    def forward(self, latents: torch.Tensor) -> QuantizerOutput:
        """Round latents `(B, len(levels), h, w)`; the gradient is that of the tanh that bounds them.

        Raises:
            ValueError: If the shape is another.
        """
        if latents.ndim != 4 or latents.shape[1] != len(self.levels):
            raise ValueError(f"Latents must have shape (B, {len(self.levels)}, h, w), got {tuple(latents.shape)}.")
        levels = self._per_channel(self.levels, latents)
        half, offset = (levels - 1) * 1.001 / 2, (levels % 2 == 0) / 2  # an even number of levels is not symmetric
        bounded = (latents.float() + (offset / half).atanh()).tanh() * half - offset
        digits = bounded.round() + levels // 2  # 0 to levels - 1
        indices = (digits.long() * self._per_channel(self._strides(), latents).long()).sum(1)
        codes = straight_through(bounded / (levels // 2), digits / (levels // 2) - 1)
        return QuantizerOutput(codes.to(latents.dtype), indices, codes.new_zeros(()))

    def indices_to_latents(self, indices: torch.Tensor) -> torch.Tensor:
        """Return the codes `(B, len(levels), h, w)` in [-1, 1], float32, of integer indices `(B, h, w)`.

        Raises:
            ValueError: If an index is outside `[0, codebook_size)`.
        """
        indices = checked_indices(indices, self.codebook_size)[:, None]
        levels, strides = self._per_channel(self.levels, indices), self._per_channel(self._strides(), indices)
        digits = indices // strides.long() % levels.long()
        return digits / (levels // 2) - 1

    def _strides(self) -> list[int]:
        return [math.prod(self.levels[:channel]) for channel in range(len(self.levels))]

    @staticmethod
    def _per_channel(values: list[int], like: torch.Tensor) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float32, device=like.device).view(-1, 1, 1)
