"""How much the texture part, the closed-form start and training each give, on real photographs.

    python benchmarks/autoencoder_controls.py [--steps 2000]

Every tokenizer stands on the same frozen encoder (a supervised ViT-Ti/16, in place of a DINO), has the same
convolutional decoder and sees the same batches: fitted on 500 Imagenette training photographs, trained on all 6,000
(random 96-px crops and flips, squared error, AdamW), scored on 500 validation photographs at 224 px. A decoder this
small, trained this briefly, on a pixel loss only, says how the parts compare; it is not the paper's setting.
Finished rows are kept in the results file and a run that was stopped goes on from its last checkpoint.
"""

import argparse
import json
import os
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from photographs import ENCODER, load_photographs, to_pixels
from tqdm import tqdm

from dinotok import AutoencoderDINOTok
from dinotok.metrics import ReconstructionMetrics

RESULTS = Path(__file__).parent / "results" / "autoencoder_controls.json"
DECODER = {"block_out_channels": (16, 32, 32, 64, 128), "layers_per_block": 1, "norm_num_groups": 8}
ROWS = {
    "full (deep + 64 texture channels of layer 0)": {},
    "deep_only": {"texture_channels": 0},
    "deep_only, sum of the last 4 layers": {"texture_channels": 0, "deep_layers": 4},
}
CROP, BATCH, LEARNING_RATE = 96, 8, 1e-3


@torch.no_grad()
def score(model: AutoencoderDINOTok, pictures: torch.Tensor) -> dict:
    model.eval()
    metrics = ReconstructionMetrics()
    for batch in to_pixels(pictures).split(20):
        metrics.update(model(batch).sample, batch)
    return metrics.compute()


def crops(pictures: torch.Tensor, step: int) -> torch.Tensor:
    """The batch of a step: a function of the step alone, so that every row and every resumed run sees the same."""
    generator = torch.Generator().manual_seed(step)
    chosen = torch.randint(len(pictures), (BATCH,), generator=generator)
    tops, lefts = torch.randint(pictures.shape[2] - CROP + 1, (2, BATCH), generator=generator).tolist()
    batch = torch.stack(
        [pictures[i, :, y : y + CROP, x : x + CROP] for i, y, x in zip(chosen, tops, lefts, strict=True)]
    )
    flips = torch.rand(BATCH, generator=generator) < 0.5
    return to_pixels(torch.where(flips[:, None, None, None], batch.flip(3), batch))


def train(model: AutoencoderDINOTok, pictures: torch.Tensor, steps: int, checkpoint: Path) -> None:
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.05)
    first = 0
    if checkpoint.is_file():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        first = state["step"]
    model.train()
    for step in tqdm(range(first, steps), initial=first, total=steps, mininterval=30):
        batch = crops(pictures, step)
        loss = F.mse_loss(model(batch).sample, batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % 200 == 0:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            torch.save({**state, "schedule": schedule.state_dict()}, checkpoint.with_suffix(".tmp"))
            os.replace(checkpoint.with_suffix(".tmp"), checkpoint)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--checkpoints", type=Path, default=Path("runs/autoencoder_controls"))
    arguments = parser.parse_args()
    arguments.checkpoints.mkdir(parents=True, exist_ok=True)
    settings = {"steps": arguments.steps, "crop": CROP, "batch": BATCH, "learning_rate": LEARNING_RATE, **DECODER}
    settings = json.loads(json.dumps(settings))
    stored = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    rows = stored.get("rows", {}) if stored.get("settings") == settings else {}
    train_set, _ = load_photographs("train")
    validation, _ = load_photographs("val", 500)
    fit_set = train_set[torch.linspace(0, len(train_set) - 1, 500).round().long()]
    for name, config in ROWS.items():
        if name in rows:
            continue
        torch.manual_seed(0)
        model = AutoencoderDINOTok.from_encoder(str(ENCODER), **DECODER, **config)
        model.to(memory_format=torch.channels_last)  # a fifth faster on a CPU
        start = time.perf_counter()
        model.fit(to_pixels(part) for part in fit_set.split(25))
        fit_seconds = time.perf_counter() - start
        closed_form = score(model, validation)
        start = time.perf_counter()
        train(model, train_set, arguments.steps, arguments.checkpoints / f"{list(ROWS).index(name)}.pt")
        trained = score(model, validation)
        seconds = {"fit": round(fit_seconds), "training": round(time.perf_counter() - start)}
        rows[name] = {
            "latent_channels": model.config.latent_channels,
            "closed form": closed_form,
            "trained": trained,
            "seconds": seconds,
        }
        RESULTS.write_text(json.dumps({"settings": settings, "rows": rows}, indent=2) + "\n")
    table = [
        f"| tokenizer | channels | closed form: PSNR (pooled), SSIM | {arguments.steps} steps: PSNR (pooled), SSIM |",
        "|---|---|---|---|",
    ]
    for name, row in rows.items():
        cells = [
            f"{row[k]['psnr']:.2f} ({row[k]['psnr_pooled']:.2f}) dB, {row[k]['ssim']:.3f}"
            for k in ("closed form", "trained")
        ]
        table.append(f"| {name} | {row['latent_channels']} | {cells[0]} | {cells[1]} |")
    print("\n".join(table))
    RESULTS.with_suffix(".md").write_text(f"{__doc__.splitlines()[0]}\n\n" + "\n".join(table) + "\n")


if __name__ == "__main__":
    main()
