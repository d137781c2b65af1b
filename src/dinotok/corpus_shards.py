"""The samples of a corpus: rows of parquet files, or groups of files in WebDataset archives, one after the other."""

import json
import os
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path, PurePosixPath

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from .folders import PICTURE_SUFFIXES, TABLE_SUFFIX, FoundFile, find_files
from .picture_samples import DEFAULT_LABEL_COLUMN
from .picture_tables import PictureTable

ARCHIVE_SUFFIX = ".tar"
DEFAULT_IMAGE_COLUMN = "image"
# What WebDataset calls the column that is `label` elsewhere.
_ARCHIVE_LABEL = "cls"
_BLOCK = 512  # of a tar archive


class ShardError(ValueError):
    """A shard cannot be read, or not to its end, or too many of its samples cannot."""


@dataclass(frozen=True)
class CorpusSample:
    """One sample as it is stored.

    Attributes:
        key: What its shard calls it: the path in a cell of a parquet file, else the number of the row; or what the
            names of its files in an archive have in common.
        picture: Encoded, or opened and not decoded yet; None if there is none.
        label: None if labels are not asked for. What is no whole number stays as it is, for an error that shows it.
        error: Why there is no picture.
    """

    key: str
    picture: bytes | Image.Image | None
    label: int | str | None
    error: str = ""


def find_shards(paths: Iterable[str | os.PathLike[str]], exclude: str | os.PathLike[str]) -> list[FoundFile]:
    """List the parquet files and tar archives of a corpus: those given, and those in folders and their sub-folders.

    Args:
        paths: Files and folders.
        exclude: The output folder, which may lie among them.

    Returns:
        The shards in an order that depends on their names alone.

    Raises:
        OSError: If a path does not exist or may not be read.
        ValueError: If there are none, or a file is of another kind.
    """
    found = find_files(paths, (TABLE_SUFFIX, ARCHIVE_SUFFIX), recursive=True, exclude=exclude)
    for file in found:
        if file.path.suffix.lower() not in (TABLE_SUFFIX, ARCHIVE_SUFFIX):
            raise ValueError(f"{str(file.path)!r} is neither a {TABLE_SUFFIX} nor a {ARCHIVE_SUFFIX} file.")
    return found


def read_shard(path: Path, image_column: str, label_column: str | None) -> Iterator[CorpusSample]:
    """Read the samples of a shard in their order; pictures stay encoded, and a few are in memory at a time.

    Args:
        path: A parquet file whose pictures `PictureTable` reads, or a WebDataset archive: consecutive files with one
            path up to the first dot of the name are a sample.
        image_column: Of the parquet file, or suffix of the pictures in the archive; there "image" is any picture.
        label_column: Likewise, "label" being `cls` in an archive; None for no labels.

    Yields:
        Every sample, also those without a picture.

    Raises:
        ShardError: If the file is damaged or ends too early; samples before that have been yielded.
        OSError: If it cannot be read.
    """
    read = _read_archive if path.suffix.lower() == ARCHIVE_SUFFIX else _read_table
    try:
        yield from read(path, image_column, label_column)
    except tarfile.TarError as error:
        raise ShardError(f"{str(path)!r} is truncated, damaged or not a tar archive: {error}.") from error
    except ValueError as error:
        raise error if isinstance(error, ShardError) else ShardError(str(error)) from error


def class_names(
    paths: Sequence[Path], label_column: str | None, classes: str | None = None
) -> tuple[str | None, list[str]]:
    """Find out whether a corpus has labels, and what its classes are called.

    Args:
        paths: Its shards; the first one that says it decides.
        label_column: As in `read_shard`.
        classes: File with the names of the classes in their order, one a line, or their number; None for what a
            parquet file written by `datasets` says.

    Returns:
        The label column, None if there are no labels; and the names: then of the one class of all pictures.

    Raises:
        ValueError: If there are labels, but nothing says how many classes; or none, in a column that was named.
        OSError: If a file cannot be read.
    """
    if label_column is None:
        return None, ["picture"]
    if classes is not None:
        return label_column, _read_names(classes)
    path = _first_labels(paths, label_column)
    if path is None:
        if label_column != DEFAULT_LABEL_COLUMN:
            raise ValueError(f"The first of the shards with samples has no labels in {label_column!r}.")
        return None, ["picture"]
    names = _feature_names(path, label_column) if path.suffix.lower() == TABLE_SUFFIX else None
    if names is None:
        raise ValueError(
            f"{str(path)!r} has labels, and nothing says how many classes: pass --classes (a file with their names, "
            "or their number) or --no-labels."
        )
    return label_column, names


def _read_table(path: Path, image_column: str, label_column: str | None) -> Iterator[CorpusSample]:
    table = PictureTable(path, image_column)
    keys = table.paths()
    labels: Sequence[int | str | None] = [None] * table.num_rows
    if label_column is not None:
        labels = _column(path, label_column)
    for row, (key, label) in enumerate(zip(keys, labels, strict=True)):
        name = key or str(row)
        try:
            yield CorpusSample(name, table.picture(row), label)
        except (ValueError, OSError, Image.DecompressionBombError) as error:
            yield CorpusSample(name, None, label, str(error))


def _column(path: Path, name: str) -> list:
    try:
        return pq.read_table(path, columns=[name]).column(name).to_pylist()
    except (KeyError, pa.ArrowException) as error:
        raise ShardError(f"Column {name!r} of {str(path)!r} cannot be read: {error}") from error


def _read_archive(path: Path, image_column: str, label_column: str | None) -> Iterator[CorpusSample]:
    with tarfile.open(path, "r:") as archive:
        members = (member for member in archive if member.isfile() and not _is_hidden(member.name))
        for key, files in groupby(members, lambda member: _split(member.name)[0]):
            yield _archive_sample(archive, key, files, image_column, label_column)
        _check_end(path, archive.offset)


def _archive_sample(
    archive: tarfile.TarFile,
    key: str,
    files: Iterator[tarfile.TarInfo],
    image_column: str,
    label_column: str | None,
) -> CorpusSample:
    label_suffix = _ARCHIVE_LABEL if label_column == DEFAULT_LABEL_COLUMN else label_column
    picture: bytes | None = None
    label: int | str | None = None
    for member in files:  # all of them: the next group begins where this one ends
        suffix = _split(member.name)[1]
        any_picture = image_column == DEFAULT_IMAGE_COLUMN and f".{suffix}" in PICTURE_SUFFIXES
        if picture is None and (any_picture or suffix == image_column):
            picture = _content(archive, member)
        elif suffix == label_suffix:
            text = _content(archive, member).decode("utf-8", "replace").strip()
            label = int(text) if text.isdecimal() else text
    return CorpusSample(key, picture, label, "" if picture is not None else "The sample has no picture.")


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(member)
    return b"" if file is None else file.read()


def _check_end(path: Path, offset: int) -> None:
    """Refuse what `tarfile` takes for the end of an archive: a damaged header, or a missing end."""
    with path.open("rb") as file:
        file.seek(offset)
        mark = file.read(_BLOCK)
    if mark != bytes(_BLOCK):
        size = path.stat().st_size
        raise ShardError(
            f"{str(path)!r} is truncated or damaged: no archive goes on or ends at byte {offset} of {size}."
        )


def _split(name: str) -> tuple[str, str]:
    """Key and suffix of a file in an archive: `a/b.seg.png` is `a/b` and `seg.png`."""
    folder, _, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    return (f"{folder}/{stem}" if folder else stem), suffix.lower()


def _is_hidden(name: str) -> bool:
    return PurePosixPath(name).name.startswith((".", "__"))


def _read_names(classes: str) -> list[str]:
    if classes.isdecimal():
        if int(classes) < 1:
            raise ValueError(f"--classes {classes} is not positive.")
        return [str(number) for number in range(int(classes))]
    names = Path(classes).read_text(encoding="utf-8").splitlines()
    if not names or not all(name.strip() for name in names):
        raise ValueError(f"{classes!r} has empty lines or none; it should have the name of a class on every line.")
    return [name.strip() for name in names]


def _feature_names(path: Path, label_column: str) -> list[str] | None:
    """The names that `datasets` wrote into the schema of a parquet file."""
    metadata = _schema(path).metadata or {}
    try:
        features = json.loads(metadata.get(b"huggingface", b"{}")).get("info", {}).get("features", {})
        return list(features.get(label_column, {}).get("names") or []) or None
    except (ValueError, AttributeError):
        return None


def _first_labels(paths: Sequence[Path], label_column: str) -> Path | None:
    """The first shard that is not empty or damaged, if it has labels."""
    for path in paths:
        try:
            if path.suffix.lower() == TABLE_SUFFIX:
                return path if label_column in _schema(path).names else None
            first = next(read_shard(path, DEFAULT_IMAGE_COLUMN, label_column), None)
        except ShardError:  # its own worker will report it
            continue
        if first is not None:
            return path if first.label is not None else None
    return None


def _schema(path: Path) -> pa.Schema:
    try:
        return pq.read_schema(path)
    except pa.ArrowException as error:
        raise ShardError(f"{str(path)!r} is truncated, damaged or not a parquet file: {error}") from error
