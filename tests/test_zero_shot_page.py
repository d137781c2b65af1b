"""What docs/zero_shot_suite.md says can be typed, works: its commands and its snippet, at a small size."""

import json
import re
import shlex

import pytest
import torch
from typer.testing import CliRunner

from dinotok.cli import app
from dinotok.data import PictureTransform, load_pictures, to_pixels
from dinotok.evaluation.passes import PassOptions
from dinotok.evaluation.reconstruction import evaluate_reconstruction
from dinotok.metrics import ReconstructionMetrics
from tests.test_readme import blocks, run_snippet
from tests.tiny_tokenizers import save_picture, tiny_discrete_tokenizer, tiny_region_tokenizer, tiny_tokenizer

PAGE = "docs/zero_shot_suite.md"
SMALL = (144, 256)  # 16:9, as 1440 x 2560


def commands() -> list[list[str]]:
    return [shlex.split(line)[1:] for line in "".join(blocks(PAGE, "bash")).splitlines()]


def test_the_commands_evaluate_folders_of_pictures_of_any_shape(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert len(commands()) == 5
    for command in commands():
        folder = tmp_path / command[command.index("--dataset") + 1]
        for index, (width, height) in enumerate([(170, 96), (90, 120)]):
            save_picture(folder / f"{index}.png", width, height, seed=index)
        command[command.index("512")] = "64"
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 0, result.output
        report = json.loads((tmp_path / command[command.index("--output") + 1] / "evaluation.json").read_text())
        assert report["pictures"]["count"] == 2 and report["pictures"]["resolution"] == 64
        assert {"psnr", "psnr_pooled", "ssim"} <= set(report["metrics"])


def test_the_snippet_evaluates_pictures_of_sixteen_to_nine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("davis", "uhdbench"):
        for index, (width, height) in enumerate([(320, 180), (288, 200)]):
            save_picture(tmp_path / "zero-shot" / name / f"{index}.png", width, height, seed=index)
    (snippet,) = blocks(PAGE, "python")
    assert "resolution=(1440, 2560)" in snippet and "tile_size=512" in snippet
    names: dict = {}
    run_snippet(snippet.replace("(1440, 2560)", str(SMALL)).replace("tile_size=512", "tile_size=128"), names)
    assert names["model"].use_tiling and names["result"]["pictures"]["count"] == 2
    assert names["result"]["metrics"]["psnr"] > 15


@torch.no_grad()
@pytest.mark.parametrize("build", [tiny_tokenizer, tiny_discrete_tokenizer])
@pytest.mark.parametrize("tiling", [False, True])
def test_metrics_of_wide_pictures_are_those_of_each_measured_alone(tmp_path, build, tiling):
    model = build()
    if tiling:
        model.enable_tiling(96)
    paths = [save_picture(tmp_path / "a" / f"{i}.png", 300 + 20 * i, 170, seed=i) for i in range(3)]
    transform, metrics = PictureTransform(SMALL, crop="center"), ReconstructionMetrics()
    rows = []
    for path in paths:
        pixels = to_pixels(transform(path.read_bytes(), torch.Generator()))[None]
        assert pixels.shape == (1, 3, *SMALL)
        rows += metrics.update(model(pixels).sample, pixels)
    result = evaluate_reconstruction(
        model, load_pictures(str(tmp_path / "a")), SMALL, tmp_path / "parts", PassOptions(batch_size=2)
    )
    for name in ("psnr", "ssim"):
        assert result["metrics"][name] == pytest.approx(sum(row[name] for row in rows) / 3, rel=1e-4)
    assert tuple(result["pictures"]["resolution"]) == SMALL


def test_regions_refuse_another_size_by_name(tmp_path):
    save_picture(tmp_path / "a" / "0.png", 300, 170)
    with pytest.raises(ValueError, match="144x256: this VQModelVFMTok takes pictures of 64x64"):
        evaluate_reconstruction(tiny_region_tokenizer(), load_pictures(str(tmp_path / "a")), SMALL, tmp_path / "p")


def test_the_sizes_of_the_suite_are_whole_patches():
    sizes = re.findall(r"\| (\d+) x (\d+) \|", "\n".join(blocks_of_table()))
    assert len(sizes) == 7 and all(int(side) % 16 == 0 for size in sizes for side in size)


def blocks_of_table() -> list[str]:
    from tests.test_readme import ROOT

    return [line for line in (ROOT / PAGE).read_text("utf-8").splitlines() if line.startswith("| ")]
