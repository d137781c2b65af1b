"""Reference statistics: the arithmetic of the Fréchet distance, the file, and the command."""

import importlib.util
import shutil
import subprocess
import sys

import numpy as np
import pytest
import scipy.linalg
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torchmetrics.image.fid import FrechetInceptionDistance
from typer.testing import CliRunner

from dinotok.cli import app
from dinotok.data import load_pictures
from dinotok.evaluation.extractors import Extractor, from_module, load_extractor
from dinotok.evaluation.feature_statistics import FeatureStatistics, Gaussian, few_pictures, frechet_distance
from dinotok.evaluation.passes import PassOptions
from dinotok.evaluation.reference import make_statistics
from dinotok.statistics import StreamingMoments
from tests.conftest import save_tiny_encoder
from tests.tiny_tokenizers import save_picture


class ColorFeatures(torch.nn.Module):
    """Mean and spread of each colour, in units of the full range."""

    num_features = 6

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        values = images.double().flatten(2) / 255
        return torch.cat([values.mean(2), values.std(2)], dim=1)


class Passing(torch.nn.Module):
    num_features = 12

    def forward(self, features):
        return features


def features(count: int, seed: int, dimensions: int = 12) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dimensions, dimensions, generator=generator)
    return torch.randn(count, dimensions, generator=generator) @ mixing + 0.3 * seed


@pytest.fixture
def folder(tmp_path):
    for index in range(9):
        save_picture(tmp_path / "pictures" / f"{index}.png", 40 + index, 30, seed=index)
    return tmp_path / "pictures"


def by_hand(dataset) -> np.ndarray:
    rows = measure_rows(dataset)
    return torch.cat(rows).numpy()


def measure_rows(dataset):
    from dinotok.data import PictureLoader, PictureTransform

    loader = PictureLoader(dataset, PictureTransform(24, "center"), 2, shuffle=False)
    return [ColorFeatures()(batch["pixel_values"]) for batch in loader.once()]


def test_the_distance_agrees_with_scipy_and_torchmetrics_also_from_merged_shards():
    real, fake = features(300, 1), features(200, 2)
    shards = [StreamingMoments(12).update(part) for part in real.split([7, 200, 93])]
    merged = shards[2].merge(shards[0]).merge(shards[1])
    distance = frechet_distance(Gaussian.from_moments(merged), Gaussian.fit(fake.split(31)))
    (m, c), (n, d) = [(f.double().numpy().mean(0), np.cov(f.double().numpy(), rowvar=False)) for f in (real, fake)]
    expected = ((m - n) ** 2).sum() + np.trace(c + d - 2 * scipy.linalg.sqrtm(c @ d).real)
    assert distance == pytest.approx(expected, rel=1e-6)
    metric = FrechetInceptionDistance(feature=Passing()).set_dtype(torch.float64)
    metric.update(real, real=True)
    metric.update(fake, real=False)
    assert distance == pytest.approx(metric.compute().item(), rel=1e-6)


def test_the_distance_of_equal_sets_is_zero_and_of_constants_the_squared_difference():
    one = Gaussian.fit([features(50, 1)])
    assert frechet_distance(one, one) == pytest.approx(0, abs=1e-9)
    constant, other = Gaussian.fit([torch.zeros(5, 3)]), Gaussian.fit([torch.full((4, 3), 2.0)])
    assert frechet_distance(constant, other) == 12
    with pytest.raises(ValueError, match="12 and 3 dimensions"):
        frechet_distance(one, other)


def test_one_picture_has_no_covariance_and_few_have_one_of_low_rank():
    with pytest.raises(ValueError, match="at least 2 pictures, got 1"):
        Gaussian.fit([torch.zeros(1, 3)])
    with pytest.raises(ValueError, match="at least 2 pictures, got 0"):
        Gaussian.fit([])
    assert few_pictures(7, 6, "samples") is None
    assert "samples are 6 pictures" in few_pictures(6, 6, "samples")


def test_statistics_are_those_of_the_cropped_pictures(folder, tmp_path):
    dataset = load_pictures(str(folder))
    made = make_statistics(
        dataset, from_module(ColorFeatures()), 24, tmp_path / "parts", PassOptions(2, shard_size=4), keep_features=True
    )
    expected = by_hand(dataset)
    np.testing.assert_allclose(made.gaussians["features"].mean, expected.mean(0), rtol=1e-6)
    np.testing.assert_allclose(made.gaussians["features"].covariance, np.cov(expected, rowvar=False), atol=1e-7)
    np.testing.assert_allclose(made.features, expected, rtol=1e-6)
    assert made.recipe["pictures"]["distinct"] == made.recipe["count"] == 9


def torchrun(processes: int, *arguments) -> None:
    """Run `dinotok evaluate` in processes of their own."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--no-python"]
    start = [sys.executable, "-c", "from dinotok.cli import main; main()", "evaluate"]
    call = [*launcher, "--nproc-per-node", processes, *start, *arguments]
    subprocess.run([str(word) for word in call], check=True, timeout=600)


@pytest.mark.slow
def test_two_processes_write_the_statistics_of_one(folder, tmp_path):
    encoder = save_tiny_encoder(tmp_path / "tiny-dino", seed=0)
    for processes in (1, 2):
        output = tmp_path / f"{processes}.safetensors"
        options = ["--dataset", folder, "--output", output, "--extractor", f"encoder:{encoder}", "--shard-size", 2]
        torchrun(processes, "statistics", *options, "--resolution", 32, "--allow-few-pictures")
    assert FeatureStatistics.load(tmp_path / "1.safetensors").digest() == FeatureStatistics.load(output).digest()


def test_a_finished_part_is_not_measured_again_and_another_evaluation_not_continued(folder, tmp_path):
    dataset, options = load_pictures(str(folder)), PassOptions(2, shard_size=4)
    calls = []

    class Counting(ColorFeatures):
        def forward(self, images):
            calls.append(len(images))
            if sum(calls) > 6:
                raise KeyboardInterrupt
            return super().forward(images)

    with pytest.raises(KeyboardInterrupt):
        make_statistics(dataset, from_module(Counting(), "colors"), 24, tmp_path / "parts", options)
    assert len(list((tmp_path / "parts").iterdir())) == 1
    calls[:] = [-99]
    resumed = make_statistics(dataset, from_module(Counting(), "colors"), 24, tmp_path / "parts", options)
    assert sum(calls[1:]) == 5
    straight = make_statistics(dataset, from_module(ColorFeatures(), "colors"), 24, tmp_path / "straight", options)
    assert resumed.digest() == straight.digest()
    with pytest.raises(ValueError, match="another evaluation, with another resolution"):
        make_statistics(dataset, from_module(ColorFeatures(), "colors"), 16, tmp_path / "parts", options)


def test_the_file_keeps_everything_and_refuses_what_does_not_fit(folder, tmp_path):
    extractor = from_module(ColorFeatures())
    made = make_statistics(load_pictures(str(folder)), extractor, 24, tmp_path / "parts", keep_features=True)
    path = tmp_path / "statistics.safetensors"
    made.save(path)
    loaded = FeatureStatistics.load(path)
    assert loaded.digest() == made.digest() and loaded.recipe == made.recipe
    assert loaded.gaussians["features"].covariance.dtype == torch.float64
    loaded.check(24, extractor.describe())
    with pytest.raises(ValueError, match="resolution 24, not 32"):
        loaded.check(32, extractor.describe())
    with pytest.raises(ValueError, match="its name is 'ColorFeatures', not 'colors'"):
        loaded.check(24, from_module(ColorFeatures(), "colors").describe())
    with pytest.raises(ValueError, match="its weights is"):
        loaded.check(24, from_module(torch.nn.Linear(1, 1), "ColorFeatures").describe())
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    tensors["features.mean"] += 1e-9
    save_file(tensors, path, metadata)
    with pytest.raises(ValueError, match="does not have the digest"):
        FeatureStatistics.load(path)
    save_file(tensors, path)
    with pytest.raises(ValueError, match="was not written by"):
        FeatureStatistics.load(path)
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="damaged"):
        FeatureStatistics.load(path)


# Hostile inputs


def test_too_few_pictures_are_refused_or_marked(folder, tmp_path):
    few = load_pictures(str(folder)).select(range(6))
    with pytest.raises(ValueError, match="6 pictures, and a covariance of 6 features needs at least 7"):
        make_statistics(few, from_module(ColorFeatures()), 24, tmp_path / "parts")
    made = make_statistics(few, from_module(ColorFeatures()), 24, tmp_path / "parts", allow_few_pictures=True)
    assert "at least 7" in made.recipe["warning"]
    with pytest.raises(ValueError, match="at least 2 pictures, got 1"):
        make_statistics(few.select([0]), from_module(ColorFeatures()), 24, tmp_path / "one", allow_few_pictures=True)
    with pytest.raises(ValueError, match="no pictures"):
        make_statistics(few.select([]), from_module(ColorFeatures()), 24, tmp_path / "none")


def test_duplicates_are_counted_and_what_is_no_picture_is_named(folder, tmp_path):
    for copy in "abc":
        shutil.copy(folder / "0.png", folder / f"{copy}.png")
    (folder / "notes.txt").write_text("not a picture")
    made = make_statistics(load_pictures(str(folder)), from_module(ColorFeatures()), 24, tmp_path / "parts")
    assert made.recipe["pictures"]["distinct"] == 9 and made.count == 12
    (folder / "damaged.png").write_bytes(b"not a picture")
    dataset = load_pictures(str(folder))
    with pytest.raises(ValueError, match="damaged.png|could not be read"):
        make_statistics(dataset, from_module(ColorFeatures()), 24, tmp_path / "refused")
    options = PassOptions(max_skipped_share=0.1)
    tolerated = make_statistics(dataset, from_module(ColorFeatures()), 24, tmp_path / "tolerated", options)
    assert tolerated.recipe["skipped"] == 1 and tolerated.count == 12


class Returning(torch.nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, images):
        return self.value


@pytest.mark.parametrize(
    ("value", "images", "message"),
    [
        (torch.full((1, 2), float("nan")), torch.zeros(1, 3, 4, 6, dtype=torch.uint8), "NaN or infinite"),
        (torch.zeros(1, 2, 3, 3), torch.zeros(1, 3, 4, 6, dtype=torch.uint8), r"\(1, 2, 3, 3\) for 1 pictures"),
        ({"logits": torch.zeros(1, 2)}, torch.zeros(1, 3, 4, 6, dtype=torch.uint8), "expected features"),
        (torch.zeros(1, 2), torch.zeros(1, 3, 4, 6), "torch.float32"),
        (torch.zeros(1, 2), torch.zeros(3, 4, 6, dtype=torch.uint8), r"\(3, 4, 6\)"),
    ],
)
def test_extractors_name_what_is_wrong(value, images, message):
    with pytest.raises(ValueError, match=message):
        Extractor("wrong", "FD", Returning(value))(images)


# The command


def invoke(*arguments):
    return CliRunner().invoke(app, ["evaluate", "statistics", *map(str, arguments)])


def test_the_command_writes_statistics_of_an_encoder(folder, tmp_path):
    encoder = save_tiny_encoder(tmp_path / "tiny-dino", seed=0)
    output = tmp_path / "statistics.safetensors"
    call = ("--dataset", folder, "--output", output, "--resolution", 32, "--extractor", f"encoder:{encoder}")
    refused = invoke(*call)
    assert refused.exit_code == 2 and "at least 33" in refused.output
    result = invoke(*call, "--allow-few-pictures", "--keep-features")
    assert result.exit_code == 0, result.output
    assert "FD-tiny-dino statistics of 9 pictures" in result.output and "warning: The references" in result.output
    loaded = FeatureStatistics.load(output)
    loaded.check(32, load_extractor(f"encoder:{encoder}").describe())
    assert loaded.features.shape == (9, 32) and loaded.recipe["dataset"] == str(folder)
    assert not list(tmp_path.glob(".*"))


def test_unknown_extractors_are_named(folder, tmp_path):
    result = invoke("--dataset", folder, "--output", tmp_path / "x", "--extractor", "resnet")
    assert result.exit_code == 2 and "There is no extractor 'resnet'" in result.output
    if importlib.util.find_spec("torch_fidelity") is None:
        result = invoke("--dataset", folder, "--output", tmp_path / "x", "--extractor", "inception-2048")
        assert result.exit_code == 2 and "pip install torch-fidelity" in result.output
