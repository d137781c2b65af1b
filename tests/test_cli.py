import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from typer.testing import CliRunner

from dinotok.cli import app
from dinotok.hub import folder_digest, load_tokenizer
from dinotok.image_processor import ImageProcessor
from dinotok.metrics import psnr
from tests.tiny_tokenizers import save_picture, tiny_tokenizer

MODES = ["RGB", "L", "RGBA", "P", "1", "LA"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tokenizer"
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def other_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "other"
    tiny_tokenizer(seed=1).save_pretrained(folder)
    return folder


@pytest.fixture
def photos(tmp_path):
    """Pictures of several sizes and modes, in two folders, two of them with one stem."""
    folder = tmp_path / "photos"
    for index, mode in enumerate(MODES):
        save_picture(folder / f"{mode}.png", 40 + index // 2, 33, mode, seed=index)
    save_picture(folder / "RGB.jpg", 48, 20)
    save_picture(folder / "sub" / "tiny.png", 7, 5)
    save_picture(folder / "sub" / "RGB.bmp", 16, 64)
    return folder


def run(*arguments, status=0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == status, result.output
    assert status == 0 or "Traceback" not in result.stderr
    return result


def files_in(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def read(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image).astype(int)


def assert_same_pictures(first: Path, second: Path) -> None:
    names = [name for name in files_in(first) if name.endswith(".png") and name != "sheet.png"]
    assert names and names == [name for name in files_in(second) if name.endswith(".png")]
    for name in names:
        np.testing.assert_allclose(read(first / name), read(second / name), atol=1)


# reconstruct


def test_reconstruct_mirrors_a_folder_and_measures_what_it_wrote(photos, model, tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    result = run("reconstruct", photos, "--model", model, "--output", output, "--recursive", "--batch-size", 2)
    plain = [f"{mode}.png" for mode in MODES if mode != "RGB"]
    pictures = [*plain, "RGB.png.png", "RGB.jpg.png", "sub/tiny.png", "sub/RGB.png"]
    assert files_in(output) == sorted([*pictures, "metrics.json", "sheet.png"])

    report = json.loads((output / "metrics.json").read_text())
    assert report["failures"] == [] and report["summary"]["num_images"] == 9
    assert report["model"] == str(model) and report["model_revision"] == folder_digest(model)
    assert report["settings"]["batch_size"] == 2 and report["settings"]["dtype"] == "float32"
    assert "ssim" in report["notes"]  # tiny.png
    processor = ImageProcessor(patch_size=1)
    for row in report["pictures"]:
        original, written = (processor.preprocess(path) for path in (photos / row["file"], output / row["output"]))
        assert (row["height"], row["width"]) == tuple(original.shape[2:]) == tuple(written.shape[2:])
        assert row["psnr"] == pytest.approx(psnr(written, original).item(), abs=1e-3)
    assert report["summary"]["psnr"] == pytest.approx(np.mean([row["psnr"] for row in report["pictures"]]))
    assert "RGB.jpg" in result.stdout and f"{report['summary']['psnr_pooled']:.2f}" in result.stdout


def test_reconstruct_is_the_models_own_forward(photos, model, tmp_path):
    run("reconstruct", photos / "LA.png", "--model", model, "--output", tmp_path / "out")
    tokenizer, processor = load_tokenizer(str(model)), ImageProcessor(16)
    with torch.no_grad():
        (expected,) = processor.postprocess(tokenizer(processor.preprocess(photos / "LA.png")).sample)
    np.testing.assert_allclose(read(tmp_path / "out" / "LA.png"), np.asarray(expected).astype(int), atol=1)


def test_a_corrupt_picture_is_skipped_and_reported(photos, model, tmp_path):
    content = (photos / "RGB.jpg").read_bytes()
    (photos / "half.jpg").write_bytes(content[: len(content) // 2])
    result = run("reconstruct", photos, "--model", model, "--output", tmp_path / "out", status=1)
    assert "skipped half.jpg: " in result.stderr and "1 skipped, 7 done" in result.stderr
    (failure,) = json.loads((tmp_path / "out" / "metrics.json").read_text())["failures"]
    assert failure["file"] == "half.jpg" and "not a readable image" in failure["reason"]
    assert not (tmp_path / "out" / "half.png").exists()


def test_when_nothing_works_the_status_is_2(tmp_path, model):
    (tmp_path / "text.dat").write_text("no picture")
    result = run("reconstruct", tmp_path / "text.dat", "--model", model, "--output", tmp_path / "out", status=2)
    assert "error: None of 1 pictures could be used." in result.stderr
    report = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert report["summary"] is None and len(report["failures"]) == 1


def test_the_table_and_the_sheet_leave_most_of_many_pictures_out(tmp_path, model):
    for index in range(23):
        save_picture(tmp_path / "in" / f"{index:02d}[red].png", 16, 16, seed=index)
    arguments = ("reconstruct", tmp_path / "in", "--model", model, "--output", tmp_path / "out")
    result = run(*arguments, "--sheet", 2)
    assert "19[red].png" in result.stdout and "20[red].png" not in result.stdout and "3 more" in result.stdout
    assert len(json.loads((tmp_path / "out" / "metrics.json").read_text())["pictures"]) == 23
    with Image.open(tmp_path / "out" / "sheet.png") as image:
        assert 400 < image.height < 600
    (tmp_path / "out" / "sheet.png").unlink()
    run(*arguments, "--sheet", 0)
    assert not (tmp_path / "out" / "sheet.png").exists()


def test_large_pictures_can_be_tiled(tmp_path, model):
    save_picture(tmp_path / "x.png", 100, 60)
    arguments = ("reconstruct", tmp_path / "x.png", "--model", model, "--output", tmp_path / "out")
    run(*arguments, "--tile-size", 32, "--tile-overlap", 16, "--dtype", "bfloat16")
    settings = json.loads((tmp_path / "out" / "metrics.json").read_text())["settings"]
    assert (settings["tile_size"], settings["tile_overlap"], settings["dtype"]) == (32, 16, "bfloat16")
    run(*arguments, "--tiling")
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["settings"]["tile_size"] == 512


# encode and decode


@pytest.mark.parametrize("corrupt", [False, True])
def test_encode_then_decode_is_reconstruct(photos, model, tmp_path, corrupt):
    status = 0
    if corrupt:
        (photos / "Corrupt.png").write_text("no picture")
        status = 1
    common = ("--recursive", "--batch-size", 2)
    run("reconstruct", photos, "--model", model, "--output", tmp_path / "out", *common, status=status)
    arguments = ("encode", photos, "--model", model, "--output", tmp_path / "latents", "--shard-size", 4)
    result = run(*arguments, *common, status=status)
    assert "latents-00002.safetensors: latents of 1 pictures" in result.stdout
    assert files_in(tmp_path / "latents") == [f"latents-0000{i}.safetensors" for i in range(3)]
    run("decode", tmp_path / "latents", "--output", tmp_path / "decoded", "--batch-size", 2)
    assert_same_pictures(tmp_path / "out", tmp_path / "decoded")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_latents_can_be_stored_in_half_the_space(photos, model, tmp_path, dtype):
    run("encode", photos / "RGB.jpg", "--model", model, "--output", tmp_path / "latents", "--latents-dtype", dtype)
    with safe_open(tmp_path / "latents" / "latents-00000.safetensors", framework="pt") as file:
        assert file.get_tensor("RGB.jpg").dtype == getattr(torch, dtype)
        assert file.get_tensor("RGB.jpg").shape == (40, 2, 3)
    run("decode", tmp_path / "latents", "--output", tmp_path / "decoded")
    run("reconstruct", photos / "RGB.jpg", "--model", model, "--output", tmp_path / "out")
    first, second = read(tmp_path / "decoded" / "RGB.png"), read(tmp_path / "out" / "RGB.png")
    assert first.shape == second.shape == (20, 48, 3) and np.abs(first - second).mean() < 3


@pytest.fixture
def latents(photos, model, tmp_path):
    run("encode", photos, "--model", model, "--output", tmp_path / "latents", "--shard-size", 3)
    return tmp_path / "latents"


def test_another_model_is_refused_and_both_revisions_are_named(latents, model, other_model, tmp_path):
    arguments = ("decode", latents, "--output", tmp_path / "decoded", "--model", other_model)
    result = run(*arguments, status=2)
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    for text in (str(model), folder_digest(model), str(other_model), folder_digest(other_model)):
        assert text in result.stderr
    assert not (tmp_path / "decoded").exists()
    run(*arguments, "--allow-revision-mismatch")
    assert len(files_in(tmp_path / "decoded")) == 7


def test_a_model_that_has_moved_is_found_with_model(photos, tmp_path, model):
    old = shutil.copytree(model, tmp_path / "old")
    run("encode", photos / "L.png", "--model", old, "--output", tmp_path / "latents")
    old.rename(tmp_path / "new")
    arguments = ("decode", tmp_path / "latents", "--output", tmp_path / "decoded")
    result = run(*arguments, status=2)
    assert str(old) in result.stderr and "pass --model" in result.stderr
    run(*arguments, "--model", tmp_path / "new")
    assert files_in(tmp_path / "decoded") == ["L.png"]


def test_damaged_and_foreign_shards_are_skipped_and_the_others_decoded(latents, tmp_path):
    middle = latents / "latents-00001.safetensors"
    middle.write_bytes(middle.read_bytes()[:-10])
    save_file({"weight": torch.zeros(2)}, latents / "weights.safetensors")
    result = run("decode", latents, "--output", tmp_path / "decoded", status=1)
    assert "skipped latents-00001.safetensors: " in result.stderr and "truncated" in result.stderr
    assert "skipped weights.safetensors: " in result.stderr and "without latents" in result.stderr
    assert len(files_in(tmp_path / "decoded")) == 4
    result = run("decode", middle, "--output", tmp_path / "decoded", status=2)
    assert "error: None of 1 files of latents could be used." in result.stderr


def test_latents_of_two_models_are_decoded_one_by_one(photos, latents, other_model, tmp_path):
    run("encode", photos / "L.png", "--model", other_model, "--output", tmp_path / "more")
    result = run("decode", latents, tmp_path / "more", "--output", tmp_path / "decoded", status=2)
    assert "made by 2 models" in result.stderr


def test_pictures_of_two_runs_with_one_name_both_come_out(photos, model, latents, tmp_path):
    run("encode", photos / "sub" / "RGB.bmp", photos / "L.png", "--model", model, "--output", tmp_path / "more")
    run("decode", latents, tmp_path / "more", "--output", tmp_path / "decoded")
    names = files_in(tmp_path / "decoded")
    assert len(names) == 9 and {"L.png.png", "L.png-2.png", "sub/RGB.png"} <= set(names)


# Errors of the user: one line on stderr, status 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "./nowhere"], "'./nowhere' is neither a folder nor"),
        (["--device", "toaster"], "device='toaster' cannot be used here"),
        (["--tile-size", "30"], "tile_size=30 is not a multiple of patch_size=16"),
        (["--tile-overlap", "512"], "tile_overlap=512 must be less than tile_size=512"),
        (["--revision", "main"], "revision='main' is for repositories"),
        (["missing.png"], "missing.png' does not exist"),
        (["--output", "{photos}"], "is an input and would be overwritten"),
        (["--output", "{photos}/L.png"], "L.png' is a file, not a folder"),
    ],
)
def test_mistakes_are_explained_in_one_line(photos, model, tmp_path, arguments, message):
    arguments = [argument.format(photos=photos) for argument in arguments]
    result = run("reconstruct", photos, "--model", model, "--output", tmp_path / "out", *arguments, status=2)
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert message in result.stderr
    assert result.stdout == "" and not (tmp_path / "out").exists()


def test_nothing_found_is_an_error(tmp_path, model):
    (tmp_path / "empty").mkdir()
    for command in ("reconstruct", "encode"):
        result = run(command, tmp_path / "empty", "--model", model, "--output", tmp_path / "out", status=2)
        assert result.stderr.startswith("error: No .avif") and str(tmp_path / "empty") in result.stderr
    result = run("decode", tmp_path / "empty", "--output", tmp_path / "out", status=2)
    assert result.stderr.startswith("error: No .safetensors files in")


def test_shards_are_not_written_among_others(photos, model, latents):
    result = run("encode", photos, "--model", model, "--output", latents, status=2)
    assert "has 3 shards already" in result.stderr


def test_values_of_options_are_checked():
    result = run("encode", "x", "--model", "m", "--output", "o", "--dtype", "float8", status=2)
    assert "float8" in result.stderr and "bfloat16" in result.stderr


def test_help_and_version_are_quick():
    code = "import sys, dinotok.cli; print(sorted({'torch', 'diffusers', 'transformers', 'PIL'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
    help_text = run("--help").stdout
    assert all(command in help_text for command in ("quickstart", "reconstruct", "encode", "decode"))
    assert run("--version").stdout.startswith("dinotok 0.")
