"""The features that FID compares: the Inception network of 2015, up to its 768 channels, without torchvision."""

import os

import torch
import torch.nn.functional as F
from torch import nn

from .weight_files import load_exactly, read_weights

INPUT_SIZE = 299
_UNUSED = "Mixed_7a."  # the next block of the network, which files may have and these features do not need


class InceptionFeatures(nn.Module):
    """Mean activations after `Mixed_6e` of the FID Inception network: the 768 features of "FID-768".

    Pictures are treated as pytorch-fid 0.3 does with `dims=768`: resized to 299x299, whatever their shape, bilinearly
    with `align_corners=False` and without antialiasing, then mapped from [0, 1] to [-1, 1]; average pools leave the
    padding out. The numbers are not comparable with those of the 2048 features: always write "FID-768". The
    architecture is Inception-v3 (Szegedy et al., arXiv 1512.00567), its batch norms folded into the convolutions.

    The weights are constants: they never require gradients and the module never leaves evaluation mode. A new instance
    is random until weights are loaded: use `from_file`. torchmetrics takes an instance as `feature` of its
    `FrechetInceptionDistance` or `KernelInceptionDistance`; see also `dinotok.metrics.fid`.

    Attributes:
        num_features: 768.
    """

    num_features = 768

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = _Convolution(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = _Convolution(32, 32, 3)
        self.Conv2d_2b_3x3 = _Convolution(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = _Convolution(64, 80, 1)
        self.Conv2d_4a_3x3 = _Convolution(80, 192, 3)
        self.Mixed_5b = _mixed_35(192, pool_width=32)
        self.Mixed_5c = _mixed_35(256, pool_width=64)
        self.Mixed_5d = _mixed_35(288, pool_width=64)
        self.Mixed_6a = _reduce_to_17(288)
        self.Mixed_6b = _mixed_17(768, width=128)
        self.Mixed_6c = _mixed_17(768, width=160)
        self.Mixed_6d = _mixed_17(768, width=160)
        self.Mixed_6e = _mixed_17(768, width=192)
        self.requires_grad_(False)
        self.eval()

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> "InceptionFeatures":
        """Load the weights from a safetensors file.

        Args:
            path: Of a file with pytorch-fid's names of modules and a `weight` and `bias` for each convolution, batch
                norm folded in; it may have `Mixed_7a` too, which is not used.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is damaged, or a tensor is missing, unexpected, of another shape or not finite.
        """
        weights, _ = read_weights(path)
        with torch.device("meta"):  # no random initialisation: it would take time and random numbers
            model = cls()
        used = {key: values for key, values in weights.items() if not key.startswith(_UNUSED)}
        load_exactly(model, used, os.fspath(path))
        return model.requires_grad_(False)

    def train(self, mode: bool = True) -> "InceptionFeatures":
        """Stay in evaluation mode: there is no other."""
        return super().train(False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Compute the features of pictures; autocast does not reach in.

        Args:
            images: `(B, 3, H, W)` of any size, uint8, or floats in [0, 1]. For published numbers: uint8, as read from
                the saved files.

        Returns:
            `(B, 768)`.

        Raises:
            ValueError: If the shape is another, or floats leave [0, 1].
        """
        inputs = _to_unit_range(images).to(self.Conv2d_1a_3x3.weight.dtype)
        with torch.autocast(images.device.type, enabled=False):
            hidden = F.interpolate(inputs, size=(INPUT_SIZE, INPUT_SIZE), mode="bilinear", align_corners=False) * 2 - 1
            hidden = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(hidden)))  # (B, 64, 147, 147)
            hidden = F.max_pool2d(hidden, 3, stride=2)
            hidden = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(hidden))  # (B, 192, 71, 71)
            hidden = F.max_pool2d(hidden, 3, stride=2)
            hidden = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(hidden)))  # (B, 288, 35, 35)
            hidden = self.Mixed_6a(hidden)  # (B, 768, 17, 17)
            hidden = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(hidden))))
            return hidden.mean(dim=(2, 3))  # (B, 768)


class _Convolution(nn.Conv2d):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return F.relu(super().forward(hidden))


class _Mixed(nn.Module):
    """Parallel branches, their channels joined: rows of convolutions, and last a pool.

    Args:
        branches: The convolutions of each row. Their modules are called as the row, with `_1`, `_2`, ... appended if
            there are several.
        pool_convolution: Follows an average pool that keeps the size; without it, a max pool halves the size.
    """

    def __init__(self, branches: dict[str, list[_Convolution]], pool_convolution: _Convolution | None = None):
        super().__init__()
        self.rows: list[list[str]] = []
        for name, convolutions in branches.items():
            names = [f"{name}_{i}" for i in range(1, len(convolutions) + 1)] if len(convolutions) > 1 else [name]
            for module_name, convolution in zip(names, convolutions, strict=True):
                self.add_module(module_name, convolution)
            self.rows.append(names)
        self.branch_pool = pool_convolution

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        outputs = []
        for names in self.rows:
            row = hidden
            for name in names:
                row = self.get_submodule(name)(row)
            outputs.append(row)
        return torch.cat([*outputs, self._pool(hidden)], dim=1)

    def _pool(self, hidden: torch.Tensor) -> torch.Tensor:
        if self.branch_pool is None:
            return F.max_pool2d(hidden, 3, stride=2)
        return self.branch_pool(F.avg_pool2d(hidden, 3, stride=1, padding=1, count_include_pad=False))


def _mixed_35(channels: int, pool_width: int) -> _Mixed:
    """Build a block of the 35x35 grid (figure 5 of the paper, with a 5x5 convolution left)."""
    return _Mixed(
        {
            "branch1x1": [_Convolution(channels, 64, 1)],
            "branch5x5": [_Convolution(channels, 48, 1), _Convolution(48, 64, 5, padding=2)],
            "branch3x3dbl": [
                _Convolution(channels, 64, 1),
                _Convolution(64, 96, 3, padding=1),
                _Convolution(96, 96, 3, padding=1),
            ],
        },
        _Convolution(channels, pool_width, 1),
    )


def _reduce_to_17(channels: int) -> _Mixed:
    """Build the block from the 35x35 to the 17x17 grid (figure 10 of the paper)."""
    return _Mixed(
        {
            "branch3x3": [_Convolution(channels, 384, 3, stride=2)],
            "branch3x3dbl": [
                _Convolution(channels, 64, 1),
                _Convolution(64, 96, 3, padding=1),
                _Convolution(96, 96, 3, stride=2),
            ],
        }
    )


def _mixed_17(channels: int, width: int) -> _Mixed:
    """Build a block of the 17x17 grid, with 7x7 convolutions in two factors (figure 6 of the paper, n = 7)."""

    def wide(in_width: int, out_width: int) -> _Convolution:
        return _Convolution(in_width, out_width, (1, 7), padding=(0, 3))

    def tall(in_width: int, out_width: int) -> _Convolution:
        return _Convolution(in_width, out_width, (7, 1), padding=(3, 0))

    return _Mixed(
        {
            "branch1x1": [_Convolution(channels, 192, 1)],
            "branch7x7": [_Convolution(channels, width, 1), wide(width, width), tall(width, 192)],
            "branch7x7dbl": [
                _Convolution(channels, width, 1),
                tall(width, width),
                wide(width, width),
                tall(width, width),
                wide(width, 192),
            ],
        },
        _Convolution(channels, 192, 1),
    )


def _to_unit_range(images: torch.Tensor) -> torch.Tensor:
    if images.ndim != 4 or images.shape[1] != 3 or images.numel() == 0:
        raise ValueError(f"images have shape {tuple(images.shape)}; expected (B, 3, H, W), no side zero.")
    if images.dtype == torch.uint8:
        return images.float() / 255
    if not images.is_floating_point():
        raise ValueError(f"images have dtype {images.dtype}; expected uint8, or floats in [0, 1].")
    if not (images.min() >= 0 and images.max() <= 1):
        raise ValueError(f"images have values in [{images.min().item()}, {images.max().item()}], not in [0, 1].")
    return images
