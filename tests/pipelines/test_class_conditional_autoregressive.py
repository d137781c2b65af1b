"""The autoregressive pipeline: reproducible, guided, continued, saved, and loaded in every way."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput
from torch import nn

from dinotok import AutoregressiveTransformer2DModel, RandomAutoregressiveTransformer2DModel
from dinotok.models.discrete import DiscreteTokenizer
from dinotok.models.quantizers import QuantizerOutput, VectorQuantizer
from dinotok.pipelines.class_conditional_autoregressive import DINOTokARPipeline
from tests.tiny_tokenizers import tiny_discrete_tokenizer

NAMES = {0: "tench, Tinca tinca", 1: "church", 2: "crane", 3: "crane", 4: "parachute, chute"}
GRID = (2, 3)


def tiny_transformer(**config) -> AutoregressiveTransformer2DModel:
    values = {"codebook_sizes": [16, 16], "num_classes": 5, "sample_size": GRID, "head_depth": 1, **config}
    torch.manual_seed(0)
    model = AutoregressiveTransformer2DModel(
        hidden_size=32, num_layers=2, num_attention_heads=4, intermediate_size=48, **values
    )
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.fixture(scope="module")
def pipe() -> DINOTokARPipeline:
    pipeline = DINOTokARPipeline(tiny_transformer(), tiny_discrete_tokenizer(), id2label=NAMES)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(pipe: DINOTokARPipeline, labels=(1, 4), seed: int = 0, **options) -> torch.Tensor:
    return pipe(list(labels), generator=seeded(seed), output_type="latent", **options).images


def test_pictures_of_every_type(pipe):
    picture = pipe("church", generator=seeded()).images[0]
    assert picture.size == (48, 32)
    arrays = pipe(1, generator=seeded(), output_type="np").images
    tensors = pipe([1], generator=seeded(), output_type="pt", return_dict=False)[0]
    assert arrays.shape == (1, 32, 48, 3)
    assert tensors.shape == (1, 3, 32, 48)
    assert tensors.min() >= 0 and tensors.max() <= 1
    torch.testing.assert_close(torch.from_numpy(arrays).permute(0, 3, 1, 2), tensors)
    indices = pipe(1, generator=seeded(), output_type="latent").images
    assert indices.shape == (1, 2, *GRID)
    pixels = pipe.vqvae.decode(pipe.vqvae.indices_to_latents(indices)).sample
    torch.testing.assert_close((pixels / 2 + 0.5).clamp(0, 1), tensors)


def test_the_same_generator_gives_the_same_indices(pipe):
    assert torch.equal(draw(pipe), draw(pipe))
    assert not torch.equal(draw(pipe), draw(pipe, seed=1))


def test_every_index_has_a_random_number_of_its_own(pipe):
    """An untrained model finds all codes equally likely, so an index is its random number times the codes."""
    untrained = AutoregressiveTransformer2DModel(codebook_sizes=[16, 16], num_classes=5, sample_size=GRID).eval()
    uniform = DINOTokARPipeline(untrained, pipe.vqvae)
    uniform.set_progress_bar_config(disable=True)
    expected = (torch.rand(2, 12, generator=seeded()) * 16).long()  # (picture, position and codebook)
    assert torch.equal(draw(uniform).flatten(2).transpose(1, 2).flatten(1), expected)


@pytest.mark.parametrize("guidance_scale", [1.0, 2.5])
def test_a_generator_for_each_picture_makes_batches_equal_singles(pipe, guidance_scale):
    options = {"output_type": "latent", "guidance_scale": guidance_scale}
    batch = pipe([1, 4, 0], generator=[seeded(i) for i in range(3)], **options).images
    singles = [pipe(label, generator=seeded(i), **options).images for i, label in enumerate([1, 4, 0])]
    assert torch.equal(batch, torch.cat(singles))


def test_guidance_of_one_is_no_guidance_and_does_no_unconditional_pass(pipe, monkeypatch):
    rows = []
    forward = AutoregressiveTransformer2DModel.forward

    def counting(self, indices, *arguments, **options):
        rows.append(len(indices))
        return forward(self, indices, *arguments, **options)

    monkeypatch.setattr(AutoregressiveTransformer2DModel, "forward", counting)
    plain = draw(pipe, guidance_scale=1.0)
    assert set(rows) == {2}
    assert len(rows) == 2 * GRID[0] * GRID[1]
    rows.clear()
    nearly = draw(pipe, guidance_scale=1.0 + 1e-9)
    assert set(rows) == {4}
    assert torch.equal(plain, nearly)
    assert not torch.equal(plain, draw(pipe, guidance_scale=8.0))


def test_a_rising_schedule_guides_later_positions_alone(pipe):
    """It starts at 1: the first position is that of no guidance, later ones are not."""
    plain = draw(pipe, range(5), temperature=0)
    rising = draw(pipe, range(5), temperature=0, guidance_scale=30.0, guidance_schedule="rising")
    constant = draw(pipe, range(5), temperature=0, guidance_scale=30.0)
    assert torch.equal(rising[:, :, 0, 0], plain[:, :, 0, 0])
    assert not torch.equal(rising, plain)
    assert not torch.equal(constant[:, :, 0, 0], plain[:, :, 0, 0])


def test_the_most_likely_indices_are_those_of_the_whole_grid(pipe):
    """Greedy decoding with the cache: each index is the maximum of the uncached logits."""
    for options in ({"temperature": 0}, {"top_k": 1}, {"top_p": 1e-6}):
        indices = draw(pipe, **options)
        logits = pipe.transformer(indices, torch.tensor([1, 4])).logits
        assert torch.equal(indices, torch.stack([book.argmax(-1) for book in logits], dim=1))


@pytest.mark.parametrize("options", [{"temperature": 0}, {}, {"guidance_scale": 2.0}])
@pytest.mark.parametrize("given", [1, 3, 5])
def test_given_indices_are_kept_and_continued_as_in_the_whole_run(pipe, options, given):
    whole = draw(pipe, **options)
    again = draw(pipe, indices=whole.flatten(2)[:, :, :given], **options)
    assert torch.equal(again, whole)
    changed = (whole.flatten(2)[:, :, :given] + 1) % 16
    continued = draw(pipe, indices=changed, **options)
    assert torch.equal(continued.flatten(2)[:, :, :given], changed)
    assert not torch.equal(continued, whole)


def test_rows_of_one_picture_can_be_given_to_all(pipe):
    rows = torch.arange(6).view(1, 2, 1, 3)
    continued = draw(pipe, indices=rows)
    assert torch.equal(continued[:, :, :1], rows.expand(2, -1, -1, -1))
    assert not torch.equal(continued[0], continued[1])


def test_labels_by_name_and_several_pictures_of_each(pipe):
    by_name = pipe(["CHURCH", "chute"], 2.0, num_images_per_label=2, generator=seeded(), output_type="latent").images
    by_id = pipe(torch.tensor([1, 4]), 2.0, num_images_per_label=2, generator=seeded(), output_type="latent").images
    assert by_name.shape[0] == 4
    assert torch.equal(by_name, by_id)


def test_the_size_can_be_chosen_and_need_not_be_square(pipe):
    assert pipe(1, height=48, width=16, generator=seeded()).images[0].size == (16, 48)
    assert pipe(1, height=48, generator=seeded(), output_type="latent").images.shape == (1, 2, 3, 3)


def test_the_callback_sees_every_index(pipe):
    seen = []
    indices = pipe(
        [1, 4],
        generator=seeded(),
        output_type="latent",
        callback_on_step_end=lambda pipeline, step, chosen: seen.append((step, chosen)),
    ).images
    assert [step for step, _ in seen] == list(range(12))
    assert torch.equal(torch.cat([chosen for _, chosen in seen], dim=1), indices.flatten(2).transpose(1, 2).flatten(1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"class_labels": 6}, r"Class id 6 is not in 0\.\.5"),
        ({"class_labels": 1.0}, "float|1.0"),
        ({"class_labels": "curch"}, r"'curch' is not known \(church"),
        ({"class_labels": "crane"}, r"classes \[2, 3\]: pass an id"),
        ({"class_labels": []}, "class_labels is empty"),
        ({"temperature": -0.1}, "temperature=-0.1"),
        ({"top_k": -1}, "top_k=-1"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"guidance_scale": -1.0}, "guidance_scale=-1.0"),
        ({"guidance_schedule": "linear"}, "guidance_schedule='linear'"),
        ({"num_images_per_label": 0}, "num_images_per_label=0"),
        ({"output_type": "jpg"}, "output_type='jpg'"),
        ({"height": 40}, "multiples of 16, got 40x48"),
        ({"generator": [torch.Generator()] * 2}, "2 generators for 1"),
        ({"indices": torch.full((1, 2, 2), 16)}, r"codebook 0 must lie in 0\.\.15, got 16"),
        ({"indices": torch.full((1, 2, 2), -1)}, r"codebook 0 must lie in 0\.\.15, got -1"),
        ({"indices": torch.zeros(1, 2, 6, dtype=torch.long)}, "6 positions are given"),
        ({"indices": torch.zeros(1, 1, 2, dtype=torch.long)}, r"\(B, 2, n\)"),
        ({"indices": torch.zeros(1, 2, 1, 2, dtype=torch.long)}, r"rows, 3\)"),
        ({"indices": torch.zeros(3, 2, 2, dtype=torch.long)}, "B = 1 or 1"),
        ({"indices": torch.zeros(1, 2, 2)}, "must be integers"),
    ],
)
def test_invalid_arguments_are_named(pipe, options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        pipe(**{"class_labels": 1, **options})


def test_codebooks_that_do_not_fit_are_refused(pipe):
    with pytest.raises(ValueError, match=r"\[16, 15\] codes, but the tokenizer has \[16, 16\]"):
        DINOTokARPipeline(tiny_transformer(codebook_sizes=[16, 15]), pipe.vqvae)


class PatchTokenizer(ModelMixin, ConfigMixin):
    """A tokenizer of another kind, with one codebook: patches of 4 x 4 pixels, and nothing of dinotok's base class."""

    @register_to_config
    def __init__(self, codebook_size: int = 24, patch_size: int = 4):
        super().__init__()
        self.quantizer = VectorQuantizer(codebook_size, 3 * patch_size**2)
        self.codebook_sizes = {"patch": codebook_size}

    def quantize(self, latents: torch.Tensor) -> QuantizerOutput:
        output = self.quantizer(latents)
        return QuantizerOutput(output.latents, output.indices[:, None], output.loss)

    def indices_to_latents(self, indices: torch.Tensor) -> torch.Tensor:
        return self.quantizer.indices_to_latents(indices[:, 0])

    def code_distances(self, latents: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        return self.quantizer.code_distances(latents, indices[:, 0])[:, None]

    def decode(self, latents: torch.Tensor, return_dict: bool = True):
        sample = nn.functional.pixel_shuffle(latents, self.config.patch_size)
        return DecoderOutput(sample=sample) if return_dict else (sample,)


def test_tokenizers_with_one_codebook():
    tokenizer = PatchTokenizer()
    assert isinstance(tokenizer, DiscreteTokenizer)
    pipe = DINOTokARPipeline(tiny_transformer(codebook_sizes=[24], head_depth=0), tokenizer)
    pipe.set_progress_bar_config(disable=True)
    indices = pipe([0, 1], generator=seeded(), output_type="latent").images
    assert indices.shape == (2, 1, *GRID)
    assert pipe(0, height=8, width=20, generator=seeded()).images[0].size == (20, 8)


def test_models_trained_in_random_orders_take_the_same_place(pipe):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    transformer = RandomAutoregressiveTransformer2DModel(
        codebook_sizes=[24], num_classes=5, sample_size=GRID, **sizes
    ).eval()
    for parameter in transformer.parameters():
        nn.init.normal_(parameter, std=0.3)
    pipe = DINOTokARPipeline(transformer, PatchTokenizer())
    pipe.set_progress_bar_config(disable=True)
    options = {"guidance_scale": 4.0, "guidance_schedule": "rising", "guidance_power": 2.75}
    indices = draw(pipe, **options)
    assert indices.shape == (2, 1, *GRID)
    assert torch.equal(draw(pipe, indices=indices[:, :, :1], **options), indices)
    greedy = draw(pipe, temperature=0)
    assert torch.equal(greedy[:, 0], transformer(greedy, torch.tensor([1, 4])).logits[0].argmax(-1))
    with pytest.raises(ValueError, match="it is learned"):
        pipe(0, height=4)


def test_half_precision_runs(pipe):
    half = DINOTokARPipeline(tiny_transformer().to(torch.bfloat16), pipe.vqvae)
    half.set_progress_bar_config(disable=True)
    indices = half([1, 4], 2.0, generator=seeded(), output_type="latent").images
    assert indices.dtype == torch.int64
    assert indices.shape == (2, 2, *GRID)


# Saving and loading

RUN = """
import torch
{load}
pipe.set_progress_bar_config(disable=True)
print(pipe("church", 2.0, generator=torch.Generator().manual_seed(0), output_type="latent").images.flatten().tolist())
print(type(pipe).__name__, type(pipe.transformer).__module__, type(pipe.vqvae).__module__, pipe.config.id2label["4"])
"""
FORMS = {
    "by its class": """
from dinotok.pipelines.class_conditional_autoregressive import DINOTokARPipeline
pipe = DINOTokARPipeline.from_pretrained({folder!r})""",
    "by diffusers, nothing imported": """
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained({folder!r}, trust_remote_code=True)""",
    "by diffusers, the pipeline imported": """
from diffusers import DiffusionPipeline
import dinotok.pipelines.class_conditional_autoregressive
pipe = DiffusionPipeline.from_pretrained({folder!r}, trust_remote_code=True)""",
    "saved again": """
from diffusers import DiffusionPipeline
DiffusionPipeline.from_pretrained({folder!r}, trust_remote_code=True).save_pretrained({copy!r})
pipe = DiffusionPipeline.from_pretrained({copy!r}, trust_remote_code=True)""",
}


@pytest.fixture(scope="module")
def folder(pipe, tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("pipeline") / "saved"
    pipe.save_pretrained(path)
    return str(path)


SLOW = ("by its class", "by diffusers, the pipeline imported", "saved again")


@pytest.mark.parametrize(
    "form", [pytest.param(form, marks=pytest.mark.slow if form in SLOW else ()) for form in FORMS]
)
def test_a_saved_pipeline_is_loaded_in_a_new_process(pipe, folder, form, tmp_path):
    load = FORMS[form].format(folder=folder, copy=str(tmp_path / "copy"))
    result = subprocess.run(
        [sys.executable, "-c", RUN.format(load=load)],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")},
    )
    assert result.returncode == 0, result.stderr
    expected = pipe("church", 2.0, generator=seeded(), output_type="latent").images.flatten().tolist()
    indices, kinds = result.stdout.splitlines()[-2:]
    assert indices == str(expected)
    assert kinds == (
        "DINOTokARPipeline dinotok.models.transformer_autoregressive dinotok.models.vq_model_dinotok parachute, chute"
    )


def test_a_saved_pipeline_is_loaded_by_its_class(pipe, folder):
    loaded = DINOTokARPipeline.from_pretrained(folder)
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(draw(loaded, ["church", "chute"]), draw(pipe))
    picture, expected = (p("church", generator=seeded(), output_type="pt").images for p in (loaded, pipe))
    assert torch.equal(picture, expected)


def test_the_pipeline_file_has_no_relative_imports(folder):
    code = (Path(folder) / "pipeline.py").read_text(encoding="utf-8")
    assert "from ." not in code
    assert {"dinotok.py"} <= {file.name for file in (Path(folder) / "vqvae").iterdir()}
