"""Statistics of a data set's features, as references to compare with."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .extractors import Extractor
from .feature_statistics import FeatureStatistics, Gaussian, few_pictures
from .passes import MeasuredRows, PassOptions, measure_pictures

if TYPE_CHECKING:
    from datasets import Dataset

CROP = "center, as guided-diffusion's center_crop_arr"
RESIZE = "box halvings, then bicubic with antialiasing, 8 bits"
KINDS = ("features", "spatial_features")


def recipe_of_pictures(dataset: "Dataset", resolution: int, rows: MeasuredRows) -> dict[str, Any]:
    """Return what identifies the pictures that were measured, after crop and resize."""
    return {
        "resolution": resolution,
        "crop": CROP,
        "resize": RESIZE,
        "pictures": rows.pictures(),
        "count": rows.count,
        "skipped": len(dataset) - rows.count,
    }


def pass_identity(dataset: "Dataset", resolution: int, extractor: Extractor | None) -> dict[str, Any]:
    """Return what the measurements of every picture depend on."""
    return {
        "dataset": dataset._fingerprint,
        "resolution": resolution,
        "extractor": extractor.describe() if extractor else None,
        "torch": torch.__version__,
    }


def statistics_of_rows(
    rows: MeasuredRows, recipe: dict[str, Any], prefix: str = "", keep_features: bool = True
) -> FeatureStatistics:
    """Fit the Gaussians of a pass.

    Args:
        rows: With `features`, and perhaps `spatial_features`.
        recipe: Becomes that of the statistics.
        prefix: Of the names of these rows.
        keep_features: For KID, precision and recall.

    Raises:
        ValueError: If there are fewer than two pictures.
    """
    kinds = [kind for kind in KINDS if prefix + kind in rows.names]
    gaussians = {kind: Gaussian.fit(rows.batches(prefix + kind)) for kind in kinds}
    return FeatureStatistics(gaussians, recipe, rows.all(prefix + "features") if keep_features else None)


def make_statistics(
    dataset: "Dataset",
    extractor: Extractor,
    resolution: int,
    folder: Path,
    options: PassOptions | None = None,
    *,
    keep_features: bool = False,
    allow_few_pictures: bool = False,
) -> FeatureStatistics:
    """Measure a data set's reference statistics.

    Args:
        dataset: From `load_pictures`.
        extractor: Of the features.
        resolution: Pictures are cropped to this many pixels a side.
        folder: Of partial results; see `measure_pictures`.
        options: Of the pass.
        keep_features: Keep all rows, for KID, precision and recall.
        allow_few_pictures: Go on with fewer pictures than dimensions + 1, and put a `warning` into the recipe.

    Returns:
        The same on every process.

    Raises:
        ValueError: If there are fewer than two pictures, or too few for a covariance of full rank, or one cannot be
            read.
    """
    identity = pass_identity(dataset, resolution, extractor)
    rows = measure_pictures(dataset, resolution, extractor, folder, identity, options or PassOptions())
    recipe = recipe_of_pictures(dataset, resolution, rows) | {"extractor": extractor.describe()}
    statistics = statistics_of_rows(rows, recipe, keep_features=keep_features)
    warning = few_pictures(statistics.count, len(statistics.gaussians["features"].mean), "references")
    if warning:
        if not allow_few_pictures:
            raise ValueError(f"{warning}. To make them nevertheless, allow few pictures.")
        recipe["warning"] = warning
    return statistics
