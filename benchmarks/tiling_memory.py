"""Peak memory and time of reconstructing a large picture, tiled and whole, with the paper's decoder.

    python benchmarks/tiling_memory.py [--width 2560 --height 1440]

Each way runs in a process of its own; peak memory is the highest resident set of that process (of the CPU; on a GPU,
of its allocator). The encoder is the ViT-Ti of the data folder where it is at hand, else a random one of its size;
the decoder is 128 x (1, 1, 2, 2, 4) with two blocks per resolution, untrained beside the closed-form fit on crops of
the same picture. The seam ratio compares the mean step across the lines where tiles begin and end with the mean step
across all other borders of 16-px patches; the tiled picture should have that of the whole one.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
from photographs import ENCODER
from PIL import Image

from dinotok import AutoencoderDINOTok, ImageProcessor
from dinotok.metrics import psnr

RESULTS = Path(__file__).parent / "results" / "tiling_memory.json"
VIT_TINY = {
    "model_type": "vit",
    "hidden_size": 192,
    "num_hidden_layers": 12,
    "num_attention_heads": 3,
    "intermediate_size": 768,
    "image_size": 224,
    "patch_size": 16,
}


def peak_gib() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def build() -> AutoencoderDINOTok:
    torch.manual_seed(0)
    if ENCODER.is_dir():
        return AutoencoderDINOTok.from_encoder(str(ENCODER))
    return AutoencoderDINOTok(encoder_config=VIT_TINY, image_mean=[0.5] * 3, image_std=[0.5] * 3).eval()


def seams(pixels: torch.Tensor, tile: int, overlap: int) -> float:
    """The mean step across tile borders over that across other patch borders, of a `(3, H, W)` picture."""
    ratios = []
    for dim in (1, 2):
        steps = pixels.diff(dim=dim).abs().mean(dim=[d for d in (0, 1, 2) if d != dim])
        length = pixels.shape[dim]
        starts = [*range(0, length - tile, tile - overlap), length - tile]
        lines = sorted({line for s in starts for line in (s, s + tile) if 0 < line < length})
        others = sorted(set(range(16, length, 16)) - set(lines))
        ratios.append(steps[torch.tensor(lines) - 1].mean() / steps[torch.tensor(others) - 1].mean())
    return float(sum(ratios) / len(ratios))


@torch.no_grad()
def measure(way: str, width: int, height: int) -> dict:
    photograph = Path(__file__).parents[1] / "src" / "dinotok" / "assets" / "photographs" / "coffee.jpg"
    picture = Image.open(photograph).convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
    model = build()
    processor = ImageProcessor.from_model(model)
    pixels = processor.preprocess(picture)
    crops = pixels.unfold(2, 224, 224).unfold(3, 224, 224).permute(0, 2, 3, 1, 4, 5).flatten(0, 2)
    model.fit(crops.split(8))
    before = peak_gib()
    if way == "tiled":
        model.enable_tiling()
    start = time.perf_counter()
    sample = model(pixels).sample.clamp(-1, 1)
    seconds = time.perf_counter() - start
    row = {"peak GiB": peak_gib(), "before GiB": before, "seconds": seconds, "psnr": float(psnr(sample, pixels)[0])}
    model.enable_tiling()  # for the places of the tiles
    row["seam ratio"] = seams(sample[0], model.tile_size, model.tile_overlap)
    return {key: round(value, 3) for key, value in row.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=2560)
    parser.add_argument("--height", type=int, default=1440)
    parser.add_argument("--way", choices=["tiled", "whole"], help="measure one way in this process")
    arguments = parser.parse_args()
    if arguments.way:
        print(json.dumps(measure(arguments.way, arguments.width, arguments.height)))
        return
    rows = {}
    for way in ("tiled", "whole"):
        command = [sys.executable, __file__, "--way", way, "--width", arguments.width, "--height", arguments.height]
        output = subprocess.run([str(c) for c in command], capture_output=True, text=True)
        last = output.stdout.strip().splitlines()[-1] if output.returncode == 0 else None
        rows[way] = json.loads(last) if last else {"failed": f"exit status {output.returncode}"}
        print(way, rows[way])
    size = f"{arguments.width}x{arguments.height}"
    table = [f"| {size} | peak memory | time | PSNR | seam ratio |", "|---|---|---|---|---|"]
    for way, row in rows.items():
        table.append(
            f"| {way} | {row.get('peak GiB', '-')} GiB | {row.get('seconds', '-')} s | {row.get('psnr', '-')} dB | "
            f"{row.get('seam ratio', '-')} |"
        )
    RESULTS.write_text(json.dumps({"size": size, "rows": rows}, indent=2) + "\n")
    RESULTS.with_suffix(".md").write_text(f"{__doc__.splitlines()[0]}\n\n" + "\n".join(table) + "\n")


if __name__ == "__main__":
    main()
