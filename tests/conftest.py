"""Fixtures shared by all tests: tiny real encoders, real data where it is at hand."""

import json
import os
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModel

from dinotok import AutoencoderDINOTok

DATA = Path(os.environ.get("DINOTOK_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))

# One tiny model of every family that FrozenEncoder is meant for; nothing is square, nothing has the default size.
_COMMON = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 64,
    "patch_size": 16,
}
TINY_ENCODERS = {
    "dinov2": {**_COMMON, "model_type": "dinov2", "mlp_ratio": 2},
    "dinov2_with_registers": {
        **_COMMON,
        "model_type": "dinov2_with_registers",
        "mlp_ratio": 2,
        "patch_size": 14,
        "image_size": 70,
        "num_register_tokens": 4,
    },
    "dinov3_vit": {**_COMMON, "model_type": "dinov3_vit", "num_register_tokens": 2},
    "vit": {**_COMMON, "model_type": "vit"},
    "siglip_vision_model": {**_COMMON, "model_type": "siglip_vision_model"},
    "clip_vision_model": {**_COMMON, "model_type": "clip_vision_model"},
    "vit_mae": {**_COMMON, "model_type": "vit_mae"},
}
TINY_DECODER = {"block_out_channels": (8, 8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 4}


def pytest_collection_modifyitems(items):
    """Skip, by name, what needs the real data where there is none."""
    if not (DATA / "encoder-vit-tiny" / "model.safetensors").is_file():
        for item in items:
            if item.get_closest_marker("data"):
                item.add_marker(pytest.mark.skip(reason="no real data: set DINOTOK_DATA"))


@pytest.fixture(scope="session")
def data_folder() -> Path:
    return DATA


def random_pixels(*shape: int, seed: int = 0) -> torch.Tensor:
    """Smooth random pixels in [-1, 1]: neighbours resemble each other, as in pictures."""
    generator = torch.Generator().manual_seed(seed)
    batch, channels, height, width = shape
    coarse = torch.randn(batch, channels, max(height // 8, 2), max(width // 8, 2), generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bicubic")
    return (smooth * 0.4 + 0.05 * torch.randn(shape, generator=generator)).clamp(-1, 1)


def randomize(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Give every trainable layer random weights, so that nothing is hidden by an initial zero."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data.copy_(noise * (0.3 if parameter.ndim < 2 else parameter[0].numel() ** -0.5))
    return model


def tiny_autoencoder(family: str = "dinov3_vit", **config) -> AutoencoderDINOTok:
    """A small autoencoder of real classes with random weights everywhere."""
    torch.manual_seed(0)
    values = {"encoder_config": TINY_ENCODERS[family], "texture_channels": 8, **TINY_DECODER, **config}
    return randomize(AutoencoderDINOTok(**values)).eval()


def save_tiny_encoder(folder: Path, seed: int, family: str = "dinov3_vit") -> Path:
    """Write an encoder as `transformers` does, with its `preprocessor_config.json`."""
    torch.manual_seed(seed)
    AutoModel.from_config(AutoConfig.for_model(**TINY_ENCODERS[family])).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.25] * 3}))
    return folder


@pytest.fixture
def autoencoder() -> AutoencoderDINOTok:
    return tiny_autoencoder()
