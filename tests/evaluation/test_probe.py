"""`dinotok evaluate probe` reads classes from the parts of latents."""

import json

import pytest
import torch
from typer.testing import CliRunner

from dinotok.cli import app
from dinotok.data import load_pictures
from dinotok.evaluation.probe import evaluate_probe, pooled_latents
from tests.tiny_tokenizers import save_picture, tiny_discrete_tokenizer, tiny_region_tokenizer


@pytest.fixture
def folders(tmp_path):
    for part, count in (("train", 6), ("validation", 3)):
        for label in range(2):
            for index in range(count):  # a picture of one class always looks the same
                save_picture(tmp_path / "data" / part / f"class{label}" / f"{index}.png", 40, 36, seed=label)
    return tmp_path / "data"


def test_parts_of_latents_are_channels_pooled_over_positions():
    model, images = tiny_discrete_tokenizer(), torch.randint(0, 256, (2, 3, 32, 48)).byte()
    pooled = pooled_latents(model, images)
    assert {name: tuple(rows.shape) for name, rows in pooled.items()} == {
        "both": (2, 40),
        "deep": (2, 32),
        "texture": (2, 8),
        "quantized": (2, 40),
    }
    torch.testing.assert_close(torch.cat([pooled["deep"], pooled["texture"]], 1), pooled["both"])
    assert not torch.equal(pooled["quantized"], pooled["both"])
    assert set(pooled_latents(tiny_region_tokenizer(), torch.zeros(1, 3, 64, 64).byte())) == {"both", "quantized"}


def test_classes_that_look_different_are_found_by_the_command(folders, tmp_path):
    tiny_discrete_tokenizer().save_pretrained(tmp_path / "model")
    call = ["evaluate", "probe", "--model", tmp_path / "model", "--dataset", folders, "--validation-dataset", folders]
    call += ["--output", tmp_path / "out", "--resolution", 32, "--epochs", 5]
    result = CliRunner().invoke(app, list(map(str, call)))
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    parts = ("both", "deep", "texture", "quantized")
    assert set(report["metrics"]) == {f"{probe}_{part}" for probe in ("knn", "linear") for part in parts}
    assert report["metrics"]["linear_both"] == report["metrics"]["linear_deep"] == 1
    assert report["pictures"]["train"]["count"] == 12 and report["pictures"]["validation"]["count"] == 6
    assert not (tmp_path / "out" / "parts").exists()


def test_pictures_without_labels_are_refused(tmp_path):
    save_picture(tmp_path / "plain" / "a.png", 40, 36)
    dataset = load_pictures(str(tmp_path / "plain"))
    with pytest.raises(ValueError, match="no column 'label'"):
        evaluate_probe(tiny_discrete_tokenizer(), dataset, dataset, 32, tmp_path / "parts")
