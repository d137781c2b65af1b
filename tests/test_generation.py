"""`dinotok generate` and what it stands on: pictures that depend on their class and seed alone, and honest errors."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from dinotok import bundled
from dinotok.cli import app
from dinotok.generate_cli import PRESETS, SHORT_NAMES
from dinotok.generation import BUNDLED_TOKENIZER, draw_pictures, find_pipeline, load_pipeline, pipeline_class
from dinotok.hub import folder_digest
from tests.tiny_pipelines import save_tiny_pipelines, tiny_ar_pipeline, tiny_dit_pipeline

KINDS = ("diffusion", "autoregressive")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return save_tiny_pipelines(tmp_path_factory.mktemp("pipelines"))


def generate(*arguments, status=0):
    result = CliRunner().invoke(app, ["generate", *map(str, arguments)])
    assert result.exit_code == status, result.output
    return result


def pictures_in(folder):
    return {path.name: np.asarray(Image.open(path)) for path in folder.glob("*.png") if path.name != "sheet.png"}


def report_of(folder):
    return json.loads((folder / "generation.json").read_text())


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_are_those_of_the_pipeline_itself(folders, kind, tmp_path):
    options = {"diffusion": ["--steps", 3], "autoregressive": ["--temperature", 0.5, "--top-k", 4]}[kind]
    keywords = {
        "diffusion": {"num_inference_steps": 3},
        "autoregressive": {"temperature": 0.5, "top_k": 4},
    }[kind]
    sizes = ["--height", 32, "--width", 64]
    common = ["--model", folders[kind], "--output", tmp_path, "--guidance-scale", 1.5, *sizes]
    generate("--class-label", "church", "--class-label", "4", *common, *options, "--num-images", 2, "--seed", 7)
    found = pictures_in(tmp_path)
    assert sorted(found) == ["001-church-7.png", "001-church-8.png", "004-crane-7.png", "004-crane-8.png"]
    pipeline = load_pipeline(folders[kind])
    for row in report_of(tmp_path)["pictures"]:
        generator = torch.Generator().manual_seed(row["seed"])
        keywords |= {"guidance_scale": 1.5, "height": 32, "width": 64, "output_type": "np"}
        expected = pipeline(row["class_id"], generator=generator, **keywords).images[0]
        assert np.abs(found[row["file"]] - 255 * expected).max() < 1
        assert found[row["file"]].shape == (row["height"], row["width"], 3) == (32, 64, 3)
    assert len({picture.tobytes() for picture in found.values()}) == 4


@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_depends_on_its_class_and_seed_alone(folders, kind):
    pipeline = load_pipeline(folders[kind])
    pipeline.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 2} if kind == "diffusion" else {}
    ids, seeds = [1, 2, 3, 1], [5, 5, 6, 9]
    together = list(draw_pictures(pipeline, ids, seeds, 3, options))
    for place, (index, seed) in enumerate(zip(ids, seeds, strict=True)):
        (alone,) = draw_pictures(pipeline, [index], [seed], 1, options)
        assert np.abs(np.asarray(alone).astype(int) - np.asarray(together[place])).max() <= 1
    with pytest.raises(ValueError, match="2 classes came with 1 seeds"):
        list(draw_pictures(pipeline, [1, 2], [0]))


def test_the_report_says_what_was_drawn_and_the_sheet_shows_it(folders, tmp_path):
    arguments = ["--class-label", "Garbage Truck", "--class-label", "TENCH", "--class-label", "0", "--num-images", 1]
    generate(*arguments, "--model", folders["diffusion"], "--output", tmp_path, "--steps", 2, "--dtype", "bfloat16")
    report = report_of(tmp_path)
    assert report["class_name"] == "DINOTokDiTPipeline" and report["tokenizer"] is None
    assert report["model"] == str(folders["diffusion"]) and report["model_digest"].startswith("sha256:")
    settings = {"num_inference_steps": 2, "guidance_scale": 1.0, "guidance_interval": [0.0, 1.0], "dtype": "bfloat16"}
    assert settings.items() <= report["settings"].items() and "temperature" not in report["settings"]
    assert [(row["class_id"], row["seed"]) for row in report["pictures"]] == [(2, 0), (0, 0)]  # no class twice
    assert report["seconds"]["drawing"] > 0
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.height > 2 * 192 and np.asarray(sheet).std() > 10
    again = tmp_path / "again"
    generate(*arguments, "--model", folders["diffusion"], "--output", again, "--steps", 2, "--no-sheet")
    assert sorted(path.name for path in again.iterdir()) == [
        "000-tench-0.png",
        "002-garbage-truck-0.png",
        "generation.json",
    ]


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        ("diffusion", ["--temperature", 1, "--top-k", 2], "which has no --temperature, --top-k; it has --steps, "),
        ("autoregressive", ["--steps", 5], "which has no --steps; it has --guidance-scale, --temperature, "),
        ("diffusion", ["--class-label", "chruch"], "Class 'chruch' is not known (church)"),
        ("diffusion", ["--class-label", "6"], "Class id 6 is not in 0..5"),
        ("diffusion", ["--class-label", "crane"], "is the name of the classes [3, 4]: pass an id"),
        ("diffusion", ["--guidance-interval", 0.8, 0.2], "guidance_interval=(0.8, 0.2) must be two times in order"),
        ("diffusion", ["--height", 30], "Height and width must be positive multiples of 16"),
        ("autoregressive", ["--top-p", 2], "top_p=2.0"),
        ("diffusion", ["--device", "cuda:99"], "device='cuda:99' cannot be used here"),
        ("diffusion", ["--revision", "main"], "is for repositories of the Hub"),
    ],
)
def test_what_a_user_can_mend_is_one_line(folders, kind, arguments, message, tmp_path):
    common = ["--class-label", "church", "--model", folders[kind], "--output", tmp_path / "out"]
    result = generate(*common, *arguments, status=2)
    assert result.stderr.splitlines()[-1].startswith("error: ") and message in result.stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_a_short_name_without_its_pipeline_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(bundled, "_FOLDER", tmp_path)
    result = generate("--class-label", "church", "--model", "autoregressive", "--output", tmp_path / "out", status=2)
    assert "error: This version of the package has no dinotok-tiny-ar" in result.stderr


def test_what_is_no_pipeline_is_said(folders, tmp_path):
    tokenizer = folders["diffusion"] / "vae"
    with pytest.raises(FileNotFoundError, match="has no model_index.json, so it is not a pipeline"):
        find_pipeline(tokenizer)
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(ValueError, match="holds a FluxPipeline; dinotok's pipelines are DINOTokDiTPipeline and"):
        find_pipeline(tmp_path)
    entry = {"_class_name": "DINOTokDiTPipeline", BUNDLED_TOKENIZER: "../../secret"}
    (tmp_path / "model_index.json").write_text(json.dumps(entry))
    with pytest.raises(ValueError, match="'../../secret' is not among the models of the package"):
        find_pipeline(tmp_path)
    with pytest.raises(OSError, match="neither a folder nor the name of a repository"):
        find_pipeline("no/such/pipeline")


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package that has a tokenizer of each kind, and their pipelines without it."""
    models = tmp_path / "package"
    built = {"diffusion": tiny_dit_pipeline(), "autoregressive": tiny_ar_pipeline()}
    for kind, component in (("diffusion", "vae"), ("autoregressive", "vqvae")):
        folder = models / SHORT_NAMES[kind]
        built[kind].save_pretrained(folder)
        shutil.move(folder / component, models / f"tokenizer-{component}")
        index = json.loads((folder / "model_index.json").read_text())
        index |= {component: [None, None], BUNDLED_TOKENIZER: f"tokenizer-{component}"}
        (folder / "model_index.json").write_text(json.dumps(index))
    monkeypatch.setattr(bundled, "_FOLDER", models)
    monkeypatch.chdir(tmp_path)
    return models


@pytest.mark.parametrize("kind", KINDS)
def test_a_pipeline_of_the_package_stands_on_the_tokenizer_of_the_package(package, folders, kind, tmp_path):
    assert len(bundled.bundled_models()) == 4
    with pytest.raises(ValueError, match="Pipeline .* expected"):
        pipeline_class(find_pipeline(SHORT_NAMES[kind]).class_name).from_pretrained(package / SHORT_NAMES[kind])
    for folder in (SHORT_NAMES[kind], "tokenizer-vae", "tokenizer-vqvae"):
        (tmp_path / folder).mkdir()  # a folder of the user's goes first for what they name, not for the tokenizer
    with pytest.raises(FileNotFoundError, match="has no model_index.json"):
        find_pipeline(SHORT_NAMES[kind])
    (tmp_path / SHORT_NAMES[kind]).rmdir()
    few = ["--steps", 2, "--guidance-scale", 1.5] if kind == "diffusion" else []
    for name, model in (("thin", kind), ("whole", folders[kind])):
        result = generate("--class-label", 1, "--output", tmp_path / name, "--model", model, "--num-images", 1, *few)
        assert "non-standard module" not in result.stderr and "Expected types" not in result.stderr
    thin, whole = (pictures_in(tmp_path / name)["001-church-0.png"] for name in ("thin", "whole"))
    assert np.array_equal(thin, whole)
    generate("--class-label", 1, "--output", tmp_path / "preset", "--model", kind, "--num-images", 1, *few[:2])
    settings = report_of(tmp_path / "preset")["settings"]
    expected = PRESETS.get(kind, {}) | ({"num_inference_steps": 2} if kind == "diffusion" else {})
    assert {name: settings[name] for name in expected} == expected
    assert settings["guidance_scale"] == (3.0 if kind == "diffusion" else 1.0)
    reports = [report_of(tmp_path / name) for name in ("thin", "whole")]
    assert reports[0]["model_digest"] == reports[1]["model_digest"] == reports[0]["model_revision"]
    assert reports[0]["tokenizer"].startswith("tokenizer-") and reports[1]["tokenizer"] is None


def test_the_digest_is_that_of_models_and_scheduler(folders, tmp_path):
    folder = shutil.copytree(folders["diffusion"], tmp_path / "copy")
    digest = find_pipeline(folder).digest
    assert digest == find_pipeline(folders["diffusion"]).digest != folder_digest(folder / "transformer")
    scheduler = folder / "scheduler" / "scheduler_config.json"
    settings = json.loads(scheduler.read_text())
    scheduler.write_text(json.dumps({**settings, "_diffusers_version": "0"}))
    assert find_pipeline(folder).digest == digest
    scheduler.write_text(json.dumps({**settings, "shift": 2.0}))
    assert find_pipeline(folder).digest != digest


@pytest.mark.parametrize("name", [name for name in SHORT_NAMES.values() if name in bundled.bundled_models()])
def test_the_pipelines_of_the_package_draw(name):
    pipeline = load_pipeline(name)
    few = {"num_inference_steps": 2} if "num_inference_steps" in find_pipeline(name).defaults else {}
    (picture,) = draw_pictures(pipeline, [1], [0], options=few)
    assert min(picture.size) >= 64 and np.asarray(picture).std() > 10
    assert {str(parameter.dtype) for parameter in pipeline.transformer.parameters()} == {"torch.float32"}
