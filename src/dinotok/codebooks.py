"""What the codes of a codebook stand for: how often each is used, and the patches of pictures nearest to it."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from .folders import FoundFile, OnFailure, read_pictures, write_png, writing
from .image_processor import ImageProcessor
from .models.discrete import DiscreteTokenizer
from .models.quantizers import CodeCounter
from .models.tokenizer_model import TokenizerModel
from .transcoding import code_counters, encoded_batches, indices_of_batch

# Patches that are shown around each patch: sixteen pixels alone say little.
_CONTEXT = 1
_CELL = 96
_ROWS_PER_COLUMN = 16
_FONT_SIZE = 17
_MARGIN = 16


@dataclass(frozen=True, order=True)
class Place:
    """A patch of a picture.

    Attributes:
        picture: Number of the picture, in the order of the files.
        row: Of patches.
        column: Of patches.
    """

    picture: int
    row: int
    column: int


class NearestPatches:
    """Keeps the patches whose latents are nearest to each code of one codebook, at most one of a picture.

    Memory is 16 bytes for a patch, whatever the number of pictures.

    Args:
        codebook_size: K.
        count: Patches to keep for a code.
    """

    def __init__(self, codebook_size: int, count: int):
        self.distances = torch.full((codebook_size, count), torch.inf)
        self.places = torch.zeros((codebook_size, count, 3), dtype=torch.int32)

    def update(self, picture: int, indices: torch.Tensor, distances: torch.Tensor) -> None:
        """Add the patches of one picture.

        Args:
            picture: Its number.
            indices: `(h, w)`.
            distances: `(h, w)`: how far each latent is from its code.
        """
        columns = indices.shape[1]
        indices, distances = indices.flatten().cpu(), distances.flatten().float().cpu()
        order = distances.argsort(stable=True)
        order = order[indices[order].argsort(stable=True)]  # by code, the nearest first
        is_first = torch.ones(len(order), dtype=torch.bool)
        is_first[1:] = indices[order[1:]] != indices[order[:-1]]
        nearest = order[is_first]  # one patch of every code in the picture
        codes, distances = indices[nearest], distances[nearest]
        worst, slots = self.distances[codes].max(1)
        better = distances < worst
        where = (codes[better], slots[better])
        patches = nearest[better]
        self.distances[where] = distances[better]
        places = torch.stack([torch.full_like(patches, picture), patches // columns, patches % columns], 1)
        self.places[where] = places.int()

    def of(self, code: int) -> list[tuple[Place, float]]:
        """Return the patches of a code and how far each is from it, the nearest first."""
        distances, slots = self.distances[code].sort(stable=True)
        places = self.places[code, slots].tolist()
        found = zip(places, distances.tolist(), strict=True)
        return [(Place(*place), distance) for place, distance in found if distance != torch.inf]


@dataclass(frozen=True)
class CodebookStudy:
    """How the codebooks of a tokenizer are used by pictures.

    Attributes:
        num_pictures: How many could be encoded.
        counters: How often each code is used, for every codebook.
        nearest: The patches nearest to each code, for every codebook.
        fixed_grid: Rows and columns of every picture's tokens, of a model for one resolution. Its tokens stand for
            regions; what is shown for one is the cell of the grid from which it looks around.
    """

    num_pictures: int
    counters: dict[str, CodeCounter]
    nearest: dict[str, NearestPatches]
    fixed_grid: tuple[int, int] | None = None


def study_codebooks(
    model: TokenizerModel, files: Sequence[FoundFile], on_failure: OnFailure, batch_size: int = 8, patches: int = 8
) -> CodebookStudy:
    """Count the codes of pictures and find the patches nearest to each code, in one pass and bounded memory.

    Args:
        model: A discrete tokenizer.
        files: From `find_pictures`.
        on_failure: Called with the name and the error of a picture that cannot be read or encoded.
        batch_size: Consecutive pictures of one padded size that go through the model together, at most.
        patches: To keep for every code.

    Returns:
        What was found.

    Raises:
        ValueError: If the model has no codebooks.
    """
    if not isinstance(model, DiscreteTokenizer):
        raise ValueError(f"A {type(model).__name__} has no codebooks.")
    numbers = {file.name: number for number, file in enumerate(files)}
    nearest = {name: NearestPatches(size, patches) for name, size in model.codebook_sizes.items()}
    study = CodebookStudy(0, code_counters(model), nearest, model.fixed_grid)
    done = 0
    for batch, latents in encoded_batches(model, files, on_failure, batch_size):
        indices = indices_of_batch(model, latents)  # (B, codebooks, h, w)
        with torch.inference_mode():
            distances = model.code_distances(latents, indices)
        for codebook, name in enumerate(nearest):
            study.counters[name].update(indices[:, codebook])
            for picture, plane, plane_distances in zip(
                batch, indices[:, codebook], distances[:, codebook], strict=True
            ):
                nearest[name].update(numbers[picture.name], plane, plane_distances)
        done += len(batch)
    return replace(study, num_pictures=done)


def write_codebook_study(
    study: CodebookStudy,
    files: Sequence[FoundFile],
    processor: ImageProcessor,
    output: Path,
    on_failure: OnFailure,
    header: dict[str, Any],
    codes: int = 64,
) -> list[Path]:
    """Write `NAME-codes.png` and `NAME-usage.png` for every codebook, and `codebooks.json`.

    The first has a row for each of the most used codes: its index, how often it is used, and the patches nearest to
    it, framed, with what surrounds them. The second has the counts of all codes, sorted, on a logarithmic scale.

    Args:
        study: From `study_codebooks`.
        files: What it was made from; the pictures that are shown are read again.
        processor: Of the model.
        output: The folder.
        on_failure: Called with the name and the error of a picture that cannot be read any more.
        header: Model and settings; comes first in the JSON.
        codes: How many of the most used codes to show.

    Returns:
        The files.
    """
    report: dict[str, Any] = {**header, "num_pictures": study.num_pictures, "codebooks": {}}
    paths = []
    for name, counter in study.counters.items():
        counts, order = counter.counts.sort(descending=True, stable=True)
        used = int((counts[:codes] > 0).sum())
        rows = [(code, count, study.nearest[name].of(code)) for code, count in _pairs(order[:used], counts[:used])]
        crops = _cut(
            {place for *_, found in rows for place, _ in found}, files, processor, on_failure, study.fixed_grid
        )
        entries = [
            (code, count, [crops[place] for place, _ in found if place in crops]) for code, count, found in rows
        ]
        usage = counter.compute()
        title = (
            f"{name} codebook: {usage.codebook_size - usage.num_dead:,} of {usage.codebook_size:,} codes used, "
            f"perplexity {usage.perplexity:,.0f}, {usage.num_tokens:,} tokens of {study.num_pictures:,} pictures"
        )
        report["codebooks"][name] = {**asdict(usage), "codes": [_code_report(*row, files) for row in rows]}
        for part, picture in (("codes", draw_codes(title, entries)), ("usage", draw_usage(title, counts.tolist()))):
            paths.append(output / f"{name}-{part}.png")
            write_png(picture, paths[-1])
    paths.append(output / "codebooks.json")
    with writing(paths[-1]) as temporary:
        temporary.write_text(json.dumps(report, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    return paths


def draw_codes(title: str, entries: Sequence[tuple[int, int, Sequence[Image.Image]]]) -> Image.Image:
    """Draw patches in rows, one for each code, in columns of sixteen.

    Args:
        title: Above them.
        entries: Index of a code, its count, and its patches: pictures of one size.

    Returns:
        The picture.
    """
    font = ImageFont.load_default(size=_FONT_SIZE)
    most = max([len(patches) for *_, patches in entries], default=0)
    labels = [[f"{code}", f"{count:,} x"] for code, count, _ in entries]
    label_width = 12 + int(max([font.getlength(line) for lines in labels for line in lines], default=0))
    block = label_width + most * (_CELL + 2) + _MARGIN
    blocks, rows = -(-len(entries) // _ROWS_PER_COLUMN), min(len(entries), _ROWS_PER_COLUMN)
    width = max(blocks * block, int(font.getlength(title))) + 2 * _MARGIN
    canvas = Image.new("RGB", (width, rows * (_CELL + 2) + 3 * _MARGIN + _FONT_SIZE), "white")
    draw = ImageDraw.Draw(canvas)
    draw.text((_MARGIN, _MARGIN // 2), title, fill="black", font=font)
    for number, (_, _, patches) in enumerate(entries):
        left = _MARGIN + number // _ROWS_PER_COLUMN * block
        top = 2 * _MARGIN + _FONT_SIZE + number % _ROWS_PER_COLUMN * (_CELL + 2)
        for line, text in enumerate(labels[number]):
            draw.text((left, top + _CELL // 2 + (line - 1) * (_FONT_SIZE + 4)), text, fill="black", font=font)
        for index, patch in enumerate(patches):
            corner = (left + label_width + index * (_CELL + 2), top)
            canvas.paste(patch.resize((_CELL, _CELL), Image.Resampling.NEAREST), corner)
            _frame(draw, corner)
    return canvas


def draw_usage(title: str, counts: Sequence[int]) -> Image.Image:
    """Draw how often codes are used, the most used first, on a logarithmic scale, with the mean as a line.

    Args:
        title: Above it.
        counts: Of all codes, descending; the first is positive.

    Returns:
        The picture.
    """
    font = ImageFont.load_default(size=_FONT_SIZE)
    width, height, left, top = 960, 360, 96, 48
    canvas = Image.new(
        "RGB", (max(left + width, int(font.getlength(title))) + 2 * _MARGIN, top + height + 72), "white"
    )
    draw = ImageDraw.Draw(canvas)
    decades = len(str(counts[0]))
    low = np.log10(0.5)  # below 1, so that a code that is used once shows

    def to_y(count: float) -> float:
        return top + height * (decades - np.log10(count)) / (decades - low)

    draw.text((_MARGIN, _MARGIN // 2), title, fill="black", font=font)
    for exponent in range(decades + 1):
        y = to_y(10**exponent)
        draw.line([(left, y), (left + width, y)], fill="#dddddd")
        draw.text((left - 8, y), f"{10**exponent:,}", fill="black", font=font, anchor="rm")
    for x in range(width):
        count = counts[x * len(counts) // width]
        if count:
            draw.line([(left + 1 + x, to_y(count)), (left + 1 + x, top + height)], fill="#4477aa")
    mean = sum(counts) / len(counts)
    if mean > 0.5:
        draw.line([(left, to_y(mean)), (left + width, to_y(mean))], fill="#cc3311", width=2)
        draw.text((left + width - 4, to_y(mean) - 4), f"mean {mean:,.1f}", fill="#cc3311", font=font, anchor="rb")
    draw.rectangle([(left, top), (left + 1 + width, top + height)], outline="black")
    for quarter in range(5):
        label, anchor = f"{len(counts) * quarter // 4:,}", "rt" if quarter == 4 else "mt"
        draw.text((left + width * quarter // 4, top + height + 8), label, fill="black", font=font, anchor=anchor)
    caption = "codes, the most used first; how often each is used"
    draw.text((left + width // 2, top + height + 36), caption, fill="black", font=font, anchor="mt")
    return canvas


def _cut(
    places: Iterable[Place],
    files: Sequence[FoundFile],
    processor: ImageProcessor,
    on_failure: OnFailure,
    fixed_grid: tuple[int, int] | None = None,
) -> dict[Place, Image.Image]:
    """Read the pictures of these patches again, and cut the patches out with what surrounds them."""
    wanted: dict[str, list[Place]] = {}
    for place in sorted(places):
        wanted.setdefault(files[place.picture].name, []).append(place)
    crops = {}
    for picture in read_pictures([file for file in files if file.name in wanted], processor, on_failure):
        array = ((picture.values + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
        patch_size = processor.config["patch_size"]
        rows, columns = fixed_grid or (array.shape[0] // patch_size, array.shape[1] // patch_size)
        height, width = array.shape[0] / rows, array.shape[1] / columns
        margins = (round(_CONTEXT * height), round(_CONTEXT * width))
        array = np.pad(array, ((margins[0],) * 2, (margins[1],) * 2, (0, 0)), constant_values=230)
        for place in wanted[picture.name]:
            top, left = round(place.row * height), round(place.column * width)
            bottom, right = top + round(height) + 2 * margins[0], left + round(width) + 2 * margins[1]
            crops[place] = Image.fromarray(array[top:bottom, left:right])
    return crops


def _frame(draw: ImageDraw.ImageDraw, corner: tuple[int, int]) -> None:
    """Mark the patch in the middle of its surroundings, visibly on dark and on light."""
    inset = _CELL * _CONTEXT // (2 * _CONTEXT + 1)
    for offset, color in ((0, "black"), (1, "white")):
        first, last = inset - 1 - offset, _CELL - inset + offset
        draw.rectangle([(corner[0] + first, corner[1] + first), (corner[0] + last, corner[1] + last)], outline=color)


def _pairs(codes: torch.Tensor, counts: torch.Tensor) -> list[tuple[int, int]]:
    return list(zip(codes.tolist(), counts.tolist(), strict=True))


def _code_report(
    code: int, count: int, found: Sequence[tuple[Place, float]], files: Sequence[FoundFile]
) -> dict[str, Any]:
    patches = [
        {"file": files[place.picture].name, "row": place.row, "column": place.column, "distance": distance}
        for place, distance in found
    ]
    return {"code": code, "count": count, "patches": patches}
