"""The quickstart: fit a small tokenizer on some bundled photographs, reconstruct others, without a download."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from .folders import write_png
from .image_processor import ImageProcessor
from .metrics import ReconstructionMetrics
from .models.autoencoder_dinotok import AutoencoderDINOTok
from .pictures import SheetEntry, enlarge, pca_colors, sheet
from .reports import scores_text, to_pictures
from .transcoding import decode_batch, encode_batch

FIT_ON = ("astronaut.jpg", "hubble_deep_field.jpg", "retina.jpg", "rocket.jpg")
HELD_OUT = ("chelsea.jpg", "coffee.jpg")
CROP_SIZES = (128, 160, 192, 224)
_CROPS_PER_BATCH = 8


@dataclass(frozen=True)
class QuickstartResult:
    """What the quickstart did.

    Attributes:
        rows: For every held-out photograph `file`, `height`, `width`, `latents` (their shape), `psnr`, `ssim`.
        num_crops: Crops that the tokenizer was fitted on.
        fit_seconds: For the fit alone.
        seconds: For everything.
        tokenizer: Folder of the saved tokenizer.
        files: Pictures that were written.
    """

    rows: list[dict[str, Any]]
    num_crops: int
    fit_seconds: float
    seconds: float
    tokenizer: Path
    files: list[Path]


def run_quickstart(output: Path, num_crops: int = 320, seed: int = 0) -> QuickstartResult:
    """Fit, save, load and use a small tokenizer.

    Args:
        output: Folder for the tokenizer and the pictures.
        num_crops: Random crops of four photographs to fit on.
        seed: Of the encoder's weights and of the crops.

    Returns:
        The results.

    Raises:
        OSError: If something cannot be written.
    """
    start = time.perf_counter()
    tokenizer = build_tokenizer(seed)
    tokenizer.fit(random_crops(num_crops, seed))
    fit_seconds = time.perf_counter() - start
    tokenizer.save_pretrained(output / "tokenizer")

    tokenizer = AutoencoderDINOTok.from_pretrained(output / "tokenizer").eval()
    rows, pairs, maps = zip(*(_reconstruct(tokenizer, name) for name in HELD_OUT), strict=True)
    deep = f"deep part, {tokenizer.deep_channels} channels (random weights)"
    texture = f"texture part, {tokenizer.texture_channels} channels"
    files = [output / "sheet.png", output / "latents_pca.png"]
    write_png(sheet(["original", "reconstruction"], pairs), files[0])
    write_png(sheet(["picture", deep, texture], maps), files[1])
    seconds = time.perf_counter() - start
    return QuickstartResult(list(rows), num_crops, fit_seconds, seconds, output / "tokenizer", files)


def print_quickstart(result: QuickstartResult) -> None:
    """Print what the quickstart did, what is real about it and what is not, and what to do next."""
    from rich.console import Console
    from rich.table import Table

    table = Table("held-out photograph", "size", "latents", "PSNR (dB)", "SSIM")
    for row in result.rows:
        size, shape = f"{row['width']}x{row['height']}", "x".join(map(str, row["latents"]))
        table.add_row(row["file"], size, shape, f"{row['psnr']:.2f}", f"{row['ssim']:.3f}")
    console = Console(soft_wrap=True, highlight=False, markup=False)
    console.print(table)
    console.print(
        f"Fitted in closed form on {result.num_crops} crops of {len(FIT_ON)} other photographs in "
        f"{result.fit_seconds:.1f} s; {result.seconds:.1f} s in all. No gradient step was taken.\n"
        "\n"
        "What is real: the texture latents, the closed-form fit, the checkpoint, and the numbers.\n"
        "What is not: the deep features. No trained encoder ships with this release, so this one has random weights;\n"
        "its deep latents mean nothing yet. Use a pretrained encoder for your own work (below).\n"
    )
    console.print("Written:")
    for path in (*result.files, result.tokenizer):
        console.print(f"  {path}")
    console.print(
        "\n"
        "Next, your own pictures:\n"
        f"  dinotok reconstruct PICTURES --model {result.tokenizer} --output outputs/mine\n"
        "and a tokenizer on a pretrained encoder:\n"
        "  from dinotok import AutoencoderDINOTok\n"
        '  tokenizer = AutoencoderDINOTok.from_encoder("facebook/dinov2-with-registers-base")\n'
        "  tokenizer.fit(batches)  # any iterable of (B, 3, H, W) pixels in [-1, 1]\n"
        '  tokenizer.save_pretrained("my-tokenizer")'
    )


def build_tokenizer(seed: int = 0) -> AutoencoderDINOTok:
    """Build a small tokenizer on a random encoder: the one function to replace when a trained checkpoint ships."""
    encoder_config = {
        "model_type": "dinov3_vit",
        "patch_size": 16,
        "hidden_size": 192,
        "intermediate_size": 768,
        "num_hidden_layers": 4,
        "num_attention_heads": 3,
        "num_register_tokens": 4,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = AutoencoderDINOTok(
            encoder_config=encoder_config, texture_channels=64, block_out_channels=(32, 32, 64, 64, 64)
        )
    return tokenizer.eval()


def random_crops(num_crops: int, seed: int = 0) -> Iterator[torch.Tensor]:
    """Cut squares of four sizes out of the photographs to fit on.

    Args:
        num_crops: In all.
        seed: The same seed gives the same crops.

    Yields:
        Up to 8 crops of one size, `(B, 3, size, size)` in [-1, 1].
    """
    generator = torch.Generator().manual_seed(seed)
    processor = ImageProcessor(patch_size=1)
    pictures = [processor.preprocess(photograph(name))[0] for name in FIT_ON]
    for start in range(0, num_crops, _CROPS_PER_BATCH):
        size = CROP_SIZES[_random(len(CROP_SIZES), generator)]
        count = min(_CROPS_PER_BATCH, num_crops - start)
        chosen = [pictures[_random(len(pictures), generator)] for _ in range(count)]
        yield torch.stack([_random_crop(picture, size, generator) for picture in chosen])


def photograph(name: str) -> Path:
    """Return the path of a bundled photograph."""
    return Path(str(resources.files("dinotok") / "assets" / "photographs" / name))


def _reconstruct(tokenizer: AutoencoderDINOTok, name: str) -> tuple[dict[str, Any], SheetEntry, SheetEntry]:
    """A photograph's numbers, the photograph beside its reconstruction, and beside the colours of its latents."""
    processor = ImageProcessor.from_model(tokenizer)
    pixels = processor.preprocess(photograph(name))
    latents = encode_batch(tokenizer, pixels)
    sample = decode_batch(tokenizer, latents)
    original, reconstruction = (to_pictures(processor, values)[0] for values in (pixels, sample))
    width, height = original.size
    crop = (slice(None), slice(None), slice(height), slice(width))
    (scores,) = ReconstructionMetrics().update(sample[crop], pixels[crop])
    row = {"file": name, "height": height, "width": width, "latents": tuple(latents.shape[1:]), **scores}
    parts = latents[0].split([tokenizer.deep_channels, tokenizer.texture_channels])
    maps = [enlarge(pca_colors(part), tokenizer.patch_size, (height, width)) for part in parts]
    pair = SheetEntry([name, scores_text(row)], [original, reconstruction])
    return row, pair, SheetEntry([name], [original, *maps])


def _random(count: int, generator: torch.Generator) -> int:
    return int(torch.randint(count, (), generator=generator))


def _random_crop(picture: torch.Tensor, size: int, generator: torch.Generator) -> torch.Tensor:
    top, left = (_random(side - size + 1, generator) for side in picture.shape[1:])
    return picture[:, top : top + size, left : left + size]
