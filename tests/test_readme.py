"""Every snippet of the README and the docs is run as it stands, in a folder with small stand-ins for what it names."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from transformers import AutoConfig, AutoModel
from typer.testing import CliRunner

from dinotok.cli import app
from dinotok.training import parse_options
from tests.conftest import TINY_ENCODERS
from tests.tiny_tokenizers import tiny_discrete_tokenizer
from training_scripts import train_tokenizer

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
        small = Image.open(PHOTOGRAPHS / f"{source}.jpg").resize((240, 176))
        small.save(folder / f"{name}.jpg")
        small.save(folder / "photographs" / f"{source}.jpg")
    encoder = folder / "facebook" / "dinov2-with-registers-base"
    torch.manual_seed(0)
    config = {**TINY_ENCODERS["dinov2_with_registers"], "hidden_size": 128}
    AutoModel.from_config(AutoConfig.for_model(**config)).save_pretrained(encoder)
    (encoder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.5] * 3}))
    return folder


def run_snippet(code: str, names: dict) -> None:
    exec(compile(code, "snippet", "exec"), names)


def run_commands(page: str) -> None:
    for line in "\n".join(blocks(page, "bash")).splitlines():
        if line.startswith("dinotok "):
            result = CliRunner().invoke(app, shlex.split(line)[1:])
            assert result.exit_code == 0, f"{line}\n{result.output}\n{result.exception}"


def test_readme_snippets_run_in_order(workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    bundled, first, *others = blocks("README.md", "python")
    run_snippet(bundled, {})
    # The stand-in encoder is a folder, so a checkpoint without it must be told where it is.
    names = {"ENCODER": "facebook/dinov2-with-registers-base"}
    run_snippet(
        first.replace('from_pretrained("my-tokenizer")', 'from_pretrained("my-tokenizer", encoder=ENCODER)'), names
    )
    names["picture"].save("picture.png")
    names["ae"].save_pretrained("my-tokenizer")
    for snippet in others:
        run_snippet(snippet, names)
    assert names["indices"].shape[:2] == (1, 2) and names["ae"].config.latent_channels == 832
    run_commands("README.md")
    for folder in ("pictures", "decoded"):
        assert (workplace / "outputs" / folder / "coffee.png").is_file()


@pytest.mark.parametrize("page", ["README.md", "training_scripts/README.md"])
def test_training_a_folder_of_pictures_works_as_shown(workplace, monkeypatch, page):
    """With two steps in place of a hundred."""
    monkeypatch.chdir(workplace)
    shutil.rmtree("runs", ignore_errors=True)
    monkeypatch.setattr(train_tokenizer, "FIT_CROPS", 16)
    command = next(block for block in blocks(page, "bash") if "--dataset photographs" in block)
    script, *arguments = shlex.split(command.replace("\\\n", " "))[1:]
    assert script == "training_scripts/train_tokenizer.py"
    few = ["--max_train_steps", "2", "--num_workers", "0"]
    AcceleratorState._reset_state(True)
    train_tokenizer.main(parse_options(train_tokenizer.TokenizerOptions, [*arguments, *few]))
    AcceleratorState._reset_state(True)
    assert (workplace / "runs" / "mine" / "tokenizer" / "training.json").is_file()


def test_snippets_on_tokens_run_in_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_discrete_tokenizer().save_pretrained("my-vq-tokenizer")
    (tmp_path / "photographs").mkdir()
    for name in ("first", "second"):  # of one size, as the snippet that reads all files together needs
        shutil.copy(PHOTOGRAPHS / "rocket.jpg", tmp_path / "photographs" / f"{name}.jpg")
    run_commands("docs/tokens.md")
    names: dict = {}
    for snippet in blocks("docs/tokens.md", "python"):
        run_snippet(snippet, names)
    assert names["indices"].shape[0] == 2


def test_the_two_commands_of_the_readme_are_the_makefiles_and_cis():
    commands = blocks("README.md", "bash")[0].split("\n")
    assert commands[:2] == ["make quickstart", "make test"]
    assert "run make test\n" in (ROOT / ".ci" / "run").read_text("utf-8")


@pytest.mark.parametrize("name", ["autoencoder_controls", "quantizer_study", "encode_overhead", "tiling_memory"])
def test_tables_of_the_readme_are_the_committed_results(name):
    table = [line for line in (RESULTS / f"{name}.md").read_text("utf-8").splitlines() if line.startswith("|")]
    assert table and "\n".join(table) in (ROOT / "README.md").read_text("utf-8")


def test_links_between_pages_lead_somewhere():
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        for link in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text("utf-8")):
            assert (page.parent / link).exists(), f"{page.name}: {link}"
