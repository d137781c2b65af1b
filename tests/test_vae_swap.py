"""Our autoencoders as the `vae` of existing pipelines."""

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    FluxImg2ImgPipeline,
    FluxInpaintPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image

from tests.conftest import random_pixels, tiny_autoencoder
from tests.tiny_text import tiny_clip, tiny_clip_tokenizer, tiny_t5, tiny_t5_tokenizer
from tests.tiny_tokenizers import tiny_region_autoencoder

SIZE = {"height": 64, "width": 96}


@pytest.fixture(scope="module")
def vae():
    return tiny_autoencoder().fit([random_pixels(8, 3, 48, 32, seed=s) for s in range(2)])


def tiny_unet(channels: int, **config) -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=4, in_channels=channels, out_channels=channels, block_out_channels=(8, 16), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4, norm_num_groups=4, **{"cross_attention_dim": 16, **config},
    )  # fmt: skip


def stable_diffusion(vae) -> dict:
    return {
        "vae": vae,
        "unet": tiny_unet(vae.config.latent_channels),
        "text_encoder": tiny_clip(),
        "tokenizer": tiny_clip_tokenizer(),
        "scheduler": DDIMScheduler(clip_sample=False, steps_offset=1),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }


def stable_diffusion_3(vae) -> dict:
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=4, patch_size=1, in_channels=vae.config.latent_channels,
        out_channels=vae.config.latent_channels, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        caption_projection_dim=16, joint_attention_dim=32, pooled_projection_dim=32, pos_embed_max_size=8,
    )  # fmt: skip
    encoders = {name: tiny_clip(projection=True) for name in ("text_encoder", "text_encoder_2")}
    tokenizers = {name: tiny_clip_tokenizer() for name in ("tokenizer", "tokenizer_2")}
    return {
        "vae": vae,
        "transformer": transformer,
        **encoders,
        **tokenizers,
        "text_encoder_3": tiny_t5(),
        "tokenizer_3": tiny_t5_tokenizer(),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
    }


def flux(vae) -> dict:
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=4 * vae.config.latent_channels, num_layers=1, num_single_layers=1,
        attention_head_dim=16, num_attention_heads=1, joint_attention_dim=32, pooled_projection_dim=16,
        axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    return {
        "vae": vae,
        "transformer": transformer,
        "text_encoder": tiny_clip(),
        "tokenizer": tiny_clip_tokenizer(),
        "text_encoder_2": tiny_t5(),
        "tokenizer_2": tiny_t5_tokenizer(),
        "scheduler": FlowMatchEulerDiscreteScheduler(),
    }


def run(pipeline, *condition, **arguments) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    arguments = {"num_inference_steps": 3, "output_type": "np", **arguments}
    output = pipeline(*(condition or ("a",)), generator=torch.Generator().manual_seed(0), **arguments)
    assert np.isfinite(output.images).all()
    return output.images


def to_picture(pixels: torch.Tensor) -> Image.Image:
    return Image.fromarray(((pixels[0].permute(1, 2, 0) + 1) * 127.5).round().byte().numpy())


# From text or class


@pytest.mark.parametrize(
    ("pipeline_class", "components"),
    [
        (StableDiffusionPipeline, stable_diffusion),
        (StableDiffusion3Pipeline, stable_diffusion_3),
        (FluxPipeline, flux),
    ],
)
def test_text_to_image_runs_at_a_non_square_size(vae, pipeline_class, components):
    pipeline = pipeline_class(**components(vae))
    assert pipeline.vae_scale_factor == vae.config.patch_size == 16
    assert run(pipeline, **SIZE).shape == (1, 64, 96, 3)


def test_the_scale_factor_of_pipelines_is_the_patch_size_whatever_it_is():
    vae = tiny_autoencoder("dinov2_with_registers", patch_size=8, block_out_channels=(8, 8, 8, 8))
    assert StableDiffusionPipeline(**stable_diffusion(vae)).vae_scale_factor == vae.config.patch_size == 8


def test_class_to_image_of_dit(vae):
    channels = vae.config.latent_channels
    for out_channels in (channels, 2 * channels):  # with and without a learned variance
        transformer = DiTTransformer2DModel(
            in_channels=channels, out_channels=out_channels, sample_size=4, patch_size=1, num_layers=1,
            num_attention_heads=2, attention_head_dim=8, num_embeds_ada_norm=1000, norm_num_groups=2,
        )  # fmt: skip
        pipeline = DiTPipeline(transformer, vae, DDIMScheduler(clip_sample=False))
        assert run(pipeline, [3], guidance_scale=2.0).shape == (1, 64, 64, 3)


@torch.no_grad()
def test_sdxl_draws_latents_that_are_decoded_outside_of_it(vae):
    """It would apply `latents_mean` and `latents_std` itself, for four channels."""
    components = stable_diffusion(vae)
    names = ("vae", "text_encoder", "tokenizer", "scheduler")
    pipeline = StableDiffusionXLPipeline(
        **{name: components[name] for name in names},
        text_encoder_2=tiny_clip(projection=True),
        tokenizer_2=tiny_clip_tokenizer(),
        unet=tiny_unet(
            vae.config.latent_channels, cross_attention_dim=32, addition_embed_type="text_time",
            addition_time_embed_dim=8, projection_class_embeddings_input_dim=6 * 8 + 16,
        ),
        add_watermarker=False,
    )  # fmt: skip
    with pytest.raises(RuntimeError, match=r"\[1, 4, 1, 1\]"):
        run(pipeline, **SIZE)
    latents = torch.as_tensor(run(pipeline, **SIZE, output_type="latent"))
    assert vae.decode(latents).sample.shape == (1, 3, 64, 96)


# From pictures


@pytest.mark.parametrize(
    ("pipeline_class", "components", "size"),
    [
        (StableDiffusionImg2ImgPipeline, stable_diffusion, {}),
        (StableDiffusion3Img2ImgPipeline, stable_diffusion_3, SIZE),
        (FluxImg2ImgPipeline, flux, SIZE),
    ],
)
def test_image_to_image_stays_near_its_picture(vae, pipeline_class, components, size):
    pixels = random_pixels(1, 3, 64, 96)
    pipeline = pipeline_class(**components(vae))
    reconstruction = (vae(pixels).sample[0].permute(1, 2, 0) / 2 + 0.5).clamp(0, 1).detach().numpy()
    weak, strong = (run(pipeline, image=to_picture(pixels), strength=s, **size)[0] for s in (0.34, 1.0))
    assert weak.shape == (64, 96, 3)
    assert np.abs(weak - reconstruction).mean() < 0.9 * np.abs(strong - reconstruction).mean()


@torch.no_grad()
def test_flux_inpainting_ends_in_the_latents_of_the_picture_outside_the_mask(vae):
    pixels = random_pixels(1, 3, 64, 96)
    picture = to_picture(pixels)
    mask = Image.new("L", picture.size)
    mask.paste(255, (32, 0, 64, 32))
    pipeline = FluxInpaintPipeline(**flux(vae))
    packed = torch.as_tensor(run(pipeline, image=picture, mask_image=mask, strength=1.0, **SIZE, output_type="latent"))
    latents = pipeline._unpack_latents(packed, 64, 96, 16)
    expected = vae.encode(pipeline.image_processor.preprocess(picture)).latent
    changed = (latents - expected).abs().amax(1)[0] > 1e-4
    assert changed[:2, 2:4].all() and changed.sum() == 4


# Regions


def test_regions_serve_where_their_grid_is_that_of_patches():
    vae = tiny_region_autoencoder()
    pipeline = StableDiffusionPipeline(**stable_diffusion(vae))
    assert run(pipeline).shape == (1, 64, 64, 3)
    with pytest.raises(ValueError, match=r"must have shape \(B, 12, 4, 4\), got \(1, 12, 4, 6\)"):
        run(pipeline, **SIZE)


# Files


def test_a_pipeline_with_our_vae_is_saved_and_loaded(vae, tmp_path):
    pipeline = StableDiffusionPipeline(**stable_diffusion(vae))
    expected = run(pipeline, **SIZE)
    pipeline.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(loaded.vae) is type(vae)
    np.testing.assert_allclose(run(loaded, **SIZE), expected, atol=1e-5)
