"""Pipelines that are real and small."""

from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.models.modeling_utils import ModelMixin

from dinotok import (
    AutoregressiveTransformer2DModel,
    DiffusionTransformer2DModel,
    DINOTokARPipeline,
    DINOTokDiTPipeline,
)
from tests.conftest import randomize
from tests.tiny_tokenizers import tiny_discrete_tokenizer, tiny_tokenizer

NAMES = {0: "tench, Tinca tinca", 1: "church", 2: "garbage truck", 3: "crane", 4: "crane"}
_SIZES = {"hidden_size": 32, "num_layers": 2, "num_attention_heads": 2, "num_classes": 5}


def tiny_dit_pipeline(vae: ModelMixin | None = None, sample_size: int = 2) -> DINOTokDiTPipeline:
    """Build a diffusion pipeline with random weights, on any continuous tokenizer."""
    vae = tiny_tokenizer() if vae is None else vae
    torch.manual_seed(0)
    transformer = DiffusionTransformer2DModel(vae.config.latent_channels, sample_size=sample_size, **_SIZES)
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    return DINOTokDiTPipeline(randomize(transformer).eval(), vae, scheduler, id2label=NAMES)


def tiny_ar_pipeline(vqvae: ModelMixin | None = None, sample_size: tuple[int, int] = (2, 3)) -> DINOTokARPipeline:
    """Build an autoregressive pipeline with random weights, on any tokenizer with codebooks."""
    vqvae = tiny_discrete_tokenizer() if vqvae is None else vqvae
    torch.manual_seed(0)
    transformer = AutoregressiveTransformer2DModel(
        codebook_sizes=list(vqvae.codebook_sizes.values()),
        sample_size=sample_size,
        head_depth=1,
        intermediate_size=48,
        **_SIZES,
    )
    return DINOTokARPipeline(randomize(transformer).eval(), vqvae, id2label=NAMES)


def save_tiny_pipelines(folder: Path) -> dict[str, Path]:
    """Write one pipeline of each kind, and return their folders."""
    built = {"diffusion": tiny_dit_pipeline(), "autoregressive": tiny_ar_pipeline()}
    for kind, pipeline in built.items():
        pipeline.save_pretrained(folder / kind)
    return {kind: folder / kind for kind in built}
