"""Corpora of small real pictures, as parquet files and WebDataset archives."""

import io
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

CORRUPT = b"\xff\xd8 not a picture"


def encoded_pictures(count: int, seed: int = 0, side: int = 40) -> list[bytes]:
    """Return smooth random JPEG files of different sizes."""
    generator, pictures = np.random.default_rng(seed), []
    for index in range(count):
        colours = Image.fromarray(generator.integers(0, 256, (3, 4, 3), dtype=np.uint8))
        buffer = io.BytesIO()
        colours.resize((side + 8 * (index % 3), side), Image.Resampling.BICUBIC).save(buffer, "JPEG")
        pictures.append(buffer.getvalue())
    return pictures


def write_parquet(path: Path, pictures: Sequence[bytes | None], labels: Sequence[int] | None = None) -> Path:
    """Write pictures as `datasets` does: cells of bytes and path."""
    cells = [{"bytes": data, "path": f"{path.stem}/{row}.jpg"} for row, data in enumerate(pictures)]
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    columns = {"image": pa.array(cells, kind)}
    if labels is not None:
        columns["label"] = pa.array(labels, pa.int64())
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=3)
    return path


def write_archive(path: Path, pictures: Sequence[bytes | None], labels: Sequence[int | str] | None = None) -> Path:
    """Write pictures as WebDataset does: `s/000.jpg` and `s/000.cls` beside other files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for row, data in enumerate(pictures):
            files = {"jpg": data, "json": b"{}"}
            if labels is not None:
                files["cls"] = str(labels[row]).encode()
            for suffix, content in files.items():
                if content is not None:
                    member = tarfile.TarInfo(f"s/{row:03d}.{suffix}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
    return path


def tiny_corpus(folder: Path, shards: int = 4, pictures: int = 5) -> Path:
    """Write a corpus of shards of both kinds in turns, the last without samples; classes 0 and 1."""
    for number in range(shards):
        data = encoded_pictures(pictures if number < shards - 1 else 0, seed=number)
        labels = [row % 2 for row in range(len(data))]
        write = (write_parquet, write_archive)[number % 2]
        write(folder / f"{number:03d}{('.parquet', '.tar')[number % 2]}", data, labels)
    return folder


def files_of(folder: Path) -> dict[str, bytes]:
    """Return every file below a folder, by name: leftovers of killed workers too."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
