"""What docs/swapping_the_vae.md says can be typed, works, and what it says of the results is so."""

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from dinotok import DINOTokDiTPipeline
from tests.test_readme import blocks, run_snippet

PAGE = "docs/swapping_the_vae.md"


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> list[dict]:
    """What every snippet left, run in order in one folder."""
    folder, names, seen = tmp_path_factory.mktemp("page"), {}, []
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for snippet in blocks(PAGE, "python"):
            run_snippet(snippet, names)
            seen.append(dict(names))
    return [*seen, {"folder": folder}]


def find(results: list[dict], name: str) -> list:
    """Every different value that a name had, in order."""
    found: list = []
    for names in results:
        if name in names and not any(names[name] is value for value in found):
            found.append(names[name])
    return found


def test_every_pipeline_draws_at_the_size_that_was_asked_for(results):
    for name, count in (("drawn", 3), ("varied", 3), ("inpainted", 3)):
        pictures = find(results, name)
        assert [picture.size for picture in pictures] == [(192, 128)] * count, name
    assert [picture.size for picture in find(results, "pictures")[0]] == [(128, 128)] * 2
    assert find(results, "kl_picture")[0].size == (96, 64) and find(results, "rae_picture")[0].size == (32, 32)


def test_inpainting_keeps_the_picture_outside_the_mask(results):
    names = results[-2]
    vae, pixels = names["vae"], names["pixels"]
    with torch.no_grad():
        expected = names["processor"].postprocess(vae(pixels).sample)[0]
    far = np.s_[:, 144:]  # two latents away from the mask, where the decoder hardly sees it
    for inpainted in find(results, "inpainted"):
        error = np.abs(np.asarray(inpainted, np.float32) - np.asarray(expected, np.float32))
        assert error[far].mean() < 0.5 * error[32:96, 64:128].mean()


def test_the_loss_falls_from_the_variance_of_the_latents(results):
    names = results[-2]
    losses = names["losses"]
    assert losses[0] == pytest.approx(names["latents"].square().mean().item(), rel=1e-3)
    assert np.mean(losses[-10:]) < 0.8 * losses[0]
    assert sorted(names["new"]) == ["conv_in.weight", "conv_out.bias", "conv_out.weight"]


@torch.no_grad()
def test_the_merged_pipeline_is_what_was_trained_and_loads(results):
    names, folder = results[-2], results[-1]["folder"]
    loaded = DiffusionPipeline.from_pretrained(folder / "my-pipeline")
    inputs = (names["latents"], torch.tensor(500), names["prompts"])
    torch.testing.assert_close(loaded.unet(*inputs).sample, names["unet"](*inputs).sample)
    assert not any("lora" in name for name in loaded.unet.state_dict())
    body = {name: value for name, value in names["trained"].state_dict().items() if name not in names["new"]}
    changed = {name for name, value in body.items() if not torch.equal(value, loaded.unet.state_dict()[name])}
    assert changed and all(".to_" in name for name in changed)


def test_our_pipelines_hold_diffusers_autoencoders(results):
    names = results[-2]
    assert isinstance(names["of_kl"], DINOTokDiTPipeline) and names["of_kl"].vae_scale_factor == 8
    assert isinstance(names["kl_picture"], Image.Image)
