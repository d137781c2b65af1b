"""Every snippet of the README and the docs is run as it stands, in a folder with small stand-ins for what it names."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModel

from tests.conftest import TINY_ENCODERS

ROOT = Path(__file__).parents[1]
PHOTOGRAPHS = ROOT / "src" / "dinotok" / "assets" / "photographs"
RESULTS = ROOT / "benchmarks" / "results"


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", (ROOT / page).read_text("utf-8"), re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """A folder where the names used in the snippets exist: photographs, and a tiny encoder in place of a large one."""
    folder = tmp_path_factory.mktemp("snippets")
    (folder / "photographs").mkdir()
    for name, source in (("first", "chelsea"), ("second", "rocket"), ("photo", "coffee")):
        shutil.copy(PHOTOGRAPHS / f"{source}.jpg", folder / f"{name}.jpg")
        shutil.copy(PHOTOGRAPHS / f"{source}.jpg", folder / "photographs" / f"{source}.jpg")
    encoder = folder / "facebook" / "dinov2-with-registers-base"
    torch.manual_seed(0)
    config = {**TINY_ENCODERS["dinov2_with_registers"], "hidden_size": 128}
    AutoModel.from_config(AutoConfig.for_model(**config)).save_pretrained(encoder)
    (encoder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.5] * 3}))
    return folder


def run(command: list[str], folder: Path) -> None:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"


def test_readme_snippets_run_in_order(workplace):
    first, *others = blocks("README.md", "python")
    # The stand-in encoder is a folder, so a checkpoint without it must be told where it is.
    first = first.replace('from_pretrained("my-tokenizer")', 'from_pretrained("my-tokenizer", encoder=ENCODER)')
    first = 'ENCODER = "facebook/dinov2-with-registers-base"\n' + first
    run([sys.executable, "-c", first + "\npicture.save('picture.png')\nae.save_pretrained('my-tokenizer')"], workplace)
    assert (workplace / "picture.png").is_file()
    for snippet in others:
        run([sys.executable, "-c", snippet], workplace)
    for line in "\n".join(blocks("README.md", "bash")).splitlines():
        if line.startswith("dinotok "):
            run(shlex.split(line), workplace)
    for folder in ("pictures", "decoded"):
        assert (workplace / "outputs" / folder / "coffee.png").is_file()


def test_the_two_commands_of_the_readme_are_the_makefiles_and_cis():
    commands = blocks("README.md", "bash")[0].split("\n")
    assert commands[:2] == ["make quickstart", "make test"]
    assert "run make test\n" in (ROOT / ".ci" / "run").read_text("utf-8")


@pytest.mark.parametrize("name", ["autoencoder_controls", "encode_overhead", "tiling_memory"])
def test_tables_of_the_readme_are_the_committed_results(name):
    table = [line for line in (RESULTS / f"{name}.md").read_text("utf-8").splitlines() if line.startswith("|")]
    assert table and "\n".join(table) in (ROOT / "README.md").read_text("utf-8")


def test_links_between_pages_lead_somewhere():
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        for link in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text("utf-8")):
            assert (page.parent / link).exists(), f"{page.name}: {link}"
