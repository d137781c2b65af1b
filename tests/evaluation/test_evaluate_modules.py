"""The modules for the library `evaluate` load from their folders, offline."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import dinotok
from dinotok.data import load_pictures
from dinotok.evaluation.extractors import from_module
from dinotok.evaluation.generation import evaluate_generation
from dinotok.evaluation.reference import make_statistics
from dinotok.metrics import ReconstructionMetrics
from tests.evaluation.test_statistics import ColorFeatures
from tests.tiny_tokenizers import save_picture

MODULES = Path(dinotok.__file__).parent / "evaluate_modules"


def test_the_reconstruction_module_gives_the_numbers_of_the_library():
    evaluate = pytest.importorskip("evaluate")
    arrays = torch.randint(0, 256, (2, 3, 20, 27, 3), generator=torch.Generator().manual_seed(0)).byte()
    metric = evaluate.load(str(MODULES / "dinotok_reconstruction"))
    pictures = [[Image.fromarray(array) for array in np.array(part)] for part in arrays]
    metric.add_batch(predictions=pictures[0], references=pictures[1])
    expected = ReconstructionMetrics()
    expected.update(*(arrays.permute(0, 1, 4, 2, 3) / 127.5 - 1))
    assert metric.compute() == pytest.approx(expected.compute())


def test_the_generation_module_gives_the_numbers_of_the_command(tmp_path):
    evaluate = pytest.importorskip("evaluate")
    for index in range(16):
        save_picture(tmp_path / ("real" if index < 9 else "samples") / f"{index}.png", 24, 24, seed=index)
    extractor = from_module(ColorFeatures())
    reference = make_statistics(
        load_pictures(str(tmp_path / "real")), extractor, 24, tmp_path / "parts", keep_features=True
    )
    reference.save(tmp_path / "reference.safetensors")
    samples = load_pictures(str(tmp_path / "samples"))
    expected = evaluate_generation(samples, extractor, reference, tmp_path / "sample-parts")["metrics"]
    metric = evaluate.load(str(MODULES / "dinotok_generation"))
    metric.add_batch(predictions=[Image.open(path) for path in sorted((tmp_path / "samples").iterdir())])
    found = metric.compute(statistics=tmp_path / "reference.safetensors", extractor=extractor)
    assert {"KID", "precision", "recall"} < found.keys() and found == pytest.approx(expected)
    metric.add(prediction=Image.new("RGB", (30, 24)))
    with pytest.raises(ValueError, match="resizing samples would change every number"):
        metric.compute(statistics=tmp_path / "reference.safetensors", extractor=extractor)
