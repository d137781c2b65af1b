"""What `dinotok evaluate reconstruction` costs beside the bare encoding and decoding of the same pictures.

    python benchmarks/evaluation_overhead.py [--model NAME | --size base] [--pictures 48 --resolution 224]

The bare time is that of encoder, quantizer and decoder on pictures that lie in memory. The evaluation also reads,
crops and digests files, and computes PSNR and SSIM, without LPIPS and without the features of a Fréchet distance,
which are networks of their own. CPU seconds of all threads, so that other processes hardly matter; the two alternate,
and the median of the rounds' ratios is reported. `--size base` is an AutoencoderDINOTok of the published size with
random weights (DINOv2 ViT-B with registers, the decoder of LDM): speed does not depend on them.

The pictures are crops of the package's photographs, written as JPEG. Rows are kept in the results file, by model.
"""

import argparse
import json
import statistics
import tempfile
import time
from importlib import resources
from pathlib import Path

import torch
from PIL import Image

from dinotok import AutoencoderDINOTok
from dinotok.data import PictureLoader, PictureTransform, load_pictures, to_pixels
from dinotok.evaluation.passes import PassOptions
from dinotok.evaluation.reconstruction import evaluate_reconstruction
from dinotok.hub import load_tokenizer
from dinotok.models.tokenizer_model import TokenizerModel
from dinotok.quickstart import PHOTOGRAPHS, photograph
from dinotok.transcoding import decode_batch, encode_batch, quantize_batch

RESULTS = Path(__file__).parent / "results" / "evaluation_overhead.json"
BASE = "AutoencoderDINOTok, ViT-B size"


def base_tokenizer() -> TokenizerModel:
    config = json.loads(
        (resources.files("dinotok.configs") / "autoencoder_dinotok_dinov2_with_registers_base.json").read_text()
    )
    return AutoencoderDINOTok.from_config(config).eval()


def write_pictures(folder: Path, count: int, side: int) -> None:
    generator = torch.Generator().manual_seed(0)
    for number in range(count):
        with Image.open(photograph(PHOTOGRAPHS[number % len(PHOTOGRAPHS)])) as picture:
            left, top = (
                int(torch.randint(max(length - side, 0) + 1, (), generator=generator)) for length in picture.size
            )
            picture.crop((left, top, left + side, top + side)).save(folder / f"{number:04d}.jpg", quality=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="dinotok-tiny-vq")
    parser.add_argument("--size", choices=["base"], help="in place of --model")
    parser.add_argument("--pictures", type=int, default=48)
    parser.add_argument("--resolution", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    model = base_tokenizer() if arguments.size else load_tokenizer(arguments.model)
    options = PassOptions(arguments.batch_size)
    seconds: dict[str, list[float]] = {"bare": [], "evaluation": []}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "pictures")
        folder.mkdir()
        write_pictures(folder, arguments.pictures, arguments.resolution + 32)
        dataset = load_pictures(str(folder))
        transform = PictureTransform(arguments.resolution, crop="center")
        loader = PictureLoader(dataset, transform, arguments.batch_size, shuffle=False)
        batches = [to_pixels(batch["pixel_values"]) for batch in loader.once()]
        for turn in range(arguments.rounds + 1):
            start = time.process_time()
            for pixels in batches:
                decode_batch(model, quantize_batch(model, encode_batch(model, pixels))[1])
            middle = time.process_time()
            evaluate_reconstruction(model, dataset, arguments.resolution, Path(temporary, str(turn)), options)
            if turn:  # the first round warms up
                seconds["bare"].append(middle - start)
                seconds["evaluation"].append(time.process_time() - middle)
    ratios = [whole / bare for bare, whole in zip(*seconds.values(), strict=True)]
    name = BASE if arguments.size else arguments.model
    row = {key: round(statistics.median(values) / arguments.pictures, 4) for key, values in seconds.items()}
    row |= {"overhead": round(statistics.median(ratios) - 1, 4)}
    row |= {key: getattr(arguments, key) for key in ("pictures", "resolution", "batch_size", "rounds")}
    rows = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    rows[f"{name}, {arguments.resolution} px"] = row
    RESULTS.write_text(json.dumps(rows, indent=2) + "\n")
    print("\n".join(table(rows)))


def table(rows: dict[str, dict]) -> list[str]:
    lines = ["| model | encode and decode, CPU s a picture | evaluation | overhead |", "|---|---|---|---|"]
    for name, row in rows.items():
        lines.append(f"| {name} | {row['bare']:.3f} | {row['evaluation']:.3f} | {row['overhead']:.0%} |")
    return lines


if __name__ == "__main__":
    main()
