"""`dinotok evaluate generation`: distances of sets, sample packs, and the command."""

import json
import math

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from dinotok.cli import app
from dinotok.data import load_pictures
from dinotok.evaluation.distances import inception_score, kernel_distance, precision_recall
from dinotok.evaluation.extractors import from_module
from dinotok.evaluation.generation import draw_sample_pack, evaluate_generation, generated_batches
from dinotok.evaluation.passes import PassOptions, remove_parts
from dinotok.evaluation.reference import make_statistics
from dinotok.evaluation.sample_packs import SamplePack, write_sample_pack
from tests.conftest import save_tiny_encoder
from tests.evaluation.test_statistics import ColorFeatures, features, torchrun
from tests.tiny_pipelines import tiny_dit_pipeline
from tests.tiny_tokenizers import save_picture


class Everything(ColorFeatures):
    """Spatial features and logits too."""

    def forward(self, images):
        values = images.float() / 255
        return {
            "features": super().forward(images),
            "spatial_features": values[:, 0, 3:5, 3:5].flatten(1),
            "logits": values[:, :, 3, 3] * 4,
        }


def images(count: int, seed: int, height: int = 24, width: int = 24) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, height, width), generator=torch.Generator().manual_seed(seed)).byte()


@pytest.fixture
def folder(tmp_path):
    for index in range(9):
        save_picture(tmp_path / "pictures" / f"{index}.png", 24, 24, seed=index)
    return tmp_path / "pictures"


def test_kid_of_whole_sets_is_the_unbiased_squared_discrepancy():
    real, fake = features(30, 1), features(30, 2)
    kernel = [((a.double() @ b.double().T) / 12 + 1) ** 3 for a, b in ((real, real), (fake, fake), (real, fake))]
    within = [(k.sum() - k.trace()) / (30 * 29) for k in kernel[:2]]
    mean, deviation = kernel_distance(real, fake)
    assert mean == pytest.approx(float(within[0] + within[1] - 2 * kernel[2].mean()), rel=1e-6)
    assert deviation == pytest.approx(0, abs=1e-9 * mean)
    assert kernel_distance(real, fake) == kernel_distance(real, fake)
    with pytest.raises(ValueError, match="at least 2 pictures"):
        kernel_distance(real[:1], fake)


def test_precision_and_recall_agree_with_the_definition():
    real, fake = features(30, 1, 2), features(25, 1, 2) + 0.5

    def covered(rows, by):
        inside = 0
        for row in rows:
            radii = [sorted(math.dist(a, b) for b in by.tolist())[3] for a in by.tolist()]
            inside += any(math.dist(row.tolist(), a) <= r + 1e-6 for a, r in zip(by.tolist(), radii, strict=True))
        return inside / len(rows)

    assert precision_recall(real, fake) == pytest.approx((covered(fake, real), covered(real, fake)))
    assert precision_recall(real, real) == (1, 1)
    assert precision_recall(real, real + 1e4) == (0, 0)
    one = torch.ones(8, 4) / 3
    assert precision_recall(one, one) == (1, 1)  # duplicates have a radius of zero
    with pytest.raises(ValueError, match="3 and 30 pictures have no 3 neighbours"):
        precision_recall(real[:3], real)


def test_inception_score_is_one_for_equal_and_k_for_certain_and_balanced_answers():
    assert inception_score(torch.zeros(20, 5))[0] == pytest.approx(1)
    certain = torch.eye(5).repeat(8, 1) * 100
    assert inception_score(certain, splits=1) == pytest.approx((5, 0))
    with pytest.raises(ValueError, match="5 samples cannot be split into 10"):
        inception_score(torch.zeros(5, 5))


def test_packs_are_what_numpy_writes_and_reads(tmp_path):
    samples = images(7, 0, 6, 10)
    write_sample_pack(tmp_path / "ours.npz", samples.split(3), 7)
    with np.load(tmp_path / "ours.npz", allow_pickle=False) as file:
        assert file.files == ["arr_0"]
        np.testing.assert_array_equal(file["arr_0"], samples.permute(0, 2, 3, 1).numpy())
    for writer in (np.savez, np.savez_compressed):
        writer(tmp_path / "theirs.npz", samples.permute(0, 2, 3, 1).numpy())
        pack = SamplePack(tmp_path / "theirs.npz")
        assert (pack.count, pack.height, pack.width) == (7, 6, 10)
        assert torch.equal(torch.cat(list(pack.batches(2, 1, 6))), samples[1:6])


def test_packs_that_are_wrong_are_named(tmp_path):
    path = tmp_path / "pack.npz"
    for array, message in (
        (np.zeros((2, 4, 4, 3)), "float64"),
        (np.zeros((2, 3, 4, 4), np.uint8), r"\(2, 3, 4, 4\)"),
        (np.array([{}], dtype=object), "object"),
    ):
        np.savez(path, array)
        with pytest.raises(ValueError, match=message):
            SamplePack(path)
    np.savez(path, other=np.zeros(1))
    with pytest.raises(ValueError, match="no .npz file with arr_0"):
        SamplePack(path)
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="no .npz file"):
        SamplePack(path)
    path.unlink()
    with pytest.raises(ValueError, match="2 samples came where count=3"):
        write_sample_pack(path, [images(2, 0)], 3)
    with pytest.raises(ValueError, match="cannot be in one pack"):
        write_sample_pack(path, [images(2, 0), images(1, 0, 8)], 3)
    assert not list(tmp_path.iterdir())


def test_a_set_against_itself_is_perfect_and_every_metric_is_there(folder, tmp_path):
    dataset, extractor = load_pictures(str(folder)), from_module(Everything())
    statistics = make_statistics(dataset, extractor, 24, tmp_path / "reference", keep_features=True)
    result = evaluate_generation(dataset, extractor, statistics, tmp_path / "parts", PassOptions(2, shard_size=4))
    metrics = result["metrics"]
    assert metrics["FD-Everything"] == pytest.approx(0, abs=1e-6) and metrics["sFID"] == pytest.approx(0, abs=1e-6)
    assert metrics["precision"] == metrics["recall"] == 1 and metrics["inception_score"] >= 1
    assert result["pictures"]["pictures"] == statistics.recipe["pictures"]
    plain = from_module(ColorFeatures())
    statistics = make_statistics(dataset, plain, 24, tmp_path / "plain")
    result = evaluate_generation(dataset, plain, statistics, tmp_path / "plain-parts")
    assert set(result["metrics"]) == {"FD-ColorFeatures"}
    with pytest.raises(ValueError, match="another extractor"):
        evaluate_generation(dataset, extractor, statistics, tmp_path / "refused")


def test_samples_of_another_or_of_mixed_size_are_refused_and_few_are_too(folder, tmp_path):
    extractor = from_module(ColorFeatures())
    statistics = make_statistics(load_pictures(str(folder)), extractor, 24, tmp_path / "reference")
    write_sample_pack(tmp_path / "few.npz", [images(4, 0)], 4)
    with pytest.raises(ValueError, match="samples are 4 pictures"):
        evaluate_generation(SamplePack(tmp_path / "few.npz"), extractor, statistics, tmp_path / "few")
    write_sample_pack(tmp_path / "large.npz", [images(4, 0, 24, 32)], 4)
    with pytest.raises(ValueError, match="24x32, the statistics are of 24x24"):
        evaluate_generation(SamplePack(tmp_path / "large.npz"), extractor, statistics, tmp_path / "large")
    save_picture(folder / "mixed.png", 30, 24)
    with pytest.raises(ValueError, match="Sample 9 is 24x30"):
        evaluate_generation(load_pictures(str(folder)), extractor, statistics, tmp_path / "mixed")


def test_the_command_scores_packs_and_folders_alike(folder, tmp_path):
    encoder = f"encoder:{save_tiny_encoder(tmp_path / 'tiny-dino', seed=0)}"
    reference = str(tmp_path / "reference.safetensors")
    shared = ["--extractor", encoder, "--allow-few-pictures"]
    call = ["evaluate", "statistics", "--dataset", str(folder), "--output", reference, "--resolution", "24", *shared]
    assert CliRunner().invoke(app, [*call, "--keep-features"]).exit_code == 0
    arrays = [torch.from_numpy(np.array(row["image"])) for row in load_rows(folder)]
    samples = torch.stack(arrays).permute(0, 3, 1, 2)[:8]
    write_sample_pack(tmp_path / "samples.npz", [samples], 8)
    (folder / "8.png").unlink()
    reports = []
    for name, source in (("pack", ["--samples", tmp_path / "samples.npz"]), ("folder", ["--images", folder])):
        call = ["evaluate", "generation", *source, "--statistics", reference, "--output", tmp_path / name, *shared]
        result = CliRunner().invoke(app, list(map(str, call)))
        assert result.exit_code == 0, result.output
        reports.append(json.loads((tmp_path / name / "evaluation.json").read_text()))
    assert reports[0]["metrics"] == reports[1]["metrics"] and reports[0]["metrics"]["FD-tiny-dino"] > 0
    assert {"KID", "precision", "recall"} < set(reports[0]["metrics"])
    both = ["evaluate", "generation", "--statistics", reference, "--output", str(tmp_path), *shared]
    assert "exactly one of" in CliRunner().invoke(app, both).output


def load_rows(folder):
    from datasets import Image

    return load_pictures(str(folder)).cast_column("image", Image())


@pytest.fixture(scope="module")
def pipeline():
    pipeline = tiny_dit_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_killed_sampling_goes_on_and_gives_the_same_samples(pipeline, tmp_path):
    options, arguments = PassOptions(2, shard_size=4), {"num_inference_steps": 1, "seed": 7}

    def draw(name, **others):
        call = arguments | others
        return draw_sample_pack(pipeline, tmp_path / f"{name}.npz", 9, tmp_path / name, options, **call)

    straight = draw("straight")
    (whole,) = generated_batches(pipeline, 9, 9, **arguments)
    found = torch.cat(list(straight.batches(4)))
    assert (found.int() - whole.int()).abs().max() <= 1
    calls = []

    def interrupt(*_):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt

    hook = pipeline.transformer.register_forward_hook(interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            draw("killed")
        resumed = draw("killed")
        assert len(calls) == 4 + 3  # two batches of the first shard are not drawn again, of five
        assert resumed.path.read_bytes() == straight.path.read_bytes()
        draw("killed")
    finally:
        hook.remove()
    assert len(calls) == 4 + 3
    with pytest.raises(ValueError, match="another evaluation, with another seed"):
        draw("killed", seed=8)
    remove_parts(tmp_path / "killed")
    with pytest.raises(ValueError, match="already"):
        draw("killed")


def test_the_command_draws_samples_of_a_pipeline_and_keeps_them_when_it_fails(pipeline, folder, tmp_path):
    pipeline.save_pretrained(tmp_path / "pipeline")
    encoder = f"encoder:{save_tiny_encoder(tmp_path / 'tiny-dino', seed=0)}"
    reference = str(tmp_path / "reference.safetensors")
    shared = ["--extractor", encoder]
    call = ["evaluate", "statistics", "--dataset", str(folder), "--output", reference, "--resolution", "32", *shared]
    assert CliRunner().invoke(app, [*call, "--allow-few-pictures"]).exit_code == 0
    call = ["evaluate", "generation", "--model", tmp_path / "pipeline", "--num-images", 5, "--num-inference-steps", 2]
    call += ["--batch-size", 2, "--seed", 7, "--statistics", reference, "--output", tmp_path / "out", *shared]
    call = list(map(str, call))
    refused = CliRunner().invoke(app, call)
    assert refused.exit_code == 2 and "samples are 5 pictures" in refused.output
    drawn = (tmp_path / "out" / "samples.npz").stat().st_mtime_ns
    result = CliRunner().invoke(app, [*call, "--allow-few-pictures"])
    assert result.exit_code == 0, f"{result.output}{result.exception}"
    assert (tmp_path / "out" / "samples.npz").stat().st_mtime_ns == drawn
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"evaluation.json", "model-index.md", "samples.npz"}
    report = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert report["sampling"] == {"seed": 7, "num_images": 5, "guidance_scale": 1.0, "num_inference_steps": 2}
    assert report["model_digest"].startswith("sha256:") and report["class_name"] == "DINOTokDiTPipeline"
    assert SamplePack(tmp_path / "out" / "samples.npz").count == 5
    assert "already" in CliRunner().invoke(app, call).output


@pytest.mark.slow
def test_two_processes_draw_the_samples_of_one(pipeline, folder, tmp_path):
    pipeline.save_pretrained(tmp_path / "pipeline")
    encoder = f"encoder:{save_tiny_encoder(tmp_path / 'tiny-dino', seed=0)}"
    reference = tmp_path / "reference.safetensors"
    shared = ["--extractor", encoder, "--allow-few-pictures"]
    torchrun(1, "statistics", "--dataset", folder, "--output", reference, "--resolution", 32, *shared)
    for processes in (1, 2):
        call = ["generation", "--model", tmp_path / "pipeline", "--num-images", 5, "--num-inference-steps", 2]
        call += [
            "--batch-size",
            2,
            "--shard-size",
            2,
            "--statistics",
            reference,
            "--output",
            tmp_path / f"{processes}",
        ]
        torchrun(processes, *call, *shared)
    one, two = ((tmp_path / f"{processes}") for processes in (1, 2))
    assert (one / "samples.npz").read_bytes() == (two / "samples.npz").read_bytes()
    one, two = (json.loads((output / "evaluation.json").read_text()) for output in (one, two))
    assert one["metrics"] == two["metrics"] and two["processes"] == 2


# Hostile inputs


def test_constant_and_duplicated_samples_have_finite_numbers(folder, tmp_path):
    dataset, extractor = load_pictures(str(folder)), from_module(Everything())
    statistics = make_statistics(dataset, extractor, 24, tmp_path / "reference", keep_features=True)
    write_sample_pack(tmp_path / "constant.npz", [torch.full((8, 3, 24, 24), 90, dtype=torch.uint8)], 8)
    write_sample_pack(tmp_path / "twice.npz", [images(4, 1), images(4, 1)], 8)
    results = {}
    for name, distinct in (("constant", 1), ("twice", 4)):
        pack = SamplePack(tmp_path / f"{name}.npz")
        result = evaluate_generation(pack, extractor, statistics, tmp_path / name, PassOptions(3))
        assert all(math.isfinite(value) for value in result["metrics"].values())
        assert result["pictures"]["pictures"]["distinct"] == distinct
        results[name] = result["metrics"]
    assert results["constant"]["inception_score"] == pytest.approx(1)
    gaussian = statistics.gaussians["features"]
    point = extractor(torch.full((1, 3, 24, 24), 90, dtype=torch.uint8))["features"][0].double()
    expected = (gaussian.mean - point).square().sum() + gaussian.covariance.trace()
    assert results["constant"]["FD-Everything"] == pytest.approx(float(expected), rel=1e-6)


def test_one_sample_and_what_is_no_picture_are_named(folder, tmp_path):
    extractor = from_module(ColorFeatures())
    statistics = make_statistics(load_pictures(str(folder)), extractor, 24, tmp_path / "reference")
    write_sample_pack(tmp_path / "one.npz", [images(1, 0)], 1)
    with pytest.raises(ValueError, match="at least 2 pictures, got 1"):
        evaluate_generation(
            SamplePack(tmp_path / "one.npz"), extractor, statistics, tmp_path / "one", allow_few_pictures=True
        )
    (folder / "notes.txt").write_text("not a picture")
    found = evaluate_generation(load_pictures(str(folder)), extractor, statistics, tmp_path / "with-notes")
    assert found["pictures"]["count"] == 9 and found["metrics"]["FD-ColorFeatures"] == pytest.approx(0, abs=1e-9)
    (folder / "damaged.png").write_bytes(b"not a picture")
    with pytest.raises(ValueError, match="damaged.png|could not be read"):
        evaluate_generation(load_pictures(str(folder)), extractor, statistics, tmp_path / "damaged")


def test_features_that_are_nan_and_samples_of_another_range_are_refused(folder, tmp_path):
    statistics = make_statistics(load_pictures(str(folder)), from_module(ColorFeatures()), 24, tmp_path / "reference")

    class NotANumber(ColorFeatures):
        def forward(self, images):
            return super().forward(images) * math.nan

    write_sample_pack(tmp_path / "samples.npz", [images(8, 0)], 8)
    with pytest.raises(ValueError, match="NaN"):
        evaluate_generation(
            SamplePack(tmp_path / "samples.npz"),
            from_module(NotANumber(), "ColorFeatures"),
            statistics,
            tmp_path / "nan",
        )
    for values in (images(2, 0) / 127.5 - 1, images(2, 0).int(), images(2, 0)[:, :1]):
        with pytest.raises(ValueError, match=r"expected uint8 \(B, 3, H, W\)"):
            write_sample_pack(tmp_path / "float.npz", [values], 2)
