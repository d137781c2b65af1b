"""Which encoder, which shallow layer, how many texture channels, which rank: tokenizers compared in closed form.

    python benchmarks/tokenizer_studies.py encoders [--encoders NAME ...] | texture | fusion | rank

No training: every row is the tokenizer that `AutoencoderDINOTok.fit` makes - deep features, a projection of a shallow
layer by reduced-rank regression, and the linear path from it to pixels (from the deep part, where there is no
texture). So a row takes seconds to a minute, and says what the features hold, not what a trained decoder makes of
them. All on Imagenette at 224 pixels: fitted on `--train` photographs, which are the bank of the k-NN probe (k = 20,
cosine, on the mean of normalised latents) too; k-NN on `--validation` photographs, reconstructions on
`--reconstructions` of them. Finished rows are kept in the
results file, and their tables written into docs/studies.md.

    encoders  what each pre-training gives: k-NN of the deep part, and pixels without and with 64 texture channels.
              `random:NAME` is the architecture of NAME with random weights, the control.
    texture   the shallow layer, 0 to 4, by the width of the texture part.
    fusion    the sum of the last k layers (RAEv2, arXiv 2605.18324) beside deep + texture.
    rank      the dominant subspace of the semantic codebook; pixels are those that the code alone explains.
"""

import argparse
import json
import os
from pathlib import Path

import torch
from closed_form import BATCH, PATCH, RIDGE, Grids, Photographs, Survey, texture_of
from photographs import DATA, ENCODER, load_photographs, to_pixels

from dinotok import FrozenEncoder
from dinotok.folders import writing
from dinotok.lpips import LPIPS
from dinotok.models.encoders import load_pretrained_encoder
from dinotok.models.quantizers import CodeCounter, DominantSubspaceQuantizer
from dinotok.models.tokenizer_model import channels_last_rows
from dinotok.statistics import StreamingMoments

RESULTS = Path(__file__).parent / "results" / "tokenizer_studies.json"
PAGE = Path(__file__).parents[1] / "docs" / "studies.md"
SQUEEZE = DATA / "weights" / "lpips_squeeze_v0.1_fp32.safetensors"
CODES, MAX_TOKENS = 1024, 20_000
LAYERS, WIDTHS, SUMS, RANKS = range(5), (16, 32, 64, 128), (1, 2, 4, 8), (4, 8, 16, 32, 64, 128)
TITLES = {
    "encoders": "encoder | deep channels | k-NN, deep | deep alone: PSNR (pooled), SSIM, LPIPS | "
    "with 64 texture channels: PSNR (pooled), SSIM, LPIPS",
    "texture": "shallow layer | texture channels | PSNR (pooled) | SSIM | LPIPS | k-NN, texture | k-NN, all latents",
    "fusion": "latents | channels | PSNR (pooled) | SSIM | LPIPS | k-NN, all latents",
    "rank": "rank | error | codes used | perplexity | k-NN | PSNR (pooled) of the code alone",
}


def load_encoder(name: str) -> FrozenEncoder:
    """Load an encoder, or build `random:NAME`."""
    if not name.startswith("random:"):
        return FrozenEncoder.from_encoder(name, patch_size=PATCH)
    found = load_pretrained_encoder(name.removeprefix("random:"))
    torch.manual_seed(0)
    return FrozenEncoder(found.config, found.image_mean, found.image_std, PATCH)


def short_name(name: str) -> str:
    prefix, _, folder = name.rpartition(":")
    short = Path(folder).name if os.path.isdir(folder) else folder
    return f"{short}, random weights" if prefix else short


def encoder_row(name: str, photographs: Photographs, lpips: LPIPS) -> dict:
    encoder = load_encoder(name)

    def measure(pixels: torch.Tensor) -> Grids:
        return dict(zip(("deep", "shallow"), encoder(pixels, [encoder.num_layers, 0]), strict=True))

    survey = Survey(measure, photographs)
    _, weight, bias = texture_of(survey.moments["shallow"], 64)
    maps = {"deep": ("deep", *survey.moments["deep"].ridge(alpha=RIDGE)), "texture": ("shallow", weight, bias)}
    scores = survey.reconstruct(maps, lpips)
    return {"channels": encoder.hidden_size, "k-NN": survey.accuracy([("deep", None)]), **scores}


def texture_rows(name: str, photographs: Photographs, lpips: LPIPS) -> dict[str, dict]:
    encoder = load_encoder(name)
    grids = {"deep": encoder.num_layers, **{f"layer {layer}": layer for layer in LAYERS}}
    survey = Survey(lambda pixels: dict(zip(grids, encoder(pixels, list(grids.values())), strict=True)), photographs)
    maps, rows = {}, {}
    for layer in LAYERS:
        for width in WIDTHS:
            key, grid = f"layer {layer}, {width} channels", f"layer {layer}"
            projection, *linear = texture_of(survey.moments[grid], width)
            maps[key] = (grid, *linear)
            accuracies = {
                "k-NN texture": survey.accuracy([(grid, projection)]),
                "k-NN": survey.accuracy([("deep", None), (grid, projection)]),
            }
            rows[key] = {"layer": layer, "channels": width, **accuracies}
    return {key: rows[key] | scores for key, scores in survey.reconstruct(maps, lpips).items()}


def fusion_rows(name: str, photographs: Photographs, lpips: LPIPS) -> dict[str, dict]:
    encoder = load_encoder(name)
    sums = [number for number in SUMS if number <= encoder.num_layers]

    def measure(pixels: torch.Tensor) -> Grids:
        first, shallow = encoder.last_layers_sum(pixels, sums[0], [0])
        others = {f"sum of {number}": encoder.last_layers_sum(pixels, number)[0] for number in sums[1:]}
        return {f"sum of {sums[0]}": first, **others, "shallow": shallow}

    survey, maps, rows = Survey(measure, photographs), {}, {}
    for number in sums:
        key, grid = f"sum of the last {number}" if number > 1 else "last layer", f"sum of {number}"
        maps[key] = (grid, *survey.moments[grid].ridge(alpha=RIDGE))
        rows[key] = {"channels": encoder.hidden_size, "k-NN": survey.accuracy([(grid, None)])}
    for width in WIDTHS[:3]:
        key = f"last layer + {width} texture channels of layer 0"
        projection, *linear = texture_of(survey.moments["shallow"], width)
        maps[key] = ("shallow", *linear)
        accuracy = survey.accuracy([("sum of 1", None), ("shallow", projection)])
        rows[key] = {"channels": encoder.hidden_size + width, "k-NN": accuracy}
    return {key: rows[key] | scores for key, scores in survey.reconstruct(maps, lpips).items()}


def rank_rows(name: str, photographs: Photographs, lpips: LPIPS) -> dict[str, dict]:
    encoder = load_encoder(name)
    tokens = deep_tokens(encoder, photographs.train[0])
    moments = StreamingMoments(encoder.hidden_size).update(tokens)
    generator = torch.Generator().manual_seed(0)
    sample = tokens[torch.randperm(len(tokens), generator=generator)[:MAX_TOKENS]]
    quantizers = {}
    for rank in (rank for rank in RANKS if rank < encoder.hidden_size):
        quantizer = DominantSubspaceQuantizer(encoder.hidden_size, CODES, rank).set_pca(moments.pca(), moments.count)
        quantizers[str(rank)] = quantizer.fit(sample, generator, num_iterations=10)

    def measure(pixels: torch.Tensor) -> Grids:
        deep = encoder(pixels)[0]
        return {key: quantizer(deep).latents for key, quantizer in quantizers.items()}

    survey = Survey(measure, photographs)
    found = survey.reconstruct({key: (key, *survey.moments[key].ridge(alpha=RIDGE)) for key in quantizers}, lpips)
    validation = deep_tokens(encoder, photographs.validation[0])
    for key, quantizer in quantizers.items():
        found[key] |= {"k-NN": survey.accuracy([(key, None)]), **usage(quantizer, validation)}
    return found


def deep_tokens(encoder: FrozenEncoder, pictures: torch.Tensor) -> torch.Tensor:
    return torch.cat([channels_last_rows(encoder(to_pixels(part))[0]) for part in pictures.split(BATCH)])


def usage(quantizer: DominantSubspaceQuantizer, tokens: torch.Tensor) -> dict:
    """Use of the codes by tokens `(N, D)`, and the error relative to their variance."""
    output = quantizer(tokens.T[None, :, :, None])
    used = CodeCounter(CODES).update(output.indices).compute()
    error = (tokens.T - output.latents[0, :, :, 0]).square().sum() / (tokens - tokens.mean(0)).square().sum()
    return {"error": float(error), "usage": used.usage, "perplexity": used.perplexity}


def tables(results: dict) -> dict[str, list[str]]:
    """The Markdown tables of what has been measured, by study."""

    def decibel(row: dict) -> str:
        return f"{row['psnr']:.2f} ({row['psnr_pooled']:.2f}) dB"

    def pixels(row: dict, separator: str = " | ") -> str:
        return separator.join([decibel(row), f"{row['ssim']:.3f}", f"{row['lpips_squeeze']:.3f}"])

    cells = {
        "encoders": lambda r: (
            f"{r['channels']} | {r['k-NN']:.1%} | {pixels(r['deep'], ', ')} | {pixels(r['texture'], ', ')}"
        ),
        "texture": lambda r: f"{r['channels']} | {pixels(r)} | {r['k-NN texture']:.1%} | {r['k-NN']:.1%}",
        "fusion": lambda r: f"{r['channels']} | {pixels(r)} | {r['k-NN']:.1%}",
        "rank": lambda r: (
            f"{r['error']:.3f} | {r['usage']:.1%} of {CODES} | {r['perplexity']:.0f} | {r['k-NN']:.1%} | {decibel(r)}"
        ),
    }
    sizes = results["settings"]
    found = {
        "sizes": [f"| {' | '.join(sizes)} |", "|" + "---|" * len(sizes), f"| {' | '.join(map(str, sizes.values()))} |"]
    }
    for study, rows in results["studies"].items():
        head = [f"| {TITLES[study]} |", "|" + "---|" * (TITLES[study].count(" | ") + 1)]
        found[study] = head + [f"| {row.get('layer', key)} | {cells[study](row)} |" for key, row in rows.items()]
    return found


def update_page(results: dict) -> None:
    """Put the tables into docs/studies.md, each below its `<!-- name -->`, in place of the one that is there."""
    found, inside = [], False
    wanted = {f"<!-- {name} -->": table for name, table in tables(results).items()}
    for line in PAGE.read_text("utf-8").splitlines():
        inside = inside and line.startswith("|")
        if not inside:
            found += [line, *wanted.get(line, [])]
            inside = line in wanted
    with writing(PAGE) as temporary:
        temporary.write_text("\n".join(found) + "\n", "utf-8")


def save(results: dict) -> None:
    with writing(RESULTS) as temporary:
        temporary.write_text(json.dumps(results, indent=2) + "\n", "utf-8")
    update_page(results)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", nargs="+", choices=list(TITLES))
    known = [str(ENCODER), "dinotok-tiny-encoder", f"random:{ENCODER}"]
    parser.add_argument("--encoders", nargs="+", default=known, help="folders, repositories, random:NAME")
    parser.add_argument("--encoder", default=str(ENCODER), help="of the other studies")
    parser.add_argument("--train", type=int, default=100)
    parser.add_argument("--validation", type=int, default=100)
    parser.add_argument("--reconstructions", type=int, default=8)
    arguments = parser.parse_args()
    sizes = {"fitted on": "train", "k-NN of": "validation", "reconstructed": "reconstructions"}
    settings = {"encoder": short_name(arguments.encoder)} | {key: getattr(arguments, sizes[key]) for key in sizes}
    results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"settings": settings, "studies": {}}
    if results["settings"] != settings:
        raise SystemExit(f"{RESULTS} has rows for {results['settings']}, not {settings}: move it away.")
    photographs = Photographs(
        load_photographs("train", arguments.train),
        load_photographs("val", arguments.validation),
        arguments.reconstructions,
    )
    lpips = LPIPS.from_file(SQUEEZE)
    studies = {"texture": texture_rows, "fusion": fusion_rows, "rank": rank_rows}
    for study in arguments.studies:
        rows = results["studies"].setdefault(study, {})
        if study == "encoders":
            for name in arguments.encoders:
                if short_name(name) not in rows:
                    rows[short_name(name)] = encoder_row(name, photographs, lpips)
                    save(results)
        elif not rows:
            rows.update(studies[study](arguments.encoder, photographs, lpips))
            save(results)
        print("\n".join(tables(results)[study]))


if __name__ == "__main__":
    main()
