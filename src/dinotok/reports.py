"""What a run over many pictures found: its report as JSON, and a sheet to look at."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image

from .folders import SHEET_NAME, FoundFile, read_pictures, write_png, writing
from .image_processor import ImageProcessor
from .models.quantizers import CodeCounter
from .pictures import SheetEntry, sheet, spread

_NULL_NOTES = {
    "psnr": "null is infinite: a picture was reconstructed exactly",
    "psnr_pooled": "null is infinite: all pictures were reconstructed exactly",
    "ssim": "null is not defined: a picture, or all of them, have a side below 11 pixels",
}


def write_report(
    path: Path,
    rows: list[dict[str, Any]],
    failures: list[dict[str, str]],
    summary: dict[str, float] | None,
    header: dict[str, Any],
    counters: Mapping[str, CodeCounter] | None = None,
) -> None:
    """Write what a run measured as JSON, where numbers that JSON cannot express are null.

    Args:
        path: Written whole or not at all.
        rows: Of `reconstruct_files`.
        failures: `file` and `reason`.
        summary: Of `ReconstructionMetrics.compute`; None if nothing was reconstructed.
        header: Model and settings; comes first.
        counters: Codes of all pictures, for a discrete tokenizer.
    """
    tables = [values for values in (summary, *rows) if values]
    nulls = {key for values in tables for key, value in values.items() if not _is_json(value)}
    report = {
        **header,
        "summary": None if summary is None else _json_values(summary),
        "notes": {key: note for key, note in _NULL_NOTES.items() if key in nulls},
        **({"codebooks": usage_of(counters)} if counters else {}),
        "failures": failures,
        "pictures": [_json_values(row) for row in rows],
    }
    with writing(path) as temporary:
        temporary.write_text(json.dumps(report, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def usage_of(counters: Mapping[str, CodeCounter]) -> dict[str, dict[str, float]]:
    """Return how every codebook was used; see `CodebookUsage`."""
    return {name: asdict(counter.compute()) for name, counter in counters.items()}


def write_reconstruction_sheet(
    rows: Sequence[dict[str, Any]],
    files: Sequence[FoundFile],
    output: Path,
    limit: int,
    image_size: int | None = None,
) -> Path:
    """Draw originals beside their reconstructions, for pictures spread over a run.

    Args:
        rows: Of `reconstruct_files`, not empty.
        files: What they were made from.
        output: Folder of the reconstructions and of the sheet.
        limit: Pictures on the sheet, at most.
        image_size: Of a model for one resolution, to which the originals were resized.

    Returns:
        The sheet's path.
    """
    chosen = {rows[index]["file"]: rows[index] for index in spread(len(rows), limit)}
    processor = ImageProcessor(1, image_size)
    entries = []
    for original in read_pictures([file for file in files if file.name in chosen], processor, _raise):
        row = chosen[original.name]
        pixels = torch.cat([original.values[None], processor.preprocess(output / row["output"])])
        entries.append(SheetEntry([row["file"], scores_text(row)], to_pictures(processor, pixels)))
    path = output / SHEET_NAME
    write_png(sheet(["original", "reconstruction"], entries, columns=1 if len(entries) <= 3 else 2), path)
    return path


def scores_text(row: dict[str, Any]) -> str:
    """Size, PSNR and SSIM of a picture, in words."""
    similarity = "not defined" if math.isnan(row["ssim"]) else f"{row['ssim']:.3f}"
    return f"{row['width']}x{row['height']}, PSNR {row['psnr']:.2f} dB, SSIM {similarity}"


def to_pictures(
    processor: ImageProcessor, pixels: torch.Tensor, sizes: Sequence[tuple[int, int]] | None = None
) -> list[Image.Image]:
    """Return pixels `(B, 3, H, W)` as pictures, cropped as `ImageProcessor.postprocess` does."""
    return cast("list[Image.Image]", processor.postprocess(pixels, "pil", sizes))


def _raise(name: str, error: Exception) -> None:
    raise error


def _is_json(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


def _json_values(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value if _is_json(value) else None for key, value in values.items()}
