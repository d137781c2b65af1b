"""`dinotok encode-corpus`: parquet files and WebDataset archives to tokens or latents."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .command_line import BatchSize, Device, Dtype, Revision, check_device, one_line, user_errors

if TYPE_CHECKING:
    from .corpus import WorkerReport

SHARDS_FAILED = 1


def encode_corpus(
    shards: Annotated[
        list[Path], typer.Argument(metavar="SHARDS...", help="Parquet files, WebDataset tar files, folders of both.")
    ],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the results; the same in a later call.")],
    model: Annotated[str, typer.Option(help="Tokenizer: with codebooks for tokens, without for latents.")],
    resolution: Annotated[
        int | None, typer.Option(min=1, help="Side of the square crops; by default the model's, else 256.")
    ] = None,
    crop: Annotated[str, typer.Option(help="center, random or random_resized.")] = "center",
    flip: Annotated[bool, typer.Option("--flip", help="Mirror half of the pictures or views.")] = False,
    views: Annotated[int, typer.Option(min=1, help="Of every picture, cropped and flipped anew.")] = 1,
    seed: Annotated[int, typer.Option(help="Of crops and flips.")] = 0,
    mixed_precision: Annotated[str, typer.Option(help="no or bf16.")] = "no",
    latents_dtype: Annotated[Dtype, typer.Option(help="Precision of the stored latents.")] = Dtype.float16,
    classes: Annotated[
        str | None, typer.Option(help="File with the names of the classes, one a line; or their number.")
    ] = None,
    labels: Annotated[bool, typer.Option("--labels/--no-labels", help="Whether to keep labels.")] = True,
    label_column: Annotated[str, typer.Option(help="Where they are; label is cls in tar files.")] = "label",
    image_column: Annotated[
        str, typer.Option(help="Where pictures are; image is any picture's suffix in tar files.")
    ] = "image",
    max_failed_share: Annotated[
        float, typer.Option(min=0, max=1, help="Of unreadable samples in a shard; 1 also accepts damaged shards.")
    ] = 0.01,
    verify: Annotated[bool, typer.Option("--verify", help="Check finished files; make damaged ones anew.")] = False,
    batch_size: BatchSize = 32,
    num_workers: Annotated[int, typer.Option(min=0, help="Threads that decode while the model runs.")] = 0,
    device: Device = None,
    encoder: Annotated[str | None, typer.Option(help="Of a model saved without its encoder.")] = None,
    revision: Revision = None,
) -> None:
    """Encode shard by shard to files that training reads; what is done already is not done again.

    Shares the work under torchrun and in a SLURM job array. May be killed at any moment: the same command goes on.
    """
    with user_errors():
        from .corpus import Corpus, CorpusOptions, slurm_share
        from .corpus import encode_corpus as encode
        from .evaluation.passes import process_group, rank_and_processes
        from .folders import check_output

        check_output(output)
        options = CorpusOptions(
            model=model,
            revision=revision,
            encoder=encoder,
            resolution=resolution,
            crop=crop,  # type: ignore[arg-type]  # checked there
            flip=flip,
            views=views,
            seed=seed,
            mixed_precision=mixed_precision,
            dtype=latents_dtype.value,
            image_column=image_column,
            label_column=label_column if labels else None,
            classes=classes,
            max_failed_share=max_failed_share,
            batch_size=batch_size,
            num_workers=num_workers,
        )
        corpus = Corpus.find(shards, output, options)
        with process_group():
            rank, world_size = slurm_share(os.environ, *rank_and_processes())
            report = encode(corpus, _report_failure, _device(device), rank, world_size, verify)
            _print_report(report, output, rank, world_size)
    if report.failed:
        raise typer.Exit(SHARDS_FAILED)


def _device(name: str | None) -> str:
    """Every process of a `torchrun` has the GPU of its rank on the machine."""
    device = check_device(name)
    return f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" and "LOCAL_RANK" in os.environ else device


def _report_failure(name: str, error: Exception) -> None:
    from tqdm import tqdm

    tqdm.write(f"failed {name}: {one_line(error)}", file=sys.stderr)


def _print_report(report: "WorkerReport", output: Path, rank: int, world_size: int) -> None:
    who = f"worker {rank} of {world_size}: " if world_size > 1 else ""
    rate = f", {report.pictures / report.seconds:.1f} pictures/s" if report.made else ""
    failed = f", {report.failed} shards failed" if report.failed else ""
    typer.echo(f"{who}{report.made} files of {report.pictures} pictures made in {report.seconds:.1f} s{rate}{failed}")
    summary = report.summary
    if summary is None:
        typer.echo(f"{output} is not complete: the same command, with any number of workers, makes what is missing.")
    elif rank == 0:
        left_out = f", {summary['failed']} samples failed" if summary["failed"] else ""
        typer.echo(f"{output} is complete: {summary['files']} files, {summary['pictures']} pictures{left_out}")
