"""How well a tokenizer reconstructs a data set: every published number of one, from one pass."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..data import to_pixels
from ..lpips import LPIPS
from ..metrics import ReconstructionMetrics, pooled_psnr
from ..models.discrete import DiscreteTokenizer
from ..models.quantizers import CodeCounter
from ..models.tokenizer_model import TokenizerModel
from ..reports import usage_of
from ..transcoding import decode_batch, encode_batch, quantize_batch
from .extractors import Extractor
from .feature_statistics import FeatureStatistics, few_pictures, frechet_distance
from .passes import MeasuredRows, PassOptions, Rows, measure_pictures
from .reference import pass_identity, recipe_of_pictures, statistics_of_rows

if TYPE_CHECKING:
    from datasets import Dataset

_ORIGINAL = "original_"


class ReconstructionMeasure:
    """Reconstructs a batch and measures each picture; the `measure` of `measure_pictures`.

    Args:
        model: Any tokenizer.
        lpips: One network for each LPIPS to compute.
        extractor: Of the features of Fréchet distances; None for none.
        originals: Extract the features of the originals too, as the reference.
    """

    def __init__(
        self,
        model: TokenizerModel,
        lpips: Sequence[LPIPS] = (),
        extractor: Extractor | None = None,
        originals: bool = True,
    ):
        self.model, self.lpips, self.extractor, self.originals = model, lpips, extractor, originals

    def __call__(self, images: torch.Tensor) -> Rows:
        """Measure uint8 pictures `(B, 3, H, W)`; return a row per picture for every name."""
        pixels = to_pixels(images)
        latents = encode_batch(self.model, pixels)
        indices, latents = quantize_batch(self.model, latents)
        rows: Rows = {} if indices is None else {"indices": indices.to("cpu", torch.int32)}
        samples = decode_batch(self.model, latents)
        rows |= self._distances(samples, pixels)
        if self.extractor is not None:
            rows |= self.extractor(((samples * 0.5 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8))
            if self.originals:
                rows |= {_ORIGINAL + name: values for name, values in self.extractor(images).items()}
        return rows

    def _distances(self, samples: torch.Tensor, pixels: torch.Tensor) -> Rows:
        columns: dict[str, list[float]] = {}
        for network in self.lpips or (None,):
            for name in (results := ReconstructionMetrics().update(samples, pixels, network))[0]:
                columns[name] = [result[name] for result in results]
        return {name: torch.tensor(values, dtype=torch.float64) for name, values in columns.items()}


def evaluate_reconstruction(
    model: TokenizerModel,
    dataset: "Dataset",
    resolution: int,
    folder: Path,
    options: PassOptions | None = None,
    *,
    lpips: Sequence[LPIPS] = (),
    extractor: Extractor | None = None,
    statistics: FeatureStatistics | None = None,
    identity: dict[str, Any] | None = None,
    allow_few_pictures: bool = False,
) -> dict[str, Any]:
    """Measure a tokenizer on a data set.

    Args:
        model: Any tokenizer, on its device.
        dataset: From `load_pictures`.
        resolution: Pictures are cropped to this many pixels a side.
        folder: Of partial results; see `measure_pictures`.
        options: Of the pass.
        lpips: One network for each LPIPS to compute.
        extractor: Of the features of the Fréchet distance; None for none.
        statistics: The reference; by default the originals after the same crop, as papers do for rFID.
        identity: What the reconstructions depend on beyond the data set, such as the model's digest.
        allow_few_pictures: Compute Fréchet distances of too few pictures, and say so under `warnings`.

    Returns:
        `metrics`, `codebooks` (of a discrete tokenizer), `pictures` and `warnings`.

    Raises:
        ValueError: If a picture cannot be read, the model or the statistics do not fit the resolution or the
            extractor, or there are too few pictures for a Fréchet distance.
    """
    if statistics is not None:
        if extractor is None:
            raise ValueError("Statistics are compared with features of the same extractor: name it.")
        statistics.check(resolution, extractor.describe())
    identity = pass_identity(dataset, resolution, extractor) | {
        "model": identity,
        "lpips": [network.net for network in lpips],
        "originals": statistics is None,
    }
    measure = ReconstructionMeasure(model, lpips, extractor, statistics is None)
    rows = measure_pictures(dataset, resolution, measure, folder, identity, options or PassOptions())
    metrics = _averages(rows)
    warnings = []
    if extractor is not None:
        made = statistics_of_rows(rows, {}, keep_features=False)
        reference = statistics or statistics_of_rows(rows, {}, _ORIGINAL, keep_features=False)
        warnings = check_counts({"reconstructions": made, "references": reference}, allow_few_pictures)
        distance = frechet_distance(made.gaussians["features"], reference.gaussians["features"])
        metrics[f"r{extractor.metric}" if extractor.metric.startswith("FID") else extractor.metric] = distance
    return {
        "metrics": metrics,
        "codebooks": _codebooks(model, rows),
        "pictures": recipe_of_pictures(dataset, resolution, rows),
        "warnings": warnings,
    }


def check_counts(sets: dict[str, FeatureStatistics], allow_few_pictures: bool) -> list[str]:
    """Return what is wrong with Fréchet distances of so few pictures.

    Raises:
        ValueError: If something is, and that is not allowed.
    """
    found = [few_pictures(s.count, len(s.gaussians["features"].mean), name) for name, s in sets.items()]
    warnings = [warning for warning in found if warning]
    if warnings and not allow_few_pictures:
        raise ValueError(f"{warnings[0]}. To compute it nevertheless, allow few pictures.")
    return warnings


def _averages(rows: MeasuredRows) -> dict[str, float]:
    errors = rows.all("mean_squared_error")
    metrics = {"psnr": rows.all("psnr").mean().item(), "psnr_pooled": pooled_psnr(errors)}
    for name in ["ssim", *(name for name in rows.names if name.startswith("lpips_"))]:
        metrics[name] = rows.all(name).nanmean().item()
    return metrics


def _codebooks(model: TokenizerModel, rows: MeasuredRows) -> dict[str, dict[str, float]]:
    if not isinstance(model, DiscreteTokenizer):
        return {}
    counters = {name: CodeCounter(size) for name, size in model.codebook_sizes.items()}
    for indices in rows.batches("indices"):
        for number, counter in enumerate(counters.values()):
            counter.update(indices[:, number].long())
    return usage_of(counters)
