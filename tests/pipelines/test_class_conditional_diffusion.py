"""The class-conditional pipeline: sampling against formulas, every kind of tokenizer, and every way to load it."""

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderRAE,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from dinotok import DiffusionTransformer2DModel, DINOTokDiTPipeline
from dinotok.flow_matching import dimension_shift, reference_sigma_grid, shift_time, sigma_grid
from dinotok.pipelines import class_conditional_diffusion
from tests.conftest import randomize
from tests.tiny_tokenizers import tiny_tokenizer

LABELS = {0: "church, church building", 1: "crane", 2: "Golden Retriever", 3: "crane"}
CHANNELS = 40


def tiny_transformer(seed: int = 0, in_channels: int = CHANNELS, **values) -> DiffusionTransformer2DModel:
    config = {"hidden_size": 32, "num_layers": 2, "num_attention_heads": 2, "sample_size": 2, "num_classes": 4}
    torch.manual_seed(0)  # the same frequencies
    return randomize(DiffusionTransformer2DModel(in_channels, **{**config, **values}), seed).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def quiet(pipeline: DINOTokDiTPipeline) -> DINOTokDiTPipeline:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def pipeline(tokenizer):
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    return quiet(DINOTokDiTPipeline(tiny_transformer(), tokenizer, scheduler, id2label=LABELS))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def latents_of(pipeline, labels, seed: int = 0, **arguments) -> torch.Tensor:
    arguments = {"num_inference_steps": 3, "output_type": "latent", "generator": seeded(seed), **arguments}
    return pipeline(labels, **arguments).images


# Sampling


def euler(velocity, latents: torch.Tensor, grid: list[float]) -> torch.Tensor:
    """Solve by hand, `velocity(latents, time)`."""
    for high, low in zip(grid[:-1], grid[1:], strict=True):
        latents = latents + (low - high) * velocity(latents, torch.full((len(latents),), high))
    return latents


def guided(strong, weak, labels, weak_labels, scale, interval=(0.0, 1.0)):
    def velocity(latents, time):
        plain = strong(latents, time, labels).sample
        if not interval[0] <= time[0] <= interval[1]:
            return plain
        other = weak(latents, time, weak_labels).sample
        return other + scale * (plain - other)

    return velocity


@torch.no_grad()
@pytest.mark.parametrize("scale", [1.0, 2.5, 0.0])
@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.3, 0.8)])
def test_classifier_free_guidance_is_the_formula(pipeline, scale, interval):
    labels, noise = torch.tensor([2, 0]), torch.randn(2, CHANNELS, 2, 3, generator=seeded())
    grid = sigma_grid(4, dimension_shift(CHANNELS * 2 * 3))
    assert any(time < 0.3 or time > 0.8 for time in grid[:-1]) and any(0.3 <= time <= 0.8 for time in grid[:-1])
    model = pipeline.transformer
    expected = euler(guided(model, model, labels, torch.tensor([4, 4]), scale, interval), noise, grid)
    result = latents_of(
        pipeline, labels, num_inference_steps=4, guidance_scale=scale, guidance_interval=interval, latents=noise
    )
    torch.testing.assert_close(result, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_with_a_guide_it_is_autoguidance(pipeline):
    guide = tiny_transformer(seed=1, num_layers=1)
    with_guide = quiet(DINOTokDiTPipeline(**{**pipeline.components, "guide": guide}))
    labels, noise = torch.tensor([1, 3]), torch.randn(2, CHANNELS, 2, 2, generator=seeded())
    grid = sigma_grid(3, dimension_shift(CHANNELS * 4))
    expected = euler(guided(pipeline.transformer, guide, labels, labels, 1.5), noise, grid)
    result = latents_of(with_guide, labels, guidance_scale=1.5, latents=noise)
    torch.testing.assert_close(result, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(latents_of(with_guide, labels), latents_of(pipeline, labels))  # scale 1


def count_rows(pipeline, **arguments) -> int:
    rows = []
    hook = pipeline.transformer.register_forward_pre_hook(lambda module, values: rows.append(len(values[0])))
    latents_of(pipeline, [0, 1], num_inference_steps=4, **arguments)
    hook.remove()
    return sum(rows)


def test_guidance_costs_only_where_it_acts(pipeline):
    assert count_rows(pipeline) == 8
    assert count_rows(pipeline, guidance_scale=2.0) == 16
    assert count_rows(pipeline, guidance_scale=2.0, guidance_interval=(0.9, 1.0)) == 10  # the first step only
    pipeline.scheduler = FlowMatchHeunDiscreteScheduler.from_config(pipeline.scheduler.config)
    assert count_rows(pipeline) == 14  # twice in each step but the last


@torch.no_grad()
def test_times_are_shifted_by_the_size_of_the_latents_or_as_the_scheduler_says(pipeline):
    latents_of(pipeline, 0, height=64, width=32, num_inference_steps=5)
    expected = sigma_grid(5, dimension_shift(CHANNELS * 4 * 2))
    assert pipeline.scheduler.sigmas.tolist() == pytest.approx(expected)
    for kind in (FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler):
        pipeline.scheduler = kind(shift=3.0)
        latents_of(pipeline, 0, num_inference_steps=5)
        assert sorted(set(pipeline.scheduler.sigmas.tolist())) == pytest.approx(sorted(sigma_grid(5, 3.0)))


@torch.no_grad()
def test_the_grid_of_the_reference_is_walked_as_it_is(pipeline):
    grid = reference_sigma_grid(6, 4.0)
    noise = torch.randn(1, CHANNELS, 2, 2, generator=seeded())
    model, label = pipeline.transformer, torch.tensor([1])
    expected = euler(lambda latents, time: model(latents, time, label).sample, noise, grid)
    result = latents_of(pipeline, 1, sigmas=grid, latents=noise)
    torch.testing.assert_close(result, expected, atol=1e-4, rtol=1e-4)
    assert grid[-1] == pytest.approx(shift_time(torch.tensor(0.001), 4.0).item())


@torch.no_grad()
def test_solvers_agree_with_many_steps_and_heun_is_closer_with_few(pipeline):
    fine = latents_of(pipeline, 2, num_inference_steps=400)
    euler_error = (latents_of(pipeline, 2, num_inference_steps=40) - fine).norm()
    pipeline.scheduler = FlowMatchHeunDiscreteScheduler.from_config(pipeline.scheduler.config)
    heun_error = (latents_of(pipeline, 2, num_inference_steps=20) - fine).norm()
    assert heun_error < euler_error < 0.1 * fine.norm()


def test_other_flow_matching_solvers_of_diffusers_run(pipeline):
    fine = latents_of(pipeline, 2, num_inference_steps=200)
    shift = dimension_shift(CHANNELS * 4)
    pipeline.scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
    )
    result = latents_of(pipeline, 2, num_inference_steps=20)
    assert (result - fine).norm() < 0.2 * fine.norm()
    with pytest.raises(ValueError, match="sigmas are for the flow-matching schedulers"):
        latents_of(pipeline, 2, sigmas=[1.0, 0.0])


def test_stochastic_sampling_draws_from_the_generator(pipeline):
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    noise = torch.randn(1, CHANNELS, 2, 2, generator=seeded())
    first, again, other = (latents_of(pipeline, 0, seed=seed, latents=noise) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.allclose(first, other)


# Batches, sizes, outputs


def test_with_a_generator_each_pictures_do_not_depend_on_the_batch(pipeline):
    together = pipeline(
        [0, 2], num_images_per_label=2, num_inference_steps=2, guidance_scale=2.0, output_type="pt",
        generator=[seeded(i) for i in range(4)],
    ).images  # fmt: skip
    for index, label in enumerate([0, 0, 2, 2]):
        alone = pipeline(label, num_inference_steps=2, guidance_scale=2.0, output_type="pt", generator=seeded(index))
        torch.testing.assert_close(alone.images[0], together[index], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(together[0], together[1])


def test_pictures_need_not_be_square(pipeline):
    images = pipeline(0, height=32, width=80, num_inference_steps=2, output_type="pt", generator=seeded()).images
    assert images.shape == (1, 3, 32, 80) and 0 <= images.min() < images.max() <= 1


def test_outputs(pipeline):
    def draw(**arguments):
        return pipeline([0, 1], num_inference_steps=2, generator=seeded(), **arguments)

    tensors = draw(output_type="pt").images
    arrays = draw(output_type="np", return_dict=False)[0]
    np.testing.assert_allclose(arrays, tensors.permute(0, 2, 3, 1).numpy())
    pictures = draw().images
    assert pictures[1].size == (32, 32)
    np.testing.assert_allclose(np.asarray(pictures[1]) / 255, arrays[1], atol=1 / 255)
    latents = draw(output_type="latent").images
    decoded = pipeline.vae.decode(latents).sample / 2 + 0.5
    torch.testing.assert_close(decoded.clamp(0, 1), tensors)


def test_latents_stay_in_float32_under_a_bfloat16_transformer(pipeline):
    exact = latents_of(pipeline, 0)
    pipeline.transformer.to(torch.bfloat16)
    seen = []

    def look(pipe, step, timestep, tensors):
        seen.append(tensors["latents"].dtype)
        return {}

    result = latents_of(pipeline, 0, callback_on_step_end=look)
    assert seen == [torch.float32] * 3 and (result - exact).norm() < 0.1 * exact.norm()


def test_callbacks_see_every_step_and_may_change_the_latents(pipeline):
    steps = []

    def callback(pipe, step, timestep, tensors):
        steps.append((step, float(timestep)))
        return {"latents": torch.zeros_like(tensors["latents"])} if step == 2 else {}

    result = latents_of(pipeline, 0, callback_on_step_end=callback)
    assert [step for step, _ in steps] == [0, 1, 2] and [t for _, t in steps] == pipeline.scheduler.timesteps.tolist()
    assert torch.equal(result, torch.zeros_like(result))


# Labels


def test_labels_are_ids_or_names(pipeline):
    assert pipeline.label_ids(2) == [2] and pipeline.label_ids(torch.tensor([1, 4])) == [1, 4]
    assert pipeline.label_ids(["church", "CHURCH BUILDING", "golden retriever", 3]) == [0, 0, 2, 3]
    assert pipeline.label_ids("church, church building") == [0]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (5, r"Class id 5 is not in 0\.\.4"),
        (-1, "Class id -1"),
        ([], "class_labels is empty"),
        ("chruch", r"'chruch' is not known \(church"),
        ("xyzzy", r"not known \(none similar\)"),
        ("crane", r"'crane' is the name of the classes \[1, 3\]"),
    ],
)
def test_labels_that_do_not_exist_are_named(pipeline, labels, message):
    with pytest.raises(ValueError, match=message):
        pipeline(labels)


def test_names_need_a_table(pipeline):
    with pytest.raises(ValueError, match="no id2label"):
        DINOTokDiTPipeline(pipeline.transformer, pipeline.vae, pipeline.scheduler).label_ids("church")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"height": 40}, "multiples of 16 .*got 40x32"),
        ({"width": 0}, "got 32x0"),
        ({"guidance_interval": (0.8, 0.2)}, "guidance_interval"),
        ({"guidance_interval": (0.0, 1000.0)}, "guidance_interval"),
        ({"num_images_per_label": 0}, "num_images_per_label=0"),
        ({"num_inference_steps": 0}, "num_steps=0"),
        ({"output_type": "tf"}, "output_type='tf'"),
        ({"generator": [seeded()] * 3}, "3 generators were passed for 2 pictures"),
        ({"latents": torch.zeros(2, 3, 2, 2)}, r"\(2, 40, h, w\), got \(2, 3, 2, 2\)"),
        ({"latents": torch.zeros(2, 40, 2, 2), "height": 64}, r"\(2, 40, 4, 2\)"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, r"may name 'latents' only"),
        ({"sigmas": [0.2, 0.8]}, "falling numbers"),
    ],
)
def test_wrong_arguments_are_named(pipeline, values, message):
    with pytest.raises(ValueError, match=message):
        pipeline([0, 1], **values)


def test_sizes_fit_the_patches_of_the_transformer_too(tokenizer):
    pipeline = DINOTokDiTPipeline(tiny_transformer(patch_size=2), tokenizer, FlowMatchEulerDiscreteScheduler())
    with pytest.raises(ValueError, match="multiples of 32 .*got 48x32"):
        pipeline(0, height=48)


# Other autoencoders


def tiny_kl(**scaling) -> AutoencoderKL:
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return AutoencoderKL(latent_channels=4, block_out_channels=(8, 8), norm_num_groups=4, **scaling, **blocks).eval()


def tiny_rae(**statistics) -> AutoencoderRAE:
    torch.manual_seed(0)
    return AutoencoderRAE(
        encoder_hidden_size=64, encoder_num_hidden_layers=1, encoder_input_size=28, image_size=32,
        decoder_hidden_size=32, decoder_num_hidden_layers=1, decoder_num_attention_heads=2,
        decoder_intermediate_size=32, **statistics,
    ).eval()  # fmt: skip


def foreign_pipeline(vae) -> DINOTokDiTPipeline:
    channels = 64 if isinstance(vae, AutoencoderRAE) else 4
    transformer = tiny_transformer(in_channels=channels, sample_size=2 if channels == 64 else 4)
    return quiet(DINOTokDiTPipeline(transformer, vae, FlowMatchEulerDiscreteScheduler(), id2label=LABELS))


SHIFTED = {"scaling_factor": 0.5, "shift_factor": 0.25}
STATISTICS = {"latents_mean": [0.5, -1.0, 0.0, 2.0], "latents_std": [2.0, 0.5, 1.0, 3.0]}


@torch.no_grad()
def test_the_latents_of_a_kl_autoencoder_are_scaled_and_shifted():
    vae = tiny_kl(**SHIFTED)
    pipeline = foreign_pipeline(vae)
    images = pipeline(0, num_inference_steps=2, output_type="pt", generator=seeded(), width=16).images
    latents = latents_of(pipeline, 0, num_inference_steps=2, width=16)
    assert images.shape == (1, 3, 8, 16)
    torch.testing.assert_close(images, (vae.decode(latents / 0.5 + 0.25).sample / 2 + 0.5).clamp(0, 1))


@torch.no_grad()
def test_rae_decodes_to_pixels_from_zero_to_one():
    vae = tiny_rae()
    pipeline = foreign_pipeline(vae)
    images = pipeline(0, num_inference_steps=2, output_type="pt", generator=seeded()).images
    torch.testing.assert_close(images, vae.decode(latents_of(pipeline, 0, num_inference_steps=2)).sample.clamp(0, 1))
    with pytest.raises(ValueError, match="32 px squares only"):
        pipeline(0, height=64)


def kl_latents(vae: AutoencoderKL, pixels: torch.Tensor) -> torch.Tensor:
    """What diffusers' pipelines model: SD3's convention, or SDXL's where there are statistics."""
    latents = vae.encode(pixels).latent_dist.mode()
    if vae.config.latents_mean is None:
        return (latents - (vae.config.shift_factor or 0)) * vae.config.scaling_factor
    mean, std = (torch.tensor(vae.config[name]).view(1, 4, 1, 1) for name in ("latents_mean", "latents_std"))
    return (latents - mean) * vae.config.scaling_factor / std


@torch.no_grad()
@pytest.mark.parametrize(
    "vae",
    [
        tiny_kl(),
        tiny_kl(**SHIFTED),
        tiny_kl(**STATISTICS, scaling_factor=0.5),
        tiny_rae(latents_mean=torch.full((64, 2, 2), 0.3), latents_std=torch.full((64, 2, 2), 2.0)),
    ],
)
def test_a_picture_comes_back_as_its_autoencoder_alone_reconstructs_it(vae):
    rae = isinstance(vae, AutoencoderRAE)
    size = {"height": 32, "width": 32 if rae else 64}
    pixels = torch.rand(1, 3, *size.values(), generator=seeded())  # [0, 1]
    latents = vae.encode(pixels).latent if rae else kl_latents(vae, 2 * pixels - 1)
    expected = vae(pixels).sample if rae else vae(2 * pixels - 1).sample / 2 + 0.5

    def replace(pipe, step, timestep, tensors):
        return {"latents": latents}

    images = foreign_pipeline(vae)(
        1, num_inference_steps=2, generator=seeded(), output_type="pt", callback_on_step_end=replace, **size
    ).images
    torch.testing.assert_close(images, expected.clamp(0, 1), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("vae", [tiny_kl(**STATISTICS), tiny_rae()])
def test_pipelines_with_other_autoencoders_are_saved_and_loaded(vae, tmp_path):
    pipeline = foreign_pipeline(vae)
    pipeline.save_pretrained(tmp_path)
    loaded = quiet(DINOTokDiTPipeline.from_pretrained(tmp_path))
    assert type(loaded.vae) is type(vae)
    torch.testing.assert_close(draw(loaded), draw(pipeline))


@pytest.mark.parametrize(("vae", "channels"), [(tiny_kl(), 4), (tiny_rae(), 64)])
def test_a_transformer_for_other_latents_is_refused(pipeline, vae, channels):
    with pytest.raises(
        ValueError, match=f"models 40 channels, but the latents of this {type(vae).__name__} have {channels}"
    ):
        DINOTokDiTPipeline(pipeline.transformer, vae, pipeline.scheduler)


# Files


def draw(pipeline) -> torch.Tensor:
    return pipeline("church", num_inference_steps=2, output_type="pt", generator=seeded(), guidance_scale=2.0).images


@pytest.fixture
def folder(pipeline, tmp_path) -> Path:
    pipeline.save_pretrained(tmp_path / "pipeline")
    return tmp_path / "pipeline"


def test_saved_and_loaded_it_draws_the_same(pipeline, folder, tmp_path):
    loaded = quiet(DINOTokDiTPipeline.from_pretrained(folder))
    torch.testing.assert_close(draw(loaded), draw(pipeline))
    assert loaded.config.id2label == {str(index): name for index, name in LABELS.items()} and loaded.guide is None
    loaded.save_pretrained(tmp_path / "again")
    torch.testing.assert_close(draw(quiet(DINOTokDiTPipeline.from_pretrained(tmp_path / "again"))), draw(pipeline))
    for name in ("pipeline.py", "transformer/dinotok.py", "vae/dinotok.py"):
        assert (tmp_path / "again" / name).read_text() == (folder / name).read_text()


def test_the_guide_is_saved_too(pipeline, tmp_path):
    with_guide = quiet(DINOTokDiTPipeline(**{**pipeline.components, "guide": tiny_transformer(1)}, id2label=LABELS))
    with_guide.save_pretrained(tmp_path)
    torch.testing.assert_close(draw(quiet(DINOTokDiTPipeline.from_pretrained(tmp_path))), draw(with_guide))
    without = quiet(DINOTokDiTPipeline.from_pretrained(tmp_path, guide=None))
    torch.testing.assert_close(draw(without), draw(pipeline))


def test_the_code_beside_the_weights_is_this_file_and_one_line_each(folder):
    source = Path(class_conditional_diffusion.__file__).with_name("pipeline.py")
    assert (folder / "pipeline.py").read_text() == source.read_text()
    assert (
        folder / "vae" / "dinotok.py"
    ).read_text() == "from dinotok import AutoencoderDINOTok as AutoencoderDINOTok\n"
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == ["pipeline", "DINOTokDiTPipeline"]
    assert index["vae"] == ["dinotok", "AutoencoderDINOTok"] and index["scheduler"][0] == "diffusers"
    assert str(folder) not in (folder / "model_index.json").read_text()


LOAD_ELSEWHERE = """
import sys, torch
from diffusers import DiffusionPipeline
assert "dinotok" not in sys.modules
pipeline = DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True)
pipeline.set_progress_bar_config(disable=True)
generator = torch.Generator().manual_seed(0)
images = pipeline("church", num_inference_steps=2, output_type="pt", generator=generator, guidance_scale=2.0).images
torch.save(images, sys.argv[2])
"""
LOAD_BY_CLASS = (
    LOAD_ELSEWHERE.replace("from diffusers import DiffusionPipeline", "")
    .replace('assert "dinotok" not in sys.modules', "from dinotok import DINOTokDiTPipeline as DiffusionPipeline")
    .replace(", trust_remote_code=True", "")
)


def load_in_another_process(code: str, source: str, home: Path, **environment: str) -> torch.Tensor:
    result = subprocess.run(
        [sys.executable, "-c", code, source, str(home / "images.pt")],
        env={**os.environ, "HF_HOME": str(home), "HF_MODULES_CACHE": str(home / "modules"), **environment},
        capture_output=True, text=True, timeout=180,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "Expected types" not in result.stderr
    return torch.load(home / "images.pt", weights_only=True)


def test_a_process_that_has_not_imported_dinotok_loads_a_folder(pipeline, folder, tmp_path):
    images = load_in_another_process(LOAD_ELSEWHERE, str(folder), tmp_path)
    torch.testing.assert_close(images, draw(pipeline))


COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub as a download needs: a repository's list of files, and the files."""

    folder: Path

    def do_GET(self):
        path = unquote(urlparse(self.path).path)
        files = {str(p.relative_to(self.folder)): p for p in self.folder.rglob("*") if p.is_file()}
        if path.startswith("/api/models/") and "/tree/" in path:
            rows = [{"type": "file", "path": n, "oid": n, "size": p.stat().st_size} for n, p in files.items()]
            self.answer(json.dumps(rows).encode())
        elif path.startswith("/api/models/"):
            siblings = [{"rfilename": name} for name in files]
            self.answer(json.dumps({"id": "user/repo", "sha": COMMIT, "siblings": siblings}).encode())
        elif (name := path.partition("/resolve/")[2].partition("/")[2]) in files:
            self.answer(files[name].read_bytes(), name)
        else:
            self.send_error(404)

    do_HEAD = do_GET

    def answer(self, content: bytes, tag: str = "api"):
        self.send_response(200)
        for name, value in (("ETag", f'"{tag}"'), ("X-Repo-Commit", COMMIT), ("Content-Length", str(len(content)))):
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.mark.slow
@pytest.mark.parametrize("code", [LOAD_ELSEWHERE, LOAD_BY_CLASS], ids=["DiffusionPipeline", "DINOTokDiTPipeline"])
def test_a_repository_of_the_hub_loads(pipeline, folder, tmp_path, code):
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("FolderHub", (Hub,), {"folder": folder}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    try:
        images = load_in_another_process(
            code, "user/repo", tmp_path, HF_ENDPOINT=endpoint, HF_HUB_OFFLINE="0", NO_PROXY="127.0.0.1"
        )
    finally:
        server.shutdown()
    torch.testing.assert_close(images, draw(pipeline))


# Adapters


def save_adapter(folder: Path, seed: int) -> None:
    model = tiny_transformer()
    model.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    generator = seeded(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    DINOTokDiTPipeline.save_lora_weights(folder, transformer_lora_layers=get_peft_model_state_dict(model))


def test_lora_adapters_load_mix_and_go_away(pipeline, tmp_path):
    plain = latents_of(pipeline, 0)
    for seed, name in enumerate(["ink", "oil"]):
        save_adapter(tmp_path / name, seed)
        pipeline.load_lora_weights(tmp_path / name, adapter_name=name)
    drawn = {}
    for name in ("ink", "oil"):
        pipeline.set_adapters(name)
        drawn[name] = latents_of(pipeline, 0)
        assert (drawn[name] - plain).norm() > 0.01 * plain.norm()
    assert pipeline.get_active_adapters() == ["oil"]
    pipeline.set_adapters(["ink", "oil"], [0.0, 1.0])
    torch.testing.assert_close(latents_of(pipeline, 0), drawn["oil"], atol=1e-5, rtol=1e-5)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    torch.testing.assert_close(latents_of(pipeline, 0), drawn["oil"], atol=1e-3, rtol=1e-3)


def test_unloaded_adapters_leave_no_trace(pipeline, tmp_path):
    plain = latents_of(pipeline, 0)
    save_adapter(tmp_path, 0)
    pipeline.load_lora_weights(str(tmp_path))
    assert not torch.allclose(latents_of(pipeline, 0), plain)
    pipeline.unload_lora_weights()
    torch.testing.assert_close(latents_of(pipeline, 0), plain)
