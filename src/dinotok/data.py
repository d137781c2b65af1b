"""Training pictures: data sets of any kind by name or path, and batches whose order does not depend on who reads them.

`load_pictures` opens a data set, `PictureTransform` says what becomes of a picture, `PictureLoader` makes batches:

    pictures = load_pictures("photos")
    loader = PictureLoader(pictures, PictureTransform(256, crop="random", flip=True), batch_size=32, num_workers=4)
    for batch in loader.batches(start=step):
        pixels = to_pixels(batch["pixel_values"])
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any

import torch

from .picture_order import BucketOrder, PictureOrder, RowOrder, aspect_ratio_buckets
from .picture_rows import RowSource, picture_sizes
from .picture_samples import MAX_ATTEMPTS, BatchShare, PictureReader, undecoded
from .picture_sources import load_pictures
from .picture_streams import StreamSource
from .transforms import PictureTransform, to_pixels

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

__all__ = ["PictureLoader", "PictureTransform", "aspect_ratio_buckets", "load_pictures", "pixel_batches", "to_pixels"]

# The share of skipped samples is judged as if at least so many had been read: one of the first ten says little.
_MIN_SEEN = 500


class PictureLoader:
    """Batches of pictures, in an order that is a pure function of the data set, the seed and the global batch size.

    Batch `n` is the same in a resumed run as in a straight one, with any number of worker processes; and the slices of
    `world_size` processes, joined in the order of their ranks, are the batch of one process with
    `batch_size * world_size`. The augmentation of a sample follows from the seed, its epoch and its row. The global
    random state of no library is read or changed.

    A sample that cannot be read is replaced by another, drawn from the seed, its epoch and its row, and counted.

    A streamed data set is read as lanes: lane `l` of `L` reads every `L`-th shard of an order drawn from the seed and
    the epoch, shuffles each within a bounded buffer, and gives every batch the same number of samples; when its shards
    are used up it begins its next epoch, sooner than a lane with longer ones. `L` is `world_size` times the largest
    power of two such that it divides the global batch and is neither above 32 (8 per process from 8 processes on) nor
    above the number of shards. So the laws above hold for any number of workers (those without a lane are not started)
    and, for 1, 2 or 4 processes, of processes. To go on at a later batch, what lies before it is read through, not
    decoded; shards of known length are skipped. What replaces an unreadable sample is the next of its lane, and row
    numbers are `shard * 2**32 + place`.

    Args:
        dataset: From `load_pictures`, or any with pictures (encoded, decoded or as bytes) in a column.
        transform: Called with the picture and a `torch.Generator`; all results of a batch have one shape.
        batch_size: Pictures per batch of this process.
        seed: Of order and augmentation.
        num_workers: Processes that read and decode; 0 for this one.
        rank: Of this process.
        world_size: Number of processes.
        max_skipped_share: Reading stops when more than this share of the samples had to be skipped, of those this
            process has read (counted as at least 500).
        image_column: Of the data set.
        label_column: Of the data set, with whole numbers; None for batches without labels. A data set without a column
            `label`, the default, has no labels.
        shuffle: False for the order of the data set.
        buckets: `(height, width)` of batches of different shapes, such as `aspect_ratio_buckets` returns, instead of
            the transform's size; each picture goes to the nearest. Reads the header of every picture first.

    Attributes:
        num_samples: Rows of the data set; None when it is streamed.
        steps_per_epoch: Batches that hold every row once, rounded up; with buckets, those of one epoch; None when
            streamed.
        shard_lengths: Rows of those shards of a streamed data set that were read to their end. Save it and update it
            before `batches(start)` to begin sooner.
        num_seen: Samples read by this process, skipped ones included.
        num_skipped: Those among them that could not be read.

    Raises:
        ValueError: If a number is out of range, a column is missing or of another type, or the data set is empty.
    """

    def __init__(
        self,
        dataset: "Dataset | IterableDataset",
        transform: PictureTransform,
        batch_size: int,
        *,
        seed: int = 0,
        num_workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
        max_skipped_share: float = 0.01,
        image_column: str = "image",
        label_column: str | None = "label",
        shuffle: bool = True,
        buckets: Sequence[tuple[int, int]] | None = None,
    ):
        _check_numbers(batch_size, num_workers, rank, world_size, max_skipped_share)
        self.batch_size, self.max_skipped_share = batch_size, max_skipped_share
        self.num_seen, self.num_skipped = 0, 0
        self.num_samples: int | None = None
        self.steps_per_epoch: int | None = None
        self.shard_lengths: dict[int, int] = {}
        dataset, label_column = undecoded(dataset, image_column, label_column)
        reader = PictureReader(transform, seed, image_column, label_column)
        share = BatchShare(batch_size, rank, world_size, num_workers)
        self._source: RowSource | StreamSource
        if not hasattr(dataset, "__len__"):  # streamed
            if buckets is not None:
                raise ValueError("buckets need the sizes of all pictures, so a data set that is not streamed.")
            self._source = StreamSource(dataset, reader, share, self.shard_lengths, shuffle)
            return
        self.num_samples = len(dataset)
        if not self.num_samples:
            raise ValueError("The data set has no rows.")
        order: PictureOrder = RowOrder(self.num_samples, share.global_batch_size, seed, shuffle)
        if buckets is not None:
            sizes = picture_sizes(dataset, image_column)
            order = BucketOrder(sizes, buckets, share.global_batch_size, seed, shuffle)
        self.steps_per_epoch = order.steps_per_epoch
        self._source = RowSource(dataset, reader, share, order)

    def batches(self, start: int = 0) -> Iterator[dict[str, Any]]:
        """Yield batches without end; close the iterator, or drop it, to stop the worker processes.

        Args:
            start: Number of the first batch: as many as an interrupted run has used.

        Yields:
            Dictionaries of `pixel_values`, uint8 `(batch_size, 3, H, W)`; `labels`, int64 `(batch_size,)`, if there
            are any; `indices`, the row numbers, int64 `(batch_size,)`; and `num_skipped`, how many samples of this
            batch were replaced.

        Raises:
            ValueError: If `start` is negative, too many samples cannot be read, or a label is not a whole number.
        """
        if start < 0:
            raise ValueError(f"start={start} is negative.")
        return self._checked(self._source.batches(start), whole=True)

    def once(self) -> Iterator[dict[str, Any]]:
        """Yield every sample of the data set once, in its order, divided among the processes.

        What cannot be read is left out and counted. The last batch is smaller; all processes have equally many
        batches, except that some lack the last one when fewer samples than processes remain. Buckets are not used.

        Yields:
            As `batches`, with at most `batch_size` samples.

        Raises:
            ValueError: As `batches`.
        """
        return self._checked(self._source.once(), whole=False)

    def _checked(self, batches: Iterable[dict[str, Any]], whole: bool) -> Iterator[dict[str, Any]]:
        """Count what was skipped, and stop when it is too much."""
        for batch in batches:
            reason = batch.pop("reason")
            size = len(batch["indices"])
            self.num_seen += size + batch["num_skipped"]
            self.num_skipped += batch["num_skipped"]
            if self.num_skipped > self.max_skipped_share * max(self.num_seen, _MIN_SEEN):
                raise ValueError(
                    f"{self.num_skipped} of {self.num_seen} samples could not be read, a share of "
                    f"{self.num_skipped / self.num_seen:.2%}; max_skipped_share={self.max_skipped_share} of at least "
                    f"{_MIN_SEEN} is allowed. The last reason: {reason}"
                )
            if whole and size < self.batch_size:
                raise ValueError(f"{MAX_ATTEMPTS} substitutes for one sample could not be read. The last: {reason}")
            if size:
                yield batch


def pixel_batches(loader: PictureLoader, num_pictures: int) -> Iterator[torch.Tensor]:
    """Yield the first pictures of a loader as pixels, for fits in closed form.

    Args:
        loader: Its batches from the first on.
        num_pictures: How many in all, for this process; the last batch is cut.

    Yields:
        float32 `(batch_size, 3, H, W)` in [-1, 1].

    Raises:
        ValueError: If `num_pictures` is not positive, or as `PictureLoader.batches`.
    """
    if num_pictures < 1:
        raise ValueError(f"num_pictures={num_pictures} is not positive.")
    left = num_pictures
    with closing(loader.batches()) as batches:  # type: ignore[type-var]
        for batch in batches:
            yield to_pixels(batch["pixel_values"][:left])
            left -= len(batch["pixel_values"])
            if left <= 0:
                return


def _check_numbers(batch_size: int, num_workers: int, rank: int, world_size: int, max_skipped_share: float) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} is not positive.")
    if num_workers < 0:
        raise ValueError(f"num_workers={num_workers} is negative.")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank={rank} is not in [0, world_size={world_size}).")
    if not 0 <= max_skipped_share <= 1:
        raise ValueError(f"max_skipped_share={max_skipped_share} is not in [0, 1].")
