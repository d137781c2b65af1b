"""What every tokenizer on a frozen encoder shares: calling conventions, latent statistics, checkpoints."""

import copy
import json
import math
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Self

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.autoencoders.vae import AutoencoderMixin, DecoderOutput, EncoderOutput, IdentityDistribution
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import logging
from diffusers.utils.accelerate_utils import apply_forward_hook
from huggingface_hub import create_repo, upload_folder

from ..statistics import StreamingMoments
from .buffers import ChannelAffine
from .encoders import (
    EncoderUnavailableError,
    FrozenEncoder,
    canonical_keys,
    check_finite,
    check_pixels,
    load_pretrained_encoder,
    weights_digest,
)
from .tiling import tiled_map

logger = logging.get_logger(__name__)

_HUB_ARGUMENTS = ("cache_dir", "force_download", "proxies", "local_files_only", "token", "revision", "subfolder")
# Of the encoder's weights in a checkpoint that has them.
ENCODER_PREFIX = "encoder.model."
# While `from_pretrained(encoder=...)` runs: the encoder it asks for, and how to reach the Hub.
_requested_encoder: ContextVar[tuple[str | None, dict[str, Any]]] = ContextVar("requested_encoder", default=(None, {}))
# Which of a call's Hub arguments hold for the encoder's repository as well.
_SHARED_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token")


@dataclass
class TokenizerEncoderOutput(EncoderOutput):
    """Latents, under the names that diffusers' pipelines and training scripts look for.

    Attributes:
        latent: `(B, C, h, w)`: zero mean and unit variance per channel over the data the tokenizer was fitted on.
    """

    @property
    def latents(self) -> torch.Tensor:
        """The same tensor: what `retrieve_latents` of diffusers' pipelines reads."""
        return self.latent

    @property
    def latent_dist(self) -> IdentityDistribution:
        """A distribution without spread: `.sample()` and `.mode()` are the latents."""
        return IdentityDistribution(self.latent)


class TokenizerModel(ModelMixin, AutoencoderMixin, ConfigMixin):
    """Base of the image tokenizers on a frozen vision encoder.

    A subclass registers its config, builds `self.encoder` with `_build_encoder` (after `super().__init__()`), and
    defines `_encode` and `_decode` between pixels and unnormalised latents. Its config has `encoder_config`,
    `image_mean`, `image_std`, `patch_size`, `latent_channels`, `latents_mean`, `latents_std`, `encoder_repository`,
    `encoder_revision` and `encoder_digest`.

    Most tokenizers take pictures of any size in whole patches, and have one latent per patch. One that is made for a
    single resolution sets `image_size` and `fixed_grid`.

    Attributes:
        image_size: Height and width of the only pictures it takes; None for any multiple of `patch_size`.
        fixed_grid: Rows and columns of its latents, then; else None.
    """

    main_input_name = "sample"
    _supports_gradient_checkpointing = True
    _supports_group_offloading = True
    _skip_layerwise_casting_patterns = ["embeddings", "norm"]

    encoder: FrozenEncoder
    latents_affine: ChannelAffine
    image_size: int | None = None
    fixed_grid: tuple[int, int] | None = None

    # ---------------------------------------------------------------------------------------------- construction

    def register_to_config(self, **values) -> None:
        """Put values into the config, and no longer take them for the constructor's defaults.

        `from_config(model.config)` drops what diffusers takes for a default: the latents' statistics, for one, which
        `fit` adds.
        """
        super().register_to_config(**values)
        defaults = self.config.get("_use_default_values")
        if defaults and "_use_default_values" not in values:
            super().register_to_config(_use_default_values=[name for name in defaults if name not in values])

    @classmethod
    def from_encoder(
        cls,
        name_or_path: str,
        revision: str | None = None,
        *,
        image_mean: list[float] | None = None,
        image_std: list[float] | None = None,
        token: str | bool | None = None,
        cache_dir: str | None = None,
        local_files_only: bool = False,
        **config,
    ) -> Self:
        """Build an untrained tokenizer on the frozen encoder of a Hub repository or a local folder.

        Args:
            name_or_path: Such as `facebook/dinov2-with-registers-base`, or a folder in `transformers`' layout.
            revision: Branch, tag or commit of the repository.
            image_mean: Overrides the encoder's own `preprocessor_config.json`.
            image_std: Likewise.
            token: Hub token, for gated encoders.
            cache_dir: Where Hub files are kept.
            local_files_only: Do not reach for the network.
            **config: Any other argument of the constructor.

        Raises:
            EncoderUnavailableError: If the encoder is missing, gated, incomplete or out of reach.
            ValueError: If it is not a plain vision transformer.
        """
        found = load_pretrained_encoder(
            name_or_path, revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only
        )
        model = cls(
            encoder_config=found.config,
            image_mean=list(image_mean or found.image_mean),
            image_std=list(image_std or found.image_std),
            encoder_repository=None if os.path.isdir(name_or_path) else str(name_or_path),
            encoder_revision=found.commit or revision,  # a branch moves
            encoder_digest=weights_digest(found.weights),
            **config,
        )
        model.encoder.model.load_state_dict(found.weights)
        model.encoder.check_against_backbone()
        return model.eval()

    def _build_encoder(self) -> FrozenEncoder:
        config = self.config
        return FrozenEncoder(config.encoder_config, config.image_mean, config.image_std, config.patch_size)

    def _build_latents_affine(self) -> ChannelAffine:
        channels = self.config.latent_channels
        grid = self.fixed_grid or (1, 1)
        mean, std = self.config.latents_mean, self.config.latents_std
        if len(mean or std or ()) != channels * grid[0] * grid[1]:  # then they are not per position
            grid = (1, 1)
        count = channels * grid[0] * grid[1]
        mean, std = mean or [0.0] * count, std or [1.0] * count
        for name, values in (("latents_mean", mean), ("latents_std", std)):
            if len(values) != count:
                raise ValueError(f"{name} has {len(values)} values, but there are {channels} latent channels.")
            if not all(map(math.isfinite, values)):
                raise ValueError(f"{name} contains NaN or infinite values.")
        if min(std) <= 0:
            raise ValueError(f"latents_std must be positive, got a minimum of {min(std)}.")
        return ChannelAffine(mean, std, grid=grid)

    # ------------------------------------------------------------------------------------------ encode and decode

    def _encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels to latents before normalisation."""
        raise NotImplementedError

    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents before normalisation, float32, to pixels."""
        raise NotImplementedError

    @apply_forward_hook
    def encode(
        self, pixels: torch.Tensor, return_dict: bool = True
    ) -> TokenizerEncoderOutput | tuple[torch.Tensor, ...]:
        """Return the normalised latents of pictures. Deterministic, in training mode too.

        Args:
            pixels: `(B, 3, H, W)` in [-1, 1]; H and W multiples of `patch_size`, or equal to `image_size` if there
                is one.
            return_dict: Return an output object rather than a tuple.

        Returns:
            `.latent` of shape `(B, latent_channels, *latent_grid(H, W))`.

        Raises:
            ValueError: If the shape is another.
        """
        self._check_pixels(pixels)
        latents = self._sliced(self._encode_tiled, pixels)
        latents = self.latents_affine.normalize(latents).to(latents.dtype)
        return TokenizerEncoderOutput(latent=latents) if return_dict else (latents,)

    @apply_forward_hook
    def decode(
        self, latents: torch.Tensor, return_dict: bool = True, generator: torch.Generator | None = None
    ) -> DecoderOutput | tuple[torch.Tensor, ...]:
        """Return the pictures of normalised latents.

        Args:
            latents: `(B, latent_channels, h, w)`, as `encode` returns them.
            return_dict: Return an output object rather than a tuple.
            generator: Not used, since decoding is deterministic; diffusers' pipelines pass one.

        Returns:
            `.sample` of shape `(B, 3, H, W)` with `latent_grid(H, W) = (h, w)`, about [-1, 1], not clamped.

        Raises:
            ValueError: If the shape is another.
        """
        self._check_latents(latents)
        sample = self._sliced(self._decode_tiled, self.latents_affine.denormalize(latents))
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def latent_grid(self, height: int, width: int) -> tuple[int, int]:
        """Return the rows and columns of the latents of a picture.

        Args:
            height: Pixels.
            width: Pixels.

        Returns:
            `(height / patch_size, width / patch_size)`, or the one grid there is.

        Raises:
            ValueError: If `encode` does not take pictures of this size.
        """
        if self.image_size is not None and (height, width) != (self.image_size, self.image_size):
            raise ValueError(
                f"Image size {height}x{width}: this {type(self).__name__} takes pictures of {self.image_size}x"
                f"{self.image_size} pixels only. Resize or crop them; `ImageProcessor.from_model` does."
            )
        if height % self.patch_size or width % self.patch_size or not (height and width):
            raise ValueError(f"Image size {height}x{width} is not a multiple of patch_size={self.patch_size}.")
        return self.fixed_grid or (height // self.patch_size, width // self.patch_size)

    def _check_pixels(self, pixels: torch.Tensor) -> None:
        check_pixels(pixels, self.patch_size)
        self.latent_grid(*pixels.shape[2:])

    def _check_latents(self, latents: torch.Tensor) -> None:
        self._check_grid("Latents", latents, self.latent_channels)

    def _check_grid(self, name: str, values: torch.Tensor, channels: int) -> None:
        """Check that there are as many channels, on the one grid of latents if there is one."""
        rows, columns = self.fixed_grid or ("h", "w")
        fits = values.ndim == 4 and values.shape[1] == channels
        if not fits or (self.fixed_grid and tuple(values.shape[2:]) != self.fixed_grid):
            raise ValueError(f"{name} must have shape (B, {channels}, {rows}, {columns}), got {tuple(values.shape)}.")

    def forward(self, sample: torch.Tensor, return_dict: bool = True) -> DecoderOutput | tuple[torch.Tensor, ...]:
        """Return the reconstruction of pixels, `decode(encode(sample).latent)`; the argument has diffusers' name."""
        return self.decode(self.encode(sample, return_dict=False)[0], return_dict=return_dict)

    # ------------------------------------------------------------------------------------------- memory for size

    def enable_tiling(self, tile_size: int | None = None, tile_overlap: int | None = None) -> None:
        """Encode and decode large pictures in overlapping tiles, in memory that does not grow with the picture.

        A tiled picture is not the untiled one: the encoder's global attention, and the decoder's attention and group
        norms, see one tile at a time. Overlaps are blended, so there are no visible seams.

        Args:
            tile_size: Side of a tile in pixels (default 512), a multiple of the patch size.
            tile_overlap: How much neighbouring tiles share, in pixels (default a quarter of the tile), likewise.

        Raises:
            ValueError: If a number is no multiple of the patch size or the overlap is not less than the tile; and
                always for a tokenizer of one resolution, whose tiles would have to be whole pictures.
        """
        if self.image_size is not None:
            raise ValueError(
                f"A {type(self).__name__} takes pictures of {self.image_size}x{self.image_size} pixels only, and its "
                "tokens describe regions of a whole picture: there is no tiling."
            )
        tile = 512 // self.patch_size * self.patch_size if tile_size is None else tile_size
        overlap = tile // (4 * self.patch_size) * self.patch_size if tile_overlap is None else tile_overlap
        for name, value in (("tile_size", tile), ("tile_overlap", overlap)):
            if value % self.patch_size or value < 0:
                raise ValueError(f"{name}={value} is not a multiple of patch_size={self.patch_size}.")
        if overlap >= tile:
            raise ValueError(f"tile_overlap={overlap} must be less than tile_size={tile}.")
        self.tile_size, self.tile_overlap = tile, overlap
        super().enable_tiling()

    def _init_memory_options(self) -> None:
        self.use_slicing = False
        self.use_tiling = False
        self.tile_size = self.tile_overlap = 0

    def _encode_tiled(self, pixels: torch.Tensor) -> torch.Tensor:
        if not self._needs_tiles(pixels.shape[2:], self.tile_size):
            return self._encode(pixels)
        return tiled_map(self._encode, pixels, self.tile_size, self.tile_overlap, Fraction(1, self.patch_size))

    def _decode_tiled(self, latents: torch.Tensor) -> torch.Tensor:
        tile, overlap = self.tile_size // self.patch_size, self.tile_overlap // self.patch_size
        if not self._needs_tiles(latents.shape[2:], tile):
            return self._decode(latents)
        return tiled_map(self._decode, latents, tile, overlap, Fraction(self.patch_size))

    def _needs_tiles(self, size: Iterable[int], tile: int) -> bool:
        return self.use_tiling and any(side > tile for side in size)

    def _sliced(self, function, values: torch.Tensor) -> torch.Tensor:
        if not self.use_slicing or values.shape[0] <= 1:
            return function(values)
        return torch.cat([function(row) for row in values.split(1)])

    # --------------------------------------------------------------------------------------- latent statistics

    @property
    def latents_mean(self) -> torch.Tensor:
        """What `encode` subtracts, float32: `(latent_channels,)`, or `(latent_channels, h, w)` if per position."""
        return _without_unit_grid(self.latents_affine.mean[0])

    @property
    def latents_std(self) -> torch.Tensor:
        """What `encode` divides by, float32: `(latent_channels,)`, or `(latent_channels, h, w)` if per position."""
        return _without_unit_grid(self.latents_affine.std[0])

    @torch.no_grad()
    def fit_latents_statistics(self, batches: Iterable[torch.Tensor]) -> Self:
        """Measure the latents' mean and standard deviation per channel, in one pass, and keep them in the config.

        Reconstructions do not change: `decode` undoes what `encode` does. Call it after training anything before the
        latents, and before training a generator on them.

        Args:
            batches: An iterable of `(B, 3, H, W)` pixels in [-1, 1]; sizes may differ between batches.

        Returns:
            The model.
        """
        moments = StreamingMoments(self.latent_channels, covariance=False)
        for pixels in self._pixel_batches(batches):
            moments.update(channels_last_rows(self._encode_tiled(pixels)))
        moments.all_reduce()
        self._set_latents_statistics(moments.mean, moments.variance.sqrt())
        return self

    def _set_latents_statistics(self, mean: torch.Tensor, std: torch.Tensor) -> None:
        floor = 1e-6 * float(std.max().clamp(min=1e-6))  # a channel that never varies is left as it is
        std = torch.where(std > floor, std, torch.ones_like(std))
        self.register_to_config(latents_mean=mean.float().tolist(), latents_std=std.float().tolist())
        self.latents_affine = self._build_latents_affine().to(self.device)

    def _pixel_batches(self, batches: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
        for index, pixels in enumerate(batches):
            try:
                self._check_pixels(pixels)
            except ValueError as error:
                raise ValueError(f"Batch {index}: {error}") from error
            low, high = float(pixels.min()), float(pixels.max())
            if not (low >= -1.01 and high <= 1.01):  # also catches NaN
                raise ValueError(f"Batch {index}: pixels must lie in [-1, 1], got [{low:.4g}, {high:.4g}].")
            yield pixels.to(self.device)

    # ---------------------------------------------------------------------------------------------- checkpoints

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str = "10GB",
        push_to_hub: bool = False,
        *,
        include_encoder: bool = True,
        **kwargs,
    ) -> None:
        """Write `config.json` and safetensors weights, each file complete or not at all.

        Files are written to a temporary folder beside the target and renamed into it, weights before config.

        Args:
            save_directory: The folder; made if it is missing, and other files in it stay.
            is_main_process: A process that is not the main one writes nothing.
            safe_serialization: Must be True.
            variant: Goes into the names of the files.
            max_shard_size: Of a file; without the encoder there is one file.
            push_to_hub: Upload the folder afterwards; `repo_id`, `token`, `private` and `commit_message` as in
                diffusers.
            include_encoder: `False` leaves the frozen encoder out: the config then names its repository, revision and
                digest, and `from_pretrained` fetches it from there.
            **kwargs: The arguments of the upload; others as in diffusers.

        Raises:
            ValueError: If `safe_serialization=False` is asked for: this library writes no pickles.
        """
        if not safe_serialization:
            raise ValueError("safe_serialization=False would write a pickle: only safetensors are supported.")
        if os.path.isfile(save_directory):
            raise ValueError(f"{os.fspath(save_directory)!r} is a file, not a folder.")
        hub = {key: kwargs.pop(key) for key in ("repo_id", "token", "private", "commit_message") if key in kwargs}
        if not is_main_process:
            return
        target = Path(save_directory)
        target.parent.mkdir(parents=True, exist_ok=True)
        model = self if include_encoder else self._without_encoder()
        if not include_encoder:
            max_shard_size = "1TB"  # one file, which from_pretrained completes with the encoder
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as folder:
            super(TokenizerModel, model).save_pretrained(
                folder, variant=variant, max_shard_size=max_shard_size, **kwargs
            )
            _drop_local_path(Path(folder) / self.config_name)
            _move_into(Path(folder), target, variant)
        if push_to_hub:
            token, message = hub.get("token"), hub.get("commit_message")
            repo_id = hub.get("repo_id", target.name)
            repo_id = create_repo(repo_id, private=hub.get("private"), token=token, exist_ok=True).repo_id
            upload_folder(repo_id=repo_id, folder_path=target, token=token, commit_message=message)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, *, encoder: str | os.PathLike | None = None, **kwargs
    ) -> Self:
        """Load a tokenizer from a folder or the Hub.

        Args:
            pretrained_model_name_or_path: Folder or repository.
            encoder: Folder or repository of the frozen encoder, for a checkpoint saved without it; by default the one
                that the config names.
            **kwargs: As in diffusers: `dtype`, `subfolder`, `revision`, `token`, `variant`, ...; `token`, `cache_dir`,
                `local_files_only` and `force_download` hold for the encoder's repository, too.

        Raises:
            EncoderUnavailableError: If the encoder is missing, gated, out of reach, or not the one whose digest the
                config carries.
            ValueError: If the checkpoint is another class's, lacks weights or has extra ones, holds NaN, or has an
                encoder of its own although one was passed.
            OSError: If files are missing or damaged.
        """
        if kwargs.get("use_safetensors") is False:
            raise ValueError("use_safetensors=False would read a pickle: only safetensors are supported.")
        config = cls.load_config(
            pretrained_model_name_or_path, **{key: kwargs[key] for key in _HUB_ARGUMENTS if key in kwargs}
        )
        found = config.get("_class_name")
        if found != cls.__name__:
            raise ValueError(f"{str(pretrained_model_name_or_path)!r} holds a {found}, not a {cls.__name__}.")
        wants_report = kwargs.pop("output_loading_info", False)
        kwargs["use_safetensors"] = True
        kwargs.pop("low_cpu_mem_usage", None)  # what stays float32 is told apart only on the way through empty weights
        shared = {key: kwargs[key] for key in _SHARED_HUB_ARGUMENTS if key in kwargs}
        requested = _requested_encoder.set((None if encoder is None else os.fspath(encoder), shared))
        try:
            loaded: Any = super().from_pretrained(pretrained_model_name_or_path, output_loading_info=True, **kwargs)
        finally:
            _requested_encoder.reset(requested)
        model, report = loaded
        _check_loaded(model, report, str(pretrained_model_name_or_path), bool(kwargs.get("ignore_mismatched_sizes")))
        return loaded if wants_report else model

    @classmethod
    def _dict_from_json_file(cls, json_file: str | os.PathLike) -> dict[str, Any]:
        """Read `config.json` without the entry that names code for `AutoModel`, which is no part of the model."""
        config = super()._dict_from_json_file(json_file)
        config.pop("auto_map", None)
        return config

    def _fix_state_dict_keys_on_load(self, state_dict: dict[str, torch.Tensor]) -> None:
        """Complete a checkpoint saved without its encoder, and follow `transformers` where it renamed modules."""
        super()._fix_state_dict_keys_on_load(state_dict)
        inside = {
            key.removeprefix(ENCODER_PREFIX): state_dict.pop(key)
            for key in list(state_dict)
            if key.startswith(ENCODER_PREFIX)
        }
        passed, _ = _requested_encoder.get()
        if inside and passed is not None:
            raise ValueError(f"encoder={passed!r} was passed, but the checkpoint has its own encoder: leave it out.")
        weights = inside or self._fetch_encoder()
        stored = canonical_keys(weights)
        renamed = {
            stored[name]: key
            for name, key in canonical_keys(self.encoder.model.state_dict()).items()
            if name in stored
        }
        state_dict.update({ENCODER_PREFIX + renamed.get(key, key): value for key, value in weights.items()})

    def _fetch_encoder(self) -> dict[str, torch.Tensor]:
        """Load the encoder that a checkpoint was saved without, and check that it is the right one."""
        config = self.config
        passed, hub_arguments = _requested_encoder.get()
        source = passed or config.encoder_repository
        if source is None:
            raise EncoderUnavailableError(
                "This checkpoint was saved without its encoder, and the encoder came from a local folder: pass "
                "from_pretrained(..., encoder='path/to/the/encoder')."
            )
        revision = config.encoder_revision if source == config.encoder_repository else None
        weights = load_pretrained_encoder(source, revision, **hub_arguments).weights
        digest = weights_digest(weights)
        if config.encoder_digest is not None and digest != config.encoder_digest:
            raise EncoderUnavailableError(
                f"The encoder at {source!r} is not the one this tokenizer was made with: its digest is "
                f"{digest[:16]}..., the config says {config.encoder_digest[:16]}..."
            )
        return weights

    def _without_encoder(self) -> Self:
        """Return a shallow copy whose state dict lacks the encoder and whose config identifies it."""
        shell = copy.copy(self)
        shell._modules = {name: module for name, module in self._modules.items() if name != "encoder"}
        has_weights = not any(parameter.is_meta for parameter in self.encoder.parameters())
        if self.config.encoder_digest is None and has_weights:
            shell.register_to_config(encoder_digest=self.encoder.digest())
        return shell


def channels_last_rows(grid: torch.Tensor) -> torch.Tensor:
    """`(B, C, h, w)` to `(B * h * w, C)`."""
    return grid.permute(0, 2, 3, 1).flatten(0, 2)


def _without_unit_grid(statistics: torch.Tensor) -> torch.Tensor:
    """`(C, 1, 1)` to `(C,)`; statistics per position stay `(C, h, w)`."""
    return statistics.flatten() if statistics.shape[1:] == (1, 1) else statistics


def _check_loaded(model: ModelMixin, report: dict[str, Any], source: str, allow_mismatched: bool) -> None:
    """Raise unless every weight was found, fitted and is finite."""
    for problem in ("missing_keys", "unexpected_keys"):
        keys = sorted(report[problem])
        if keys:
            raise ValueError(
                f"The weights in {source!r} do not fit {type(model).__name__}: "
                f"{len(keys)} {problem.replace('_', ' ')}, first {keys[0]!r}."
            )
    if report["mismatched_keys"] and not allow_mismatched:
        raise ValueError(
            f"Tensors in {source!r} have other shapes than the config says: {report['mismatched_keys'][0]}."
        )
    check_finite(model.state_dict().items(), source)


def _drop_local_path(config_file: Path) -> None:
    """Remove the folder a model was loaded from out of its saved config."""
    config = json.loads(config_file.read_text(encoding="utf-8"))
    config.pop("_name_or_path", None)
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _move_into(folder: Path, target: Path, variant: str | None) -> None:
    """Rename the files of a finished folder into the target, the config last, and drop weights they supersede."""
    target.mkdir(exist_ok=True)
    names = sorted((path.name for path in folder.iterdir()), key=lambda name: (name == ModelMixin.config_name, name))
    for name in names:
        os.replace(folder / name, target / name)
    stem, infix = "diffusion_pytorch_model", f".{variant}" if variant else ""
    superseded = [
        target / f"{stem}{infix}.safetensors",
        target / f"{stem}.safetensors.index{infix}.json",
        *target.glob(f"{stem}{infix}-?????-of-?????.safetensors"),
    ]
    for path in superseded:
        if path.name not in names:
            path.unlink(missing_ok=True)
