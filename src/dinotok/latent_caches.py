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

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .folders import writing
from .picture_order import RowOrder

if TYPE_CHECKING:
    from datasets import IterableDataset

FORMAT, FORMAT_VERSION = "dinotok-latent-cache", 1
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
_DESCRIPTION = "cache.json"


@dataclass(frozen=True)
class LatentCacheDescription:
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

    def shards(self) -> list[tuple[int, range]]:
        """Return view and pictures of every file, view by view."""
        starts = [index * self.shard_size for index in range(math.ceil(self.num_pictures / self.shard_size))]
        ranges = [range(start, min(start + self.shard_size, self.num_pictures)) for start in starts]
        return [(view, pictures) for view in range(self.views) for pictures in ranges]

    def shard_path(self, folder: str | os.PathLike[str], view: int, pictures: range) -> Path:
        """Return the file of a view of some pictures."""
        return Path(folder) / f"latents-{view:02d}-{pictures.start // self.shard_size:05d}.safetensors"


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
    path = Path(folder) / _DESCRIPTION
    if path.is_file():
        there, wanted = asdict(_read_description(path)), asdict(description)
        for name in ("tokenizer", "dataset"):  # where they lie does not matter; their content is compared
            there.pop(name), wanted.pop(name)
        different = [name for name in wanted if there[name] != wanted[name]]
        if different:
            name = different[0]
            raise ValueError(
                f"{str(folder)!r} has latents with {name}={there[name]!r}, not {wanted[name]!r}: go on with the same "
                "options, or choose another folder."
            )
    else:
        content = {"format": FORMAT, "format_version": FORMAT_VERSION, **asdict(description)}
        with writing(path) as temporary:
            temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return [shard for shard in description.shards() if not description.shard_path(folder, *shard).is_file()]


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
        if not 0 <= label < len(description.label_names):
            raise ValueError(f"Picture {picture} has the label {label}, not in 0..{len(description.label_names) - 1}.")
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
    path = Path(folder) / _DESCRIPTION
    return path.is_file() and f'"{FORMAT}"' in path.read_text(encoding="utf-8")


def open_latent_cache(folder: str | os.PathLike[str]) -> LatentCache:
    """Open a complete cache.

    Raises:
        ValueError: If the folder is no cache, or files are missing, damaged or empty.
        OSError: If it cannot be read.
    """
    folder = Path(folder)
    if not is_latent_cache(folder):
        raise ValueError(f"{str(folder)!r} is no cache of latents: it has no {_DESCRIPTION} of this format.")
    description = _read_description(folder / _DESCRIPTION)
    paths = [description.shard_path(folder, *shard) for shard in description.shards()]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise ValueError(
            f"{str(folder)!r} is not complete: {len(missing)} of {len(paths)} files are missing, first {missing[0]!r}."
        )
    cache = LatentCache(description, tuple(paths))
    if not len(cache):
        raise ValueError(f"{str(folder)!r} has no latents: none of its pictures could be read.")
    return cache


class LatentLoader:
    """Batches of cached latents, in an order that is a pure function of the cache, the seed and the global batch size.

    Batch `n` is the same in a resumed run as in a straight one, and the slices of `world_size` processes, joined in
    the order of their ranks, are the batch of one process with `batch_size * world_size`.

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
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} is not positive.")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank={rank} is not in [0, world_size={world_size}).")
        self.cache, self.batch_size, self.rank, self.world_size = cache, batch_size, rank, world_size
        self._order = RowOrder(len(cache), batch_size * world_size, seed)
        self.steps_per_epoch = self._order.steps_per_epoch

    def batches(self, start: int = 0) -> Iterator[dict[str, torch.Tensor]]:
        """Yield batches without end.

        Args:
            start: Number of the first batch: as many as an interrupted run has used.

        Yields:
            Dictionaries of `latents`, float32 `(batch_size, C, h, w)`, and `labels`, int64 `(batch_size,)`.
        """
        number, first = start, self.rank * self.batch_size
        while True:
            draws = self._order.draws(number)[first : first + self.batch_size]
            yield self._batch([draw.row for draw in draws])
            number += 1

    def once(self) -> Iterator[dict[str, torch.Tensor]]:
        """Yield this process's share of all rows once, in their order; the last batch is smaller."""
        rows = range(self.rank, len(self.cache), self.world_size)
        for start in range(0, len(rows), self.batch_size):
            yield self._batch(list(rows[start : start + self.batch_size]))

    def _batch(self, rows: list[int]) -> dict[str, torch.Tensor]:
        found = [self.cache.row(row) for row in rows]
        latents = torch.stack([latents for latents, _ in found]).float()
        return {"latents": latents, "labels": torch.tensor([label for _, label in found])}


def _read_description(path: Path) -> LatentCacheDescription:
    content: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if content.get("format") != FORMAT or content.get("format_version") != FORMAT_VERSION:
        raise ValueError(f"{str(path)!r} is not of this version's format ({FORMAT}, {FORMAT_VERSION}).")
    return LatentCacheDescription(**{name: content[name] for name in LatentCacheDescription.__dataclass_fields__})


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{str(path)!r} is truncated or not a safetensors file: {error}.") from error
