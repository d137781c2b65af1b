"""Tokenizers and pictures that are real and small."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dinotok import AutoencoderDINOTok, AutoencoderVFMTok, VQModelDINOTok, VQModelVFMTok
from tests.conftest import TINY_DECODER, TINY_ENCODERS, randomize


def tiny_tokenizer(seed: int = 0) -> AutoencoderDINOTok:
    """Build a fitted autoencoder whose convolutional decoder contributes too."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = AutoencoderDINOTok(
            encoder_config=TINY_ENCODERS["dinov3_vit"], texture_channels=8, **TINY_DECODER
        ).eval()
        torch.nn.init.normal_(tokenizer.decoder.conv_out.weight, std=0.05)
        return tokenizer.fit([torch.rand(2, 3, 96, 96) * 2 - 1])


def save_picture(path: Path, width: int, height: int, mode: str = "RGB", seed: int = 0) -> Path:
    """Write a smooth random picture in the format of its suffix."""
    array = np.random.default_rng(seed).integers(0, 256, (3, 4, 4), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).resize((width, height), Image.Resampling.BICUBIC).convert(mode).save(path)
    return path


def tiny_discrete_tokenizer(seed: int = 0, **config) -> VQModelDINOTok:
    """Build a fitted discrete tokenizer of 16 + 16 codes."""
    config = {"semantic_codebook_size": 16, "texture_codebook_size": 16, "rank": 8, **config}
    pixels = torch.rand(2, 3, 96, 96, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return VQModelDINOTok.from_autoencoder(tiny_tokenizer(seed), **config).fit([pixels])


_REGIONS = {"encoder_config": TINY_ENCODERS["dinov3_vit"], "image_size": 64, "hidden_size": 32, **TINY_DECODER}
_REGIONS |= {f"{part}_intermediate_size": 24 for part in ("sampler", "decoder")}
_REGIONS |= {f"{part}_num_layers": 1 for part in ("sampler", "decoder")}


def tiny_region_tokenizer(seed: int = 0) -> VQModelVFMTok:
    """Build a discrete tokenizer of 16 codes for pictures of 64 x 64 pixels, with 3 x 5 tokens."""
    return randomize(VQModelVFMTok(codebook_size=16, query_grid=(3, 5), **_REGIONS), seed).eval()


def tiny_region_autoencoder(latent_channels: int = 12) -> AutoencoderVFMTok:
    """Build a continuous tokenizer for pictures of 64 x 64 pixels, whose 4 x 4 tokens are as many as patches."""
    config = {"latent_channels": latent_channels, "query_grid": (4, 4), "projector_num_groups": 4}
    return randomize(AutoencoderVFMTok(**config, **_REGIONS)).eval()
