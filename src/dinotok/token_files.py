"""Tokens in parquet shards that `datasets` reads, and that say which model they belong to.

A shard holds the tokens of pictures with one grid, so that they are a list of one fixed length: the grid is in the
file's name, `tokens-14x14-00000.parquet` (rows x columns of patches). Its columns are

    file            string: the picture's name
    height, width   int32: its size in pixels, to which `decode` crops
    grid_height, grid_width   int32: patches, equal in all rows
    indices         fixed-length list of uint16 (int32 if a codebook has more than 65,536 codes), in the order
                    (codebook, row, column)

and the metadata of its schema has the entries `format`, `format_version`, `dinotok_version`, `model`,
`model_revision`, `model_digest`, `class_name`, `patch_size`, `settings`, `image_size` (of a model for one resolution
only), `codebook_sizes` (JSON: names and sizes, in
the order of the indices) and `shape` (JSON: codebooks, rows, columns).
"""

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from .folders import Picture, writing
from .shards import ModelOrigin, Shard, check_format, check_has_no_shards, check_picture, parsing_metadata

FORMAT = "dinotok-tokens"
FORMAT_VERSION = "1"
# Tokens of unfinished shards, one for every grid, stay in memory up to this size; then the largest is written.
MAX_BUFFERED_BYTES = 256 * 2**20
_ROWS_AT_ONCE = 256


@dataclass(frozen=True)
class TokenShard(Shard):
    """A file of tokens whose metadata, names and sizes were read and checked.

    Attributes:
        codebook_sizes: Codes of every codebook, in the order of the indices.
        shape: `(codebooks, rows, columns)` of every picture's indices.
    """

    content: ClassVar[str] = "tokens"
    codebook_sizes: dict[str, int]
    shape: tuple[int, int, int]


class _Row(NamedTuple):
    """What waits for its shard to fill: no tensor, which would keep the batch it is a part of."""

    name: str
    size: tuple[int, int]
    indices: np.ndarray


def write_token_shards(
    pictures: Iterable[Picture],
    folder: str | os.PathLike[str],
    origin: ModelOrigin,
    codebook_sizes: dict[str, int],
    shard_size: int = 4096,
) -> Iterator[Path]:
    """Write tokens to `tokens-14x14-00000.parquet`, ..., numbered for every grid, each whole or not at all.

    Args:
        pictures: Indices `(codebooks, h, w)` with unique names; their grids may differ and alternate.
        folder: Made if it is missing; must not have shards yet.
        origin: What made the tokens.
        codebook_sizes: Codes of every codebook by name, in the order of the indices.
        shard_size: Pictures per shard; one that is not full is written when 256 MiB have gathered.

    Yields:
        Every file, once it is written.

    Raises:
        ValueError: If the folder has shards already, or a name comes twice in one of them.
    """
    folder = Path(folder)
    check_has_no_shards(folder)
    dtype = np.uint16 if max(codebook_sizes.values()) <= 2**16 else np.int32
    buffers: dict[tuple[int, ...], list[_Row]] = {}
    numbers: Counter[tuple[int, ...]] = Counter()
    buffered = 0

    def flush(shape: tuple[int, ...]) -> Path:
        nonlocal buffered
        rows = buffers.pop(shape)
        buffered -= sum(row.indices.nbytes for row in rows)
        path = folder / f"tokens-{shape[1]}x{shape[2]}-{numbers[shape]:05d}.parquet"
        numbers[shape] += 1
        return _write_shard(path, rows, shape, origin, codebook_sizes)

    for picture in pictures:
        shape = tuple(picture.values.shape)
        indices = picture.values.cpu().numpy().astype(dtype).ravel()
        buffers.setdefault(shape, []).append(_Row(picture.name, picture.size, indices))
        buffered += indices.nbytes
        if len(buffers[shape]) == shard_size:
            yield flush(shape)
        elif buffered >= MAX_BUFFERED_BYTES:
            yield flush(max(buffers, key=lambda shape: len(buffers[shape]) * prod(shape)))
    for shape in list(buffers):
        yield flush(shape)


def open_token_shard(path: str | os.PathLike[str]) -> TokenShard:
    """Read and check what a file of tokens says about itself, and the names and sizes of its pictures.

    Args:
        path: Written by `write_token_shards`.

    Returns:
        The shard; its tokens are still on disk.

    Raises:
        ValueError: If the file is damaged, not parquet, not tokens of this library, or contradicts itself.
        OSError: If it cannot be read.
    """
    path = Path(path)
    with _open(path) as file:
        schema = file.schema_arrow
        metadata = {key.decode(): value.decode() for key, value in (schema.metadata or {}).items()}
        check_format(path, metadata, FORMAT, FORMAT_VERSION, TokenShard.content)
        with parsing_metadata(path):
            origin = ModelOrigin.from_metadata(metadata)
            codebook_sizes = {name: int(size) for name, size in json.loads(metadata["codebook_sizes"]).items()}
            codebooks, rows, columns = json.loads(metadata["shape"])
            shape = (int(codebooks), int(rows), int(columns))
            _check_columns(schema, codebook_sizes, shape)
        table = file.read(columns=["file", "height", "width"])
    with parsing_metadata(path):
        sizes = _sizes(table, origin.padded_size(rows, columns))
    return TokenShard(path, origin, sizes, codebook_sizes, shape)


def read_tokens(shard: TokenShard) -> Iterator[Picture]:
    """Read the tokens of a shard, a few hundred pictures at a time.

    Args:
        shard: From `open_token_shard`.

    Yields:
        Indices `(codebooks, h, w)`, int64, in the order they were written.

    Raises:
        ValueError: If the file has been damaged, or an index is outside its codebook.
    """
    limits = np.array(list(shard.codebook_sizes.values())).reshape(-1, 1, 1)
    names = iter(shard.sizes.items())
    with _open(shard.path) as file:
        for batch in file.iter_batches(_ROWS_AT_ONCE, columns=["indices"]):
            column = batch.column("indices")
            if column.null_count or column.flatten().null_count:
                raise ValueError(f"{str(shard.path)!r} is damaged: it has rows without indices.")
            rows = column.flatten().to_numpy().reshape(-1, *shard.shape).astype(np.int64)
            for (name, size), indices in zip(names, rows, strict=False):
                outside = (indices < 0) | (indices >= limits)
                if outside.any():
                    raise ValueError(
                        f"{str(shard.path)!r} is damaged: {name!r} has the index {indices[outside][0]} in codebook "
                        f"{np.argwhere(outside)[0][0]}; the codebooks have {shard.codebook_sizes} codes."
                    )
                yield Picture(name, size, torch.from_numpy(indices))


def _write_shard(
    path: Path,
    rows: list[_Row],
    shape: tuple[int, ...],
    origin: ModelOrigin,
    codebook_sizes: dict[str, int],
) -> Path:
    names = [row.name for row in rows]
    ((name, count),) = Counter(names).most_common(1)
    if count > 1:
        raise ValueError(f"The picture name {name!r} comes twice; names must be unique.")
    indices = pa.FixedSizeListArray.from_arrays(pa.array(np.concatenate([row.indices for row in rows])), prod(shape))
    metadata = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        **origin.to_metadata(),
        "codebook_sizes": json.dumps(codebook_sizes),
        "shape": json.dumps(shape),
    }
    columns = {
        "file": pa.array(names),
        "height": pa.array([row.size[0] for row in rows], pa.int32()),
        "width": pa.array([row.size[1] for row in rows], pa.int32()),
        "grid_height": pa.array([shape[1]] * len(rows), pa.int32()),
        "grid_width": pa.array([shape[2]] * len(rows), pa.int32()),
        "indices": indices,
    }
    with writing(path) as temporary:
        pq.write_table(pa.table(columns, metadata=metadata), temporary, write_page_checksum=True)
    return path


@contextmanager
def _open(path: Path) -> Iterator[pq.ParquetFile]:
    """Open a parquet file, with an error that names it wherever it turns out to be damaged."""
    if path.is_dir():
        raise IsADirectoryError(f"{str(path)!r} is a folder, not a file of tokens.")
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            yield file
    except OSError as error:
        if error.errno is not None:  # missing, no permission
            raise
        raise ValueError(f"{str(path)!r} is damaged: {error}") from error
    except pa.ArrowException as error:
        raise ValueError(f"{str(path)!r} is truncated, damaged or not a parquet file: {error}") from error


def _check_columns(schema: pa.Schema, codebook_sizes: dict[str, int], shape: tuple[int, int, int]) -> None:
    names = ("file", "height", "width", "indices")
    missing = [name for name in names if name not in schema.names]
    if missing:
        raise ValueError(f"it has no column {missing[0]!r}")
    found = schema.field("indices").type
    fits = pa.types.is_fixed_size_list(found) and found.list_size == prod(shape)
    if not fits or found.value_type not in (pa.uint16(), pa.int32()):
        raise ValueError(f"indices are {found}, which does not fit the shape {shape}")
    if len(codebook_sizes) != shape[0]:
        raise ValueError(f"it names {len(codebook_sizes)} codebooks, the indices are of {shape[0]}")


def _sizes(table: pa.Table, padded_size: tuple[int, int]) -> dict[str, tuple[int, int]]:
    names, heights, widths = (table.column(name).to_pylist() for name in ("file", "height", "width"))
    sizes = dict(zip(names, zip(heights, widths, strict=True), strict=True))
    if len(sizes) != len(names):
        raise ValueError(f"its {len(names)} rows have only {len(sizes)} names")
    for name, size in sizes.items():
        check_picture(name, size, padded_size)
    return sizes
