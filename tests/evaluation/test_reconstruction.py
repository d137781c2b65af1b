"""`dinotok evaluate reconstruction` measures what the metrics of the library measure, once and for all pictures."""

import json
import math

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file
from torchmetrics.image.fid import FrechetInceptionDistance
from typer.testing import CliRunner

from dinotok.cli import app
from dinotok.data import PictureLoader, PictureTransform, load_pictures, to_pixels
from dinotok.evaluation.extractors import from_module
from dinotok.evaluation.passes import PassOptions
from dinotok.evaluation.reconstruction import ReconstructionMeasure, evaluate_reconstruction
from dinotok.evaluation.reference import make_statistics
from dinotok.lpips import LPIPS
from dinotok.metrics import ReconstructionMetrics, fid
from dinotok.models.quantizers import CodeCounter
from tests.conftest import save_tiny_encoder
from tests.evaluation.test_statistics import ColorFeatures, torchrun
from tests.tiny_tokenizers import save_picture, tiny_discrete_tokenizer, tiny_tokenizer

OPTIONS = PassOptions(batch_size=2, shard_size=4)


@pytest.fixture
def folder(tmp_path):
    for index in range(9):
        save_picture(tmp_path / "pictures" / f"{index}.png", 40 + 7 * index, 36, seed=index)
    return tmp_path / "pictures"


@pytest.fixture(scope="module")
def lpips() -> LPIPS:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LPIPS("squeeze")


def pixels_of(dataset) -> list[torch.Tensor]:
    loader = PictureLoader(dataset, PictureTransform(32, "center"), 2, shuffle=False)
    return [to_pixels(batch["pixel_values"]) for batch in loader.once()]


def test_numbers_are_those_of_the_metrics_one_by_one(folder, tmp_path, lpips):
    model, dataset = tiny_discrete_tokenizer(), load_pictures(str(folder))
    result = evaluate_reconstruction(
        model, dataset, 32, tmp_path / "parts", OPTIONS, lpips=[lpips], extractor=from_module(ColorFeatures())
    )
    batches = pixels_of(dataset)
    metrics, counter, samples = ReconstructionMetrics(), CodeCounter(16), []
    for pixels in batches:
        latents = model.encode(pixels).latent
        samples.append(model(pixels).sample.detach())  # from the codes
        metrics.update(samples[-1], pixels, lpips)
        counter.update(model.quantize(latents).indices[:, 1])
    expected = metrics.compute()
    for name in ("psnr", "psnr_pooled", "ssim", "lpips_squeeze"):
        assert result["metrics"][name] == pytest.approx(expected[name], rel=1e-5)
    assert result["metrics"]["FD-ColorFeatures"] == pytest.approx(fid(ColorFeatures(), batches, samples), rel=1e-4)
    assert list(result["codebooks"].values())[1]["perplexity"] == pytest.approx(counter.compute().perplexity)
    assert result["pictures"]["count"] == 9 and result["warnings"] == []


def test_a_reference_of_the_same_pictures_gives_the_distance_to_the_originals(folder, tmp_path):
    model, dataset, extractor = tiny_tokenizer(), load_pictures(str(folder)), from_module(ColorFeatures())
    statistics = make_statistics(dataset, extractor, 32, tmp_path / "statistics", OPTIONS)
    results = [
        evaluate_reconstruction(
            model, dataset, 32, tmp_path / name, OPTIONS, extractor=extractor, statistics=reference
        )
        for name, reference in (("originals", None), ("file", statistics))
    ]
    assert results[0] == results[1]
    assert results[0]["codebooks"] == {}
    with pytest.raises(ValueError, match="resolution 32, not 48"):
        evaluate_reconstruction(model, dataset, 48, tmp_path / "x", extractor=extractor, statistics=statistics)
    with pytest.raises(ValueError, match="name it"):
        evaluate_reconstruction(model, dataset, 32, tmp_path / "x", statistics=statistics)


def test_a_killed_evaluation_goes_on_and_gives_the_same_numbers(folder, tmp_path):
    model, dataset = tiny_discrete_tokenizer(), load_pictures(str(folder))
    straight = evaluate_reconstruction(model, dataset, 32, tmp_path / "straight", OPTIONS)
    calls = []

    def interrupt(*_):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt

    hook = model.decoder.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        evaluate_reconstruction(model, dataset, 32, tmp_path / "killed", OPTIONS)
    assert evaluate_reconstruction(model, dataset, 32, tmp_path / "killed", OPTIONS) == straight
    hook.remove()
    assert len(calls) == 4 + 3  # two batches of the first shard are not done again, of five
    with pytest.raises(ValueError, match="another model"):
        evaluate_reconstruction(model, dataset, 32, tmp_path / "killed", OPTIONS, identity={"digest": "other"})


# Hostile inputs


def test_constant_pictures_have_finite_numbers_and_no_distance_to_themselves(tmp_path):
    for index in range(8):
        path = tmp_path / "constant" / f"{index}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (40, 33), (90, 120, 30)).save(path)
    dataset, extractor = load_pictures(str(tmp_path / "constant")), from_module(ColorFeatures())
    result = evaluate_reconstruction(tiny_tokenizer(), dataset, 32, tmp_path / "parts", OPTIONS, extractor=extractor)
    assert all(math.isfinite(value) for value in result["metrics"].values())
    assert result["pictures"]["pictures"]["distinct"] == 1


def test_one_picture_has_a_psnr_but_no_frechet_distance(folder, tmp_path):
    one = load_pictures(str(folder)).select([3])
    result = evaluate_reconstruction(tiny_tokenizer(), one, 32, tmp_path / "psnr")
    assert result["pictures"]["count"] == 1
    assert result["metrics"]["psnr"] == pytest.approx(result["metrics"]["psnr_pooled"])
    with pytest.raises(ValueError, match="at least 2 pictures, got 1"):
        evaluate_reconstruction(tiny_tokenizer(), one, 32, tmp_path / "fd", extractor=from_module(ColorFeatures()))


def test_a_model_that_answers_nan_and_a_size_that_does_not_fit_are_named(folder, tmp_path):
    model, dataset = tiny_tokenizer(), load_pictures(str(folder))
    with pytest.raises(ValueError, match="not a multiple"):
        evaluate_reconstruction(model, dataset, 40, tmp_path / "size")
    model.decoder.conv_out.bias.data.fill_(math.nan)
    with pytest.raises(ValueError, match="NaN"):
        evaluate_reconstruction(model, dataset, 32, tmp_path / "nan")


def test_duplicates_count_as_often_as_they_come(folder, tmp_path):
    model, dataset = tiny_tokenizer(), load_pictures(str(folder))
    results = [
        evaluate_reconstruction(model, dataset.select(rows), 32, tmp_path / f"{number}")
        for number, rows in enumerate(([0], [5], [0, 5, 5]))
    ]
    first, second, both = (result["metrics"]["psnr"] for result in results)
    assert both == pytest.approx((first + 2 * second) / 3)
    assert results[2]["pictures"]["count"] == 3 and results[2]["pictures"]["pictures"]["distinct"] == 2


def test_what_is_no_picture_is_left_out_or_named(folder, tmp_path):
    (folder / "notes.txt").write_text("not a picture")
    (folder / "damaged.png").write_bytes(b"not a picture")
    model, dataset = tiny_tokenizer(), load_pictures(str(folder))
    with pytest.raises(ValueError, match="damaged.png|could not be read"):
        evaluate_reconstruction(model, dataset, 32, tmp_path / "refused")
    options = PassOptions(max_skipped_share=0.1)
    tolerated = evaluate_reconstruction(model, dataset, 32, tmp_path / "tolerated", options)
    assert tolerated["pictures"]["count"] == 9 and tolerated["pictures"]["skipped"] == 1


def test_tensors_of_another_range_or_shape_are_refused():
    measure = ReconstructionMeasure(tiny_tokenizer())
    images = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    assert set(measure(images)) == {"psnr", "ssim", "mean_squared_error"}
    for values, message in (
        (images / 255, "expected torch.uint8"),
        (images.int(), "expected torch.uint8"),
        (images[:, :1], r"shape \(B, 3, H, W\)"),
        (images[0], r"shape \(B, 3, H, W\)"),
    ):
        with pytest.raises(ValueError, match=message):
            measure(values)


# Two processes


@pytest.mark.slow
def test_two_processes_give_the_numbers_of_one(folder, tmp_path):
    tiny_discrete_tokenizer().save_pretrained(tmp_path / "model")
    encoder = save_tiny_encoder(tmp_path / "tiny-dino", seed=0)
    reports = []
    for processes in (1, 2):
        output = tmp_path / f"{processes}"
        call = ["reconstruction", "--model", tmp_path / "model", "--dataset", folder, "--split", "train"]
        call += ["--resolution", 32, "--output", output, "--extractor", f"encoder:{encoder}", "--shard-size", 2]
        torchrun(processes, *call, "--allow-few-pictures")
        reports.append(json.loads((output / "evaluation.json").read_text()))
    assert [report.pop("processes") for report in reports] == [1, 2]
    assert reports[0] == reports[1]


# The command


def test_the_command_writes_json_and_a_model_index(folder, tmp_path, lpips):
    tiny_discrete_tokenizer().save_pretrained(tmp_path / "model")
    save_file(lpips.state_dict(), tmp_path / "lpips.safetensors", {"net": "squeeze"})
    encoder = save_tiny_encoder(tmp_path / "tiny-dino", seed=0)
    output = tmp_path / "out"
    call = ["evaluate", "reconstruction", "--model", tmp_path / "model", "--dataset", folder, "--split", "train"]
    call += ["--resolution", 32, "--output", output, "--lpips", tmp_path / "lpips.safetensors"]
    call += ["--extractor", f"encoder:{encoder}"]
    refused = CliRunner().invoke(app, list(map(str, call)))
    assert refused.exit_code == 2 and "needs at least 33" in refused.output
    result = CliRunner().invoke(app, [*map(str, call), "--allow-few-pictures"])
    assert result.exit_code == 0, result.output
    report = json.loads((output / "evaluation.json").read_text())
    assert set(report["metrics"]) == {"psnr", "psnr_pooled", "ssim", "lpips_squeeze", "FD-tiny-dino"}
    assert report["model_digest"].startswith("sha256:") and report["environment"]["torch"] == torch.__version__
    assert report["pictures"]["crop"].startswith("center") and report["warnings"]
    for digest in report["lpips"].values():
        assert digest.startswith("sha256:")
    (index,) = yaml.safe_load((output / "model-index.md").read_text().strip("-\n "))["model-index"]
    assert {result["dataset"]["type"] for result in index["results"]} == {"pictures"}  # and no path
    values = {metric["type"]: metric["value"] for metric in index["results"][0]["metrics"]}
    assert values == {name: round(value, 4) for name, value in report["metrics"].items()}
    assert "perplexity" in result.output
    assert not (output / "parts").exists()


def test_the_arithmetic_is_that_of_torchmetrics(folder, tmp_path):
    dataset, extractor = load_pictures(str(folder)), from_module(ColorFeatures())
    model = tiny_tokenizer()
    result = evaluate_reconstruction(model, dataset, 32, tmp_path / "parts", OPTIONS, extractor=extractor)
    metric = FrechetInceptionDistance(feature=ColorFeatures()).set_dtype(torch.float64)
    for pixels in pixels_of(dataset):
        samples = model.decode(model.encode(pixels).latent).sample.detach()
        for values, real in ((pixels, True), (samples, False)):
            metric.update(((values * 0.5 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8), real=real)
    assert result["metrics"]["FD-ColorFeatures"] == pytest.approx(metric.compute().item(), rel=1e-4)
