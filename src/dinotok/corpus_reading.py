"""The samples of a shard, decoded in batches: pixels and labels, or why there are none."""

import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

from .corpus_shards import CorpusSample, ShardError
from .picture_order import Draw
from .picture_samples import PictureReader, Sample

Value = TypeVar("Value")
Result = TypeVar("Result")


@dataclass(frozen=True)
class DecodedSample:
    """A sample on its way to the model.

    Attributes:
        key: See `CorpusSample`.
        sample: Pixels, label and row; without pixels, the reason.
    """

    key: str
    sample: Sample


@dataclass
class ShardReader:
    """Decodes the samples of one shard.

    Attributes:
        reader: Makes a sample of a row with the columns `image` and, if there are labels, `label`.
        check_label: Raises a `ValueError` for what is not a class; called with the row and the label.
        max_samples: More than these are an error.
        accept_damage: Whether a damaged shard just ends where the damage is.
        damage: What was accepted.
    """

    reader: PictureReader
    check_label: Callable[[int, int], None]
    max_samples: int
    accept_damage: bool
    damage: str | None = None

    def batches(
        self, samples: Iterable[CorpusSample], batch_size: int, num_workers: int
    ) -> Iterator[list[DecodedSample]]:
        """Yield all samples in their order, those that cannot be read too.

        Args:
            samples: Of the shard.
            batch_size: At most so many at a time.
            num_workers: Threads, which are one batch ahead; 0 for none.

        Raises:
            ShardError: If the shard is damaged and that is not accepted.
            ValueError: If it has too many samples.
        """
        return batches_ahead(self._numbered(samples), self._decode, batch_size, num_workers)

    def _numbered(self, samples: Iterable[CorpusSample]) -> Iterator[tuple[int, CorpusSample]]:
        try:
            for number, sample in enumerate(samples):
                if number >= self.max_samples:
                    raise ValueError(f"A shard has more than {self.max_samples} samples, all there are numbers for.")
                yield number, sample
        except ShardError as error:
            if not self.accept_damage:
                raise
            self.damage = stable_text(error)

    def _decode(self, numbered: tuple[int, CorpusSample]) -> DecodedSample:
        number, sample = numbered
        try:
            if sample.error:
                raise ValueError(sample.error)
            read = self.reader.read({"image": sample.picture, "label": sample.label}, Draw(0, number))
            if read.label is not None:
                self.check_label(number, read.label)
            return DecodedSample(sample.key, read)
        except (ValueError, OSError) as error:
            return DecodedSample(sample.key, Sample(None, None, number, 1, stable_text(error)))


def batches_ahead(
    values: Iterator[Value], function: Callable[[Value], Result], batch_size: int, num_workers: int
) -> Iterator[list[Result]]:
    """Apply a function to values in batches, in their order; threads are one batch ahead of the one that is used."""
    if not num_workers:
        while batch := [function(value) for value in islice(values, batch_size)]:
            yield batch
        return
    with ThreadPoolExecutor(num_workers) as pool:
        ahead: deque = deque()
        while futures := [pool.submit(function, value) for value in islice(values, batch_size)]:
            ahead.append(futures)
            if len(ahead) > 1:
                yield [future.result() for future in ahead.popleft()]
        for futures in ahead:
            yield [future.result() for future in futures]


def stable_text(error: Exception) -> str:
    """Return what an error says, the same in every run: Pillow names objects by their addresses."""
    return re.sub(r" at 0x[0-9a-f]+", "", " ".join(str(error).split()) or type(error).__name__)
