"""Our autoencoders as the `vae` of existing pipelines."""

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from tests.conftest import random_pixels, tiny_autoencoder


@pytest.fixture(scope="module")
def components(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    vocabulary = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(str({t: i for i, t in enumerate(vocabulary)}).replace("'", '"'))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    torch.manual_seed(0)
    text = CLIPTextConfig(
        vocab_size=len(vocabulary), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=16,
        bos_token_id=len(vocabulary) - 2, eos_token_id=len(vocabulary) - 1, pad_token_id=1,
    )  # fmt: skip
    vae = tiny_autoencoder().fit([random_pixels(8, 3, 48, 32, seed=s) for s in range(2)])
    channels = vae.config.latent_channels
    unet = UNet2DConditionModel(
        sample_size=4, in_channels=channels, out_channels=channels, block_out_channels=(8, 16), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16, attention_head_dim=4, norm_num_groups=4,
    )  # fmt: skip
    return {
        "vae": vae,
        "unet": unet,
        "text_encoder": CLIPTextModel(text).eval(),
        "tokenizer": CLIPTokenizer.from_pretrained(folder, model_max_length=16),
        "scheduler": DDIMScheduler(clip_sample=False, steps_offset=1),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }


def run(pipeline, **arguments) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    output = pipeline("a", num_inference_steps=3, generator=generator, output_type="np", **arguments)
    assert np.isfinite(output.images).all()
    return output.images


def test_stable_diffusion_runs_at_a_non_square_size(components):
    assert StableDiffusionPipeline(**components).vae_scale_factor == 16
    images = run(StableDiffusionPipeline(**components), height=64, width=96)
    assert images.shape == (1, 64, 96, 3)


def test_stable_diffusion_image_to_image_stays_near_its_picture(components):
    pixels = random_pixels(1, 3, 64, 96)
    picture = Image.fromarray(((pixels[0].permute(1, 2, 0) + 1) * 127.5).round().byte().numpy())
    pipeline = StableDiffusionImg2ImgPipeline(**components)
    vae = components["vae"]
    reconstruction = (vae(pixels).sample[0].permute(1, 2, 0) / 2 + 0.5).clamp(0, 1).detach().numpy()
    weak, strong = (run(pipeline, image=picture, strength=s)[0] for s in (0.34, 1.0))
    assert weak.shape == (64, 96, 3)
    assert np.abs(weak - reconstruction).mean() < np.abs(strong - reconstruction).mean()


def test_a_pipeline_with_our_vae_is_saved_and_loaded(components, tmp_path):
    pipeline = StableDiffusionPipeline(**components)
    expected = run(pipeline, height=64, width=96)
    pipeline.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(loaded.vae) is type(components["vae"])
    np.testing.assert_allclose(run(loaded, height=64, width=96), expected, atol=1e-5)
