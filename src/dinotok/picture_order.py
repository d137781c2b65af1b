"""Which row of a data set comes when: a pure function of the seed and the number of the batch."""

import hashlib
import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

# Further from a square than this, a bucket has so short a side that little of a picture is left.
_MAX_RATIO = 2.0


class Draw(NamedTuple):
    """One sample to read.

    Attributes:
        epoch: Seeds its augmentation, with the row.
        row: In the data set.
        size: `(height, width)` instead of the transform's; None for that.
    """

    epoch: int
    row: int
    size: tuple[int, int] | None = None


class PictureOrder(Protocol):
    """The draws of every global batch: those of all processes together."""

    steps_per_epoch: int

    def draws(self, number: int) -> list[Draw]:
        """Return the draws of global batch `number`, the same for every process."""


def mix(*values: int | str) -> int:
    """Derive a seed from several numbers: 63 bits that change entirely with any of them."""
    digest = hashlib.blake2b(repr(values).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def permutation(count: int, *values: int | str) -> np.ndarray:
    """Return a permutation of `range(count)`, int64, seeded by `mix(*values)`."""
    return np.random.default_rng(mix(*values)).permutation(count)


class RowOrder:
    """Every row once per epoch, in a new order each; a batch may begin in one epoch and end in the next.

    Args:
        num_rows: Of the data set.
        global_batch_size: Of all processes together.
        seed: Of the order.
        shuffle: False for ascending rows in every epoch.
    """

    def __init__(self, num_rows: int, global_batch_size: int, seed: int, shuffle: bool = True):
        self.num_rows, self.global_batch_size, self.seed, self.shuffle = num_rows, global_batch_size, seed, shuffle
        self.steps_per_epoch = math.ceil(num_rows / global_batch_size)
        self._epoch, self._rows = -1, np.empty(0, dtype=np.int64)

    def draws(self, number: int) -> list[Draw]:
        start = number * self.global_batch_size
        result = []
        for position in range(start, start + self.global_batch_size):
            epoch, place = divmod(position, self.num_rows)
            result.append(Draw(epoch, int(self._rows_of(epoch)[place])))
        return result

    def _rows_of(self, epoch: int) -> np.ndarray:
        if epoch != self._epoch:
            rows = permutation(self.num_rows, "rows", self.seed, epoch) if self.shuffle else np.arange(self.num_rows)
            self._epoch, self._rows = epoch, rows
        return self._rows


class BucketOrder:
    """Batches of pictures of one shape each: every row at most once per epoch.

    Rows go to the bucket whose aspect ratio is nearest, among those that fill at least one global batch. In each epoch
    what does not fill a batch is left out, fewer than `global_batch_size` rows per bucket and others every time.

    Args:
        sizes: `(height, width)` of every row; None where it could not be read.
        buckets: `(height, width)` of the results.
        global_batch_size: Of all processes together.
        seed: Of the order.
        shuffle: False for ascending rows, bucket after bucket.

    Raises:
        ValueError: If there are fewer rows than one global batch.
    """

    def __init__(
        self,
        sizes: Sequence[tuple[int, int] | None],
        buckets: Sequence[tuple[int, int]],
        global_batch_size: int,
        seed: int,
        shuffle: bool = True,
    ):
        if len(sizes) < global_batch_size:
            raise ValueError(f"{len(sizes)} pictures do not fill one batch of {global_batch_size} with buckets.")
        self.global_batch_size, self.seed, self.shuffle = global_batch_size, seed, shuffle
        chosen, assigned = _assign(sizes, buckets, global_batch_size)
        self.buckets = chosen
        self.rows = [np.flatnonzero(assigned == index) for index in range(len(chosen))]
        self.steps_per_epoch = sum(len(rows) // global_batch_size for rows in self.rows)
        self._epoch = -1
        self._batches: list[tuple[int, np.ndarray]] = []

    def draws(self, number: int) -> list[Draw]:
        epoch, place = divmod(number, self.steps_per_epoch)
        bucket, rows = self._batches_of(epoch)[place]
        return [Draw(epoch, int(row), self.buckets[bucket]) for row in rows]

    def _batches_of(self, epoch: int) -> list[tuple[int, np.ndarray]]:
        if epoch == self._epoch:
            return self._batches
        batches = []
        for bucket, rows in enumerate(self.rows):
            shuffled = rows[permutation(len(rows), "bucket", self.seed, epoch, bucket)] if self.shuffle else rows
            whole = len(rows) // self.global_batch_size
            batches += [(bucket, part) for part in shuffled[: whole * self.global_batch_size].reshape(whole, -1)]
        if self.shuffle:
            batches = [batches[place] for place in permutation(len(batches), "batches", self.seed, epoch)]
        self._epoch, self._batches = epoch, batches
        return batches


def aspect_ratio_buckets(size: int, patch_size: int = 16, max_ratio: float = _MAX_RATIO) -> list[tuple[int, int]]:
    """List the shapes of about `size * size` pixels whose sides are whole patches.

    For every width that is a multiple of `patch_size`, the tallest shape of at most `size**2` pixels; and the same
    with the sides exchanged.

    Args:
        size: Side of the square with as many pixels; a multiple of `patch_size`.
        patch_size: In pixels.
        max_ratio: Of the longer side to the shorter, at most.

    Returns:
        `(height, width)` in ascending order of height / width; `(size, size)` is among them.

    Raises:
        ValueError: If `size` is not a positive multiple of `patch_size`, or `max_ratio` is below 1.
    """
    if patch_size < 1 or size < 1 or size % patch_size:
        raise ValueError(f"size={size} is not a positive multiple of patch_size={patch_size}.")
    if max_ratio < 1:
        raise ValueError(f"max_ratio={max_ratio} is below 1.")
    shapes = set()
    for width in range(patch_size, size + 1, patch_size):
        height = size * size // width // patch_size * patch_size
        if height <= max_ratio * width:
            shapes |= {(height, width), (width, height)}
    return sorted(shapes, key=lambda shape: (shape[0] / shape[1], shape))


def _assign(
    sizes: Sequence[tuple[int, int] | None], buckets: Sequence[tuple[int, int]], least: int
) -> tuple[list[tuple[int, int]], np.ndarray]:
    """Drop the emptiest bucket until all have `least` rows; return those that stay, and the one of every row."""
    # A row whose header is damaged is as good as square: reading it will fail, and count, like any other.
    shapes = np.array([size or (1, 1) for size in sizes], dtype=np.float64)
    ratios = np.log(shapes[:, 0] / shapes[:, 1])
    chosen = list(dict.fromkeys(buckets))
    while True:
        centres = np.array([math.log(height / width) for height, width in chosen])
        assigned = np.abs(ratios[:, None] - centres).argmin(axis=1)
        counts = np.bincount(assigned, minlength=len(chosen))
        if counts.min() >= least:
            return chosen, assigned
        del chosen[int(counts.argmin())]
