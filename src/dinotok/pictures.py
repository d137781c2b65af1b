"""Pictures about pictures: latents as colours, and labelled sheets for a first look."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

_FONT_SIZE = 17
_LINE_HEIGHT = 24
_MARGIN = 16
_GAP = 8
_MIN_SIDE, _MAX_SIDE = 192, 448


@dataclass(frozen=True)
class SheetEntry:
    """One row of a sheet.

    Attributes:
        caption: Lines of text below the pictures; what is too long is cut in the middle.
        pictures: Side by side, of one size: one for every title.
    """

    caption: Sequence[str]
    pictures: Sequence[Image.Image]


def pca_colors(latents: torch.Tensor) -> np.ndarray:
    """Show latents as colours: their first three principal components as red, green and blue.

    The components are those of the given latents, so colours agree within a batch but not between calls. Each is
    scaled from its 1st to 99th percentile; one that does not vary is gray.

    Args:
        latents: `(C, h, w)` or `(B, C, h, w)`, floats.

    Returns:
        uint8 of shape `(h, w, 3)` or `(B, h, w, 3)`.

    Raises:
        ValueError: If the shape is another or a value is NaN or infinite.
    """
    if latents.ndim not in (3, 4) or latents.numel() == 0:
        raise ValueError(f"latents have shape {tuple(latents.shape)}; expected (C, h, w) or (B, C, h, w), none zero.")
    if not latents.isfinite().all():
        raise ValueError("latents contain NaN or infinite values.")
    grid = latents.detach().to("cpu", torch.float64).movedim(-3, -1)  # (..., h, w, C)
    rows = grid.flatten(0, -2)  # (N, C)
    rows = rows - rows.mean(dim=0)
    directions = torch.linalg.eigh(rows.T @ rows).eigenvectors.flip(1)[:, :3]  # (C, 3), largest first
    # The sign of an eigenvector is arbitrary: its largest entry is made positive.
    largest = directions.gather(0, directions.abs().argmax(dim=0, keepdim=True))
    components = rows @ (directions * largest.sign())  # (N, 3)
    low, high = torch.quantile(components[_sample(len(components))], torch.tensor([0.01, 0.99]).double(), dim=0)
    spread = high - low
    varies = spread > 1e-6 * max(float(spread.max()), 1e-12)
    unit = torch.where(varies, (components - low) / spread.clamp(min=1e-30), torch.full_like(components, 0.5))
    unit = torch.nn.functional.pad(unit, (0, 3 - unit.shape[1]), value=0.5)  # fewer than three channels
    colors = (unit.clamp(0, 1) * 255).round().to(torch.uint8)
    return colors.reshape(*grid.shape[:-1], 3).numpy()


def enlarge(colors: np.ndarray, factor: int, size: tuple[int, int]) -> Image.Image:
    """Repeat every colour of a grid over a patch, and crop what padding added.

    Args:
        colors: uint8 `(h, w, 3)`, such as `pca_colors` returns.
        factor: Patch size in pixels.
        size: `(height, width)` of the result.

    Returns:
        The picture.
    """
    height, width = size
    return Image.fromarray(colors.repeat(factor, axis=0).repeat(factor, axis=1)[:height, :width])


def sheet(titles: Sequence[str], entries: Sequence[SheetEntry], columns: int = 1) -> Image.Image:
    """Lay pictures out in labelled rows.

    Large pictures are reduced to 448 pixels on their long side, small ones enlarged by a whole factor to at least 192.

    Args:
        titles: One for every picture of an entry.
        entries: At least one.
        columns: Entries side by side.

    Returns:
        The sheet.

    Raises:
        ValueError: If there is no entry, or one has another number of pictures than there are titles.
    """
    if not entries or any(len(entry.pictures) != len(titles) for entry in entries):
        counts = [len(entry.pictures) for entry in entries]
        raise ValueError(f"Entries have {counts} pictures; expected at least one entry, {len(titles)} pictures each.")
    font = ImageFont.load_default(size=_FONT_SIZE)
    entries = [SheetEntry(entry.caption, [_fit(picture) for picture in entry.pictures]) for entry in entries]
    cell = max([p.width for e in entries for p in e.pictures] + [int(font.getlength(title)) + 1 for title in titles])
    block = len(titles) * cell + (len(titles) - 1) * _GAP
    columns = min(columns, len(entries))
    rows = [entries[start : start + columns] for start in range(0, len(entries), columns)]
    heights = [max(_height(entry) for entry in row) for row in rows]
    size = (columns * block + (columns + 1) * _MARGIN, sum(heights) + _LINE_HEIGHT + (len(rows) + 1) * _MARGIN)
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    for column in range(columns):
        for index, title in enumerate(titles):
            left = _MARGIN + column * (block + _MARGIN) + index * (cell + _GAP)
            draw.text((left, _MARGIN // 2), title, fill="black", font=font)
    top = _LINE_HEIGHT + _MARGIN
    for row, height in zip(rows, heights, strict=True):
        for column, entry in enumerate(row):
            _draw_entry(canvas, entry, (_MARGIN + column * (block + _MARGIN), top), cell, block)
        top += height + _MARGIN
    return canvas


def spread(count: int, limit: int) -> list[int]:
    """Choose up to `limit` of `count` indices, evenly from the first to the last."""
    if count <= limit:
        return list(range(count))
    return [i * (count - 1) // max(limit - 1, 1) for i in range(limit)]


def _sample(count: int, limit: int = 1_000_000) -> slice:
    """Every so many rows: `torch.quantile` takes at most 16 million values."""
    return slice(None, None, -(-count // limit))


def _fit(picture: Image.Image) -> Image.Image:
    side = max(picture.size)
    picture = picture.convert("RGB")
    if side > _MAX_SIDE:
        width, height = (max(round(length * _MAX_SIDE / side), 1) for length in picture.size)
        return picture.resize((width, height), Image.Resampling.LANCZOS)
    factor = -(-_MIN_SIDE // side) if side < _MIN_SIDE else 1
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)


def _height(entry: SheetEntry) -> int:
    return max(picture.height for picture in entry.pictures) + _LINE_HEIGHT * len(entry.caption)


def _draw_entry(canvas: Image.Image, entry: SheetEntry, corner: tuple[int, int], cell: int, block: int) -> None:
    left, top = corner
    for index, picture in enumerate(entry.pictures):
        canvas.paste(picture, (left + index * (cell + _GAP), top))
    top += max(picture.height for picture in entry.pictures)
    font = ImageFont.load_default(size=_FONT_SIZE)
    draw = ImageDraw.Draw(canvas)
    for line in entry.caption:
        draw.text((left, top + 2), _shorten(line, font, block), fill="black", font=font)
        top += _LINE_HEIGHT


def _shorten(line: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """Cut the middle out of a line that is too long."""
    line = " ".join(line.split())
    kept, shortened = len(line), line
    while font.getlength(shortened) > width and kept > 2:
        kept -= 1
        shortened = f"{line[: kept // 2]}...{line[len(line) - (kept - kept // 2) :]}"
    return shortened
