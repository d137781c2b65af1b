"""Shards of photographs for the corpus benchmark: Imagenette if it is at hand, else crops of the package's own."""

import io
import random
import tarfile
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

import pyarrow.parquet as pq
from photographs import DATA
from PIL import Image

_SIDE = 256


def photograph_crops(count: int) -> tuple[str, list[bytes]]:
    """Return what they are, and JPEG files."""
    path = DATA / "imagenette" / "imagenette_224_train.parquet"
    if path.is_file():
        cells = pq.read_table(path, columns=["image"]).column("image").slice(0, count).to_pylist()
        pictures = [cell["bytes"] if isinstance(cell, dict) else cell for cell in cells]
        if len(pictures) == count:
            return "Imagenette at 224 pixels", pictures
    folder = resources.files("dinotok") / "assets" / "photographs"
    with resources.as_file(folder) as files:
        photographs = [Image.open(path).convert("RGB") for path in sorted(files.glob("*.jpg"))]
    generator, pictures = random.Random(0), []
    for index in range(count):
        photograph = photographs[index % len(photographs)]
        left, top = (generator.randint(0, side - _SIDE) for side in photograph.size)
        buffer = io.BytesIO()
        photograph.crop((left, top, left + _SIDE, top + _SIDE)).save(buffer, "JPEG", quality=90)
        pictures.append(buffer.getvalue())
    return f"crops of {_SIDE} pixels of the package's photographs", pictures


def write_corpus(folder: Path, pictures: Sequence[bytes], shard_pictures: int, corrupt_every: int = 0) -> Path:
    """Write WebDataset shards; cut off every so many-th picture in the middle."""
    folder.mkdir(parents=True)
    for start in range(0, len(pictures), shard_pictures):
        with tarfile.open(folder / f"{start // shard_pictures:05d}.tar", "w") as archive:
            for number, data in enumerate(pictures[start : start + shard_pictures], start=start):
                if corrupt_every and number % corrupt_every == corrupt_every - 1:
                    data = data[: len(data) // 2]
                member = tarfile.TarInfo(f"{number:08d}.jpg")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    return folder
