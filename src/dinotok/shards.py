"""What files of latents and of tokens have in common: which model made them, and whose pictures they hold."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import ClassVar, Self

from . import __version__

SHARD_PATTERNS = ("latents-*.safetensors", "tokens-*.parquet")


@dataclass(frozen=True)
class ModelOrigin:
    """What made the content of a shard.

    Attributes:
        model: Folder or repository, as the user named it.
        revision: Commit of the repository, or digest of the folder.
        digest: Digest of the model's files, wherever they are: what `decode` compares.
        class_name: Of the model.
        patch_size: Pixels per latent on each side.
        settings: How it was run (dtype, tiles), for the record.
        image_size: Of a model for one resolution: height and width of its pictures, whatever the grid of its latents.
    """

    model: str
    revision: str
    digest: str
    class_name: str
    patch_size: int
    settings: dict
    image_size: int | None = None

    def padded_size(self, rows: int, columns: int) -> tuple[int, int]:
        """Return height and width of the pictures whose latents have so many rows and columns."""
        if self.image_size is not None:
            return self.image_size, self.image_size
        return rows * self.patch_size, columns * self.patch_size

    def to_metadata(self) -> dict[str, str]:
        """Return what a file says about it, with the version of this library."""
        fixed = {} if self.image_size is None else {"image_size": str(self.image_size)}
        return {
            "dinotok_version": __version__,
            "model": self.model,
            "model_revision": self.revision,
            "model_digest": self.digest,
            "class_name": self.class_name,
            "patch_size": str(self.patch_size),
            "settings": json.dumps(self.settings),
            **fixed,
        }

    @classmethod
    def from_metadata(cls, metadata: dict[str, str]) -> Self:
        """Read what `to_metadata` wrote.

        Raises:
            KeyError: If an entry is missing.
            ValueError: If one has another form.
        """
        return cls(
            model=metadata["model"],
            revision=metadata["model_revision"],
            digest=metadata["model_digest"],
            class_name=metadata["class_name"],
            patch_size=int(metadata["patch_size"]),
            settings=json.loads(metadata["settings"]),
            image_size=int(metadata["image_size"]) if "image_size" in metadata else None,
        )


@dataclass(frozen=True)
class Shard:
    """A file whose metadata was read and checked.

    Attributes:
        path: The file.
        origin: What made it.
        sizes: `(height, width)` of every picture, in the order they were written.
    """

    content: ClassVar[str] = "latents"
    path: Path
    origin: ModelOrigin
    sizes: dict[str, tuple[int, int]]


def check_has_no_shards(folder: Path) -> None:
    """Refuse a folder where shards of another run, of either kind, would be mixed with new ones.

    Raises:
        ValueError: If the folder has any.
    """
    present = sorted(path for pattern in SHARD_PATTERNS for path in folder.glob(pattern))
    if present:
        raise ValueError(
            f"{str(folder)!r} has {len(present)} shards already, first {present[0].name!r}: "
            "remove them or choose another folder."
        )


def check_format(path: Path, metadata: dict[str, str], file_format: str, format_version: str, content: str) -> None:
    """Raise a `ValueError` unless a file says that it is of this format and version."""
    if metadata.get("format") != file_format:
        raise ValueError(
            f"{str(path)!r} is a {path.suffix[1:]} file without {content}: its metadata has no format={file_format!r}."
        )
    if metadata.get("format_version") != format_version:
        raise ValueError(
            f"{str(path)!r} has format_version={metadata.get('format_version')!r}, this dinotok ({__version__}) reads "
            f"{format_version!r}."
        )


@contextmanager
def parsing_metadata(path: Path) -> Iterator[None]:
    """Turn what parsing damaged metadata raises into a `ValueError` that names the file."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"The metadata of {str(path)!r} is damaged: {reason}.") from error


def check_picture(name: str, size: tuple[int, int], padded_size: tuple[int, int]) -> None:
    """Refuse a size that cannot be cropped from the padded one, and a name that is not safe.

    Raises:
        ValueError: If the picture does not fit, or its file would be written outside the output folder.
    """
    if not is_safe_name(name):
        raise ValueError(f"the picture name {name!r} is not a relative path inside a folder")
    if not all(1 <= side <= padded for side, padded in zip(size, padded_size, strict=True)):
        raise ValueError(f"{name!r} is {size[0]}x{size[1]}, which does not fit into {padded_size[0]}x{padded_size[1]}")


def is_safe_name(name: str) -> bool:
    """Tell whether a name, which may come from a stranger, stays inside the folder it is joined to."""
    parts = PurePosixPath(name).parts
    unsafe = not parts or name.startswith("/") or ".." in parts or "\\" in name or ":" in parts[0] or "\0" in name
    return not unsafe
