"""Tokenizers in closed form: what `AutoencoderDINOTok.fit` makes of many layers and widths, in one pass."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from photographs import to_pixels
from tqdm import tqdm

from dinotok.lpips import LPIPS
from dinotok.metrics import ReconstructionMetrics
from dinotok.models.tokenizer_model import channels_last_rows
from dinotok.probes import knn_accuracy
from dinotok.statistics import StreamingMoments

PATCH, BATCH, RIDGE = 16, 25, 1e-4

Grids = dict[str, torch.Tensor]
Measure = Callable[[torch.Tensor], Grids]


@dataclass(frozen=True)
class Photographs:
    """uint8 `(N, 3, H, W)` with labels, and how many of the validation set are reconstructed."""

    train: tuple[torch.Tensor, torch.Tensor]
    validation: tuple[torch.Tensor, torch.Tensor]
    reconstructions: int


class Survey:
    """What one pass over the training photographs finds of every grid of features: moments with the pixels, and means.

    Attributes:
        measure: Gives the grids `(B, D, h, w)` of pixels by name.
        moments: Of the features, with their patches of pixels as targets.
        means: Over the positions of each picture, `(N, D)`, of training and validation.
    """

    def __init__(self, measure: Measure, photographs: Photographs) -> None:
        self.measure, self.photographs = measure, photographs
        self.moments: dict[str, StreamingMoments] = {}
        self.means: dict[str, dict[str, torch.Tensor]] = {"validation": means_of(measure, photographs.validation[0])}
        self.means["train"] = means_of(measure, photographs.train[0], self._fit)

    def _fit(self, grids: Grids, pixels: torch.Tensor) -> None:
        patches = channels_last_rows(F.pixel_unshuffle(pixels, PATCH))
        for name, grid in grids.items():
            rows = channels_last_rows(grid)
            if name not in self.moments:
                self.moments[name] = StreamingMoments(rows.shape[1], patches.shape[1])
            self.moments[name].update(rows, patches)

    def accuracy(self, parts: "list[tuple[str, torch.Tensor | None]]") -> float:
        """k-NN accuracy of the mean normalised latents, made of `(grid, projection)` parts."""
        sets = []
        for split in ("train", "validation"):
            sets.append(torch.cat([normalize(self.moments[g], self.means[split][g], p) for g, p in parts], 1))
        return knn_accuracy(sets[0], self.photographs.train[1], sets[1], self.photographs.validation[1])

    def reconstruct(self, maps: dict[str, tuple[str, torch.Tensor, torch.Tensor]], lpips: LPIPS) -> dict[str, dict]:
        """Score linear maps `(grid, weight, bias)` to pixels, all in one pass over validation photographs."""
        metrics = {name: ReconstructionMetrics() for name in maps}
        pictures = spread(self.photographs.validation[0], self.photographs.reconstructions)
        for part in tqdm(pictures.split(BATCH), desc="reconstructions", mininterval=30):
            pixels = to_pixels(part)
            grids = self.measure(pixels)
            for name, (grid, weight, bias) in maps.items():
                patches = grids[grid].movedim(1, 3).double() @ weight + bias
                metrics[name].update(F.pixel_shuffle(patches.movedim(3, 1).float(), PATCH), pixels, lpips)
        return {name: metric.compute() for name, metric in metrics.items()}


def means_of(measure: Measure, pictures: torch.Tensor, also: Callable | None = None) -> Grids:
    """Mean features of pictures; `also` gets the grids and the pixels of every batch."""
    found: dict[str, list[torch.Tensor]] = {}
    for part in tqdm(pictures.split(BATCH), desc="features", mininterval=30):
        grids = measure(to_pixels(part))
        if also is not None:
            also(grids, to_pixels(part))
        for name, grid in grids.items():
            found.setdefault(name, []).append(grid.mean((2, 3)))
    return {name: torch.cat(rows) for name, rows in found.items()}


def normalize(moments: StreamingMoments, rows: torch.Tensor, projection: torch.Tensor | None) -> torch.Tensor:
    """Features as latents: projected, and every channel divided by its deviation over tokens."""
    rows, covariance = rows.double() - moments.mean, moments.covariance
    if projection is not None:
        rows, covariance = rows @ projection, projection.T @ covariance @ projection
    return (rows / covariance.diagonal().sqrt().clamp(min=1e-6)).float()


def spread(pictures: torch.Tensor, count: int) -> torch.Tensor:
    return pictures[torch.linspace(0, len(pictures) - 1, min(count, len(pictures))).round().long()]


def texture_of(moments: StreamingMoments, channels: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Projection to the texture channels, and weight and bias from the whole feature through them to pixels."""
    projection, weight = moments.reduced_rank_regression(channels, RIDGE)
    return projection, projection @ weight, moments.target_mean - moments.mean @ projection @ weight
