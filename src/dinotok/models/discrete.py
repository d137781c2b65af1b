"""What makes a tokenizer discrete, and what the discrete tokenizers share."""

from collections.abc import Iterable
from typing import Protocol, Self, runtime_checkable

import torch
import torch.distributed
from diffusers.models.autoencoders.vae import DecoderOutput

from ..statistics import ReservoirSample
from .quantizers import QuantizerOutput
from .tokenizer_model import TokenizerModel


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


class DiscreteTokenizerModel(TokenizerModel):
    """Base of the tokenizers with codebooks, named before that of the tokenizer whose latents they quantize.

    A subclass sets `num_codebooks` and defines what `DiscreteTokenizer` asks for, and `_fit_quantizers`.

    Attributes:
        num_codebooks: Indices per position.
    """

    num_codebooks: int
    _any_codebook = "a codebook"  # in errors: "the codebook" where there is never more than one
    _coding_modules: tuple[str, ...]  # what decides the indices of a picture, beside the frozen encoder

    @property
    def codebook_sizes(self) -> dict[str, int]:
        """Codes of every codebook by name, in the order of the indices."""
        raise NotImplementedError

    @property
    def code_vectors(self) -> dict[str, torch.Tensor]:
        """The vectors `(codes, width)` of every codebook by name, in the space where it compares them."""
        raise NotImplementedError

    def freeze_coding(self) -> None:
        """Exclude from training what decides the indices of a picture, so that only what decodes them is trained."""
        for name, module in self.named_children():
            if name in self._coding_modules:
                module.requires_grad_(False)

    def quantize(self, latents: torch.Tensor) -> QuantizerOutput:
        """Replace latents by codes; see `DiscreteTokenizer`."""
        raise NotImplementedError

    def encode_to_indices(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return the indices of pictures.

        Args:
            pixels: `(B, 3, H, W)` in [-1, 1], of a size that `encode` takes.

        Returns:
            `(B, num_codebooks, *latent_grid(H, W))` int64, in the order of `codebook_sizes`.
        """
        return self.quantize(self.encode(pixels).latent).indices

    def forward(self, sample: torch.Tensor, return_dict: bool = True) -> DecoderOutput | tuple[torch.Tensor, ...]:
        """Return the reconstruction of pixels from their codes, `commit_loss` being the quantizers' loss.

        Without dropout this equals `decode(indices_to_latents(encode_to_indices(sample)))` in every mode.
        """
        quantized = self.quantize(self.encode(sample, return_dict=False)[0])
        decoded = self.decode(quantized.latents, return_dict=False)[0]
        return DecoderOutput(sample=decoded, commit_loss=quantized.loss) if return_dict else (decoded,)

    def _check_indices(self, indices: torch.Tensor) -> None:
        self._check_grid("Indices", indices, self.num_codebooks)

    # ------------------------------------------------------------------------------------------- closed-form start

    @torch.no_grad()
    def fit(
        self,
        batches: Iterable[torch.Tensor],
        *,
        generator: torch.Generator | None = None,
        max_tokens: int = 262144,
        num_iterations: int = 20,
    ) -> Self:
        """Set the codebooks to k-means centres of the tokens of pictures, in one pass over them.

        The class says what else it finds; the rest of the model stays. Under `torch.distributed` every process passes
        its share and all end with the same codebooks.

        Args:
            batches: An iterable of `(B, 3, H, W)` pixels in [-1, 1], of sizes that `encode` takes; they may differ
                between batches.
            generator: For the sample and the start of k-means; on the CPU. Seed 0 by default.
            max_tokens: Size of the uniform sample, which is kept in CPU memory: `4 * latent_channels` bytes each.
            num_iterations: Of k-means.

        Returns:
            The model.

        Raises:
            ValueError: If a batch is not of that form, or there are fewer tokens than codes.
        """
        latents = (self.encode(pixels).latent for pixels in self._pixel_batches(batches))
        return self.fit_codebooks(latents, generator=generator, max_tokens=max_tokens, num_iterations=num_iterations)

    @torch.no_grad()
    def fit_codebooks(
        self,
        latents: Iterable[torch.Tensor],
        *,
        generator: torch.Generator | None = None,
        max_tokens: int = 262144,
        num_iterations: int = 20,
    ) -> Self:
        """Do what `fit` does, from latents that are computed already.

        Args:
            latents: An iterable of `(B, latent_channels, h, w)`, as `encode` returns them.
            generator: As in `fit`, and so are the others.
            max_tokens: Likewise.
            num_iterations: Likewise.

        Returns:
            The model.

        Raises:
            ValueError: If there are fewer tokens than codes.
        """
        generator = torch.Generator().manual_seed(0) if generator is None else generator
        self._fit_quantizers((batch.to(self.device) for batch in latents), max_tokens, generator, num_iterations)
        return self

    def _fit_quantizers(
        self, batches: Iterable[torch.Tensor], max_tokens: int, generator: torch.Generator, num_iterations: int
    ) -> None:
        """Fit every quantizer to a sample, from `_sample_rows`, of what it sees of latents on the model's device."""
        raise NotImplementedError

    def _sample_rows(self, rows: Iterable[torch.Tensor], max_tokens: int, generator: torch.Generator) -> torch.Tensor:
        """A uniform sample `(max_tokens or fewer, D)` of rows `(N, D)`, over all processes; enough for the codes."""
        codes = max(self.codebook_sizes.values())
        if max_tokens < codes:
            raise ValueError(f"max_tokens={max_tokens} is less than the {codes} codes of {self._any_codebook}.")
        seed = int(torch.randint(2**62, (1,), generator=generator))
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            seed += torch.distributed.get_rank()
        sample = ReservoirSample(max_tokens, torch.Generator().manual_seed(seed))
        for batch in rows:
            sample.update(batch)
        sample.all_gather()
        if len(sample) < codes:
            raise ValueError(f"fit saw {len(sample)} tokens; at least one for each of the {codes} codes is needed.")
        return sample.rows
