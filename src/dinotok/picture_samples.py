"""Samples out of the rows of a data set, with a substitute for what cannot be read."""

import signal
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader

from .picture_order import Draw, mix
from .transforms import PictureTransform

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

DEFAULT_LABEL_COLUMN = "label"
# So many substitutes in a row are damaged only if nearly everything is.
MAX_ATTEMPTS = 30
_UNREADABLE = (ValueError, OSError)


@dataclass(frozen=True)
class BatchShare:
    """Who makes which part of every batch.

    Attributes:
        batch_size: Samples per batch of one process.
        rank: Of this process.
        world_size: Number of processes.
        num_workers: Of each.
    """

    batch_size: int
    rank: int = 0
    world_size: int = 1
    num_workers: int = 0

    @property
    def global_batch_size(self) -> int:
        """Samples per batch of all processes."""
        return self.batch_size * self.world_size


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


def load(dataset: Any, num_workers: int, **options: Any) -> Iterator[dict[str, Any]]:
    """Iterate over a torch `DataLoader` that leaves the global random state alone, and Ctrl-C to this process."""
    # Without a generator of its own it draws a seed from the global one.
    generator = torch.Generator()
    loader = DataLoader(
        dataset, num_workers=num_workers, generator=generator, worker_init_fn=_ignore_interrupt, **options
    )
    return iter(loader)


def check_columns(present: Collection[str], image_column: str, label_column: str | None) -> str | None:
    """Return the label column, None if it is the default one and absent.

    Raises:
        ValueError: If it or the pictures are missing.
    """
    if label_column == DEFAULT_LABEL_COLUMN and label_column not in present:
        label_column = None
    for column in filter(None, (image_column, label_column)):
        if column not in present:
            raise ValueError(f"The data set has no column {column!r}, only {', '.join(present) or 'none'}.")
    return label_column


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
    label_column = check_columns(features, image_column, label_column)
    _check_types(image_column, features[image_column], label_column, features.get(label_column))
    feature = features[image_column]
    if isinstance(feature, ImageFeature) and feature.decode:
        dataset = dataset.cast_column(image_column, ImageFeature(decode=False))
    return dataset.select_columns([image_column, *filter(None, [label_column])]), label_column


def _ignore_interrupt(worker: int) -> None:
    """Ctrl-C reaches the workers too; they are to serve the last step of a run that ends cleanly."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


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
