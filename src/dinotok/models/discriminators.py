"""Discriminators for adversarial training of a tokenizer; no tokenizer needs them once it is trained."""

import math
from collections.abc import Collection, Sequence

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from .encoders import FrozenEncoder

AUGMENTATIONS = ("color", "translation", "cutout")


class PatchDiscriminator(nn.Module):
    """The PatchGAN of pix2pix and VQGAN: a convolutional network with one logit per overlapping patch.

    Isola et al. (arXiv 1611.07004), section 3.2.2, and VQGAN (arXiv 2012.09841); with three halvings a logit sees
    70x70 pixels. Convolutions start from N(0, 0.02). They normalise with batch statistics; here it is `GroupNorm`,
    which depends on no other picture: logits are the same in any batch, split over any number of processes, in
    training and evaluation mode alike.

    Args:
        hidden_size: Channels after the first convolution; doubled by each of the others, up to eightfold.
        num_layers: Number of convolutions that halve the size.

    Attributes:
        min_size: The smallest height and width of pictures.

    Raises:
        ValueError: If a number is below 1.
    """

    def __init__(self, hidden_size: int = 64, num_layers: int = 3):
        super().__init__()
        if hidden_size < 1 or num_layers < 1:
            raise ValueError(f"hidden_size={hidden_size} and num_layers={num_layers} must be at least 1.")
        self.min_size = 3 * 2**num_layers
        widths = [hidden_size * min(2**index, 8) for index in range(num_layers + 1)]
        layers: list[nn.Module] = [nn.Conv2d(3, hidden_size, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for index in range(1, num_layers + 1):
            layers += [
                nn.Conv2d(
                    widths[index - 1], widths[index], 4, stride=2 if index < num_layers else 1, padding=1, bias=False
                ),
                nn.GroupNorm(_num_groups(widths[index]), widths[index]),
                nn.LeakyReLU(0.2),
            ]
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 4, padding=1))
        self.apply(self._initialize)

    @staticmethod
    def _initialize(module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, 0.0, 0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Judge patches.

        Args:
            pixels: `(B, 3, H, W)` in [-1, 1], H and W at least `min_size`.

        Returns:
            Logits `(B, 1, h, w)`, float32; larger for what looks real. With three halvings `h = H // 8 - 2`.

        Raises:
            ValueError: If the pictures are too small.
        """
        if min(pixels.shape[2:]) < self.min_size:
            height, width = pixels.shape[2:]
            raise ValueError(
                f"Image size {height}x{width} is below {self.min_size}, the least for this discriminator."
            )
        return self.layers(pixels).float()


class FeatureDiscriminator(nn.Module):
    """Small trainable heads on several hidden states of a frozen encoder, one logit per head and patch.

    The projected discriminator with a frozen vision transformer of StyleGAN-T (arXiv 2301.09515, section 3.2), as VAR,
    RAE (arXiv 2510.11690) and VFMTok (arXiv 2507.08441) use it for tokenizers. A head is a 1x1 convolution, a residual
    block and a 1x1 convolution to the logit, all with spectral norm. Two things differ from theirs. The block has a
    3x3 convolution on the grid instead of a circular one over 9 consecutive patches in raster order: as many weights,
    but its neighbours are neighbours in the picture. And `GroupNorm` takes the place of batch norm over virtual
    batches, so a logit depends on no other picture.

    The encoder is held, and moves to a device with the heads, but is no sub-module: it is neither saved in the state
    dict nor listed among the parameters, and may be the tokenizer's own. Gradients flow through it to the pixels.

    Args:
        encoder: Gives the features.
        layers: Its hidden states to judge, see `FrozenEncoder`; by default five at equal distances, from the
            embedding to the last.

    Attributes:
        encoder: As given.
        layers: As given, or the default.

    Raises:
        ValueError: If a layer does not exist or none is named.
    """

    encoder: FrozenEncoder

    def __init__(self, encoder: FrozenEncoder, layers: Sequence[int] | None = None):
        super().__init__()
        depth = encoder.num_layers
        self.layers = tuple(sorted({round(i * depth / 4) for i in range(5)}) if layers is None else layers)
        if not self.layers or not all(0 <= layer <= depth for layer in self.layers):
            raise ValueError(f"layers={self.layers} must name some of the hidden states 0 to {depth}.")
        object.__setattr__(self, "encoder", encoder)  # past nn.Module, which would make it a sub-module
        self.heads = nn.ModuleList(_Head(encoder.hidden_size) for _ in self.layers)

    def _apply(self, fn, recurse=True):
        self.encoder._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Judge patches at every level.

        Args:
            pixels: `(B, 3, H, W)` in [-1, 1], H and W multiples of the encoder's `patch_size`.

        Returns:
            Logits `(B, number of layers, h, w)`, float32; larger for what looks real.

        Raises:
            ValueError: If the size does not suit the encoder.
        """
        grids = self.encoder(pixels, self.layers)
        logits = [head(grid.float()) for head, grid in zip(self.heads, grids, strict=True)]
        return torch.cat(logits, dim=1).float()  # (B, L, h, w)


class _Head(nn.Module):
    """From features to logits, linear but for its norms and activations, every convolution of spectral norm 1."""

    def __init__(self, channels: int):
        super().__init__()
        self.project = _block(channels, kernel_size=1)
        self.mix = _block(channels, kernel_size=3)
        self.classify = spectral_norm(nn.Conv2d(channels, 1, 1))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        hidden = self.project(features)
        hidden = (hidden + self.mix(hidden)) * 0.5**0.5
        return self.classify(hidden)  # (B, 1, h, w)


def _block(channels: int, kernel_size: int) -> nn.Sequential:
    return nn.Sequential(
        spectral_norm(nn.Conv2d(channels, channels, kernel_size, padding=kernel_size // 2)),
        nn.GroupNorm(_num_groups(channels), channels),
        nn.LeakyReLU(0.2),
    )


def _num_groups(channels: int) -> int:
    """Return a divisor of `channels`, at most 32, that leaves about eight or more in a group."""
    return next(groups for groups in range(min(32, max(channels // 8, 1)), 0, -1) if channels % groups == 0)


def augment(pixels: torch.Tensor, generator: torch.Generator, policy: Collection[str] = AUGMENTATIONS) -> torch.Tensor:
    """Change pictures at random, differentiably, before a discriminator sees them, real and reconstructed alike.

    DiffAugment (Zhao et al., arXiv 2006.10738): it keeps a discriminator from learning small data by heart.
    Every picture has its own draw; the draws depend on nothing but the generator, the policy and the shape.

    Args:
        pixels: `(B, 3, H, W)` in [-1, 1].
        generator: Of the random numbers, on any device.
        policy: Any of `color` (brightness by up to a quarter of the range, saturation by 0 to 2, contrast by 0.5 to
            1.5), `translation` (by up to an eighth of each side, mid-grey moves in) and `cutout` (a rectangle of half
            of each side, with its centre anywhere, turns mid-grey). They come in this order.

    Returns:
        `(B, 3, H, W)`, which may leave [-1, 1].

    Raises:
        ValueError: If the policy has another name.
    """
    unknown = set(policy) - set(AUGMENTATIONS)
    if unknown:
        raise ValueError(f"policy={sorted(unknown)} is not among {', '.join(AUGMENTATIONS)}.")
    for name, change in zip(AUGMENTATIONS, (_change_color, _translate, _cut_out), strict=True):
        if name in policy:
            pixels = change(pixels, generator)
    return pixels


def _change_color(pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    draws = torch.rand(3, len(pixels), 1, 1, 1, generator=generator, device=generator.device).to(pixels)
    pixels = pixels + (draws[0] - 0.5)
    gray = pixels.mean(dim=1, keepdim=True)
    pixels = gray + (pixels - gray) * (2 * draws[1])
    mean = pixels.mean(dim=(1, 2, 3), keepdim=True)
    return mean + (pixels - mean) * (0.5 + draws[2])


def _translate(pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    height, width = pixels.shape[2:]
    top, left = round(height / 8), round(width / 8)
    padded = F.pad(pixels, (left, left, top, top))
    corners = zip(
        _integers(2 * top + 1, len(pixels), generator), _integers(2 * left + 1, len(pixels), generator), strict=True
    )
    return torch.stack(
        [image[:, y : y + height, x : x + width] for image, (y, x) in zip(padded, corners, strict=True)]
    )


def _cut_out(pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    batch_size, _, height, width = pixels.shape
    mask = torch.ones_like(pixels[:, :1])
    size_y, size_x = math.ceil(height / 2), math.ceil(width / 2)
    centers = zip(_integers(height, batch_size, generator), _integers(width, batch_size, generator), strict=True)
    for image, (y, x) in zip(mask, centers, strict=True):
        top, left = y - size_y // 2, x - size_x // 2
        image[:, max(top, 0) : max(top + size_y, 0), max(left, 0) : max(left + size_x, 0)] = 0
    return pixels * mask


def _integers(below: int, count: int, generator: torch.Generator) -> list[int]:
    return torch.randint(below, (count,), generator=generator, device=generator.device).tolist()
