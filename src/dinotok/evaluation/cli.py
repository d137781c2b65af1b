"""`dinotok evaluate`: reference statistics, reconstructions, samples and probes."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

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
Resolution = Annotated[int, typer.Option(min=1, help="Pixels a side, to which pictures are cropped in the centre.")]
AllowFew = Annotated[
    bool, typer.Option("--allow-few-pictures", help="Measure Fréchet distances of too few pictures, with a warning.")
]
BatchSize = Annotated[int, typer.Option(min=1, help="Pictures that go through the networks together.")]
Workers = Annotated[int, typer.Option(min=0, help="Processes that read pictures, for each process.")]
ShardSize = Annotated[int, typer.Option(min=1, help="Pictures per partial result: what an interruption costs.")]
SkippedShare = Annotated[float, typer.Option(min=0, max=1, help="Share of unreadable pictures that is tolerated.")]
Device = Annotated[str | None, typer.Option(help="Such as cuda:1; by default cuda if there is a GPU, else cpu.")]


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
        from ..cli import check_device
        from .extractors import load_extractor
        from .passes import MeasuredRows, wait_for_all
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
            MeasuredRows(sorted(parts.glob("*.safetensors"))).remove()
            if "warning" in made.recipe:
                typer.echo(f"warning: {made.recipe['warning']}.", err=True)
            typer.echo(f"{output}: {network.metric} statistics of {made.count} pictures, {made.digest()}")


@contextmanager
def _evaluation() -> Iterator[tuple[int, int]]:
    """Errors in one line, and the other processes of a `torchrun`: rank and number."""
    from ..cli import user_errors

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
