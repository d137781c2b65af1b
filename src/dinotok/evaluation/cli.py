"""`dinotok evaluate`: reference statistics, reconstructions, samples and probes."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..command_line import BatchSize, Device, Dtype, Output, Revision, check_device, user_errors

if TYPE_CHECKING:
    from datasets import Dataset

    from ..cli import RunSettings
    from ..generation import PipelineFiles
    from ..hub import TokenizerFiles
    from ..models.tokenizer_model import TokenizerModel
    from .passes import PassOptions
    from .sample_packs import SamplePack

evaluate_app = typer.Typer(
    help="Measure reconstructions, samples and latents, with everything recorded that moves a number.",
    no_args_is_help=True,
)

Model = Annotated[str, typer.Option(help="Folder or Hub repository of a tokenizer.")]
Encoder = Annotated[str | None, typer.Option(help="Encoder of a model saved without.")]
Report = Annotated[Path, typer.Option("--output", help="Folder for evaluation.json and model-index.md.")]
DatasetName = Annotated[
    str, typer.Option("--dataset", help="Folder, .parquet or .tar of pictures, or Hub repository.")
]
Split = Annotated[str, typer.Option(help="Part of the data set, such as validation or train[:1000].")]
ExtractorName = Annotated[
    str,
    typer.Option(help="Weights of inception-768 (.safetensors), encoder:NAME for FD-NAME, or inception-2048."),
]
OptionalExtractor = Annotated[str | None, typer.Option(help="As for statistics; without, no Fréchet distance.")]
Resolution = Annotated[int, typer.Option(min=1, help="Pixels a side, to which pictures are cropped in the centre.")]
AllowFew = Annotated[
    bool, typer.Option("--allow-few-pictures", help="Measure Fréchet distances of too few pictures, with a warning.")
]
Workers = Annotated[int, typer.Option(min=0, help="Processes that read pictures, for each process.")]
ShardSize = Annotated[int, typer.Option(min=1, help="Pictures per partial result: what an interruption costs.")]
SkippedShare = Annotated[float, typer.Option(min=0, max=1, help="Share of unreadable pictures that is tolerated.")]


@evaluate_app.command()
def statistics(
    dataset: DatasetName,
    output: Annotated[Path, typer.Option(help="The .safetensors file to write.")],
    extractor: ExtractorName,
    resolution: Resolution = 256,
    split: Split = "train",
    keep_features: Annotated[
        bool, typer.Option("--keep-features", help="Keep all features, for KID, precision and recall.")
    ] = False,
    allow_few_pictures: AllowFew = False,
    batch_size: BatchSize = 8,
    num_workers: Workers = 0,
    shard_size: ShardSize = 512,
    max_skipped_share: SkippedShare = 0.0,
    device: Device = None,
) -> None:
    """Measure the mean and covariance of a data set's features, to compare with later."""
    with _evaluation():
        from .extractors import load_extractor
        from .passes import rank_and_processes, remove_parts, wait_for_all
        from .reference import make_statistics

        pictures = _load(dataset, split)
        network = load_extractor(extractor, check_device(device))
        parts = output.with_name(f".{output.name}.parts")
        made = make_statistics(
            pictures,
            network,
            resolution,
            parts,
            _options(batch_size, num_workers, shard_size, max_skipped_share),
            keep_features=keep_features,
            allow_few_pictures=allow_few_pictures,
        )
        wait_for_all()  # before the partial results go
        if rank_and_processes()[0] == 0:
            made.recipe.update(dataset=dataset, split=split)
            made.save(output)
            remove_parts(parts)
            if "warning" in made.recipe:
                typer.echo(f"warning: {made.recipe['warning']}.", err=True)
            typer.echo(f"{output}: {network.metric} statistics of {made.count} pictures, {made.digest()}")


@evaluate_app.command()
def reconstruction(
    model: Model,
    dataset: DatasetName,
    output: Report,
    resolution: Resolution = 256,
    split: Split = "validation",
    lpips: Annotated[list[Path] | None, typer.Option(help="Weights of an LPIPS network; once for each.")] = None,
    extractor: OptionalExtractor = None,
    statistics_file: Annotated[
        Path | None,
        typer.Option("--statistics", help="Reference to compare with; by default the originals, cropped alike."),
    ] = None,
    allow_few_pictures: AllowFew = False,
    revision: Revision = None,
    encoder: Encoder = None,
    batch_size: BatchSize = 8,
    num_workers: Workers = 0,
    shard_size: ShardSize = 512,
    max_skipped_share: SkippedShare = 0.0,
    device: Device = None,
) -> None:
    """Encode and decode a data set: PSNR, SSIM, LPIPS, Fréchet distances and the use of codebooks."""
    with _evaluation():
        from ..hub import model_header
        from ..lpips import LPIPS
        from .extractors import file_digest, load_extractor
        from .feature_statistics import FeatureStatistics
        from .reconstruction import evaluate_reconstruction
        from .reports import SSIM

        source, settings, tokenizer = _load_model(model, revision, encoder, batch_size, device)
        where = tokenizer.device
        network = load_extractor(extractor, str(where)) if extractor else None
        reference = FeatureStatistics.load(statistics_file) if statistics_file else None
        weights = {str(path): file_digest(path) for path in lpips or ()}
        identity = {"digest": source.digest, "lpips": weights, "device": where.type, "batch_size": batch_size}
        parts = output / "parts"
        result = evaluate_reconstruction(
            tokenizer,
            _load(dataset, split),
            resolution,
            parts,
            _options(batch_size, num_workers, shard_size, max_skipped_share),
            lpips=[LPIPS.from_file(path).to(where) for path in lpips or ()],
            extractor=network,
            statistics=reference,
            identity=identity,
            allow_few_pictures=allow_few_pictures,
        )
        report = {
            "task": "reconstruction",
            **model_header(source),
            "dataset": dataset,
            "split": split,
            **result,
            "settings": settings.describe(tokenizer),
            "ssim": SSIM,
            "lpips": weights,
            "extractor": network.describe() if network else None,
            "reference": reference.digest() if reference else "the originals, after the same crop",
        }
        _publish(report, output, "image-to-image", "Image reconstruction", [parts])


@evaluate_app.command()
def generation(
    statistics_file: Annotated[Path, typer.Option("--statistics", help="Reference of `dinotok evaluate statistics`.")],
    extractor: ExtractorName,
    output: Report,
    model: Annotated[str | None, typer.Option(help="Folder or repository of a pipeline, to draw samples.")] = None,
    images: Annotated[str | None, typer.Option(help="Folder of samples, lossless.")] = None,
    samples: Annotated[
        Path | None, typer.Option(help="Samples in a .npz file, as guided-diffusion packs them.")
    ] = None,
    num_images: Annotated[int, typer.Option(min=2, help="With --model: samples to draw.")] = 50_000,
    guidance_scale: Annotated[float, typer.Option(help="With --model.")] = 1.0,
    num_inference_steps: Annotated[int | None, typer.Option(help="With --model, of diffusion.")] = None,
    seed: Annotated[int, typer.Option(help="With --model: of the first sample; the next has seed + 1.")] = 0,
    allow_few_pictures: AllowFew = False,
    batch_size: BatchSize = 8,
    num_workers: Workers = 0,
    shard_size: ShardSize = 512,
    device: Device = None,
) -> None:
    """Compare samples with a reference: Fréchet distance, and KID, precision and recall if it keeps features."""
    with _evaluation():
        from ..generation import find_pipeline
        from ..hub import model_header
        from .extractors import load_extractor
        from .feature_statistics import FeatureStatistics
        from .generation import evaluate_generation
        from .sample_packs import SamplePack

        if sum(source is not None for source in (model, images, samples)) != 1:
            raise ValueError("Name exactly one of --model, --images and --samples.")
        where = check_device(device)
        reference, network = FeatureStatistics.load(statistics_file), load_extractor(extractor, where)
        options = _options(batch_size, num_workers, shard_size, 0.0)
        sampling, folders, header = None, [output / "parts"], {"model": str(images or samples)}
        if model is not None:
            files = find_pipeline(model)
            header = model_header(files)
            sampling = {"seed": seed, "num_images": num_images, "guidance_scale": guidance_scale}
            if num_inference_steps is not None:
                sampling["num_inference_steps"] = num_inference_steps
            folders.append(output / "samples-parts")
            drawn = _draw(files, output / "samples.npz", folders[1], where, sampling, reference.recipe, options)
        else:
            drawn = SamplePack(samples) if samples is not None else _load(str(images), "train")
        result = evaluate_generation(
            drawn, network, reference, folders[0], options, allow_few_pictures=allow_few_pictures
        )
        report = {
            "task": "generation",
            **header,
            "dataset": reference.recipe.get("dataset"),
            "split": reference.recipe.get("split"),
            **result,
            "sampling": sampling,
            "extractor": network.describe(),
            "reference": reference.digest(),
        }
        _publish(report, output, "unconditional-image-generation", "Image generation", folders)


@evaluate_app.command()
def probe(
    model: Model,
    dataset: DatasetName,
    validation_dataset: Annotated[str, typer.Option(help="Labelled like --dataset, for the accuracy.")],
    output: Report,
    resolution: Resolution = 224,
    split: Split = "train",
    validation_split: Annotated[str, typer.Option(help="Part of the validation data set.")] = "validation",
    epochs: Annotated[int, typer.Option(min=1, help="Of the linear probe.")] = 20,
    revision: Revision = None,
    encoder: Encoder = None,
    batch_size: BatchSize = 8,
    num_workers: Workers = 0,
    shard_size: ShardSize = 512,
    device: Device = None,
) -> None:
    """Measure what latents know of classes: k-NN and linear accuracy of deep, texture, both and quantized ones."""
    with _evaluation():
        from ..hub import model_header
        from .probe import evaluate_probe

        source, settings, tokenizer = _load_model(model, revision, encoder, batch_size, device)
        parts = output / "parts"
        result = evaluate_probe(
            tokenizer,
            _load(dataset, split),
            _load(validation_dataset, validation_split),
            resolution,
            parts,
            _options(batch_size, num_workers, shard_size, 0.0),
            identity={"digest": source.digest, "device": tokenizer.device.type, "batch_size": batch_size},
            epochs=epochs,
        )
        report = {
            "task": "probe",
            **model_header(source),
            "dataset": validation_dataset,
            "split": validation_split,
            "train_dataset": dataset,
            "train_split": split,
            **result,
            "settings": settings.describe(tokenizer) | {"epochs": epochs},
        }
        _publish(
            report, output, "image-classification", "Probes of latents", [parts / "train", parts / "validation", parts]
        )


@evaluate_app.command()
def latents(
    paths: Annotated[
        list[Path], typer.Argument(metavar="PATH...", help="Pictures, parquet files of pictures, and folders of both.")
    ],
    model: Model,
    output: Output,
    pictures: Annotated[int, typer.Option(min=1, help="Pictures to show, at most, spread over all.")] = 8,
    recursive: Annotated[bool, typer.Option("--recursive", help="Descend into sub-folders.")] = False,
    revision: Revision = None,
    encoder: Encoder = None,
    batch_size: BatchSize = 8,
    device: Device = None,
) -> None:
    """Draw latents in colours: latents.png with picture, deep part, texture part and reconstruction side by side."""
    with user_errors():
        from ..cli import Failures
        from ..folders import check_output, find_pictures, write_png
        from ..pictures import spread
        from .latents import draw_latents

        check_output(output)
        failures = Failures()
        files = find_pictures(paths, failures.add, recursive, output)
        chosen = [files[index] for index in spread(len(files), pictures)]
        path = output / "latents.png"
        if any(file.path == path.absolute() for file in chosen):
            raise ValueError(f"{str(path)!r} is an input and would be overwritten; choose another --output.")
        _, _, tokenizer = _load_model(model, revision, encoder, batch_size, device)
        drawn, count = draw_latents(tokenizer, chosen, failures.add, batch_size)
        if drawn is not None:
            write_png(drawn, path)
            typer.echo(f"{path}: {count} pictures")
        failures.finish(count, "pictures")


def _draw(
    files: "PipelineFiles",
    path: Path,
    folder: Path,
    device: str,
    sampling: dict[str, Any],
    recipe: dict[str, Any],
    options: "PassOptions",
) -> "SamplePack":
    """Draw the samples of a pipeline, of the resolution of the statistics."""
    from .generation import draw_sample_pack

    pipeline = files.load().to(device)
    pipeline.set_progress_bar_config(disable=True)
    arguments = sampling | {"height": recipe["resolution"], "width": recipe["resolution"]}
    identity = {"digest": files.digest, "device": device}
    return draw_sample_pack(
        pipeline, path, arguments.pop("num_images"), folder, options, identity=identity, **arguments
    )


def _publish(report: dict[str, Any], output: Path, task: str, task_name: str, parts: list[Path]) -> None:
    """On the first process, write and print what was found; partial results go when it is written."""
    from .passes import rank_and_processes, remove_parts, wait_for_all
    from .reports import environment, print_evaluation, write_evaluation, write_model_index

    wait_for_all()  # before the partial results go
    rank, processes = rank_and_processes()
    if rank == 0:
        write_evaluation(report | {"processes": processes, "environment": environment()}, output)
        write_model_index(report, output, task, task_name)
        for folder in parts:
            remove_parts(folder)
        print_evaluation(report)
        typer.echo(f"Written to {output}")


@contextmanager
def _evaluation() -> Iterator[None]:
    """Errors in one line, and the other processes of a `torchrun`."""
    with user_errors():
        from .passes import process_group

        with process_group():
            yield


def _load_model(
    model: str, revision: str | None, encoder: str | None, batch_size: int, device: str | None
) -> "tuple[TokenizerFiles, RunSettings, TokenizerModel]":
    from ..cli import RunSettings
    from ..hub import find_tokenizer

    source = find_tokenizer(model, revision)
    settings = RunSettings(batch_size, device, Dtype.float32, False, None, None, encoder)
    return source, settings, settings.load(source)


def _load(dataset: str, split: str) -> "Dataset":
    from ..data import load_pictures

    return load_pictures(dataset, split=split)


def _options(batch_size: int, num_workers: int, shard_size: int, max_skipped_share: float) -> "PassOptions":
    from .passes import PassOptions

    return PassOptions(batch_size, num_workers, shard_size, max_skipped_share)
