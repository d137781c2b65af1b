"""How close generated pictures are to real ones: every published number of a set of samples."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..generation import draw_pictures
from ..picture_rows import picture_sizes
from .distances import KID_SUBSET_SIZE, KID_SUBSETS, inception_score, kernel_distance, precision_recall
from .extractors import Extractor
from .feature_statistics import FeatureStatistics, frechet_distance
from .passes import (
    MeasuredRows,
    PassOptions,
    measure_batches,
    measure_pictures,
    rank_and_processes,
    wait_for_all,
)
from .reconstruction import check_counts
from .reference import statistics_of_rows
from .sample_packs import SamplePack, write_sample_pack

_SAMPLES = "samples"


def evaluate_generation(
    samples: SamplePack | Any,
    extractor: Extractor,
    statistics: FeatureStatistics,
    folder: Path,
    options: PassOptions | None = None,
    *,
    allow_few_pictures: bool = False,
) -> dict[str, Any]:
    """Compare samples with reference statistics.

    Args:
        samples: A pack, or a data set of pictures from `load_pictures`; of the statistics' resolution, because
            resizing samples changes every number.
        extractor: The one that made the statistics.
        statistics: The reference. KID, precision and recall need its features.
        folder: Of partial results; see `measure_pictures`.
        options: Of the pass.
        allow_few_pictures: Compute Fréchet distances of too few pictures, and say so under `warnings`.

    Returns:
        `metrics`, `pictures` and `warnings`. The Fréchet distance always; `sFID` and `inception_score` where the
        extractor has spatial features and logits; KID, precision and recall where the statistics keep features.

    Raises:
        ValueError: If the samples are of another resolution or too few, or the extractor is another one.
    """
    resolution = statistics.recipe.get("resolution", 0)
    statistics.check(resolution, extractor.describe())
    rows = _measure(samples, resolution, extractor, folder, options or PassOptions())
    made = statistics_of_rows(rows, {}, keep_features=statistics.features is not None)
    warnings = check_counts({"samples": made, "references": statistics}, allow_few_pictures)
    metrics = {}
    for kind, gaussian in made.gaussians.items():
        if kind in statistics.gaussians:
            name = extractor.metric if kind == "features" else "sFID"
            metrics[name] = frechet_distance(gaussian, statistics.gaussians[kind])
    if statistics.features is not None and made.features is not None:
        metrics |= _set_distances(statistics.features, made.features)
    if "logits" in rows.names:
        logits = rows.all("logits")
        metrics["inception_score"], metrics["inception_score_std"] = inception_score(logits, min(10, len(logits)))
    pictures = {"resolution": resolution, "count": rows.count, "pictures": rows.pictures()}
    settings = {"kid": f"{KID_SUBSETS} subsets of at most {KID_SUBSET_SIZE}, seed 0", "neighbours": 3}
    return {"metrics": metrics, "pictures": pictures, "definitions": settings, "warnings": warnings}


def generated_batches(
    pipeline: Any, count: int, batch_size: int, seed: int = 0, first: int = 0, **arguments: Any
) -> Iterator[torch.Tensor]:
    """Draw samples of all classes in turn, each from a seed of its own.

    Args:
        pipeline: A `DINOTokDiTPipeline` or `DINOTokARPipeline`.
        count: Samples; equally many of every class if it is a multiple of their number.
        batch_size: Samples at a time; it does not change them.
        seed: Of sample 0; the next has `seed + 1`.
        first: Number of the sample to begin with.
        **arguments: Of the pipeline's call, such as `guidance_scale`.

    Yields:
        uint8 `(B, 3, H, W)`.
    """
    num_classes = pipeline.transformer.config.num_classes
    for start in range(first, first + count, batch_size):
        numbers = range(start, min(start + batch_size, first + count))
        labels, seeds = [number % num_classes for number in numbers], [seed + number for number in numbers]
        pictures = draw_pictures(pipeline, labels, seeds, batch_size, arguments)
        yield torch.stack([torch.from_numpy(np.array(picture)).permute(2, 0, 1) for picture in pictures])


def draw_sample_pack(
    pipeline: Any,
    path: Path,
    count: int,
    folder: Path,
    options: PassOptions | None = None,
    *,
    identity: dict[str, Any] | None = None,
    seed: int = 0,
    **arguments: Any,
) -> SamplePack:
    """Draw the samples of `generated_batches` into a pack; what an earlier, interrupted call drew is not drawn again.

    Under `torch.distributed` the processes share the work.

    Args:
        pipeline: As there.
        path: Of the `.npz` file; it is written once, when all samples are there.
        count: As there.
        folder: Of the samples until then, in files of `options.shard_size`. It stays: delete it by `remove_parts` when
            the pack has been used.
        options: Batch size and samples per file.
        identity: What the samples depend on beyond the arguments, such as the pipeline's digest.
        seed: As there.
        **arguments: As there.

    Returns:
        The pack.

    Raises:
        ValueError: If the pack is there already, and the folder does not say that it is this one; or the folder is of
            other samples.
    """
    options = options or PassOptions()
    if path.exists() and not folder.exists():
        raise ValueError(f"There are samples in {str(path)!r} already: evaluate them by --samples, or delete them.")
    key = {"pipeline": identity, "seed": seed, "arguments": arguments, "torch": torch.__version__}

    def read(start: int, stop: int) -> Iterator[dict[str, Any]]:
        batches = generated_batches(pipeline, stop - start, options.batch_size, seed, start, **arguments)
        return ({"pixel_values": batch} for batch in batches)

    rows = measure_batches(count, read, lambda images: {_SAMPLES: images}, folder, key, options)
    if rank_and_processes()[0] == 0 and not path.exists():
        write_sample_pack(path, rows.batches(_SAMPLES), count)
    wait_for_all()
    return SamplePack(path)


def _measure(samples: Any, resolution: int, extractor: Extractor, folder: Path, options: PassOptions) -> MeasuredRows:
    identity = {"extractor": extractor.describe(), "resolution": resolution, "torch": torch.__version__}
    if isinstance(samples, SamplePack):
        _check_sizes([(samples.height, samples.width)], resolution)
        stat = os.stat(samples.path)
        identity |= {"samples": [str(samples.path), stat.st_size, stat.st_mtime_ns]}

        def read(start: int, stop: int) -> Iterator[dict[str, Any]]:
            return ({"pixel_values": batch} for batch in samples.batches(options.batch_size, start, stop))

        return measure_batches(samples.count, read, extractor, folder, identity, options)
    _check_sizes(picture_sizes(samples, "image"), resolution)
    identity |= {"samples": samples._fingerprint}
    return measure_pictures(samples, resolution, extractor, folder, identity, options)


def _check_sizes(sizes: Sequence[tuple[int, int] | None], resolution: int) -> None:
    for number, size in enumerate(sizes):
        if size not in (None, (resolution, resolution)):
            raise ValueError(
                f"Sample {number} is {size[0]}x{size[1]}, the statistics are of {resolution}x{resolution}; resizing "
                "samples would change every number."
            )


def _set_distances(real: torch.Tensor, fake: torch.Tensor) -> dict[str, float]:
    mean, deviation = kernel_distance(real, fake)
    precision, recall = precision_recall(real, fake)
    return {"KID": mean, "KID_std": deviation, "precision": precision, "recall": recall}
