"""The tokens of a labelled data set, computed once for training: a folder of parquet files that `datasets` reads.

Every picture is there `views` times, cropped and flipped anew. A row is one view of one picture:

    indices   fixed-length list of uint16 (int32 if a codebook has more than 65,536 codes): (codebook, row, column)
    label     int32
    picture   int32: the row of the picture in its data set
    view      int32

`tokens-VIEW-SHARD.parquet` has one view of a range of pictures, and `cache.json` says which tokenizer and pictures
they are of. A file is there whole or not at all, so writing goes on where it was interrupted.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from .caches import DESCRIPTION_NAME, CacheLoader, Description, begin_cache, open_files
from .folders import writing

if TYPE_CHECKING:
    from datasets import Dataset

FORMAT_VERSION = 1


@dataclass(frozen=True)
class CacheDescription(Description):
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

    FORMAT_NAME = "dinotok-token-cache"
    VERSION = FORMAT_VERSION
    CONTENT = "tokens"
    SUFFIX = ".parquet"

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
    return begin_cache(folder, description)


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
        description.check_label(picture, label)
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
    return (Path(folder) / DESCRIPTION_NAME).is_file()


def open_token_cache(folder: str | os.PathLike[str]) -> TokenCache:
    """Open a complete cache.

    Raises:
        ValueError: If the folder is no cache, or files are missing.
        OSError: If it cannot be read.
    """
    from datasets import Dataset, disable_progress_bars

    if not is_token_cache(folder):
        raise ValueError(f"{str(folder)!r} is no cache of tokens: it has no {DESCRIPTION_NAME}.")
    description, paths = open_files(folder, CacheDescription)
    disable_progress_bars()
    dataset = Dataset.from_parquet([str(path) for path in paths])
    if not len(dataset):
        raise ValueError(f"{str(folder)!r} has no tokens: none of its pictures could be read.")
    return TokenCache(description, dataset)


class TokenLoader(CacheLoader):
    """Batches of cached tokens: dictionaries of `indices` and `labels`. Their order is as in `CacheLoader`.

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
        super().__init__(len(cache.dataset), batch_size, seed, rank, world_size)
        self._shape = cache.shape
        self._rows = cache.dataset.with_format("numpy", columns=["indices", "label"])

    def batch(self, rows: list[int]) -> dict[str, torch.Tensor]:
        """Return `indices`, int64 `(rows, K, h, w)`, and `labels`, int64 `(rows,)`."""
        found = self._rows[rows]
        indices = torch.from_numpy(np.stack(found["indices"]).astype(np.int64)).view(-1, *self._shape)
        return {"indices": indices, "labels": torch.from_numpy(np.asarray(found["label"], dtype=np.int64))}
