"""`dinotok evaluate latents` shows latents in colours that mean the same in all pictures."""

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from dinotok.cli import app
from dinotok.evaluation.latents import draw_latents, latent_parts, shared_colors
from dinotok.folders import find_pictures
from dinotok.pictures import pca_colors
from tests.tiny_tokenizers import save_picture, tiny_discrete_tokenizer, tiny_region_tokenizer, tiny_tokenizer


def fail(name, error):
    raise AssertionError(f"{name}: {error}")


@pytest.fixture
def folder(tmp_path):
    for index, size in enumerate([(40, 33), (40, 33), (64, 96)]):
        save_picture(tmp_path / "pictures" / f"{index}.png", *size, seed=min(index, 1))
    return tmp_path / "pictures"


def test_grids_of_different_sizes_share_the_colors_of_all_positions_together():
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(5, *size, generator=generator) for size in ((2, 3), (4, 2)))
    colors = shared_colors([first, second, first])
    assert [part.shape for part in colors] == [(2, 3, 3), (4, 2, 3), (2, 3, 3)]
    np.testing.assert_array_equal(colors[0], colors[2])
    together = torch.cat([first.flatten(1), second.flatten(1), first.flatten(1)], 1)
    expected = pca_colors(together[:, None])[0]
    np.testing.assert_array_equal(np.concatenate([part.reshape(-1, 3) for part in colors]), expected)


def test_a_model_has_the_parts_that_its_channels_say():
    latents = torch.arange(40.0).view(1, 40, 1, 1)
    parts = latent_parts(tiny_tokenizer(), latents)
    assert {name: part.shape[1] for name, part in parts.items()} == {"deep": 32, "texture": 8}
    assert torch.equal(torch.cat(list(parts.values()), 1), latents)
    assert latent_parts(tiny_region_tokenizer(), torch.zeros(1, 32, 3, 5)) == {}


@pytest.mark.parametrize("build", [tiny_tokenizer, tiny_discrete_tokenizer, tiny_region_tokenizer])
def test_every_tokenizer_is_drawn_whatever_the_batch(folder, build):
    model, files = build(), find_pictures([folder], fail)
    sheets = [draw_latents(model, files, fail, batch_size) for batch_size in (1, 2)]
    assert [count for _, count in sheets] == [3, 3]
    arrays = [np.asarray(drawn).astype(int) for drawn, _ in sheets]
    columns = 3 if build is tiny_region_tokenizer else 4
    assert arrays[0].shape[1] >= columns * 192
    assert (abs(arrays[0] - arrays[1]) > 3).mean() < 1e-3


def test_the_command_writes_one_picture_and_names_what_it_left_out(folder, tmp_path):
    tiny_discrete_tokenizer().save_pretrained(tmp_path / "model")
    (folder / "damaged.png").write_bytes(b"nothing")
    call = ["evaluate", "latents", folder, "--model", tmp_path / "model", "--output", tmp_path / "out"]
    result = CliRunner().invoke(app, list(map(str, call)))
    assert result.exit_code == 1 and "skipped damaged.png" in result.output and "latents.png: 3" in result.output
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["latents.png"]
    with Image.open(tmp_path / "out" / "latents.png") as drawn:
        whole = drawn.size
    (folder / "damaged.png").unlink()
    few = CliRunner().invoke(app, [*map(str, call), "--pictures", "2"])
    with Image.open(tmp_path / "out" / "latents.png") as drawn:
        assert drawn.size[0] == whole[0] and drawn.size[1] < whole[1]
    assert few.exit_code == 0, few.output
    call[-1] = folder
    (folder / "latents.png").write_bytes((folder / "0.png").read_bytes())
    assert "would be overwritten" in CliRunner().invoke(app, list(map(str, call))).output
    (folder / "latents.png").unlink()
    for path in folder.glob("[0-9].png"):
        path.unlink()
    nothing = CliRunner().invoke(app, list(map(str, call)))
    assert nothing.exit_code == 2 and not (folder / "latents.png").exists()
