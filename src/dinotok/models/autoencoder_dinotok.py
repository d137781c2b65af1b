"""DINO-Tok-AE: deep features for meaning, shallow ones for detail, in one continuous latent (arXiv 2511.20565)."""

from collections.abc import Iterable
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import Decoder
from diffusers.models.modeling_utils import ModelMixin  # noqa: F401  diffusers looks for this name when it loads us
from torch import nn

from ..statistics import StreamingMoments
from .buffers import ChannelAffine
from .tokenizer_model import TokenizerModel, channels_last_rows


class AutoencoderDINOTok(TokenizerModel):
    """Continuous image autoencoder on a frozen DINO.

    The latents are `[deep; texture]`: the last layer's features as they are, and a linear projection of a shallow
    layer's to `texture_channels`. They are decoded by the sum of two paths: a linear map from one feature to its
    patch of pixels, and a convolutional decoder that sees both parts and starts at zero. `fit` finds the projection
    and the linear map in closed form; training goes on from there.

    The authors published no code. What they state is the frozen encoder, the two depths, the width 832 = 768 + 64 and
    the down-sampling 16; the shallow layer, the projection and the decoder are choices of this library, each a config
    value (see the documentation's list of differences).

    Args:
        encoder_config: The `to_dict()` of the encoder's `transformers` configuration.
        image_mean: What the encoder's input in [0, 1] is normalised with.
        image_std: Likewise.
        patch_size: Pixels per latent on each side; must be `2 ** (len(block_out_channels) - 1)`.
        shallow_layer: Hidden state the texture part comes from; 0 is the embedding output.
        texture_channels: Width of the texture part. 0 leaves it out: deep features only, as in RAE, the control of
            every table; the linear path then starts from the deep part.
        deep_layers: The deep part is the sum of this many last layers (RAEv2's baseline); 1 is the paper's.
        linear_kernel_size: Features on each side that the linear path reads for a patch: 1 is its own only. With 3 it
            sees the neighbours too, which is worth most where features are quantized; see `fit_linear_decoder`.
        linear_reads_deep: The linear path reads the patch's deep feature as well as texture; it starts at zero, and
            `fit_linear_decoder` finds it.
        block_out_channels: Widths of the convolutional decoder from the picture inwards; `(128, 128, 256, 256, 512)`
            is the decoder of LDM and VA-VAE.
        layers_per_block: Residual blocks per resolution of the encoder that decoder mirrors (it has one more).
        norm_num_groups: Groups of its normalisation layers.
        mid_block_add_attention: Self-attention at the lowest resolution.
        latent_channels: Derived; accepted so that a saved config rebuilds the model, and checked.
        latents_mean: Per channel, from `fit`; `None` for zeros.
        latents_std: Per channel, from `fit`; `None` for ones.
        scaling_factor: 1: the latents are normalised already. For pipelines that read it.
        shift_factor: 0, likewise.
        force_upcast: False, likewise.
        encoder_repository: Where the encoder came from, `None` for a local folder.
        encoder_revision: Its revision.
        encoder_digest: SHA-256 of its weights.

    Raises:
        ValueError: If a number does not fit the others.
    """

    _no_split_modules = ["ResnetBlock2D", "UNetMidBlock2D"]
    _keep_in_fp32_modules = ["decoder_input"]

    @register_to_config
    def __init__(
        self,
        encoder_config: dict[str, Any],
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
        super().__init__()
        self.register_to_config(
            image_mean=list(image_mean or (0.485, 0.456, 0.406)), image_std=list(image_std or (0.229, 0.224, 0.225))
        )
        self.encoder = self._build_encoder()
        self._check_config()
        self.patch_size = patch_size
        self.deep_channels = self.encoder.hidden_size
        self.texture_channels = texture_channels
        self.latent_channels = self.deep_channels + texture_channels
        if latent_channels not in (None, self.latent_channels):
            raise ValueError(
                f"latent_channels={latent_channels}, but the encoder's {self.deep_channels} and "
                f"texture_channels={texture_channels} make {self.latent_channels}."
            )
        self.register_to_config(latent_channels=self.latent_channels)
        self.latents_affine = self._build_latents_affine()
        if texture_channels:
            self.texture_projection = nn.Conv2d(self.encoder.hidden_size, texture_channels, 1)
        self.decoder_input = ChannelAffine([0.0] * self.latent_channels, [1.0] * self.latent_channels, persistent=True)
        self.linear_decoder = nn.Conv2d(
            self._linear_channels(),
            3 * patch_size**2,
            linear_kernel_size,
            padding=linear_kernel_size // 2,
            padding_mode="replicate",
        )
        if linear_reads_deep:
            self.linear_deep_decoder = nn.Conv2d(self.deep_channels, 3 * patch_size**2, 1, bias=False)
            nn.init.zeros_(self.linear_deep_decoder.weight)
        self.decoder = Decoder(
            in_channels=self.latent_channels,
            out_channels=3,
            up_block_types=("UpDecoderBlock2D",) * len(block_out_channels),
            block_out_channels=tuple(block_out_channels),
            layers_per_block=layers_per_block,
            norm_num_groups=norm_num_groups,
            mid_block_add_attention=mid_block_add_attention,
        )
        nn.init.zeros_(self.decoder.conv_out.weight)
        nn.init.zeros_(self.decoder.conv_out.bias)
        self._init_memory_options()

    def _check_config(self) -> None:
        config = self.config
        stages = len(config.block_out_channels) - 1
        if config.patch_size != 2**stages:
            raise ValueError(
                f"patch_size={config.patch_size} needs log2(patch_size) + 1 values of block_out_channels, "
                f"{stages + 1} were given."
            )
        most = min(self.encoder.hidden_size, 3 * config.patch_size**2)
        if not 0 <= config.texture_channels <= most:
            raise ValueError(f"texture_channels={config.texture_channels} must lie between 0 and {most}.")
        last = self.encoder.num_layers
        if not 0 <= config.shallow_layer <= last:
            raise ValueError(f"shallow_layer={config.shallow_layer} does not exist: hidden states are 0 to {last}.")
        if not 1 <= config.deep_layers <= last:
            raise ValueError(f"deep_layers={config.deep_layers} must lie between 1 and {last}.")
        if config.linear_kernel_size < 1 or config.linear_kernel_size % 2 == 0:
            raise ValueError(f"linear_kernel_size={config.linear_kernel_size} must be odd and positive.")
        if config.linear_reads_deep and not config.texture_channels:
            raise ValueError(
                "linear_reads_deep=True needs texture_channels: without them the deep part is read anyway."
            )

    def _linear_channels(self) -> int:
        """How many channels the linear path reads: those of the texture, or of the deep part where there is none."""
        return self.config.texture_channels or self.deep_channels

    # ------------------------------------------------------------------------------------------ encode and decode

    def _features(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The deep grid and, if there is a texture part, the shallow one: each `(B, D, h, w)`, in one pass."""
        also = (self.config.shallow_layer,) if self.texture_channels else ()
        deep, *shallow = self.encoder.last_layers_sum(pixels, self.config.deep_layers, also)
        return deep, (shallow[0] if shallow else None)

    def _encode(self, pixels: torch.Tensor) -> torch.Tensor:
        deep, shallow = self._features(pixels)  # (B, D, h, w) each
        if shallow is None:
            return deep
        return torch.cat([deep, self.texture_projection(shallow)], dim=1)  # (B, D + T, h, w)

    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        inputs = self.decoder_input.normalize(latents).to(self.dtype)  # (B, C, h, w)
        patches = self.linear_decoder(self._linear_inputs(inputs))  # (B, 3 p^2, h, w)
        if self.config.linear_reads_deep:
            patches = patches + self.linear_deep_decoder(inputs[:, : self.deep_channels])
        return F.pixel_shuffle(patches, self.patch_size) + self.decoder(inputs)  # (B, 3, h p, w p)

    def _linear_inputs(self, inputs: torch.Tensor) -> torch.Tensor:
        """What the linear path reads with its neighbours: texture, or deep features where there is none."""
        first = self.deep_channels if self.texture_channels else 0
        return inputs[:, first : first + self.linear_decoder.in_channels]

    # ------------------------------------------------------------------------------------------- closed-form start

    @torch.no_grad()
    def fit(
        self,
        batches: Iterable[torch.Tensor],
        ridge: float = 1e-4,
        projection: Literal["regression", "pca"] = "regression",
    ) -> Self:
        """Set projection, linear path and latent statistics in closed form, in one pass over pictures.

        The linear path becomes the ridge regression from the texture channels to patches of pixels, and the latents'
        mean and standard deviation follow from the same sums. It reads a patch's own feature only, whatever its
        kernel: `fit_linear_decoder` includes the neighbours. The convolutional decoder is left as it is. Sums are kept
        in float64 and the pictures are not; under `torch.distributed` every process passes its share and all end with
        the same model.

        Args:
            batches: An iterable of `(B, 3, H, W)` pixels in [-1, 1]; sizes may differ between batches.
            ridge: Penalty of the regression, relative to the regressors' variance.
            projection: Of the shallow layer to the texture channels. "regression": the one that loses least of the
                pixels (reduced-rank regression); distances between texture latents are then distances between patches,
                which the texture codebook of a `VQModelDINOTok` profits from. "pca": the one that loses least of the
                layer, position embeddings and all.

        Returns:
            The model.

        Raises:
            ValueError: If a batch is not of that form, or there are fewer tokens than shallow channels.
        """
        if projection not in ("regression", "pca"):
            raise ValueError(f"projection={projection!r} is neither 'regression' nor 'pca'.")
        deep, shallow = self._measure(batches)
        needed = self.encoder.hidden_size + 1
        if deep.count < needed:
            raise ValueError(f"fit saw {deep.count} tokens; at least {needed} are needed.")
        mean, variance = deep.mean, deep.variance
        if not self.texture_channels:
            weight, bias = deep.ridge(alpha=ridge)
            bias = bias + mean @ weight
        else:
            if projection == "regression":
                directions, weight = shallow.reduced_rank_regression(self.texture_channels, ridge)
            else:
                directions = shallow.pca().components[:, : self.texture_channels]
                weight, _ = shallow.ridge(directions, ridge)
            bias = shallow.target_mean
            _set_linear(self.texture_projection, directions, -(shallow.mean @ directions))
            mean = torch.cat([mean, mean.new_zeros(self.texture_channels)])
            variance = torch.cat([variance, (directions * (shallow.covariance @ directions)).sum(0)])
        self._set_latents_statistics(mean, variance.sqrt())
        self.decoder_input.set(self.latents_mean, self.latents_std)
        weight = (self.latents_std.cpu()[-len(weight) :, None] * weight)[: self.linear_decoder.in_channels]
        _set_linear(self.linear_decoder, weight, bias)
        if self.config.linear_reads_deep:
            self.linear_deep_decoder.weight.zero_()
        return self

    @torch.no_grad()
    def fit_linear_decoder(self, batches: Iterable[torch.Tensor], ridge: float = 1e-4) -> Self:
        """Fit the linear path anew to what the decoder really gets: quantized latents, neighbours within its kernel.

        It becomes the ridge regression to what the convolutional decoder, left as it is, lacks of the pixels, in one
        pass over pictures. Call it after `fit`, where `linear_kernel_size` is above 1 or the latents are quantized.
        Sums and processes are as in `fit`.

        Args:
            batches: An iterable of `(B, 3, H, W)` pixels in [-1, 1]; sizes may differ between batches.
            ridge: Penalty of the regression, relative to the regressors' variance.

        Returns:
            The model.

        Raises:
            ValueError: If a batch is not of that form, or there are fewer tokens than regressors.
        """
        size, channels = self.config.linear_kernel_size, self.linear_decoder.in_channels
        deep_channels = self.deep_channels if self.config.linear_reads_deep else 0
        width = channels * size**2 + deep_channels
        moments = StreamingMoments(width, 3 * self.patch_size**2)
        silent = not any(weight.any() for weight in self.decoder.conv_out.parameters())  # as before any training
        for pixels in self._pixel_batches(batches):
            latents = self.latents_affine.denormalize(self._decoded_latents(pixels))
            inputs = self.decoder_input.normalize(latents).to(self.dtype)
            padded = F.pad(self._linear_inputs(inputs).float(), (size // 2,) * 4, mode="replicate")
            window = F.unfold(padded, size).unflatten(2, inputs.shape[2:])  # (B, C k^2, h, w)
            regressors = torch.cat([window, inputs[:, :deep_channels].float()], dim=1)
            missing = pixels.float() if silent else pixels.float() - self.decoder(inputs).float()
            moments.update(
                channels_last_rows(regressors), channels_last_rows(F.pixel_unshuffle(missing, self.patch_size))
            )
        moments.all_reduce()
        if moments.count <= width:
            raise ValueError(f"fit saw {moments.count} tokens; more than {width} are needed.")
        weight, bias = moments.ridge(alpha=ridge)
        _set_linear(self.linear_decoder, weight[: width - deep_channels], bias)
        if deep_channels:
            self.linear_deep_decoder.weight.copy_(weight[-deep_channels:].T[..., None, None])
        return self

    def _decoded_latents(self, pixels: torch.Tensor) -> torch.Tensor:
        """The latents that `forward` decodes."""
        return self.encode(pixels).latent

    def _measure(self, batches: Iterable[torch.Tensor]) -> tuple[StreamingMoments, StreamingMoments]:
        """The moments of deep and shallow features; of those that the linear path reads, with the patches."""
        targets = 3 * self.patch_size**2
        shallow_moments = StreamingMoments(self.encoder.hidden_size, targets if self.texture_channels else 0)
        deep_moments = StreamingMoments(
            self.deep_channels, 0 if self.texture_channels else targets, covariance=not self.texture_channels
        )
        for pixels in self._pixel_batches(batches):
            deep, shallow = self._features(pixels)
            patches = channels_last_rows(F.pixel_unshuffle(pixels, self.patch_size))
            if shallow is None:
                deep_moments.update(channels_last_rows(deep), patches)
            else:
                deep_moments.update(channels_last_rows(deep))
                shallow_moments.update(channels_last_rows(shallow), patches)
        return deep_moments.all_reduce(), shallow_moments.all_reduce()


def _set_linear(layer: nn.Conv2d, weight: torch.Tensor, bias: torch.Tensor) -> None:
    """Set a convolution to `rows @ weight + bias`: of its whole window, or of the centre where weights are fewer."""
    if layer.bias is None:
        raise ValueError("The layer has no bias.")
    size = layer.kernel_size[0] if len(weight) == layer.weight[0].numel() else 1
    kernel = weight.T.unflatten(1, (layer.in_channels, size, size))
    layer.weight.copy_(pad_kernel(kernel, layer.kernel_size[0]))
    layer.bias.copy_(bias)


def pad_kernel(kernel: torch.Tensor, size: int) -> torch.Tensor:
    """Surround the kernel of a convolution, `(out, in, k, k)`, with zeros, to `(out, in, size, size)`.

    Raises:
        ValueError: If it is larger than that.
    """
    if kernel.shape[-1] > size:
        raise ValueError(f"A kernel of {kernel.shape[-1]} does not fit into one of {size}.")
    return F.pad(kernel, ((size - kernel.shape[-1]) // 2,) * 4)
