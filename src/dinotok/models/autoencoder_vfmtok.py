"""VFMAE: regions of a picture as one continuous latent (arXiv 2605.18390)."""

import math
from collections.abc import Iterable
from typing import Any, Self

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_utils import ModelMixin  # noqa: F401  diffusers looks for this name when it loads us
from torch import nn

from ..statistics import StreamingMoments
from .region_tokenizer import RegionTokenizerModel


class AutoencoderVFMTok(RegionTokenizerModel):
    """Continuous image autoencoder on regions of a frozen foundation model: the VFMAE of the VFMTok authors.

    The defaults, on DINOv2-L with registers, are the released model: pictures of 256 x 256 pixels, which the encoder
    sees at 224, and latents `(B, 32, 16, 16)`. On another backbone, what depends on it follows from it.

    Args:
        encoder_config: The `to_dict()` of the encoder's `transformers` configuration.
        image_mean: What the encoder's input in [0, 1] is normalised with.
        image_std: Likewise.
        image_size: Height and width of the pictures.
        encoder_image_size: To which they are resized for the encoder, a multiple of its patch size. None:
            `image_size`, if it is one; else `image_size / patch_size` times the encoder's patch size.
        patch_size: Pixels per mask token on each side; must be `2 ** (len(block_out_channels) - 1)`.
        levels: Hidden states the regions are gathered from; None for the ends of the encoder's four quarters.
        query_grid: Rows and columns of the queries, and of the latents.
        hidden_size: Width of the sampler, the token decoder and the input of the pixel decoder.
        sampler_num_layers: Of the region sampler.
        sampler_num_attention_heads: Of its attentions.
        sampler_num_points: For each head and level.
        sampler_intermediate_size: Width inside its feed-forward layers.
        region_adaptive: False is a control: each query reads the features where it stands, and nowhere else.
        causal: Causal attention in the sampler and the token decoder, over raster order.
        use_class_token: Add the encoder's class token to its features, and predict it, too.
        decoder_num_layers: Of the token decoder.
        decoder_num_attention_heads: Likewise.
        decoder_intermediate_size: Width inside its feed-forward layers.
        feature_decoder_num_layers: Of the second transformer, which predicts features; 0 to share the first.
        num_register_tokens: At the end of its sequence.
        position_grid: Side of its table of positions, and of the predicted features; None for the encoder's.
        feature_channels: Width of the predicted features; None for the encoder's, which training needs. (The authors'
            code has 1024, whatever the encoder.)
        attention_dropout: In the token decoder, in training; the release was trained with 0.1.
        block_out_channels: Widths of the pixel decoder, from the picture inwards.
        layers_per_block: Residual blocks per resolution of the encoder it mirrors (it has one more).
        norm_num_groups: Groups of its normalisation layers.
        mid_block_add_attention: Self-attention at its lowest resolution.
        projector_num_groups: Groups of the normalisation before the latents; its statistics run over all regions.
        latent_channels: Width of the latents.
        latents_mean: Per channel, or `latent_channels * rows * columns` numbers per channel and position, which is
            what the authors' generator uses; `None` for zeros.
        latents_std: Likewise; `None` for ones.
        scaling_factor: 1: the latents are normalised already. For pipelines that read it.
        shift_factor: 0, likewise.
        force_upcast: False, likewise.
        encoder_repository: Where the encoder came from, `None` for a local folder.
        encoder_revision: Its revision.
        encoder_digest: SHA-256 of its weights.

    Raises:
        ValueError: If a number does not fit the others.
    """

    @register_to_config
    def __init__(
        self,
        encoder_config: dict[str, Any],
        image_mean: list[float] | None = None,
        image_std: list[float] | None = None,
        image_size: int = 256,
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
        causal: bool = False,
        use_class_token: bool = True,
        decoder_num_layers: int = 4,
        decoder_num_attention_heads: int = 8,
        decoder_intermediate_size: int = 1368,
        feature_decoder_num_layers: int = 1,
        num_register_tokens: int = 0,
        position_grid: int | None = None,
        feature_channels: int | None = None,
        attention_dropout: float = 0.0,
        block_out_channels: tuple[int, ...] = (128, 128, 256, 256, 512),
        layers_per_block: int = 2,
        norm_num_groups: int = 32,
        mid_block_add_attention: bool = True,
        projector_num_groups: int = 32,
        latent_channels: int = 32,
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
        self.norm_regions = nn.GroupNorm(projector_num_groups, hidden_size, eps=1e-6)
        self.regions_to_latents = nn.Conv2d(hidden_size, latent_channels, 1)

    def _to_latents(self, regions: torch.Tensor) -> torch.Tensor:
        return self.regions_to_latents(F.silu(self.norm_regions(regions)))  # (B, latent_channels, rows, columns)

    @torch.no_grad()
    def fit_latents_statistics(self, batches: Iterable[torch.Tensor], per_position: bool = False) -> Self:
        """Measure the latents' mean and standard deviation in one pass, and keep them in the config.

        Args:
            batches: An iterable of `(B, 3, image_size, image_size)` pixels in [-1, 1].
            per_position: For each channel and position, as the authors do, rather than for each channel.

        Returns:
            The model.
        """
        if not per_position:
            return super().fit_latents_statistics(batches)
        moments = StreamingMoments(self.latent_channels * math.prod(self.config.query_grid), covariance=False)
        for pixels in self._pixel_batches(batches):
            moments.update(self._encode(pixels).flatten(1))
        moments.all_reduce()
        self._set_latents_statistics(moments.mean, moments.variance.sqrt())
        return self
