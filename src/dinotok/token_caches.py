"""The tokens of a labelled data set, computed once for training: a folder of parquet files that `datasets` reads.

Every picture is there `views` times, cropped and flipped anew. A row is one view of one picture:

    indices   fixed-length list of uint16 (int32 if a codebook has more than 65,536 codes): (codebook, row, column)
    label     int32
    picture   int32: the row of the picture in its data set
    view      int32

`tokens-VIEW-SHARD.parquet` has one view of a range of pictures, and `cache.json` says which tokenizer and pictures
they are of. A file is there whole or not at all, so writing goes on where it was interrupted.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import ceil, prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from .folders import writing
from .picture_order import RowOrder

if TYPE_CHECKING:
    from datasets import Dataset

FORMAT_VERSION = 1
_DESCRIPTION = "cache.json"


@dataclass(frozen=True)
class CacheDescription:
    """What the tokens of a cache are of: everything that decides them.

    Attributes:
        tokenizer: Folder or repository.
        tokenizer_digest: See `hub.folder_digest`.
        codebook_sizes: Codes of every codebook by name, in the order of the indices.
        grid: Rows and columns of tokens.
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
    """

    tokenizer: str
    tokenizer_digest: str
    codebook_sizes: dict[str, int]
    grid: list[int]
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

    def shards(self) -> list[tuple[int, range]]:
        """Return view and pictures of every file, view by view."""
        starts = [index * self.shard_size for index in range(ceil(self.num_pictures / self.shard_size))]
        ranges = [range(start, min(start + self.shard_size, self.num_pictures)) for start in starts]
        return [(view, pictures) for view in range(self.views) for pictures in ranges]

    def shard_path(self, folder: str | os.PathLike[str], view: int, pictures: range) -> Path:
        """Return the file of a view of some pictures."""
        return Path(folder) / f"tokens-{view:02d}-{pictures.start // self.shard_size:05d}.parquet"


def begin_token_cache(folder: str | os.PathLike[str], description: CacheDescription) -> list[tuple[int, range]]:
    """Start a cache, or go on with one.

    Args:
        folder: Made if it is missing.
        description: Of the tokens that are going to be written.

    Returns:
        View and pictures of every file that is still missing.

    Raises:
        ValueError: If the folder holds tokens of something else.
    """
    path = Path(folder) / _DESCRIPTION
    if path.is_file():
        there, wanted = asdict(_read_description(path)), asdict(description)
        for name in ("tokenizer", "dataset"):  # where they lie does not matter; their content is compared
            there.pop(name), wanted.pop(name)
        different = [name for name in wanted if there[name] != wanted[name]]
        if different:
            name = different[0]
            raise ValueError(
                f"{str(folder)!r} has tokens with {name}={there[name]!r}, not {wanted[name]!r}: go on with the same "
                "options, or choose another folder."
            )
    else:
        content = {"format": "dinotok-token-cache", "format_version": FORMAT_VERSION, **asdict(description)}
        with writing(path) as temporary:
            temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return [shard for shard in description.shards() if not description.shard_path(folder, *shard).is_file()]


def write_cache_shard(
    folder: str | os.PathLike[str],
    description: CacheDescription,
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
        rows: `(picture, label, indices)` with indices `(K, h, w)` of those among them that could be read.

    Returns:
        The file.

    Raises:
        ValueError: If indices or a label do not fit the description.
    """
    sizes = list(description.codebook_sizes.values())
    shape = (len(sizes), *description.grid)
    for picture, label, indices in rows:
        if tuple(indices.shape) != shape:
            raise ValueError(f"Indices of picture {picture} have shape {tuple(indices.shape)}, not {shape}.")
        if not 0 <= label < len(description.label_names):
            raise ValueError(f"Picture {picture} has the label {label}, not in 0..{len(description.label_names) - 1}.")
    dtype = np.uint16 if max(sizes) <= 2**16 else np.int32
    flat = [indices.cpu().numpy().astype(dtype).ravel() for _, _, indices in rows]
    values = pa.array(np.concatenate(flat) if flat else np.empty(0, dtype))
    table = pa.table(
        {
            "indices": pa.FixedSizeListArray.from_arrays(values, prod(shape)),
            "label": pa.array([label for _, label, _ in rows], pa.int32()),
            "picture": pa.array([picture for picture, _, _ in rows], pa.int32()),
            "view": pa.array([view] * len(rows), pa.int32()),
        }
    )
    path = description.shard_path(folder, view, pictures)
    with writing(path) as temporary:
        pq.write_table(table, temporary, write_page_checksum=True)
    return path


@dataclass(frozen=True)
class TokenCache:
    """Tokens to train on.

    Attributes:
        description: What they are of.
        dataset: A row for each view of each picture.
    """

    description: CacheDescription
    dataset: "Dataset"

    @property
    def shape(self) -> tuple[int, int, int]:
        """`(K, h, w)` of every row's indices."""
        return (len(self.description.codebook_sizes), self.description.grid[0], self.description.grid[1])


def is_token_cache(folder: str | os.PathLike[str]) -> bool:
    """Tell whether a folder is a cache of tokens."""
    return (Path(folder) / _DESCRIPTION).is_file()


def open_token_cache(folder: str | os.PathLike[str]) -> TokenCache:
    """Open a complete cache.

    Raises:
        ValueError: If the folder is no cache, or files are missing.
        OSError: If it cannot be read.
    """
    from datasets import Dataset, disable_progress_bars

    folder = Path(folder)
    if not is_token_cache(folder):
        raise ValueError(f"{str(folder)!r} is no cache of tokens: it has no {_DESCRIPTION}.")
    description = _read_description(folder / _DESCRIPTION)
    paths = [description.shard_path(folder, *shard) for shard in description.shards()]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise ValueError(
            f"{str(folder)!r} is not complete: {len(missing)} of {len(paths)} files are missing, first {missing[0]!r}."
        )
    disable_progress_bars()
    dataset = Dataset.from_parquet([str(path) for path in paths])
    if not len(dataset):
        raise ValueError(f"{str(folder)!r} has no tokens: none of its pictures could be read.")
    return TokenCache(description, dataset)


class TokenLoader:
    """Batches of cached tokens, in an order that is a pure function of the cache, the seed and the global batch size.

    Batch `n` is the same in a resumed run as in a straight one, and the slices of `world_size` processes, joined in
    the order of their ranks, are the batch of one process with `batch_size * world_size`.

    Args:
        cache: From `open_token_cache`.
        batch_size: Rows per batch of this process.
        seed: Of the order.
        rank: Of this process.
        world_size: Number of processes.

    Raises:
        ValueError: If a number is out of range.
    """

    def __init__(self, cache: TokenCache, batch_size: int, *, seed: int = 0, rank: int = 0, world_size: int = 1):
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} is not positive.")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank={rank} is not in [0, world_size={world_size}).")
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size
        self._shape = cache.shape
        self._rows = cache.dataset.with_format("numpy", columns=["indices", "label"])
        self._order = RowOrder(len(cache.dataset), batch_size * world_size, seed)
        self.steps_per_epoch = self._order.steps_per_epoch

    def batches(self, start: int = 0) -> Iterator[dict[str, torch.Tensor]]:
        """Yield batches without end.

        Args:
            start: Number of the first batch: as many as an interrupted run has used.

        Yields:
            Dictionaries of `indices`, int64 `(batch_size, K, h, w)`, and `labels`, int64 `(batch_size,)`.
        """
        number, first = start, self.rank * self.batch_size
        while True:
            draws = self._order.draws(number)[first : first + self.batch_size]
            yield self._batch([draw.row for draw in draws])
            number += 1

    def once(self) -> Iterator[dict[str, torch.Tensor]]:
        """Yield this process's share of all rows once, in their order; the last batch is smaller."""
        rows = range(self.rank, len(self._rows), self.world_size)
        for start in range(0, len(rows), self.batch_size):
            yield self._batch(list(rows[start : start + self.batch_size]))

    def _batch(self, rows: list[int]) -> dict[str, torch.Tensor]:
        found = self._rows[rows]
        indices = torch.from_numpy(np.stack(found["indices"]).astype(np.int64)).view(-1, *self._shape)
        return {"indices": indices, "labels": torch.from_numpy(np.asarray(found["label"], dtype=np.int64))}


def _read_description(path: Path) -> CacheDescription:
    content: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if content.get("format") != "dinotok-token-cache" or content.get("format_version") != FORMAT_VERSION:
        raise ValueError(f"{str(path)!r} is not of this version's format ({FORMAT_VERSION}).")
    return CacheDescription(**{name: content[name] for name in CacheDescription.__dataclass_fields__})
