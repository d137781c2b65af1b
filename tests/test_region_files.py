"""Commands and files with a tokenizer of one resolution: pictures are resized, its grid is not one of patches."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from dinotok.cli import app
from dinotok.image_processor import ImageProcessor
from dinotok.token_files import open_token_shard, read_tokens
from tests.tiny_tokenizers import save_picture, tiny_region_tokenizer, tiny_tokenizer


def run(*arguments) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture
def folder(tmp_path):
    """Pictures of several shapes, one of them of the model's size, and the model."""
    for name, size in (("wide.png", (130, 70)), ("high.png", (40, 90)), ("same.png", (64, 64))):
        save_picture(tmp_path / "pictures" / name, *size)
    tiny_region_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path


def pictures_of(folder) -> dict[str, np.ndarray]:
    return {path.name: np.asarray(Image.open(path)) for path in folder.glob("*.png") if path.name != "sheet.png"}


def test_tokens_to_file_and_back_give_what_reconstruct_gives(folder):
    options = ("--model", folder / "model", "--batch-size", 1)
    run("reconstruct", folder / "pictures", "--output", folder / "direct", *options)
    run("encode", folder / "pictures", "--output", folder / "tokens", *options)
    (path,) = (folder / "tokens").glob("*.parquet")
    assert path.name == "tokens-3x5-00000.parquet"
    shard = open_token_shard(path)
    assert shard.shape == (1, 3, 5) and shard.codebook_sizes == {"region": 16}
    assert shard.origin.image_size == 64 and set(shard.sizes.values()) == {(64, 64)}
    assert all(int(picture.values.max()) < 16 for picture in read_tokens(shard))
    run("decode", folder / "tokens", "--output", folder / "decoded", "--batch-size", 1)
    run("encode", folder / "pictures", "--output", folder / "latents", "--latents", *options)
    run("decode", folder / "latents", "--output", folder / "continuous")
    direct, decoded = pictures_of(folder / "direct"), pictures_of(folder / "decoded")
    assert direct.keys() == decoded.keys() == pictures_of(folder / "continuous").keys() and len(direct) == 3
    for name, picture in direct.items():
        assert picture.shape == (64, 64, 3)
        np.testing.assert_array_equal(picture, decoded[name])
    report = json.loads((folder / "direct" / "metrics.json").read_text())
    assert report["codebooks"]["region"]["num_tokens"] == 45


def test_the_codebook_shows_the_cells_its_tokens_look_from(folder):
    run("codebook", folder / "pictures", "--model", folder / "model", "--output", folder / "codes")
    report = json.loads((folder / "codes" / "codebooks.json").read_text())
    places = [place for code in report["codebooks"]["region"]["codes"] for place in code["patches"]]
    assert places and all(place["row"] < 3 and place["column"] < 5 for place in places)
    assert (folder / "codes" / "region-codes.png").is_file()


def test_tiling_is_refused(folder):
    arguments = ["reconstruct", folder / "pictures", "--model", folder / "model", "--output", folder / "x", "--tiling"]
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 2 and "there is no tiling" in result.output


def test_the_processor_resizes_the_shorter_side_and_cuts_the_middle():
    processor = ImageProcessor.from_model(tiny_region_tokenizer())
    assert processor.config.image_size == 64
    array = np.zeros((128, 192, 3), np.uint8)
    array[:, 32:160] = 255  # the middle square
    pixels = processor.preprocess(array)
    assert pixels.shape == (1, 3, 64, 64) and processor.sizes == [(64, 64)]
    assert pixels[..., 2:-2].min() > 0.99 and pixels.min() >= -1
    same = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    np.testing.assert_array_equal(np.asarray(processor.postprocess(processor.preprocess(same))[0]), same)
    assert processor.preprocess(np.zeros((1, 3), np.uint8)).shape == (1, 3, 64, 64)
    with pytest.raises(ValueError, match="image_size=60 is not a positive multiple of patch_size=16"):
        ImageProcessor(16, 60)


def test_the_grid_of_latents_is_the_model_s_to_say():
    assert tiny_region_tokenizer().latent_grid(64, 64) == (3, 5)
    model = tiny_tokenizer()
    assert model.latent_grid(32, 48) == (2, 3) == tuple(model.encode(torch.zeros(1, 3, 32, 48)).latent.shape[2:])
    with pytest.raises(ValueError, match="32x50 is not a multiple of patch_size=16"):
        model.latent_grid(32, 50)
