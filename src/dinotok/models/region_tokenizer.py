"""What VFMTok and VFMAE share: everything but the bottleneck between regions and latents."""

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.vae import Decoder
from torch import nn

from .encoders import FrozenEncoder
from .tokenizer_model import TokenizerModel
from .vfmtok_layers import RegionSampler, TokenDecoder, resize_for_encoder


class RegionTokenizerModel(TokenizerModel):
    """Base of the tokenizers whose tokens are regions of a picture (VFMTok, arXiv 2507.08441).

    Learned queries gather several levels of a frozen encoder's features where they find them best; a transformer with
    a mask token for every 16 x 16 pixels turns them into a grid again, and a convolutional decoder into pixels. A
    second set of masks predicts the encoder's last features: a loss of training keeps the tokens semantic.

    A subclass defines `_to_latents` and `_to_regions`, between regions and unnormalised latents. Pictures have one
    resolution, `config.image_size`; latents have the grid of the queries, whatever it is.
    """

    _no_split_modules = ["RegionLayer", "TokenDecoderLayer", "ResnetBlock2D", "UNetMidBlock2D"]

    sampler: RegionSampler
    token_decoder: TokenDecoder
    decoder: Decoder

    def _build(self, latent_channels: int) -> None:
        """Build all parts from the registered config, and put what follows from the encoder into it."""
        self.register_to_config(
            image_mean=list(self.config.image_mean or (0.485, 0.456, 0.406)),
            image_std=list(self.config.image_std or (0.229, 0.224, 0.225)),
            latent_channels=latent_channels,
        )
        self.encoder = self._build_encoder()
        self._complete_config()
        config = self.config
        self.patch_size = config.patch_size
        self.image_size = config.image_size
        self.fixed_grid = tuple(config.query_grid)
        self.latent_channels = latent_channels
        self.latents_affine = self._build_latents_affine()
        self.sampler = RegionSampler(
            feature_channels=self.encoder.hidden_size,
            hidden_size=config.hidden_size,
            query_grid=self.fixed_grid,
            num_layers=config.sampler_num_layers,
            num_heads=config.sampler_num_attention_heads,
            num_levels=len(config.levels),
            num_points=config.sampler_num_points,
            intermediate_size=config.sampler_intermediate_size,
            causal=config.causal,
            adaptive=config.region_adaptive,
        )
        self.latents_to_regions = nn.Linear(latent_channels, config.hidden_size)
        self.token_decoder = TokenDecoder(
            hidden_size=config.hidden_size,
            num_regions=self.fixed_grid[0] * self.fixed_grid[1],
            num_layers=config.decoder_num_layers,
            num_heads=config.decoder_num_attention_heads,
            intermediate_size=config.decoder_intermediate_size,
            num_feature_layers=config.feature_decoder_num_layers,
            num_register_tokens=config.num_register_tokens,
            position_grid=config.position_grid,
            feature_channels=config.feature_channels,
            causal=config.causal,
            dropout=config.attention_dropout,
        )
        self.decoder = Decoder(
            in_channels=config.hidden_size,
            out_channels=3,
            up_block_types=("UpDecoderBlock2D",) * len(config.block_out_channels),
            block_out_channels=tuple(config.block_out_channels),
            layers_per_block=config.layers_per_block,
            norm_num_groups=config.norm_num_groups,
            mid_block_add_attention=config.mid_block_add_attention,
        )
        self._init_memory_options()

    def _build_encoder(self) -> FrozenEncoder:
        config = self.config
        return FrozenEncoder(config.encoder_config, config.image_mean, config.image_std)

    def _complete_config(self) -> None:
        """Derive what is None from the encoder, and check that all numbers fit."""
        config, encoder = self.config, self.encoder
        patch_size, image_size, patch = config.patch_size, config.image_size, encoder.encoder_patch_size
        stages = len(config.block_out_channels) - 1
        if patch_size != 2**stages:
            raise ValueError(
                f"patch_size={patch_size} needs log2(patch_size) + 1 values of block_out_channels, {stages + 1} were "
                "given."
            )
        if image_size < 1 or image_size % patch_size:
            raise ValueError(f"image_size={image_size} is not a multiple of patch_size={patch_size}.")
        if len(config.query_grid) != 2 or min(config.query_grid) < 1:
            raise ValueError(f"query_grid={config.query_grid} must be two positive numbers, rows and columns.")
        size = config.encoder_image_size
        if size is None:
            size = image_size if image_size % patch == 0 else image_size // patch_size * patch
        if size < 1 or size % patch:
            raise ValueError(f"encoder_image_size={size} is not a multiple of the encoder's patch size {patch}.")
        levels = config.levels or [max(encoder.num_layers * quarter // 4, 1) for quarter in (1, 2, 3, 4)]
        for level in levels:
            if not 0 <= level <= encoder.num_layers:
                raise ValueError(f"Level {level} does not exist: hidden states are 0 to {encoder.num_layers}.")
        if config.use_class_token and not encoder.has_class_token:
            model_type = config.encoder_config["model_type"]
            raise ValueError(f"use_class_token=True, but model_type={model_type!r} has no class token.")
        self.register_to_config(
            encoder_image_size=size,
            levels=list(levels),
            position_grid=config.position_grid or size // patch,
            feature_channels=config.feature_channels or encoder.hidden_size,
        )

    # ------------------------------------------------------------------------------------------ encode and decode

    def _to_latents(self, regions: torch.Tensor) -> torch.Tensor:
        """Regions `(B, hidden_size, rows, columns)` to latents before normalisation."""
        raise NotImplementedError

    def _to_regions(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents before normalisation, float32, to region tokens `(B, rows * columns, hidden_size)`."""
        return self.latents_to_regions(latents.flatten(2).transpose(1, 2).to(self.dtype))

    def _levels(self, pixels: torch.Tensor) -> list[torch.Tensor]:
        """The features the queries look at: for every level `(B, D, h, w)`."""
        levels = []
        for tokens in self._tokens(pixels, self.config.levels):
            features = self._patches(tokens)
            levels.append(features + tokens[:, :1] if self.config.use_class_token else features)
        side = self._encoder_grid
        return [features.transpose(1, 2).unflatten(2, (side, side)) for features in levels]

    def _tokens(self, pixels: torch.Tensor, levels: list[int] | None = None) -> tuple[torch.Tensor, ...]:
        return self.encoder.tokens(resize_for_encoder(pixels, self.config.encoder_image_size), levels)

    def _patches(self, tokens: torch.Tensor) -> torch.Tensor:
        return tokens[:, -(self._encoder_grid**2) :]

    @property
    def _encoder_grid(self) -> int:
        return self.config.encoder_image_size // self.encoder.patch_size

    def _encode(self, pixels: torch.Tensor) -> torch.Tensor:
        regions = self.sampler(self._levels(pixels))  # (B, rows * columns, hidden_size)
        return self._to_latents(regions.transpose(1, 2).unflatten(2, self.fixed_grid))

    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        grid = self.token_decoder(self._to_regions(latents), self.image_size // self.patch_size)
        return self.decoder(grid)  # (B, 3, image_size, image_size)

    @property
    def last_layer(self) -> nn.Parameter:
        """The weight that makes the pixels: what an adaptive adversarial weight compares gradients at."""
        return self.decoder.conv_out.weight

    # ------------------------------------------------------------------------------------------ semantics

    def predict_feature_tokens(self, latents: torch.Tensor) -> torch.Tensor:
        """Predict the frozen encoder's last layer from latents: what `target_feature_tokens` gives for pixels.

        Args:
            latents: `(B, latent_channels, rows, columns)`, normalised; of a discrete tokenizer, those that
                `quantize` gives.

        Returns:
            `(B, N, D)`: the class token, if the config uses it, then `position_grid ** 2` patches in raster order.

        Raises:
            ValueError: If the shape is another.
        """
        self._check_latents(latents)
        regions = self._to_regions(self.latents_affine.denormalize(latents))
        tokens = self.token_decoder.predict_features(regions)
        return tokens if self.config.use_class_token else tokens[:, 1:]

    @torch.no_grad()
    def target_feature_tokens(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return what semantic reconstruction predicts: the frozen encoder's last layer after its final norm.

        The paper's loss is `1 - cosine_similarity(predicted, target, dim=-1)`, averaged over tokens. The target has no
        gradient.

        Args:
            pixels: `(B, 3, image_size, image_size)` in [-1, 1].

        Returns:
            `(B, N, D)`, as `predict_feature_tokens`. An encoder's grid that is not `position_grid` is resized to it.

        Raises:
            ValueError: If the shape is another.
        """
        self._check_pixels(pixels)
        (last,) = self._tokens(pixels)
        patches, side = self._patches(last), self.config.position_grid
        if side != self._encoder_grid:
            grid = patches.transpose(1, 2).unflatten(2, (self._encoder_grid, self._encoder_grid)).float()
            grid = F.interpolate(grid, size=(side, side), mode="bicubic", antialias=True)
            patches = grid.flatten(2).transpose(1, 2).to(patches.dtype)
        return torch.cat([last[:, :1], patches], dim=1) if self.config.use_class_token else patches

    def predict_features(self, latents: torch.Tensor) -> torch.Tensor:
        """Return the patches of `predict_feature_tokens` as a grid `(B, D, position_grid, position_grid)`."""
        return self._to_feature_grid(self.predict_feature_tokens(latents))

    def target_features(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return the patches of `target_feature_tokens` as a grid `(B, D, position_grid, position_grid)`."""
        return self._to_feature_grid(self.target_feature_tokens(pixels))

    def freeze_feature_branch(self) -> None:
        """Exclude from training what only the prediction of features uses, for a training without that loss."""
        decoder = self.token_decoder
        decoder.feature_mask_token.requires_grad_(False)
        for part in (decoder.norm_features, decoder.feature_layers, decoder.feature_head):
            part.requires_grad_(False)

    def _to_feature_grid(self, tokens: torch.Tensor) -> torch.Tensor:
        side = self.config.position_grid
        return tokens[:, -side * side :].transpose(1, 2).unflatten(2, (side, side))
