"""Latents in safetensors shards that say which model they belong to and how large each picture was."""

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .folders import Picture, writing
from .shards import ModelOrigin, Shard, check_format, check_has_no_shards, check_picture, parsing_metadata

FORMAT = "dinotok-latents"
FORMAT_VERSION = "1"
# A shard ends here even if it has fewer pictures than asked for: this much is kept in memory while it fills.
MAX_SHARD_BYTES = 512 * 2**20


def write_shards(
    pictures: Iterable[Picture],
    folder: str | os.PathLike[str],
    origin: ModelOrigin,
    shard_size: int = 256,
    dtype: torch.dtype = torch.float32,
) -> Iterator[Path]:
    """Write latents to `latents-00000.safetensors`, `latents-00001.safetensors`, ..., each whole or not at all.

    Args:
        pictures: Latents `(C, h, w)` with unique names.
        folder: Made if it is missing; must not have such shards yet.
        origin: What made the latents.
        shard_size: Pictures per shard; a shard also ends at 512 MiB.
        dtype: To store them in.

    Yields:
        Every file, once it is written.

    Raises:
        ValueError: If the folder has shards already, or a name comes twice in one of them.
    """
    folder = Path(folder)
    check_has_no_shards(folder)
    tensors: dict[str, torch.Tensor] = {}
    sizes: dict[str, tuple[int, int]] = {}
    number = filled = 0
    for picture in pictures:
        if picture.name in tensors:
            raise ValueError(f"The picture name {picture.name!r} comes twice; names must be unique.")
        tensors[picture.name] = picture.values.to("cpu", dtype, copy=True).contiguous()
        sizes[picture.name] = picture.size
        filled += tensors[picture.name].nbytes
        if len(tensors) == shard_size or filled >= MAX_SHARD_BYTES:
            yield _write_shard(folder / f"latents-{number:05d}.safetensors", tensors, sizes, origin)
            tensors, sizes, number, filled = {}, {}, number + 1, 0
    if tensors:
        yield _write_shard(folder / f"latents-{number:05d}.safetensors", tensors, sizes, origin)


def open_shard(path: str | os.PathLike[str]) -> Shard:
    """Read and check what a file of latents says about itself.

    Args:
        path: Written by `write_shards`.

    Returns:
        The shard; its tensors are still on disk.

    Raises:
        ValueError: If the file is truncated, not safetensors, not latents of this library, or contradicts itself.
        OSError: If it cannot be read.
    """
    path = Path(path)
    with _open(path) as file:
        metadata = file.metadata() or {}
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118  no iterator
    check_format(path, metadata, FORMAT, FORMAT_VERSION, Shard.content)
    with parsing_metadata(path):
        return _parse(path, metadata, shapes)


def read_latents(shard: Shard) -> Iterator[Picture]:
    """Read the latents of a shard one after the other.

    Args:
        shard: From `open_shard`.

    Yields:
        Latents `(C, h, w)` in the dtype they were stored in, in the order they were written.

    Raises:
        ValueError: If the file has been damaged since it was opened.
    """
    with _open(shard.path) as file:
        for name, size in shard.sizes.items():
            yield Picture(name, size, file.get_tensor(name))


def _write_shard(
    path: Path, tensors: dict[str, torch.Tensor], sizes: dict[str, tuple[int, int]], origin: ModelOrigin
) -> Path:
    pictures = {
        name: {"size": list(size), "padded_size": list(origin.padded_size(*tensors[name].shape[1:]))}
        for name, size in sizes.items()
    }
    metadata = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        **origin.to_metadata(),
        "pictures": json.dumps(pictures),
    }
    with writing(path) as temporary:
        save_file(tensors, temporary, metadata=metadata)
    return path


def _open(path: Path):
    """Open a safetensors file, with an error that names it."""
    if path.is_dir():
        raise IsADirectoryError(f"{str(path)!r} is a folder, not a file of latents.")
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{str(path)!r} is truncated or not a safetensors file: {error}.") from error


def _parse(path: Path, metadata: dict[str, str], shapes: dict[str, tuple[int, ...]]) -> Shard:
    origin = ModelOrigin.from_metadata(metadata)
    pictures = json.loads(metadata["pictures"])
    if set(pictures) != set(shapes):
        raise ValueError(f"it lists {len(pictures)} pictures, the file has other ones ({len(shapes)} tensors)")
    sizes = {}
    for name, entry in pictures.items():
        height, width = entry["size"]
        _, rows, columns = shapes[name]
        padded = origin.padded_size(rows, columns)
        check_picture(name, (height, width), padded)
        if list(padded) != entry["padded_size"]:
            raise ValueError(
                f"{name!r} is padded to {entry['padded_size']}, which does not fit latents {shapes[name]}"
            )
        sizes[name] = (int(height), int(width))
    return Shard(path, origin, sizes)
