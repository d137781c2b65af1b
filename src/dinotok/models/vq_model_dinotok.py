"""DINO-Tok-VQ: one codebook for meaning, in a dominant subspace, and one for texture (arXiv 2511.20565)."""

from collections.abc import Iterable
from typing import Any, Self

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_utils import ModelMixin  # noqa: F401  diffusers looks for this name when it loads us
from diffusers.utils.accelerate_utils import apply_forward_hook

from ..statistics import StreamingMoments
from .autoencoder_dinotok import AutoencoderDINOTok, pad_kernel
from .discrete import DiscreteTokenizerModel
from .quantizers import (
    DominantSubspaceQuantizer,
    QuantizerOutput,
    VectorQuantizer,
    broadcast_state,
    straight_through,
)
from .tokenizer_model import channels_last_rows


class VQModelDINOTok(DiscreteTokenizerModel, AutoencoderDINOTok):  # type: ignore[misc]  # fit takes other options
    """Discrete image tokenizer on a frozen DINO: `AutoencoderDINOTok` with its two parts quantized.

    The semantic codebook lives in the dominant subspace of the deep features, the texture codebook in the texture
    channels; a position has one index of each, semantic first. `encode` gives continuous latents as the autoencoder
    does, `quantize` turns them to codes; `decode` takes either. Tiled encoding blends the latents of overlapping tiles
    first and quantizes them once, so indices are well defined there too.

    `fit` finds the dominant subspace and both codebooks, in one pass over pictures: the subspace is the PCA of all
    features seen, the codebooks are k-means centres of a uniform sample of them. The rest of the model, which comes
    from an autoencoder, stays; `fit_linear_decoder` then fits its linear path to the codes.

    Args:
        encoder_config: As in `AutoencoderDINOTok`, and so are all arguments that are not listed here.
        semantic_codebook_size: Codes for the deep part; the paper has 16,384.
        texture_codebook_size: Codes for the texture part; 0 turns it off: one index per position, and the decoder sees
            the mean texture.
        joint_codebook: The control: a single codebook, of `semantic_codebook_size`, on both parts together. Its
            subspace is that of the normalised latents, since the parts have different units; so `fit` it again when
            the latents' statistics change.
        rank: Dimensions of the dominant subspace; `None` for all.
        texture_rank: How many of the texture channels are quantized: the first, since `AutoencoderDINOTok.fit` orders
            them by what they explain of the pixels. The decoder sees the mean of the others, and its linear path does
            not read them. `None` for all.
        eigenvalue_power: See `DominantSubspaceQuantizer`.
        cosine: Compare directions in the dominant subspace instead of distances.
        commitment_weight: Of the commitment loss.
        ema_decay: Of the semantic codebook's moving averages.

    Raises:
        ValueError: If a number does not fit the others.
    """

    _keep_in_fp32_modules = ["decoder_input", "semantic_quantizer", "texture_quantizer"]
    _coding_modules = ("texture_projection", "semantic_quantizer", "texture_quantizer")

    semantic_quantizer: DominantSubspaceQuantizer
    texture_quantizer: VectorQuantizer

    @register_to_config
    def __init__(
        self,
        encoder_config: dict[str, Any],
        semantic_codebook_size: int = 16384,
        texture_codebook_size: int = 16384,
        joint_codebook: bool = False,
        rank: int | None = 64,
        texture_rank: int | None = None,
        eigenvalue_power: float = 0.0,
        cosine: bool = False,
        commitment_weight: float = 0.25,
        ema_decay: float = 0.99,
        image_mean: list[float] | None = None,
        image_std: list[float] | None = None,
        patch_size: int = 16,
        shallow_layer: int = 0,
        texture_channels: int = 64,
        deep_layers: int = 1,
        linear_kernel_size: int = 1,
        linear_reads_deep: bool = False,
        block_out_channels: tuple[int, ...] = (128, 128, 256, 256, 512),
        layers_per_block: int = 2,
        norm_num_groups: int = 32,
        mid_block_add_attention: bool = True,
        latent_channels: int | None = None,
        latents_mean: list[float] | None = None,
        latents_std: list[float] | None = None,
        scaling_factor: float = 1.0,
        shift_factor: float = 0.0,
        force_upcast: bool = False,
        encoder_repository: str | None = None,
        encoder_revision: str | None = None,
        encoder_digest: str | None = None,
    ):
        super().__init__(
            encoder_config=encoder_config,
            image_mean=image_mean,
            image_std=image_std,
            patch_size=patch_size,
            shallow_layer=shallow_layer,
            texture_channels=texture_channels,
            deep_layers=deep_layers,
            linear_kernel_size=linear_kernel_size,
            linear_reads_deep=linear_reads_deep,
            block_out_channels=block_out_channels,
            layers_per_block=layers_per_block,
            norm_num_groups=norm_num_groups,
            mid_block_add_attention=mid_block_add_attention,
            latent_channels=latent_channels,
            latents_mean=latents_mean,
            latents_std=latents_std,
            scaling_factor=scaling_factor,
            shift_factor=shift_factor,
            force_upcast=force_upcast,
            encoder_repository=encoder_repository,
            encoder_revision=encoder_revision,
            encoder_digest=encoder_digest,
        )
        self.joint_codebook = joint_codebook
        self.has_texture_codebook = bool(texture_codebook_size and texture_channels and not joint_codebook)
        channels = self.latent_channels if joint_codebook else self.deep_channels
        self.semantic_quantizer = DominantSubspaceQuantizer(
            channels, semantic_codebook_size, rank, eigenvalue_power, cosine, ema_decay
        )
        self.texture_rank = texture_channels if texture_rank is None else texture_rank
        if self.has_texture_codebook:
            if not 1 <= self.texture_rank <= texture_channels:
                raise ValueError(f"texture_rank={texture_rank} must lie between 1 and {texture_channels}.")
            self.texture_quantizer = VectorQuantizer(texture_codebook_size, self.texture_rank, commitment_weight)
        self.num_codebooks = 1 + self.has_texture_codebook

    @classmethod
    def from_autoencoder(cls, autoencoder: AutoencoderDINOTok, **config) -> Self:
        """Start from a fitted or trained autoencoder: its encoder, projection, decoder and latent statistics.

        Args:
            autoencoder: Its weights are copied.
            **config: `semantic_codebook_size`, `texture_codebook_size`, `rank`, ...: what this class adds. A larger
                `linear_kernel_size` than the autoencoder's starts with zeros around it.

        Returns:
            A tokenizer whose codebooks are still to be found, by `fit`.
        """
        shared = {key: value for key, value in autoencoder.config.items() if not key.startswith("_")}
        model = cls(**{**shared, **config})
        model.to(autoencoder.device)
        weights = dict(autoencoder.state_dict())
        size = model.config.linear_kernel_size
        read = weights["linear_decoder.weight"][:, : model.linear_decoder.in_channels]
        weights["linear_decoder.weight"] = pad_kernel(read, size)
        report = model.load_state_dict(weights, strict=False)
        missing = [key for key in report.missing_keys if "_quantizer." not in key and "linear_deep" not in key]
        if missing or report.unexpected_keys:
            raise ValueError(f"The autoencoder does not fit: {(missing + report.unexpected_keys)[0]!r}.")
        if autoencoder.dtype != model.dtype:
            model.to(autoencoder.dtype)
        return model.train(autoencoder.training)

    def _linear_channels(self) -> int:
        config = self.config
        quantized = config.texture_channels and config.texture_codebook_size and not config.joint_codebook
        return (config.texture_rank if quantized else None) or super()._linear_channels()

    # -------------------------------------------------------------------------------------------------- quantizing

    @property
    def codebook_sizes(self) -> dict[str, int]:
        """Codes of every codebook by name, in the order of the indices."""
        if self.joint_codebook:
            return {"joint": self.semantic_quantizer.codebook_size}
        sizes = {"semantic": self.semantic_quantizer.codebook_size}
        return {**sizes, "texture": self.texture_quantizer.codebook_size} if self.has_texture_codebook else sizes

    @property
    def code_vectors(self) -> dict[str, torch.Tensor]:
        """The vectors `(codes, width)` of every codebook by name: subspace coordinates, and texture channels."""
        vectors = [self.semantic_quantizer.codebook]
        if self.has_texture_codebook:
            vectors.append(self.texture_quantizer.codebook)
        return dict(zip(self.codebook_sizes, vectors, strict=True))

    @apply_forward_hook
    def quantize(self, latents: torch.Tensor) -> QuantizerOutput:
        """Replace normalised latents by codes.

        Args:
            latents: `(B, latent_channels, h, w)`, from `encode`.

        Returns:
            `.latents` of the same shape and the model's dtype, exactly `indices_to_latents(.indices)`; the gradient
            goes straight through. `.indices` `(B, num_codebooks, h, w)` int64, semantic first. `.loss`, that of the
            texture codebook where there is one: the semantic codebook on a frozen encoder has nothing to train, and
            `update_codebook` moves it.

        Raises:
            ValueError: If the shape is another.
        """
        self._check_latents(latents)
        deep, texture = self._parts(latents)
        semantic = self.semantic_quantizer(deep)
        if not self.has_texture_codebook:
            indices, loss = semantic.indices[:, None], self.config.commitment_weight * semantic.loss
            quantized = straight_through(latents, self._join(semantic.latents, None))
            return QuantizerOutput(quantized, indices, loss, commitment_loss=semantic.loss)
        fine = self.texture_quantizer(texture[:, : self.texture_rank])
        indices = torch.stack([semantic.indices, fine.indices], 1)
        quantized = straight_through(latents, self._join(semantic.latents, fine.latents))
        return QuantizerOutput(quantized, indices, fine.loss, fine.codebook_loss, fine.commitment_loss)

    @apply_forward_hook
    def indices_to_latents(self, indices: torch.Tensor) -> torch.Tensor:
        """Return the normalised latents of indices: what `quantize` gave with them.

        Args:
            indices: `(B, num_codebooks, h, w)` integers.

        Returns:
            `(B, latent_channels, h, w)` in the model's dtype, ready for `decode`.

        Raises:
            ValueError: If the shape is another or an index is outside its codebook.
        """
        self._check_indices(indices)
        semantic = self.semantic_quantizer.indices_to_latents(indices[:, 0])
        texture = self.texture_quantizer.indices_to_latents(indices[:, 1]) if self.has_texture_codebook else None
        return self._join(semantic, texture)

    def code_distances(self, latents: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        """Return how far latents are from codes, as each codebook's look-up measures it.

        Args:
            latents: `(B, latent_channels, h, w)`, from `encode`.
            indices: `(B, num_codebooks, h, w)`, such as `quantize(latents).indices`.

        Returns:
            Squared distances, `(B, num_codebooks, h, w)`.
        """
        deep, texture = self._parts(latents)
        distances = [self.semantic_quantizer.code_distances(deep, indices[:, 0])]
        if self.has_texture_codebook:
            distances.append(self.texture_quantizer.code_distances(texture[:, : self.texture_rank], indices[:, 1]))
        return torch.stack(distances, 1)

    def update_codebook(self, latents: torch.Tensor) -> int:
        """Move the semantic codebook towards the latents of a training batch; see `DominantSubspaceQuantizer`.

        Args:
            latents: `(B, latent_channels, h, w)`, from `encode`.

        Returns:
            How many dead codes were moved.
        """
        return self.semantic_quantizer.update_codebook(self._parts(latents)[0])

    def _parts(self, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What the two quantizers see, float32: features in their own units, where distances mean something."""
        if self.joint_codebook:
            return latents.float(), latents[:, :0].float()
        features = self.latents_affine.denormalize(latents)
        return features[:, : self.deep_channels], features[:, self.deep_channels :]

    def _join(self, semantic: torch.Tensor, texture: torch.Tensor | None) -> torch.Tensor:
        """The inverse of `_parts`: latents in the model's dtype and one memory format, so that they decode equally.

        Channels that have no code are at their mean.
        """
        if not self.joint_codebook:
            given = [semantic] if texture is None else [semantic, texture]
            mean = self.latents_mean[sum(part.shape[1] for part in given) :, None, None]
            rest = mean.expand(semantic.shape[0], -1, *semantic.shape[2:])
            semantic = self.latents_affine.normalize(torch.cat([*given, rest], 1))
        return semantic.to(self.dtype).contiguous()

    # ------------------------------------------------------------------------------------------- closed-form start

    def _fit_quantizers(
        self, batches: Iterable[torch.Tensor], max_tokens: int, generator: torch.Generator, num_iterations: int
    ) -> None:
        channels = self.semantic_quantizer.channels
        moments = StreamingMoments(channels)
        sample = self._sample_rows((self._measured_rows(batch, moments) for batch in batches), max_tokens, generator)
        moments.all_reduce()
        digest = self.config.encoder_digest or self.encoder.digest()
        self.semantic_quantizer.set_pca(moments.pca(), moments.count, digest)
        self.semantic_quantizer.fit(sample[:, :channels], generator, num_iterations)
        broadcast_state(self.semantic_quantizer)
        if self.has_texture_codebook:
            self.texture_quantizer.fit(sample[:, channels : channels + self.texture_rank], generator, num_iterations)
            broadcast_state(self.texture_quantizer)

    def _decoded_latents(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.quantize(self.encode(pixels).latent).latents

    def _measured_rows(self, latents: torch.Tensor, moments: StreamingMoments) -> torch.Tensor:
        """What both quantizers see, `(B * h * w, D)`; what the semantic one sees goes into the moments."""
        semantic, texture = self._parts(latents)
        moments.update(channels_last_rows(semantic))
        return channels_last_rows(torch.cat([semantic, texture], 1))
