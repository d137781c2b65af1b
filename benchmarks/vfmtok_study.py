"""VFMTok and VFMAE beside DINO-Tok, small, on real photographs: what region-adaptive sampling and semantics give.

    python benchmarks/vfmtok_study.py [--steps 4000 --count 500]

All stand on the same frozen encoder (a supervised ViT-Ti/16 in place of a foundation model; VFMTok reads four of its
levels), have a pixel decoder of the same widths, and take the same steps on the same batches of Imagenette at 128
pixels: L1 + LPIPS (squeeze) + codebook loss, and the semantic term where the row says so. A VFMTok has 64 region
tokens on an 8 x 8 grid and 1,024 codes; a DINO-Tok-VQ has 64 positions with two codes of 1,024 each: twice the bits.
DINO-Tok starts from its closed form; VFMTok has none beyond its codebook, so its rows say what so few steps reach from
nothing: compare them with each other. `k-NN` is the class accuracy (k = 20, cosine) of the mean of all the quantized
tokens of a picture (DINO-Tok: the semantic part), with 2,000 training photographs as bank.

FID-768 is not the FID of papers. Finished rows are kept in the results file.
"""

import argparse
import json
import time
from pathlib import Path

import result_tables
import torch
from accelerate import Accelerator
from photographs import DATA, ENCODER, load_photographs, to_pixels
from tqdm import tqdm

from dinotok import AutoencoderDINOTok, AutoencoderVFMTok, VQModelDINOTok, VQModelVFMTok
from dinotok.inception import InceptionFeatures
from dinotok.lpips import LPIPS
from dinotok.metrics import ReconstructionMetrics, fid
from dinotok.models.discrete import DiscreteTokenizer
from dinotok.probes import knn_accuracy
from dinotok.reports import usage_of
from dinotok.training import averaged
from dinotok.transcoding import code_counters
from training_scripts.train_tokenizer import TokenizerOptions, build_parts, train_step

RESULTS = Path(__file__).parent / "results" / "vfmtok_study.json"
SQUEEZE = DATA / "weights" / "lpips_squeeze_v0.1_fp32.safetensors"
SIZE, BATCH, CODES = 128, 8, 1024
DECODER = {"block_out_channels": (16, 32, 32, 64, 128), "layers_per_block": 1, "norm_num_groups": 8}
REGIONS = {
    "image_size": SIZE,
    "levels": [3, 6, 9, 12],
    "query_grid": (8, 8),
    "hidden_size": 128,
    "sampler_num_layers": 3,
    "sampler_num_attention_heads": 4,
    "sampler_intermediate_size": 256,
    "decoder_num_layers": 3,
    "decoder_num_attention_heads": 4,
    "decoder_intermediate_size": 344,
    **DECODER,
}
BASE = ["l1=1", "lpips=0.5"]
DISCRETE = [*BASE, "codebook=1"]
ROWS = {
    "VFMTok": (VQModelVFMTok, {}, [*DISCRETE, "semantic=1"]),
    "VFMTok without region-adaptive sampling": (
        VQModelVFMTok,
        {"region_adaptive": False},
        [*DISCRETE, "semantic=1"],
    ),
    "VFMTok without semantic reconstruction": (VQModelVFMTok, {}, DISCRETE),
    "VFMTok without either": (VQModelVFMTok, {"region_adaptive": False}, DISCRETE),
    "VFMAE": (AutoencoderVFMTok, {}, [*BASE, "semantic=1"]),
    "DINO-Tok-AE": (AutoencoderDINOTok, {}, BASE),
    "DINO-Tok-VQ": (VQModelDINOTok, {}, DISCRETE),
}


def build(tokenizer_class, config: dict, pictures: torch.Tensor):
    """Build a row's tokenizer, and fit what has a closed form."""
    batches = [to_pixels(part) for part in pictures[::3].split(50)]
    if tokenizer_class in (AutoencoderDINOTok, VQModelDINOTok):
        model = AutoencoderDINOTok.from_encoder(str(ENCODER), **DECODER).fit(batches)
        if tokenizer_class is VQModelDINOTok:
            model = VQModelDINOTok.from_autoencoder(
                model, semantic_codebook_size=CODES, texture_codebook_size=CODES, rank=64
            ).fit(batches)
        return model
    if tokenizer_class is VQModelVFMTok:
        return VQModelVFMTok.from_encoder(str(ENCODER), codebook_size=CODES, **REGIONS, **config).fit(batches)
    return AutoencoderVFMTok.from_encoder(str(ENCODER), latent_channels=32, **REGIONS, **config)


def batches_of(pictures: torch.Tensor):
    """The batch of a step: a function of the step alone, so every row sees the same."""
    step = 0
    while True:
        generator = torch.Generator().manual_seed(step)
        chosen = torch.randint(len(pictures), (BATCH,), generator=generator)
        yield {"pixel_values": pictures[chosen].flip(3) if step % 2 else pictures[chosen]}
        step += 1


@torch.no_grad()
def tokens_of(model, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    latents = model.encode(pixels).latent
    if not isinstance(model, DiscreteTokenizer):
        return latents, None
    found = model.quantize(latents)
    return found.latents, found.indices


@torch.no_grad()
def score(model, val: tuple, train: tuple, lpips: LPIPS, features: InceptionFeatures) -> dict:
    metrics, counters, samples, pooled = ReconstructionMetrics(), code_counters(model), [], []
    deep = getattr(model, "deep_channels", None)
    for part in val[0].split(25):
        pixels = to_pixels(part)
        latents, indices = tokens_of(model, pixels)
        for index, counter in enumerate(counters.values()):
            counter.update(indices[:, index])
        samples.append(model.decode(latents).sample.clamp(-1, 1))
        metrics.update(samples[-1], pixels, lpips)
        pooled.append(latents[:, :deep].mean((2, 3)))
    bank = torch.cat([tokens_of(model, to_pixels(part))[0][:, :deep].mean((2, 3)) for part in train[0].split(50)])
    return {
        **metrics.compute(),
        "fid_768": fid(features, map(to_pixels, val[0].split(25)), samples),
        "usage": usage_of(counters),
        "k-NN": knn_accuracy(bank, train[1], torch.cat(pooled), val[1]),
    }


def measure(row: tuple, train: tuple, val: tuple, steps: int, nets: tuple) -> dict:
    tokenizer_class, config, losses = row
    torch.manual_seed(0)
    model = build(tokenizer_class, config, train[0])
    options = TokenizerOptions(
        "",
        "",
        "",
        losses=losses,
        perceptual_net=str(SQUEEZE),
        max_train_steps=steps,
        learning_rate=1e-3,
        ema_decay=0.99,
    )
    parts, batches = build_parts(options, model, Accelerator(cpu=True)), batches_of(train[0])
    model.train()
    start = time.perf_counter()
    for step in tqdm(range(steps), mininterval=30):
        train_step(parts, batches, step, 1)
    seconds = time.perf_counter() - start
    with averaged(parts.objective, parts.ema):
        return {**score(model, val, train, *nets), "training seconds": round(seconds)}


def write_table(results: dict) -> None:
    lines = ["| tokenizer | PSNR | SSIM | LPIPS alex | FID-768 | codes used | k-NN |", "|---|---|---|---|---|---|---|"]
    for name, row in results["rows"].items():
        used = ", ".join(f"{usage['usage']:.1%}" for usage in row["usage"].values()) or "-"
        lines.append(
            f"| {name} | {row['psnr']:.2f} dB | {row['ssim']:.3f} | {row['lpips_alex']:.3f} | {row['fid_768']:.3f} | "
            f"{used} | {row['k-NN']:.1%} |"
        )
    result_tables.write_table(lines, __doc__, RESULTS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--count", type=int, default=500)
    settings = vars(parser.parse_args())
    results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    if results.get("settings") != settings:
        results = {"settings": settings, "rows": {}}

    def photographs(split: str, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        pictures, labels = load_photographs(split, count)
        return torch.nn.functional.interpolate(pictures, size=(SIZE, SIZE), mode="bicubic", antialias=True), labels

    train, val = photographs("train", 2000), photographs("val", settings["count"])
    nets = (
        LPIPS.from_file(DATA / "weights" / "lpips_alex_v0.1_fp32.safetensors"),
        InceptionFeatures.from_file(DATA / "weights" / "fid_inception_v3_2015_to_mixed7a_fp16.safetensors"),
    )
    for name, row in ROWS.items():
        if name not in results["rows"]:
            results["rows"][name] = measure(row, train, val, settings["steps"], nets)
            result_tables.save(results, RESULTS)
            write_table(results)


if __name__ == "__main__":
    main()
