"""dinotok-tiny, the models in the package, on the 2,000 Imagenette validation photographs.

    python benchmarks/dinotok_tiny.py [--count 2000]

Reconstruction at 224 and 128 pixels: PSNR, mean over pictures and pooled, SSIM, LPIPS of the nets named, the use of
the codebooks, and at 224 pixels FID-768 of 1,000 at most (768-d features of the FID Inception: not the FID of papers).
Two sizes that are not square, and the controls (closed-form starts, and deep features only, trained alike), are scored
on a quarter of the photographs. k-NN accuracy (k = 20, cosine) of the mean of a picture's latents at 224 pixels, the
bank being 2,000 training photographs; of the teacher that the encoder was distilled from, too.

Finished rows are kept in the results file.
"""

import argparse
import json
from pathlib import Path

import result_tables
import torch
from photographs import DATA, ENCODER, load_photographs, to_pixels
from tqdm import tqdm

from dinotok import FrozenEncoder
from dinotok.hub import load_tokenizer
from dinotok.inception import InceptionFeatures
from dinotok.lpips import LPIPS
from dinotok.metrics import ReconstructionMetrics, fid
from dinotok.models.discrete import DiscreteTokenizer
from dinotok.models.tokenizer_model import TokenizerModel
from dinotok.probes import knn_accuracy
from dinotok.reports import usage_of
from dinotok.transcoding import code_counters

RESULTS = Path(__file__).parent / "results" / "dinotok_tiny.json"
RUNS = Path("runs")
MODELS = {
    "dinotok-tiny-ae": "dinotok-tiny-ae",
    "its closed-form start": RUNS / "dinotok-tiny-ae" / "start",
    "deep only, trained alike": RUNS / "dinotok-tiny-deep-only" / "tokenizer",
    "dinotok-tiny-vq": "dinotok-tiny-vq",
    "its closed-form start (VQ)": RUNS / "dinotok-tiny-vq" / "start",
}
SIZES = [(224, 224), (128, 128), (224, 160), (144, 224)]
BATCH = 25


def crop(pictures: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Centre crop; 128 pixels are the whole photograph, reduced."""
    if size == (128, 128):
        return torch.nn.functional.interpolate(pictures, size=size, mode="bicubic", antialias=True)
    top, left = ((side - wanted) // 2 for side, wanted in zip(pictures.shape[2:], size, strict=True))
    return pictures[:, :, top : top + size[0], left : left + size[1]]


@torch.no_grad()
def reconstruct(model: TokenizerModel, pixels: torch.Tensor, counters: dict) -> torch.Tensor:
    latents = model.encode(pixels).latent
    if isinstance(model, DiscreteTokenizer):
        found = model.quantize(latents)
        latents = found.latents
        for index, counter in enumerate(counters.values()):
            counter.update(found.indices[:, index])
    return model.decode(latents).sample.clamp(-1, 1)


def score(model: TokenizerModel, pictures: torch.Tensor, size: tuple[int, int], nets: list[LPIPS]) -> dict:
    """Reconstruction metrics of one row."""
    metrics, counters = [ReconstructionMetrics() for _ in nets], code_counters(model)
    for part in tqdm(pictures.split(BATCH), desc=str(size), mininterval=30):
        pixels = to_pixels(crop(part, size))
        sample = reconstruct(model, pixels, counters)
        for one, net in zip(metrics, nets, strict=True):
            one.update(sample, pixels, net)
    row = {key: value for one in metrics for key, value in one.compute().items()}
    row |= {f"{name}_usage": usage["usage"] for name, usage in usage_of(counters).items()}
    return row | {f"{name}_perplexity": usage["perplexity"] for name, usage in usage_of(counters).items()}


@torch.no_grad()
def fid_768(model: TokenizerModel, pictures: torch.Tensor, features: InceptionFeatures) -> float:
    """FID-768 between photographs and their reconstructions."""
    real = [to_pixels(part) for part in pictures.split(BATCH)]
    return fid(features, real, (reconstruct(model, pixels, code_counters(model)) for pixels in real))


@torch.no_grad()
def probe(train: tuple, val: tuple) -> dict[str, float]:
    """k-NN accuracy of the teacher's features, the latents' parts and the semantic codes."""
    discrete, teacher = load_tokenizer("dinotok-tiny-vq"), FrozenEncoder.from_encoder(str(ENCODER))

    def represent(pictures: torch.Tensor) -> dict[str, torch.Tensor]:
        rows: dict[str, list[torch.Tensor]] = {}
        for part in pictures.split(BATCH):
            pixels, deep = to_pixels(part), discrete.deep_channels
            latents = discrete.encode(pixels).latent
            grids = {
                "teacher (supervised ViT-Ti/16)": teacher(pixels)[0],
                "dinotok-tiny, deep latents": latents[:, :deep],
                "dinotok-tiny, semantic codes": discrete.quantize(latents).latents[:, :deep],
                "dinotok-tiny, texture latents": latents[:, deep:],
            }
            for name, grid in grids.items():
                rows.setdefault(name, []).append(grid.mean((2, 3)))
        return {name: torch.cat(parts) for name, parts in rows.items()}

    bank, queries = represent(train[0]), represent(val[0])
    return {name: knn_accuracy(bank[name], train[1], queries[name], val[1]) for name in bank}


def write_table(results: dict) -> None:
    lines = [
        "| model | size | photographs | PSNR (pooled) | SSIM | LPIPS alex, squeeze | FID-768 | codes used |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, rows in results["reconstruction"].items():
        for size, row in rows.items():
            used = [f"{row[f'{book}_usage']:.1%}" for book in ("semantic", "texture") if f"{book}_usage" in row]
            fid_cell = f"{row['fid_768']:.3f}" if "fid_768" in row else "-"
            lines.append(
                f"| {name} | {size} | {row['num_images']} | {row['psnr']:.2f} ({row['psnr_pooled']:.2f}) dB | "
                f"{row['ssim']:.3f} | {row['lpips_alex']:.3f}, {row['lpips_squeeze']:.3f} | {fid_cell} | "
                f"{', '.join(used) or '-'} |"
            )
    lines += ["", "| k-NN of the mean over a picture | accuracy |", "|---|---|"]
    lines += [f"| {name} | {value:.1%} |" for name, value in results.get("k-NN", {}).items()]
    result_tables.write_table(lines, __doc__, RESULTS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000)
    arguments = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    if results.get("count") != arguments.count:
        results = {"count": arguments.count, "reconstruction": {}}
    val = load_photographs("val", arguments.count)
    weights = DATA / "weights"
    nets = [LPIPS.from_file(weights / f"lpips_{net}_v0.1_fp32.safetensors") for net in ("alex", "squeeze")]
    features = InceptionFeatures.from_file(weights / "fid_inception_v3_2015_to_mixed7a_fp16.safetensors")
    quarter = val[0][::4]
    for name, path in MODELS.items():
        if isinstance(path, Path) and not path.is_dir():
            print(f"{name}: {path} is not there; make it with the commands of training_scripts/README.md.")
            continue
        model = load_tokenizer(str(path))
        rows = results["reconstruction"].setdefault(name, {})
        for size in SIZES if isinstance(path, str) else SIZES[:1]:
            label = "x".join(map(str, size))
            if label not in rows:
                whole = isinstance(path, str) and size in SIZES[:2]
                rows[label] = score(model, val[0] if whole else quarter, size, nets)
                result_tables.save(results, RESULTS)
        if isinstance(path, str) and "fid_768" not in rows["224x224"]:
            rows["224x224"]["fid_768"] = fid_768(model, val[0][:: max(1, len(val[0]) // 1000)], features)
            result_tables.save(results, RESULTS)
    if "k-NN" not in results:
        results["k-NN"] = probe(load_photographs("train", 2000), val)
        result_tables.save(results, RESULTS)
    write_table(results)


if __name__ == "__main__":
    main()
