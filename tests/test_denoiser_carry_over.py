"""What docs/swapping_the_vae.md says of a trained denoiser on latents it was not trained on, measured again."""

import re

import pytest
import torch
from PIL import Image

from dinotok import AutoencoderDINOTok, DiffusionTransformer2DModel, ImageProcessor
from dinotok.bundled import bundled_folder
from dinotok.diffusion_training import DenoisingObjective, Draws
from dinotok.flow_matching import dimension_shift, shift_time
from dinotok.hub import load_tokenizer
from dinotok.quickstart import photograph
from tests.test_readme import ROOT

NAMES = ("astronaut", "chelsea", "coffee", "hubble_deep_field", "retina", "rocket")
TIMES = 4
NULL_CLASS = 10


def velocity_loss(transformer: DiffusionTransformer2DModel, latents: torch.Tensor) -> float:
    """Of every picture at four times, with the same noise for all latents of a shape."""
    rows = latents.repeat_interleave(TIMES, 0)
    noise = torch.randn(rows.shape, generator=torch.Generator().manual_seed(0))
    times = shift_time((torch.arange(len(rows)) % TIMES + 0.5) / TIMES, dimension_shift(latents[0].numel()))
    draws = Draws(torch.full((len(rows),), NULL_CLASS), times, noise)
    return DenoisingObjective(transformer)(rows, draws).mean().item()


@torch.no_grad()
def test_losses_on_other_latents_are_those_of_the_page():
    own = load_tokenizer("dinotok-tiny-ae")
    pictures = [Image.open(photograph(f"{name}.jpg")).convert("RGB").resize((128, 128)) for name in NAMES]
    pixels = ImageProcessor.from_model(own).preprocess(pictures)
    other = AutoencoderDINOTok.from_encoder(
        str(bundled_folder("dinotok-tiny-encoder")),
        texture_channels=96,
        block_out_channels=(8,) * 5,
        norm_num_groups=4,
    ).fit([pixels], projection="pca")
    transformer = DiffusionTransformer2DModel.from_pretrained(
        bundled_folder("dinotok-tiny-dit"), subfolder="transformer"
    ).eval()
    latents = own.encode(pixels).latent
    shuffled = latents[:, torch.randperm(latents.shape[1], generator=torch.Generator().manual_seed(0))]
    found = [velocity_loss(transformer, values) for values in (latents, other.encode(pixels).latent, shuffled)]
    nothing = 1 + latents.square().mean().item()  # of noise minus latents, predicted as zero
    page = (ROOT / "docs" / "swapping_the_vae.md").read_text("utf-8")
    printed = [float(number) for number in re.findall(r"^\| .* \| (\d\.\d\d) \|$", page, re.MULTILINE)]
    assert printed == pytest.approx([*found, nothing], abs=0.02)
    assert found[0] < found[1] < nothing < found[2]
