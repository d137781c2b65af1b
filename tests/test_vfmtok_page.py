"""What docs/vfmtok.md says can be typed, works; at small size."""

import shutil

import numpy as np
import torch

from tests.convert.test_vfmtok import released
from tests.test_readme import PHOTOGRAPHS, blocks, run_commands, run_snippet
from tests.tiny_tokenizers import tiny_region_tokenizer


def test_commands_and_snippets_of_the_page_run_in_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for family in ("vfmtok", "vfmae"):
        weights = released(family)
        for level in range(4):  # the release's encoder is 1,024 wide
            weights[f"encode_transformer.projectors.{level}.mlp.0.weight"] = torch.randn(32, 1024)
        torch.save({"ema": weights}, f"{family}-tokenizer.pt")
    torch.save({name: np.ones((8, 16), np.float32) for name in ("mean", "var")}, "stats-500.pt")
    run_commands("docs/vfmtok.md")
    assert (tmp_path / "my-vfmae" / "conversion.json").is_file()
    tiny_region_tokenizer().save_pretrained("my-vfmtok")  # in place of the release, whose encoder is not here
    shutil.copy(PHOTOGRAPHS / "rocket.jpg", "photo.jpg")
    names: dict = {}
    for snippet in blocks("docs/vfmtok.md", "python"):
        run_snippet(snippet, names)
    assert names["picture"].size == (64, 64) and names["predicted"].shape == names["target"].shape
