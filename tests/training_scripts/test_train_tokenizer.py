"""Training a tokenizer: what a run promises about resuming, processes and bad input, on tiny real classes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from dinotok.hub import load_tokenizer
from dinotok.tokenizer_training import build_tokenizer, parse_losses
from dinotok.training import Checkpoints, parse_options
from tests.conftest import TINY_DECODER, save_tiny_encoder
from tests.tiny_tokenizers import save_picture
from training_scripts import train_tokenizer
from training_scripts.train_tokenizer import TokenizerOptions

ROOT = Path(__file__).parents[2]
RECIPES = {
    "autoencoder": {"_class_name": "AutoencoderDINOTok", "texture_channels": 8, **TINY_DECODER},
    "discrete": {
        "_class_name": "VQModelDINOTok",
        "texture_channels": 8,
        "semantic_codebook_size": 16,
        "texture_codebook_size": 16,
        "rank": 8,
        **TINY_DECODER,
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Pictures of several sizes, a tiny encoder, and recipes that stand on it."""
    folder = tmp_path_factory.mktemp("training")
    for index in range(8):
        save_picture(folder / "pictures" / f"{index}.png", 80 + 8 * index, 96 - 4 * index, seed=index)
    encoder = save_tiny_encoder(folder / "encoder", seed=0)
    for name, recipe in RECIPES.items():
        (folder / f"{name}.json").write_text(json.dumps({"encoder": str(encoder), **recipe}))
    return folder


@pytest.fixture(autouse=True)
def small_fits(monkeypatch):
    """Closed-form starts on 16 crops, and adversaries that start at once."""
    monkeypatch.setattr(train_tokenizer, "FIT_CROPS", 16)
    monkeypatch.setattr(train_tokenizer, "DISCRIMINATOR_WARMUP", 1)
    monkeypatch.setattr(train_tokenizer, "DISCRIMINATOR_RAMP", 2)
    yield
    AcceleratorState._reset_state(True)


def options(folder: Path, output: Path, recipe: str = "autoencoder", **values) -> TokenizerOptions:
    defaults = TokenizerOptions(
        model=str(folder / f"{recipe}.json"),
        dataset=str(folder / "pictures"),
        output_dir=str(output),
        resolution=64,
        batch_size=2,
        max_train_steps=4,
        learning_rate=1e-2,
        checkpointing_steps=2,
        num_workers=0,
        losses=["l1=1", "codebook=1"],
    )
    return replace(defaults, **values)


def run(chosen: TokenizerOptions):
    AcceleratorState._reset_state(True)
    return train_tokenizer.main(chosen)


def weights(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "tokenizer" / "diffusion_pytorch_model.safetensors")


def assert_same(first: Path, second: Path) -> None:
    one, other = weights(first), weights(second)
    assert one.keys() == other.keys()
    for key in one:
        assert torch.equal(one[key], other[key]), key


@pytest.mark.parametrize("recipe", ["autoencoder", "discrete"])
def test_a_resumed_run_is_bit_identical_to_a_straight_one(folder, tmp_path, recipe):
    losses = ["l1=1", "l2=0.5", "codebook=1", "semantic=0.1", "adversarial=0.5"]
    arguments = {"losses": losses, "adversarial_start": 1, "gradient_accumulation_steps": 2}
    run(options(folder, tmp_path / "straight", recipe, **arguments))
    resumed = tmp_path / "resumed"
    chosen = options(folder, resumed, recipe, **arguments)
    run(chosen)
    # As a run that was killed while it wrote its last checkpoint: the first one is there, and a torn one.
    shutil.rmtree(resumed / "tokenizer")
    (resumed / "checkpoint-4").rename(resumed / ".unfinished-4")
    torch.manual_seed(123)  # nothing may depend on what was drawn before
    run(replace(chosen, resume_from_checkpoint="latest"))
    assert_same(tmp_path / "straight", resumed)
    assert not (resumed / ".unfinished-4").exists()


def test_training_changes_the_model_and_leaves_the_encoder_alone(folder, tmp_path):
    run(options(folder, tmp_path, "discrete"))
    start = load_file(tmp_path / "start" / "diffusion_pytorch_model.safetensors")
    trained = weights(tmp_path)
    changed = {key for key in start if not torch.equal(start[key], trained[key])}
    assert {"decoder.conv_out.weight", "texture_projection.weight", "texture_quantizer.codebook"} <= changed
    assert "semantic_quantizer.codebook" in changed  # by its moving averages
    assert not any(key.startswith("encoder.") for key in changed)
    record = json.loads((tmp_path / "tokenizer" / "training.json").read_text())
    assert record["steps"] == 4 and record["validation/psnr"] > 5
    assert 0 < record["validation/semantic_usage"] <= 1
    assert (tmp_path / "validation" / "step-00000004.png").is_file()
    assert (tmp_path / "tokenizer" / "README.md").read_text().startswith("---\nlibrary_name: diffusers")
    latents = load_tokenizer(str(tmp_path / "tokenizer")).encode(torch.zeros(1, 3, 32, 48)).latent
    assert latents.shape == (1, 40, 2, 3)


def test_without_the_codebook_loss_only_what_decodes_codes_is_trained(folder, tmp_path):
    tokenizer = run(options(folder, tmp_path, "discrete", losses=["l1=1"]))
    start = load_tokenizer(str(tmp_path / "start"))
    pixels = torch.rand(2, 3, 32, 32) * 2 - 1
    assert torch.equal(tokenizer.encode_to_indices(pixels), start.encode_to_indices(pixels))
    assert not torch.equal(tokenizer.decoder.conv_out.weight, start.decoder.conv_out.weight)


def test_the_record_runs_the_training_again(folder, tmp_path):
    run(options(folder, tmp_path / "first"))
    record = json.loads((tmp_path / "first" / "tokenizer" / "training.json").read_text())
    record["options"]["output_dir"] = str(tmp_path / "second")
    (tmp_path / "again.json").write_text(json.dumps(record))
    run(parse_options(TokenizerOptions, [str(tmp_path / "again.json")]))
    assert_same(tmp_path / "first", tmp_path / "second")


def test_checkpoints_are_pruned_and_not_overwritten(folder, tmp_path):
    chosen = options(folder, tmp_path, checkpointing_steps=1)
    run(chosen)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-4"]
    with pytest.raises(FileExistsError, match="checkpoint of step 4.*resume_from_checkpoint"):
        run(chosen)


def test_steps_without_finite_losses_are_skipped_and_then_stop_the_run(folder, tmp_path, monkeypatch):
    chosen = options(folder, tmp_path, max_train_steps=40, checkpointing_steps=2)
    own, calls = train_tokenizer.reconstruction_loss, []

    def broken(*arguments):
        calls.append(1)
        loss, values = own(*arguments)
        return (loss * torch.nan if len(calls) > 3 else loss), values

    monkeypatch.setattr(train_tokenizer, "reconstruction_loss", broken)
    with pytest.raises(FloatingPointError, match="in a row"):
        run(chosen)
    for path in tmp_path.glob("checkpoint-*"):
        state = load_file(path / "model.safetensors")
        assert all(values.isfinite().all() for values in state.values() if values.is_floating_point())


def command(folder: Path, output: Path, *more: str) -> list[str]:
    return [
        *("--model", str(folder / "discrete.json"), "--dataset", str(folder / "pictures")),
        *("--output_dir", str(output), "--resolution", "64", "--num_workers", "0", "--learning_rate", "1e-2"),
        *more,
    ]


def environment() -> dict[str, str]:
    paths = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
    return {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


@pytest.mark.slow
def test_sigterm_saves_and_ends_well_and_kill_loses_no_checkpoint(folder, tmp_path):
    script = [sys.executable, str(ROOT / "training_scripts" / "train_tokenizer.py")]
    endless = ["--max_train_steps", "100000", "--batch_size", "2", "--checkpointing_steps", "5"]
    call = [*script, *command(folder, tmp_path, *endless, "--resume_from_checkpoint", "latest")]
    with open(tmp_path / "log", "w") as log:
        killed = subprocess.Popen(call, env=environment(), stdout=log, stderr=log)
        wait_for(tmp_path / "checkpoint-5")
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        done = max(int(path.name.split("-")[1]) for path in tmp_path.glob("checkpoint-*"))
        stopped = subprocess.Popen(call, env=environment(), stdout=log, stderr=log)
        wait_for(tmp_path / f"checkpoint-{done + 5}")
        stopped.send_signal(signal.SIGTERM)
        assert stopped.wait(timeout=120) == 0
    assert "Stopped after step" in (tmp_path / "log").read_text()
    steps = json.loads((tmp_path / "tokenizer" / "training.json").read_text())["steps"]
    assert steps > done and (tmp_path / f"checkpoint-{steps}").is_dir()


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 240
    while not path.is_dir():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
def test_two_processes_make_the_model_of_one_with_the_joined_batch(folder, tmp_path):
    """Equal up to the order of float32 sums: at most 5e-5 after four steps of up to 1e-2.

    A bias of attention's keys changes nothing, so its gradient is rounding alone, which Adam makes into whole steps.
    """
    shared = ["--max_train_steps", "4", "--checkpointing_steps", "4", "--losses", "l1=1", "codebook=1", "semantic=0.1"]
    # The same start for both: a fit divides its pictures, and sums in another order.
    run(options(folder, tmp_path / "start", "discrete", max_train_steps=1, checkpointing_steps=1))
    shared += ["--model", str(tmp_path / "start" / "start")]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    script = str(ROOT / "training_scripts" / "train_tokenizer.py")
    for name, processes, batch in (("one", "1", "4"), ("two", "2", "2")):
        arguments = command(folder, tmp_path / name, *shared, "--batch_size", batch)
        call = [*launcher, "--nproc-per-node", processes, script, *arguments]
        subprocess.run(call, env=environment(), check=True, timeout=300)
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    for key in one:
        if not key.endswith("to_k.bias"):
            torch.testing.assert_close(
                two[key], one[key], rtol=1e-3, atol=5e-5, msg=lambda text, key=key: f"{key}: {text}"
            )
    records = [json.loads((tmp_path / n / "tokenizer" / "training.json").read_text()) for n in ("one", "two")]
    assert records[0]["validation/psnr"] == pytest.approx(records[1]["validation/psnr"], abs=1e-3)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["l1"], "'l1' has no number"),
        (["l1=1", "l1=2"], "'l1=2' is not one of"),
        (["perceptual=1"], "'perceptual=1' is not one of"),
        (["l1=-1"], "'l1=-1' is not a finite weight"),
        (["codebook=1"], "no reconstruction loss"),
    ],
)
def test_bad_losses_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        parse_losses(values)


def test_bad_recipes_and_options_are_named(folder, tmp_path):
    for recipe, message in (
        ({"encoder": "x"}, "_class_name=None"),
        ({"_class_name": "AutoencoderKL"}, "_class_name='AutoencoderKL'"),
        ({"_class_name": "AutoencoderDINOTok"}, "names no encoder"),
        ({"_class_name": "AutoencoderDINOTok", "autoencoder": "x"}, "not from an autoencoder"),
    ):
        (tmp_path / "recipe.json").write_text(json.dumps(recipe))
        with pytest.raises(ValueError, match=message):
            build_tokenizer(str(tmp_path / "recipe.json"))
    (tmp_path / "options.json").write_text(json.dumps({"batchsize": 3}))
    with pytest.raises(ValueError, match="unknown option 'batchsize'"):
        parse_options(TokenizerOptions, [str(tmp_path / "options.json")])
    with pytest.raises(ValueError, match="mixed_precision='fp16'"):
        run(options(folder, tmp_path / "run", mixed_precision="fp16"))
    with pytest.raises(ValueError, match="pass --perceptual_net"):
        run(options(folder, tmp_path / "run", losses=["l1=1", "lpips=1"]))


def test_a_checkpoint_of_another_model_is_refused(folder, tmp_path):
    run(options(folder, tmp_path))
    accelerator = Accelerator(cpu=True)
    accelerator.prepare(torch.nn.Linear(2, 2))
    checkpoints = Checkpoints(tmp_path, accelerator)
    with pytest.raises(ValueError, match="of another model"):
        checkpoints.load(checkpoints.find("latest"))
    with pytest.raises(FileNotFoundError, match="not the folder of a checkpoint"):
        checkpoints.find(str(tmp_path / "start"))


def test_there_are_fewer_than_25_options():
    assert len(TokenizerOptions.__dataclass_fields__) < 25
