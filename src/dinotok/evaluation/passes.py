"""One pass over a data set that several processes share and that goes on where it was killed.

The data set is cut into shards of consecutive rows. What was measured of each picture of a shard is one file, written
whole or not at all, by whichever process has the shard; so neither the number of processes nor an interruption changes
a bit of the result. Processes meet in the folder of these files, which all of them must see.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from ..data import PictureLoader, PictureTransform
from ..folders import writing

if TYPE_CHECKING:
    from datasets import Dataset

Rows = dict[str, torch.Tensor]
_PATIENCE = timedelta(days=7)  # the slowest process has to finish its shards
_DIGEST = "digest"


@dataclass(frozen=True)
class PassOptions:
    """How a pass is run; none of this moves a number, except that `batch_size` may in the last digit.

    Attributes:
        batch_size: Pictures at a time.
        num_workers: Processes that read and decode, for each process.
        shard_size: Pictures per file of partial results: what an interruption costs at most.
        max_skipped_share: More unreadable pictures than this share of a shard (counted as at least 500) end the pass.
    """

    batch_size: int = 8
    num_workers: int = 0
    shard_size: int = 512
    max_skipped_share: float = 0.0


class MeasuredRows:
    """The files of a finished pass.

    Args:
        paths: In the order of the data set.
    """

    def __init__(self, paths: list[Path]):
        self.paths = paths
        with safe_open(str(paths[0]), "pt") as file:
            self.names = sorted(file.keys())

    def batches(self, name: str) -> Iterator[torch.Tensor]:
        """Yield what was measured, file by file: `(N, ...)`."""
        for path in self.paths:
            with safe_open(str(path), "pt") as file:
                yield file.get_tensor(name)

    def all(self, name: str) -> torch.Tensor:
        """Return what was measured of all pictures, `(N, ...)`."""
        return torch.cat(list(self.batches(name)))

    @property
    def count(self) -> int:
        """Pictures."""
        return sum(len(rows) for rows in self.batches(_DIGEST))

    def pictures(self) -> dict[str, Any]:
        """Return `digest` of all pictures in order, after crop and resize, and the number of `distinct` ones."""
        digests = [bytes(row) for rows in self.batches(_DIGEST) for row in rows.numpy()]
        return {"digest": f"sha256:{hashlib.sha256(b''.join(digests)).hexdigest()}", "distinct": len(set(digests))}


@contextmanager
def process_group() -> Iterator[None]:
    """Join the other processes of a `torchrun`, if there are any, and leave them at the end."""
    started = int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.distributed.is_initialized()
    if started:
        torch.distributed.init_process_group("gloo", timeout=_PATIENCE)
    try:
        yield
    finally:
        if started:
            torch.distributed.destroy_process_group()


def rank_and_processes() -> tuple[int, int]:
    """Return the rank of this process, and how many share the work."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def wait_for_all() -> None:
    """Wait until all processes have come here."""
    if rank_and_processes()[1] > 1:
        torch.distributed.barrier()


def remove_parts(folder: Path) -> None:
    """Delete the partial results of a finished pass, and what a killed one left of a file it was writing."""
    for pattern in ("*.safetensors", ".dinotok-*.tmp"):
        for path in folder.glob(pattern):
            path.unlink()
    folder.rmdir()


def measure_pictures(
    dataset: "Dataset",
    resolution: int,
    measure: Callable[[torch.Tensor], Rows],
    folder: Path,
    identity: dict[str, Any],
    options: PassOptions,
) -> MeasuredRows:
    """Measure every picture of a data set once; what an earlier, interrupted call measured is not done again.

    Under `torch.distributed` the processes share the work, and all return when all are done.

    Args:
        dataset: From `load_pictures`, not streamed.
        resolution: Pictures become so large, as `PictureTransform` crops them in the centre.
        measure: Called with uint8 `(B, 3, resolution, resolution)`; returns a row per picture for every name.
        folder: Of the partial results.
        identity: What numbers depend on; an earlier call with another one is not continued.
        options: See there.

    Returns:
        The rows of all pictures, the same on every process.

    Raises:
        ValueError: If the data set is empty, a picture cannot be read, `measure` refuses one, or the folder has
            partial results of another evaluation.
    """
    transform = PictureTransform(resolution, crop="center")

    def read(start: int, stop: int) -> Iterator[dict[str, Any]]:
        return PictureLoader(
            dataset.select(range(start, stop)),
            transform,
            options.batch_size,
            num_workers=options.num_workers,
            max_skipped_share=options.max_skipped_share,
            shuffle=False,
        ).once()

    return measure_batches(len(dataset), read, measure, folder, identity, options)


def measure_batches(
    count: int,
    read: Callable[[int, int], Iterator[dict[str, Any]]],
    measure: Callable[[torch.Tensor], Rows],
    folder: Path,
    identity: dict[str, Any],
    options: PassOptions,
) -> MeasuredRows:
    """Measure pictures from anywhere; otherwise as `measure_pictures`.

    Args:
        count: Pictures.
        read: Yields batches of `pixel_values` from a first to before a last picture.
        measure: As there.
        folder: As there.
        identity: As there.
        options: As there.
    """
    if not count:
        raise ValueError("The data set has no pictures.")
    size = options.shard_size
    key = json.dumps({**identity, "rows": count, "shard_size": size}, sort_keys=True, default=str)
    rank, processes = rank_and_processes()
    starts = range(0, count, size)
    paths = [folder / f"{start:010d}.safetensors" for start in starts]
    with tqdm(total=count // processes, unit=" pictures", disable=None if rank == 0 else True) as progress:
        for start, path in list(zip(starts, paths, strict=True))[rank::processes]:
            stop = min(start + size, count)
            if not _is_done(path, key):
                rows = _measure_part(read(start, stop), measure)
                with writing(path) as temporary:
                    save_file(rows, temporary, {"identity": key})
            progress.update(stop - start)
    wait_for_all()
    return MeasuredRows(paths)


def _is_done(path: Path, key: str) -> bool:
    if not path.is_file():
        return False
    try:
        with safe_open(str(path), "pt") as file:
            found = (file.metadata() or {}).get("identity", "")
    except SafetensorError as error:
        raise ValueError(f"{str(path)!r} is damaged: delete it, and it is made again ({error}).") from error
    if found != key:
        earlier, now = json.loads(found or "{}"), json.loads(key)
        names = [name for name in sorted({*earlier, *now}) if earlier.get(name) != now.get(name)]
        raise ValueError(
            f"{str(path.parent)!r} has partial results of another evaluation, with another {', '.join(names)}: delete "
            "that folder, or choose another output."
        )
    return True


def _measure_part(batches: Iterator[dict[str, Any]], measure: Callable[[torch.Tensor], Rows]) -> Rows:
    found: list[Rows] = []
    for batch in batches:
        images = batch["pixel_values"]
        rows = measure(images)
        if "labels" in batch:
            rows["labels"] = batch["labels"]
        found.append({**rows, _DIGEST: _digests(images)})
    if not found:
        raise ValueError("None of the pictures of a shard could be read.")
    return {name: torch.cat([rows[name] for rows in found]).contiguous() for name in found[0]}


def _digests(images: torch.Tensor) -> torch.Tensor:
    digests = [hashlib.sha256(image.contiguous().numpy().tobytes()).digest() for image in images]
    return torch.tensor([list(digest) for digest in digests], dtype=torch.uint8)  # (B, 32)
