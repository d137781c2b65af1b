"""PSNR and SSIM of reconstructions, as a module of the library `evaluate`."""

import datasets
import evaluate
import numpy as np
import torch

from dinotok.metrics import ReconstructionMetrics


class DINOTokReconstruction(evaluate.Metric):
    """`dinotok.metrics.ReconstructionMetrics` on pairs of pictures; for up to some thousands of them.

    `compute` returns `psnr` (mean over pictures), `psnr_pooled`, `ssim` (Gaussian 11x11, data range 1 of pixels in
    [0, 1]) and `num_images`; with `lpips`, a `dinotok.lpips.LPIPS`, its distance too.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self.__doc__ or "",
            citation="",
            inputs_description="predictions and references: RGB pictures, pairwise of one size",
            features=datasets.Features({"predictions": datasets.Image(), "references": datasets.Image()}),
        )

    def _compute(self, predictions, references, lpips=None):
        metrics = ReconstructionMetrics()
        for prediction, reference in zip(predictions, references, strict=True):
            metrics.update(_pixels(prediction), _pixels(reference), lpips)
        return metrics.compute()


def _pixels(image) -> torch.Tensor:
    """`(1, 3, H, W)` in [-1, 1]."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None] / 127.5 - 1
