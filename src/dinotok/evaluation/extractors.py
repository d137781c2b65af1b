"""What looks at pictures for FID and its relatives: any network that gives one vector per picture."""

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

from ..inception import InceptionFeatures
from ..models.encoders import FrozenEncoder, weights_digest

_ENCODER_PREFIX = "encoder:"
_FULL_INCEPTION = "inception-2048"
_ENCODER_SIDE = 224


@dataclass(frozen=True)
class Extractor:
    """A network with all that identifies its features.

    Attributes:
        name: As in `FID` for the full Inception network, `inception-768` or `dinov2`.
        metric: What a Fréchet distance of these features is called, such as `FID`, `FID-768` or `FD-dinov2`.
        network: Called with uint8 pictures `(B, 3, H, W)`; returns features `(B, D)`, or a mapping of `features` and,
            where it has them, `spatial_features` `(B, S)` for sFID and `logits` `(B, K)` for the Inception score.
        settings: Of the network, as far as they move numbers: resize filter, weights' digest, versions of libraries.
    """

    name: str
    metric: str
    network: nn.Module
    settings: dict[str, str] = field(default_factory=dict)

    def describe(self) -> dict[str, str]:
        """Return what two sets of features must agree in to be compared."""
        return {"name": self.name, **self.settings}

    @torch.inference_mode()
    def __call__(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Compute the features of pictures.

        Args:
            images: uint8 `(B, 3, H, W)`; they are moved to the network's device.

        Returns:
            `features` and, where the network has them, `spatial_features` and `logits`: float32 `(B, ...)`, on the
            CPU.

        Raises:
            ValueError: If the pictures are of another type or shape, or the features are not finite rows `(B, D)`.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images are {images.dtype} {tuple(images.shape)}; expected uint8 (B, 3, H, W).")
        device = next((p.device for p in self.network.parameters()), images.device)
        output = self.network(images.to(device))
        outputs = dict(output) if isinstance(output, Mapping) else {"features": output}
        if "features" not in outputs:
            raise ValueError(f"{self.name} returned {sorted(outputs)}; expected features among them.")
        for key, rows in outputs.items():
            if rows.ndim != 2 or len(rows) != len(images):
                raise ValueError(f"{self.name} gave {key} {tuple(rows.shape)} for {len(images)} pictures, not (B, D).")
            if not rows.isfinite().all():
                raise ValueError(f"{self.name} gave {key} with NaN or infinite values.")
        return {key: rows.float().cpu() for key, rows in outputs.items()}


class EncoderFeatures(nn.Module):
    """The class token of a frozen encoder, or the mean over patches where it has none, as FD-DINOv2 compares it.

    Pictures are resized to about 224x224 (the nearest multiple of the patch size), bicubic with antialiasing (Stein et
    al., "Exposing flaws of generative model evaluation metrics", arXiv 2306.04675).

    Args:
        encoder: Its last hidden state, after the final norm, is used.
    """

    def __init__(self, encoder: FrozenEncoder):
        super().__init__()
        self.encoder = encoder
        self.num_features = encoder.hidden_size
        self.side = round(_ENCODER_SIDE / encoder.patch_size) * encoder.patch_size

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return `(B, hidden_size)` for uint8 pictures `(B, 3, H, W)`."""
        resized = F.interpolate(images, (self.side, self.side), mode="bicubic", antialias=True)  # rounds to 8 bits
        (tokens,) = self.encoder.tokens(resized.to(self.encoder.normalization.mean.dtype) / 127.5 - 1)
        return tokens[:, 0] if self.encoder.has_class_token else tokens.mean(1)


def from_module(network: nn.Module, name: str | None = None, metric: str | None = None, **settings: str) -> Extractor:
    """Make an extractor of any network.

    Args:
        network: See `Extractor`.
        name: By default that of its class.
        metric: By default `FD-` and the name.
        **settings: What else moves its numbers.
    """
    name = name or type(network).__name__
    weights = f"sha256:{weights_digest(network.state_dict())}"
    return Extractor(name, metric or f"FD-{name}", network, {"weights": weights, **settings})


def file_digest(path: str | os.PathLike[str]) -> str:
    """Return `sha256:` and the digest of a file.

    Raises:
        OSError: If it cannot be read.
    """
    with open(path, "rb") as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"


def load_extractor(name: str, device: str = "cpu") -> Extractor:
    """Load an extractor by what the command line calls it.

    Args:
        name: A safetensors file with the weights of `InceptionFeatures`; `encoder:` and the folder or repository of a
            vision transformer; or `inception-2048` for the full network of torch-fidelity, which has to be installed.
        device: Where it runs.

    Raises:
        ImportError: If torch-fidelity is needed and missing.
        OSError: If there is no such file, folder or repository.
        ValueError: If it holds other weights.
    """
    if name == _FULL_INCEPTION:
        extractor = _full_inception()
    elif name.startswith(_ENCODER_PREFIX):
        source = name.removeprefix(_ENCODER_PREFIX)
        network = EncoderFeatures(FrozenEncoder.from_encoder(source))
        short = os.path.basename(os.path.normpath(source))
        resize = f"{network.side}x{network.side}, bicubic, antialiased, 8 bits"
        scale = network.encoder.normalization
        normalization = f"{scale.mean.flatten().tolist()}, {scale.std.flatten().tolist()}"
        extractor = from_module(network, short, resize=resize, normalization=normalization)
    elif os.path.isfile(name):
        inception = InceptionFeatures.from_file(name)
        resize = "299x299, bilinear, not antialiased"
        extractor = from_module(inception, "inception-768", "FID-768", resize=resize)
    else:
        raise FileNotFoundError(
            f"There is no extractor {name!r}: name a safetensors file, {_ENCODER_PREFIX}NAME or {_FULL_INCEPTION}."
        )
    extractor.network.requires_grad_(False).eval().to(device)
    return extractor


class _FullInception(nn.Module):
    """torch-fidelity's Inception, with named outputs."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        features, logits = self.network(images)
        return {"features": features, "logits": logits}


def _full_inception() -> Extractor:
    try:
        import torch_fidelity
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise ImportError(f"{_FULL_INCEPTION} is torch-fidelity's: pip install torch-fidelity ({error}).") from error
    network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"])
    version = f"torch-fidelity {torch_fidelity.__version__}"
    resize = "299x299, bilinear as TensorFlow 1, not antialiased"
    return from_module(_FullInception(network), _FULL_INCEPTION, "FID", resize=resize, backend=version)
