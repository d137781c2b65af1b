"""The real photographs the benchmarks run on: Imagenette at 224 px, read from the folder DINOTOK_DATA."""

import io
import os
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image

DATA = Path(os.environ.get("DINOTOK_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
ENCODER = DATA / "encoder-vit-tiny"


def load_photographs(split: str, count: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return photographs, evenly spread over the file, and their labels.

    Args:
        split: "train" (6,000) or "val" (2,000).
        count: How many; all by default.

    Returns:
        uint8 `(N, 3, 224, 224)` and int64 `(N,)`.
    """
    path = DATA / "imagenette" / f"imagenette_224_{split}.parquet"
    if not path.is_file():
        raise SystemExit(f"{path} is missing: set DINOTOK_DATA to the folder of the photographs.")
    table = pq.read_table(path, columns=["image", "label"])
    chosen = np.linspace(0, table.num_rows - 1, count or table.num_rows).round().astype(int)
    table = table.take(chosen)
    encoded = (row["bytes"] if isinstance(row, dict) else row for row in table.column("image").to_pylist())
    pictures = [np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) for data in encoded]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous(), torch.tensor(
        table.column("label").to_pylist()
    )


def to_pixels(pictures: torch.Tensor) -> torch.Tensor:
    """uint8 to float pixels in [-1, 1]."""
    return pictures.float() / 127.5 - 1
