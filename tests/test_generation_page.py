"""What docs/generation.md says can be typed, works; with small random pipelines in place of those of the package."""

import shutil

import pytest
import torch
from PIL import Image

from dinotok import bundled
from dinotok.bundled import bundled_folder
from dinotok.generation import BUNDLED_TOKENIZER
from dinotok.hub import load_tokenizer
from tests.test_readme import blocks, run_commands, run_snippet
from tests.tiny_pipelines import tiny_ar_pipeline, tiny_dit_pipeline
from training_scripts.pack_model import PackingOptions, main


@pytest.fixture
def package(tmp_path, monkeypatch):
    """The package's tokenizers, and a pipeline on each."""
    models = tmp_path / "package"
    for name in ("dinotok-tiny-encoder", "dinotok-tiny-ae", "dinotok-tiny-vq"):
        shutil.copytree(bundled_folder(name), models / name)
    pipelines = {
        "dinotok-tiny-dit": tiny_dit_pipeline(load_tokenizer("dinotok-tiny-ae"), 4),
        "dinotok-tiny-ar": tiny_ar_pipeline(load_tokenizer("dinotok-tiny-vq"), (4, 4)),
    }
    for name, pipeline in pipelines.items():
        pipeline.save_pretrained(tmp_path / name)
        main(PackingOptions(str(tmp_path / name), str(models / name)))
        shutil.rmtree(tmp_path / name)
    monkeypatch.setattr(bundled, "_FOLDER", models)
    return models


def test_commands_and_snippets_of_the_page_run_in_order(package, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_dit_pipeline().save_pretrained("my-pipeline")
    run_commands("docs/generation.md")
    for folder, file, size in (
        ("diffusion", "002-garbage-truck-3.png", (64, 64)),
        ("autoregressive", "001-church-1.png", (64, 64)),
        ("mine", "003-crane-10.png", (64, 32)),
    ):
        with Image.open(tmp_path / "outputs" / folder / file) as picture:
            assert picture.size == size
    names: dict = {}
    first, own, continued = blocks("docs/generation.md", "python")
    run_snippet(first, names)
    assert len(names["pictures"]) == 2
    run_snippet(own, names)
    for loaded in (names["again"], names["same"]):
        weights, expected = (model.state_dict() for model in (loaded.transformer, names["transformer"]))
        assert all(torch.equal(weights[name], expected[name]) for name in expected)
    run_snippet(continued, names)
    assert len(names["others"]) == 2 and names["upper_half"].shape == (1, 2, 2, 4)
    assert BUNDLED_TOKENIZER in (package / "dinotok-tiny-dit" / "model_index.json").read_text()
