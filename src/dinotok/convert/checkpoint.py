"""Read a foreign checkpoint safely, and account for every tensor in it."""

import argparse
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file

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
