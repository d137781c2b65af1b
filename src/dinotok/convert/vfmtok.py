"""The released VFMTok and VFMAE tokenizers (github.com/CVMI-Lab/VFMTok, VFMTok2, VFMTok-RAR), key by key."""

import codecs
import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..configs import config_path
from ..models.autoencoder_vfmtok import AutoencoderVFMTok
from ..models.region_tokenizer import RegionTokenizerModel
from ..models.vq_model_vfmtok import VQModelVFMTok
from .checkpoint import ConversionReport, KeyReader, read_checkpoint

# What no tensor of a checkpoint shows. The heads of the region sampler and the groups of all group norms are constants
# of the authors' code, and so are the normalisation of the encoder's input and the 1e-5 added to standard deviations.
_SAMPLER_HEADS = 8
_GROUPS = 32
_CONSTANTS = {
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
    "sampler_num_attention_heads": _SAMPLER_HEADS,
    "norm_num_groups": _GROUPS,
    "attention_dropout": 0.1,
}
_STD_OFFSET = 1e-5

# Our names to theirs, replaced in this order.
_NAMES = {
    "sampler.queries": "encode_transformer.carrier_tokens",
    "sampler.query_positions": "encode_transformer.slots_pos",
    "sampler.norm_queries.": "encode_transformer.norm_pre1.",
    "sampler.layers.": "encode_transformer.transformer.layers.",
    "token_decoder.layers.": "decode_transformer.transformer.layers.",
    "token_decoder.feature_layers.": "decode_transformer.dino_transformer.layers.",
    "token_decoder.region_positions": "decode_transformer.slot_position_embedding",
    "token_decoder.positions": "decode_transformer.position_embedding",
    "token_decoder.pixel_mask_token": "decode_transformer.mask_embedding",
    "token_decoder.class_token": "decode_transformer.cls_token",
    "token_decoder.norm_pixels.": "decode_transformer.norm_post1.",
    "token_decoder.norm_features.": "decode_transformer.norm_post2.",
    "token_decoder.feature_head.": "decode_transformer.proj.",
    "token_decoder.": "decode_transformer.",
    ".norm_cross_attention.": ".norm1.",
    ".norm_self_attention.": ".norm3.",
    ".norm_attention.": ".norm1.",
    ".norm_feed_forward.": ".norm2.",
    ".feed_forward.0.": ".linear1.",
    ".feed_forward.2.": ".linear2.",
    ".feed_forward.gate_up.": ".ffnet.w12.",
    ".feed_forward.down.": ".ffnet.w3.",
    ".value_projection.": ".value_proj.",
    ".output_projection.": ".output_proj.",
    ".cross_attention.": ".cross_attn.",
    ".self_attention.to_": ".self_attn.",
    ".attention.to_": ".attn1.",
    "decoder.conv_norm_out.": "decoder.norm_out.",
    "decoder.mid_block.resnets.0.": "decoder.mid.0.",
    "decoder.mid_block.resnets.1.": "decoder.mid.2.",
    "decoder.mid_block.attentions.0.group_norm.": "decoder.mid.1.norm.",
    "decoder.mid_block.attentions.0.to_out.0.": "decoder.mid.1.proj_out.",
    "decoder.mid_block.attentions.0.to_": "decoder.mid.1.",
    "decoder.up_blocks.": "decoder.conv_blocks.",
    ".resnets.": ".res.",
    ".upsamplers.0.": ".upsample.",
    ".conv_shortcut.": ".nin_shortcut.",
    "latents_to_regions.": "post_slots_quant.",
}
_VFMTOK_NAMES = {
    "token_decoder.feature_mask_token": "decode_transformer.mask_dino",
    "regions_to_latents.": "pre_slots_quant.",
    "quantizer.codebook": "slot_quantize.embedding.weight",
}
_VFMAE_NAMES = {
    "token_decoder.feature_mask_token": "decode_transformer.dino_mask",
    "norm_regions.": "slots_quant.norm_out.",
    "regions_to_latents.": "slots_quant.conv_out.",
}


def convert_vfmtok(
    checkpoint: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    encoder: str | None = None,
    image_size: int = 336,
    encoder_image_size: int = 336,
    num_attention_heads: int = 8,
) -> ConversionReport:
    """Turn a released `vfmtok-tokenizer.pt` into a folder for `VQModelVFMTok.from_pretrained`.

    Sizes are read from the tensors; those that no tensor shows are arguments, which default to the release.

    Args:
        checkpoint: The file: a training checkpoint, whose averaged weights are taken, or a flat state dict.
        output: The folder; made if it is missing.
        encoder: Folder or repository of the frozen encoder, to be saved with the tokenizer. By default it is not: the
            config names facebook/dinov2-with-registers-large, and `from_pretrained` fetches it.
        image_size: Pixels in and out.
        encoder_image_size: What the encoder sees.
        num_attention_heads: Of the token decoder.

    Returns:
        What became of every tensor; it is written beside the weights, too, as `conversion.json`.

    Raises:
        ValueError: If the file is damaged, another model's, or lacks or has a tensor too many; it names the first.
        OSError: If a file cannot be read or written, or the encoder is out of reach.
    """
    tensors = _read(checkpoint, "slot_quantize.embedding.weight", "VFMTok")
    config = {
        **_common_config(tensors),
        "image_size": image_size,
        "encoder_image_size": encoder_image_size,
        "decoder_num_attention_heads": num_attention_heads,
        "codebook_size": tensors["slot_quantize.embedding.weight"].shape[0],
        "num_register_tokens": _shape(tensors, "decode_transformer.register_tokens", 3)[1],
    }
    return _convert(VQModelVFMTok, config, tensors, _VFMTOK_NAMES, checkpoint, output, encoder)


def convert_vfmae(
    checkpoint: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    encoder: str | None = None,
    statistics: str | os.PathLike[str] | None = None,
    encoder_image_size: int = 224,
    num_attention_heads: int = 8,
) -> ConversionReport:
    """Turn a released `vfmae-tokenizer.pt` into a folder for `AutoencoderVFMTok.from_pretrained`.

    Args:
        checkpoint: As in `convert_vfmtok`.
        output: Likewise.
        encoder: Likewise.
        statistics: `stats-500.pt` of the authors: mean and standard deviation of each channel at each position, which
            their generator works with. By default latents are not normalised.
        encoder_image_size: As in `convert_vfmtok`.
        num_attention_heads: Likewise.

    Returns:
        As `convert_vfmtok`.

    Raises:
        ValueError: As `convert_vfmtok`, and if the statistics do not fit.
        OSError: As `convert_vfmtok`.
    """
    tensors = _read(checkpoint, "slots_quant.conv_out.weight", "VFMAE")
    shared = _common_config(tensors)
    feature_layers = _count(tensors, "decode_transformer.dino_transformer.layers")
    config = {
        **shared,
        "image_size": shared["position_grid"] * shared["patch_size"],
        "encoder_image_size": encoder_image_size,
        "decoder_num_attention_heads": num_attention_heads,
        "feature_decoder_num_layers": feature_layers,
        "projector_num_groups": _GROUPS,
        "num_register_tokens": 0,
    }
    if statistics is not None:
        mean, std = read_latents_statistics(statistics)
        config |= {"latents_mean": mean.flatten().tolist(), "latents_std": std.flatten().tolist()}
    return _convert(AutoencoderVFMTok, config, tensors, _VFMAE_NAMES, checkpoint, output, encoder)


def read_latents_statistics(path: str | os.PathLike[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Read the authors' statistics of VFMAE latents.

    The file holds numpy arrays, which are unpickled with nothing but numpy's own constructors allowed. Its "var" is a
    standard deviation, to which the authors add 1e-5 before they divide by it.

    Args:
        path: Such as `stats-500.pt`.

    Returns:
        Mean and standard deviation, `(C, positions)` float32.

    Raises:
        ValueError: If it is not such a file.
        OSError: If it cannot be read.
    """
    reconstruct = np._core.multiarray._reconstruct  # type: ignore[attr-defined]
    allowed = [reconstruct, (reconstruct, "numpy.core.multiarray._reconstruct"), np.ndarray, np.dtype, codecs.encode]
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{str(path)!r} does not exist or is not a file.")
    try:
        with torch.serialization.safe_globals([*allowed, np.dtypes.Float32DType]):
            found = torch.load(path, map_location="cpu", weights_only=True)
        mean, std = (torch.as_tensor(found[name]).float() for name in ("mean", "var"))
    except (KeyError, TypeError) as error:
        raise ValueError(f"{str(path)!r} has no tensors or arrays 'mean' and 'var'.") from error
    except (RuntimeError, EOFError, ValueError, torch.serialization.pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{str(path)!r} is damaged, or no file of statistics: {reason}") from error
    mean, std = (values.squeeze(0).flatten(1) if values.ndim > 2 else values for values in (mean, std))
    if mean.ndim != 2 or mean.shape != std.shape or not mean.isfinite().all() or not (std > 0).all():
        raise ValueError(
            f"{str(path)!r}: 'mean' {tuple(mean.shape)} and 'var' {tuple(std.shape)} must be finite and of one shape "
            "(channels, positions), 'var' positive."
        )
    return mean, std + _STD_OFFSET


def _read(checkpoint: str | os.PathLike[str], marker: str, family: str) -> dict[str, torch.Tensor]:
    tensors = read_checkpoint(checkpoint)
    if marker not in tensors:
        raise ValueError(
            f"{str(checkpoint)!r} has no tensor {marker!r}, so it is no {family} tokenizer; its first tensors are "
            f"{sorted(tensors)[:3]}."
        )
    return tensors


def _common_config(tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """What the tensors that both models have say about their sizes."""
    hidden_size = _shape(tensors, "encode_transformer.carrier_tokens", 3)[2]
    side = _side(tensors, "encode_transformer.carrier_tokens", 0)
    levels = _count(tensors, "encode_transformer.projectors")
    points, rest = divmod(
        _shape(tensors, "encode_transformer.transformer.layers.0.cross_attn.attention_weights.weight", 2)[0],
        _SAMPLER_HEADS * max(levels, 1),
    )
    if rest or not points:
        raise ValueError(f"The attention weights are not those of {_SAMPLER_HEADS} heads and {levels} levels.")
    stages = _count(tensors, "decoder.conv_blocks")
    widths = [_shape(tensors, f"decoder.conv_blocks.{stage}.res.0.conv1.weight", 4)[0] for stage in range(stages)]
    return {
        **_CONSTANTS,
        "num_levels": levels,
        "query_grid": [side, side],
        "hidden_size": hidden_size,
        "sampler_num_layers": _count(tensors, "encode_transformer.transformer.layers"),
        "sampler_num_points": points,
        "sampler_intermediate_size": _shape(tensors, "encode_transformer.transformer.layers.0.linear1.weight", 2)[0],
        "decoder_num_layers": _count(tensors, "decode_transformer.transformer.layers"),
        "decoder_intermediate_size": _shape(tensors, "decode_transformer.transformer.layers.0.ffnet.w3.weight", 2)[1],
        "position_grid": _side(tensors, "decode_transformer.position_embedding", 1),
        "feature_channels": _shape(tensors, "decode_transformer.proj.weight", 2)[0],
        "latent_channels": _shape(tensors, "post_slots_quant.weight", 2)[1],
        "patch_size": 2 ** (stages - 1),
        "block_out_channels": widths[::-1],
        "layers_per_block": _count(tensors, "decoder.conv_blocks.0.res") - 1,
    }


def _shape(tensors: Mapping[str, torch.Tensor], name: str, ndim: int) -> torch.Size:
    if name not in tensors:
        raise ValueError(f"The checkpoint has no tensor {name!r}: it is another model's, or cut.")
    if tensors[name].ndim != ndim:
        raise ValueError(f"{name!r} has shape {tuple(tensors[name].shape)}, but {ndim} dimensions are expected.")
    return tensors[name].shape


def _side(tensors: Mapping[str, torch.Tensor], name: str, extra: int) -> int:
    """The side of a square grid of tokens, stored after `extra` other ones."""
    count = _shape(tensors, name, 3)[1] - extra
    side = math.isqrt(max(count, 0))
    if side * side != count or not side:
        raise ValueError(f"{name!r} has {count} tokens of a grid, which is not a square.")
    return side


def _count(tensors: Mapping[str, torch.Tensor], prefix: str) -> int:
    """How many numbered modules there are below a prefix."""
    pattern = re.compile(re.escape(prefix) + r"\.(\d+)\.")
    return 1 + max((int(match[1]) for name in tensors if (match := pattern.match(name))), default=-1)


def _convert(
    model_class: type[RegionTokenizerModel],
    config: dict[str, Any],
    tensors: Mapping[str, torch.Tensor],
    names: Mapping[str, str],
    checkpoint: str | os.PathLike[str],
    output: str | os.PathLike[str],
    encoder: str | None,
) -> ConversionReport:
    model = _build(model_class, config, encoder)
    reader = KeyReader(tensors, repr(str(checkpoint)))
    state = _take_all(model, reader, {**names, **_NAMES})
    reader.drop("slot_quantize.codebook_used", "statistics of training: which codes the last batches used")
    for name in tensors:
        if ".backbone." in name:
            reader.drop(name, "the frozen encoder, which comes from its own repository")
    reader.finish()
    report = model.load_state_dict(state, strict=False, assign=True)
    missing = [key for key in report.missing_keys if not key.startswith("encoder.")]
    if missing or report.unexpected_keys:
        raise ValueError(f"The converted weights do not fit: {(missing + report.unexpected_keys)[0]!r}.")
    model.save_pretrained(output, include_encoder=encoder is not None)
    summary = {
        name: value
        for name, value in model.config.items()
        if not name.startswith("_") and name not in ("latents_mean", "latents_std", "encoder_config")
    }
    result = ConversionReport(Path(checkpoint).name, model_class.__name__, summary, reader.used, reader.dropped)
    result.write(output)
    return result


def _build(model_class: type[RegionTokenizerModel], config: dict[str, Any], encoder: str | None) -> Any:
    """Build the model on an encoder of its own, or on the released one's shape without weights."""
    released = json.loads(config_path(_RELEASED[model_class]).read_text(encoding="utf-8"))
    own = {name: value for name, value in config.items() if name != "num_levels"}
    if encoder is not None:
        from ..models.encoders import load_pretrained_encoder

        depth = load_pretrained_encoder(encoder).config["num_hidden_layers"]
        return model_class.from_encoder(encoder, levels=_levels(depth, config["num_levels"]), **own)
    shared = {name: released[name] for name in ("encoder_config", "encoder_repository")}
    levels = _levels(shared["encoder_config"]["num_hidden_layers"], config["num_levels"])
    with torch.device("meta"):
        return model_class(levels=levels, **shared, **own)


_RELEASED: dict[type[RegionTokenizerModel], str] = {
    VQModelVFMTok: "vq_model_vfmtok_dinov2_large",
    AutoencoderVFMTok: "autoencoder_vfmtok_dinov2_large",
}


def _levels(depth: int, count: int) -> list[int]:
    """The ends of equal parts of an encoder: 6, 12, 18 and 24 of 24."""
    return [depth * part // count for part in range(1, count + 1)]


def _take_all(model: Any, reader: KeyReader, names: Mapping[str, str]) -> dict[str, torch.Tensor]:
    """Take a tensor for each of ours outside the encoder, in the shape the authors' code has it in."""
    taken = {}
    for target, ours in _own_tensors(model):
        source = _source_name(target, names)
        taken[target] = reader.take(source, target, _source_shape(source, ours.shape)).float().view(ours.shape)
    return taken


def _own_tensors(model: Any) -> Iterable[tuple[str, torch.Tensor]]:
    return ((name, tensor) for name, tensor in model.state_dict().items() if not name.startswith("encoder."))


def _source_name(target: str, names: Mapping[str, str]) -> str:
    name = target
    for ours, theirs in names.items():
        name = name.replace(ours, theirs)
    name = re.sub(r"(self_attn|attn1)\.(q|k|v|out)\.", r"\1.\2_proj.", name)
    name = re.sub(r"^sampler\.projectors\.(\d+)\.5\.", r"encode_transformer.norm_layers.\1.", name)
    return re.sub(r"^sampler\.projectors\.(\d+)\.", r"encode_transformer.projectors.\1.mlp.", name)


def _source_shape(source: str, shape: Sequence[int]) -> tuple[int, ...]:
    """Where one of both has a 1x1 convolution and the other a linear layer."""
    if re.match(r"decoder\.mid\.1\.(q|k|v|proj_out)\.weight", source):
        return (*shape, 1, 1)
    return tuple(shape[:2]) if source == "pre_slots_quant.weight" else tuple(shape)
