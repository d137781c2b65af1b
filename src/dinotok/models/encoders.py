"""The frozen vision encoder: the only file that knows how a `transformers` vision backbone is built."""

import hashlib
import inspect
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers.models.modeling_utils import get_parameter_dtype
from diffusers.utils import logging
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.image_processing_base import ImageProcessingMixin
from transformers.models.auto.modeling_auto import MODEL_MAPPING
from transformers.utils import cached_file, extract_commit_hash
from transformers.utils import logging as transformers_logging

from ..bundled import resolve_bundled
from .buffers import ChannelAffine

logger = logging.get_logger(__name__)

# What the families' published checkpoints are normalised with: used, with a warning, when an encoder's folder has no
# preprocessor_config.json.
_IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
_HALF = ([0.5, 0.5, 0.5], [0.5, 0.5, 0.5])
_CLIP = ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])
_PUBLISHED_NORMALIZATION = {
    "dinov2": _IMAGENET,
    "dinov2_with_registers": _IMAGENET,
    "dinov3_vit": _IMAGENET,
    "vit_mae": _IMAGENET,
    "ijepa": _IMAGENET,
    "vit": _HALF,
    "siglip_vision_model": _HALF,
    "clip_vision_model": _CLIP,
}
_HUB_ARGUMENTS = ("token", "cache_dir", "local_files_only", "force_download", "subfolder")
# Where the families keep their transformer blocks, their final norm, and what they have that features do not need.
_BLOCK_PATHS = ("encoder.layer", "encoder.layers", "model.layer", "model.layers", "layers", "layer")
_NORM_NAMES = ("layernorm", "norm", "post_layernorm")
_UNUSED_MODULES = ("pooler", "head")
_WRAPPER_SEGMENTS = {"model", "encoder", "vision_model", "vit"}


class EncoderUnavailableError(OSError):
    """The encoder's weights cannot be had: missing, gated, offline, or not the ones the tokenizer was made with."""


class FrozenEncoder(nn.Module):
    """Feature grids of the hidden states of a frozen vision transformer.

    Layers are named by hidden-state index: 0 is the embedding output, `i` the output of block `i`, and the last one,
    `num_layers`, is taken after the final norm. The weights never require gradients and the module never leaves
    evaluation mode (a DINOv3 in training mode jitters its rotary embedding), but gradients flow *through* it to the
    pixels: there is no `no_grad` here, the caller decides.

    Args:
        encoder_config: The `to_dict()` of a `transformers` configuration, with its `model_type` (`dinov2`,
            `dinov2_with_registers`, `dinov3_vit`, `vit`, `siglip_vision_model`, `clip_vision_model`, `vit_mae`, ...).
        image_mean: Three numbers the encoder's input in [0, 1] is normalised with.
        image_std: Three positive numbers, likewise.
        patch_size: Pixels per feature, on each side. `None` means the encoder's own patch size; when it differs, the
            picture is first resized by `encoder patch size / patch_size` (bicubic, antialiased), so that a patch-14
            encoder gives one feature per 16 pixels.

    Raises:
        ValueError: If `encoder_config` is not that of a plain vision transformer this class can run.
    """

    def __init__(
        self,
        encoder_config: dict[str, Any],
        image_mean: Sequence[float] = _IMAGENET[0],
        image_std: Sequence[float] = _IMAGENET[1],
        patch_size: int | None = None,
    ):
        super().__init__()
        config = _build_config(encoder_config)
        self.model = _strip(AutoModel.from_config(config, attn_implementation="sdpa"))
        self.normalization = ChannelAffine(list(image_mean), list(image_std))
        self.encoder_patch_size = int(config.patch_size)
        self.patch_size = patch_size or self.encoder_patch_size
        self.hidden_size: int = config.hidden_size
        self.num_layers: int = config.num_hidden_layers
        self._blocks_path = _find(self.model, _BLOCK_PATHS, "transformer blocks")
        self._norm_name = _find(self.model, _NORM_NAMES, "final norm")
        self._embedding_arguments = set(inspect.signature(self.model.embeddings.forward).parameters)
        self.requires_grad_(False)
        self.eval()

    @classmethod
    def from_encoder(
        cls,
        name_or_path: str,
        revision: str | None = None,
        *,
        patch_size: int | None = None,
        image_mean: Sequence[float] | None = None,
        image_std: Sequence[float] | None = None,
        **hub_arguments,
    ) -> "FrozenEncoder":
        """Build the encoder of a Hub repository or a local folder, with its weights and its own normalisation.

        Args:
            name_or_path: A repository such as `facebook/dinov2-with-registers-base`, or a folder.
            revision: Branch, tag or commit of the repository.
            patch_size: See the class.
            image_mean: Overrides the repository's `preprocessor_config.json`.
            image_std: Likewise.
            **hub_arguments: `token`, `cache_dir`, `local_files_only`, `force_download`, `subfolder`.

        Raises:
            EncoderUnavailableError: If the repository or folder is missing, gated, incomplete or out of reach.
            ValueError: If it holds something else than a plain vision transformer.
        """
        found = load_pretrained_encoder(name_or_path, revision, **hub_arguments)
        encoder = cls(found.config, image_mean or found.image_mean, image_std or found.image_std, patch_size)
        encoder.model.load_state_dict(found.weights)
        encoder.check_against_backbone()
        return encoder

    def train(self, mode: bool = True) -> "FrozenEncoder":
        """Stay in evaluation mode: a frozen encoder has no other."""
        return super().train(False)

    def forward(self, pixels: torch.Tensor, layers: Sequence[int] | None = None) -> tuple[torch.Tensor, ...]:
        """Return the feature grids of the named hidden states, in one pass.

        Args:
            pixels: `(B, 3, H, W)` in [-1, 1]; H and W multiples of `patch_size`, not necessarily equal.
            layers: Hidden-state indices in `0 ... num_layers`, in any order; by default the last. Blocks after the
                highest of them are not computed.

        Returns:
            One `(B, hidden_size, H / patch_size, W / patch_size)` grid for each of `layers`, in their order.

        Raises:
            ValueError: If a size is not a multiple of `patch_size`, or a layer does not exist or none is named.
        """
        sequences = self.tokens(pixels, layers)
        grid = (pixels.shape[2] // self.patch_size, pixels.shape[3] // self.patch_size)
        return tuple(_to_grid(tokens, grid) for tokens in sequences)

    def tokens(self, pixels: torch.Tensor, layers: Sequence[int] | None = None) -> tuple[torch.Tensor, ...]:
        """Return the token sequences of the named hidden states, class and register tokens included, in one pass.

        Args:
            pixels: As in `forward`.
            layers: Likewise.

        Returns:
            One `(B, P + h * w, hidden_size)` sequence for each of `layers`: the P prefix tokens, of which the class
            token is the first where the backbone has one, then the patches in raster order.

        Raises:
            ValueError: As `forward`.
        """
        wanted = (self.num_layers,) if layers is None else tuple(layers)
        self._check_layers(wanted)
        hidden = self._hidden_states(pixels, set(wanted))
        return tuple(hidden[layer] for layer in wanted)

    def last_layers_sum(self, pixels: torch.Tensor, num_layers: int, also: Sequence[int] = ()) -> tuple:
        """Return the sum of the last `num_layers` hidden states, each after the final norm, then the layers of `also`.

        The parameter-free fusion of RAEv2 (arXiv 2605.18324), kept as a baseline for deep + shallow latents. One
        layer gives the ordinary deep features.
        """
        last = range(self.num_layers - num_layers + 1, self.num_layers + 1)
        self._check_layers((*last, *also))
        hidden = self._hidden_states(pixels, {*last, *also})
        norm = getattr(self.model, self._norm_name)
        deep = sum(norm(hidden[layer]) for layer in last[:-1]) + hidden[self.num_layers]
        grid = (pixels.shape[2] // self.patch_size, pixels.shape[3] // self.patch_size)
        return tuple(_to_grid(tokens, grid) for tokens in (deep, *(hidden[layer] for layer in also)))

    def digest(self) -> str:
        """Return the SHA-256 of the weights as float32, so that a float16 copy and its float32 twin agree."""
        return weights_digest(self.model.state_dict())

    @torch.no_grad()
    def check_against_backbone(self) -> None:
        """Compare this class's pass with the backbone's own on a small picture.

        Raises:
            ValueError: If they differ, as they would for a backbone whose blocks need more than this class gives them.
        """
        size = self.encoder_patch_size
        image_size = getattr(self.model.config, "image_size", 2 * size)
        height, width = image_size if isinstance(image_size, (list, tuple)) else (image_size, image_size)
        generator = torch.Generator().manual_seed(0)
        inputs = torch.randn(1, 3, height, width, generator=generator).to(self.model.device, self.model.dtype)
        tokens = self._run(inputs, {self.num_layers})[self.num_layers]
        arguments = {"noise": self._patch_order(inputs)} if "noise" in self._embedding_arguments else {}
        expected = self.model(inputs, **arguments).last_hidden_state
        if self.model.config.model_type == "clip_vision_model":  # CLIP norms its pooled token only
            expected = getattr(self.model, self._norm_name)(expected)
        if not torch.allclose(tokens, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max())):
            raise ValueError(
                f"The features of model_type={self.model.config.model_type!r} differ from the backbone's own output "
                f"by up to {float((tokens - expected).abs().max()):.3g}: this architecture is not supported."
            )

    def _check_layers(self, layers: Sequence[int]) -> None:
        if not layers:
            raise ValueError("layers is empty; expected at least one hidden-state index.")
        for layer in layers:
            if not 0 <= layer <= self.num_layers:
                raise ValueError(
                    f"Layer {layer} does not exist: the encoder has hidden states 0 to {self.num_layers}."
                )

    def _hidden_states(self, pixels: torch.Tensor, layers: set[int]) -> dict[int, torch.Tensor]:
        check_pixels(pixels, self.patch_size)
        inputs = self.normalization.normalize(pixels.float() * 0.5 + 0.5)
        if self.patch_size != self.encoder_patch_size:
            size = [side // self.patch_size * self.encoder_patch_size for side in pixels.shape[2:]]
            inputs = F.interpolate(inputs, size=size, mode="bicubic", antialias=True)
        return self._run(inputs.to(get_parameter_dtype(self.model)), layers)

    def _run(self, inputs: torch.Tensor, layers: set[int]) -> dict[int, torch.Tensor]:
        """Return the token sequences `(B, prefix + h * w, hidden_size)` of the wanted hidden states."""
        tokens = self._embed(inputs)
        hidden = {0: tokens} if 0 in layers else {}
        arguments = {}
        if hasattr(self.model, "rope_embeddings"):
            arguments["position_embeddings"] = self.model.rope_embeddings(inputs)
        for index, block in enumerate(self.model.get_submodule(self._blocks_path)[: max(layers)], start=1):
            output = block(tokens, attention_mask=None, **arguments)
            tokens = output[0] if isinstance(output, tuple) else output
            if index in layers:
                hidden[index] = tokens if index < self.num_layers else getattr(self.model, self._norm_name)(tokens)
        return hidden

    def _embed(self, inputs: torch.Tensor) -> torch.Tensor:
        arguments: dict[str, Any] = {}
        if "interpolate_pos_encoding" in self._embedding_arguments:
            arguments["interpolate_pos_encoding"] = True
        if "noise" in self._embedding_arguments:
            arguments["noise"] = self._patch_order(inputs)
        tokens = self.model.embeddings(inputs, **arguments)
        tokens = tokens[0] if isinstance(tokens, tuple) else tokens
        return self.model.pre_layrnorm(tokens) if hasattr(self.model, "pre_layrnorm") else tokens

    def _patch_order(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return the "noise" that makes a masked autoencoder keep its patches, all of them, in order."""
        count = (inputs.shape[2] // self.encoder_patch_size) * (inputs.shape[3] // self.encoder_patch_size)
        return torch.arange(count, device=inputs.device, dtype=torch.float32).expand(inputs.shape[0], -1)


def check_pixels(pixels: torch.Tensor, patch_size: int) -> None:
    """Raise a `ValueError` unless `pixels` is a `(B, 3, H, W)` float tensor of whole patches, B at least 1."""
    if not isinstance(pixels, torch.Tensor):
        raise ValueError(f"Pixels are a {type(pixels).__name__}, not a (B, 3, H, W) tensor of pixels.")
    if pixels.ndim != 4 or pixels.shape[1] != 3 or not pixels.shape[0]:
        raise ValueError(f"Pixels must have shape (B, 3, H, W), got {tuple(pixels.shape)}.")
    if not pixels.is_floating_point():
        raise ValueError(f"Pixels must be floats in [-1, 1], got {pixels.dtype}.")
    height, width = pixels.shape[2:]
    if height % patch_size or width % patch_size or not (height and width):
        raise ValueError(f"Image size {height}x{width} is not a multiple of patch_size={patch_size}.")


def canonical_keys(state_dict: dict[str, torch.Tensor]) -> dict[str, str]:
    """Map a name that survives `transformers`' moves of whole sub-modules to each key of an encoder's state dict."""
    names: dict[str, str] = {}
    for key in state_dict:
        name = ".".join(part for part in key.split(".") if part not in _WRAPPER_SEGMENTS)
        names[name.replace("layers.", "layer.")] = key
    return names


def weights_digest(state_dict: dict[str, torch.Tensor]) -> str:
    """Return the SHA-256 over canonical names and float32 values of an encoder's state dict."""
    digest = hashlib.sha256()
    for name, key in sorted(canonical_keys(state_dict).items()):
        digest.update(name.encode())
        digest.update(state_dict[key].detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()


def check_finite(weights: Iterable[tuple[str, torch.Tensor]], source: str) -> None:
    """Raise a `ValueError` that names the first tensor with a NaN or infinite value."""
    for name, values in weights:
        if values.is_floating_point() and not torch.isfinite(values).all():
            raise ValueError(f"The weights in {source!r} contain NaN or infinite values, first in {name!r}.")


class PretrainedEncoder(NamedTuple):
    """What a repository or folder says about an encoder.

    Attributes:
        config: Rebuilds the architecture.
        weights: In float32.
        image_mean: What its input in [0, 1] is normalised with.
        image_std: Likewise.
        commit: Of the repository; None for a folder.
    """

    config: dict[str, Any]
    weights: dict[str, torch.Tensor]
    image_mean: list[float]
    image_std: list[float]
    commit: str | None


def load_pretrained_encoder(name_or_path: str, revision: str | None = None, **hub_arguments) -> PretrainedEncoder:
    """Fetch an encoder.

    Raises:
        EncoderUnavailableError: If the repository or folder is missing, gated, incomplete, damaged or out of reach.
        ValueError: If it holds no vision transformer, no normalisation is known for it, or its weights have NaN.
    """
    unknown = set(hub_arguments) - set(_HUB_ARGUMENTS)
    if unknown:
        raise TypeError(f"Unknown arguments {sorted(unknown)}; the Hub arguments are {', '.join(_HUB_ARGUMENTS)}.")
    arguments = dict(hub_arguments, revision=revision)
    name_or_path = resolve_bundled(name_or_path)
    try:
        config = AutoConfig.from_pretrained(name_or_path, **arguments)
        commit = _commit(name_or_path, arguments)
        config = getattr(config, "vision_config", config)
        model_class = MODEL_MAPPING.get(type(config), None)
        if model_class is None:
            raise ValueError(f"{name_or_path!r} holds model_type={config.model_type!r}, not a vision transformer.")
        with _quiet_transformers():
            model, report = model_class.from_pretrained(
                name_or_path,
                config=config,
                dtype=torch.float32,
                use_safetensors=True,
                output_loading_info=True,
                **arguments,
            )
    except (OSError, SafetensorError) as error:
        raise EncoderUnavailableError(_explain(name_or_path, revision, error)) from error
    state_dict = _strip(model).state_dict()
    absent = sorted(set(report["missing_keys"]) & set(state_dict))
    if absent:
        raise EncoderUnavailableError(
            f"The weights of {name_or_path!r} are incomplete: {len(absent)} tensors are missing, first {absent[0]!r}."
        )
    check_finite(state_dict.items(), name_or_path)
    mean, std = _normalization(name_or_path, config.model_type, arguments)
    return PretrainedEncoder(config_to_dict(config), state_dict, mean, std, commit)


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Hide the report of weights we do not use (heads, poolers): missing ones we do use are an error of ours."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)


def config_to_dict(config: PretrainedConfig) -> dict[str, Any]:
    """Return what rebuilds the architecture: no paths, versions, dtypes or names of classes."""
    dropped = {
        "_name_or_path",
        "transformers_version",
        "dtype",
        "torch_dtype",
        "architectures",
        "_attn_implementation",
        "id2label",
        "label2id",
    }
    return {key: value for key, value in config.to_dict().items() if key not in dropped}


def _build_config(encoder_config: dict[str, Any]) -> PretrainedConfig:
    values = {key: value for key, value in encoder_config.items() if key not in ("dtype", "torch_dtype")}
    model_type = values.pop("model_type", None)
    if model_type is None:
        raise ValueError(f"encoder_config needs a 'model_type'; it has {sorted(values)}.")
    try:
        config = AutoConfig.for_model(model_type, **values)
    except ValueError as error:
        raise ValueError(f"model_type={model_type!r} is unknown to the installed transformers.") from error
    config = getattr(config, "vision_config", config)
    for name in ("hidden_size", "num_hidden_layers", "patch_size"):
        if not isinstance(getattr(config, name, None), int):
            raise ValueError(f"model_type={model_type!r} is not a plain vision transformer: it has no integer {name}.")
    if hasattr(config, "mask_ratio"):
        config.mask_ratio = 0.0
    return config


def _strip(model: PreTrainedModel) -> PreTrainedModel:
    """Remove the parts of a backbone that no feature grid depends on."""
    for name in _UNUSED_MODULES:
        if isinstance(getattr(model, name, None), nn.Module):
            setattr(model, name, None)
    if hasattr(model, "use_head"):
        model.use_head = False
    return model


def _find(model: nn.Module, names: Sequence[str], what: str) -> str:
    modules = dict(model.named_modules())
    for name in names:
        if name in modules and hasattr(model, "embeddings"):
            return name
    raise ValueError(f"{type(model).__name__} is not supported: its {what} are not at {', '.join(names)}.")


def _to_grid(tokens: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Drop the prefix tokens and lay the patch tokens out: the patches are the last h * w tokens."""
    height, width = grid
    return tokens[:, -height * width :].transpose(1, 2).unflatten(2, (height, width))


def _commit(name_or_path: str, arguments: dict) -> str | None:
    """The commit of a repository whose config is in the cache by now; None for a folder."""
    if os.path.isdir(name_or_path):
        return None
    return extract_commit_hash(cached_file(name_or_path, "config.json", **arguments), None)


def _normalization(name_or_path: str, model_type: str, arguments: dict) -> tuple[list[float], list[float]]:
    try:
        values, _ = ImageProcessingMixin.get_image_processor_dict(name_or_path, **arguments)
        return list(values["image_mean"]), list(values["image_std"])
    except (OSError, KeyError) as error:
        if model_type not in _PUBLISHED_NORMALIZATION:
            raise ValueError(
                f"{name_or_path!r} has no preprocessor_config.json with image_mean and image_std, and none is known "
                f"for model_type={model_type!r}: pass image_mean and image_std."
            ) from error
        mean, std = _PUBLISHED_NORMALIZATION[model_type]
        logger.warning(
            f"{name_or_path!r} has no preprocessor_config.json with image_mean and image_std: using those of the "
            f"published {model_type} checkpoints, mean {mean} and std {std}."
        )
        return mean, std


def _explain(name_or_path: str, revision: str | None, error: Exception) -> str:
    """Say in one message why the encoder could not be had and what to do."""
    where = f"{name_or_path!r}" + (f" at revision {revision!r}" if revision else "")
    causes = []
    cause: BaseException | None = error
    while cause is not None and cause not in causes:
        causes.append(cause)
        cause = cause.__cause__ or cause.__context__
    status = {c.response.status_code for c in causes if isinstance(c, HfHubHTTPError) and c.response is not None}
    hint = "Or pass encoder='path/to/the/encoder' (or name_or_path) with a local folder that has it."
    if any(isinstance(c, GatedRepoError) for c in causes) or 403 in status:
        return (
            f"The encoder {where} is gated: its owner asks you to accept a licence first. Open "
            f"https://huggingface.co/{name_or_path}, accept it, then log in with `hf auth login`. {hint}"
        )
    if any(isinstance(c, RepositoryNotFoundError) for c in causes) or 401 in status:
        return (
            f"The encoder {where} was not found on the Hub, or it is private and you are not logged in "
            f"(`hf auth login`). {hint}"
        )
    return f"The encoder {where} cannot be loaded: {str(error).splitlines()[0]} {hint}"
