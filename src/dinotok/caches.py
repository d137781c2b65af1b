"""What caches of latents and of tokens have in common: a folder of files, and which rows of them make a batch.

There is one file for each view of a range of pictures. A file is there whole or not at all, so writing goes on where
it was interrupted; `cache.json` says what the files are of, so that nothing else is mixed in.
"""

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import Field, asdict, fields
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar

import torch

from .data import PictureLoader, PictureTransform
from .folders import writing
from .picture_order import RowOrder, mix
from .picture_sources import label_names

if TYPE_CHECKING:
    from datasets import Dataset

DESCRIPTION_NAME = "cache.json"

AnyDescription = TypeVar("AnyDescription", bound="Description")


class Description:
    """What the rows of a cache are of. The fields of the frozen dataclass that derives from it decide every row.

    Attributes:
        FORMAT_NAME: What `cache.json` calls it.
        VERSION: Of the format.
        CONTENT: What the rows are, in the plural: the files are called so too.
        SUFFIX: Of the files.
    """

    FORMAT_NAME: ClassVar[str]
    VERSION: ClassVar[int]
    CONTENT: ClassVar[str]
    SUFFIX: ClassVar[str]
    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    if TYPE_CHECKING:  # fields of the dataclass, whose order is its own

        @property
        def num_pictures(self) -> int: ...
        @property
        def label_names(self) -> list[str]: ...
        @property
        def views(self) -> int: ...
        @property
        def shard_size(self) -> int: ...

    def shards(self) -> list[tuple[int, range]]:
        """Return view and pictures of every file, view by view."""
        starts = [index * self.shard_size for index in range(ceil(self.num_pictures / self.shard_size))]
        ranges = [range(start, min(start + self.shard_size, self.num_pictures)) for start in starts]
        return [(view, pictures) for view in range(self.views) for pictures in ranges]

    def shard_path(self, folder: str | os.PathLike[str], view: int, pictures: range) -> Path:
        """Return the file of a view of some pictures."""
        return Path(folder) / f"{self.CONTENT}-{view:02d}-{pictures.start // self.shard_size:05d}{self.SUFFIX}"

    def check_label(self, picture: int, label: int) -> None:
        """Refuse a label that is not a class.

        Raises:
            ValueError: If it is none.
        """
        if not 0 <= label < len(self.label_names):
            raise ValueError(f"Picture {picture} has the label {label}, not in 0..{len(self.label_names) - 1}.")


def begin_cache(folder: str | os.PathLike[str], description: Description) -> list[tuple[int, range]]:
    """Write `cache.json`, or compare the one that is there, and return the shards whose files are still missing.

    Raises:
        ValueError: If the folder holds rows of something else.
    """
    path = Path(folder) / DESCRIPTION_NAME
    if path.is_file():
        _check_same(folder, _read_description(path, type(description)), description)
    else:
        names = {"format": description.FORMAT_NAME, "format_version": description.VERSION}
        with writing(path) as temporary:
            temporary.write_text(json.dumps({**names, **asdict(description)}, indent=2) + "\n", encoding="utf-8")
    return [shard for shard in description.shards() if not description.shard_path(folder, *shard).is_file()]


def open_files(
    folder: str | os.PathLike[str], description_class: type[AnyDescription]
) -> tuple[AnyDescription, list[Path]]:
    """Return what a complete cache is of, and its files, view by view.

    Raises:
        ValueError: If the folder is another kind of cache, or files are missing.
        OSError: If it cannot be read.
    """
    description = _read_description(Path(folder) / DESCRIPTION_NAME, description_class)
    paths = [description.shard_path(folder, *shard) for shard in description.shards()]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise ValueError(
            f"{str(folder)!r} is not complete: {len(missing)} of {len(paths)} files are missing, first {missing[0]!r}."
        )
    return description, paths


class CacheLoader(ABC):
    """Batches of the rows of a cache, in an order that is a pure function of it, the seed and the global batch size.

    Batch `n` is the same in a resumed run as in a straight one, and the slices of `world_size` processes, joined in
    the order of their ranks, are the batch of one process with `batch_size * world_size`.

    `LatentLoader` and `TokenLoader` say what the arguments are.

    Raises:
        ValueError: If a number is out of range.
    """

    def __init__(self, num_rows: int, batch_size: int, seed: int, rank: int, world_size: int):
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} is not positive.")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank={rank} is not in [0, world_size={world_size}).")
        self.num_rows, self.batch_size, self.rank, self.world_size = num_rows, batch_size, rank, world_size
        self._order = RowOrder(num_rows, batch_size * world_size, seed)
        self.steps_per_epoch = self._order.steps_per_epoch

    @abstractmethod
    def batch(self, rows: list[int]) -> dict[str, torch.Tensor]:
        """Read the rows of one batch."""

    def batches(self, start: int = 0) -> Iterator[dict[str, torch.Tensor]]:
        """Yield batches without end.

        Args:
            start: Number of the first batch: as many as an interrupted run has used.

        Yields:
            What `batch` returns for `batch_size` rows.
        """
        number, first = start, self.rank * self.batch_size
        while True:
            draws = self._order.draws(number)[first : first + self.batch_size]
            yield self.batch([draw.row for draw in draws])
            number += 1

    def once(self) -> Iterator[dict[str, torch.Tensor]]:
        """Yield this process's share of all rows once, in their order; the last batch is smaller."""
        rows = range(self.rank, self.num_rows, self.world_size)
        for start in range(0, len(rows), self.batch_size):
            yield self.batch(list(rows[start : start + self.batch_size]))


# ------------------------------------------------------------------------------- of the scripts that write a cache


class CacheOptions(Protocol):
    """The options of `cache_latents.py` and `cache_tokens.py` that are read here; see there."""

    tokenizer: str
    dataset: str
    resolution: int
    crop: str
    flip: bool
    views: int
    shard_size: int
    batch_size: int
    mixed_precision: str
    num_workers: int
    seed: int


def common_fields(options: CacheOptions, tokenizer_digest: str, dataset: "Dataset") -> dict[str, Any]:
    """Return the fields that descriptions of latents and of tokens share.

    Raises:
        ValueError: If the data set has no labels.
    """
    return {
        "tokenizer": options.tokenizer,
        "tokenizer_digest": tokenizer_digest,
        "dataset": options.dataset,
        "num_pictures": len(dataset),
        "label_names": label_names(dataset),
        "resolution": options.resolution,
        "crop": options.crop,
        "flip": options.flip,
        "views": options.views,
        "seed": options.seed,
        "shard_size": options.shard_size,
        "mixed_precision": options.mixed_precision,
    }


def shard_loader(
    options: CacheOptions, dataset: "Dataset", transform: PictureTransform, view: int, pictures: range
) -> PictureLoader:
    """Read the pictures of one file; crops and flips follow from the seed, the view and the file alone."""
    seed = mix("view", options.seed, view, pictures.start)
    return PictureLoader(
        dataset.select(pictures), transform, options.batch_size, seed=seed, num_workers=options.num_workers
    )


def _check_same(folder: str | os.PathLike[str], there: Description, wanted: Description) -> None:
    for name in (field.name for field in fields(wanted)):
        if name in ("tokenizer", "dataset"):  # where they lie does not matter; their content is compared
            continue
        old, new = getattr(there, name), getattr(wanted, name)
        if old != new:
            raise ValueError(
                f"{str(folder)!r} has {wanted.CONTENT} with {name}={old!r}, not {new!r}: go on with the same options, "
                "or choose another folder."
            )


def _read_description(path: Path, description_class: type[AnyDescription]) -> AnyDescription:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    expected = description_class.FORMAT_NAME, description_class.VERSION
    if (content.get("format"), content.get("format_version")) != expected:
        raise ValueError(f"{str(path)!r} is not of this version's format ({expected[0]}, {expected[1]}).")
    return description_class(**{field.name: content[field.name] for field in fields(description_class)})
