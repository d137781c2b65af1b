"""VFMTok: regions of a picture as tokens of one codebook (arXiv 2507.08441)."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_utils import ModelMixin  # noqa: F401  diffusers looks for this name when it loads us
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import nn

from .discrete import DiscreteTokenizerModel
from .quantizers import QuantizerOutput, VectorQuantizer, broadcast_state
from .region_tokenizer import RegionTokenizerModel
from .tokenizer_model import channels_last_rows


class VQModelVFMTok(DiscreteTokenizerModel, RegionTokenizerModel):
    """Discrete image tokenizer on regions of a frozen foundation model.

    The defaults, on DINOv2-L with registers, are the released model: pictures of 336 x 336 pixels become 256 tokens of
    a codebook with 16,384 codes on the unit sphere in 12 dimensions. On another backbone, what depends on it follows
    from it.

    `encode` gives the latents before quantization, of any length; only their direction counts, in `quantize` and in
    `decode`. They are not normalised: mean 0 and standard deviation 1 are nominal.

    `fit` sets the codebook to the k-means centres of the tokens of pictures: a start for training, which moves both.

    Args:
        encoder_config: The `to_dict()` of the encoder's `transformers` configuration.
        codebook_size: Codes.
        commitment_weight: Of the commitment loss.
        entropy_weight: Of an entropy loss, see `VectorQuantizer`; the release has none.
        image_mean: What the encoder's input in [0, 1] is normalised with.
        image_std: Likewise.
        image_size: Height and width of the pictures. The authors decode 336 and evaluate at 256.
        encoder_image_size: See `AutoencoderVFMTok`, and so for all that are not explained here.
        patch_size: See there.
        levels: See there.
        query_grid: Rows and columns of the queries, and of the indices.
        hidden_size: See there.
        sampler_num_layers: See there.
        sampler_num_attention_heads: See there.
        sampler_num_points: See there.
        sampler_intermediate_size: See there.
        region_adaptive: See there.
        causal: True in the release, whose tokens are made for autoregressive generators.
        use_class_token: See there.
        decoder_num_layers: See there.
        decoder_num_attention_heads: See there.
        decoder_intermediate_size: See there.
        feature_decoder_num_layers: See there; the release shares one transformer.
        num_register_tokens: At the end of the token decoder's sequence. As it is causal, they have no effect at all;
            the release has four, all zeros.
        position_grid: See there.
        feature_channels: See there.
        attention_dropout: See there.
        block_out_channels: See there.
        layers_per_block: See there.
        norm_num_groups: See there.
        mid_block_add_attention: See there.
        latent_channels: Width of the latents and the codes.
        latents_mean: Per channel; `None` for zeros.
        latents_std: Per channel; `None` for ones.
        scaling_factor: See there.
        shift_factor: See there.
        force_upcast: See there.
        encoder_repository: See there.
        encoder_revision: See there.
        encoder_digest: See there.

    Raises:
        ValueError: If a number does not fit the others.
    """

    _keep_in_fp32_modules = ["quantizer"]

    num_codebooks = 1
    _any_codebook = "the codebook"
    _coding_modules = ("sampler", "regions_to_latents", "quantizer")

    @register_to_config
    def __init__(
        self,
        encoder_config: dict[str, Any],
        codebook_size: int = 16384,
        commitment_weight: float = 0.25,
        entropy_weight: float = 0.0,
        image_mean: list[float] | None = None,
        image_std: list[float] | None = None,
        image_size: int = 336,
        encoder_image_size: int | None = None,
        patch_size: int = 16,
        levels: list[int] | None = None,
        query_grid: tuple[int, int] = (16, 16),
        hidden_size: int = 512,
        sampler_num_layers: int = 6,
        sampler_num_attention_heads: int = 8,
        sampler_num_points: int = 4,
        sampler_intermediate_size: int = 1024,
        region_adaptive: bool = True,
        causal: bool = True,
        use_class_token: bool = False,
        decoder_num_layers: int = 6,
        decoder_num_attention_heads: int = 8,
        decoder_intermediate_size: int = 1368,
        feature_decoder_num_layers: int = 0,
        num_register_tokens: int = 4,
        position_grid: int | None = None,
        feature_channels: int | None = None,
        attention_dropout: float = 0.0,
        block_out_channels: tuple[int, ...] = (128, 128, 256, 256, 512),
        layers_per_block: int = 1,
        norm_num_groups: int = 32,
        mid_block_add_attention: bool = True,
        latent_channels: int = 12,
        latents_mean: list[float] | None = None,
        latents_std: list[float] | None = None,
        scaling_factor: float = 1.0,
        shift_factor: float = 0.0,
        force_upcast: bool = False,
        encoder_repository: str | None = None,
        encoder_revision: str | None = None,
        encoder_digest: str | None = None,
    ):
        super().__init__()
        self._build(latent_channels)
        self.regions_to_latents = nn.Conv2d(hidden_size, latent_channels, 1)
        self.quantizer = VectorQuantizer(
            codebook_size, latent_channels, commitment_weight, normalize=True, entropy_weight=entropy_weight
        )

    def _to_latents(self, regions: torch.Tensor) -> torch.Tensor:
        return self.regions_to_latents(regions)  # (B, latent_channels, rows, columns)

    def _to_regions(self, latents: torch.Tensor) -> torch.Tensor:
        return super()._to_regions(F.normalize(latents, dim=1))

    # -------------------------------------------------------------------------------------------------- quantizing

    @property
    def codebook_sizes(self) -> dict[str, int]:
        """The one codebook's size, by its name."""
        return {"region": self.quantizer.codebook_size}

    @property
    def code_vectors(self) -> dict[str, torch.Tensor]:
        """The vectors `(codes, codebook_dim)` of the codebook."""
        return {"region": self.quantizer.codebook}

    @apply_forward_hook
    def quantize(self, latents: torch.Tensor) -> QuantizerOutput:
        """Replace latents by the codes of nearest direction.

        Args:
            latents: `(B, latent_channels, rows, columns)`, from `encode`.

        Returns:
            `.latents` of the same shape and the model's dtype, exactly `indices_to_latents(.indices)`; the gradient
            goes straight through to the direction of the latents. `.indices` `(B, 1, rows, columns)` int64. `.loss`,
            codebook and weighted commitment loss on the unit sphere.

        Raises:
            ValueError: If the shape is another.
        """
        self._check_latents(latents)
        found = self.quantizer(self.latents_affine.denormalize(latents))
        return QuantizerOutput(
            self._as_latents(found.latents), found.indices[:, None], found.loss, found.codebook_loss,
            found.commitment_loss,
        )  # fmt: skip

    @apply_forward_hook
    def indices_to_latents(self, indices: torch.Tensor) -> torch.Tensor:
        """Return the latents of indices: what `quantize` gave with them.

        Args:
            indices: `(B, 1, rows, columns)` integers.

        Returns:
            `(B, latent_channels, rows, columns)` in the model's dtype, ready for `decode`.

        Raises:
            ValueError: If the shape is another or an index is outside the codebook.
        """
        self._check_indices(indices)
        return self._as_latents(self.quantizer.indices_to_latents(indices[:, 0]))

    def code_distances(self, latents: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        """Return the squared distance of latents' directions to codes: `(B, 1, rows, columns)`.

        Args:
            latents: `(B, latent_channels, rows, columns)`, from `encode`.
            indices: `(B, 1, rows, columns)`, such as `quantize(latents).indices`.
        """
        return self.quantizer.code_distances(self.latents_affine.denormalize(latents), indices[:, 0])[:, None]

    def _as_latents(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes as normalised latents in the model's dtype, and in one memory format, so that they decode equally."""
        return self.latents_affine.normalize(codes).to(self.dtype).contiguous()

    def _fit_quantizers(
        self, batches: Iterable[torch.Tensor], max_tokens: int, generator: torch.Generator, num_iterations: int
    ) -> None:
        rows = (channels_last_rows(self.latents_affine.denormalize(batch)) for batch in batches)
        self.quantizer.fit(self._sample_rows(rows, max_tokens, generator), generator, num_iterations)
        broadcast_state(self.quantizer)
