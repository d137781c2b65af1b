"""`dinotok evaluate`: reference statistics, reconstructions, samples and probes."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..command_line import BatchSize, Device, Dtype, Revision, check_device, user_errors

if TYPE_CHECKING:
    from datasets import Dataset

    from .passes import PassOptions

evaluate_app = typer.Typer(
    help="Measure reconstructions, samples and latents, with everything recorded that moves a number.",
    no_args_is_help=True,
)

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
    with _evaluation() as (rank, world_size):
        from .extractors import load_extractor
        from .passes import remove_parts, wait_for_all
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
            rank=rank,
            world_size=world_size,
        )
        wait_for_all()  # before the partial results go
        if rank == 0:
            made.recipe.update(dataset=dataset, split=split)
            made.save(output)
            remove_parts(parts)
            if "warning" in made.recipe:
                typer.echo(f"warning: {made.recipe['warning']}.", err=True)
            typer.echo(f"{output}: {network.metric} statistics of {made.count} pictures, {made.digest()}")


@evaluate_app.command()
def reconstruction(
    model: Annotated[str, typer.Option(help="Folder or Hub repository of a tokenizer.")],
    dataset: DatasetName,
    output: Annotated[Path, typer.Option(help="Folder for evaluation.json and model-index.md.")],
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
    encoder: Annotated[str | None, typer.Option(help="Encoder of a model saved without.")] = None,
    batch_size: BatchSize = 8,
    num_workers: Workers = 0,
    shard_size: ShardSize = 512,
    max_skipped_share: SkippedShare = 0.0,
    device: Device = None,
) -> None:
    """Encode and decode a data set: PSNR, SSIM, LPIPS, Fréchet distances and the use of codebooks."""
    with _evaluation() as (rank, world_size):
        from ..cli import RunSettings
        from ..hub import find_tokenizer, model_header
        from ..lpips import LPIPS
        from .extractors import file_digest, load_extractor
        from .feature_statistics import FeatureStatistics
        from .passes import wait_for_all
        from .reconstruction import evaluate_reconstruction
        from .reports import SSIM, environment

        source = find_tokenizer(model, revision)
        settings = RunSettings(batch_size, device, Dtype.float32, False, None, None, encoder)
        tokenizer = settings.load(source)
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
            rank=rank,
            world_size=world_size,
        )
        wait_for_all()  # before the partial results go
        if rank == 0:
            report = {
                "task": "reconstruction",
                **model_header(source),
                "dataset": dataset,
                "split": split,
                **result,
                "settings": settings.describe(tokenizer) | {"processes": world_size},
                "ssim": SSIM,
                "lpips": weights,
                "extractor": network.describe() if network else None,
                "reference": reference.digest() if reference else "the originals, after the same crop",
                "environment": environment(),
            }
            _publish(report, output, "image-to-image", "Image reconstruction", [parts])


@evaluate_app.command()
def generation(
    statistics_file: Annotated[Path, typer.Option("--statistics", help="Reference of `dinotok evaluate statistics`.")],
    extractor: ExtractorName,
    output: Annotated[Path, typer.Option(help="Folder for evaluation.json and model-index.md.")],
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
    with _evaluation() as (rank, world_size):
        from .extractors import load_extractor
        from .feature_statistics import FeatureStatistics
        from .generation import evaluate_generation
        from .passes import wait_for_all
        from .reports import environment
        from .sample_packs import SamplePack

        if sum(source is not None for source in (model, images, samples)) != 1:
            raise ValueError("Name exactly one of --model, --images and --samples.")
        where = check_device(device)
        reference, network = FeatureStatistics.load(statistics_file), load_extractor(extractor, where)
        sampling = None
        if model is not None:
            arguments = {"guidance_scale": guidance_scale}
            if num_inference_steps is not None:
                arguments["num_inference_steps"] = num_inference_steps
            sampling = {"seed": seed, "num_images": num_images, **arguments}
            samples = output / "samples.npz"
            if rank == 0:
                _draw(model, samples, where, batch_size, sampling, reference.recipe["resolution"])
            wait_for_all()
        drawn = SamplePack(samples) if samples is not None else _load(str(images), "train")
        parts = output / "parts"
        result = evaluate_generation(
            drawn,
            network,
            reference,
            parts,
            _options(batch_size, num_workers, shard_size, 0.0),
            allow_few_pictures=allow_few_pictures,
            rank=rank,
            world_size=world_size,
        )
        wait_for_all()  # before the partial results go
        if rank == 0:
            report = {
                "task": "generation",
                "model": model or images or samples,
                "dataset": reference.recipe.get("dataset"),
                "split": reference.recipe.get("split"),
                **result,
                "sampling": sampling,
                "extractor": network.describe(),
                "reference": reference.digest(),
                "environment": environment(),
            }
            _publish(report, output, "unconditional-image-generation", "Image generation", [parts])


@evaluate_app.command()
def probe(
    model: Annotated[str, typer.Option(help="Folder or Hub repository of a tokenizer.")],
    dataset: DatasetName,
    validation_dataset: Annotated[str, typer.Option(help="Labelled like --dataset, for the accuracy.")],
    output: Annotated[Path, typer.Option(help="Folder for evaluation.json and model-index.md.")],
    resolution: Resolution = 224,
    split: Split = "train",
    validation_split: Annotated[str, typer.Option(help="Part of the validation data set.")] = "validation",
    epochs: Annotated[int, typer.Option(min=1, help="Of the linear probe.")] = 20,
    revision: Revision = None,
    encoder: Annotated[str | None, typer.Option(help="Encoder of a model saved without.")] = None,
    batch_size: BatchSize = 8,
    num_workers: Workers = 0,
    shard_size: ShardSize = 512,
    device: Device = None,
) -> None:
    """Measure what latents know of classes: k-NN and linear accuracy of deep, texture, both and quantized ones."""
    with _evaluation() as (rank, world_size):
        from ..cli import RunSettings
        from ..hub import find_tokenizer
        from .passes import wait_for_all
        from .probe import evaluate_probe
        from .reports import environment

        source = find_tokenizer(model, revision)
        settings = RunSettings(batch_size, device, Dtype.float32, False, None, None, encoder)
        tokenizer = settings.load(source)
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
            rank=rank,
            world_size=world_size,
        )
        wait_for_all()  # before the partial results go
        if rank == 0:
            report = {
                "task": "probe",
                "model": source.name,
                "model_revision": source.revision,
                "model_digest": source.digest,
                "dataset": validation_dataset,
                "split": validation_split,
                "train_dataset": dataset,
                "train_split": split,
                **result,
                "settings": settings.describe(tokenizer) | {"epochs": epochs, "processes": world_size},
                "environment": environment(),
            }
            _publish(
                report, output, "image-classification", "Probes of latents", [parts / "train", parts / "validation"]
            )
            parts.rmdir()


def _draw(model: str, path: Path, device: str, batch_size: int, sampling: dict[str, Any], resolution: int) -> None:
    """Write the samples of a pipeline."""
    from ..generation import find_pipeline
    from .generation import generated_batches
    from .sample_packs import write_sample_pack

    if path.exists():
        raise ValueError(f"There are samples in {str(path)!r} already: evaluate them by --samples, or delete them.")
    pipeline = find_pipeline(model).load().to(device)
    pipeline.set_progress_bar_config(disable=True)
    options = dict(sampling)
    count, seed = options.pop("num_images"), options.pop("seed")
    size = {"height": resolution, "width": resolution}
    write_sample_pack(path, generated_batches(pipeline, count, batch_size, seed, **size, **options), count)


def _publish(report: dict[str, Any], output: Path, task: str, task_name: str, parts: list[Path]) -> None:
    """Write and print what was found; partial results go when it is written."""
    from .passes import remove_parts
    from .reports import print_evaluation, write_evaluation, write_model_index

    write_evaluation(report, output)
    write_model_index(report, output, task, task_name)
    for folder in parts:
        remove_parts(folder)
    print_evaluation(report)
    typer.echo(f"Written to {output}")


@contextmanager
def _evaluation() -> Iterator[tuple[int, int]]:
    """Errors in one line, and the other processes of a `torchrun`: rank and number."""
    with user_errors():
        from .passes import process_group

        with process_group() as processes:
            yield processes


def _load(dataset: str, split: str) -> "Dataset":
    from ..data import load_pictures

    return load_pictures(dataset, split=split)


def _options(batch_size: int, num_workers: int, shard_size: int, max_skipped_share: float) -> "PassOptions":
    from .passes import PassOptions

    return PassOptions(batch_size, num_workers, shard_size, max_skipped_share)
