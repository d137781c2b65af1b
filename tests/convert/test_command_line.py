"""`dinotok convert` for the generators: a folder that loads, an account of every tensor, clear errors."""

import json

import pytest
import torch
from diffusers import ModelMixin
from typer.testing import CliRunner

import dinotok
from dinotok.cli import app
from tests.convert import test_dit_dh, test_gpt, test_rar

FAMILIES = {
    "dit-dh": (test_dit_dh.WEIGHTS, []),
    "gpt": (test_gpt.WEIGHTS, ["--attention-heads", "2"]),
    "rar": (test_rar.official_weights(), []),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_converted_folder_loads_and_accounts_for_every_tensor(tmp_path, family):
    weights, options = FAMILIES[family]
    torch.save({"ema": weights}, tmp_path / "model.pt")
    output = tmp_path / "converted"
    result = CliRunner().invoke(app, ["convert", family, str(tmp_path / "model.pt"), str(output), *options])
    assert result.exit_code == 0, result.output
    account = json.loads((output / "conversion.json").read_text())
    assert {*account["used"].values(), *account["dropped"]} == set(weights)
    assert account["checkpoint"] == "model.pt" and account["class_name"] in result.output
    model = getattr(dinotok, account["class_name"]).from_pretrained(output)
    assert isinstance(model, ModelMixin)
    names = {name.split("[")[0] for names in account["used"] for name in names.split(", ")}  # parts of tensors, or two
    parameters = set(model.state_dict())
    assert all(any(known.startswith(name) for known in parameters) for name in names)


@pytest.mark.parametrize("family", FAMILIES)
def test_another_models_file_is_an_error_and_nothing_is_written(tmp_path, family):
    torch.save({"ema": {"a": torch.ones(2)}}, tmp_path / "model.pt")
    result = CliRunner().invoke(app, ["convert", family, str(tmp_path / "model.pt"), str(tmp_path / "out")])
    assert result.exit_code == 2 and "tensor" in result.output, result.output
    assert not (tmp_path / "out").exists()
