"""Inpainting by callback: equal to diffusers' own pipeline where that exists, and the laws elsewhere."""

import pytest
import torch
from diffusers import (
    EulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    StableDiffusion3Pipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
)

from dinotok import InpaintingCallback
from tests.conftest import random_pixels, randomize
from tests.test_vae_swap import run, stable_diffusion, stable_diffusion_3, to_picture
from tests.tiny_pipelines import tiny_dit_pipeline
from tests.tiny_tokenizers import tiny_region_autoencoder, tiny_tokenizer

SIZE = {"height": 64, "width": 96}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def vae():
    return tiny_tokenizer()


@pytest.fixture
def parts(vae):
    """Latents of a picture of 64 x 96, a mask of its 4 x 6 latents and noise."""
    with torch.no_grad():
        latents = vae.encode(random_pixels(1, 3, 64, 96)).latent
    mask = torch.zeros(1, 1, 64, 96)
    mask[..., 20:40, 32:64] = 1  # rows of latents 1 and 2, a part of each; columns 2 and 3
    return latents, mask, torch.randn(1, *latents.shape[1:], generator=seeded())


INSIDE = torch.zeros(4, 6, dtype=torch.bool)
INSIDE[1:3, 2:4] = True


@pytest.mark.parametrize("scheduler", [None, EulerDiscreteScheduler(steps_offset=1)])
def test_with_four_channels_it_is_the_inpainting_pipeline_of_diffusers(scheduler):
    components = stable_diffusion(tiny_region_autoencoder(latent_channels=4))
    components["scheduler"] = scheduler or components["scheduler"]
    randomize(components["unet"])  # so that what lies outside the mask moves what is inside
    pixels = random_pixels(1, 3, 64, 64)
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., :32, 16:48] = 1
    noise = torch.randn(1, 4, 4, 4, generator=seeded())
    same = {"latents": noise, "output_type": "latent"}
    reference = StableDiffusionInpaintPipeline(**components)
    size = {"height": 64, "width": 64}
    expected = run(reference, image=pixels / 2 + 0.5, mask_image=mask, strength=1.0, **size, **same)
    with torch.no_grad():
        callback = InpaintingCallback(components["vae"].encode(pixels).latent, mask, noise)
    found = run(StableDiffusionPipeline(**components), callback_on_step_end=callback, **same)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def latents_after_each_step(pipeline, callback, *condition, **arguments) -> list[torch.Tensor]:
    seen = []

    def look(pipe, step, timestep, tensors):
        tensors = callback(pipe, step, timestep, tensors)
        seen.append(tensors["latents"].clone())
        return tensors

    run(pipeline, *condition, callback_on_step_end=look, **arguments)
    return seen


def own_pipeline(vae):
    return tiny_dit_pipeline(vae), (1,)


def heun_pipeline(vae):
    pipeline = tiny_dit_pipeline(vae)
    pipeline.scheduler = FlowMatchHeunDiscreteScheduler()
    return pipeline, (1,)


def sd3_pipeline(vae):
    return StableDiffusion3Pipeline(**stable_diffusion_3(vae)), ()


@pytest.mark.parametrize("build", [own_pipeline, heun_pipeline, sd3_pipeline])
def test_outside_the_mask_latents_go_from_noise_to_the_picture_in_a_straight_line(vae, parts, build):
    latents, mask, noise = parts
    pipeline, condition = build(vae)
    steps = latents_after_each_step(pipeline, InpaintingCallback(*parts), *condition, latents=noise, **SIZE)
    times = [*(pipeline.scheduler.timesteps / 1000).tolist(), 0.0][1:]
    assert len(times) == len(steps) >= 3 and times[0] > 0.3
    for time, found in zip(times, steps, strict=True):
        expected = (1 - time) * latents + time * noise
        torch.testing.assert_close(found[..., ~INSIDE], expected[..., ~INSIDE], atol=1e-5, rtol=1e-5)
        assert not torch.isclose(found[..., INSIDE], expected[..., INSIDE], atol=1e-3).all()
    assert torch.equal(steps[-1][..., ~INSIDE], latents[..., ~INSIDE])


def test_image_to_image_may_begin_later(vae, parts):
    latents, mask, noise = parts
    pipeline = StableDiffusionImg2ImgPipeline(**stable_diffusion(vae))
    callback, picture = InpaintingCallback(*parts), to_picture(random_pixels(1, 3, 64, 96))
    steps = latents_after_each_step(pipeline, callback, image=picture, strength=0.5, num_inference_steps=6)
    assert len(steps) == 3
    share = pipeline.scheduler.alphas_cumprod[pipeline.scheduler.timesteps[-1]]
    expected = share.sqrt() * latents + (1 - share).sqrt() * noise
    torch.testing.assert_close(steps[-2][..., ~INSIDE], expected[..., ~INSIDE], atol=1e-5, rtol=1e-5)
    assert torch.equal(steps[-1][..., ~INSIDE], latents[..., ~INSIDE])


def test_one_picture_serves_a_batch_and_a_mask_may_be_in_latents(vae, parts):
    latents, _, _ = parts
    noise = torch.randn(2, *latents.shape[1:], generator=seeded())
    callback = InpaintingCallback(latents, INSIDE[None, None].float(), noise)
    steps = latents_after_each_step(tiny_dit_pipeline(vae), callback, [0, 1], latents=noise, **SIZE)
    assert torch.equal(steps[-1][..., ~INSIDE], latents.expand(2, -1, -1, -1)[..., ~INSIDE])
    assert not torch.allclose(steps[-1][0], steps[-1][1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latents": torch.zeros(1, 3, 4, 6)}, r"Latents \(1, 3, 4, 6\) do not fit noise"),
        ({"latents": torch.zeros(3, 40, 4, 6)}, r"Latents \(3, 40, 4, 6\) do not fit noise"),
        ({"mask": torch.zeros(1, 3, 64, 96)}, r"shape \(1 or 1, 1, H, W\), got \(1, 3, 64, 96\)"),
        ({"mask": torch.zeros(64, 96)}, r"got \(64, 96\)"),
        ({"mask": torch.zeros(1, 1, 62, 96)}, "62x96, no multiple of the 4x6"),
    ],
)
def test_shapes_that_do_not_fit_are_named(parts, change, message):
    values = dict(zip(("latents", "mask", "noise"), parts, strict=True))
    with pytest.raises(ValueError, match=message):
        InpaintingCallback(**{**values, **change})


def test_another_size_of_the_pipeline_is_named(vae, parts):
    with pytest.raises(ValueError, match=r"latents \(1, 40, 2, 2\), not \(1, 40, 4, 6\)"):
        run(tiny_dit_pipeline(vae), 1, callback_on_step_end=InpaintingCallback(*parts))
