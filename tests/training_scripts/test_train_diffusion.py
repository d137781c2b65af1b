"""Caching latents and training a denoiser on them: what a run promises, on tiny real classes."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file

from dinotok import DiffusionTransformer2DModel, DINOTokDiTPipeline
from dinotok.data import PictureTransform, to_pixels
from dinotok.diffusion_training import DenoisingObjective, Draws, channel_weights, make_draws
from dinotok.flow_matching import dimension_shift, interpolate, shift_time
from dinotok.hub import load_tokenizer
from dinotok.latent_caches import open_latent_cache
from dinotok.training import parse_options
from tests.tiny_tokenizers import save_picture, tiny_discrete_tokenizer, tiny_tokenizer
from training_scripts import cache_latents, train_diffusion
from training_scripts.cache_latents import CacheOptions
from training_scripts.train_diffusion import DiffusionOptions

MODEL = {
    "_class_name": "DiffusionTransformer2DModel",
    "hidden_size": 16,
    "num_layers": 1,
    "num_attention_heads": 2,
    "in_channels": 1,
    "num_classes": 1,
}
CLASSES = ["cat", "dog"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Pictures of two classes, a tokenizer, a configuration, and latents of the pictures."""
    folder = tmp_path_factory.mktemp("diffusion")
    for index in range(6):
        save_picture(folder / "pictures" / CLASSES[index % 2] / f"{index}.png", 40 + 8 * index, 60, seed=index)
    tiny_tokenizer().save_pretrained(folder / "tokenizer")
    (folder / "model.json").write_text(json.dumps(MODEL))
    cache(folder, folder / "latents")
    return folder


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    monkeypatch.setattr("dinotok.diffusion_training.SHEET_STEPS", 2)
    monkeypatch.setattr("dinotok.diffusion_training.SHEET_SEEDS", 2)
    yield
    AcceleratorState._reset_state(True)


def cache(folder: Path, output: Path, **values) -> Path:
    AcceleratorState._reset_state(True)
    return cache_latents.main(
        CacheOptions(
            **{
                "tokenizer": str(folder / "tokenizer"),
                "dataset": str(folder / "pictures"),
                "output_dir": str(output),
                "resolution": 32,
                "batch_size": 2,
                "shard_size": 4,
                "dtype": "float32",
                "num_workers": 0,
                **values,
            }
        )
    )


def options(folder: Path, output: Path, **values) -> DiffusionOptions:
    defaults = DiffusionOptions(
        model=str(folder / "model.json"),
        dataset=str(folder / "latents"),
        output_dir=str(output),
        tokenizer=str(folder / "tokenizer"),
        resolution=32,
        batch_size=4,
        max_train_steps=4,
        learning_rate=1e-2,
        warmup_steps=1,
        checkpointing_steps=2,
        ema_decay=0.5,
        num_workers=0,
    )
    return replace(defaults, **values)


def run(chosen: DiffusionOptions) -> DiffusionTransformer2DModel:
    AcceleratorState._reset_state(True)
    return train_diffusion.main(chosen)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")


# The cache


@torch.no_grad()
def test_cached_latents_are_those_of_the_pictures_and_of_their_mirror_images(folder):
    found = open_latent_cache(folder / "latents")
    assert len(found) == 12 and found.description.label_names == CLASSES and found.description.shape == [40, 2, 2]
    tokenizer, transform = load_tokenizer(str(folder / "tokenizer")), PictureTransform(32, "center")
    files = sorted((folder / "pictures").rglob("*.png"))  # by class, as load_pictures reads folders
    for index, file in enumerate(files):
        pixels = to_pixels(transform(file.read_bytes(), torch.Generator())[None])
        for row, view in ((index, pixels), (index + 6, pixels.flip(3))):
            latents, label = found.row(row)
            torch.testing.assert_close(latents[None], tokenizer.encode(view).latent, atol=1e-4, rtol=1e-4)
            assert CLASSES[label] == file.parent.name


def test_an_interrupted_cache_ends_as_a_straight_one(folder, tmp_path):
    cache(folder, tmp_path)
    (tmp_path / "latents-01-00001.safetensors").unlink()
    before = (tmp_path / "latents-00-00000.safetensors").stat().st_mtime_ns
    cache(folder, tmp_path)
    for path in (folder / "latents").glob("*.safetensors"):
        straight, resumed = load_file(path), load_file(tmp_path / path.name)
        assert all(torch.equal(straight[name], resumed[name]) for name in ("latents", "labels", "pictures"))
    assert (tmp_path / "latents-00-00000.safetensors").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="has latents with seed=0, not 1"):
        cache(folder, tmp_path, seed=1)


def test_what_cannot_be_cached_is_named(folder, tmp_path):
    tiny_discrete_tokenizer().save_pretrained(tmp_path / "discrete")
    with pytest.raises(ValueError, match="is discrete"):
        cache(folder, tmp_path / "out", tokenizer=str(tmp_path / "discrete"))
    with pytest.raises(ValueError, match="no column 'label'"):
        cache(folder, tmp_path / "out", dataset=str(folder / "pictures" / "cat"))


# Training


@pytest.mark.parametrize("data", ["latents", "pictures"])
def test_a_resumed_run_is_bit_identical_to_a_straight_one(folder, tmp_path, data):
    arguments = {"dataset": str(folder / data), "time_distribution": "logit_normal"}
    run(options(folder, tmp_path / "straight", **arguments))
    run(options(folder, tmp_path / "resumed", **arguments))
    (tmp_path / "resumed" / "checkpoint-4").rename(tmp_path / "resumed" / ".unfinished-4")  # as a killed run
    (tmp_path / "resumed" / "pipeline" / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    torch.manual_seed(123)  # nothing may depend on what was drawn before
    run(options(folder, tmp_path / "resumed", resume_from_checkpoint="latest", **arguments))
    one, other = weights(tmp_path / "straight" / "pipeline"), weights(tmp_path / "resumed" / "pipeline")
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_the_result_is_a_pipeline_with_a_record_and_sheets(folder, tmp_path):
    model = run(options(folder, tmp_path, validation_dataset=str(folder / "latents"), time_shift=2.0))
    pipeline = DINOTokDiTPipeline.from_pretrained(tmp_path / "pipeline")
    assert pipeline.config.id2label == {"0": "cat", "1": "dog"}
    assert pipeline.scheduler.config.shift == 2 and not pipeline.scheduler.config.use_dynamic_shifting
    assert (pipeline.transformer.config.in_channels, pipeline.transformer.config.num_classes) == (40, 2)
    for name, value in model.state_dict().items():
        assert torch.equal(value, pipeline.transformer.state_dict()[name])
    record = json.loads((tmp_path / "pipeline" / "training.json").read_text())
    assert record["steps"] == 4 and 0 < record["validation/loss"] < 10
    with Image.open(tmp_path / "samples" / "step-00000004.png") as sheet:
        assert sheet.size == (64, 64)  # two seeds by two classes of 32 pixels
    assert len(pipeline("dog", num_inference_steps=1).images) == 1


def test_the_record_runs_the_training_again(folder, tmp_path):
    run(options(folder, tmp_path / "first"))
    record = json.loads((tmp_path / "first" / "pipeline" / "training.json").read_text())
    record["options"]["output_dir"] = str(tmp_path / "second")
    (tmp_path / "again.json").write_text(json.dumps(record))
    run(parse_options(DiffusionOptions, [str(tmp_path / "again.json")]))
    one, other = weights(tmp_path / "first" / "pipeline"), weights(tmp_path / "second" / "pipeline")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_training_lowers_the_loss(folder, tmp_path):
    arguments = {"validation_dataset": str(folder / "latents"), "checkpointing_steps": 200, "tokenizer": None}
    losses = []
    for steps in (1, 200):
        run(options(folder, tmp_path / str(steps), max_train_steps=steps, **arguments))
        record = json.loads((tmp_path / str(steps) / "transformer" / "training.json").read_text())
        losses.append(record["validation/loss"])
    assert losses[1] < 0.8 * losses[0]


def test_adapters_are_trained_alone_and_load_into_the_pipeline(folder, tmp_path):
    run(options(folder, tmp_path / "base"))
    base = tmp_path / "base" / "pipeline"
    tuned = run(options(folder, tmp_path / "tuned", model=str(base), lora_rank=2, learning_rate=0.1))
    assert {p.name for p in (tmp_path / "tuned" / "lora").iterdir()} == {
        "pytorch_lora_weights.safetensors",
        "training.json",
    }
    pipeline = DINOTokDiTPipeline.from_pretrained(base)
    values = torch.randn(1, 40, 2, 2), torch.tensor([0.5]), torch.tensor([1])
    plain = pipeline.transformer(*values).sample
    pipeline.load_lora_weights(tmp_path / "tuned" / "lora")
    adapted = pipeline.transformer(*values).sample
    torch.testing.assert_close(adapted, tuned(*values).sample)
    assert (adapted - plain).abs().max() > 1e-3
    pipeline.unload_lora_weights()
    torch.testing.assert_close(pipeline.transformer(*values).sample, plain)


def test_steps_without_finite_losses_are_skipped_and_then_stop_the_run(folder, tmp_path, monkeypatch):
    own = DenoisingObjective.forward
    monkeypatch.setattr(DenoisingObjective, "forward", lambda *arguments: own(*arguments) * torch.nan)
    with pytest.raises(FloatingPointError, match="in a row"):
        run(options(folder, tmp_path, max_train_steps=40, checkpointing_steps=40))


def test_what_does_not_fit_is_named(folder, tmp_path):
    with pytest.raises(ValueError, match="pictures need a continuous --tokenizer"):
        run(options(folder, tmp_path / "a", dataset=str(folder / "pictures"), tokenizer=None))
    DiffusionTransformer2DModel.from_config({**MODEL, "in_channels": 7}).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="has in_channels=7, but the data has 40"):
        run(options(folder, tmp_path / "b", model=str(tmp_path / "other")))


# What is random


def test_draws_are_a_function_of_seed_step_and_process(folder, tmp_path):
    chosen = options(folder, tmp_path, class_dropout=0.25)
    latents, labels = torch.zeros(64, 4, 8, 8), torch.ones(64, dtype=torch.int64)
    first, again = (make_draws(chosen, latents, labels, 2, step=3, rank=1) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    for values in ({"step": 4, "rank": 1}, {"step": 3, "rank": 0}):
        other = make_draws(chosen, latents, labels, 2, **values)
        assert not torch.equal(first.noise, other.noise) and not torch.equal(first.times, other.times)
    halves = [make_draws(chosen, latents[:32], labels[:32], 2, step=3, rank=rank) for rank in (2, 3)]
    for whole, parts in zip(first, zip(*halves, strict=True), strict=True):
        assert torch.equal(whole, torch.cat(parts))  # two processes of half the batch
    many = [make_draws(chosen, latents, labels, 2, step, 0) for step in range(30)]
    dropped = torch.cat([draws.labels for draws in many])
    assert set(dropped.tolist()) == {1, 2} and (dropped == 2).float().mean() == pytest.approx(0.25, abs=0.03)
    times = torch.cat([draws.times for draws in many])
    expected = shift_time(torch.tensor(0.5), dimension_shift(4 * 8 * 8))
    assert times.median() == pytest.approx(expected.item(), abs=0.02)


@torch.no_grad()
def test_the_loss_is_that_of_the_velocity(folder):
    torch.manual_seed(0)
    model = DiffusionTransformer2DModel.from_config({**MODEL, "in_channels": 3, "num_classes": 2})
    torch.nn.init.normal_(model.output.projection.weight)
    latents, noise = torch.randn(2, 3, 2, 2), torch.randn(2, 3, 2, 2)
    draws = Draws(torch.tensor([0, 2]), torch.tensor([0.3, 0.8]), noise)
    velocity = model(interpolate(latents, noise, draws.times), draws.times, draws.labels).sample
    expected = (velocity - (noise - latents)).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(DenoisingObjective(model)(latents, draws), expected)


def test_channels_are_weighted_by_what_they_do_to_pixels(folder, tmp_path):
    """Half of the weights is that of the decoder's Jacobian: nothing for a channel that the decoder ignores."""
    tokenizer = load_tokenizer(folder / "tokenizer")
    with torch.no_grad():
        tokenizer.decoder.conv_out.weight.zero_()
        tokenizer.linear_decoder.weight[:, 3] = 0
        tokenizer.linear_decoder.weight[:, 5] = 2 * tokenizer.linear_decoder.weight[:, 4]
    latents = torch.randn(2, 40, 3, 2)
    weights = channel_weights(tokenizer, latents)
    norms = (
        tokenizer.linear_decoder.weight.detach()[:, :, 0, 0].norm(dim=0) / tokenizer.decoder_input.std[0, 32:, 0, 0]
    )
    norms = norms * tokenizer.latents_std[32:]
    expected = 0.5 + 0.5 * torch.cat([torch.zeros(32), norms.float() / norms.mean() * 5])
    torch.testing.assert_close(weights, expected, rtol=1e-3, atol=1e-4)
    assert weights[35] == 0.5 and weights.mean().item() == pytest.approx(1)

    model = DiffusionTransformer2DModel(**{**MODEL, "in_channels": 40, "num_classes": 2})
    draws = Draws(torch.tensor([0, 1]), torch.tensor([0.3, 0.8]), torch.randn(2, 40, 3, 2))
    plain = DenoisingObjective(model)
    parts = [DenoisingObjective(model, weights * (torch.arange(40) == c))(latents, draws) for c in range(40)]
    torch.testing.assert_close(sum(parts), DenoisingObjective(model, weights)(latents, draws))
    torch.testing.assert_close(DenoisingObjective(model, torch.ones(40))(latents, draws), plain(latents, draws))

    run = train_diffusion.main(options(folder, tmp_path / "run", channel_weighting="decoder"))
    assert torch.isfinite(torch.cat([parameter.flatten() for parameter in run.parameters()])).all()
    with pytest.raises(ValueError, match="needs a --tokenizer"):
        train_diffusion.main(options(folder, tmp_path / "no", channel_weighting="decoder", tokenizer=None))


def test_there_are_fewer_than_25_options():
    assert len(DiffusionOptions.__dataclass_fields__) < 25
