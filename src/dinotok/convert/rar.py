"""Official VFMTok-RAR checkpoints to `RandomAutoregressiveTransformer2DModel`."""

import os
import re
from collections.abc import Sequence
from math import isqrt, prod
from typing import Any

import torch

from ..models.transformer_random_autoregressive import RandomAutoregressiveTransformer2DModel
from .checkpoint import KeyReader, read_checkpoint

# The tables of positions are longer than the grid, by these many rows that no token reaches.
_SPARE_POSITIONS = 1024
_SPARE_STEPS = 100


def convert_rar(
    path: str | os.PathLike[str], *, sample_size: Sequence[int] | None = None
) -> tuple[RandomAutoregressiveTransformer2DModel, KeyReader]:
    """Build the model of an official checkpoint.

    Rows of its tables that no token reaches are left out: spare positions and steps, and the mask token's embedding.

    Args:
        path: `model.safetensors` or `vfmtok-rar-*.safetensors`.
        sample_size: Rows and columns of a grid that is not square.

    Returns:
        The model, in evaluation mode and the checkpoint's dtype, and the reader, whose `used` tells where every tensor
        went.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged, or a tensor is missing, left over or of another shape.
    """
    tensors = read_checkpoint(path)
    reader = KeyReader(tensors, source=repr(os.fspath(path)))
    config = rar_config(tensors, sample_size)
    weights = _take_tables(reader, config) | _take_blocks(reader, config)
    reader.drop("attn_mask", "the mask is computed")
    reader.finish()
    with torch.device("meta"):
        model = RandomAutoregressiveTransformer2DModel(**config)
    model.load_state_dict(weights, assign=True)
    return model.eval(), reader


def rar_config(tensors: dict[str, torch.Tensor], sample_size: Sequence[int] | None = None) -> dict[str, Any]:
    """Read the sizes of a model off its tensors.

    Args:
        tensors: By their official names.
        sample_size: Rows and columns of a grid that is not square.

    Returns:
        Arguments of `RandomAutoregressiveTransformer2DModel`.

    Raises:
        ValueError: If a tensor that tells a size is missing, or the grid is unknown.
    """
    needed = ("lm_head.weight", "embeddings.weight", "timesteps_embeddings", "blocks.0.attn.q_norm.weight")
    missing = [name for name in (*needed, "blocks.0.mlp.fc1.weight") if name not in tensors]
    if missing:
        raise ValueError(f"This is no RAR checkpoint: it has no tensor {missing[0]!r}.")
    (codes, hidden), (rows, _), (_, steps, _), (head_dim,) = (tuple(tensors[name].shape) for name in needed)
    positions = steps - _SPARE_STEPS
    grid = [isqrt(positions)] * 2 if sample_size is None else list(sample_size)
    if prod(grid) != positions:
        raise ValueError(f"The model has {positions} positions, which is no grid of {grid}: pass sample_size.")
    layers = {int(found[1]) for key in tensors if (found := re.match(r"blocks\.(\d+)\.", key))}
    return {
        "codebook_sizes": [codes],
        "num_classes": rows - codes - 2,  # codes, mask, classes, null class
        "sample_size": grid,
        "hidden_size": hidden,
        "num_layers": max(layers) + 1,
        "num_attention_heads": hidden // head_dim,
        "intermediate_size": tensors["blocks.0.mlp.fc1.weight"].shape[0],
    }


def _take_tables(reader: KeyReader, config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """What is outside the blocks; contiguous copies where rows are left out."""
    hidden, codes, classes = config["hidden_size"], config["codebook_sizes"][0], config["num_classes"]
    positions = prod(config["sample_size"])
    table = (1, positions + _SPARE_POSITIONS, hidden)
    embeddings = reader.take("embeddings.weight", "code_embedding, class_embedding", (codes + classes + 2, hidden))
    steps = reader.take("timesteps_embeddings", "step_embedding", (1, positions + _SPARE_STEPS, hidden))
    modulation = "adaln_before_head.adaLN_modulation.1"
    return {
        "code_embedding.weight": embeddings[:codes].clone(),
        "class_embedding.weight": embeddings[codes + 1 :].clone(),
        "step_embedding": steps[0, : 1 + positions].clone(),
        "start_embedding": reader.take("cls_token", "start_embedding", (1, 1, hidden)).flatten(),
        "position_embedding": reader.take("pos_embed", "position_embedding", table)[0, : 2 + positions].clone(),
        "target_embedding": reader.take("target_aware_pos_embed", "target_embedding", table)[
            0, 2 : 2 + positions
        ].clone(),
        "norm_modulation.weight": reader.take(f"{modulation}.weight", "norm_modulation.weight", (2 * hidden, hidden)),
        "norm_modulation.bias": reader.take(f"{modulation}.bias", "norm_modulation.bias", (2 * hidden,)),
        "output.weight": reader.take("lm_head.weight", "output.weight", (codes, hidden)),
        "output.bias": reader.take("lm_head.bias", "output.bias", (codes,)),
    }


def _take_blocks(reader: KeyReader, config: dict[str, Any]) -> dict[str, torch.Tensor]:
    hidden, inside = config["hidden_size"], config["intermediate_size"]
    head_dim = hidden // config["num_attention_heads"]
    linear: dict[str, tuple[str, tuple[int, ...]]] = {
        "attn.qkv": ("attention.to_qkv", (3 * hidden, hidden)),
        "attn.proj": ("attention.to_out", (hidden, hidden)),
        "mlp.fc1": ("feed_forward.0", (inside, hidden)),
        "mlp.fc2": ("feed_forward.3", (hidden, inside)),
        "adaLN_modulation.1": ("modulation", (6 * hidden, hidden)),
    }
    norms = {
        "norm1": ("attention_norm", hidden),
        "norm2": ("feed_forward_norm", hidden),
        "attn.q_norm": ("attention.query_norm", head_dim),
        "attn.k_norm": ("attention.key_norm", head_dim),
    }
    shapes: dict[str, tuple[str, tuple[int, ...]]]
    shapes = {f"{old}.weight": (f"{new}.weight", shape) for old, (new, shape) in linear.items()}
    shapes |= {f"{old}.bias": (f"{new}.bias", shape[:1]) for old, (new, shape) in linear.items()}
    for old, (new, width) in norms.items():
        shapes |= {f"{old}.{kind}": (f"{new}.{kind}", (width,)) for kind in ("weight", "bias")}
    return {
        f"blocks.{i}.{new}": reader.take(f"blocks.{i}.{old}", f"blocks.{i}.{new}", shape)
        for i in range(config["num_layers"])
        for old, (new, shape) in shapes.items()
    }
