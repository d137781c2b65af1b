"""What docs/evaluation.md says can be typed, works; at small size."""

import torch

from tests.conftest import save_tiny_encoder
from tests.evaluation.test_statistics import ColorFeatures
from tests.test_readme import blocks, run_commands, run_snippet
from tests.tiny_tokenizers import save_picture


def test_commands_and_snippets_of_the_page_run_in_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_tiny_encoder(tmp_path / "encoder", seed=0)
    for index in range(8):
        save_picture(tmp_path / "photos" / f"{index}.png", 80, 70, seed=index)
        save_picture(tmp_path / "samples" / f"{index}.png", 64, 64, seed=index + 10)
        save_picture(tmp_path / "labelled" / f"class{index % 2}" / f"{index}.png", 80, 70, seed=index)
    run_commands("docs/evaluation.md")
    for folder in ("reconstruction", "generation", "probe"):
        assert {path.name for path in (tmp_path / folder).iterdir()} == {"evaluation.json", "model-index.md"}
    assert (tmp_path / "latents" / "latents.png").is_file()
    names = {"samples": torch.zeros(6, 3, 8, 8, dtype=torch.uint8), "features": ColorFeatures()}
    for snippet in blocks("docs/evaluation.md", "python"):
        run_snippet(snippet, names)
    assert names["pack"].count == 6 and "FD-colors" in names["result"]["metrics"]
