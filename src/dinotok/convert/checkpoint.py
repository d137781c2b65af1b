"""Read a foreign checkpoint safely, account for every tensor in it, and say where each went."""

import argparse
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

REPORT_NAME = "conversion.json"
# Prefixes that wrappers of torch leave on keys: compiled, then data-parallel, models.
_PREFIXES = ("_orig_mod.", "module.")


def read_checkpoint(
    path: str | os.PathLike[str], containers: Sequence[str] = ("ema", "model", "state_dict")
) -> dict[str, torch.Tensor]:
    """Return the tensors of a `.pt` or `.safetensors` file.

    Pickles are read with `weights_only=True`: tensors, numbers, strings, containers and `argparse.Namespace` (which
    training scripts store beside the weights), nothing that runs code.

    Args:
        path: The file.
        containers: Entries that may hold the weights, the first one present wins; a file without any of them is taken
            as a flat state dict.

    Returns:
        Tensors by name; prefixes that torch's wrappers add are removed.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged, holds more than weights, or no weights at all.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{str(path)!r} does not exist or is not a file.")
    found = _read(path)
    for name in containers:
        if isinstance(found.get(name), Mapping):
            found = found[name]
            break
    tensors = {_without_prefix(key): value for key, value in found.items() if isinstance(value, torch.Tensor)}
    if not tensors:
        raise ValueError(f"{str(path)!r} holds no tensors; its entries are {sorted(map(str, found))[:8]}.")
    return tensors


def _read(path: Path) -> Mapping:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        if type(error).__name__ == "UnpicklingError":  # of a module that nothing here may import
            raise ValueError(
                f"{str(path)!r} holds more than tensors and plain values, and reading it could run code, so it is not "
                f"read: {first_line} Save its weights alone (as safetensors) where you trust it."
            ) from error
        raise ValueError(f"{str(path)!r} is damaged or truncated: {first_line}") from error
    if not isinstance(found, Mapping):
        raise ValueError(f"{str(path)!r} holds a {type(found).__name__}, not a dictionary of tensors.")
    return found


def _without_prefix(key: str) -> str:
    for prefix in _PREFIXES:
        key = key.removeprefix(prefix)
    return key


class KeyReader:
    """Takes tensors out of a foreign state dict one by one, so that none is forgotten and none used twice.

    Args:
        tensors: The state dict; it is not changed.
        source: What to call it in errors.

    Attributes:
        used: Source names by target name, in the order they were taken: the report of a conversion.
        dropped: Reasons by source name, for tensors left out on purpose.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor], source: str = "The checkpoint"):
        self._left = dict(tensors)
        self._source = source
        self.used: dict[str, str] = {}
        self.dropped: dict[str, str] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._left

    def take(self, name: str, target: str, shape: Sequence[int] | None = None) -> torch.Tensor:
        """Remove a tensor and note where it goes.

        Args:
            name: In the source.
            target: In the converted model.
            shape: What it must have; not checked by default.

        Returns:
            The tensor.

        Raises:
            ValueError: If it is missing, taken already, or of another shape.
        """
        if name not in self._left:
            raise ValueError(f"{self._source} has no tensor {name!r} (for {target!r}): it is another model's, or cut.")
        tensor = self._left.pop(name)
        if shape is not None and tuple(tensor.shape) != tuple(shape):
            raise ValueError(
                f"{self._source}: {name!r} has shape {tuple(tensor.shape)}, but {target!r} needs {tuple(shape)}."
            )
        self.used[target] = name
        return tensor

    def drop(self, name: str, reason: str) -> None:
        """Leave a tensor out on purpose; one that is not there is no error."""
        if self._left.pop(name, None) is not None:
            self.dropped[name] = reason

    def finish(self) -> None:
        """Check that nothing is left.

        Raises:
            ValueError: If a tensor was neither taken nor dropped; it names the first.
        """
        if self._left:
            first = next(iter(self._left))
            raise ValueError(f"{self._source} has {len(self._left)} tensors that the model does not, first {first!r}.")


@dataclass(frozen=True)
class ConversionReport:
    """What became of every tensor of a checkpoint.

    Attributes:
        checkpoint: Name of the file.
        class_name: Of the model it was converted to.
        config: The model's; for a tokenizer without the statistics of its latents and the encoder's config.
        used: Source names by our names.
        dropped: Reasons by source name, of tensors that have no place in the model.
    """

    checkpoint: str
    class_name: str
    config: dict[str, Any]
    used: dict[str, str]
    dropped: dict[str, str]

    def write(self, folder: str | os.PathLike[str]) -> None:
        """Write `conversion.json` into a folder, whole or not at all."""
        unfinished = Path(folder) / f".{REPORT_NAME}.unfinished"
        unfinished.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")
        os.replace(unfinished, Path(folder) / REPORT_NAME)


def save_converted(
    model: Any,
    folder: str | os.PathLike[str],
    checkpoint: str | os.PathLike[str],
    used: Mapping[str, str],
    dropped: Mapping[str, str],
) -> ConversionReport:
    """Write a converted model and the account of its tensors, each file complete or not at all, the config last.

    Args:
        model: Of diffusers, without a frozen encoder.
        folder: Made if it is missing.
        checkpoint: The file it was converted from.
        used: As in `ConversionReport`.
        dropped: Likewise.

    Returns:
        The report; `conversion.json` beside the weights holds the same.
    """
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    config = {name: value for name, value in model.config.items() if not name.startswith("_")}
    report = ConversionReport(Path(checkpoint).name, type(model).__name__, config, dict(used), dict(dropped))
    with tempfile.TemporaryDirectory(dir=target, prefix=".writing-") as temporary:
        model.save_pretrained(temporary)
        report.write(temporary)
        for path in sorted(Path(temporary).iterdir(), key=lambda path: path.name == model.config_name):
            os.replace(path, target / path.name)
    return report
