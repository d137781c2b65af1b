"""The module for the library `evaluate` loads from its folder, offline."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import dinotok
from dinotok.metrics import ReconstructionMetrics


def test_the_reconstruction_module_gives_the_numbers_of_the_library():
    evaluate = pytest.importorskip("evaluate")
    folder = Path(dinotok.__file__).parent / "evaluate_modules" / "dinotok_reconstruction"
    arrays = torch.randint(0, 256, (2, 3, 20, 27, 3), generator=torch.Generator().manual_seed(0)).byte()
    metric = evaluate.load(str(folder))
    pictures = [[Image.fromarray(array) for array in np.array(part)] for part in arrays]
    metric.add_batch(predictions=pictures[0], references=pictures[1])
    expected = ReconstructionMetrics()
    expected.update(*(arrays.permute(0, 1, 4, 2, 3) / 127.5 - 1))
    assert metric.compute() == pytest.approx(expected.compute())
