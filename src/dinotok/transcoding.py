"""Pictures to reconstructions, to files of latents, and back: the work of the commands, streamed."""

import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image
from tqdm import tqdm

from .folders import (
    SHEET_NAME,
    FoundFile,
    OnFailure,
    Picture,
    check_output,
    equal_batches,
    png_names,
    read_pictures,
    write_png,
    writing,
)
from .hub import TokenizerFiles, find_tokenizer
from .image_processor import ImageProcessor
from .latent_files import LatentsOrigin, Shard, open_shard, read_latents, write_shards
from .metrics import ReconstructionMetrics
from .models.tokenizer_model import TokenizerModel
from .pictures import SheetEntry, sheet, spread

_NULL_NOTES = {
    "psnr": "null is infinite: a picture was reconstructed exactly",
    "psnr_pooled": "null is infinite: all pictures were reconstructed exactly",
    "ssim": "null is not defined: a picture, or all of them, have a side below 11 pixels",
}


def reconstruct_files(
    model: TokenizerModel,
    files: Sequence[FoundFile],
    output: Path,
    metrics: ReconstructionMetrics,
    on_failure: OnFailure,
    batch_size: int = 8,
) -> Iterator[dict[str, Any]]:
    """Encode and decode pictures, and write what comes out as PNG files.

    Args:
        model: Any tokenizer.
        files: From `find_files`.
        output: Folder of the results, named as `png_names` says.
        metrics: Sums all pictures up.
        on_failure: Called with the name and the error of a picture that cannot be read or reconstructed.
        batch_size: Consecutive pictures of one padded size that go through the model together, at most.

    Yields:
        For every picture: `file`, `output`, `height`, `width`, `psnr`, `ssim` and `mean_squared_error`.

    Raises:
        ValueError: If the folder is a file, or a result would overwrite one of `files`.
        OSError: If a result cannot be written.
    """
    check_output(output, files)
    names = _output_names(files)
    processor = ImageProcessor.from_model(model)
    pictures = read_pictures(_progress(files, "pictures"), processor, on_failure)
    for batch in equal_batches(pictures, batch_size):
        samples = decode_batch(model, encode_batch(model, _stack(batch)))
        for picture, sample in _finite(batch, samples, on_failure):
            height, width = picture.size
            (scores,) = metrics.update(sample[None, :, :height, :width], picture.values[None, :, :height, :width])
            _write_sample(processor, sample, picture, output / names[picture.name])
            yield {"file": picture.name, "output": names[picture.name], "height": height, "width": width, **scores}


def encode_files(
    model: TokenizerModel,
    files: Sequence[FoundFile],
    output: Path,
    origin: LatentsOrigin,
    on_failure: OnFailure,
    batch_size: int = 8,
    shard_size: int = 256,
    dtype: torch.dtype = torch.float32,
) -> Iterator[Path]:
    """Write the latents of pictures to safetensors shards.

    Args:
        model: Any tokenizer.
        files: From `find_files`.
        output: Folder of the shards; must not have any yet.
        origin: What the shards say about the model.
        on_failure: Called with the name and the error of a picture that cannot be read or encoded.
        batch_size: As in `reconstruct_files`.
        shard_size: Pictures per shard, at most.
        dtype: To store the latents in.

    Yields:
        Every shard, once it is written.

    Raises:
        ValueError: If the folder has shards already.
        OSError: If a shard cannot be written.
    """
    processor = ImageProcessor.from_model(model)
    pictures = read_pictures(_progress(files, "pictures"), processor, on_failure)
    yield from write_shards(
        _encoded(model, pictures, batch_size, dtype, on_failure), output, origin, shard_size, dtype
    )


def decode_files(
    model: TokenizerModel, shards: Sequence[Shard], output: Path, on_failure: OnFailure, batch_size: int = 8
) -> Iterator[Path]:
    """Write the pictures of shards as PNG files, in their original sizes.

    Args:
        model: The tokenizer that made the latents.
        shards: From `open_shards`.
        output: Folder of the results, named as `png_names` says.
        on_failure: Called with the name and the error of a shard or picture that cannot be decoded.
        batch_size: As in `reconstruct_files`.

    Yields:
        Every file, once it is written.

    Raises:
        OSError: If a result cannot be written.
    """
    processor = ImageProcessor.from_model(model)
    for batch in equal_batches(_read_shards(model, shards, on_failure), batch_size):
        samples = decode_batch(model, _stack(batch))
        for picture, sample in _finite(batch, samples, on_failure):
            _write_sample(processor, sample, picture, output / picture.name)
            yield output / picture.name


def open_shards(files: Iterable[FoundFile], on_failure: OnFailure) -> list[Shard]:
    """Open all shards that can be opened.

    Args:
        files: From `find_files`.
        on_failure: Called with the name and the error of every other file.

    Returns:
        The shards, in the order of `files`.

    Raises:
        ValueError: If they belong to more than one model.
    """
    shards = []
    for file in files:
        try:
            shards.append(open_shard(file.path))
        except (ValueError, OSError) as error:
            on_failure(file.name, error)
    origins = {shard.origin.digest: shard for shard in reversed(shards)}
    if len(origins) > 1:
        found = ", ".join(f"{s.path.name!r} by {_describe(s.origin)}" for s in origins.values())
        raise ValueError(f"The latents were made by {len(origins)} models ({found}): decode them one by one.")
    return shards


def find_tokenizer_of(origin: LatentsOrigin, model: str | None = None, revision: str | None = None) -> TokenizerFiles:
    """Find the tokenizer that made latents, where they say it is or where it is now.

    Args:
        origin: Of the shards.
        model: Where to look instead.
        revision: Which one of that repository; by default the one that made the latents.

    Returns:
        The tokenizer; `check_same_model` tells whether it is the right one.

    Raises:
        OSError: If it cannot be found.
        ValueError: If what is there is no tokenizer.
    """
    on_hub = not origin.revision.startswith("sha256:")
    if revision is None and on_hub and model in (None, origin.model) and not os.path.isdir(origin.model):
        revision = origin.revision
    try:
        return find_tokenizer(origin.model if model is None else model, revision)
    except OSError as error:
        if model is not None:
            raise
        raise OSError(f"{error} The latents name it as their model; if it has moved, pass --model.") from error


def check_same_model(origin: LatentsOrigin, source: TokenizerFiles) -> None:
    """Compare the model that made latents with the one that is to decode them.

    Args:
        origin: Of the shards.
        source: The model at hand.

    Raises:
        ValueError: If their files differ; it names both.
    """
    if origin.digest != source.digest:
        raise ValueError(
            f"The latents were made by {_describe(origin)}, but {source.name!r} is {source.class_name} at revision "
            f"{source.revision}: pictures would come out wrong. Pass the right --model, or "
            "--allow-revision-mismatch to decode nevertheless."
        )


@torch.inference_mode()
def encode_batch(model: TokenizerModel, pixels: torch.Tensor) -> torch.Tensor:
    """Return the latents `(B, C, h, w)` of pixels `(B, 3, H, W)`, on the model's device."""
    return model.encode(pixels.to(model.device)).latent


@torch.inference_mode()
def decode_batch(model: TokenizerModel, latents: torch.Tensor) -> torch.Tensor:
    """Return the pixels `(B, 3, H, W)` of latents `(B, C, h, w)`, float32 on the CPU."""
    return model.decode(latents.to(model.device)).sample.float().cpu()


def write_report(
    path: Path,
    rows: list[dict[str, Any]],
    failures: list[dict[str, str]],
    summary: dict[str, float] | None,
    header: dict[str, Any],
) -> None:
    """Write what a run measured as JSON, where numbers that JSON cannot express are null.

    Args:
        path: Written whole or not at all.
        rows: Of `reconstruct_files`.
        failures: `file` and `reason`.
        summary: Of `ReconstructionMetrics.compute`; None if nothing was reconstructed.
        header: Model and settings; comes first.
    """
    tables = [values for values in (summary, *rows) if values]
    nulls = {key for values in tables for key, value in values.items() if not _is_json(value)}
    report = {
        **header,
        "summary": None if summary is None else _json_values(summary),
        "notes": {key: note for key, note in _NULL_NOTES.items() if key in nulls},
        "failures": failures,
        "pictures": [_json_values(row) for row in rows],
    }
    with writing(path) as temporary:
        temporary.write_text(json.dumps(report, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def write_reconstruction_sheet(
    rows: Sequence[dict[str, Any]], files: Sequence[FoundFile], output: Path, limit: int
) -> Path:
    """Draw originals beside their reconstructions, for pictures spread over a run.

    Args:
        rows: Of `reconstruct_files`, not empty.
        files: What they were made from.
        output: Folder of the reconstructions and of the sheet.
        limit: Pictures on the sheet, at most.

    Returns:
        The sheet's path.
    """
    paths = {file.name: file.path for file in files}
    processor = ImageProcessor(patch_size=1)
    entries = []
    for index in spread(len(rows), limit):
        row = rows[index]
        pair = to_pictures(processor, processor.preprocess([paths[row["file"]], output / row["output"]]))
        entries.append(SheetEntry([row["file"], scores_text(row)], pair))
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


def _output_names(files: Sequence[FoundFile]) -> dict[str, str]:
    names = [file.name for file in files]
    return dict(zip(names, png_names(names), strict=True))


def _progress(values, unit: str):
    """A progress bar on stderr, if that is a terminal."""
    return tqdm(values, unit=f" {unit}", disable=None)


def _stack(batch: list[Picture]) -> torch.Tensor:
    return torch.stack([picture.values for picture in batch])


def _finite(
    batch: list[Picture], results: torch.Tensor, on_failure: OnFailure
) -> Iterator[tuple[Picture, torch.Tensor]]:
    """Pair pictures with what the model made of them, and report the ones it could not handle."""
    for picture, result in zip(batch, results, strict=True):
        if result.isfinite().all():
            yield picture, result
        else:
            message = f"The model's output has NaN or infinite values (it runs in {result.dtype})."
            on_failure(picture.name, ValueError(message))


def _encoded(
    model: TokenizerModel, pictures: Iterable[Picture], batch_size: int, dtype: torch.dtype, on_failure: OnFailure
) -> Iterator[Picture]:
    for batch in equal_batches(pictures, batch_size):
        latents = encode_batch(model, _stack(batch)).to(dtype)  # float16 may overflow
        for picture, values in _finite(batch, latents, on_failure):
            yield Picture(picture.name, picture.size, values)


def _read_shards(model: TokenizerModel, shards: Sequence[Shard], on_failure: OnFailure) -> Iterator[Picture]:
    """All latents in order, named by the PNG files they become: pictures of several shards may share a name."""
    names = png_names([name for shard in shards for name in shard.sizes])
    first = 0
    for shard in _progress(shards, "shards"):
        try:
            for name, picture in zip(names[first:], read_latents(shard), strict=False):
                _check_latents(model, shard, picture)
                yield Picture(name, picture.size, picture.values.float())
        except (ValueError, OSError) as error:
            on_failure(shard.path.name, error)
        first += len(shard.sizes)


def _check_latents(model: TokenizerModel, shard: Shard, picture: Picture) -> None:
    expected = (model.latent_channels, model.config["patch_size"])
    found = (picture.values.shape[0], shard.origin.patch_size)
    if found != expected:
        raise ValueError(
            f"{picture.name!r} has {found[0]} latent channels and patch_size={found[1]}; "
            f"the model has {expected[0]} and {expected[1]}."
        )


def _write_sample(processor: ImageProcessor, sample: torch.Tensor, picture: Picture, path: Path) -> None:
    (image,) = to_pictures(processor, sample[None], [picture.size])
    write_png(image, path)


def _describe(origin: LatentsOrigin) -> str:
    return f"{origin.model!r}, {origin.class_name} at revision {origin.revision}"


def _is_json(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


def _json_values(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value if _is_json(value) else None for key, value in values.items()}
