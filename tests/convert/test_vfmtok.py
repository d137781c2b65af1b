"""Converted checkpoints compute what the authors' code does, and every tensor is accounted for."""

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from dinotok import AutoencoderVFMTok, EncoderUnavailableError, VQModelVFMTok
from dinotok.cli import app
from dinotok.configs import config_path
from dinotok.convert.vfmtok import convert_vfmae, convert_vfmtok, read_latents_statistics

GOLDEN = Path(__file__).parents[1] / "data" / "vfmtok"
ENCODER = str(GOLDEN / "encoder")
SIZES = {"encoder_image_size": 56, "num_attention_heads": 4}
FAMILIES = {
    "vfmtok": (convert_vfmtok, VQModelVFMTok, 1, {**SIZES, "image_size": 64}),
    "vfmae": (convert_vfmae, AutoencoderVFMTok, 2, SIZES),
}
each_family = pytest.mark.parametrize("family", FAMILIES)


def released(family: str) -> dict[str, torch.Tensor]:
    """The weights the golden outputs were made with, in the released layout; see the README beside them."""
    random = np.random.RandomState(FAMILIES[family][2])
    rows = json.loads((GOLDEN / f"{family}.json").read_text())
    return {
        name: torch.from_numpy((mean + scale * random.standard_normal(shape)).astype(np.float32))
        for name, (shape, mean, scale) in rows.items()
    }


def save_released(folder: Path, family: str, **changes: torch.Tensor | None) -> Path:
    weights = {name: value for name, value in (released(family) | changes).items() if value is not None}
    content = {"model": {}, "ema": weights, "steps": 5, "args": argparse.Namespace(lr=1e-4)}
    torch.save(content, folder / f"{family}.pt")
    return folder / f"{family}.pt"


def convert(folder: Path, family: str, **changes):
    function, _, _, sizes = FAMILIES[family]
    return function(save_released(folder, family, **changes), folder / "out", encoder=ENCODER, **sizes)


def raster(grid: torch.Tensor) -> torch.Tensor:
    return grid.flatten(2).transpose(1, 2)


@torch.no_grad()
@each_family
def test_a_converted_model_computes_what_the_authors_code_does(tmp_path, family):
    convert(tmp_path, family)
    model = FAMILIES[family][1].from_pretrained(tmp_path / "out")
    expected = load_file(GOLDEN / f"{family}.safetensors")

    def check(values: torch.Tensor, name: str):
        torch.testing.assert_close(values, expected[name], rtol=0, atol=1e-4, msg=lambda text: f"{name}: {text}")

    check(model.sampler(model._levels(expected["pixels"])), "slots")
    latents = model.encode(expected["pixels"]).latent
    if family == "vfmtok":
        check(raster(latents), "latents")
        found = model.quantize(latents)
        assert torch.equal(found.indices.flatten(1), expected["indices"])
        latents = found.latents
        check(raster(latents), "quant")
    else:
        check(latents, "latents")
    check(model.decode(latents).sample, "image")
    check(model.predict_feature_tokens(latents), "semantics")
    assert not model.training and model.config.levels == [1, 2, 3, 4]


@each_family
def test_the_report_names_every_tensor(tmp_path, family):
    extra = {"slot_quantize.codebook_used": torch.zeros(9), "encode_transformer.backbone.cls_token": torch.zeros(1)}
    report = convert(tmp_path, family, **(extra if family == "vfmtok" else {}))
    written = json.loads((tmp_path / "out" / "conversion.json").read_text())
    assert sorted(written["used"].values()) == sorted(released(family))
    assert written["used"] == report.used and written["class_name"] == FAMILIES[family][1].__name__
    assert set(written["dropped"]) == (set(extra) if family == "vfmtok" else set())
    model = FAMILIES[family][1].from_pretrained(tmp_path / "out")
    assert set(report.used) == {name for name in model.state_dict() if not name.startswith("encoder.")}
    assert str(tmp_path) not in json.dumps(written)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("vfmtok", {"pre_slots_quant.bias": None}, "has no tensor 'pre_slots_quant.bias'"),
        ("vfmtok", {"unknown": torch.zeros(1)}, "1 tensors that the model does not, first 'unknown'"),
        ("vfmtok", {"slot_quantize.embedding.weight": None}, "is no VFMTok tokenizer"),
        ("vfmae", {"slots_quant.conv_out.weight": None}, "is no VFMAE tokenizer"),
        ("vfmae", {"slots_quant.conv_out.bias": torch.zeros(3)}, r"conv_out.bias' has shape \(3,\), but .* \(8,\)"),
        ("vfmae", {"decode_transformer.position_embedding": torch.zeros(1, 19, 32)}, "18 tokens .* not a square"),
        ("vfmae", {"encode_transformer.carrier_tokens": None}, "no tensor 'encode_transformer.carrier_tokens'"),
        ("vfmtok", {"decoder.mid.1.q.weight": torch.zeros(32, 32)}, "'decoder.mid.1.q.weight' has shape"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, family, changes, message):
    with pytest.raises(ValueError, match=message):
        convert(tmp_path, family, **changes)
    assert not (tmp_path / "out").exists()


def test_truncated_files_are_named(tmp_path):
    path = save_released(tmp_path, "vfmtok")
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="vfmtok.pt.*damaged"):
        convert_vfmtok(path, tmp_path / "out", encoder=ENCODER)


@pytest.mark.parametrize(
    ("name", "model_class", "tensors"),
    [("vq_model_vfmtok", VQModelVFMTok, 429), ("autoencoder_vfmtok", AutoencoderVFMTok, 453)],
)
def test_bundled_configurations_are_those_of_the_release(name, model_class, tensors):
    config = model_class.load_config(config_path(f"{name}_dinov2_large"))
    with torch.device("meta"):
        model = model_class.from_config(config)
        by_default = model_class(config["encoder_config"])  # the constructor's defaults are the release
    own = {key: value.shape for key, value in model.state_dict().items() if not key.startswith("encoder.")}
    assert len(own) == tensors
    assert own == {key: value.shape for key, value in by_default.state_dict().items() if key in own}
    ours, defaults = (json.loads(made.to_json_string()) for made in (model, by_default))
    differing = {key for key in config if key[0] != "_" and ours[key] != defaults[key]}
    assert differing == {"attention_dropout", "encoder_repository"}


@pytest.mark.parametrize("shape", [(8, 16), (1, 8, 4, 4)])
def test_statistics_per_position_go_into_the_config(tmp_path, shape):
    random = np.random.default_rng(0)
    mean = random.normal(size=shape).astype(np.float32)
    deviation = random.uniform(0.2, 0.5, size=shape).astype(np.float32)
    torch.save({"mean": mean, "var": deviation}, tmp_path / "stats.pt")
    found, std = read_latents_statistics(tmp_path / "stats.pt")
    assert found.shape == std.shape == (8, 16)
    assert torch.equal(std, torch.from_numpy(deviation).view(8, 16) + 1e-5)
    checkpoint = save_released(tmp_path, "vfmae")
    convert_vfmae(checkpoint, tmp_path / "out", encoder=ENCODER, statistics=tmp_path / "stats.pt", **SIZES)
    model = AutoencoderVFMTok.from_pretrained(tmp_path / "out")
    expected = load_file(GOLDEN / "vfmae.safetensors")
    with torch.no_grad():
        latents = model.encode(expected["pixels"]).latent
        mean, deviation = (torch.from_numpy(values).view(1, 8, 4, 4) for values in (mean, deviation))
        torch.testing.assert_close(latents, (expected["latents"] - mean) / (deviation + 1e-5), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(model.decode(latents).sample, expected["image"], rtol=0, atol=1e-4)
    assert model.latents_mean.shape == (8, 4, 4)


class Unwanted:
    """An object whose pickle would have to import this class."""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"mean": torch.zeros(3, 4)}, "no tensors or arrays 'mean' and 'var'"),
        ({"mean": torch.zeros(3, 4), "var": torch.zeros(3, 4)}, "positive"),
        ({"mean": torch.zeros(3, 4), "var": torch.ones(3, 5)}, "one shape"),
        ({"mean": Unwanted(), "var": 1}, "damaged, or no file of statistics"),
    ],
)
def test_wrong_statistics_are_refused(tmp_path, content, message):
    torch.save(content, tmp_path / "stats.pt")
    with pytest.raises(ValueError, match=message):
        read_latents_statistics(tmp_path / "stats.pt")


def run(*arguments) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, result.output


def test_the_command_line(tmp_path):
    options = ["--encoder", ENCODER, "--encoder-image-size", 56, "--attention-heads", 4]
    checkpoint = save_released(tmp_path, "vfmtok")
    status, output = run("convert", "vfmtok", checkpoint, tmp_path / "vq", *options, "--image-size", 64)
    assert status == 0, output
    assert f"VQModelVFMTok from {len(released('vfmtok'))} tensors of vfmtok.pt" in output
    flat = tmp_path / "vfmae.safetensors"
    save_file(released("vfmae"), flat)
    status, output = run("convert", "vfmae", flat, tmp_path / "ae", *options)
    assert status == 0, output
    assert AutoencoderVFMTok.from_pretrained(tmp_path / "ae").config.latent_channels == 8
    status, output = run("convert", "vfmae", checkpoint, tmp_path / "no", *options)
    assert status == 2 and "is no VFMAE tokenizer" in output


def test_without_an_encoder_the_one_of_the_release_is_named(tmp_path):
    weights = released("vfmtok")
    for level in range(4):
        weights[f"encode_transformer.projectors.{level}.mlp.0.weight"] = torch.randn(32, 1024)
    torch.save(weights, tmp_path / "flat.pt")
    convert_vfmtok(tmp_path / "flat.pt", tmp_path / "out", image_size=64, num_attention_heads=4)
    saved = json.loads((tmp_path / "out" / "config.json").read_text())
    assert saved["encoder_repository"] == "facebook/dinov2-with-registers-large"
    assert saved["encoder_digest"] is None and saved["levels"] == [6, 12, 18, 24]
    with pytest.raises(EncoderUnavailableError, match="dinov2-with-registers-large"):
        VQModelVFMTok.from_pretrained(tmp_path / "out")
