"""Weights of fixed networks, such as those behind metrics: a safetensors file has to fit exactly or is refused."""

import os

import torch
from safetensors import SafetensorError, safe_open
from torch import nn


def read_weights(path: str | os.PathLike[str]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Read a safetensors file.

    Args:
        path: Of the file.

    Returns:
        Its tensors, those of floating point as float32, and its metadata.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not a whole safetensors file.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"There is no file {os.fspath(path)!r}.")
    try:
        with safe_open(os.fspath(path), "pt") as file:
            weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no mapping
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{os.fspath(path)!r} is damaged or no safetensors file: {error}.") from error
    return {k: v.float() if v.is_floating_point() else v for k, v in weights.items()}, metadata


def load_exactly(network: nn.Module, weights: dict[str, torch.Tensor], source: str) -> None:
    """Put weights into a network that was built on the meta device or anywhere else.

    Args:
        network: Its parameters become the tensors of `weights` themselves; nothing is copied.
        weights: One finite tensor of the right shape for every entry of the network's state dict, and no others.
        source: Where they are from, for the errors.

    Raises:
        ValueError: If a tensor is missing, unexpected, of another shape, or not finite.
    """
    expected = network.state_dict()
    missing, unexpected = sorted(expected.keys() - weights.keys()), sorted(weights.keys() - expected.keys())
    if missing or unexpected:
        raise ValueError(
            f"{source!r} does not hold the weights of {type(network).__name__}: {len(missing)} tensors are missing"
            f"{_first(missing)} and {len(unexpected)} unexpected{_first(unexpected)}."
        )
    for key, values in weights.items():
        if values.shape != expected[key].shape:
            raise ValueError(
                f"{key!r} in {source!r} has shape {tuple(values.shape)}; expected {tuple(expected[key].shape)}."
            )
        if not values.isfinite().all():
            raise ValueError(f"{key!r} in {source!r} contains NaN or infinite values.")
    network.load_state_dict(weights, assign=True)


def _first(keys: list[str]) -> str:
    return f" (first {keys[0]!r})" if keys else ""
