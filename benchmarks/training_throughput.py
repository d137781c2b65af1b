"""Training throughput beside diffusers' RAE example: same encoder, decoder, batch, pictures and machine, in turns.

    python benchmarks/training_throughput.py [--rounds 6 --steps 5]

The model is diffusers' `AutoencoderRAE` in both: a frozen DINOv2 with registers and a transformer decoder, both small
enough for a CPU, at 256 pixels. `the example's loop` does what a step of diffusers' `train_autoencoder_rae.py` does
(its script itself needs torchvision): Pillow pictures resized and cropped in a loader with two workers, L1 loss,
clipping, AdamW, three `.item()` for its progress bar. `train_tokenizer.py` is the step of our script with our loader,
the same loss and clipping, and what the example lacks: moving averages and the guard against non-finite steps. The
rows below show, on an `AutoencoderDINOTok`, what each further term costs. Then the loaders alone.
"""

import argparse
import io
import json
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import pyarrow.parquet as pq
import result_tables
import torch
from accelerate import Accelerator
from diffusers import AutoencoderRAE
from photographs import DATA, ENCODER
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from dinotok import AutoencoderDINOTok
from dinotok.data import PictureLoader, PictureTransform, load_pictures
from training_scripts.train_tokenizer import TokenizerOptions, build_parts, train_step

RESULTS = Path(__file__).parent / "results" / "training_throughput.json"
TRAIN = DATA / "imagenette" / "imagenette_224_train.parquet"
BATCH, SIZE = 8, 256
EXAMPLE, OURS, BASE = "the example's loop", "train_tokenizer.py", "AutoencoderDINOTok, L1"
TERMS = {
    BASE: ["l1=1"],
    "with LPIPS (squeeze)": ["l1=1", "lpips=1"],
    "with the semantic term": ["l1=1", "semantic=0.1"],
    "with a PatchGAN": ["l1=1", "adversarial=0.5"],
}


class Photographs(Dataset):
    """Pictures as torchvision's ImageFolder and its usual transforms read them, by Pillow alone."""

    def __init__(self):
        self.encoded = [row for row in pq.read_table(TRAIN, columns=["image"])["image"].to_pylist()[:2000]]

    def __len__(self) -> int:
        return len(self.encoded)

    def __getitem__(self, index: int) -> torch.Tensor:
        data = self.encoded[index]
        picture = Image.open(io.BytesIO(data["bytes"] if isinstance(data, dict) else data)).convert("RGB")
        picture = picture.resize((SIZE, SIZE), Image.Resampling.BICUBIC)
        return torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1).float() / 255


def build_model() -> AutoencoderRAE:
    torch.manual_seed(0)
    model = AutoencoderRAE(
        encoder_type="dinov2",
        encoder_hidden_size=192,
        encoder_patch_size=14,
        encoder_num_hidden_layers=6,
        decoder_hidden_size=192,
        decoder_num_hidden_layers=4,
        decoder_num_attention_heads=3,
        decoder_intermediate_size=768,
        patch_size=16,
        encoder_input_size=224,
        image_size=SIZE,
    )
    model.encoder.requires_grad_(False)
    return model.train()


def build_tokenizer() -> AutoencoderDINOTok:
    torch.manual_seed(0)
    model = AutoencoderDINOTok.from_encoder(str(ENCODER), block_out_channels=(16, 32, 32, 64, 96), norm_num_groups=8)
    return model.train()


def example_steps(accelerator: Accelerator):
    """The example's loop, a step at a time."""
    model = build_model()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-4)
    loader = DataLoader(Photographs(), BATCH, shuffle=True, num_workers=2, drop_last=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    while True:
        for pixels in loader:
            reconstruction = model(pixels).sample
            loss = torch.nn.functional.l1_loss(reconstruction.float(), pixels.float())
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            [loss.detach().item() for _ in range(3)]
            yield


def our_steps(accelerator: Accelerator, model: torch.nn.Module, losses: list[str]):
    """Our script's loop, a step at a time, the discriminator at full weight."""
    net = str(DATA / "weights" / "lpips_squeeze_v0.1_fp32.safetensors")
    parts = build_parts(TokenizerOptions("", "", "", losses=losses, perceptual_net=net), model, accelerator)
    transform = PictureTransform(SIZE, crop="random", flip=True)
    loader = PictureLoader(load_pictures(str(TRAIN)), transform, BATCH, num_workers=2)
    batches = loader.batches()
    while True:
        train_step(parts, batches, 10**6, 1)
        yield


def loader_rates(pictures: int) -> dict[str, float]:
    """Pictures per second of the loaders alone."""
    transform = PictureTransform(SIZE, crop="random", flip=True)
    ours = PictureLoader(load_pictures(str(TRAIN)), transform, BATCH, num_workers=2).batches()
    theirs = iter(DataLoader(Photographs(), BATCH, shuffle=True, num_workers=2))
    rates = {}
    for name, batches in {"the example's": theirs, "ours": ours}.items():
        next(batches)
        start = time.perf_counter()
        for _ in range(pictures // BATCH):
            next(batches)
        rates[name] = pictures / (time.perf_counter() - start)
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=5)
    arguments = parser.parse_args()
    accelerator = Accelerator(cpu=True, project_dir=tempfile.mkdtemp())
    loops = {EXAMPLE: example_steps(accelerator), OURS: our_steps(accelerator, build_model(), ["l1=1"])}
    loops |= {name: our_steps(accelerator, build_tokenizer(), losses) for name, losses in TERMS.items()}
    times: dict[str, list[float]] = {name: [] for name in loops}
    for loop in loops.values():
        next(loop)
    for _ in range(arguments.rounds):
        for name, loop in loops.items():
            start = time.perf_counter()
            for _ in range(arguments.steps):
                next(loop)
            times[name].append((time.perf_counter() - start) / arguments.steps)
    rows = {}
    for name, values in times.items():
        reference = BASE if name in TERMS else EXAMPLE
        ratio = median(r / v for r, v in zip(times[reference], values, strict=True))
        rows[name] = {"pictures per second": round(BATCH / median(values), 2), "ratio": round(ratio, 3)}
    results = {"rows": rows, "loaders alone, pictures per second": {k: round(v) for k, v in loader_rates(400).items()}}
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")
    lines = ["| loop | pictures/s | ratio to the first of its kind |", "|---|---|---|"]
    lines += [f"| {name} | {row['pictures per second']} | {row['ratio']} |" for name, row in rows.items()]
    lines += ["", "| loader alone | pictures/s |", "|---|---|"]
    lines += [f"| {k} | {v} |" for k, v in results["loaders alone, pictures per second"].items()]
    result_tables.write_table(lines, __doc__, RESULTS)


if __name__ == "__main__":
    main()
