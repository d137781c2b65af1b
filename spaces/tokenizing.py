"""What a tokenizer makes of a picture: its reconstruction, its latents and codes as colours, and mixtures of two."""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageOps

from dinotok import AutoencoderDINOTok, ImageProcessor
from dinotok.evaluation.latents import latent_parts
from dinotok.metrics import ReconstructionMetrics
from dinotok.models.discrete import DiscreteTokenizer
from dinotok.models.tokenizer_model import TokenizerModel
from dinotok.pictures import pca_colors
from dinotok.reports import to_pictures
from dinotok.transcoding import decode_batch, encode_batch, quantize_batch

Captioned = tuple[Image.Image, str]
FIRST, SECOND, NOTHING = "picture A", "picture B", "nothing"
SOURCES = (FIRST, SECOND, NOTHING)
LATENT_NAMES = {"deep": "semantic"}  # as their codes are called


@dataclass(frozen=True)
class Reconstruction:
    """A picture through a tokenizer.

    Attributes:
        original: As the tokenizer saw it.
        reconstruction: Of the same size.
        maps: Latents and codes as colours, with captions; of the same size.
        facts: Names and values, for people.
    """

    original: Image.Image
    reconstruction: Image.Image
    maps: list[Captioned]
    facts: dict[str, str]


@dataclass(frozen=True)
class Mixture:
    """Two pictures and what was mixed of them.

    Attributes:
        result: The picture decoded from the mixture.
        pictures: Both pictures through the tokenizer and the result, with captions; all of one size.
        facts: Names and values, for people.
    """

    result: Image.Image
    pictures: list[Captioned]
    facts: dict[str, str]


def reconstruct(model: TokenizerModel, picture: Image.Image) -> Reconstruction:
    """Encode and decode a picture; with a discrete tokenizer, through its codes.

    Args:
        model: Any tokenizer.
        picture: Of any size.

    Returns:
        The reconstruction and what lies between.

    Raises:
        ValueError: If the model's output is not finite.
    """
    processor = ImageProcessor.from_model(model)
    start = time.perf_counter()
    pixels = processor.preprocess(picture)
    latents = encode_batch(model, pixels)
    indices, decoded = quantize_batch(model, latents)
    encoded = time.perf_counter()
    sample = decode_batch(model, decoded)
    seconds = (encoded - start, time.perf_counter() - encoded)
    original, reconstruction = (to_pictures(processor, values)[0] for values in (pixels, sample))
    height, width = processor.sizes[0]
    (scores,) = ReconstructionMetrics().update(sample[..., :height, :width], pixels[..., :height, :width])
    parts = latent_parts(model, latents) or {"all": latents}
    grids = {f"{LATENT_NAMES.get(name, name)} latents": pca_colors(part[0]) for name, part in parts.items()}
    if isinstance(model, DiscreteTokenizer) and indices is not None:
        grids |= code_maps(model, indices[0])
    padded = (pixels.shape[3], pixels.shape[2])
    maps = [
        (Image.fromarray(grid).resize(padded, Image.Resampling.NEAREST).crop((0, 0, width, height)), name)
        for name, grid in grids.items()
    ]
    facts = {
        "Picture": f"{width} x {height} pixels",
        "PSNR": f"{scores['psnr']:.2f} dB",
        "SSIM": "not defined" if math.isnan(scores["ssim"]) else f"{scores['ssim']:.3f}",
        **(_size_of_latents(latents[0]) if indices is None else _size_of_codes(model, indices[0], width * height)),
        "Time": f"{seconds[0]:.2f} s to encode, {seconds[1]:.2f} s to decode",
    }
    return Reconstruction(original, reconstruction, maps, facts)


def code_maps(model: DiscreteTokenizer, indices: torch.Tensor) -> dict[str, np.ndarray]:
    """Colour codes by their vectors: alike codes have alike colours, the same ones in every picture.

    Args:
        model: The tokenizer.
        indices: `(codebooks, h, w)`.

    Returns:
        uint8 `(h, w, 3)` for every codebook, by a caption.
    """
    maps = {}
    for (name, vectors), plane in zip(model.code_vectors.items(), indices.cpu(), strict=True):
        colors = pca_colors(vectors.T[:, :, None])[:, 0]  # (codes, 3)
        maps[f"{name} codes"] = colors[plane.numpy()]
    return maps


def mix(
    model: TokenizerModel, first: Image.Image, second: Image.Image, semantic: str = FIRST, texture: str = SECOND
) -> Mixture:
    """Decode the semantic part of one picture with the texture part of another, or without one of them.

    A part that is left out is at its mean over the training set. With a discrete tokenizer, these are codes: position
    by position, the semantic code of one picture beside the texture code of the other.

    Args:
        model: A DINO-Tok tokenizer.
        first: Picture A.
        second: Picture B; cut and resized to the size of picture A.
        semantic: One of `SOURCES`: where the semantic part is from.
        texture: One of `SOURCES`.

    Returns:
        The result, beside both pictures through the tokenizer.

    Raises:
        ValueError: If a source is unknown, or the tokenizer does not keep the two apart.
    """
    check_mixable(model, semantic, texture)
    processor = ImageProcessor.from_model(model)
    pixels = processor.preprocess([first, ImageOps.fit(second, first.size)])
    indices, latents = quantize_batch(model, encode_batch(model, pixels))
    mixed = mix_latents(model, latents, semantic, texture)
    sizes = [processor.sizes[0]] * 3
    sample = decode_batch(model, torch.cat([latents, mixed]))
    seen = to_pictures(processor, sample, sizes)
    height, width = sizes[0]
    crop = (slice(None), slice(None), slice(height), slice(width))
    pairs = torch.cat([sample[[2, 2]], sample[:2]])[crop], torch.cat([pixels, pixels])[crop]
    to_first, to_second, own_first, own_second = (row["psnr"] for row in ReconstructionMetrics().update(*pairs))
    facts = {
        "PSNR of the mixture": f"{to_first:.2f} dB to A, {to_second:.2f} dB to B",
        "PSNR unmixed": f"{own_first:.2f} dB of A, {own_second:.2f} dB of B",
        **({} if indices is None else {"Codes that A and B share": _shared(model, indices)}),
    }
    captions = ("A", "B", "mixture")
    return Mixture(seen[2], list(zip(seen, captions, strict=True)), facts)


def mix_latents(model: TokenizerModel, latents: torch.Tensor, semantic: str, texture: str) -> torch.Tensor:
    """Put latents together from those of two pictures.

    Args:
        model: A DINO-Tok tokenizer.
        latents: `(2, C, h, w)`: of picture A and picture B, normalised, so that the mean is 0.
        semantic: One of `SOURCES`.
        texture: One of `SOURCES`.

    Returns:
        `(1, C, h, w)`.
    """
    parts = latent_parts(model, latents)
    chosen = zip(parts.values(), (semantic, texture), strict=True)
    return torch.cat([_source(part, source) for part, source in chosen], dim=1)


def check_mixable(model: TokenizerModel, semantic: str, texture: str) -> None:
    """Raise `ValueError` if a source is unknown, or a tokenizer does not keep semantics and texture apart."""
    for source in (semantic, texture):
        if source not in SOURCES:
            raise ValueError(f"{source!r} is none of {', '.join(SOURCES)}.")
    if (
        not isinstance(model, AutoencoderDINOTok)
        or not model.texture_channels
        or getattr(model, "joint_codebook", False)
    ):
        raise ValueError(
            f"This {type(model).__name__} has no texture apart from its semantics: there is nothing to mix."
        )


def table(facts: Mapping[str, str]) -> str:
    """Return names and values as a table in Markdown."""
    rows = [f"| {name} | {value} |" for name, value in facts.items()]
    return "\n".join(["| | |", "|---|---|", *rows])


def _source(part: torch.Tensor, source: str) -> torch.Tensor:
    """`(2, C, h, w)` to the `(1, C, h, w)` of one picture, or zeros: the mean of normalised latents."""
    return torch.zeros_like(part[:1]) if source == NOTHING else part[[SOURCES.index(source)]]


def _shared(model: TokenizerModel, indices: torch.Tensor) -> str:
    equal = (indices[0] == indices[1]).float().flatten(1).mean(1).tolist()
    names = model.codebook_sizes if isinstance(model, DiscreteTokenizer) else ()
    return ", ".join(f"{share:.1%} {name}" for name, share in zip(names, equal, strict=True))


def _size_of_latents(latents: torch.Tensor) -> dict[str, str]:
    channels, rows, columns = latents.shape
    return {
        "Latents": f"{columns} x {rows} positions x {channels} numbers",
        "Size": f"{2 * latents.numel():,} bytes with 16 bits a number",
    }


def _size_of_codes(model: TokenizerModel, indices: torch.Tensor, pixels: int) -> dict[str, str]:
    sizes = model.codebook_sizes if isinstance(model, DiscreteTokenizer) else {}
    positions = indices[0].numel()
    bits = positions * sum(math.ceil(math.log2(size)) for size in sizes.values())
    books = " + ".join(f"{math.ceil(math.log2(size))} bits ({name}, {size:,} codes)" for name, size in sizes.items())
    return {
        "Codes": f"{indices.shape[2]} x {indices.shape[1]} positions, {books} each",
        "Bits": f"{bits:,}, that is {math.ceil(bits / 8):,} bytes or {bits / pixels:.3f} bits per pixel",
    }
