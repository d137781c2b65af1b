"""The quickstart: photographs through the models that come with the package, without a download."""

import math
import time
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, cast

import torch

from .folders import write_png
from .hub import load_tokenizer
from .image_processor import ImageProcessor
from .metrics import ReconstructionMetrics
from .models.autoencoder_dinotok import AutoencoderDINOTok
from .models.vq_model_dinotok import VQModelDINOTok
from .pictures import SheetEntry, enlarge, pca_colors, sheet
from .reports import to_pictures
from .transcoding import decode_batch, encode_batch, indices_of_batch

AUTOENCODER, DISCRETE = "dinotok-tiny-ae", "dinotok-tiny-vq"
PHOTOGRAPHS = ("astronaut.jpg", "chelsea.jpg", "coffee.jpg", "rocket.jpg")


@dataclass(frozen=True)
class QuickstartResult:
    """What the quickstart did.

    Attributes:
        rows: For every photograph `file`, `height`, `width`, `latents` and `indices` (their shapes), `psnr` and `ssim`
            from the latents, `codes_psnr` and `codes_ssim` from the codes, and `bits_per_pixel` of the codes.
        seconds: For everything, the loading of the models included.
        files: Pictures that were written.
    """

    rows: list[dict[str, Any]]
    seconds: float
    files: list[Path]


def run_quickstart(output: Path) -> QuickstartResult:
    """Encode and decode photographs with the bundled tokenizers, and show their latents.

    Args:
        output: Folder for the pictures.

    Returns:
        The results.

    Raises:
        OSError: If something cannot be written.
    """
    start = time.perf_counter()
    autoencoder = cast("AutoencoderDINOTok", load_tokenizer(AUTOENCODER))
    discrete = cast("VQModelDINOTok", load_tokenizer(DISCRETE))
    rows, pairs, maps = zip(*(_reconstruct(autoencoder, discrete, name) for name in PHOTOGRAPHS), strict=True)
    deep = f"deep part, {autoencoder.deep_channels} channels"
    texture = f"texture part, {autoencoder.texture_channels} channels"
    files = [output / "sheet.png", output / "latents_pca.png"]
    write_png(sheet(["original", "from continuous latents", "from codes"], pairs), files[0])
    write_png(sheet(["picture", deep, texture], maps), files[1])
    return QuickstartResult(list(rows), time.perf_counter() - start, files)


def print_quickstart(result: QuickstartResult) -> None:
    """Print what the quickstart did, what these models are and are not, and what to do next."""
    from rich.console import Console
    from rich.table import Table

    table = Table("photograph", "size", "from latents: PSNR, SSIM", "from codes: PSNR, SSIM")
    for row in result.rows:
        table.add_row(
            row["file"],
            f"{row['width']}x{row['height']}",
            f"{row['psnr']:.2f} dB, {row['ssim']:.3f}",
            f"{row['codes_psnr']:.2f} dB, {row['codes_ssim']:.3f}",
        )
    first = result.rows[0]
    console = Console(soft_wrap=True, highlight=False, markup=False)
    console.print(table)
    console.print(
        f"For each 16 x 16 pixels {first['latents'][0]} latents, or {first['indices'][0]} codes "
        f"({first['bits_per_pixel']:.3f} bits per pixel). {result.seconds:.1f} s in all.\n"
        "The photographs are none of those that the models were made from.\n"
        "\n"
        f"{AUTOENCODER} and {DISCRETE} are small models that come with the package: trained on 6,000 photographs of\n"
        "ten classes, on two CPU cores. They show what the code does, not what the papers' models reach.\n"
    )
    console.print("Written:")
    for path in result.files:
        console.print(f"  {path}")
    console.print(
        "\n"
        "Next, your own pictures:\n"
        f"  dinotok reconstruct PICTURES --model {AUTOENCODER} --output outputs/mine\n"
        "and a tokenizer on a large pretrained encoder:\n"
        "  from dinotok import AutoencoderDINOTok\n"
        '  tokenizer = AutoencoderDINOTok.from_encoder("facebook/dinov2-with-registers-base")\n'
        "  tokenizer.fit(batches)  # any iterable of (B, 3, H, W) pixels in [-1, 1]\n"
        '  tokenizer.save_pretrained("my-tokenizer")'
    )


def photograph(name: str) -> Path:
    """Return the path of a bundled photograph."""
    return Path(str(resources.files("dinotok") / "assets" / "photographs" / name))


def _reconstruct(
    autoencoder: AutoencoderDINOTok, discrete: VQModelDINOTok, name: str
) -> tuple[dict[str, Any], SheetEntry, SheetEntry]:
    """A photograph's numbers, the photograph beside its reconstructions, and beside the colours of its latents."""
    processor = ImageProcessor.from_model(autoencoder)
    pixels = processor.preprocess(photograph(name))
    latents = encode_batch(autoencoder, pixels)
    indices = indices_of_batch(discrete, encode_batch(discrete, pixels))
    with torch.no_grad():
        samples = (decode_batch(autoencoder, latents), decode_batch(discrete, discrete.indices_to_latents(indices)))
    pictures = [to_pictures(processor, values)[0] for values in (pixels, *samples)]
    width, height = pictures[0].size
    crop = (slice(None), slice(None), slice(height), slice(width))
    scores, codes = (ReconstructionMetrics().update(sample[crop], pixels[crop])[0] for sample in samples)
    bits = indices[0, 0].numel() * sum(math.log2(size) for size in discrete.codebook_sizes.values())
    row = {
        "file": name,
        "height": height,
        "width": width,
        "latents": tuple(latents.shape[1:]),
        "indices": tuple(indices.shape[1:]),
        **scores,
        **{f"codes_{key}": value for key, value in codes.items()},
        "bits_per_pixel": bits / (width * height),
    }
    parts = latents[0].split([autoencoder.deep_channels, autoencoder.texture_channels])
    maps = [enlarge(pca_colors(part), autoencoder.patch_size, (height, width)) for part in parts]
    caption = f"{width}x{height}: {scores['psnr']:.2f} dB from latents, {codes['psnr']:.2f} dB from codes"
    return row, SheetEntry([name, caption], pictures), SheetEntry([name], [pictures[0], *maps])
