"""Official denoisers of RAE and VFMAE (DiT-DH and LightningDiT) as `DiffusionTransformer2DModel`.

Layouts read in github.com/bytetriper/RAE (MIT, `src/stage2/models`) and github.com/CVMI-Lab/VFMTok2 (Apache-2.0,
`denoise/models`), which are the same. The files carry averaged weights in `ema`, beside the raw ones in `model`.
"""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..models.transformer_diffusion import DiffusionTransformer2DModel, feed_forward_width
from ..models.transformer_layers import rotary_angles, sincos_positions
from .checkpoint import ConversionReport, KeyReader, read_checkpoint, save_converted


@dataclass(frozen=True)
class ConvertedTransformer:
    """A converted denoiser, and what became of every tensor of its source.

    Attributes:
        model: In evaluation mode, float32.
        sources: Source names by parameter of the model.
        dropped: Reasons by source name.
        checkpoint: The file.
    """

    model: DiffusionTransformer2DModel
    sources: dict[str, str]
    dropped: dict[str, str]
    checkpoint: str

    def save(self, folder: str | os.PathLike[str]) -> ConversionReport:
        """Write the model and the account of its tensors; see `save_converted`."""
        return save_converted(self.model, folder, self.checkpoint, self.sources, self.dropped)


def convert_dit_dh(
    path: str | os.PathLike[str],
    *,
    num_attention_heads: int | None = None,
    head_num_attention_heads: int | None = None,
    head_num_layers: int = 2,
) -> ConvertedTransformer:
    """Convert a checkpoint of RAE's or VFMAE's `DiTwDDTHead` or `LightningDiT`.

    Widths, depths, classes, channels and the number of heads are read from the tensors. Position tables are not
    copied but checked: they must be those that the model computes. The weights are the averaged ones if there are
    any.

    Args:
        path: A `.pt` or `.safetensors` file.
        num_attention_heads: Of the body; needed only if the file lacks the rotary tables, which tell.
        head_num_attention_heads: Of the head, likewise.
        head_num_layers: Blocks of the head; used only where body and head have the same width, so that nothing else
            tells them apart.

    Returns:
        The model, and the account of the tensors.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged or unsafe to read, or of another architecture: a tensor is missing, left over or
            of another shape, or a position table is another one.
    """
    tensors = read_checkpoint(path)
    reader = KeyReader(tensors, repr(os.fspath(path)))
    config = _read_config(reader, tensors, (num_attention_heads, head_num_attention_heads), head_num_layers)
    with torch.device("meta"):
        model = DiffusionTransformer2DModel.from_config(config)
    weights, sources = {}, {}
    for targets, source, transform in _names(config):
        tensor = transform(reader.take(source, targets[0])).float()
        for target, part in zip(targets, tensor.chunk(len(targets)), strict=True):
            expected = tuple(model.get_parameter(target).shape)
            if tuple(part.shape) != expected:
                raise ValueError(f"{source!r} gives {tuple(part.shape)} values, but {target!r} needs {expected}.")
            weights[target], sources[target] = part.clone(), source
    _check_tables(reader, tensors, config)
    reader.finish()
    model.load_state_dict(weights, strict=True, assign=True)
    model.time_embedding.features.frequencies.requires_grad_(False)
    return ConvertedTransformer(model.eval(), sources, dict(reader.dropped), os.fspath(path))


def _read_config(
    reader: KeyReader, tensors: dict[str, torch.Tensor], heads: tuple[int | None, int | None], head_num_layers: int
) -> dict[str, int | float | bool | None]:
    """Derive the model's configuration from names and shapes."""

    def shape(name: str) -> tuple[int, ...]:
        if name not in reader:
            raise ValueError(
                f"The checkpoint has no tensor {name!r}: it is no DiT-DH or LightningDiT of RAE or VFMAE."
            )
        return tuple(tensors[name].shape)

    has_head = "s_embedder.proj.weight" in reader
    rows, hidden_size = shape("y_embedder.embedding_table.weight")
    depth = sum(name.startswith("blocks.") and name.endswith(".norm1.weight") for name in tensors)
    widths = [shape(f"blocks.{index}.norm1.weight")[0] for index in range(depth)]
    head_hidden_size = shape("x_embedder.proj.weight")[0] if has_head else None
    if has_head and head_hidden_size != hidden_size:
        head_num_layers = depth - widths.count(hidden_size)
    elif not has_head:
        head_num_layers = 0
    _, channels, patch_size, _ = shape("x_embedder.proj.weight")
    config: dict[str, int | float | bool | None] = {
        "in_channels": channels,
        "num_classes": rows - 1,
        "sample_size": math.isqrt(shape("pos_embed")[1]) * patch_size,
        "patch_size": patch_size,
        "hidden_size": hidden_size,
        "num_layers": depth - head_num_layers,
        "num_attention_heads": _heads(tensors, "enc_feat_rope" if has_head else "feat_rope", hidden_size, heads[0]),
        "mlp_ratio": _mlp_ratio(hidden_size, shape("blocks.0.mlp.w3.weight")[1]),
        "qk_norm": "blocks.0.attn.q_norm.weight" in reader,
    }
    if head_hidden_size is not None:
        config["head_hidden_size"] = head_hidden_size
        config["head_num_layers"] = head_num_layers
        config["head_num_attention_heads"] = _heads(tensors, "dec_feat_rope", head_hidden_size, heads[1])
    return config


def _heads(tensors: dict[str, torch.Tensor], table: str, width: int, given: int | None) -> int:
    cos = tensors.get(f"{table}.freqs_cos")
    if cos is not None:
        return width // cos.shape[1]
    if given is None:
        raise ValueError(f"The checkpoint lacks {table}.freqs_cos, which tells the number of heads: pass it.")
    return given


def _mlp_ratio(width: int, intermediate: int) -> float:
    """Return the roundest ratio that gives a gated layer of this width."""
    for digits in range(4):
        ratio = round(1.5 * (intermediate + 0.5) / width, digits)
        if feed_forward_width(width, ratio) == intermediate:
            return ratio
    return 1.5 * (intermediate + 0.5) / width


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _flat(kernel: torch.Tensor) -> torch.Tensor:
    """A convolution over separate patches, as a matrix."""
    return kernel.flatten(1)


_Transform = Callable[[torch.Tensor], torch.Tensor]
_Names = list[tuple[tuple[str, ...], str, _Transform]]


def _names(config: dict) -> _Names:
    """List `(targets, source, transform)` of every tensor; several targets share its rows."""
    head = config.get("head_hidden_size")
    patch_size = config["patch_size"]

    def channels_first(rows: torch.Tensor) -> torch.Tensor:
        """From `(row, column, channel)` within a patch to `(channel, row, column)`."""
        grid = rows.unflatten(0, (patch_size, patch_size, config["in_channels"]))
        return grid.movedim(2, 0).flatten(0, 2)

    names = [
        (("time_embedding.features.frequencies",), "t_embedder.W", _same),
        (("class_embedding.weight",), "y_embedder.embedding_table.weight", _same),
        *_pair("time_embedding.inner", "t_embedder.mlp.0"),
        *_pair("time_embedding.outer", "t_embedder.mlp.2"),
        *_pair("patch_embedding", "s_embedder.proj" if head else "x_embedder.proj", (_flat, _same)),
        *_pair("output.projection", "final_layer.linear", (channels_first, channels_first)),
        *_pair("output.modulation", "final_layer.adaLN_modulation.1"),
        (("output.norm.weight",), "final_layer.norm_final.weight", _same),
    ]
    if head:
        names += _pair("head_patch_embedding", "x_embedder.proj", (_flat, _same))
        names += [] if head == config["hidden_size"] else _pair("head_projection", "s_projector")
    for index in range(config["num_layers"]):
        names += _block_names(f"blocks.{index}", f"blocks.{index}", config["qk_norm"])
    for index in range(config["head_num_layers"] if head else 0):
        names += _block_names(f"head_blocks.{index}", f"blocks.{config['num_layers'] + index}", config["qk_norm"])
    return names


def _pair(target: str, source: str, transforms: tuple[_Transform, _Transform] = (_same, _same)) -> _Names:
    """Weight and bias of a layer."""
    kinds = zip(("weight", "bias"), transforms, strict=True)
    return [((f"{target}.{kind}",), f"{source}.{kind}", transform) for kind, transform in kinds]


def _block_names(target: str, source: str, qk_norm: bool) -> _Names:
    def queries_keys_values(kind: str) -> tuple[str, ...]:
        return tuple(f"{target}.attention.to_{name}.{kind}" for name in "qkv")

    names = [
        ((f"{target}.attention_norm.weight",), f"{source}.norm1.weight", _same),
        ((f"{target}.feed_forward_norm.weight",), f"{source}.norm2.weight", _same),
        *((queries_keys_values(kind), f"{source}.attn.qkv.{kind}", _same) for kind in ("weight", "bias")),
        *_pair(f"{target}.attention.to_out.0", f"{source}.attn.proj"),
        *_pair(f"{target}.feed_forward.gate_up", f"{source}.mlp.w12"),
        *_pair(f"{target}.feed_forward.down", f"{source}.mlp.w3"),
        *_pair(f"{target}.modulation", f"{source}.adaLN_modulation.1"),
    ]
    if qk_norm:
        names.append(((f"{target}.attention.query_norm.weight",), f"{source}.attn.q_norm.weight", _same))
        names.append(((f"{target}.attention.key_norm.weight",), f"{source}.attn.k_norm.weight", _same))
    return names


def _check_tables(reader: KeyReader, tensors: dict[str, torch.Tensor], config: dict) -> None:
    """Drop the position tables, after checking that they are the ones the model computes."""
    side = config["sample_size"] // config["patch_size"]
    expected = {"pos_embed": sincos_positions(side, side, config["hidden_size"])[None]}
    tables = {"feat_rope": ("hidden_size", "num_attention_heads")}
    if config.get("head_hidden_size"):
        tables = {
            "enc_feat_rope": ("hidden_size", "num_attention_heads"),
            "dec_feat_rope": ("head_hidden_size", "head_num_attention_heads"),
        }
    for name, (width, heads) in tables.items():
        angles = rotary_angles(side, side, config[width] // config[heads]).repeat_interleave(2, dim=-1)
        expected |= {f"{name}.freqs_cos": angles.cos(), f"{name}.freqs_sin": angles.sin()}
    for name, table in expected.items():
        if name not in reader:
            continue
        found = tensors[name].float()
        if found.shape != table.shape or not torch.allclose(found, table, atol=1e-3):
            raise ValueError(f"The table {name!r} of the checkpoint is not the one that the model computes.")
        reader.drop(name, "a fixed table, which the model computes")
