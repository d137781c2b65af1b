import numpy as np
import pytest
import torch
from PIL import Image

from dinotok.hub import load_tokenizer
from dinotok.quickstart import FIT_ON, HELD_OUT, build_tokenizer, print_quickstart, random_crops, run_quickstart


def test_quickstart_reconstructs_photographs_it_was_not_fitted_on(tmp_path, capsys):
    result = run_quickstart(tmp_path / "new" / "folder", num_crops=96)
    assert not set(FIT_ON) & set(HELD_OUT)
    assert [row["file"] for row in result.rows] == list(HELD_OUT)
    for row in result.rows:
        assert row["psnr"] > 24 and row["ssim"] > 0.7
        assert row["latents"] == (256, -(-row["height"] // 16), -(-row["width"] // 16))
    assert type(load_tokenizer(str(result.tokenizer))).__name__ == "AutoencoderDINOTok"
    for path in result.files:
        with Image.open(path) as image:
            assert min(image.size) > 400 and np.asarray(image).std() > 20

    print_quickstart(result)
    printed = capsys.readouterr().out
    for text in (*HELD_OUT, f"{result.rows[0]['psnr']:.2f}", "random weights", *map(str, result.files)):
        assert text in printed


def test_crops_are_seeded_and_as_many_as_asked_for():
    first, second = (list(random_crops(20, seed=1)) for _ in range(2))
    assert sum(map(len, first)) == 20
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(crop.shape[2] % 16 == 0 and crop.shape[2] == crop.shape[3] for crop in first)
    assert not torch.equal(first[0], next(random_crops(8, seed=2)))


@pytest.mark.parametrize("seed", [0, 3])
def test_the_tokenizer_is_seeded_and_leaves_the_global_generator_alone(seed):
    state = torch.get_rng_state()
    first, second = build_tokenizer(seed), build_tokenizer(seed)
    assert torch.equal(torch.get_rng_state(), state)
    assert first.encoder.digest() == second.encoder.digest() != build_tokenizer(seed + 1).encoder.digest()
