"""Model cards: up to date with their JSON and results, with valid headers and snippets that run."""

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from typer.testing import CliRunner

from dinotok.bundled import bundled_models
from dinotok.cli import app
from dinotok.generation import find_pipeline
from dinotok.hub_export import export_repository
from dinotok.model_cards import card_names, read_card, render_card

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "model_cards"
RESULTS = json.loads((ROOT / "benchmarks" / "results" / "dinotok_tiny.json").read_text("utf-8"))
cards = pytest.mark.parametrize("name", card_names(FOLDER))


def card_text(name: str) -> str:
    return (FOLDER / f"{name}.md").read_text("utf-8")


def header(text: str) -> dict:
    return yaml.safe_load(text.split("---\n")[1])


def test_every_bundled_model_has_a_card():
    assert card_names(FOLDER) == sorted(path.stem for path in FOLDER.glob("*.md")) == bundled_models()


@cards
def test_cards_are_what_their_json_renders_to(name):
    assert render_card(read_card(FOLDER / f"{name}.json")) == card_text(name), "run `dinotok card --all`"


@cards
def test_headers_are_valid(name):
    data = ModelCard.load(FOLDER / f"{name}.md", ignore_metadata_errors=False).data
    assert data.license == "apache-2.0" and data.datasets and "dinotok" in data.tags and data.pipeline_tag
    sections = re.findall(r"^## (.+)$", card_text(name), re.MULTILINE)
    assert sections == ["Latents", "How it was made", "Results", "Limits", "Licence"]


@cards
def test_snippets_run_beside_the_exported_repository(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    snippets = re.findall(r"```python\n(.*?)```", card_text(name), re.DOTALL)
    own, *others = snippets
    exec(compile(own, name, "exec"), {})  # by the name of the model of the package
    export_repository(name, tmp_path / name)
    for snippet in others:  # by the folder
        exec(compile(snippet, name, "exec"), {})
    commands = re.findall(r"^dinotok .+$", card_text(name), re.MULTILINE)
    for command in commands:
        assert command.split()[1] in {info.name or info.callback.__name__ for info in app.registered_commands}


@pytest.mark.parametrize("name", ["dinotok-tiny-ae", "dinotok-tiny-vq"])
def test_numbers_are_those_of_the_benchmark(name):
    rows = RESULTS["reconstruction"][name]
    for size, row in rows.items():
        scores = f"{row['psnr']:.2f} ({row['psnr_pooled']:.2f}) dB | {row['ssim']:.3f} | {row['lpips_alex']:.3f}"
        assert f"| {size} | {row['num_images']} | {scores}" in card_text(name)
    (entry,) = header(card_text(name))["model-index"][0]["results"]
    assert entry["dataset"] == {"name": "imagenette", "type": "frgfm/imagenette", "split": "validation"}
    found = {metric["type"]: metric["value"] for metric in entry["metrics"]}
    assert found["psnr"] == round(rows["224x224"]["psnr"], 4) and found["ssim"] == round(rows["224x224"]["ssim"], 4)


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A copy of what cards are rendered from."""
    for part in ("model_cards", "benchmarks/results"):
        shutil.copytree(ROOT / part, tmp_path / part)
    (tmp_path / "training_scripts").mkdir()
    shutil.copy(ROOT / "training_scripts" / "README.md", tmp_path / "training_scripts")
    return tmp_path


def change(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_numbers_follow_the_results_and_missing_ones_say_so(checkout):
    results, cards = checkout / "benchmarks" / "results" / "dinotok_tiny.json", checkout / "model_cards"
    reconstruction = json.loads(results.read_text())["reconstruction"]
    reconstruction["dinotok-tiny-ae"]["224x224"] |= {"psnr": 12.345, "psnr_pooled": 28.41, "num_images": 1000}
    del reconstruction["dinotok-tiny-ae"]["128x128"]
    change(results, reconstruction=reconstruction)
    text = render_card(read_card(cards / "dinotok-tiny-ae.json"))
    assert "| 224x224 | 1000 | 12.35 (28.41) dB |" in text and "| 128x128 | Not scored yet | - |" in text
    values = {metric["type"]: metric["value"] for metric in header(text)["model-index"][0]["results"][0]["metrics"]}
    assert values["psnr"] == 12.345
    results.unlink()
    text = render_card(read_card(cards / "dinotok-tiny-ae.json"))
    assert "model-index" not in header(text) and text.count("Not scored yet") == 5


def test_results_of_other_weights_are_not_shown(checkout):
    results = checkout / "benchmarks" / "results" / "generation_study.json"
    card = checkout / "model_cards" / "dinotok-tiny-dit.json"
    row = {"fid_768_val": 1.5, "fid_768_train": 1.25, "accuracy": 0.5, "cpu_seconds_per_picture": 0.75}
    entry = {"digest": "sha256:of-others", "settings": {"guidance 2, 25 steps": row}, "reconstructions": row}
    results.write_text(json.dumps({"rows": {"dinotok-tiny-dit": entry}, "photographs": {}}))
    assert "guidance 2, 25 steps" not in render_card(read_card(card))
    entry["digest"] = find_pipeline("dinotok-tiny-dit").digest
    results.write_text(json.dumps({"rows": {"dinotok-tiny-dit": entry}, "photographs": {}}))
    text = render_card(read_card(card))
    assert "| guidance 2, 25 steps | 1.500 | 1.250 | 50.0% | 0.75 |" in text
    assert "| photographs | Not scored yet | - |" in text


def test_the_command_writes_what_has_changed_and_checks(checkout, monkeypatch):
    monkeypatch.chdir(checkout)
    fresh = CliRunner().invoke(app, ["card", "--all", "--check"])
    assert (fresh.exit_code, fresh.output) == (0, "")
    change(checkout / "model_cards" / "dinotok-tiny-ae.json", limits="It is small.")
    stale = CliRunner().invoke(app, ["card", "--all", "--check"])
    assert stale.exit_code == 1 and "dinotok-tiny-ae.md is not up to date" in stale.output
    assert "It is small." not in (checkout / "model_cards" / "dinotok-tiny-ae.md").read_text()
    written = CliRunner().invoke(app, ["card", "dinotok-tiny-ae"])
    assert written.exit_code == 0 and "It is small." in (checkout / "model_cards" / "dinotok-tiny-ae.md").read_text()
    for arguments in (["card"], ["card", "dinotok-tiny-ae", "--all"], ["card", "nothing"]):
        assert CliRunner().invoke(app, arguments).exit_code == 2


def test_what_the_json_lacks_or_cannot_know_is_named(checkout):
    path = checkout / "model_cards" / "dinotok-tiny-ae.json"
    change(path, limits="{{ config.colour }}")
    with pytest.raises(ValueError, match="card of 'dinotok-tiny-ae'.*no attribute 'colour'"):
        render_card(read_card(path))
    change(path, limits="None.", commands={"page": "training_scripts/README.md", "runs": ["runs/other"]})
    with pytest.raises(ValueError, match="has no command for runs/other"):
        render_card(read_card(path))
    path.write_text(json.dumps({"results": []}))
    with pytest.raises(ValueError, match="lacks 'snippets'"):
        render_card(read_card(path))
