"""LPIPS, the learned perceptual distance, without torchvision: the network, its three backbones and its files."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from .folders import writing
from .weight_files import load_exactly, read_weights

LPIPSNet = Literal["vgg", "alex", "squeeze"]

# Which activations are compared, by their position in torchvision's `features`, how wide they are, and the smallest
# side of a picture that reaches the last of them.
_TAPS = {"vgg": (3, 8, 15, 22, 29), "alex": (1, 4, 7, 9, 11), "squeeze": (1, 4, 7, 9, 10, 11, 12)}
_WIDTHS = {
    "vgg": (64, 128, 256, 512, 512),
    "alex": (64, 192, 384, 256, 256),
    "squeeze": (64, 128, 256, 384, 384, 512, 512),
}
_MIN_SIZES = {"vgg": 16, "alex": 31, "squeeze": 17}


class LPIPS(nn.Module):
    """The learned perceptual image patch similarity, version 0.1: 0 for equal pictures, larger the less alike.

    The activations of a classifier are normalised over their channels, and the squared differences weighted per
    channel, averaged over the picture and summed over the layers (Zhang et al., "The Unreasonable Effectiveness of
    Deep Features as a Perceptual Metric", arXiv 1801.03924, equation 1). Papers train with `vgg` and report `alex` or
    `vgg`: name the net beside the number.

    The weights are constants: they never require gradients and the module never leaves evaluation mode, so there is
    none of the dropout that the original has before its linear layers in training mode. A new instance is random until
    weights are loaded; `from_file` and `from_pretrained` do that. The names in its state dict are torchvision's,
    `features.{i}.*`, and `lin{j}.weight`.

    Args:
        net: The backbone.

    Attributes:
        net: The backbone.
        min_size: The smallest height and width of pictures.

    Raises:
        ValueError: If there is no such backbone.
    """

    shift: torch.Tensor
    scale: torch.Tensor

    def __init__(self, net: LPIPSNet = "vgg"):
        super().__init__()
        _check_net(net)
        self.net: LPIPSNet = net
        self.min_size = _MIN_SIZES[net]
        self.features = {"vgg": _vgg16_layers, "alex": _alexnet_layers, "squeeze": _squeezenet_layers}[net]()
        for index, width in enumerate(_WIDTHS[net]):
            self.add_module(f"lin{index}", nn.Conv2d(width, 1, 1, bias=False))
        # ImageNet's mean and standard deviation as LPIPS has them, for pixels in [-1, 1]; constants, so not saved.
        shift, scale = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
        self.register_buffer("shift", torch.tensor(shift, device="cpu").view(3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(scale, device="cpu").view(3, 1, 1), persistent=False)
        self.requires_grad_(False)
        self.eval()

    @classmethod
    def from_file(cls, path: str | os.PathLike[str], net: LPIPSNet | None = None) -> "LPIPS":
        """Load the weights of backbone and linear layers from one safetensors file.

        Args:
            path: Of a file with torchvision's `features.{i}.*` and `lin{j}.weight`, and nothing else.
            net: The backbone; by default what the file's metadata call `net`, else the one with its names of tensors.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is damaged, or does not hold exactly the weights of this backbone.
        """
        weights, metadata = read_weights(path)
        return cls._from_weights(weights, net or metadata.get("net") or _recognize(weights, path), os.fspath(path))

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | os.PathLike[str], net: LPIPSNet = "vgg", revision: str | None = None
    ) -> "LPIPS":
        """Load the weights from a repository of the Hub, a folder or a file; only safetensors files are read.

        Args:
            name_or_path: A repository such as `user/lpips`, a folder, or a file. Of a repository's or folder's files
                the one is taken whose name contains `net`, such as `lpips_vgg.safetensors`.
            net: The backbone.
            revision: Branch, tag or commit of the repository.

        Raises:
            OSError: If it is neither a folder nor a repository that can be had, or has no such file.
            ValueError: As `from_file`; also if several files match, or a folder is given a revision.
        """
        _check_net(net)
        name = os.fspath(name_or_path)
        if not os.path.exists(name):
            folder = _download(name, net, revision)
        elif revision is not None:
            raise ValueError(f"revision={revision!r} is for repositories of the Hub; {name!r} is on this machine.")
        elif os.path.isfile(name):
            return cls.from_file(name, net)
        else:
            folder = Path(name)
        files = sorted(folder.glob(f"*{net}*.safetensors"))
        if not files:
            raise FileNotFoundError(f"{name!r} has no *{net}*.safetensors.")
        if len(files) > 1:
            raise ValueError(
                f"{name!r} has several files for net={net!r}, {[f.name for f in files]}: name one of them."
            )
        return cls.from_file(files[0], net)

    @classmethod
    def from_original(cls, original: nn.Module) -> "LPIPS":
        """Take the weights of an `lpips.LPIPS` of the package `lpips`, for example to save them with `save_file`.

        Args:
            original: Of version 0.1, with linear layers.

        Returns:
            An equal network that shares no memory with it.

        Raises:
            ValueError: If it is something else.
        """
        weights = {}
        for key, values in original.state_dict().items():
            parts = key.split(".")
            if parts[0] == "net" and len(parts) > 3:  # net.slice{k}.{i}.*, with torchvision's i
                weights[".".join(["features", *parts[2:]])] = values.detach().float().cpu().clone()
            elif parts[0].startswith("lin") and parts[0] != "lins":  # lin{j}.model.{after the dropout}.weight
                weights[f"{parts[0]}.weight"] = values.detach().float().cpu().clone()
        source = type(original).__name__
        return cls._from_weights(weights, _recognize(weights, source), source)

    @classmethod
    def _from_weights(cls, weights: dict[str, torch.Tensor], net, source: str) -> "LPIPS":
        with torch.device("meta"):  # no random initialisation: it would take time and random numbers
            model = cls(net)
        load_exactly(model, weights, source)
        return model.requires_grad_(False)

    def save_file(self, path: str | os.PathLike[str]) -> None:
        """Write the file that `from_file` reads, whole or not at all.

        Args:
            path: Of the file, which is replaced if it exists.
        """
        weights = {key: values.contiguous() for key, values in self.state_dict().items()}
        with writing(Path(path)) as temporary:
            save_file(weights, temporary, metadata={"format": "pt", "net": self.net})

    def train(self, mode: bool = True) -> "LPIPS":
        """Stay in evaluation mode: there is no other."""
        return super().train(False)

    def forward(self, pixels: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Compute the distance of every picture to its target.

        Autocast does not reach in: the computation has the precision of the weights, which is float32 unless they
        were cast. Gradients flow to both arguments, if they ask for it; none are stored for one that does not.

        Args:
            pixels: `(B, 3, H, W)` in [-1, 1], H and W at least `min_size`.
            target: Likewise, of the same shape.

        Returns:
            `(B,)`, at least 0 for trained weights; a distance without unit.

        Raises:
            ValueError: If the shapes differ, or are not `(B, 3, H, W)` of that size.
        """
        self._check(pixels, target)
        with torch.autocast(pixels.device.type, enabled=False):
            layers = zip(self._activations(pixels), self._activations(target), strict=True)
            distances = [
                self.get_submodule(f"lin{index}")((one - other) ** 2).mean(dim=(1, 2, 3))
                for index, (one, other) in enumerate(layers)
            ]
            return torch.stack(distances).sum(dim=0)  # (B,)

    def _activations(self, pixels: torch.Tensor) -> list[torch.Tensor]:
        """Return the compared activations, each of unit length over its channels."""
        hidden = (pixels.to(self.shift.dtype) - self.shift) / self.scale
        activations = []
        for index, layer in enumerate(self.features):
            hidden = layer(hidden)
            if index in _TAPS[self.net]:
                activations.append(F.normalize(hidden, dim=1, eps=1e-10))
        return activations

    def _check(self, pixels: torch.Tensor, target: torch.Tensor) -> None:
        if pixels.shape != target.shape:
            raise ValueError(f"pixels {tuple(pixels.shape)} and target {tuple(target.shape)} differ in shape.")
        if pixels.ndim != 4 or pixels.shape[1] != 3:
            raise ValueError(f"pixels and target have shape {tuple(pixels.shape)}; expected (B, 3, H, W).")
        if min(pixels.shape[2:]) < self.min_size:
            height, width = pixels.shape[2:]
            raise ValueError(f"Image size {height}x{width} is below {self.min_size}, the least for net={self.net!r}.")


class _Fire(nn.Module):
    """The block of SqueezeNet: few channels, then many, half of them from a 1x1 and half from a 3x3 convolution."""

    def __init__(self, in_channels: int, squeezed: int, expanded: int):
        super().__init__()
        self.squeeze = nn.Conv2d(in_channels, squeezed, 1)
        self.expand1x1 = nn.Conv2d(squeezed, expanded, 1)
        self.expand3x3 = nn.Conv2d(squeezed, expanded, 3, padding=1)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = F.relu(self.squeeze(hidden))
        return F.relu(torch.cat([self.expand1x1(hidden), self.expand3x3(hidden)], dim=1))


def _vgg16_layers() -> nn.Sequential:
    """VGG-16 up to its 13th convolution (Simonyan and Zisserman, arXiv 1409.1556, table 1 D)."""
    layers: list[nn.Module] = []
    channels = 3
    for width in (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512):  # 0: halve the size
        layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()] if width else [nn.MaxPool2d(2)]
        channels = width or channels
    return nn.Sequential(*layers)


def _alexnet_layers() -> nn.Sequential:
    """AlexNet of one tower (Krizhevsky, arXiv 1404.5997) up to its 5th convolution."""
    return nn.Sequential(
        nn.Conv2d(3, 64, 11, stride=4, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(3, stride=2),
        nn.Conv2d(64, 192, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(3, stride=2),
        nn.Conv2d(192, 384, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(384, 256, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(256, 256, 3, padding=1),
        nn.ReLU(),
    )


def _squeezenet_layers() -> nn.Sequential:
    """SqueezeNet 1.1 (Iandola et al., arXiv 1602.07360, and its repository) up to its 8th fire module."""

    def pool() -> nn.Module:
        return nn.MaxPool2d(3, stride=2, ceil_mode=True)

    return nn.Sequential(
        nn.Conv2d(3, 64, 3, stride=2),
        nn.ReLU(),
        pool(),
        _Fire(64, 16, 64),
        _Fire(128, 16, 64),
        pool(),
        _Fire(128, 32, 128),
        _Fire(256, 32, 128),
        pool(),
        _Fire(256, 48, 192),
        _Fire(384, 48, 192),
        _Fire(384, 64, 256),
        _Fire(512, 64, 256),
    )


def _check_net(net: str) -> None:
    if net not in get_args(LPIPSNet):
        raise ValueError(f"net={net!r} is not one of {', '.join(get_args(LPIPSNet))}.")


def _recognize(weights: Mapping[str, torch.Tensor], source: str | os.PathLike[str]) -> LPIPSNet:
    """Find out which backbone has these names of tensors."""
    for net in get_args(LPIPSNet):
        with torch.device("meta"):
            names = LPIPS(net).state_dict().keys()
        if names == weights.keys():
            return net
    raise ValueError(
        f"{os.fspath(source)!r} has {len(weights)} tensors, not those of LPIPS with {', '.join(get_args(LPIPSNet))}: "
        "expected torchvision's features.{i}.* up to the last compared layer, and lin{j}.weight."
    )


def _download(name: str, net: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=[f"*{net}*.safetensors"]))
    except HFValidationError as error:
        raise FileNotFoundError(
            f"{name!r} is no file, no folder, and no name of a repository (owner/name)."
        ) from error
    except OSError as error:  # not found, gated, offline and not in the cache, ...
        where = f"{name!r}" + (f" at revision {revision!r}" if revision else "")
        raise OSError(f"{where} is not on this machine and cannot be had from the Hub: {error}") from error
