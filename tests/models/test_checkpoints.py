"""Saving and loading tokenizers: both forms, every way a checkpoint can be wrong, nothing lost on the way."""

import inspect
import json
import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub.errors import HfHubHTTPError
from safetensors.torch import load_file, save_file

from dinotok import AutoencoderDINOTok, EncoderUnavailableError
from tests.conftest import TINY_DECODER, random_pixels, randomize, save_tiny_encoder, tiny_autoencoder

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def encoder_folder(tmp_path):
    return save_tiny_encoder(tmp_path / "encoder", seed=5)


def from_encoder(folder) -> AutoencoderDINOTok:
    return randomize(AutoencoderDINOTok.from_encoder(str(folder), texture_channels=8, **TINY_DECODER))


def same(a: AutoencoderDINOTok, b: AutoencoderDINOTok) -> bool:
    pixels = random_pixels(1, 3, 48, 32)
    return torch.equal(a(pixels).sample, b(pixels).sample) and torch.equal(
        a.encode(pixels).latent, b.encode(pixels).latent
    )


def test_self_contained_round_trip(tmp_path):
    model = tiny_autoencoder().fit([random_pixels(8, 3, 48, 32, seed=s) for s in range(2)])
    model.save_pretrained(tmp_path / "model")
    loaded = AutoencoderDINOTok.from_pretrained(tmp_path / "model")
    assert same(model, loaded)
    assert sorted(os.listdir(tmp_path)) == ["model"]  # no temporary folder is left
    assert sorted(os.listdir(tmp_path / "model")) == ["config.json", WEIGHTS]
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["_class_name"] == "AutoencoderDINOTok"
    assert str(tmp_path) not in json.dumps(config)
    loaded.save_pretrained(tmp_path / "again")
    assert str(tmp_path) not in (tmp_path / "again" / "config.json").read_text()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loading_in_half_precision_keeps_the_statistics(tmp_path, dtype):
    model = tiny_autoencoder().fit([random_pixels(8, 3, 48, 32, seed=s) for s in range(2)])
    model.save_pretrained(tmp_path)
    loaded = AutoencoderDINOTok.from_pretrained(tmp_path, torch_dtype=dtype)
    assert loaded.dtype == dtype and torch.equal(loaded.latents_std, model.latents_std)
    pixels = random_pixels(1, 3, 48, 32)
    difference = loaded(pixels.to(dtype)).sample.float() - model(pixels).sample
    assert difference.abs().mean() < 0.05 * model(pixels).sample.abs().mean()


def test_sharded_and_variant_checkpoints_supersede_their_own_kind_only(tmp_path):
    model = tiny_autoencoder()
    model.save_pretrained(tmp_path, variant="fp16")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*-of-*.safetensors"))) > 1
    assert same(AutoencoderDINOTok.from_pretrained(tmp_path), model)
    other = randomize(tiny_autoencoder(), seed=7)
    other.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*-of-*")) and not list(tmp_path.glob("*.index.json"))
    assert same(AutoencoderDINOTok.from_pretrained(tmp_path), other)
    assert same(AutoencoderDINOTok.from_pretrained(tmp_path, variant="fp16"), model)


def test_without_the_encoder_it_is_fetched_checked_and_equal(tmp_path, encoder_folder):
    model = from_encoder(encoder_folder)
    assert not model.training
    model.save_pretrained(tmp_path / "slim", include_encoder=False)
    assert not any(key.startswith("encoder.") for key in load_file(tmp_path / "slim" / WEIGHTS))
    assert "encoder" in dict(model.named_children())  # saving changed nothing
    with pytest.raises(EncoderUnavailableError, match="saved without its encoder"):
        AutoencoderDINOTok.from_pretrained(tmp_path / "slim")
    loaded = AutoencoderDINOTok.from_pretrained(tmp_path / "slim", encoder=encoder_folder)
    assert same(loaded, model)
    assert not any(parameter.requires_grad for parameter in loaded.encoder.parameters())
    assert not any(parameter.is_meta for parameter in loaded.parameters())


def test_the_encoder_comes_from_the_repository_in_the_config(tmp_path, encoder_folder):
    model = from_encoder(encoder_folder)
    model.register_to_config(encoder_repository=str(encoder_folder))  # a folder stands in for a Hub repository
    model.save_pretrained(tmp_path / "slim", include_encoder=False)
    assert same(AutoencoderDINOTok.from_pretrained(tmp_path / "slim"), model)


def cache_on_hub(folder, cache, repository: str, commit: str) -> None:
    """Lay a folder out as the Hub's cache does after a download of branch `main`."""
    root = cache / f"models--{repository.replace('/', '--')}"
    shutil.copytree(folder, root / "snapshots" / commit)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(commit)


def test_hub_arguments_reach_the_encoder_and_its_commit_is_kept(tmp_path, encoder_folder):
    cache, commit = tmp_path / "cache", "0123456789" * 4
    cache_on_hub(encoder_folder, cache, "someone/vit", commit)
    hub = {"cache_dir": str(cache), "local_files_only": True}
    model = AutoencoderDINOTok.from_encoder("someone/vit", texture_channels=8, **TINY_DECODER, **hub)
    assert (model.config.encoder_repository, model.config.encoder_revision) == ("someone/vit", commit)
    model.save_pretrained(tmp_path / "slim", include_encoder=False)
    assert same(AutoencoderDINOTok.from_pretrained(tmp_path / "slim", **hub), model)
    with pytest.raises(EncoderUnavailableError, match="'someone/vit' at revision '0123456789"):
        AutoencoderDINOTok.from_pretrained(tmp_path / "slim", cache_dir=str(tmp_path / "empty"), local_files_only=True)


def test_an_encoder_for_a_checkpoint_that_has_one_is_refused(tmp_path, encoder_folder):
    from_encoder(encoder_folder).save_pretrained(tmp_path / "whole")
    with pytest.raises(ValueError, match="was passed, but the checkpoint has its own encoder"):
        AutoencoderDINOTok.from_pretrained(tmp_path / "whole", encoder=encoder_folder)


def test_a_models_config_rebuilds_it_with_its_statistics():
    """diffusers takes what the constructor was not given for a default, and leaves it out."""
    model = tiny_autoencoder().fit([random_pixels(8, 3, 48, 32, seed=s) for s in range(2)])
    rebuilt = AutoencoderDINOTok.from_config(model.config).eval()
    rebuilt.load_state_dict(model.state_dict())
    assert same(rebuilt, model)


def test_another_encoder_is_refused(tmp_path, encoder_folder):
    from_encoder(encoder_folder).save_pretrained(tmp_path / "slim", include_encoder=False)
    other = save_tiny_encoder(tmp_path / "other", seed=6)
    with pytest.raises(EncoderUnavailableError, match="is not the one this tokenizer was made with: its digest"):
        AutoencoderDINOTok.from_pretrained(tmp_path / "slim", encoder=other)
    with pytest.raises(EncoderUnavailableError, match="cannot be loaded"):
        AutoencoderDINOTok.from_pretrained(tmp_path / "slim", encoder=tmp_path / "nowhere")


def test_the_digest_of_a_config_built_encoder_is_taken_when_it_is_left_out(tmp_path):
    model = tiny_autoencoder()
    model.save_pretrained(tmp_path, include_encoder=False)
    assert json.loads((tmp_path / "config.json").read_text())["encoder_digest"] == model.encoder.digest()
    assert model.config.encoder_digest is None


def test_modules_that_transformers_moved_are_found(tmp_path):
    model = tiny_autoencoder("dinov3_vit")
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / WEIGHTS)
    old = {key.replace("encoder.model.model.layer.", "encoder.model.layer."): value for key, value in weights.items()}
    assert old.keys() != weights.keys()
    save_file(old, tmp_path / WEIGHTS, {"format": "pt"})
    assert same(AutoencoderDINOTok.from_pretrained(tmp_path), model)


# ------------------------------------------------------------------------------------------------- what can be wrong


def rewrite(folder, change) -> None:
    weights = load_file(folder / WEIGHTS)
    change(weights)
    save_file(weights, folder / WEIGHTS, {"format": "pt"})


def test_missing_extra_and_non_finite_weights_are_named(tmp_path):
    model = tiny_autoencoder()
    model.save_pretrained(tmp_path)
    rewrite(tmp_path, lambda weights: weights.pop("linear_decoder.bias"))
    with pytest.raises(ValueError, match="1 missing keys, first 'linear_decoder.bias'"):
        AutoencoderDINOTok.from_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    rewrite(tmp_path, lambda weights: weights.update(extra=torch.zeros(1)))
    with pytest.raises(ValueError, match="1 unexpected keys, first 'extra'"):
        AutoencoderDINOTok.from_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    rewrite(tmp_path, lambda weights: weights["linear_decoder.weight"].fill_(torch.nan))
    with pytest.raises(ValueError, match="NaN or infinite values, first in 'linear_decoder.weight'"):
        AutoencoderDINOTok.from_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    rewrite(tmp_path, lambda weights: weights["decoder_input.std"].fill_(torch.inf))
    with pytest.raises(ValueError, match="NaN or infinite values, first in 'decoder_input.std'"):
        AutoencoderDINOTok.from_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    rewrite(tmp_path, lambda weights: weights.update({"linear_decoder.bias": torch.zeros(3)}))
    with pytest.raises((ValueError, RuntimeError), match="linear_decoder.bias|shape"):
        AutoencoderDINOTok.from_pretrained(tmp_path)


def test_one_missing_encoder_tensor_is_not_taken_for_a_checkpoint_without_encoder(tmp_path):
    tiny_autoencoder().save_pretrained(tmp_path)
    rewrite(tmp_path, lambda weights: weights.pop("encoder.model.norm.weight"))
    with pytest.raises(ValueError, match="1 missing keys, first 'encoder.model.norm.weight'"):
        AutoencoderDINOTok.from_pretrained(tmp_path)


def test_a_damaged_encoder_is_named(tmp_path, encoder_folder):
    from_encoder(encoder_folder).save_pretrained(tmp_path / "slim", include_encoder=False)
    weights = load_file(encoder_folder / "model.safetensors")
    weights["norm.weight"][0] = torch.nan
    save_file(weights, encoder_folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="NaN or infinite values, first in 'norm.weight'"):
        from_encoder(encoder_folder)
    data = (encoder_folder / "model.safetensors").read_bytes()
    (encoder_folder / "model.safetensors").write_bytes(data[:-50])
    with pytest.raises(EncoderUnavailableError, match=f"{encoder_folder}' cannot be loaded"):
        AutoencoderDINOTok.from_pretrained(tmp_path / "slim", encoder=encoder_folder)


@pytest.mark.parametrize("keep", [4, 100, -50])
def test_truncated_weights_are_an_error_that_names_the_file(tmp_path, keep):
    tiny_autoencoder().save_pretrained(tmp_path)
    data = (tmp_path / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(data[:keep])
    with pytest.raises(OSError, match=WEIGHTS):
        AutoencoderDINOTok.from_pretrained(tmp_path)


def test_the_config_of_another_class_is_refused(tmp_path):
    from diffusers import AutoencoderTiny

    AutoencoderTiny().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds a AutoencoderTiny, not a AutoencoderDINOTok"):
        AutoencoderDINOTok.from_pretrained(tmp_path)


def test_pickles_are_neither_written_nor_read(tmp_path):
    model = tiny_autoencoder()
    with pytest.raises(ValueError, match="safetensors"):
        model.save_pretrained(tmp_path, safe_serialization=False)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="safetensors"):
        AutoencoderDINOTok.from_pretrained(tmp_path, use_safetensors=False)
    os.rename(tmp_path / WEIGHTS, tmp_path / "kept")
    torch.save(model.state_dict(), tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(OSError):
        AutoencoderDINOTok.from_pretrained(tmp_path)


def test_a_failed_save_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    model = tiny_autoencoder()
    model.save_pretrained(tmp_path / "model")

    def full_disk(*_, **__):
        raise OSError("No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full_disk)
    with pytest.raises(OSError, match="No space"):
        randomize(tiny_autoencoder(), seed=3).save_pretrained(tmp_path / "model")
    assert os.listdir(tmp_path) == ["model"]
    assert same(AutoencoderDINOTok.from_pretrained(tmp_path / "model"), model)


def test_the_config_comes_last_and_from_the_main_process_only(tmp_path, monkeypatch):
    moved = []
    replace = os.replace
    monkeypatch.setattr(
        "os.replace", lambda source, target: (moved.append(os.path.basename(target)), replace(source, target))
    )
    model = tiny_autoencoder()
    model.save_pretrained(tmp_path / "other-process", is_main_process=False)
    assert moved == [] and not (tmp_path / "other-process").exists()
    model.save_pretrained(tmp_path / "main")
    assert moved == [WEIGHTS, "config.json"]


def test_other_files_in_the_folder_stay(tmp_path):
    (tmp_path / "README.md").write_text("card")
    tiny_autoencoder().save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "card"
    with pytest.raises(ValueError, match="is a file, not a folder"):
        tiny_autoencoder().save_pretrained(tmp_path / "README.md")


# ------------------------------------------------------------------------------------- gated and missing repositories


class _Hub(BaseHTTPRequestHandler):
    """A Hub that answers every request with the status and error code in the repository's name."""

    def do_GET(self):
        gated = "gated" in self.path
        self.send_response(403 if gated else 401)
        self.send_header("X-Error-Code", "GatedRepo" if gated else "RepoNotFound")
        self.send_header("X-Error-Message", "Access to model is restricted")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


@pytest.mark.parametrize(
    ("repository", "message"),
    [
        ("someone/gated-dinov3", "is gated: its owner asks you to accept a licence"),
        ("someone/absent", "not found on the Hub"),
    ],
)
def test_gated_and_missing_repositories_are_explained(tmp_path, repository, message):
    """In another process, because huggingface_hub reads its endpoint once."""
    server = HTTPServer(("127.0.0.1", 0), _Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    code = f"from dinotok import FrozenEncoder\nFrozenEncoder.from_encoder({repository!r})"
    environment = {
        **os.environ,
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(tmp_path),
        "NO_PROXY": "127.0.0.1",
    }
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    server.shutdown()
    last = result.stderr.strip().splitlines()[-1]
    assert (
        last.startswith("dinotok.models.encoders.EncoderUnavailableError") and message in last and repository in last
    )


@pytest.mark.parametrize(("status", "message"), [(403, "is gated: its owner asks"), (401, "not found on the Hub")])
def test_a_mirror_that_sends_no_error_code_is_understood_too(monkeypatch, status, message):
    def refuse(*_, **__):
        response = SimpleNamespace(status_code=status, headers={}, request=None)
        raise OSError("There was a specific connection error") from HfHubHTTPError("refused", response=response)

    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", refuse)
    with pytest.raises(EncoderUnavailableError, match=message):
        AutoencoderDINOTok.from_encoder("someone/vit")


def test_pipelines_find_the_arguments_they_pass_on():
    """A pipeline's `save_pretrained` passes on only what a component's signature names."""
    names = set(inspect.signature(AutoencoderDINOTok.save_pretrained).parameters)
    assert {"is_main_process", "safe_serialization", "variant", "max_shard_size", "push_to_hub"} <= names
