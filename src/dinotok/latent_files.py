"""Latents in safetensors shards that say which model they belong to and how large each picture was."""

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from . import __version__
from .folders import Picture, writing

FORMAT = "dinotok-latents"
FORMAT_VERSION = "1"
# A shard ends here even if it has fewer pictures than asked for: this much is kept in memory while it fills.
MAX_SHARD_BYTES = 512 * 2**20


@dataclass(frozen=True)
class LatentsOrigin:
    """What made the latents of a shard.

    Attributes:
        model: Folder or repository, as the user named it.
        revision: Commit of the repository, or digest of the folder.
        digest: Digest of the model's files, wherever they are: what `decode` compares.
        class_name: Of the model.
        patch_size: Pixels per latent on each side.
        settings: How it was run (dtype, tiles), for the record.
    """

    model: str
    revision: str
    digest: str
    class_name: str
    patch_size: int
    settings: dict


@dataclass(frozen=True)
class Shard:
    """A file of latents whose metadata was read and checked.

    Attributes:
        path: The file.
        origin: What made it.
        sizes: `(height, width)` of every picture, in the order they were written.
    """

    path: Path
    origin: LatentsOrigin
    sizes: dict[str, tuple[int, int]]


def write_shards(
    pictures: Iterable[Picture],
    folder: str | os.PathLike[str],
    origin: LatentsOrigin,
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


def check_has_no_shards(folder: Path) -> None:
    """Refuse a folder where shards of another run would be mixed with new ones.

    Raises:
        ValueError: If the folder has any.
    """
    present = sorted(folder.glob("latents-*.safetensors"))
    if present:
        raise ValueError(
            f"{str(folder)!r} has {len(present)} shards already, first {present[0].name!r}: "
            "remove them or choose another folder."
        )


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
    if metadata.get("format") != FORMAT:
        raise ValueError(
            f"{str(path)!r} is a safetensors file without latents: its metadata has no format={FORMAT!r}."
        )
    if metadata.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{str(path)!r} has format_version={metadata.get('format_version')!r}, this dinotok ({__version__}) reads "
            f"{FORMAT_VERSION!r}."
        )
    try:
        return _parse(path, metadata, shapes)
    except (KeyError, TypeError, ValueError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"The metadata of {str(path)!r} is damaged: {reason}.") from error


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
    path: Path, tensors: dict[str, torch.Tensor], sizes: dict[str, tuple[int, int]], origin: LatentsOrigin
) -> Path:
    pictures = {
        name: {"size": list(size), "padded_size": [side * origin.patch_size for side in tensors[name].shape[1:]]}
        for name, size in sizes.items()
    }
    metadata = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "dinotok_version": __version__,
        "model": origin.model,
        "model_revision": origin.revision,
        "model_digest": origin.digest,
        "class_name": origin.class_name,
        "patch_size": str(origin.patch_size),
        "settings": json.dumps(origin.settings),
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
    patch_size = int(metadata["patch_size"])
    pictures = json.loads(metadata["pictures"])
    if set(pictures) != set(shapes):
        raise ValueError(f"it lists {len(pictures)} pictures, the file has other ones ({len(shapes)} tensors)")
    sizes = {}
    for name, entry in pictures.items():
        height, width = entry["size"]
        _check_name(name)
        padded = tuple(side * patch_size for side in shapes[name][1:])
        fits = len(padded) == 2 and 1 <= height <= padded[0] and 1 <= width <= padded[1]
        if not fits or list(padded) != entry["padded_size"]:
            raise ValueError(f"{name!r} is {height}x{width}, which does not fit its latents {shapes[name]}")
        sizes[name] = (int(height), int(width))
    origin = LatentsOrigin(
        model=metadata["model"],
        revision=metadata["model_revision"],
        digest=metadata["model_digest"],
        class_name=metadata["class_name"],
        patch_size=patch_size,
        settings=json.loads(metadata["settings"]),
    )
    return Shard(path, origin, sizes)


def _check_name(name: str) -> None:
    """Refuse names that would be written outside the output folder: a shard may come from a stranger."""
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts or "\\" in name or ":" in parts[0] or "\0" in name:
        raise ValueError(f"the picture name {name!r} is not a relative path inside a folder")
