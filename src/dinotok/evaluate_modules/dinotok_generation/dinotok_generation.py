"""Fréchet distance, KID, precision and recall of samples, as a module of the library `evaluate`."""

import tempfile
from pathlib import Path

import datasets
import evaluate

from dinotok.data import load_pictures
from dinotok.evaluation.extractors import load_extractor
from dinotok.evaluation.feature_statistics import FeatureStatistics
from dinotok.evaluation.generation import evaluate_generation


class DINOTokGeneration(evaluate.Metric):
    """`dinotok evaluate generation` on pictures that are there; for up to some thousands of them.

    `compute` takes `statistics`, a file of `dinotok evaluate statistics`, and `extractor`, the one that made it: a
    name, as for that command, or a `dinotok.evaluation.extractors.Extractor`. It returns the Fréchet distance, with
    KID, precision and recall where the file keeps features. `allow_few_pictures` is that of the command.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self.__doc__ or "",
            citation="",
            inputs_description="predictions: RGB pictures of the resolution of the statistics",
            features=datasets.Features({"predictions": datasets.Image()}),
        )

    def _compute(self, predictions, statistics, extractor, allow_few_pictures=False):
        network = load_extractor(extractor) if isinstance(extractor, str) else extractor
        reference = FeatureStatistics.load(statistics)
        with tempfile.TemporaryDirectory() as folder:
            pictures = datasets.Dataset.from_dict(
                {"image": [image.convert("RGB") for image in predictions]},
                features=datasets.Features({"image": datasets.Image()}),
            )
            pictures.save_to_disk(Path(folder, "samples"))
            samples = load_pictures(str(Path(folder, "samples")))
            result = evaluate_generation(
                samples, network, reference, Path(folder, "parts"), allow_few_pictures=allow_few_pictures
            )
        return result["metrics"]
