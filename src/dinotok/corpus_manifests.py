"""What the folder of an encoded corpus says about itself: its shards, a manifest for each file, and their sum."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from . import __version__
from .caches import DESCRIPTION_NAME, Description, begin_cache
from .shards import check_has_no_shards

INPUTS_NAME, SUMMARY_NAME, MANIFESTS = "corpus.json", "summary.json", "manifests"
FORMAT, FORMAT_VERSION = "dinotok-corpus", 1
_STAGING = ".staging"
_MAX_LISTED = 1000  # failures in the summary; the manifests have all


@contextmanager
def staging(output: Path) -> Iterator[Path]:
    """Give a folder for unfinished files that no other worker has, on whatever machine; it goes with the block."""
    parent = output / _STAGING
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=parent, ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def file_identity(path: Path) -> dict[str, Any]:
    """Return size and SHA-256 of a file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def versions() -> dict[str, str]:
    """Return the versions that the bytes of an output file may depend on."""
    return {"dinotok": __version__, "torch": torch.__version__, "pyarrow": pa.__version__}


def begin_corpus(output: Path, inputs: dict[str, Any]) -> None:
    """Write what a corpus is made from, or compare what is there.

    Workers may begin at once: each writes the same, as a file of its own that is renamed, and then compares.

    Args:
        output: Made if it is missing.
        inputs: `shards`, a list of `[name, bytes]`, and what else decides the samples.

    Raises:
        ValueError: If the folder is of other shards, or has files of something else.
    """
    inputs = {"format": FORMAT, "format_version": FORMAT_VERSION, **inputs}
    if not (output / INPUTS_NAME).is_file():
        if (output / DESCRIPTION_NAME).exists():
            raise ValueError(f"{str(output)!r} is a cache, but not of a corpus: choose another folder.")
        check_has_no_shards(output)
        with staging(output) as folder:
            _write_json(folder / INPUTS_NAME, inputs)
            os.replace(folder / INPUTS_NAME, output / INPUTS_NAME)
    _check_inputs(output, read_json(output / INPUTS_NAME), inputs)


def begin_files(output: Path, description: Description) -> None:
    """Write what the files of a corpus are of, or compare what is there; after `begin_corpus`, and likewise.

    Raises:
        ValueError: If the folder holds files of another model or other settings.
    """
    if not (output / DESCRIPTION_NAME).is_file():
        with staging(output) as folder:
            begin_cache(folder, description)
            os.replace(folder / DESCRIPTION_NAME, output / DESCRIPTION_NAME)
    begin_cache(output, description)


def publish(made: Path, manifest: dict[str, Any], output: Path) -> None:
    """Move a file of a staging folder to where it belongs, after its manifest: what is there has one.

    Args:
        made: The file, complete.
        manifest: About it; written in the same folder first.
        output: Of the corpus.
    """
    target = manifest_path(output, made.name)
    target.parent.mkdir(exist_ok=True)
    draft = made.with_suffix(".json")
    _write_json(draft, manifest)
    _sync(made)
    os.replace(draft, target)
    os.replace(made, output / made.name)


def manifest_path(output: Path, name: str) -> Path:
    """Return the manifest of a file by its name."""
    return output / MANIFESTS / f"{Path(name).stem}.json"


def is_done(path: Path, verify: bool = False) -> bool:
    """Tell whether a file of a corpus is there, with its manifest.

    Args:
        path: Of the file.
        verify: Also compare its content with the manifest; else a file that is there counts.
    """
    manifest = manifest_path(path.parent, path.name)
    if not (path.is_file() and manifest.is_file()):
        return False
    return not verify or file_identity(path) == read_json(manifest)["output"]


def summarize(output: Path, names: Sequence[str]) -> dict[str, Any] | None:
    """Sum all manifests up and write `summary.json`; of unfinished files nothing is left then.

    Args:
        output: Of the corpus.
        names: Of all its files, in their order.

    Returns:
        The summary; None if files are missing.
    """
    manifests = output / MANIFESTS
    present, told = (set(os.listdir(folder)) if folder.is_dir() else set() for folder in (output, manifests))
    if not all(name in present and manifest_path(output, name).name in told for name in names):
        return None
    summary: dict[str, Any] = {"format": FORMAT, "format_version": FORMAT_VERSION, "files": len(names)}
    counts = {"samples": 0, "pictures": 0, "failed": 0, "input_bytes": 0, "output_bytes": 0}
    digests = {"input": hashlib.sha256(), "output": hashlib.sha256()}
    failures: list[dict[str, Any]] = []
    for name in names:
        manifest = read_json(manifest_path(output, name))
        for key in ("samples", "pictures", "failed"):
            counts[key] += manifest[key]
        for side, digest in digests.items():
            counts[f"{side}_bytes"] += manifest[side]["bytes"]
            digest.update(bytes.fromhex(manifest[side]["sha256"]))
        room = _MAX_LISTED - len(failures)
        failures += [{"shard": manifest["shard"], **failure} for failure in manifest["failures"][:room]]
        summary |= {key: manifest[key] for key in ("model", "model_revision", "model_digest", "class_name")}
    summary |= counts | {f"{side}_digest": f"sha256:{digest.hexdigest()}" for side, digest in digests.items()}
    summary |= {"failures": failures}
    # Not in the staging folder, which another worker that sees all files may be removing.
    with tempfile.TemporaryDirectory(dir=output, prefix=".summary-") as folder:
        draft = Path(folder) / SUMMARY_NAME
        _write_json(draft, summary)
        os.replace(draft, output / SUMMARY_NAME)
    shutil.rmtree(output / _STAGING, ignore_errors=True)
    return summary


def read_json(path: Path) -> dict[str, Any]:
    """Read a file of this module.

    Raises:
        ValueError: If it is damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is damaged ({error}): delete it, and it is made again.") from error


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    _sync(path)


def _sync(path: Path) -> None:
    """Have a file on the disk before it gets its name: else a power cut leaves the name of an empty one."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _check_inputs(output: Path, there: dict[str, Any], wanted: dict[str, Any]) -> None:
    old, new = there.get("shards", []), wanted["shards"]
    if old != new:
        changed = next((pair for pair in zip(old, new, strict=False) if pair[0] != pair[1]), None)
        what = f"of {len(old)} shards, not {len(new)}"
        if changed:
            (old_name, old_bytes), (new_name, new_bytes) = changed
            what = f"with {old_name!r} of {old_bytes} bytes where now {new_name!r} has {new_bytes}"
        raise ValueError(f"{str(output)!r} is made from another corpus, {what}: choose another folder.")
    for name in wanted:
        if there.get(name) != wanted[name]:
            raise ValueError(
                f"{str(output)!r} is made with {name}={there.get(name)!r}, not {wanted[name]!r}: go on with the same "
                "options, or choose another folder."
            )
