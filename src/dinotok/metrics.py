"""How close reconstructions are to their pictures (PSNR, SSIM, LPIPS), and sets of pictures to each other (FID).

Pixels are clamped to [-1, 1] and rounded to 8 bits before anything is measured, so a number is that of the saved PNG
files, as papers report it. The rounding has no gradient: these are metrics, not losses.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

if TYPE_CHECKING:
    from .lpips import LPIPS

SSIM_WINDOW = 11


def mean_squared_error(pixels: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Compute the mean squared error of every picture, after rounding to 8 bits.

    Args:
        pixels: Reconstructions `(B, 3, H, W)`; values outside [-1, 1] are clamped.
        target: Pictures `(B, 3, H, W)` in [-1, 1].

    Returns:
        `(B,)`, in units of the full range: 1 is black against white.

    Raises:
        ValueError: If the shapes differ or are not `(B, 3, H, W)`, `target` leaves [-1, 1], or `pixels` are not finite
            floats.
    """
    return (_to_8bit_pair(pixels, target).diff(dim=0)[0] ** 2).mean(dim=(1, 2, 3))


def psnr(pixels: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Compute the peak signal-to-noise ratio of every picture, `-10 log10(mean squared error)`.

    Args:
        pixels: Reconstructions `(B, 3, H, W)`; values outside [-1, 1] are clamped.
        target: Pictures `(B, 3, H, W)` in [-1, 1].

    Returns:
        `(B,)` in dB, infinite for identical pictures.

    Raises:
        ValueError: As `mean_squared_error`.
    """
    return -10 * mean_squared_error(pixels, target).log10()


def pooled_psnr(mean_squared_errors: torch.Tensor | Sequence[float]) -> float:
    """Compute one PSNR from the average error of all pictures, as papers do that pool a data set.

    By Jensen's inequality it is at most the mean of the per-picture PSNR: the two are different metrics.

    Args:
        mean_squared_errors: Results of `mean_squared_error` over pictures of one size, `(N,)`.

    Returns:
        dB, infinite if all errors are zero.

    Raises:
        ValueError: If there is no error, or one is negative or NaN.
    """
    errors = [float(error) for error in mean_squared_errors]
    if not errors or not min(errors) >= 0 or any(map(math.isnan, errors)):
        raise ValueError(f"Expected at least one error, none negative or NaN, got {errors}.")
    return _decibel(math.fsum(errors) / len(errors))


def ssim(pixels: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Compute the structural similarity of every picture: Gaussian window of 11x11, sigma 1.5, mean over RGB.

    Borders are reflected, so all windows count; Wang et al., "Image quality assessment" (2004), and scikit-image leave
    out those that cross the border, which changes the third decimal.

    Args:
        pixels: Reconstructions `(B, 3, H, W)`; values outside [-1, 1] are clamped.
        target: Pictures `(B, 3, H, W)` in [-1, 1].

    Returns:
        `(B,)`, 1 for identical pictures, NaN for pictures with a side below 11.

    Raises:
        ValueError: As `mean_squared_error`.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    pixels, target = _to_8bit_pair(pixels, target)
    if min(pixels.shape[-2:]) < SSIM_WINDOW:
        return pixels.new_full((len(pixels),), math.nan)
    similarity = structural_similarity_index_measure(
        pixels, target, gaussian_kernel=True, sigma=1.5, data_range=1.0, reduction="none"
    )
    return cast("torch.Tensor", similarity)  # (B,)


@dataclass
class ReconstructionMetrics:
    """Sum up the metrics of a data set batch by batch; the pictures may differ in size between batches.

    The fields are the whole state: `dataclasses.asdict` saves it, `ReconstructionMetrics(**state)` restores it.

    Attributes:
        num_images: Pictures seen.
        num_values: Values seen, three per pixel.
        num_ssim: Pictures large enough for SSIM.
        squared_error: Sum of squared errors over all values.
        psnr: Sum of the PSNR of all pictures; infinite as soon as one is reconstructed exactly.
        ssim: Sum of the SSIM of the `num_ssim` pictures.
        num_lpips: Pictures whose LPIPS was asked for, and which were large enough for it.
        lpips: Sum of the LPIPS of the `num_lpips` pictures.
        lpips_net: The net that it was computed with; empty if it was never asked for.
    """

    num_images: int = 0
    num_values: int = 0
    num_ssim: int = 0
    squared_error: float = 0.0
    psnr: float = 0.0
    ssim: float = 0.0
    num_lpips: int = 0
    lpips: float = 0.0
    lpips_net: str = ""

    def update(
        self, pixels: torch.Tensor, target: torch.Tensor, lpips: "LPIPS | None" = None
    ) -> list[dict[str, float]]:
        """Add a batch.

        Args:
            pixels: Reconstructions `(B, 3, H, W)`; values outside [-1, 1] are clamped.
            target: Pictures `(B, 3, H, W)` in [-1, 1].
            lpips: Computes LPIPS as well, on the device of the pictures.

        Returns:
            `psnr`, `ssim` and `mean_squared_error` of every picture; with `lpips` also `lpips_vgg`, `lpips_alex` or
            `lpips_squeeze`, NaN for pictures below `lpips.min_size`.

        Raises:
            ValueError: As `mean_squared_error`; also if an earlier batch had another net.
        """
        if lpips is not None:
            self._set_net(lpips.net)
        errors = mean_squared_error(pixels, target)
        columns = (-10 * errors.log10()).tolist(), ssim(pixels, target).tolist(), errors.tolist()
        results = [
            {"psnr": decibel, "ssim": similarity, "mean_squared_error": error}
            for decibel, similarity, error in zip(*columns, strict=True)
        ]
        if lpips is not None:
            for result, distance in zip(results, _lpips(lpips, pixels, target).tolist(), strict=True):
                result[f"lpips_{lpips.net}"] = distance
                if not math.isnan(distance):
                    self.num_lpips += 1
                    self.lpips += distance
        for result in results:
            self.num_images += 1
            self.num_values += target[0].numel()
            self.squared_error += result["mean_squared_error"] * target[0].numel()
            self.psnr += result["psnr"]
            if not math.isnan(result["ssim"]):
                self.num_ssim += 1
                self.ssim += result["ssim"]
        return results

    def merge(self, other: "ReconstructionMetrics") -> None:
        """Add what another one has seen, for example on another device.

        Args:
            other: Stays as it is.

        Raises:
            ValueError: If both have seen LPIPS, with different nets.
        """
        if other.lpips_net:
            self._set_net(other.lpips_net)
        for field in fields(self):
            if field.name != "lpips_net":
                setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))

    def compute(self) -> dict[str, float]:
        """Average over all pictures seen.

        Returns:
            `psnr` (dB, mean over pictures), `psnr_pooled` (dB, of the mean squared error over all values), `ssim`
            (mean over pictures of at least 11x11, NaN if there is none) and `num_images`; if LPIPS was asked for also
            `lpips_vgg`, `lpips_alex` or `lpips_squeeze` (mean over pictures large enough, NaN if there is none).

        Raises:
            ValueError: Before the first `update`.
        """
        if self.num_images == 0:
            raise ValueError("No pictures to average over (num_images=0): call update first.")
        result = {
            "psnr": self.psnr / self.num_images,
            "psnr_pooled": _decibel(self.squared_error / self.num_values),
            "ssim": self.ssim / self.num_ssim if self.num_ssim else math.nan,
            "num_images": self.num_images,
        }
        if self.lpips_net:
            result[f"lpips_{self.lpips_net}"] = self.lpips / self.num_lpips if self.num_lpips else math.nan
        return result

    def _set_net(self, net: str) -> None:
        if self.lpips_net not in ("", net):
            raise ValueError(f"LPIPS of net={net!r} cannot be averaged with that of net={self.lpips_net!r}.")
        self.lpips_net = net


def fid(features: nn.Module, real_batches: Iterable[torch.Tensor], fake_batches: Iterable[torch.Tensor]) -> float:
    """Compute the Fréchet distance between Gaussians fitted to the features of two sets of pictures.

    `|m - m'|^2 + trace(C + C' - 2 (C C')^(1/2))` with means and sample covariances, accumulated in float64 (Heusel et
    al., "GANs Trained by a Two Time-Scale Update Rule", arXiv 1706.08500, section 4). It depends on the network and
    falls with the number of pictures: state both. With fewer pictures than features the covariances are singular; the
    distance is still defined, but far too large. When `torch.distributed` runs, all processes get the distance of the
    pictures of all.

    Args:
        features: Gives `(B, num_features)` for uint8 pictures `(B, 3, H, W)` and has a `num_features`, such as
            `dinotok.inception.InceptionFeatures`. It is moved to the device of the pictures.
        real_batches: Pictures `(B, 3, H, W)` in [-1, 1], of a size that may differ between batches; rounded to 8 bits.
        fake_batches: Likewise; values outside [-1, 1] are clamped.

    Returns:
        At least 0, up to rounding; 0 for equal sets.

    Raises:
        ValueError: If a set has fewer than two pictures, or pixels are not finite floats `(B, 3, H, W)`.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(feature=features)
    for real, batches in ((True, real_batches), (False, fake_batches)):
        count = 0
        for pixels in batches:
            with torch.no_grad():
                metric.to(pixels.device).update(_to_uint8(pixels), real=real)
            count += len(pixels)
        if count < 2:
            raise ValueError(f"{'real' if real else 'fake'}_batches hold {count} pictures; expected at least 2.")
    return metric.compute().item()


def _to_uint8(pixels: torch.Tensor) -> torch.Tensor:
    if pixels.ndim != 4 or pixels.shape[1] != 3 or not pixels.is_floating_point():
        raise ValueError(f"pixels are {pixels.dtype} of shape {tuple(pixels.shape)}; expected floats (B, 3, H, W).")
    if not pixels.isfinite().all():
        raise ValueError("pixels contain NaN or infinite values.")
    return ((pixels.float() * 0.5 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)


def _lpips(network: "LPIPS", pixels: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Compute the LPIPS of every picture as saved in 8 bits, `(B,)`; NaN for pictures that are too small."""
    pixels, target = _to_8bit_pair(pixels, target) * 2 - 1
    if min(pixels.shape[-2:]) < network.min_size:
        return pixels.new_full((len(pixels),), math.nan)
    with torch.no_grad():
        return network(pixels, target)


def _decibel(error: float) -> float:
    return -10 * math.log10(error) if error > 0 else math.inf


def _to_8bit_pair(pixels: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Check both, and round them to multiples of 1/255 in [0, 1]: `(2, B, 3, H, W)`, float32."""
    if pixels.shape != target.shape:
        raise ValueError(f"pixels {tuple(pixels.shape)} and target {tuple(target.shape)} differ in shape.")
    if target.ndim != 4 or target.shape[1] != 3 or target.numel() == 0:
        raise ValueError(f"pixels and target have shape {tuple(target.shape)}; expected (B, 3, H, W), no side zero.")
    if not (pixels.is_floating_point() and target.is_floating_point()):
        raise ValueError(f"pixels have dtype {pixels.dtype} and target {target.dtype}; expected floats in [-1, 1].")
    if not pixels.isfinite().all():
        raise ValueError("pixels contain NaN or infinite values.")
    if not (target.min() >= -1 and target.max() <= 1):
        raise ValueError(f"target has values in [{target.min().item()}, {target.max().item()}], not in [-1, 1].")
    pair = torch.stack([pixels.detach().float(), target.detach().float()])
    return ((pair * 0.5 + 0.5).clamp(0, 1) * 255).round() / 255
