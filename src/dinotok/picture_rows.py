"""Batches of a map-style data set, whose rows are at hand in any order."""

import io
from collections.abc import Iterable, Iterator
from itertools import count
from typing import TYPE_CHECKING, Any

from PIL import ExifTags, Image
from torch.utils.data import Dataset as TorchDataset

from .picture_order import Draw, PictureOrder, mix
from .picture_samples import BatchShare, PictureReader, Sample, collate, load, rows_of
from .transforms import encoded_picture

if TYPE_CHECKING:
    from datasets import Dataset

_ROWS_AT_ONCE = 64
_SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that exchange height and width


class RowSource:
    """Batches of rows in a given order.

    Args:
        dataset: From `undecoded`.
        reader: Makes a sample of a row.
        share: Of this process.
        order: Of the rows.
    """

    def __init__(self, dataset: "Dataset", reader: PictureReader, share: BatchShare, order: PictureOrder):
        self.dataset, self.reader, self.share, self.order = dataset, reader, share, order

    def batches(self, start: int) -> Iterator[dict[str, Any]]:
        """Yield this process's part of global batch `start` and of all after it."""
        size = self.share.batch_size
        mine = slice(self.share.rank * size, (self.share.rank + 1) * size)
        return self._load((self.order.draws(number)[mine] for number in count(start)), substitute=True)

    def once(self) -> Iterator[dict[str, Any]]:
        """Yield this process's part of all rows in ascending order, without those that cannot be read."""
        return self._load(self._pass(), substitute=False)

    def _pass(self) -> Iterator[list[Draw]]:
        total, size = len(self.dataset), self.share.global_batch_size
        for start in range(0, total, size):
            rows, rank = min(size, total - start), self.share.rank
            first, last = (start + rows * part // self.share.world_size for part in (rank, rank + 1))
            if first < last:
                yield [Draw(0, row) for row in range(first, last)]

    def _load(self, plan: Iterable[list[Draw]], substitute: bool) -> Iterator[dict[str, Any]]:
        samples = _RowSamples(self.dataset, self.reader, substitute)
        return load(samples, self.share.num_workers, batch_sampler=plan, collate_fn=collate)


class _RowSamples(TorchDataset):
    """The samples of a map-style data set, by draws instead of numbers; goes to worker processes.

    Args:
        dataset: From `undecoded`.
        reader: Makes a sample of a row.
        substitute: Whether another row takes the place of one that cannot be read, else it is left out.
    """

    def __init__(self, dataset: "Dataset", reader: PictureReader, substitute: bool):
        self.dataset, self.reader, self.substitute = dataset, reader, substitute
        self.num_rows = len(dataset)

    def __getitems__(self, draws: list[Draw]) -> list[Sample]:
        rows = rows_of(self.dataset[[draw.row for draw in draws]])
        if self.substitute:
            return [self._read(row, draw) for row, draw in zip(rows, draws, strict=True)]
        return [self.reader.read_or_skip(row, draw) for row, draw in zip(rows, draws, strict=True)]

    def __getitem__(self, draw: Draw) -> Sample:
        return self.__getitems__([draw])[0]

    def _read(self, row: dict[str, Any], draw: Draw) -> Sample:
        def row_at(attempt: int) -> tuple[dict[str, Any], Draw]:
            if attempt == 0:
                return row, draw
            other = mix("substitute", self.reader.seed, draw.epoch, draw.row, attempt) % self.num_rows
            return self.dataset[other], draw._replace(row=other)

        return self.reader.read_or_substitute(draw, row_at)


def picture_sizes(dataset: "Dataset", image_column: str) -> list[tuple[int, int] | None]:
    """Read the `(height, width)` of every picture, upright, from its header; None where that is damaged."""
    dataset = dataset.select_columns([image_column])
    starts = range(0, len(dataset), _ROWS_AT_ONCE)
    return [_size(cell) for start in starts for cell in dataset[start : start + _ROWS_AT_ONCE][image_column]]


def _size(cell: Any) -> tuple[int, int] | None:
    try:
        source = encoded_picture(cell)
        if isinstance(source, Image.Image):
            return _upright_size(source)
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            return _upright_size(image)
    except Exception:  # decoders raise many types on corrupt bytes; reading the picture will say which
        return None


def _upright_size(image: Image.Image) -> tuple[int, int]:
    # Pillow decodes a whole PNG to find an orientation that is not in its header.
    known = image.format != "PNG" or "exif" in image.info
    sideways = known and image.getexif().get(ExifTags.Base.Orientation) in _SIDEWAYS
    return (image.width, image.height) if sideways else (image.height, image.width)
