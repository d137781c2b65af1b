"""The latents of a labelled data set, computed once for training: a folder of safetensors files.

Every picture is there `views` times, cropped and flipped anew. `latents-VIEW-SHARD.safetensors` has one view of a
range of pictures, as three tensors with a row for each picture that could be read:

    latents    (rows, C, h, w), normalised as the tokenizer's `encode` returns them
    labels     (rows,) int64
    pictures   (rows,) int64: the row of the picture in its data set

`cache.json` says which tokenizer and pictures they are of. A file is there whole or not at all, so writing goes on
where it was interrupted. `LatentLoader` reads rows from the files where they lie; `LatentCache.to_dataset` gives them
to `datasets`.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .caches import DESCRIPTION_NAME, CacheLoader, Description, begin_cache, open_files
from .folders import writing

if TYPE_CHECKING:
    from datasets import IterableDataset

FORMAT, FORMAT_VERSION = "dinotok-latent-cache", 1
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class LatentCacheDescription(Description):
    """What the latents of a cache are of: everything that decides them.

    Attributes:
        tokenizer: Folder or repository.
        tokenizer_digest: See `hub.folder_digest`.
        shape: `(C, h, w)` of the latents of a picture.
        dataset: Name or path.
        num_pictures: Of the data set, also those that could not be read.
        label_names: Names of the classes, in their order.
        resolution: Side of the crops in pixels.
        crop: As in `PictureTransform`.
        flip: Likewise.
        views: Of every picture.
        seed: Of crops and flips.
        shard_size: Pictures of a file.
        mixed_precision: Of the tokenizer.
        dtype: Of the stored numbers: float16, bfloat16 or float32.
    """

    FORMAT_NAME = FORMAT
    VERSION = FORMAT_VERSION
    CONTENT = "latents"
    SUFFIX = ".safetensors"

    tokenizer: str
    tokenizer_digest: str
    shape: list[int]
    dataset: str
    num_pictures: int
    label_names: list[str]
    resolution: int
    crop: str
    flip: bool
    views: int
    seed: int
    shard_size: int
    mixed_precision: str
    dtype: str


def begin_latent_cache(folder: str | os.PathLike[str], description: LatentCacheDescription) -> list[tuple[int, range]]:
    """Start a cache, or go on with one.

    Args:
        folder: Made if it is missing.
        description: Of the latents that are going to be written.

    Returns:
        View and pictures of every file that is still missing.

    Raises:
        ValueError: If the folder holds latents of something else, or the dtype is unknown.
    """
    if description.dtype not in DTYPES:
        raise ValueError(f"dtype={description.dtype!r} is none of {', '.join(DTYPES)}.")
    return begin_cache(folder, description)


def write_latent_shard(
    folder: str | os.PathLike[str],
    description: LatentCacheDescription,
    view: int,
    pictures: range,
    rows: Sequence[tuple[int, int, torch.Tensor]],
) -> Path:
    """Write one file of a cache, whole or not at all.

    Args:
        folder: Of the cache.
        description: Of the cache.
        view: Which.
        pictures: Which rows of the data set the file is for.
        rows: `(picture, label, latents)` with latents `(C, h, w)` of those among them that could be read.

    Returns:
        The file.

    Raises:
        ValueError: If latents or a label do not fit the description, or latents are not finite in its dtype.
    """
    shape, dtype = tuple(description.shape), DTYPES[description.dtype]
    for picture, label, latents in rows:
        if tuple(latents.shape) != shape:
            raise ValueError(f"Latents of picture {picture} have shape {tuple(latents.shape)}, not {shape}.")
        description.check_label(picture, label)
        if not latents.to(dtype).isfinite().all():
            raise ValueError(f"Latents of picture {picture} are not finite in {description.dtype}.")
    stored = [latents.to("cpu", dtype) for _, _, latents in rows]
    tensors = {
        "latents": torch.stack(stored) if stored else torch.empty(0, *shape, dtype=dtype),
        "labels": torch.tensor([label for _, label, _ in rows], dtype=torch.int64),
        "pictures": torch.tensor([picture for picture, _, _ in rows], dtype=torch.int64),
    }
    path = description.shard_path(folder, view, pictures)
    with writing(path) as temporary:
        save_file(tensors, temporary, metadata={"format": FORMAT, "format_version": str(FORMAT_VERSION)})
    return path


@dataclass(frozen=True)
class LatentCache:
    """Latents to train on, still on disk.

    Attributes:
        description: What they are of.
        paths: Its files.
    """

    description: LatentCacheDescription
    paths: tuple[Path, ...]

    def __len__(self) -> int:
        return int(self._ends[-1])

    @cached_property
    def _files(self) -> list[Any]:
        return [_open(path) for path in self.paths]

    @cached_property
    def _labels(self) -> list[torch.Tensor]:
        return [file.get_tensor("labels") for file in self._files]

    @cached_property
    def _ends(self) -> np.ndarray:
        return np.cumsum([len(labels) for labels in self._labels])

    def row(self, index: int) -> tuple[torch.Tensor, int]:
        """Return latents `(C, h, w)` as they are stored, and the label, of one row of all files."""
        number = int(np.searchsorted(self._ends, index, side="right"))
        place = index - (int(self._ends[number - 1]) if number else 0)
        latents = self._files[number].get_slice("latents")[place : place + 1]
        return latents[0], int(self._labels[number][place])

    def to_dataset(self) -> "IterableDataset":
        """Return a streamed data set of `latents` (float32) and `label`, in the order of the files."""
        from datasets import IterableDataset

        return IterableDataset.from_generator(_rows, gen_kwargs={"folder": str(self.paths[0].parent)})


def _rows(folder: str) -> Iterator[dict[str, Any]]:
    cache = open_latent_cache(folder)
    for index in range(len(cache)):
        latents, label = cache.row(index)
        yield {"latents": latents.float().numpy(), "label": label}


def is_latent_cache(folder: str | os.PathLike[str]) -> bool:
    """Tell whether a folder is a cache of latents."""
    path = Path(folder) / DESCRIPTION_NAME
    return path.is_file() and f'"{FORMAT}"' in path.read_text(encoding="utf-8")


def open_latent_cache(folder: str | os.PathLike[str]) -> LatentCache:
    """Open a complete cache.

    Raises:
        ValueError: If the folder is no cache, or files are missing, damaged or empty.
        OSError: If it cannot be read.
    """
    if not is_latent_cache(folder):
        raise ValueError(f"{str(folder)!r} is no cache of latents: it has no {DESCRIPTION_NAME} of this format.")
    description, paths = open_files(folder, LatentCacheDescription)
    cache = LatentCache(description, tuple(paths))
    if not len(cache):
        raise ValueError(f"{str(folder)!r} has no latents: none of its pictures could be read.")
    return cache


class LatentLoader(CacheLoader):
    """Batches of cached latents: dictionaries of `latents` and `labels`. Their order is as in `CacheLoader`.

    Args:
        cache: From `open_latent_cache`.
        batch_size: Rows per batch of this process.
        seed: Of the order.
        rank: Of this process.
        world_size: Number of processes.

    Raises:
        ValueError: If a number is out of range.
    """

    def __init__(self, cache: LatentCache, batch_size: int, *, seed: int = 0, rank: int = 0, world_size: int = 1):
        super().__init__(len(cache), batch_size, seed, rank, world_size)
        self.cache = cache

    def batch(self, rows: list[int]) -> dict[str, torch.Tensor]:
        """Return `latents`, float32 `(rows, C, h, w)`, and `labels`, int64 `(rows,)`."""
        found = [self.cache.row(row) for row in rows]
        latents = torch.stack([latents for latents, _ in found]).float()
        return {"latents": latents, "labels": torch.tensor([label for _, label in found])}


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{str(path)!r} is truncated or not a safetensors file: {error}.") from error
