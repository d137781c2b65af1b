"""Which latents are easy to generate: the same small denoiser, the same steps, on three kinds of latents.

    python benchmarks/latent_study.py --train runs/latents/train128 \
        --deep-only runs/dinotok-tiny-deep-only/tokenizer [--steps 500]

    DINO-Tok     the deep and the texture channels of `dinotok-tiny-ae`
    deep only    the deep channels alone, and a decoder trained alike for them
    patch PCA    no encoder: the first 96 principal components of patches of pixels

All latents have unit variance in every channel. The denoiser is that of `dinotok_tiny_denoiser.json` with the channels
of its latents, the loss the plain velocity's, times shifted by the latents' size. Losses of different latents say
nothing; what is compared are pictures: FID-768 (768-d features of the FID Inception: not the FID of papers) against
2,000 validation photographs reduced to 128 pixels, and class accuracy (k-NN of the features of a supervised
ViT-Ti/16, the bank being 2,000 training photographs). The ceiling of each: 1,000 training photographs that went
through latents and decoder. Finished rows are kept in the results file.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import result_tables
import torch
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from generation_study import Judge, Reference
from patch_codes import PATCH, PatchCodes
from photographs import to_pixels
from tqdm import tqdm

from dinotok import DiffusionTransformer2DModel
from dinotok.diffusion_training import DenoisingObjective, make_draws
from dinotok.flow_matching import dimension_shift, sigma_grid
from dinotok.hub import load_tokenizer
from dinotok.latent_caches import LatentLoader, open_latent_cache
from dinotok.training import read_json
from training_scripts.train_diffusion import DiffusionOptions

RESULTS = Path(__file__).parent / "results" / "latent_study.json"
RECIPE = Path(__file__).parents[1] / "training_scripts" / "recipes" / "dinotok_tiny_denoiser.json"
BATCH, EMA_DECAY = 64, 0.99
OPTIONS = DiffusionOptions(model="", dataset="", output_dir="", learning_rate=1e-3)
SAMPLING_STEPS, GUIDANCE_SCALE, SIZE, NUM_CLASSES = 25, 2.0, 128, 10


@dataclass
class Latents:
    """One kind of latents.

    Attributes:
        train: Rows `(N, C, h, w)`.
        labels: `(N,)`.
        encode: Pixels to latents.
        decode: Latents to pixels in [-1, 1].
    """

    train: torch.Tensor
    labels: torch.Tensor
    encode: Callable[[torch.Tensor], torch.Tensor]
    decode: Callable[[torch.Tensor], torch.Tensor]


def read_cache(folder: str) -> tuple[torch.Tensor, torch.Tensor]:
    """All latents of a cache, float16, and their labels."""
    batches = list(LatentLoader(open_latent_cache(folder), 512).once())
    return torch.cat([b["latents"].half() for b in batches]), torch.cat([b["labels"] for b in batches])


def latents_of(name: str, arguments: argparse.Namespace) -> Latents:
    """Make one of the three kinds."""
    if name == "patch PCA":
        grid = [SIZE // PATCH] * 2
        patches = PatchCodes([], grid)
        project = patches.latents
        pictures, labels = patches.sets["train"]
        rows = torch.cat([project(part) for part in pictures.split(500)])
        std = rows.std((0, 2, 3), keepdim=True)
        return Latents(
            (rows / std).half(),
            labels,
            lambda pixels: project(((pixels + 1) * 127.5).round().byte()) / std,
            lambda latents: patches.pixels((latents * std).permute(0, 2, 3, 1)),
        )
    train, labels = read_cache(arguments.train)
    model = load_tokenizer("dinotok-tiny-ae" if name == "DINO-Tok" else arguments.deep_only)
    if name == "deep only":
        whole, deep = load_tokenizer("dinotok-tiny-ae"), model.config.latent_channels
        scale = whole.latents_std[:deep] / model.latents_std  # the same features, normalised by other statistics
        shift = (whole.latents_mean[:deep] - model.latents_mean) / model.latents_std

        def convert(latents: torch.Tensor) -> torch.Tensor:
            return latents[:, :deep].float() * scale[:, None, None].float() + shift[:, None, None].float()

        probe = torch.rand(2, 3, SIZE, SIZE) * 2 - 1
        torch.testing.assert_close(model.encode(probe).latent, convert(whole.encode(probe).latent), atol=1e-2, rtol=0)
        train = convert(train).half()
    return Latents(
        train,
        labels,
        lambda pixels: model.encode(pixels).latent,
        lambda latents: model.decode(latents).sample.clamp(-1, 1),
    )


def train_denoiser(latents: Latents, steps: int, name: str) -> tuple[DiffusionTransformer2DModel, float]:
    """Train; return the averaged weights and the CPU seconds of a step."""
    torch.manual_seed(0)
    shape = latents.train.shape[1:]
    config = {**read_json(RECIPE), "in_channels": shape[0], "sample_size": shape[1], "num_classes": NUM_CLASSES}
    model = DiffusionTransformer2DModel.from_config(config)
    objective = DenoisingObjective(model).train()
    optimizer = torch.optim.AdamW(model.parameters(), OPTIONS.learning_rate, weight_decay=0.0)
    scheduler = get_scheduler("cosine", optimizer, num_warmup_steps=steps // 20, num_training_steps=steps)
    ema = EMAModel(model.parameters(), decay=EMA_DECAY)
    generator = torch.Generator().manual_seed(0)
    start = time.process_time()
    for step in tqdm(range(steps), desc=name, mininterval=30):
        rows = torch.randint(len(latents.train), (BATCH,), generator=generator)
        clean = latents.train[rows].float()
        draws = make_draws(OPTIONS, clean, latents.labels[rows], NUM_CLASSES, step, rank=0)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = objective(clean, draws).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        ema.step(model.parameters())
        optimizer.zero_grad()
    seconds = (time.process_time() - start) / steps
    ema.copy_to(model.parameters())
    return model.eval(), seconds


@torch.no_grad()
def sample(model: DiffusionTransformer2DModel, labels: torch.Tensor, scale: float, seed: int) -> torch.Tensor:
    """Return latents, by Euler steps."""
    shape = (len(labels), model.config.in_channels, *[SIZE // PATCH] * 2)
    x, null = torch.randn(shape, generator=torch.Generator().manual_seed(seed)), torch.full_like(labels, NUM_CLASSES)
    levels = sigma_grid(SAMPLING_STEPS, dimension_shift(torch.Size(shape[1:]).numel()))
    for level, following in zip(levels[:-1], levels[1:], strict=True):
        time_now = torch.full((len(labels),), level)
        velocity = model(x, time_now, labels).sample
        if scale != 1:
            free = model(x, time_now, null).sample
            velocity = free + scale * (velocity - free)
        x = x + (following - level) * velocity
    return x


@torch.no_grad()
def pictures_of(latents: Latents, rows: torch.Tensor) -> torch.Tensor:
    """Decode latents to uint8 pictures."""
    return torch.cat([((latents.decode(part) + 1) * 127.5).round().byte() for part in rows.split(25)])


def measure(name: str, arguments: argparse.Namespace, judge: Judge, reference: Reference) -> dict:
    """Train, draw and score one kind of latents."""
    latents = latents_of(name, arguments)

    def scores(rows: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
        features = judge.describe(pictures_of(latents, rows), name)
        return {
            "fid_768_val": reference.distance(features, "val"),
            "accuracy": reference.accuracy(features, labels),
        }

    with torch.no_grad():
        photographs = torch.cat([latents.encode(to_pixels(part)) for part in reference.pictures["train"].split(25)])
    model, seconds = train_denoiser(latents, arguments.steps, name)
    labels = torch.arange(arguments.count) % NUM_CLASSES
    row = {"channels": latents.train.shape[1], "cpu_seconds_per_step": seconds, "settings": {}}
    for scale in (1.0, GUIDANCE_SCALE):
        drawn = [sample(model, part, scale, seed) for seed, part in enumerate(labels.split(50))]
        row["settings"][f"guidance {scale:g}"] = scores(torch.cat(drawn), labels)
    row["photographs"] = scores(photographs, reference.labels["train"])
    return row


def write_table(results: dict) -> None:
    lines = [
        "| latents | channels | pictures | FID-768, val | class accuracy | CPU s a training step |",
        "|---|---|---|---|---|---|",
    ]
    for name, entry in results["rows"].items():
        rows = {**entry["settings"], "photographs through them": entry["photographs"]}
        for label, row in rows.items():
            lines.append(
                f"| {name} | {entry['channels']} | {label} | {row['fid_768_val']:.3f} | {row['accuracy']:.1%} | "
                f"{entry['cpu_seconds_per_step']:.2f} |"
            )
    result_tables.write_table(lines, __doc__, RESULTS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", required=True, help="latents of dinotok-tiny-ae, from cache_latents.py")
    parser.add_argument("--deep-only", required=True, help="the tokenizer without texture")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--count", type=int, default=1000, help="pictures of each setting")
    parser.add_argument("--cache", type=Path, default=Path("runs") / "generation_study", help="of features")
    arguments = parser.parse_args()
    settings = {"steps": arguments.steps, "batch": BATCH, "count": arguments.count}
    results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    if results.get("settings") != settings:
        results = {"settings": settings, "rows": {}}
    judge = Judge()
    reference = Reference(judge, (SIZE, SIZE), {"val": 2000, "train": 1000, "bank": 2000}, arguments.cache)
    for name in ("DINO-Tok", "deep only", "patch PCA"):
        if name not in results["rows"]:
            results["rows"][name] = measure(name, arguments, judge, reference)
            result_tables.save(results, RESULTS)
    write_table(results)


if __name__ == "__main__":
    main()
