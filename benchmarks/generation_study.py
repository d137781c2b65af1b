"""Class-conditional pictures of a pipeline against Imagenette: FID-768, class accuracy, and where the time goes.

    python benchmarks/generation_study.py --pipeline dinotok-tiny-dit [--name "dinotok-tiny-dit"] [--count 1000]

`--count` pictures, as many of each class, without guidance and with `--guidance-scale`; of a diffusion pipeline with
each number of `--steps`. FID-768 (768-d features of the FID Inception: not the FID of papers) against 2,000 validation
and 1,000 training photographs, reduced to the pipeline's size. Its floor is that of the training photographs against
the validation ones; with their reconstructions by the pipeline's tokenizer in place of the photographs, what the
generator could reach at best.

Class accuracy: k-NN (k = 20, cosine) of the mean patch feature of a supervised ViT-Ti/16, the bank being 2,000
training photographs; all pictures are enlarged to 224 pixels from the pipeline's size. Beside it, the accuracy on the
validation photographs and on their reconstructions, the ceiling.

Time is CPU seconds of all threads, for a picture: the transformer, the tokenizer's decoder, and the rest.

Finished rows are kept in the results file, under the name; a pipeline that changed is measured anew.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import result_tables
import torch
from photographs import DATA, ENCODER, load_photographs, to_pixels
from safetensors.torch import load_file, save_file
from torch.nn.functional import interpolate
from tqdm import tqdm

from dinotok import FrozenEncoder
from dinotok.evaluation.feature_statistics import Gaussian, frechet_distance
from dinotok.folders import writing
from dinotok.generation import TOKENIZER_COMPONENTS, PipelineFiles, draw_pictures, find_pipeline
from dinotok.inception import InceptionFeatures
from dinotok.pictures import SheetEntry, sheet
from dinotok.probes import knn_accuracy

RESULTS = Path(__file__).parent / "results" / "generation_study.json"
SHEETS = Path(__file__).parents[1] / "docs" / "images"
BATCH, SHEET_SEEDS, CLASSIFIER_SIZE = 25, 8, 224
AR_OPTIONS = {"temperature": float, "top_k": int, "top_p": float}


class Judge:
    """Turns pictures into what is compared: features of the Inception network and of the classifier."""

    def __init__(self) -> None:
        self.inception = InceptionFeatures.from_file(
            DATA / "weights" / "fid_inception_v3_2015_to_mixed7a_fp16.safetensors"
        ).float()
        self.encoder = FrozenEncoder.from_encoder(str(ENCODER))

    @torch.no_grad()
    def describe(self, pictures: torch.Tensor, name: str, inception: bool = True) -> dict[str, torch.Tensor]:
        """Return features `(N, ...)` of uint8 pictures `(N, 3, H, W)`."""
        rows: dict[str, list[torch.Tensor]] = {}
        for part in tqdm(pictures.split(BATCH), desc=name, mininterval=30):
            large = interpolate(to_pixels(part), size=(CLASSIFIER_SIZE,) * 2, mode="bicubic", align_corners=False)
            rows.setdefault("encoder", []).append(self.encoder(large.clamp(-1, 1))[0].mean((2, 3)))
            if inception:
                rows.setdefault("inception", []).append(self.inception(part))
        return {key: torch.cat(values) for key, values in rows.items()}


class Reference:
    """The photographs at one size, and their features, which are kept in a file.

    Attributes:
        pictures: uint8 `(N, 3, H, W)` of `val`, `train` and `bank`.
        labels: Likewise.
        features: `inception` and `encoder` of each; of the bank, `encoder` alone.
    """

    def __init__(self, judge: Judge, size: tuple[int, int], counts: dict[str, int], cache: Path) -> None:
        self.pictures, self.labels, self.features = {}, {}, {}
        for name, count in counts.items():
            pictures, self.labels[name] = load_photographs("val" if name == "val" else "train", count)
            self.pictures[name] = interpolate(pictures, size=size, mode="bicubic", antialias=True)
            file = cache / f"{name}-{count}-{size[0]}x{size[1]}.safetensors"
            if not file.is_file():
                features = judge.describe(self.pictures[name], f"{name} photographs", inception=name != "bank")
                with writing(file) as temporary:
                    save_file(features, temporary)
            self.features[name] = load_file(file)

    def accuracy(self, features: dict[str, torch.Tensor], labels: torch.Tensor) -> float:
        """Class accuracy of pictures by the photographs of the bank."""
        return knn_accuracy(self.features["bank"]["encoder"], self.labels["bank"], features["encoder"], labels)

    def distance(self, features: dict[str, torch.Tensor], name: str) -> float:
        """FID-768 to photographs."""
        sets = (self.features[name]["inception"], features["inception"])
        return frechet_distance(*(Gaussian.fit([rows]) for rows in sets))


@torch.no_grad()
def reconstruct(tokenizer: torch.nn.Module, pictures: torch.Tensor) -> torch.Tensor:
    """Return uint8 pictures that went through the tokenizer."""
    found = []
    for part in tqdm(pictures.split(BATCH), desc="reconstructions", mininterval=30):
        found.append(((tokenizer(to_pixels(part)).sample.clamp(-1, 1) + 1) * 127.5).round().byte())
    return torch.cat(found)


@contextmanager
def timed(owner: object, method: str, seconds: dict[str, float], key: str) -> Iterator[None]:
    """Add the CPU seconds in a method to an entry while the block runs."""
    original: Callable = getattr(owner, method)

    def call(*arguments, **options):
        start = time.process_time()
        result = original(*arguments, **options)
        seconds[key] += time.process_time() - start
        return result

    setattr(owner, method, call)
    try:
        yield
    finally:
        delattr(owner, method)


def measure(pipeline, tokenizer, judge: Judge, reference: Reference, count: int, options: dict, label: str) -> dict:
    """One row: draw, compare, and say where the time went."""
    classes = pipeline.transformer.config.num_classes
    ids, seconds = [index % classes for index in range(count)], {"transformer": 0.0, "tokenizer": 0.0}
    start = time.process_time()
    with ExitStack() as stack:
        stack.enter_context(timed(pipeline.transformer, "forward", seconds, "transformer"))
        for method in ("decode", "indices_to_latents"):
            if hasattr(tokenizer, method):
                stack.enter_context(timed(tokenizer, method, seconds, "tokenizer"))
        drawn = tqdm(draw_pictures(pipeline, ids, range(count), BATCH, options), label, count, mininterval=30)
        arrays = [np.asarray(picture) for picture in drawn]
    total = time.process_time() - start
    pictures = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()
    features = judge.describe(pictures, label)
    return {
        "count": count,
        "fid_768_val": reference.distance(features, "val"),
        "fid_768_train": reference.distance(features, "train"),
        "accuracy": reference.accuracy(features, torch.tensor(ids)),
        "cpu_seconds_per_picture": total / count,
        "shares": {
            **{key: value / total for key, value in seconds.items()},
            "rest": 1 - sum(seconds.values()) / total,
        },
    }


def settings_of(files: PipelineFiles, arguments: argparse.Namespace) -> dict[str, dict]:
    """The options of every row, by its label."""
    given = {name: getattr(arguments, name) for name in AR_OPTIONS if getattr(arguments, name) is not None}
    foreign = [name for name in given if name not in files.defaults]
    if foreign:
        raise SystemExit(f"A {files.class_name} has no {', '.join(foreign)}.")
    words = "".join(f", {name} {value:g}" for name, value in given.items())
    rows = {}
    for label, scale in (("no guidance", 1.0), (f"guidance {arguments.guidance_scale:g}", arguments.guidance_scale)):
        if "num_inference_steps" in files.defaults:
            for steps in arguments.steps:
                rows[f"{label}, {steps} steps"] = {"guidance_scale": scale, "num_inference_steps": steps}
        else:
            rows[label + words] = {"guidance_scale": scale, **given}
    return rows


def write_sheet(pipeline, options: dict, path: Path) -> None:
    """All classes, a row each, with the same seeds."""
    names = pipeline.config.id2label or {}
    classes = range(pipeline.transformer.config.num_classes)
    ids, seeds = zip(*((index, seed) for index in classes for seed in range(SHEET_SEEDS)), strict=True)
    pictures = list(draw_pictures(pipeline, ids, seeds, BATCH, options))
    rows = [
        SheetEntry([names.get(str(index), str(index))], pictures[index * SHEET_SEEDS : (index + 1) * SHEET_SEEDS])
        for index in classes
    ]
    with writing(path) as temporary:
        sheet([f"seed {seed}" for seed in range(SHEET_SEEDS)], rows).save(temporary, format="JPEG", quality=88)


def write_table(results: dict, path: Path) -> None:
    lines = [
        "| pipeline | setting | FID-768, val | FID-768, train | class accuracy | CPU s a picture | "
        "transformer, tokenizer, rest |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, entry in results["rows"].items():
        for label, row in entry["settings"].items():
            shares = ", ".join(f"{row['shares'][key]:.1%}" for key in ("transformer", "tokenizer", "rest"))
            scores = f"{row['fid_768_val']:.3f} | {row['fid_768_train']:.3f} | {row['accuracy']:.1%}"
            lines.append(f"| {name} | {label} | {scores} | {row['cpu_seconds_per_picture']:.3f} | {shares} |")
        ceiling = entry["reconstructions"]
        lines.append(
            f"| {name} | photographs through its tokenizer | {ceiling['fid_768_val']:.3f} | - | "
            f"{ceiling['accuracy']:.1%} | - | - |"
        )
    for size, row in results["photographs"].items():
        lines.append(f"| - | photographs at {size} | {row['fid_768_val']:.3f} | - | {row['accuracy']:.1%} | - | - |")
    result_tables.write_table(lines, __doc__, path)


def save(results: dict, path: Path) -> None:
    result_tables.save(results, path)
    write_table(results, path)


def read_results(path: Path, settings: dict) -> dict:
    """Return what is there already; rows of other settings are not mixed with these."""
    if not path.is_file():
        return {"settings": settings, "photographs": {}, "rows": {}}
    results = json.loads(path.read_text())
    if results["settings"] != settings:
        raise SystemExit(f"{path} has rows for {results['settings']}, not {settings}: choose another --results.")
    return results


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--pipeline", required=True, help="folder, Hub repository or name of a pipeline of the package"
    )
    parser.add_argument("--name", help="of its rows; by default the pipeline's")
    parser.add_argument("--count", type=int, default=1000, help="pictures of each setting")
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 25, 50])
    parser.add_argument("--guidance-scale", type=float, default=2.0)
    for name, kind in AR_OPTIONS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, help="of an autoregressive pipeline")
    parser.add_argument("--photographs", type=int, default=2000, help="for validation; half as many for training")
    parser.add_argument("--sheet", type=Path, help="JPEG file; by default one under docs/images")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--cache", type=Path, default=Path("runs") / "generation_study", help="of features")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    number = arguments.photographs
    results = read_results(arguments.results, {"count": arguments.count, "photographs": number})
    files = find_pipeline(arguments.pipeline)
    rows, name = settings_of(files, arguments), arguments.name or Path(files.name).name
    if results["rows"].get(name, {}).get("digest") != files.digest:
        results["rows"][name] = {"digest": files.digest, "settings": {}}
    entry = results["rows"][name]

    pipeline = files.load()
    pipeline.set_progress_bar_config(disable=True)
    tokenizer = getattr(pipeline, TOKENIZER_COMPONENTS[files.class_name])
    slug = "".join(letter if letter.isalnum() else "_" for letter in name)
    *_, guided = rows.values()
    write_sheet(pipeline, guided, arguments.sheet or SHEETS / f"{slug}_sheet.jpg")

    (first,) = draw_pictures(pipeline, [0], [0], options=next(iter(rows.values())))
    judge, size = Judge(), (first.height, first.width)
    reference = Reference(judge, size, {"val": number, "train": number // 2, "bank": number}, arguments.cache)
    photographs = results["photographs"].setdefault("x".join(map(str, size)), {})
    photographs["fid_768_val"] = reference.distance(reference.features["train"], "val")
    photographs["accuracy"] = reference.accuracy(reference.features["val"], reference.labels["val"])
    if "reconstructions" not in entry:
        val = judge.describe(reconstruct(tokenizer, reference.pictures["val"]), "reconstructions", inception=False)
        train = judge.describe(reconstruct(tokenizer, reference.pictures["train"]), "reconstructions")
        entry["reconstructions"] = {
            "accuracy": reference.accuracy(val, reference.labels["val"]),
            "fid_768_val": reference.distance(train, "val"),
        }
        save(results, arguments.results)
    for label, options in rows.items():
        if label not in entry["settings"]:
            entry["settings"][label] = measure(pipeline, tokenizer, judge, reference, arguments.count, options, label)
            save(results, arguments.results)
    write_table(results, arguments.results)


if __name__ == "__main__":
    main()
