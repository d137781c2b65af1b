"""Official VFMTok GPT checkpoints (LlamaGen's class-conditional transformer) to `AutoregressiveTransformer2DModel`."""

import os
import re
from collections.abc import Sequence
from typing import Any

import torch

from ..models.transformer_autoregressive import AutoregressiveTransformer2DModel
from .checkpoint import KeyReader, read_checkpoint

# Heads are not in the tensors. Published sizes, by width and number of blocks:
# B, L, XL, XXL, 2B and 3B of VFMTok; XXXL, 1B and 7B of LlamaGen.
_HEADS = {
    (768, 12): 12,
    (1024, 24): 16,
    (1280, 36): 20,
    (1536, 48): 24,
    (1920, 48): 32,
    (3200, 24): 32,
    (2560, 48): 40,
    (2048, 22): 32,
    (4096, 32): 32,
}


def convert_gpt(
    path: str | os.PathLike[str],
    *,
    num_attention_heads: int | None = None,
    sample_size: Sequence[int] = (16, 16),
) -> tuple[AutoregressiveTransformer2DModel, KeyReader]:
    """Build the model of an official checkpoint, from its averaged weights where it has them.

    Args:
        path: `GPT-*.pt`, or the same weights as safetensors.
        num_attention_heads: For a model of none of the published sizes.
        sample_size: Rows and columns of the grid it was trained on.

    Returns:
        The model, in evaluation mode and the checkpoint's dtype, and the reader, whose `used` and `dropped` tell
        where every tensor went.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged, or a tensor is missing, left over or of another shape.
    """
    tensors = read_checkpoint(path)
    reader = KeyReader(tensors, source=repr(os.fspath(path)))
    config = gpt_config(tensors, num_attention_heads, sample_size)
    weights = _take_weights(reader, config)
    reader.drop("freqs_cis", "the rotary table is computed")
    reader.finish()
    with torch.device("meta"):
        model = AutoregressiveTransformer2DModel(**config)
    model.load_state_dict(weights, assign=True)
    return model.eval(), reader


def gpt_config(
    tensors: dict[str, torch.Tensor], num_attention_heads: int | None = None, sample_size: Sequence[int] = (16, 16)
) -> dict[str, Any]:
    """Read the sizes of a model off its tensors.

    Args:
        tensors: By their official names.
        num_attention_heads: For a model of none of the published sizes.
        sample_size: Rows and columns of the grid it was trained on.

    Returns:
        Arguments of `AutoregressiveTransformer2DModel`.

    Raises:
        ValueError: If a tensor that tells a size is missing, or the number of heads is unknown.
    """
    needed = ("tok_embeddings.weight", "cls_embedding.embedding_table.weight", "layers.0.feed_forward.w1.weight")
    missing = [name for name in needed if name not in tensors]
    if missing:
        raise ValueError(f"This is no class-conditional GPT checkpoint: it has no tensor {missing[0]!r}.")
    codes, classes, gate = (tensors[name].shape for name in needed)
    layers = {int(found[1]) for key in tensors if (found := re.match(r"layers\.(\d+)\.", key))}
    size = (codes[1], max(layers) + 1)
    if num_attention_heads is None and size not in _HEADS:
        raise ValueError(
            f"hidden_size={size[0]} with {size[1]} layers is none of the published sizes: pass num_attention_heads."
        )
    return {
        "codebook_sizes": [codes[0]],
        "num_classes": classes[0] - 1,
        "sample_size": list(sample_size),
        "hidden_size": size[0],
        "num_layers": size[1],
        "num_attention_heads": num_attention_heads or _HEADS[size],
        "intermediate_size": gate[0],
    }


def _take_weights(reader: KeyReader, config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """All tensors under their new names; gate and up projection become one matrix."""
    hidden, inside, codes = config["hidden_size"], config["intermediate_size"], config["codebook_sizes"][0]
    names = {
        "cls_embedding.embedding_table.weight": ("class_embedding.weight", (config["num_classes"] + 1, hidden)),
        "tok_embeddings.weight": ("code_embeddings.0.weight", (codes, hidden)),
        "norm.weight": ("norm.weight", (hidden,)),
        "output.weight": ("head.outputs.0.weight", (codes, hidden)),
    }
    weights = {}
    for i in range(config["num_layers"]):
        old, new = f"layers.{i}", f"blocks.{i}"
        names |= {
            f"{old}.attention_norm.weight": (f"{new}.attention_norm.weight", (hidden,)),
            f"{old}.attention.wqkv.weight": (f"{new}.attention.to_qkv.weight", (3 * hidden, hidden)),
            f"{old}.attention.wo.weight": (f"{new}.attention.to_out.weight", (hidden, hidden)),
            f"{old}.ffn_norm.weight": (f"{new}.feed_forward_norm.weight", (hidden,)),
            f"{old}.feed_forward.w2.weight": (f"{new}.feed_forward.down.weight", (hidden, inside)),
        }
        target = f"{new}.feed_forward.gate_up.weight"
        gate = reader.take(f"{old}.feed_forward.w1.weight", f"{target}[:{inside}]", (inside, hidden))
        up = reader.take(f"{old}.feed_forward.w3.weight", f"{target}[{inside}:]", (inside, hidden))
        weights[target] = torch.cat([gate, up])
    for name, (target, shape) in names.items():
        weights[target] = reader.take(name, target, shape)
    return weights
