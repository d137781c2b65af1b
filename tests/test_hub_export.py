"""`dinotok export`: folders that are Hub repositories, loaded with and without dinotok in processes of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModel

from dinotok import AutoencoderDINOTok, DINOTokDiTPipeline
from dinotok.bundled import bundled_folder, bundled_models
from dinotok.generation import BUNDLED_TOKENIZER, load_pipeline
from dinotok.hub import find_tokenizer, load_tokenizer
from dinotok.hub_code import standalone_code
from dinotok.hub_export import export_repository
from tests.load_repositories import MODELS, PIPELINES, output_of
from tests.test_hub_upload import hub  # noqa: F401 - a fixture
from tests.tiny_pipelines import tiny_ar_pipeline, tiny_dit_pipeline
from tests.tiny_tokenizers import tiny_discrete_tokenizer, tiny_region_tokenizer, tiny_tokenizer

ROOT = Path(__file__).parents[1]
SCRIPT = Path(__file__).with_name("load_repositories.py")
CARD = "---\nlicense: mit\n---\n# A model\n"
# Where torch and diffusers are: with -S, and this alone on the path, no package that is installed editable is found.
PACKAGES = Path(torch.__file__).parents[1]


@pytest.fixture(scope="module")
def repositories(tmp_path_factory) -> Path:
    """A repository of each kind, and what their models make: `expected.safetensors`."""
    folder = tmp_path_factory.mktemp("repositories")
    (folder / "card.md").write_text(CARD)
    models = {
        "autoencoder": tiny_tokenizer(),
        "discrete": tiny_discrete_tokenizer(),
        "regions": tiny_region_tokenizer(),
        "diffusion": tiny_dit_pipeline(),
        "autoregressive": tiny_ar_pipeline(),
    }
    pixels = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    expected = {"pixels": pixels}
    for name, model in models.items():
        model.save_pretrained(folder / "saved" / name)
        export_repository(str(folder / "saved" / name), folder / name, card=folder / "card.md")
        expected[name] = output_of(name, model, pixels)
    save_file(expected, folder / "expected.safetensors")
    return folder


def load_elsewhere(mode: str, prefix: str, repositories: Path, home: Path, **environment: str) -> None:
    """Run `load_repositories.py` in a process and a home of its own."""
    path = PACKAGES if mode == "without" else f"{ROOT / 'src'}{os.pathsep}{PACKAGES}"
    variables = {"PATH": os.environ["PATH"], "HF_HOME": str(home), "PYTHONPATH": str(path), **environment}
    command = [sys.executable, "-S", str(SCRIPT), mode, prefix, str(repositories / "expected.safetensors")]
    done = subprocess.run(command, cwd=home, env=variables, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr
    assert "all as expected" in done.stdout


@pytest.mark.parametrize("mode", ["without", pytest.param("with", marks=pytest.mark.slow)])
def test_repositories_load_offline_with_and_without_dinotok(repositories, tmp_path, mode):
    load_elsewhere(mode, str(repositories), repositories, tmp_path, HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")


@pytest.mark.slow
def test_repositories_load_from_a_hub_without_dinotok(repositories, hub, tmp_path):  # noqa: F811
    code = (
        "import pathlib, sys; from dinotok.hub_upload import push_folder; folder = pathlib.Path(sys.argv[1])\n"
        "for name in sys.argv[2:]: push_folder(folder / name, f'someone/{name}')"
    )
    command = [sys.executable, "-c", code, str(repositories), *MODELS, *PIPELINES]
    done = subprocess.run(command, env=hub.environment(tmp_path), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    load_elsewhere("without", "someone", repositories, tmp_path, HF_ENDPOINT=hub.address)


def test_the_package_reads_repositories_without_trust(repositories):
    with safe_open(repositories / "expected.safetensors", "pt") as file:
        expected = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    tokenizer = load_tokenizer(str(repositories / "autoencoder"))
    pipelines = {
        "diffusion": DINOTokDiTPipeline.from_pretrained(repositories / "diffusion"),
        "autoregressive": load_pipeline(repositories / "autoregressive"),
    }
    for name, model in {"autoencoder": tokenizer, **pipelines}.items():
        torch.testing.assert_close(output_of(name, model, expected["pixels"]), expected[name])
    vae = AutoencoderDINOTok.from_pretrained(repositories / "diffusion", subfolder="vae")
    torch.testing.assert_close(vae(expected["pixels"]).sample, pipelines["diffusion"].vae(expected["pixels"]).sample)
    saved = repositories / "saved" / "autoencoder"
    assert find_tokenizer(str(repositories / "autoencoder")).digest == find_tokenizer(str(saved)).digest
    with pytest.raises(ValueError, match="trust_remote_code"):
        DiffusionPipeline.from_pretrained(repositories / "diffusion")


def test_code_is_one_file_that_imports_nothing_of_the_package():
    code = standalone_code(["AutoencoderDINOTok", "DiffusionTransformer2DModel", "DINOTokDiTPipeline"])
    compile(code, "pipeline.py", "exec")
    lines = code.splitlines()
    assert not [line for line in lines if line.strip().startswith(("from .", "from dinotok", "import dinotok"))]
    assert "class AutoencoderDINOTok(" in code and "class VQModelDINOTok(" not in code
    again = standalone_code(["AutoencoderDINOTok", "DiffusionTransformer2DModel", "DINOTokDiTPipeline"])
    assert again == code  # no dates, no paths, no order of sets


def test_every_model_of_the_package_is_complete_elsewhere(tmp_path):
    for name in bundled_models():
        made = export_repository(name, tmp_path / name)
        assert made.files["README.md"] and not made.notes
        assert (tmp_path / name / "README.md").read_text("utf-8") == (ROOT / "model_cards" / f"{name}.md").read_text()
    AutoModel.from_pretrained(tmp_path / "dinotok-tiny-encoder")
    index = json.loads((tmp_path / "dinotok-tiny-dit" / "model_index.json").read_text())
    assert index["vae"] == ["dinotok", "AutoencoderDINOTok"] and BUNDLED_TOKENIZER not in index
    assert "_name_or_path" not in json.loads(
        (tmp_path / "dinotok-tiny-dit" / "transformer" / "config.json").read_text()
    )
    pixels = torch.rand(1, 3, 64, 48) * 2 - 1
    first, second = (load_tokenizer(name).eval() for name in ("dinotok-tiny-ae", str(tmp_path / "dinotok-tiny-ae")))
    torch.testing.assert_close(second.encode(pixels).latent, first.encode(pixels).latent)
    with safe_open(tmp_path / "dinotok-tiny-ae" / "diffusion_pytorch_model.safetensors", "pt") as file:
        assert any(name.startswith("encoder.model.") for name in file.keys())  # noqa: SIM118 - no mapping
    before = (bundled_folder("dinotok-tiny-ae") / "diffusion_pytorch_model.safetensors").stat().st_size
    assert made.folder.is_dir() and before < 2e6  # the package's own file is not touched


def test_what_nobody_else_could_load_is_refused(repositories, tmp_path):
    with pytest.raises(ValueError, match="is there already and not empty"):
        export_repository(str(repositories / "autoencoder"), repositories / "discrete")
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        export_repository(str(tmp_path), tmp_path / "out")
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    with pytest.raises(FileNotFoundError, match="has no weights in safetensors"):
        export_repository(str(tmp_path), tmp_path / "out")
    save_file({"weight": torch.zeros(1)}, tmp_path / "diffusion_pytorch_model.safetensors")
    with pytest.raises(ValueError, match="AutoencoderKL, which is no model of dinotok"):
        export_repository(str(tmp_path), tmp_path / "out")
    tiny_tokenizer().save_pretrained(tmp_path / "without", include_encoder=False)
    with pytest.raises(ValueError, match="saved without its encoder"):
        export_repository(str(tmp_path / "without"), tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out-*"))


def test_a_card_is_given_or_the_models_own_or_asks_to_be_completed(repositories, tmp_path):
    saved = str(repositories / "saved" / "autoencoder")
    made = export_repository(saved, tmp_path / "mine")
    card = tmp_path / "mine" / "README.md"
    assert "Not scored yet" in card.read_text()
    assert 'AutoModel.from_pretrained("mine", trust_remote_code=True)' in card.read_text()
    assert any("complete it, its licence first" in note for note in made.notes)
    card.write_text(CARD)
    export_repository(str(tmp_path / "mine"), tmp_path / "again")
    assert (tmp_path / "again" / "README.md").read_text() == CARD
    (tmp_path / "cards").mkdir()
    values = {"license": "mit", "description": "{{ config.patch_size }} pixels", "snippets": [], "results": []}
    (tmp_path / "cards" / "given.json").write_text(json.dumps(values))
    export_repository(saved, tmp_path / "given", card=tmp_path / "cards" / "given.json")
    assert "# given\n\n16 pixels\n" in (tmp_path / "given" / "README.md").read_text()
