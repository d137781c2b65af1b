"""Pictures to reconstructions, to files of latents, and back: the work of the commands, streamed."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from tqdm import tqdm

from .folders import (
    TABLE_SUFFIX,
    FoundFile,
    OnFailure,
    Picture,
    check_output,
    equal_batches,
    png_names,
    read_pictures,
    write_png,
)
from .hub import TokenizerFiles, find_tokenizer
from .image_processor import ImageProcessor
from .latent_files import open_shard, read_latents, write_shards
from .metrics import ReconstructionMetrics
from .models.discrete import DiscreteTokenizer
from .models.quantizers import CodeCounter
from .models.tokenizer_model import TokenizerModel
from .reports import to_pictures
from .shards import ModelOrigin, Shard
from .token_files import TokenShard, open_token_shard, read_tokens, write_token_shards


def reconstruct_files(
    model: TokenizerModel,
    files: Sequence[FoundFile],
    output: Path,
    metrics: ReconstructionMetrics,
    on_failure: OnFailure,
    batch_size: int = 8,
    counters: Mapping[str, CodeCounter] | None = None,
) -> Iterator[dict[str, Any]]:
    """Encode and decode pictures, and write what comes out as PNG files.

    Args:
        model: Any tokenizer; with a discrete one, pictures go through their codes.
        files: From `find_pictures`.
        output: Folder of the results, named as `png_names` says.
        metrics: Sums all pictures up.
        on_failure: Called with the name and the error of a picture that cannot be read or reconstructed.
        batch_size: Consecutive pictures of one padded size that go through the model together, at most.
        counters: From `code_counters`: count the codes of all pictures.

    Yields:
        For every picture: `file`, `output`, `height`, `width`, `psnr`, `ssim` and `mean_squared_error`.

    Raises:
        ValueError: If the folder is a file, or a result would overwrite one of `files`.
        OSError: If a result cannot be written.
    """
    check_output(output, files)
    names = _output_names(files)
    processor = ImageProcessor.from_model(model)
    for batch, latents in encoded_batches(model, files, on_failure, batch_size):
        indices, latents = quantize_batch(model, latents)
        if indices is not None:
            for counter, plane in zip((counters or {}).values(), indices.unbind(1), strict=False):
                counter.update(plane)
        for picture, sample in _finite(batch, decode_batch(model, latents), on_failure):
            height, width = picture.size
            (scores,) = metrics.update(sample[None, :, :height, :width], picture.values[None, :, :height, :width])
            _write_sample(processor, sample, picture, output / names[picture.name])
            yield {"file": picture.name, "output": names[picture.name], "height": height, "width": width, **scores}


def encode_files(
    model: TokenizerModel,
    files: Sequence[FoundFile],
    output: Path,
    origin: ModelOrigin,
    on_failure: OnFailure,
    batch_size: int = 8,
    shard_size: int = 256,
    dtype: torch.dtype = torch.float32,
) -> Iterator[Path]:
    """Write the latents of pictures to safetensors shards.

    Args:
        model: Any tokenizer.
        files: From `find_pictures`.
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
    batches = encoded_batches(model, files, on_failure, batch_size)
    stored = (_finite(batch, latents.to(dtype), on_failure) for batch, latents in batches)  # float16 may overflow
    pictures = (replace(picture, values=values) for pairs in stored for picture, values in pairs)
    yield from write_shards(pictures, output, origin, shard_size, dtype)


def encode_files_to_tokens(
    model: TokenizerModel,
    files: Sequence[FoundFile],
    output: Path,
    origin: ModelOrigin,
    on_failure: OnFailure,
    batch_size: int = 8,
    shard_size: int = 4096,
) -> Iterator[Path]:
    """Write the tokens of pictures to parquet shards.

    Args:
        model: A discrete tokenizer.
        files: As in `encode_files`, and so are the others.
        output: As in `encode_files`.
        origin: As in `encode_files`.
        on_failure: As in `encode_files`.
        batch_size: As in `encode_files`.
        shard_size: Pictures per shard, at most.

    Yields:
        Every shard, once it is written.

    Raises:
        ValueError: If the model has no codebooks, or the folder has shards already.
        OSError: If a shard cannot be written.
    """
    if not isinstance(model, DiscreteTokenizer):
        raise ValueError(f"A {type(model).__name__} has no codebooks, so there are no tokens: encode to latents.")
    batches = encoded_batches(model, files, on_failure, batch_size)
    tokens = ((batch, indices_of_batch(model, latents)) for batch, latents in batches)
    pictures = (replace(p, values=indices) for batch, rows in tokens for p, indices in zip(batch, rows, strict=True))
    yield from write_token_shards(pictures, output, origin, model.codebook_sizes, shard_size)


def decode_files(
    model: TokenizerModel, shards: Sequence[Shard], output: Path, on_failure: OnFailure, batch_size: int = 8
) -> Iterator[Path]:
    """Write the pictures of shards as PNG files, in their original sizes.

    Args:
        model: The tokenizer that made what is in the shards.
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
        values = _stack(batch)
        latents = values if values.is_floating_point() else _latents_of(model, values)
        for picture, sample in _finite(batch, decode_batch(model, latents), on_failure):
            _write_sample(processor, sample, picture, output / picture.name)
            yield output / picture.name


def open_shards(files: Iterable[FoundFile], on_failure: OnFailure) -> list[Shard]:
    """Open all shards, of latents or tokens, that can be opened.

    Args:
        files: From `find_files`.
        on_failure: Called with the name and the error of every other file.

    Returns:
        The shards, in the order of `files`.

    Raises:
        ValueError: If they belong to more than one model.
    """
    shards: list[Shard] = []
    for file in files:
        try:
            shards.append(open_shard_file(file.path))
        except (ValueError, OSError) as error:
            on_failure(file.name, error)
    origins = {shard.origin.digest: shard for shard in reversed(shards)}
    if len(origins) > 1:
        found = ", ".join(f"{s.path.name!r} by {_describe(s.origin)}" for s in origins.values())
        raise ValueError(
            f"The {shards[0].content} were made by {len(origins)} models ({found}): decode them one by one."
        )
    return shards


def open_shard_file(path: Path) -> Shard:
    """Open a shard of tokens or of latents, which its suffix tells; see `open_token_shard` and `open_shard`."""
    return open_token_shard(path) if path.suffix.lower() == TABLE_SUFFIX else open_shard(path)


def find_tokenizer_of(shard: Shard, model: str | None = None, revision: str | None = None) -> TokenizerFiles:
    """Find the tokenizer that made a shard, where it says it is or where it is now.

    Args:
        shard: One of those to decode.
        model: Where to look instead.
        revision: Which one of that repository; by default the one that made the shard.

    Returns:
        The tokenizer; `check_same_model` tells whether it is the right one.

    Raises:
        OSError: If it cannot be found.
        ValueError: If what is there is no tokenizer.
    """
    origin = shard.origin
    on_hub = not origin.revision.startswith("sha256:")
    if revision is None and on_hub and model in (None, origin.model) and not os.path.isdir(origin.model):
        revision = origin.revision
    try:
        return find_tokenizer(origin.model if model is None else model, revision)
    except OSError as error:
        if model is not None:
            raise
        raise OSError(f"{error} The {shard.content} name it as their model; if it has moved, pass --model.") from error


def check_same_model(shard: Shard, source: TokenizerFiles) -> None:
    """Compare the model that made a shard with the one that is to decode it.

    Args:
        shard: One of those to decode.
        source: The model at hand.

    Raises:
        ValueError: If their files differ; it names both.
    """
    if shard.origin.digest != source.digest:
        raise ValueError(
            f"The {shard.content} were made by {_describe(shard.origin)}, but {source.name!r} is {source.class_name} "
            f"at revision {source.revision}: pictures would come out wrong. Pass the right --model, or "
            "--allow-revision-mismatch to decode nevertheless."
        )


@torch.inference_mode()
def encode_batch(model: TokenizerModel, pixels: torch.Tensor) -> torch.Tensor:
    """Return the latents `(B, C, h, w)` of pixels `(B, 3, H, W)`, on the model's device."""
    return model.encode(pixels.to(model.device)).latent


@torch.inference_mode()
def indices_of_batch(model: DiscreteTokenizer, latents: torch.Tensor) -> torch.Tensor:
    """Return the indices `(B, codebooks, h, w)` of latents `(B, C, h, w)`."""
    return model.quantize(latents).indices


def quantize_batch(model: TokenizerModel, latents: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Return the indices of latents and the latents that they decode from; of a continuous one, None and as given."""
    if not isinstance(model, DiscreteTokenizer):
        return None, latents
    indices = indices_of_batch(model, latents)
    return indices, _latents_of(model, indices)


@torch.inference_mode()
def decode_batch(model: TokenizerModel, latents: torch.Tensor) -> torch.Tensor:
    """Return the pixels `(B, 3, H, W)` of latents `(B, C, h, w)`, float32 on the CPU."""
    return model.decode(latents.to(model.device)).sample.float().cpu()


def encoded_batches(
    model: TokenizerModel, files: Iterable[FoundFile], on_failure: OnFailure, batch_size: int
) -> Iterator[tuple[list[Picture], torch.Tensor]]:
    """Read and encode pictures batch by batch, without those that cannot be read or encoded.

    Args:
        model: Any tokenizer.
        files: From `find_pictures`.
        on_failure: Called with the name and the error of every other picture.
        batch_size: As in `reconstruct_files`.

    Yields:
        Pictures, their pixels of one shape, and their latents `(B, C, h, w)`, on the model's device.
    """
    pictures = read_pictures(_progress(files, "pictures"), ImageProcessor.from_model(model), on_failure)
    for batch in equal_batches(pictures, batch_size):
        pairs = list(_finite(batch, encode_batch(model, _stack(batch)), on_failure))
        if pairs:
            yield [picture for picture, _ in pairs], torch.stack([latents for _, latents in pairs])


def code_counters(model: TokenizerModel) -> dict[str, CodeCounter]:
    """Return a counter for every codebook, by its name; none for a continuous tokenizer."""
    sizes = model.codebook_sizes if isinstance(model, DiscreteTokenizer) else {}
    return {name: CodeCounter(size) for name, size in sizes.items()}


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


def _read_shards(model: TokenizerModel, shards: Sequence[Shard], on_failure: OnFailure) -> Iterator[Picture]:
    """All content in order, named by the PNG files it becomes: pictures of several shards may share a name."""
    names = png_names([name for shard in shards for name in shard.sizes])
    first = 0
    for shard in _progress(shards, "shards"):
        try:
            _check_fits(model, shard)
            for name, picture in zip(names[first:], _read_shard(model, shard), strict=False):
                yield replace(picture, name=name)
        except (ValueError, OSError) as error:
            on_failure(shard.path.name, error)
        first += len(shard.sizes)


def _read_shard(model: TokenizerModel, shard: Shard) -> Iterator[Picture]:
    if isinstance(shard, TokenShard):
        yield from read_tokens(shard)
        return
    for picture in read_latents(shard):
        if picture.values.shape[0] != model.latent_channels:
            channels = f"{picture.values.shape[0]} latent channels, the model has {model.latent_channels}"
            raise ValueError(f"{picture.name!r} has {channels}.")
        yield replace(picture, values=picture.values.float())


def _check_fits(model: TokenizerModel, shard: Shard) -> None:
    """With another model's revision allowed, it may be another kind of model altogether."""
    patch_size = model.config["patch_size"]
    if shard.origin.patch_size != patch_size:
        raise ValueError(f"It has patch_size={shard.origin.patch_size}, the model {patch_size}.")
    if shard.origin.image_size != model.image_size:
        raise ValueError(f"It has pictures of image_size={shard.origin.image_size}, the model of {model.image_size}.")
    if isinstance(shard, TokenShard):
        sizes = {name: len(counter.counts) for name, counter in code_counters(model).items()}
        if list(sizes.values()) != list(shard.codebook_sizes.values()):
            raise ValueError(f"It has tokens of codebooks with {shard.codebook_sizes} codes, the model has {sizes}.")


@torch.inference_mode()
def _latents_of(model: TokenizerModel, indices: torch.Tensor) -> torch.Tensor:
    return cast("DiscreteTokenizer", model).indices_to_latents(indices.to(model.device))


def _write_sample(processor: ImageProcessor, sample: torch.Tensor, picture: Picture, path: Path) -> None:
    (image,) = to_pictures(processor, sample[None], [picture.size])
    write_png(image, path)


def _describe(origin: ModelOrigin) -> str:
    return f"{origin.model!r}, {origin.class_name} at revision {origin.revision}"
