"""How much the texture part, the closed-form start and training each give, on real photographs.

    python benchmarks/autoencoder_controls.py [--steps 2000]

Every tokenizer stands on the same frozen encoder (a supervised ViT-Ti/16, in place of a DINO), has the same
convolutional decoder and sees the same batches: fitted on 500 Imagenette training photographs, trained on all 6,000,
scored on 500 validation photographs, all at 224 px. The encoder's features are computed once; a step decodes 8 x 8
latents of 8 photographs and minimises the mean logarithm of their squared errors, that is, it maximises the PSNR which
the table shows. A decoder this small, trained this briefly and on pixels only says how the parts compare; it is not
the paper's setting. Finished rows are kept in the results file; a run that was stopped goes on from its checkpoint.
"""

import argparse
import json
import os
import time
from pathlib import Path

import result_tables
import torch
import torch.nn.functional as F
from photographs import ENCODER, load_photographs, to_pixels
from tqdm import tqdm

from dinotok import AutoencoderDINOTok
from dinotok.metrics import ReconstructionMetrics

RESULTS = Path(__file__).parent / "results" / "autoencoder_controls.json"
DECODER = {"block_out_channels": (16, 32, 32, 64, 128), "layers_per_block": 1, "norm_num_groups": 8}
CROP, BATCH, LEARNING_RATE, LINEAR_LEARNING_RATE = 8, 8, 1e-3, 1e-5
FULL = "full: deep + 64 texture channels of layer 0"
ROWS = {
    FULL: {},
    "full, projection by PCA": {"projection": "pca"},
    "deep_only": {"texture_channels": 0},
    "deep_only, sum of the last 4 layers": {"texture_channels": 0, "deep_layers": 4},
}
TRAINED = (FULL, "deep_only")


@torch.no_grad()
def score(model: AutoencoderDINOTok, pictures: torch.Tensor) -> dict:
    model.eval()
    metrics = ReconstructionMetrics()
    for batch in to_pixels(pictures).split(20):
        metrics.update(model(batch).sample, batch)
    return metrics.compute()


@torch.no_grad()
def cache_features(model: AutoencoderDINOTok, pictures: torch.Tensor) -> torch.Tensor:
    """Shallow and deep grids `(N, 2, D, h, w)` of all photographs, float16: frozen, so one pass is enough."""
    batches = tqdm(pictures.split(50), desc="features", mininterval=30)
    return torch.cat([torch.stack(model.encoder(to_pixels(b), [0, 12]), 1).half() for b in batches])


def crops(features: torch.Tensor, pictures: torch.Tensor, step: int) -> tuple[torch.Tensor, ...]:
    """The batch of a step: a function of the step alone, so every row and every resumed run sees the same."""
    generator = torch.Generator().manual_seed(step)
    chosen = torch.randint(len(pictures), (BATCH,), generator=generator).tolist()
    tops, lefts = torch.randint(14 - CROP + 1, (2, BATCH), generator=generator).tolist()
    places = list(zip(chosen, tops, lefts, strict=True))
    grids = torch.stack([features[i, :, :, y : y + CROP, x : x + CROP] for i, y, x in places]).float()
    side = 16 * CROP
    pixels = torch.stack([pictures[i, :, 16 * y : 16 * y + side, 16 * x : 16 * x + side] for i, y, x in places])
    return grids[:, 0], grids[:, 1], to_pixels(pixels)


def reconstruct(model: AutoencoderDINOTok, shallow: torch.Tensor, deep: torch.Tensor) -> torch.Tensor:
    """What `forward` does after the frozen encoder."""
    parts = [deep, model.texture_projection(shallow)] if model.texture_channels else [deep]
    latents = model.latents_affine.normalize(torch.cat(parts, 1))
    return model.decode(latents).sample


def train(model: AutoencoderDINOTok, features: torch.Tensor, pictures: torch.Tensor, steps: int, file: Path) -> None:
    convolutional = list(model.decoder.parameters())
    linear = [p for name, p in model.named_parameters() if p.requires_grad and not name.startswith("decoder.")]
    groups = [{"params": convolutional}, {"params": linear, "lr": LINEAR_LEARNING_RATE}]
    optimizer = torch.optim.AdamW(groups, LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [LEARNING_RATE, LINEAR_LEARNING_RATE], total_steps=steps, pct_start=0.05, cycle_momentum=False
    )
    first = 0
    if file.is_file():
        state = torch.load(file, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        first = state["step"]
    model.train()
    for step in tqdm(range(first, steps), initial=first, total=steps, mininterval=30):
        shallow, deep, pixels = crops(features, pictures, step)
        errors = F.mse_loss(reconstruct(model, shallow, deep), pixels, reduction="none").mean((1, 2, 3))
        loss = (errors + 1e-5).log().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(convolutional + linear, 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % 250 == 0:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            torch.save({**state, "schedule": schedule.state_dict()}, file.with_suffix(".tmp"))
            os.replace(file.with_suffix(".tmp"), file)


def write_table(rows: dict, steps: int) -> None:
    def cell(scores: dict | None) -> str:
        if scores is None:
            return "-"
        return f"{scores['psnr']:.2f} ({scores['psnr_pooled']:.2f}) dB, {scores['ssim']:.3f}"

    table = [
        f"| tokenizer | channels | closed form: PSNR (pooled), SSIM | {steps} steps: PSNR (pooled), SSIM |",
        "|---|---|---|---|",
    ]
    for name, row in rows.items():
        table.append(
            f"| {name} | {row['latent_channels']} | {cell(row['closed form'])} | {cell(row.get('trained'))} |"
        )
    result_tables.write_table(table, __doc__, RESULTS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--checkpoints", type=Path, default=Path("runs/autoencoder_controls"))
    arguments = parser.parse_args()
    arguments.checkpoints.mkdir(parents=True, exist_ok=True)
    settings = {"steps": arguments.steps, "crop": CROP, "batch": BATCH, "learning_rate": LEARNING_RATE}
    settings = json.loads(json.dumps({**settings, "linear_learning_rate": LINEAR_LEARNING_RATE, **DECODER}))
    stored = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    rows = stored.get("rows", {}) if stored.get("settings") == settings else {}
    train_set, _ = load_photographs("train")
    validation, _ = load_photographs("val", 500)
    fit_set = train_set[torch.linspace(0, len(train_set) - 1, 500).round().long()]
    features = None
    for name, config in ROWS.items():
        if name in rows:
            continue
        torch.manual_seed(0)
        fit_arguments = {"projection": config["projection"]} if "projection" in config else {}
        config = {key: value for key, value in config.items() if key != "projection"}
        model = AutoencoderDINOTok.from_encoder(str(ENCODER), **DECODER, **config)
        model.to(memory_format=torch.channels_last)  # a fifth faster on a CPU
        start = time.perf_counter()
        model.fit((to_pixels(part) for part in fit_set.split(25)), **fit_arguments)
        row = {"latent_channels": model.config.latent_channels, "fit seconds": round(time.perf_counter() - start, 1)}
        row["closed form"] = score(model, validation)
        if name in TRAINED:
            features = cache_features(model, train_set) if features is None else features
            start = time.perf_counter()
            train(model, features, train_set, arguments.steps, arguments.checkpoints / f"{list(ROWS).index(name)}.pt")
            row["training seconds"] = round(time.perf_counter() - start)
            row["trained"] = score(model, validation)
        rows[name] = row
        RESULTS.write_text(json.dumps({"settings": settings, "rows": rows}, indent=2) + "\n")
        write_table(rows, arguments.steps)


if __name__ == "__main__":
    main()
