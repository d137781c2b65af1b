import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from typer.testing import CliRunner

from dinotok import AutoencoderDINOTok
from dinotok.cli import app
from dinotok.hub import folder_digest, load_tokenizer
from dinotok.image_processor import ImageProcessor
from dinotok.metrics import psnr
from dinotok.token_files import open_token_shard, read_tokens
from tests.conftest import TINY_DECODER, save_tiny_encoder
from tests.tiny_tokenizers import save_picture, tiny_discrete_tokenizer, tiny_tokenizer

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


@pytest.fixture(scope="module")
def discrete_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "discrete"
    tiny_discrete_tokenizer().save_pretrained(folder)
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


def test_all_commands_take_the_encoder_of_a_model_saved_without(photos, tmp_path):
    encoder = save_tiny_encoder(tmp_path / "encoder", seed=5)
    tokenizer = AutoencoderDINOTok.from_encoder(str(encoder), texture_channels=8, **TINY_DECODER)
    tokenizer.fit([torch.rand(2, 3, 96, 96) * 2 - 1]).save_pretrained(tmp_path / "slim", include_encoder=False)
    model = ("--model", tmp_path / "slim")
    result = run("reconstruct", photos, *model, "--output", tmp_path / "none", status=2)
    assert "saved without its encoder" in result.stderr
    slim = (*model, "--encoder", encoder)
    run("reconstruct", photos, *slim, "--output", tmp_path / "direct")
    run("encode", photos, *slim, "--output", tmp_path / "latents")
    run("decode", tmp_path / "latents", "--encoder", encoder, "--output", tmp_path / "decoded")
    assert_same_pictures(tmp_path / "direct", tmp_path / "decoded")


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
    assert "error: None of 1 files of tokens or latents could be used." in result.stderr


def test_latents_of_two_models_are_decoded_one_by_one(photos, latents, other_model, tmp_path):
    run("encode", photos / "L.png", "--model", other_model, "--output", tmp_path / "more")
    result = run("decode", latents, tmp_path / "more", "--output", tmp_path / "decoded", status=2)
    assert "made by 2 models" in result.stderr


def test_pictures_of_two_runs_with_one_name_both_come_out(photos, model, latents, tmp_path):
    run("encode", photos / "sub" / "RGB.bmp", photos / "L.png", "--model", model, "--output", tmp_path / "more")
    run("decode", latents, tmp_path / "more", "--output", tmp_path / "decoded")
    names = files_in(tmp_path / "decoded")
    assert len(names) == 9 and {"L.png.png", "L.png-2.png", "sub/RGB.png"} <= set(names)


# Tokens


def tokens_in(folder: Path) -> dict[str, torch.Tensor]:
    return {p.name: p.values for path in sorted(folder.iterdir()) for p in read_tokens(open_token_shard(path))}


def test_tokens_are_the_models_indices_and_decode_to_its_reconstruction(photos, discrete_model, tmp_path):
    common = ("--recursive", "--batch-size", 1)
    run("reconstruct", photos, "--model", discrete_model, "--output", tmp_path / "out", *common)
    result = run("encode", photos, "--model", discrete_model, "--output", tmp_path / "tokens", *common)
    grids = ["1x1", "2x3", "3x3", "4x1"]
    assert files_in(tmp_path / "tokens") == [f"tokens-{grid}-00000.parquet" for grid in grids]
    assert "tokens-3x3-00000.parquet: tokens of 6 pictures" in result.stdout
    tokens = tokens_in(tmp_path / "tokens")
    model, processor = load_tokenizer(str(discrete_model)), ImageProcessor(16)
    assert len(tokens) == 9
    for name, indices in tokens.items():
        assert torch.equal(indices, model.encode_to_indices(processor.preprocess(photos / name))[0])
    run("decode", tmp_path / "tokens", "--output", tmp_path / "decoded", "--batch-size", 1)
    for name in files_in(tmp_path / "decoded"):
        np.testing.assert_array_equal(read(tmp_path / "decoded" / name), read(tmp_path / "out" / name))
    assert len(files_in(tmp_path / "decoded")) == 9


def test_tokens_of_decoded_pictures_are_those_of_the_reconstruction_not_of_the_original(discrete_model, tmp_path):
    for index in range(5):
        save_picture(tmp_path / "in" / f"{index}.png", 64, 48, seed=index)
    model = ("--model", discrete_model, "--batch-size", 2)
    run("encode", tmp_path / "in", *model, "--output", tmp_path / "first")
    run("decode", tmp_path / "first", "--output", tmp_path / "decoded", "--batch-size", 2)
    run("reconstruct", tmp_path / "in", *model, "--output", tmp_path / "out", "--sheet", 0)
    for name in files_in(tmp_path / "decoded"):  # batches are the same here, so pixels are, too
        np.testing.assert_array_equal(read(tmp_path / "decoded" / name), read(tmp_path / "out" / name))
    run("encode", tmp_path / "decoded", *model, "--output", tmp_path / "second")
    first, second = tokens_in(tmp_path / "first"), tokens_in(tmp_path / "second")
    same = torch.stack([first[name] == second[name] for name in first]).float().mean((0, 2, 3))
    assert list(first) == list(second) and same.min() < 1
    shards = (tmp_path / name / "tokens-3x4-00000.parquet" for name in ("first", "second"))
    assert len({open_token_shard(path).origin.digest for path in shards}) == 1


def test_a_discrete_model_writes_latents_on_request(photos, discrete_model, tmp_path):
    arguments = ("encode", photos / "RGB.jpg", "--model", discrete_model)
    run(*arguments, "--latents", "--output", tmp_path / "latents")
    assert files_in(tmp_path / "latents") == ["latents-00000.safetensors"]
    run("decode", tmp_path / "latents", "--output", tmp_path / "decoded")
    model, processor = load_tokenizer(str(discrete_model)), ImageProcessor(16)
    with torch.no_grad():
        latents = model.encode(processor.preprocess(photos / "RGB.jpg")).latent
        (expected,) = processor.postprocess(model.decode(latents).sample)
    np.testing.assert_allclose(read(tmp_path / "decoded" / "RGB.png"), np.asarray(expected).astype(int), atol=1)
    result = run(*arguments, "--tokens", "--output", tmp_path / "latents", status=2)
    assert "has 1 shards already" in result.stderr  # nor tokens among latents


def test_a_continuous_model_has_no_tokens(photos, model, tmp_path):
    arguments = ("--model", model, "--output", tmp_path / "out")
    assert "AutoencoderDINOTok has no codebooks" in run("encode", photos, *arguments, "--tokens", status=2).stderr
    assert "AutoencoderDINOTok has no codebooks" in run("codebook", photos, *arguments, status=2).stderr
    assert not (tmp_path / "out").exists()


def test_tokens_and_latents_of_a_model_are_decoded_together(photos, discrete_model, tmp_path):
    arguments = ("encode", photos / "L.png", photos / "P.png", "--model", discrete_model)
    run(*arguments, "--output", tmp_path / "shards" / "a")
    run(*arguments, "--output", tmp_path / "shards" / "b", "--latents")
    run("decode", tmp_path / "shards", "--recursive", "--output", tmp_path / "decoded")
    assert files_in(tmp_path / "decoded") == ["L.png-2.png", "L.png.png", "P.png-2.png", "P.png.png"]


def test_tokens_of_another_model_are_refused_and_both_revisions_named(photos, model, discrete_model, tmp_path):
    run("encode", photos, "--model", discrete_model, "--output", tmp_path / "tokens")
    revised = shutil.copytree(discrete_model, tmp_path / "revised")
    tiny_discrete_tokenizer(semantic_codebook_size=20).save_pretrained(revised)
    decode = ("decode", tmp_path / "tokens", "--output", tmp_path / "decoded", "--model")
    for other in (revised, model):
        result = run(*decode, other, status=2)
        assert result.stderr.startswith("error: The tokens were made by") and result.stderr.count("\n") == 1
        for text in (str(discrete_model), folder_digest(discrete_model), str(other), folder_digest(other)):
            assert text in result.stderr
        # Allowing it does not help where the codebooks differ.
        result = run(*decode, other, "--allow-revision-mismatch", status=2)
        assert "{'semantic': 16, 'texture': 16} codes, the model has {" in result.stderr
    tiny_discrete_tokenizer(seed=1).save_pretrained(revised)
    run(*decode, revised, "--allow-revision-mismatch")
    assert len(files_in(tmp_path / "decoded")) == 7


def test_damaged_and_foreign_tokens_are_skipped_and_the_others_decoded(photos, discrete_model, tmp_path):
    tokens = tmp_path / "tokens"
    run("encode", photos, "--model", discrete_model, "--output", tokens, "--shard-size", 3)
    middle = tokens / "tokens-3x3-00001.parquet"
    middle.write_bytes(middle.read_bytes()[:-10])
    pq.write_table(pa.table({"image": [b"x"]}), tokens / "other.parquet")
    result = run("decode", tokens, "--output", tmp_path / "decoded", status=1)
    assert "skipped tokens-3x3-00001.parquet: " in result.stderr and "truncated" in result.stderr
    assert "skipped other.parquet: " in result.stderr and "without tokens" in result.stderr
    assert len(files_in(tmp_path / "decoded")) == 4


def test_the_use_of_codebooks_is_counted_over_the_whole_run(photos, discrete_model, tmp_path):
    arguments = ("--model", discrete_model, "--output", tmp_path / "out", "--recursive")
    (photos / "Corrupt.png").write_text("no picture")
    result = run("reconstruct", photos, *arguments, "--batch-size", 2, status=1)
    report = json.loads((tmp_path / "out" / "metrics.json").read_text())
    model, processor = load_tokenizer(str(discrete_model)), ImageProcessor(16)
    names = [row["file"] for row in report["pictures"]]
    indices = [model.encode_to_indices(processor.preprocess(photos / name))[0] for name in names]
    for index, name in enumerate(("semantic", "texture")):
        counts = torch.bincount(torch.cat([grid[index].flatten() for grid in indices]), minlength=16).double()
        p = counts[counts > 0] / counts.sum()
        found = report["codebooks"][name]
        assert found["num_tokens"] == counts.sum() and found["codebook_size"] == 16
        assert found["usage"] == (counts > 0).double().mean() and found["num_dead"] == (counts == 0).sum()
        assert found["perplexity"] == pytest.approx(float((-(p * p.log()).sum()).exp()))
        assert name in result.stdout and f"{found['perplexity']:.1f}" in result.stdout


def test_codebooks_are_drawn(photos, discrete_model, tmp_path):
    output = ("--output", tmp_path / "out")
    result = run("codebook", photos, "--model", discrete_model, *output, "--codes", 3, "--patches", 2)
    pictures = ["semantic-codes.png", "semantic-usage.png", "texture-codes.png", "texture-usage.png"]
    assert files_in(tmp_path / "out") == ["codebooks.json", *pictures]
    report = json.loads((tmp_path / "out" / "codebooks.json").read_text())
    assert report["model_revision"] == folder_digest(discrete_model) and report["num_pictures"] == 7
    codes = report["codebooks"]["semantic"]["codes"]
    assert len(codes) <= 3 and all(len(code["patches"]) <= 2 for code in codes)
    assert "semantic-codes.png" in result.stdout and "perplexity" in result.stdout


def test_a_parquet_file_of_pictures_is_a_folder_of_them(photos, discrete_model, tmp_path):
    names = ["L.png", "RGB.jpg", "sub/tiny.png"]
    cells = [{"bytes": (photos / name).read_bytes(), "path": name} for name in names]
    (tmp_path / "set").mkdir()
    pq.write_table(pa.table({"photo": pa.array(cells)}), tmp_path / "set" / "train.parquet", row_group_size=2)
    model = ("--model", discrete_model, "--batch-size", 1)
    result = run("encode", tmp_path / "set", *model, "--output", tmp_path / "none", status=2)
    assert "skipped train.parquet: " in result.stderr and "pass --image-column" in result.stderr
    column = ("--image-column", "photo")
    run("reconstruct", tmp_path / "set", *model, *column, "--output", tmp_path / "out")
    run("encode", tmp_path / "set", *model, *column, "--output", tmp_path / "tokens")
    run("decode", tmp_path / "tokens", "--output", tmp_path / "decoded", "--batch-size", 1)
    assert_same_pictures(tmp_path / "out", tmp_path / "decoded")
    run("reconstruct", *(photos / name for name in names), *model, "--output", tmp_path / "files", "--sheet", 0)
    assert_same_pictures(tmp_path / "out", tmp_path / "files")
    run("codebook", tmp_path / "set", *model, *column, "--output", tmp_path / "codebooks")


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
    assert result.stderr.startswith("error: No .safetensors, .parquet files in")


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
    assert all(command in help_text for command in ("quickstart", "reconstruct", "encode", "decode", "codebook"))
    assert run("--version").stdout.startswith("dinotok 0.")
