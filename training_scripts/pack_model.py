"""Halve a model's files for shipping: every floating-point tensor of its safetensors file as float16.

    python training_scripts/pack_model.py --source runs/dinotok-tiny-ae/tokenizer --target models/dinotok-tiny-ae
    python training_scripts/pack_model.py --source runs/dinotok-tiny-dit/pipeline --target models/dinotok-tiny-dit

`from_pretrained` computes with such a file in float32. The config and everything else but the record stay as they are.

Of a pipeline, what is not its tokenizer is packed. The tokenizer has to be one of the package, which the packed
pipeline only names: `dinotok.generation.load_pipeline` puts the two together.
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

from dinotok.bundled import bundled_folder, bundled_models
from dinotok.generation import BUNDLED_TOKENIZER, TOKENIZER_COMPONENTS, find_pipeline
from dinotok.hub import read_config

WEIGHTS = ("diffusion_pytorch_model.safetensors", "model.safetensors")
INDEX = "model_index.json"
# What decides which latents and indices a tokenizer makes; its decoder may have been trained further.
LATENTS_CONFIG = ("_class_name", "encoder_digest", "latent_channels", "latents_mean", "latents_std")
# The encoder is in its digest.
OTHER_PARTS = ("encoder.", "decoder.", "decoder_input.", "linear_decoder.", "linear_deep_decoder.")


@dataclass(frozen=True)
class PackingOptions:
    """Where from and where to.

    Attributes:
        source: Folder of a model, of diffusers or transformers, or of a pipeline of dinotok.
        target: Folder for the halved one; made if it is missing.
    """

    source: str = field(metadata={"help": "Folder of a model or pipeline."})
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


def read_halved(folder: Path) -> tuple[str, dict[str, torch.Tensor], dict[str, str] | None]:
    """Return the name of a model's file, its tensors in float16, and its metadata.

    Raises:
        OSError: If there is no such file.
        ValueError: If a value is beyond float16.
    """
    found = [name for name in WEIGHTS if (folder / name).is_file()]
    if not found:
        raise FileNotFoundError(f"{str(folder)!r} has no {' or '.join(WEIGHTS)}.")
    with safe_open(folder / found[0], "pt") as file:
        tensors = {name: to_half(name, file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118 - no mapping
        return found[0], tensors, file.metadata()


def pack_model(source: Path, target: Path) -> None:
    """Write a halved model."""
    name, tensors, metadata = read_halved(source)
    target.mkdir(parents=True, exist_ok=True)
    unfinished = target / f".{name}.unfinished"
    save_file(tensors, unfinished, metadata)
    os.replace(unfinished, target / name)
    for other in ("preprocessor_config.json", "config.json"):
        if (source / other).is_file():
            shutil.copy(source / other, target / other)


def same_latents(first: Path, second: Path) -> bool:
    """Whether two tokenizers make the same latents and indices, and expect the same to decode."""
    configs = [read_config(folder / "config.json", str(folder), "tokenizer") for folder in (first, second)]
    if any(configs[0].get(key) != configs[1].get(key) for key in LATENTS_CONFIG):
        return False
    kept = [
        {name: tensor for name, tensor in read_halved(folder)[1].items() if not name.startswith(OTHER_PARTS)}
        for folder in (first, second)
    ]
    return kept[0].keys() == kept[1].keys() and all(torch.equal(kept[0][name], kept[1][name]) for name in kept[0])


def find_bundled_tokenizer(folder: Path) -> str:
    """Return the name of the tokenizer in the package that a tokenizer's folder is a copy of.

    Raises:
        ValueError: If there is none.
    """
    names = [name for name in bundled_models() if (bundled_folder(name) / "config.json").is_file()]
    for name in names:
        if same_latents(folder, bundled_folder(name)):
            return name
    raise ValueError(f"The tokenizer in {str(folder)!r} makes other latents than {', '.join(names)} of the package.")


def pack_pipeline(source: Path, target: Path) -> None:
    """Write a halved pipeline that names its tokenizer.

    Raises:
        ValueError: If its tokenizer is not in the package.
    """
    class_name = find_pipeline(source).class_name
    tokenizer = TOKENIZER_COMPONENTS[class_name]
    index = read_config(source / INDEX, str(source), "pipeline")
    index |= {"_class_name": class_name, BUNDLED_TOKENIZER: find_bundled_tokenizer(source / tokenizer)}
    index[tokenizer] = [None, None]  # as diffusers writes a component that is not there
    for name in sorted(index.keys() - {tokenizer}):
        if (source / name / "config.json").is_file():
            pack_model(source / name, target / name)
    if (source / "scheduler").is_dir():
        (target / "scheduler").mkdir(parents=True, exist_ok=True)
        shutil.copy(source / "scheduler" / "scheduler_config.json", target / "scheduler" / "scheduler_config.json")
    unfinished = target / f".{INDEX}.unfinished"
    unfinished.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(unfinished, target / INDEX)


def main(options: PackingOptions) -> Path:
    """Write the halved model or pipeline, and return its folder."""
    source, target = Path(options.source), Path(options.target)
    pack = pack_pipeline if (source / INDEX).is_file() else pack_model
    pack(source, target)
    size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    print(json.dumps({"folder": str(target), "bytes": size}))
    return target


if __name__ == "__main__":
    main(HfArgumentParser(PackingOptions).parse_args_into_dataclasses()[0])  # type: ignore[arg-type]
