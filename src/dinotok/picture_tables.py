"""Pictures in the rows of parquet files, as `datasets` stores them."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

_ROWS_AT_ONCE = 16


class PictureTable:
    """Reads pictures from a column of a parquet file: encoded files, alone or as `struct<bytes, path>`.

    Rows are cheap in ascending order, and a few of them are in memory at a time.

    Args:
        path: The parquet file.
        column: Its pictures.

    Raises:
        ValueError: If the file is damaged or not parquet, or has no such column.
        OSError: If it cannot be read.
    """

    def __init__(self, path: Path, column: str = "image"):
        self.path, self.column = path, column
        try:
            self._file = pq.ParquetFile(path)
        except pa.ArrowException as error:
            raise ValueError(f"{str(path)!r} is truncated, damaged or not a parquet file: {error}") from error
        schema = self._file.schema_arrow
        if column not in schema.names:
            raise ValueError(
                f"{str(path)!r} has no column {column!r}, only {', '.join(schema.names)}: pass --image-column."
            )
        kind = schema.field(column).type
        self._is_struct = pa.types.is_struct(kind)
        values = kind.field("bytes").type if self._is_struct and kind.get_field_index("bytes") >= 0 else kind
        if not (pa.types.is_binary(values) or pa.types.is_large_binary(values)):
            raise ValueError(f"Column {column!r} of {str(path)!r} is {kind}, not the bytes of pictures.")
        self._has_path = self._is_struct and kind.get_field_index("path") >= 0
        metadata = self._file.metadata
        self.num_rows = metadata.num_rows
        self._group_sizes = [metadata.row_group(index).num_rows for index in range(metadata.num_row_groups)]
        # The row group that is being read, and the rows of it that are in memory.
        self._group, self._first = -1, 0
        self._batch: pa.Array = []
        self._batches: Iterator[pa.RecordBatch] = iter(())

    def paths(self) -> list[str | None]:
        """Return what every row calls its picture, None where it does not say; the pictures stay on disk."""
        if not self._has_path:
            return [None] * self.num_rows
        with self._reading():
            column = self._file.read(columns=[f"{self.column}.path"]).column(self.column)
        return [row and row.get("path") for row in column.to_pylist()]

    def picture(self, row: int) -> Image.Image:
        """Return the picture of a row, not decoded yet.

        Raises:
            ValueError: If the row has none, it is no picture, or the file is damaged.
        """
        with self._reading():
            cell = self._cell(row)
        data = cell.get("bytes") if isinstance(cell, dict) else cell
        if data is None:
            where = cell and cell.get("path")
            only = f", only the path {where!r}: pass the picture files themselves" if where else ""
            raise ValueError(f"Row {row} of {str(self.path)!r} has no bytes in column {self.column!r}{only}.")
        try:
            return Image.open(io.BytesIO(data))
        except OSError as error:
            raise ValueError(f"Row {row} of {str(self.path)!r} is not a readable image: {error}") from error

    def _cell(self, row: int):
        if not 0 <= row - self._first < len(self._batch):
            group = next(i for i, end in enumerate(accumulate(self._group_sizes)) if row < end)
            if group != self._group or row < self._first:
                self._group, self._first, self._batch = group, sum(self._group_sizes[:group]), []
                self._batches = self._file.iter_batches(_ROWS_AT_ONCE, row_groups=[group], columns=[self.column])
            while row - self._first >= len(self._batch):
                self._first += len(self._batch)
                self._batch = []
                self._batch = next(self._batches).column(0)
        return self._batch[row - self._first].as_py()

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Name the file in what is raised where its pages are damaged; the next row starts anew."""
        try:
            yield
        except (pa.ArrowException, OSError) as error:
            self._group = -1
            raise ValueError(f"{str(self.path)!r} is damaged: {error}") from error
