"""Many files through a model in bounded memory: find them, read and batch them, write results whole or not at all."""

import os
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import torch
from PIL import Image

from .image_processor import ImageProcessor
from .picture_tables import PictureTable
from .shards import is_safe_name

_SUFFIXES = "avif bmp gif jfif jp2 jpe jpeg jpg pgm png ppm tif tiff webp"
PICTURE_SUFFIXES = tuple(f".{suffix}" for suffix in _SUFFIXES.split())
TABLE_SUFFIX = ".parquet"
# The overview that a run writes beside its pictures.
SHEET_NAME = "sheet.png"

OnFailure = Callable[[str, Exception], None]


@dataclass(frozen=True)
class FoundFile:
    """A file and what it is called in results.

    Attributes:
        path: Absolute.
        name: Relative to the folder that all inputs have in common, with `/`, unique in its run, always valid UTF-8.
        row: Which row of a parquet file it is; None for a file of its own.
        column: Where the parquet file has its pictures.
    """

    path: Path
    name: str
    row: int | None = None
    column: str = "image"


@dataclass(frozen=True)
class Picture:
    """One picture on its way through a model.

    Attributes:
        name: As `FoundFile.name`.
        size: `(height, width)` before padding.
        values: Its pixels `(3, H, W)`, latents `(C, h, w)` or indices `(codebooks, h, w)`, padded.
    """

    name: str
    size: tuple[int, int]
    values: torch.Tensor


def find_files(
    paths: Iterable[str | os.PathLike[str]],
    suffixes: Collection[str] = PICTURE_SUFFIXES,
    recursive: bool = False,
    exclude: str | os.PathLike[str] | None = None,
) -> list[FoundFile]:
    """List files and the files in folders, each once, folders in sorted order.

    Args:
        paths: Files, of any suffix, and folders. Hidden files and folders in them are left out.
        suffixes: What to take from folders, in lower case, with the dot.
        recursive: Whether to descend into sub-folders; links to folders are not followed.
        exclude: A folder to leave out, such as the one that results are written to.

    Returns:
        The files, with unique names.

    Raises:
        FileNotFoundError: If one of `paths` does not exist.
        OSError: If a folder may not be read.
        ValueError: If no file is found.
    """
    given = [Path(os.path.abspath(path)) for path in paths]
    for path in given:
        if not path.exists():
            raise FileNotFoundError(f"{str(path)!r} does not exist.")
    excluded = None if exclude is None else os.path.abspath(exclude)
    found: dict[Path, None] = {}
    for path in given:
        files = _files_in(path, suffixes, recursive, excluded) if path.is_dir() else [path]
        found.update(dict.fromkeys(files))
    if not found:
        depth = "" if recursive else " (sub-folders are searched with --recursive)"
        raise ValueError(f"No {', '.join(suffixes)} files in {', '.join(map(repr, map(str, given)))}{depth}.")
    common = os.path.commonpath([path if path.is_dir() else path.parent for path in given])
    names = _unique(_printable(path.relative_to(common)) for path in found)
    return [FoundFile(path, name) for path, name in zip(found, names, strict=True)]


def find_pictures(
    paths: Iterable[str | os.PathLike[str]],
    on_failure: OnFailure,
    recursive: bool = False,
    exclude: str | os.PathLike[str] | None = None,
    column: str = "image",
) -> list[FoundFile]:
    """List pictures: files, files in folders, and rows of parquet files such as `datasets` writes.

    A row is named by the path it carries, if that is a relative one without `..`, else by its file and number, as
    `train-000012`; either way in the folder of the parquet file.

    Args:
        paths: As in `find_files`.
        on_failure: Called with the name and the error of a parquet file that cannot be used.
        recursive: As in `find_files`.
        exclude: As in `find_files`.
        column: Where parquet files have their pictures.

    Returns:
        The pictures, with unique names; the rows of a file are in their order.

    Raises:
        OSError: As `find_files`.
        ValueError: If no file is found.
    """
    pictures: list[FoundFile] = []
    for file in find_files(paths, (*PICTURE_SUFFIXES, TABLE_SUFFIX), recursive, exclude):
        if file.path.suffix.lower() != TABLE_SUFFIX:
            pictures.append(file)
            continue
        try:
            row_paths = PictureTable(file.path, column).paths()
        except (ValueError, OSError) as error:
            on_failure(file.name, error)
            continue
        for row, path in enumerate(row_paths):
            pictures.append(FoundFile(file.path, _row_name(file.name, row, path), row, column))
    names = _unique(picture.name for picture in pictures)
    return [replace(picture, name=name) for picture, name in zip(pictures, names, strict=True)]


def png_names(names: Sequence[str]) -> list[str]:
    """Name the PNG file of every picture, so that no two are the same, not even where case does not count.

    `a/x.jpg` becomes `a/x.png`. Pictures that would share a name, such as `x.jpg` and `x.webp`, keep their suffix:
    `x.jpg.png` and `x.webp.png`.

    Args:
        names: Relative names with `/`.

    Returns:
        As many relative names.
    """
    short = [f"{name[: -len(suffix)] if suffix else name}.png" for name in names for suffix in [_picture_suffix(name)]]
    uses = Counter([SHEET_NAME, *(name.casefold() for name in short)])
    wanted = (s if uses[s.casefold()] == 1 else f"{name}.png" for s, name in zip(short, names, strict=True))
    return _unique(wanted, taken={SHEET_NAME})


def check_output(output: Path, files: Sequence[FoundFile] = ()) -> None:
    """Refuse an output folder that is a file, or where a result would replace a picture it is made from.

    Raises:
        ValueError: If it is, or would.
    """
    if output.exists() and not output.is_dir():
        raise ValueError(f"output={str(output)!r} is a file, not a folder.")
    sources = {os.path.realpath(path) for path in {file.path for file in files}}
    for name in (*png_names([file.name for file in files]), SHEET_NAME):
        if os.path.realpath(output / name) in sources:
            raise ValueError(f"{str(output / name)!r} is an input and would be overwritten; choose another --output.")


def read_pictures(files: Iterable[FoundFile], processor: ImageProcessor, on_failure: OnFailure) -> Iterator[Picture]:
    """Read pictures one after the other; what cannot be read is reported and left out.

    Args:
        files: From `find_files` or `find_pictures`.
        processor: Pads to whole patches.
        on_failure: Called with the name and the error.

    Yields:
        Pixels `(3, H, W)` in [-1, 1].
    """
    table: PictureTable | None = None
    for file in files:
        try:
            if file.row is None:
                pixels = processor.preprocess(file.path)
            else:
                if table is None or table.path != file.path:
                    table = PictureTable(file.path, file.column)
                pixels = processor.preprocess(table.picture(file.row))
        except (ValueError, OSError) as error:
            on_failure(file.name, error)
            continue
        yield Picture(file.name, processor.sizes[0], pixels[0])


def equal_batches(pictures: Iterable[Picture], batch_size: int) -> Iterator[list[Picture]]:
    """Group consecutive pictures of one shape and dtype; their order stays, and one batch is in memory at a time.

    Args:
        pictures: Of any shapes.
        batch_size: Pictures per batch, at most.

    Yields:
        Between 1 and `batch_size` pictures whose `values` can be stacked.
    """
    batch: list[Picture] = []
    for picture in pictures:
        if batch and (picture.values.shape, picture.values.dtype) != (batch[0].values.shape, batch[0].values.dtype):
            yield batch
            batch = []
        batch.append(picture)
        if len(batch) == batch_size:
            yield batch
            batch = []
    if batch:
        yield batch


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path`, made into `path` when the block ends and removed when it fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".dinotok-{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_png(picture: Image.Image, path: Path) -> None:
    """Write a PNG file, whole or not at all, and the folders it lies in."""
    with writing(path) as temporary:
        picture.save(temporary, format="PNG")


def _files_in(folder: Path, suffixes: Collection[str], recursive: bool, excluded: str | None) -> Iterator[Path]:
    def fail(error: OSError) -> None:
        raise error

    for parent, folders, names in os.walk(folder, onerror=fail):
        keep = [name for name in folders if name[0] != "." and os.path.join(parent, name) != excluded]
        folders[:] = sorted(keep) if recursive else []
        for name in sorted(names):
            if name[0] != "." and os.path.splitext(name)[1].lower() in suffixes:
                yield Path(parent, name)


def _row_name(table: str, row: int, path: str | None) -> str:
    stem = PurePosixPath(table).with_suffix("")
    if path is None or not is_safe_name(path):
        return f"{stem}-{row:06d}"
    return str(stem.parent / path)


def _picture_suffix(name: str) -> str:
    suffix = PurePosixPath(name).suffix
    return suffix if suffix.lower() in PICTURE_SUFFIXES else ""


def _printable(path: Path) -> str:
    """A name for bytes of any encoding: what is not UTF-8 becomes a replacement character."""
    return os.fsencode(path.as_posix()).decode("utf-8", "replace")


def _unique(names: Iterable[str], taken: Iterable[str] = ()) -> list[str]:
    """Append -2, -3, ... before the suffix of names that are taken already, upper and lower case being the same."""
    used = {name.casefold() for name in taken}
    last: dict[str, int] = {}  # where to go on counting: ten thousand rows may have one name
    result = []
    for name in names:
        stem, suffix = os.path.splitext(name)
        number, candidate = last.get(name.casefold(), 1), name
        while candidate.casefold() in used:
            number += 1
            candidate = f"{stem}-{number}{suffix}"
        last[name.casefold()] = number
        used.add(candidate.casefold())
        result.append(candidate)
    return result
