"""Samples out of the rows of a data set, with a substitute for what cannot be read."""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from PIL import ExifTags, Image
from torch.utils.data import Dataset as TorchDataset

from .picture_order import Draw, mix
from .transforms import PictureTransform, encoded_picture

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

DEFAULT_LABEL_COLUMN = "label"
# So many substitutes in a row are damaged only if nearly everything is.
MAX_ATTEMPTS = 30
_ROWS_AT_ONCE = 64
_SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that exchange height and width
_UNREADABLE = (ValueError, OSError)


@dataclass(frozen=True)
class Sample:
    """A sample, or what became of the attempt.

    Attributes:
        pixels: uint8 `(3, H, W)`; None if neither it nor a substitute could be read.
        label: None if there are no labels.
        index: Row number.
        num_skipped: Rows that could not be read before this one.
        reason: Why, of the last of them.
    """

    pixels: torch.Tensor | None
    label: int | None
    index: int
    num_skipped: int = 0
    reason: str = ""


@dataclass(frozen=True)
class PictureReader:
    """Makes a sample of a row.

    Attributes:
        transform: Of the picture.
        seed: Of the augmentation.
        image_column: Of the row.
        label_column: Of the row; None for samples without label.
    """

    transform: PictureTransform
    seed: int
    image_column: str
    label_column: str | None

    def read(self, row: dict[str, Any], draw: Draw, num_skipped: int = 0, reason: str = "") -> Sample:
        """Read one row.

        Raises:
            ValueError: If its picture is damaged or its label is not a whole number.
            OSError: If its file cannot be read.
        """
        generator = torch.Generator().manual_seed(mix("augmentation", self.seed, draw.epoch, draw.row))
        transform = self.transform if draw.size is None else replace(self.transform, size=draw.size)
        label = None if self.label_column is None else row[self.label_column]
        if self.label_column is not None and not isinstance(label, int):
            raise ValueError(f"The label {label!r} in column {self.label_column!r} is not a whole number.")
        return Sample(transform(row[self.image_column], generator), label, draw.row, num_skipped, reason)

    def read_or_substitute(self, draw: Draw, row_at: Callable[[int], tuple[dict[str, Any], Draw]]) -> Sample:
        """Read the first row that can be read: `row_at(0)`, the wanted one, or the substitutes `row_at(1)`, ..."""
        reason = ""
        for attempt in range(MAX_ATTEMPTS):
            row, actual = row_at(attempt)
            try:
                return self.read(row, actual, attempt, reason)
            except _UNREADABLE as error:
                reason = f"row {actual.row}: {error}"
        return Sample(None, None, draw.row, MAX_ATTEMPTS, reason)

    def read_or_skip(self, row: dict[str, Any], draw: Draw) -> Sample:
        """Read a row, or say why not."""
        try:
            return self.read(row, draw)
        except _UNREADABLE as error:
            return Sample(None, None, draw.row, 1, f"row {draw.row}: {error}")


class RowSamples(TorchDataset):
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


def rows_of(columns: dict[str, list]) -> list[dict[str, Any]]:
    """Turn columns into rows."""
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def collate(samples: Sequence[Sample]) -> dict[str, Any]:
    """Make a batch of the samples that could be read, in their order; `reason` is that of the last that could not."""
    good = [sample for sample in samples if sample.pixels is not None]
    batch: dict[str, Any] = {
        "indices": torch.tensor([sample.index for sample in good], dtype=torch.int64),
        "num_skipped": sum(sample.num_skipped for sample in samples),
        "reason": next((sample.reason for sample in reversed(samples) if sample.reason), ""),
    }
    if good:
        batch["pixel_values"] = torch.stack([sample.pixels for sample in good if sample.pixels is not None])
    if good and good[0].label is not None:
        batch["labels"] = torch.tensor([sample.label for sample in good], dtype=torch.int64)
    return batch


def undecoded(
    dataset: "Dataset | IterableDataset", image_column: str, label_column: str | None
) -> "tuple[Dataset | IterableDataset, str | None]":
    """Keep the columns that are asked for, with pictures as they are stored.

    Args:
        dataset: Map-style or streamed.
        image_column: Its pictures.
        label_column: Its labels; the default one may be absent.

    Returns:
        The data set, and the label column, None if there is none.

    Raises:
        ValueError: If a column is missing or of another type.
    """
    from datasets import Image as ImageFeature

    dataset = dataset.with_format(None)
    features = dataset.features or dict.fromkeys(next(iter(dataset), {}))
    if image_column not in features:
        raise ValueError(f"The data set has no column {image_column!r}, only {', '.join(features) or 'none'}.")
    if label_column not in features:
        if label_column not in (None, DEFAULT_LABEL_COLUMN):
            raise ValueError(f"The data set has no column {label_column!r}, only {', '.join(features)}.")
        label_column = None
    _check_types(image_column, features[image_column], label_column, features.get(label_column))
    dataset = dataset.select_columns([image_column, *filter(None, [label_column])])
    feature = features[image_column]
    if isinstance(feature, ImageFeature) and feature.decode:
        dataset = dataset.cast_column(image_column, ImageFeature(decode=False))
    return dataset, label_column


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


def _check_types(image_column: str, image: Any, label_column: str | None, label: Any) -> None:
    """Check the features, where the data set knows them; a streamed one may not."""
    from datasets import ClassLabel, Value
    from datasets import Image as ImageFeature

    binary = isinstance(image, Value) and image.dtype in ("binary", "large_binary")
    cell = isinstance(image, dict) and "bytes" in image
    if image is not None and not (isinstance(image, ImageFeature) or binary or cell):
        raise ValueError(f"Column {image_column!r} has {image}, not pictures.")
    whole = isinstance(label, ClassLabel) or (isinstance(label, Value) and label.dtype.lstrip("u").startswith("int"))
    if label is not None and not whole:
        raise ValueError(
            f"Column {label_column!r} has {label}, not whole numbers: dataset.class_encode_column({label_column!r}) "
            "numbers the classes of a map-style data set; label_column=None goes without."
        )
