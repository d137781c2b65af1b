"""Halve a model's files for shipping: every floating-point tensor of its safetensors file as float16.

    python training_scripts/pack_model.py --source runs/dinotok-tiny-ae/tokenizer --target models/dinotok-tiny-ae

`from_pretrained` computes with such a file in float32. The config and everything else but the record stay as they are.
"""

import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import HfArgumentParser

WEIGHTS = ("diffusion_pytorch_model.safetensors", "model.safetensors")


@dataclass(frozen=True)
class PackingOptions:
    """Where from and where to.

    Attributes:
        source: Folder of a model, of diffusers or transformers.
        target: Folder for the halved one; made if it is missing.
    """

    source: str = field(metadata={"help": "Folder of a model."})
    target: str = field(metadata={"help": "Folder for the halved one."})


def to_half(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Round a floating-point tensor to float16; integers stay.

    Raises:
        ValueError: If a value is beyond float16.
    """
    if not tensor.is_floating_point():
        return tensor
    half = tensor.half()
    if not half.isfinite().all():
        raise ValueError(f"{name!r} has values up to {float(tensor.abs().max()):.4g}, beyond float16.")
    return half


def main(options: PackingOptions) -> Path:
    """Write the halved model, and return its folder."""
    source, target = Path(options.source), Path(options.target)
    found = [name for name in WEIGHTS if (source / name).is_file()]
    if not found:
        raise FileNotFoundError(f"{str(source)!r} has no {' or '.join(WEIGHTS)}.")
    target.mkdir(parents=True, exist_ok=True)
    with safe_open(source / found[0], "pt") as file:
        tensors = {name: to_half(name, file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118 - no mapping
        metadata = file.metadata()
    unfinished = target / f".{found[0]}.unfinished"
    save_file(tensors, unfinished, metadata)
    os.replace(unfinished, target / found[0])
    for name in ("preprocessor_config.json", "config.json"):
        if (source / name).is_file():
            shutil.copy(source / name, target / name)
    size = (target / found[0]).stat().st_size
    print(json.dumps({"folder": str(target), "tensors": len(tensors), "bytes": size}))
    return target


if __name__ == "__main__":
    main(HfArgumentParser(PackingOptions).parse_args_into_dataclasses()[0])  # type: ignore[arg-type]
