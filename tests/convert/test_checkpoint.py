"""Foreign checkpoints are read safely, and every tensor is accounted for."""

import argparse

import pytest
import torch
from safetensors.torch import save_file

from dinotok.convert.checkpoint import KeyReader, read_checkpoint

WEIGHTS = {"a.weight": torch.arange(6.0).view(2, 3), "b": torch.ones(2)}


@pytest.mark.parametrize("container", ["ema", "model", "state_dict", None])
def test_weights_are_found_in_the_containers_of_training_scripts(tmp_path, container):
    content = WEIGHTS if container is None else {container: WEIGHTS, "args": argparse.Namespace(lr=1e-4), "steps": 3}
    torch.save(content, tmp_path / "model.pt")
    found = read_checkpoint(tmp_path / "model.pt")
    assert found.keys() == WEIGHTS.keys()
    assert all(torch.equal(found[key], WEIGHTS[key]) for key in WEIGHTS)


def test_the_averaged_weights_win(tmp_path):
    torch.save({"model": WEIGHTS, "ema": {"b": torch.zeros(2)}}, tmp_path / "model.pt")
    assert list(read_checkpoint(tmp_path / "model.pt")) == ["b"]


def test_safetensors_and_prefixes(tmp_path):
    save_file({f"_orig_mod.module.{key}": value for key, value in WEIGHTS.items()}, tmp_path / "model.safetensors")
    assert read_checkpoint(tmp_path / "model.safetensors").keys() == WEIGHTS.keys()


class Unwanted:
    """An object whose pickle would have to import this class."""


def test_pickles_that_could_run_code_are_refused(tmp_path):
    torch.save({"model": WEIGHTS, "extra": Unwanted()}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match="could run code"):
        read_checkpoint(tmp_path / "model.pt")


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_damaged_files_are_named(tmp_path, suffix):
    path = tmp_path / f"model{suffix}"
    torch.save(WEIGHTS, path) if suffix == ".pt" else save_file(WEIGHTS, path)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match="model.*damaged"):
        read_checkpoint(path)


def test_files_without_weights(tmp_path):
    torch.save({"steps": 3}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match="no tensors"):
        read_checkpoint(tmp_path / "model.pt")
    with pytest.raises(FileNotFoundError):
        read_checkpoint(tmp_path / "absent.pt")


def test_the_reader_accounts_for_every_tensor():
    reader = KeyReader({**WEIGHTS, "statistics": torch.ones(1)}, "'x.pt'")
    assert "b" in reader
    assert torch.equal(reader.take("a.weight", "layer.weight", (2, 3)), WEIGHTS["a.weight"])
    with pytest.raises(ValueError, match="'x.pt' has 2 tensors .* first 'b'"):
        reader.finish()
    with pytest.raises(ValueError, match=r"'b' has shape \(2,\), but 'bias' needs \(3,\)"):
        KeyReader(WEIGHTS, "'x.pt'").take("b", "bias", (3,))
    reader.take("b", "bias")
    reader.drop("statistics", "training only")
    reader.drop("never there", "training only")
    reader.finish()
    assert reader.used == {"layer.weight": "a.weight", "bias": "b"}
    assert reader.dropped == {"statistics": "training only"}
    with pytest.raises(ValueError, match="no tensor 'b'"):
        reader.take("b", "bias")
