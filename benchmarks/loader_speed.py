"""How fast training pictures are loaded, with nothing that uses them.

    python benchmarks/loader_speed.py [--batches 20 --workers 0 2]

Imagenette photographs (224 px JPEG) from parquet, one thread per process: the loader with each transform and number of
workers, map-style and streamed, beside plain Pillow: decoding alone, and decoding with a random resized crop and flip
by Pillow (bicubic). Workers are started and warm before the clock runs. Pictures per second of CPU time, without
workers only, do not depend on what else the machine does.
"""

import argparse
import io
import json
import math
import os
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import datasets
import numpy as np
import torch
from photographs import DATA
from PIL import Image, ImageOps

from dinotok.data import PictureLoader, PictureTransform, load_pictures

RESULTS = Path(__file__).parent / "results" / "loader_speed.json"
SIZE = 224
TRANSFORMS = {
    "centre crop": PictureTransform(SIZE, "center"),
    "random crop, flip": PictureTransform(SIZE, "random", flip=True),
    "random resized crop, flip": PictureTransform(SIZE, "random_resized", flip=True),
}


def pillow_only(data: bytes) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(data)).convert("RGB"))


def pillow_random_resized(data: bytes) -> np.ndarray:
    picture = Image.open(io.BytesIO(data)).convert("RGB")
    area = picture.width * picture.height * random.uniform(0.08, 1)
    ratio = math.exp(random.uniform(-math.log(4 / 3), math.log(4 / 3)))
    width = min(picture.width, round(math.sqrt(area * ratio)))
    height = min(picture.height, round(math.sqrt(area / ratio)))
    left, top = random.randint(0, picture.width - width), random.randint(0, picture.height - height)
    box = (left, top, left + width, top + height)
    picture = picture.resize((SIZE, SIZE), Image.Resampling.BICUBIC, box=box)
    return np.array(ImageOps.mirror(picture) if random.random() < 0.5 else picture)


def pillow_batches(
    dataset: datasets.Dataset, read: Callable[[bytes], np.ndarray], size: int
) -> Iterator[torch.Tensor]:
    while True:
        rows = np.random.default_rng(0).permutation(len(dataset))[:size]
        yield torch.stack([torch.from_numpy(read(data)).permute(2, 0, 1) for data in dataset[rows]["image"]])


def measure(what: str, workers: int, batches: Iterator, size: int, number: int) -> dict[str, str | int | None]:
    next(batches)
    start, cpu_start = time.perf_counter(), time.process_time()
    for _ in range(number):
        next(batches)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    per_cpu_second = None if workers else round(number * size / cpu_seconds)
    rate = round(number * size / seconds)
    return {"what": what, "workers": workers, "pictures/s": rate, "pictures/CPU s": per_cpu_second}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    arguments = parser.parse_args()
    folder, size, number = str(DATA / "imagenette"), arguments.batch_size, arguments.batches
    if not Path(folder).is_dir():
        raise SystemExit(f"{folder} is missing: set DINOTOK_DATA to the folder of the photographs.")
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    dataset, stream = load_pictures(folder), load_pictures(folder, streaming=True)

    rows = []
    for name, read in {"decoding alone": pillow_only, "random resized crop, flip": pillow_random_resized}.items():
        rows.append(measure(f"Pillow, {name}", 0, pillow_batches(dataset, read, size), size, number))
    cases = [(f"PictureLoader, {name}", dataset, transform) for name, transform in TRANSFORMS.items()]
    cases.append(("PictureLoader, random crop, flip, streamed", stream, TRANSFORMS["random crop, flip"]))
    for name, source, transform in cases:
        for workers in arguments.workers:
            batches = PictureLoader(source, transform, size, num_workers=workers).batches()
            rows.append(measure(name, workers, batches, size, number))
            batches.close()
    RESULTS.parent.mkdir(exist_ok=True)
    settings = {"size": SIZE, "batch_size": size, "batches": number, "cores": os.cpu_count()}
    RESULTS.write_text(json.dumps({"settings": settings, "rows": rows}, indent=1) + "\n")
    lines = [f"| {' | '.join(rows[0])} |", "|---|---|---|---|"]
    lines += [f"| {' | '.join('-' if value is None else str(value) for value in row.values())} |" for row in rows]
    text = "\n".join(["How fast training pictures are loaded, with nothing that uses them.", "", *lines]) + "\n"
    RESULTS.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
