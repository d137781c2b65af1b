"""One file of an encoded corpus: a file of `token_caches` or `latent_caches`, with equal bytes for equal rows."""

import json
from collections.abc import Sequence
from pathlib import Path

import pyarrow.parquet as pq
import torch

from .latent_caches import LatentCacheDescription, write_latent_shard
from .token_caches import CacheDescription, write_cache_shard

Row = tuple[int, int, torch.Tensor]


def write_file(
    folder: Path,
    description: CacheDescription | LatentCacheDescription,
    view: int,
    pictures: range,
    rows: Sequence[Row],
) -> Path:
    """Write tokens or latents; see `write_cache_shard` and `write_latent_shard`.

    Args:
        folder: Where to.
        description: Of the corpus.
        view: Which.
        pictures: The numbers of the file's shard.
        rows: `(picture, label, values)`; there may be none.

    Returns:
        The file.
    """
    if isinstance(description, LatentCacheDescription):
        path = write_latent_shard(folder, description, view, pictures, rows)
        _sort_metadata(path)
        return path
    path = write_cache_shard(folder, description, view, pictures, rows)
    if not rows:
        _drop_row_groups(path)
    return path


def _sort_metadata(path: Path) -> None:
    """Order the metadata of a safetensors file by name: the library shuffles them, in every file anew."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        file.seek(8)
        file.write(json.dumps(header, separators=(",", ":")).encode().ljust(length))


def _drop_row_groups(path: Path) -> None:
    """Leave an empty table without row groups: `datasets` fails on a row group without rows."""
    schema = pq.read_schema(path)
    with pq.ParquetWriter(path, schema):
        pass
