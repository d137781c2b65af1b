"""What makes a tokenizer discrete."""

from typing import Protocol, runtime_checkable

import torch

from .quantizers import QuantizerOutput


@runtime_checkable
class DiscreteTokenizer(Protocol):
    """A tokenizer with codebooks, whatever its class: beside `encode` and `decode` it has these."""

    @property
    def codebook_sizes(self) -> dict[str, int]:
        """Codes of every codebook by name, in the order of the indices."""
        ...

    def quantize(self, latents: torch.Tensor) -> QuantizerOutput:
        """Replace latents `(B, C, h, w)` by codes; `.indices` are `(B, codebooks, h, w)`."""
        ...

    def indices_to_latents(self, indices: torch.Tensor) -> torch.Tensor:
        """Return the latents `(B, C, h, w)` that `quantize` gave with these indices."""
        ...

    def code_distances(self, latents: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        """Return how far latents are from their codes, as the look-up measures it: `(B, codebooks, h, w)`."""
        ...
