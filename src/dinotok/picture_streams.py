"""Batches of a streamed data set, whose shards can only be read from their beginning."""

from collections import deque
from collections.abc import Iterable, Iterator
from itertools import count, islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import IterableDataset as TorchIterableDataset
from torch.utils.data import get_worker_info

from .picture_order import Draw, mix, permutation
from .picture_samples import BatchShare, PictureReader, Sample, collate, load, rows_of

if TYPE_CHECKING:
    from datasets import IterableDataset

# Encoded pictures in all shuffling buffers of all processes together.
_BUFFERED = 2048
# Lanes are a power of two per process: at most so many together, or so many each.
_FEW_LANES, _LANES_PER_PROCESS = 32, 8
_ROWS_AT_ONCE = 16
_SHARD_STRIDE = 2**32
_MAX_EMPTY_EPOCHS = 100

Row = tuple[dict[str, Any], Draw]


class StreamSource:
    """Batches of a streamed data set, as `PictureLoader` says.

    Args:
        dataset: From `undecoded`.
        reader: Makes a sample of a row.
        share: Of this process.
        shard_lengths: Known lengths; those of shards read to their end are added.
        shuffle: Whether shards and the rows in them are shuffled.

    Raises:
        ValueError: If there are fewer shards than processes.
    """

    def __init__(
        self,
        dataset: "IterableDataset",
        reader: PictureReader,
        share: BatchShare,
        shard_lengths: dict[int, int],
        shuffle: bool,
    ):
        self.share, self.shard_lengths = share, shard_lengths
        self.num_lanes = _num_lanes(dataset.num_shards, share)
        self._stream = _Stream(dataset, reader, self.num_lanes, shuffle)

    def batches(self, start: int) -> Iterator[dict[str, Any]]:
        """Yield this process's part of global batch `start` and of all after it."""
        lanes = self.num_lanes // self.share.world_size
        workers = min(self.share.num_workers, lanes)  # one without a lane would have nothing to do
        parts = load(_LaneParts(self._stream, self.share, start, dict(self.shard_lengths)), workers, batch_size=None)
        while group := list(islice(parts, max(1, workers))):
            for part in group:
                self.shard_lengths.update(part.pop("shard_lengths"))
            yield _join(group)

    def once(self) -> Iterator[dict[str, Any]]:
        """Yield this process's part of all rows, shard after shard, without those that cannot be read."""
        return load(_PassBatches(self._stream, self.share), self.share.num_workers, batch_size=None)


class _Stream:
    """A streamed data set by shards and lanes."""

    def __init__(self, dataset: "IterableDataset", reader: PictureReader, num_lanes: int, shuffle: bool):
        self.dataset, self.reader, self.num_lanes, self.shuffle = dataset, reader, num_lanes, shuffle
        self.num_shards = dataset.num_shards

    def lane(self, lane: int, skip: int, lengths: dict[int, int]) -> Iterator[Row]:
        """Yield the rows of a lane without end, but for the first `skip`; note the lengths of shards."""
        empty_epochs = 0
        for epoch in count():
            num_rows = 0
            for shard in self._shards(epoch)[lane :: self.num_lanes]:
                length = lengths.get(shard)
                if length is not None and length <= skip:
                    skip, num_rows = skip - length, num_rows + length
                    continue
                for row in self._shuffled(shard, epoch, lengths):
                    num_rows += 1
                    if skip:
                        skip -= 1
                    else:
                        yield row
            empty_epochs = 0 if num_rows else empty_epochs + 1
            if empty_epochs > _MAX_EMPTY_EPOCHS:
                raise ValueError(f"The data set has no rows in the shards of lane {lane} of {self.num_lanes}.")

    def rows(self, shard: int, epoch: int = 0) -> Iterator[Row]:
        """Yield the rows of a shard in their order."""
        # `iter` with a batch size reads all of them in a worker process too, where plain iteration divides them.
        batches = self.dataset.shard(num_shards=self.num_shards, index=shard).iter(batch_size=_ROWS_AT_ONCE)
        rows = (row for batch in batches for row in rows_of(batch))
        for place, row in enumerate(rows):
            yield row, Draw(epoch, shard * _SHARD_STRIDE + place)

    def _shards(self, epoch: int) -> list[int]:
        if not self.shuffle:
            return list(range(self.num_shards))
        return permutation(self.num_shards, "shards", self.reader.seed, epoch).tolist()

    def _shuffled(self, shard: int, epoch: int, lengths: dict[int, int]) -> Iterator[Row]:
        capacity = max(1, _BUFFERED // self.num_lanes) if self.shuffle else 1
        random = np.random.default_rng(mix("buffer", self.reader.seed, epoch, shard))
        buffer: list[Row] = []
        length = 0
        for row in self.rows(shard, epoch):
            length += 1
            if len(buffer) < capacity:
                buffer.append(row)
                continue
            place = int(random.integers(capacity))
            yield buffer[place]
            buffer[place] = row
        lengths[shard] = length
        for place in random.permutation(len(buffer)):
            yield buffer[place]


class _Lookahead:
    """A lane of which the next rows can be seen before it is their turn."""

    def __init__(self, rows: Iterator[Row]):
        self._rows, self._seen = rows, deque[Row]()

    def take(self) -> None:
        """Go on to the next row."""
        self.peek(0)
        self._seen.popleft()

    def peek(self, distance: int) -> Row:
        """Return the row that is `distance` after the next."""
        while len(self._seen) <= distance:
            self._seen.append(next(self._rows))
        return self._seen[distance]


class _LaneParts(TorchIterableDataset):
    """What the lanes of one worker give to every batch, from batch `start` on."""

    def __init__(self, stream: _Stream, share: BatchShare, start: int, shard_lengths: dict[int, int]):
        self.stream, self.share, self.start, self.shard_lengths = stream, share, start, shard_lengths

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker, num_workers = _worker()
        per_rank = self.stream.num_lanes // self.share.world_size
        first, last = (self.share.rank * per_rank + per_rank * w // num_workers for w in (worker, worker + 1))
        per_batch = self.share.global_batch_size // self.stream.num_lanes
        lengths = self.shard_lengths
        lanes = [_Lookahead(self.stream.lane(lane, self.start * per_batch, lengths)) for lane in range(first, last)]
        reported: dict[int, int] = {}
        while True:
            part = collate([self._sample(lane) for lane in lanes for _ in range(per_batch)])
            part["shard_lengths"] = {shard: length for shard, length in lengths.items() if shard not in reported}
            reported |= part["shard_lengths"]
            yield part

    def _sample(self, lane: _Lookahead) -> Sample:
        sample = self.stream.reader.read_or_substitute(lane.peek(0)[1], lane.peek)
        lane.take()
        return sample


class _PassBatches(TorchIterableDataset):
    """One pass over all rows: every process reads all shards and decodes its own samples, and so does every worker."""

    def __init__(self, stream: _Stream, share: BatchShare):
        self.stream, self.share = stream, share

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker, num_workers = _worker()
        rows = (row for shard in range(self.stream.num_shards) for row in self.stream.rows(shard))
        first = self.share.rank * self.share.batch_size
        for number in count():
            batch = list(islice(rows, self.share.global_batch_size))
            mine = batch[first : first + self.share.batch_size]
            if not batch:
                return
            if mine and number % num_workers == worker:
                yield collate([self.stream.reader.read_or_skip(*row) for row in mine])


def _num_lanes(num_shards: int, share: BatchShare) -> int:
    """The most lanes, a power of two per process, that divide the global batch."""
    if num_shards < share.world_size:
        raise ValueError(f"The data set has {num_shards} shards, fewer than world_size={share.world_size} processes.")
    most = min(num_shards, max(_FEW_LANES, _LANES_PER_PROCESS * share.world_size))
    lanes = share.world_size
    while 2 * lanes <= most and share.global_batch_size % (2 * lanes) == 0:
        lanes *= 2
    return lanes


def _worker() -> tuple[int, int]:
    info = get_worker_info()
    return (info.id, info.num_workers) if info else (0, 1)


def _join(parts: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """One batch of the parts of several workers."""
    parts = list(parts)
    tensors = {key for part in parts for key, value in part.items() if isinstance(value, torch.Tensor)}
    batch: dict[str, Any] = {key: torch.cat([part[key] for part in parts if key in part]) for key in tensors}
    batch["num_skipped"] = sum(part["num_skipped"] for part in parts)
    batch["reason"] = next((part["reason"] for part in reversed(parts) if part["reason"]), "")
    return batch
