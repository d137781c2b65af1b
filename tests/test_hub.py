import json
import shutil

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from dinotok import AutoencoderDINOTok
from dinotok.hub import find_tokenizer, folder_digest, load_tokenizer, tokenizer_classes
from tests.tiny_tokenizers import tiny_tokenizer

WEIGHTS = "diffusion_pytorch_model.safetensors"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub") / "tokenizer"
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "copy")


def change_config(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_the_class_comes_from_the_config(folder):
    assert tokenizer_classes()["AutoencoderDINOTok"] is AutoencoderDINOTok
    model = load_tokenizer(str(folder), dtype=torch.bfloat16)
    assert type(model) is AutoencoderDINOTok and model.dtype == torch.bfloat16 and not model.training


def test_a_folder_is_identified_by_its_content(saved, folder):
    source = find_tokenizer(str(folder))
    assert source.revision == source.digest == folder_digest(saved)
    assert (source.commit, source.class_name, source.name) == (None, "AutoencoderDINOTok", str(folder))


def test_the_digest_depends_on_weights_and_latent_statistics_but_not_on_who_wrote_them(saved, folder):
    change_config(folder, _diffusers_version="9.9")
    assert folder_digest(folder) == folder_digest(saved)
    change_config(folder, latents_mean=[0.5] * 40)
    assert folder_digest(folder) != folder_digest(saved)
    shutil.copy(saved / "config.json", folder)
    weights = load_file(folder / WEIGHTS)
    weights["decoder.conv_out.bias"] += 1
    save_file(weights, folder / WEIGHTS)
    assert folder_digest(folder) != folder_digest(saved)


def test_a_sharded_checkpoint_has_a_digest_too(tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    digest = folder_digest(tmp_path)
    last = sorted(tmp_path.glob("*.safetensors"))[-1]
    last.write_bytes(last.read_bytes()[:-1] + b"\1")
    assert folder_digest(tmp_path) != digest


def test_other_folders_are_refused_by_name(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        load_tokenizer(str(tmp_path))
    with pytest.raises(ValueError, match=r"revision='main' .* is a folder"):
        load_tokenizer(str(folder), revision="main")
    (folder / WEIGHTS).unlink()
    with pytest.raises(FileNotFoundError, match=rf"has no {WEIGHTS}"):
        load_tokenizer(str(folder))
    change_config(folder, _class_name="AutoencoderKL")
    with pytest.raises(ValueError, match=r"holds a AutoencoderKL, not one of .*AutoencoderDINOTok"):
        load_tokenizer(str(folder))
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json of .* is not valid JSON"):
        load_tokenizer(str(folder))


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    return tmp_path


def test_a_repository_is_identified_by_its_commit(saved, hub_cache):
    repository = hub_cache / "models--someone--tokenizer"
    shutil.copytree(saved, repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    for revision in (None, "main", COMMIT):
        source = find_tokenizer("someone/tokenizer", revision)
        assert (source.commit, source.revision, source.digest) == (COMMIT, COMMIT, folder_digest(saved))
    assert type(source.load()) is AutoencoderDINOTok


def test_what_is_neither_a_folder_nor_a_repository_is_named(hub_cache):
    with pytest.raises(OSError, match=r"'someone/nothing' at revision 'v1' is no folder here and cannot be had"):
        load_tokenizer("someone/nothing", revision="v1")
    with pytest.raises(FileNotFoundError, match=r"'\./nothing' is neither a folder nor"):
        load_tokenizer("./nothing")
