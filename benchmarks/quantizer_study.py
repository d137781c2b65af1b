"""Plain VQ, PCA reweighting and Dominant-Subspace Quantization on the same frozen deep features.

    python benchmarks/quantizer_study.py [--codes 1024 --steps 150]

A supervised ViT-Ti/16 (in place of a DINO) on Imagenette at 224 px. The autoencoder is fitted in closed form on 500
training photographs; PCA and k-means see 2,000 of them (131,072 tokens sampled); every row then trains the same
decoder from the same start for the same steps on the same batches of quantized latents, and is scored on 500
validation photographs (98,000 tokens; PSNR on 200 of them). All rows share the texture codebook, except where the
table says otherwise.

Columns: `error`, mean |z - z_q|^2 over the variance of z in the full 192-d space; usage and perplexity of the semantic
codebook over the whole evaluation set; k-NN (k = 20, cosine, 2,000 training photographs), class accuracy of the mean
semantic latent of a picture, for unquantized features in the first row; PSNR, mean over pictures, before and after
decoder training. Finished rows are kept in the results file.
"""

import argparse
import json
import time
from pathlib import Path

import result_tables
import torch
import torch.nn.functional as F
from photographs import ENCODER, load_photographs, to_pixels
from tqdm import tqdm

from dinotok import AutoencoderDINOTok, VQModelDINOTok
from dinotok.metrics import ReconstructionMetrics
from dinotok.models.quantizers import CodeCounter
from dinotok.probes import knn_accuracy

RESULTS = Path(__file__).parent / "results" / "quantizer_study.json"
DECODER = {"block_out_channels": (16, 32, 32, 64, 128), "layers_per_block": 1, "norm_num_groups": 8}
CROP, BATCH, LEARNING_RATE = 8, 8, 1e-3


def semantic_rows(codes: int) -> dict[str, dict]:
    """The rows that differ in the semantic quantizer alone."""
    common = {"semantic_codebook_size": codes, "texture_codebook_size": codes}
    rows = {"plain VQ (k = 192, a = 0)": {"rank": None}}
    rows |= {f"PCA reweighting, a = {a}": {"rank": None, "eigenvalue_power": a} for a in (0.125, 0.25, 0.5)}
    rows |= {f"DSQ, k = {k}": {"rank": k} for k in (8, 16, 32, 64, 128)}
    rows |= {"DSQ, k = 64, cosine": {"rank": 64, "cosine": True}}
    return {name: {**common, **row} for name, row in rows.items()}


def codebook_rows() -> dict[str, dict]:
    """One codebook against two, at 12 bits a position."""
    return {
        "two codebooks of 64 (DSQ, k = 64)": {"semantic_codebook_size": 64, "texture_codebook_size": 64, "rank": 64},
        "one joint codebook of 4096": {"semantic_codebook_size": 4096, "joint_codebook": True, "rank": None},
        "semantic only, 4096 codes": {"semantic_codebook_size": 4096, "texture_codebook_size": 0, "rank": 64},
    }


@torch.no_grad()
def latents_of(model: AutoencoderDINOTok, pictures: torch.Tensor) -> torch.Tensor:
    batches = tqdm(pictures.split(50), desc="latents", mininterval=30)
    return torch.cat([model.encode(to_pixels(batch)).latent.half() for batch in batches])


def quantized(model: VQModelDINOTok, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    outputs = [model.quantize(part.float()) for part in latents.split(100)]
    return torch.cat([o.latents.half() for o in outputs]), torch.cat([o.indices for o in outputs])


@torch.no_grad()
def score(model: VQModelDINOTok, latents: torch.Tensor, pictures: torch.Tensor) -> dict:
    model.eval()
    metrics = ReconstructionMetrics()
    chosen = torch.linspace(0, len(pictures) - 1, min(200, len(pictures))).round().long()
    for part, batch in zip(latents[chosen].split(20), pictures[chosen].split(20), strict=True):
        metrics.update(model.decode(part.float()).sample, to_pixels(batch))
    return metrics.compute()


def train(model: VQModelDINOTok, latents: torch.Tensor, pictures: torch.Tensor, steps: int) -> None:
    parameters = list(model.decoder.parameters())
    optimizer = torch.optim.AdamW(parameters, LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1)
    model.train()
    for step in tqdm(range(steps), mininterval=30):
        generator = torch.Generator().manual_seed(step)
        chosen = torch.randint(len(pictures), (BATCH,), generator=generator).tolist()
        tops, lefts = torch.randint(14 - CROP + 1, (2, BATCH), generator=generator).tolist()
        places, side = list(zip(chosen, tops, lefts, strict=True)), 16 * CROP
        z = torch.stack([latents[i, :, y : y + CROP, x : x + CROP] for i, y, x in places]).float()
        pixels = torch.stack([pictures[i, :, 16 * y : 16 * y + side, 16 * x : 16 * x + side] for i, y, x in places])
        errors = F.mse_loss(model.decode(z).sample, to_pixels(pixels), reduction="none").mean((1, 2, 3))
        loss = (errors + 1e-5).log().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()


def measure(autoencoder, config: dict, data: dict, steps: int) -> dict:
    """One row of the table."""
    torch.manual_seed(0)
    model = VQModelDINOTok.from_autoencoder(autoencoder, **config)
    model.to(memory_format=torch.channels_last)
    start = time.perf_counter()
    parts = (part.float() for part in data["train latents"].split(100))
    model.fit_codebooks(parts, max_tokens=131072, num_iterations=15)
    seconds = time.perf_counter() - start
    train_codes, _ = quantized(model, data["train latents"])
    codes, indices = quantized(model, data["val latents"])
    deep = model.deep_channels
    scale = model.latents_std[:deep].view(1, -1, 1, 1)
    original, approximate = (z[:, :deep].float() * scale for z in (data["val latents"], codes))
    error = (original - approximate).square().sum() / (original - original.mean((0, 2, 3), True)).square().sum()
    counters = [CodeCounter(size) for size in model.codebook_sizes.values()]
    for number, counter in enumerate(counters):
        counter.update(indices[:, number])
    usage = [counter.compute().__dict__ for counter in counters]
    pooled = [z[:, :deep].float().mean((2, 3)) for z in (train_codes, codes)]
    row = {
        "error": float(error),
        "usage": usage,
        "k-NN": knn_accuracy(pooled[0], data["train labels"], pooled[1], data["val labels"]),
        "closed form": score(model, codes, data["val pictures"]),
        "fit seconds": round(seconds, 1),
    }
    train(model, train_codes, data["train pictures"], steps)
    row["trained"] = score(model, codes, data["val pictures"])
    return row


def write_table(results: dict, steps: int) -> None:
    lines = [
        f"| quantizer | error | usage | perplexity | k-NN | PSNR, closed form | PSNR, {steps} steps |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in results["rows"].items():
        used = row["usage"][0]
        lines.append(
            f"| {name} | {row['error']:.3f} | {used['usage']:.1%} of {used['codebook_size']} | "
            f"{used['perplexity']:.0f} | {row['k-NN']:.1%} | {row['closed form']['psnr']:.2f} dB | "
            f"{row['trained']['psnr']:.2f} dB |"
        )
    lines.append(f"| no quantizer | 0 | - | - | {results['k-NN unquantized']:.1%} | {results['psnr']:.2f} dB | - |")
    result_tables.write_table(lines, __doc__, RESULTS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--codes", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=150)
    arguments = parser.parse_args()
    settings = json.loads(json.dumps({**vars(arguments), "learning_rate": LEARNING_RATE, **DECODER}))
    results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    if results.get("settings") != settings:
        results = {"settings": settings, "rows": {}}
    train_pictures, train_labels = load_photographs("train", 2000)
    val_pictures, val_labels = load_photographs("val", 500)
    autoencoder = AutoencoderDINOTok.from_encoder(str(ENCODER), **DECODER)
    autoencoder.fit(to_pixels(part) for part in train_pictures[::4].split(25))
    data = {
        "train pictures": train_pictures,
        "train labels": train_labels,
        "train latents": latents_of(autoencoder, train_pictures),
        "val pictures": val_pictures,
        "val labels": val_labels,
        "val latents": latents_of(autoencoder, val_pictures),
    }
    deep = autoencoder.deep_channels
    pooled = [data[f"{split} latents"][:, :deep].float().mean((2, 3)) for split in ("train", "val")]
    results["k-NN unquantized"] = knn_accuracy(pooled[0], train_labels, pooled[1], val_labels)
    results["psnr"] = score(autoencoder, data["val latents"], val_pictures)["psnr"]
    for name, config in {**semantic_rows(arguments.codes), **codebook_rows()}.items():
        if name not in results["rows"]:
            results["rows"][name] = measure(autoencoder, config, data, arguments.steps)
            RESULTS.write_text(json.dumps(results, indent=2) + "\n")
            write_table(results, arguments.steps)


if __name__ == "__main__":
    main()
