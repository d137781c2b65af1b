"""The `dinotok` command. Every command is a few lines around a function that can be imported."""

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

# torch, diffusers and what imports them wait until a command runs: `dinotok --help` is quick.
if TYPE_CHECKING:
    from .hub import TokenizerFiles
    from .models.tokenizer_model import TokenizerModel

app = typer.Typer(
    help="Image tokenizers on frozen vision foundation models.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_show_locals=False,
)

SOME_FAILED, NOTHING_DONE = 1, 2
_MAX_TABLE_ROWS = 20


class Dtype(StrEnum):
    """Names of torch dtypes, as options."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


@dataclass(frozen=True)
class RunSettings:
    """How a model is run.

    Attributes:
        batch_size: Pictures of one size that go through it together.
        device: Such as `cuda:1`; None is `cuda` if there is a GPU, else `cpu`.
        dtype: Of weights and computation.
        tiling: Run large pictures tile by tile.
        tile_size: Pixels; None is the model's default.
        tile_overlap: Pixels; None is the model's default.
    """

    batch_size: int
    device: str | None
    dtype: Dtype
    tiling: bool
    tile_size: int | None
    tile_overlap: int | None

    def load(self, source: "TokenizerFiles") -> "TokenizerModel":
        """Load a tokenizer to the device, and switch tiling on if it is wanted.

        Raises:
            ValueError: If the device does not exist or the tile sizes do not fit the model.
        """
        import torch

        device = check_device(self.device)
        model = source.load(getattr(torch, self.dtype.value)).to(device)
        if self.tiling or self.tile_size is not None or self.tile_overlap is not None:
            model.enable_tiling(self.tile_size, self.tile_overlap)
        return model

    def describe(self, model: "TokenizerModel") -> dict[str, Any]:
        """What was chosen, as it ended up, for a file that records it."""
        tiles = (model.tile_size, model.tile_overlap) if model.use_tiling else (None, None)
        return {
            "batch_size": self.batch_size,
            "device": str(model.device),
            "dtype": self.dtype.value,
            "tile_size": tiles[0],
            "tile_overlap": tiles[1],
        }


@dataclass
class Failures:
    """Files that could not be used: reported at once, and kept.

    Attributes:
        entries: `file` and `reason` of each.
    """

    entries: list[dict[str, str]] = field(default_factory=list)

    def add(self, name: str, error: Exception) -> None:
        """Report a file on stderr, without breaking a progress bar."""
        from tqdm import tqdm

        self.entries.append({"file": name, "reason": _one_line(error)})
        tqdm.write(f"skipped {name}: {_one_line(error)}", file=sys.stderr)

    def finish(self, done: int, what: str) -> None:
        """End the command with the status that says whether all, some or none of the files worked."""
        if not done:
            raise ValueError(f"None of {len(self.entries)} {what} could be used.")
        if self.entries:
            typer.echo(f"{len(self.entries)} skipped, {done} done.", err=True)
            raise typer.Exit(SOME_FAILED)


Pictures = Annotated[list[Path], typer.Argument(metavar="PATH...", help="Pictures, and folders of pictures.")]
Model = Annotated[str, typer.Option(help="Folder or Hub repository of a tokenizer.")]
Output = Annotated[Path, typer.Option(help="Folder for the results; made if it is missing.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of the Hub repository.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Pictures of one size that go through the model together.")]
Device = Annotated[str | None, typer.Option(help="Such as cuda:1; by default cuda if there is a GPU, else cpu.")]
ModelDtype = Annotated[Dtype, typer.Option(help="Precision of the model.")]
Tiling = Annotated[bool, typer.Option("--tiling", help="Run large pictures tile by tile, in bounded memory.")]
TileSize = Annotated[int | None, typer.Option(min=1, help="Side of a tile in pixels; implies --tiling.")]
TileOverlap = Annotated[int | None, typer.Option(min=0, help="What tiles share, in pixels; implies --tiling.")]
Recursive = Annotated[bool, typer.Option("--recursive", help="Descend into sub-folders.")]


@app.callback(invoke_without_command=True)
def common(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """Image tokenizers on frozen vision foundation models."""
    if version:
        from . import __version__

        typer.echo(f"dinotok {__version__}")
        raise typer.Exit


@app.command()
def quickstart(output: Output = Path("outputs/quickstart")) -> None:
    """Fit a small tokenizer on bundled photographs and reconstruct others: offline, in under a minute."""
    with user_errors():
        from .folders import check_output
        from .quickstart import print_quickstart, run_quickstart

        check_output(output)
        typer.echo("Fitting a small tokenizer on bundled photographs ...")
        print_quickstart(run_quickstart(output))


@app.command()
def reconstruct(
    paths: Pictures,
    model: Model,
    output: Output,
    sheet: Annotated[int, typer.Option(min=0, help="Pictures on the overview sheet.png; 0 for none.")] = 8,
    batch_size: BatchSize = 8,
    device: Device = None,
    dtype: ModelDtype = Dtype.float32,
    tiling: Tiling = False,
    tile_size: TileSize = None,
    tile_overlap: TileOverlap = None,
    revision: Revision = None,
    recursive: Recursive = False,
) -> None:
    """Encode and decode pictures; write PNG files, sheet.png and metrics.json, and print PSNR and SSIM."""
    with user_errors():
        from .folders import check_output, find_files
        from .hub import find_tokenizer
        from .metrics import ReconstructionMetrics
        from .transcoding import reconstruct_files, write_reconstruction_sheet, write_report

        files = find_files(paths, recursive=recursive, exclude=output)
        check_output(output, files)
        source = find_tokenizer(model, revision)
        settings = RunSettings(batch_size, device, dtype, tiling, tile_size, tile_overlap)
        tokenizer = settings.load(source)
        failures, metrics = Failures(), ReconstructionMetrics()
        rows = list(reconstruct_files(tokenizer, files, output, metrics, failures.add, batch_size))
        summary = metrics.compute() if rows else None
        header = _report_header(source) | {"settings": settings.describe(tokenizer)}
        write_report(output / "metrics.json", rows, failures.entries, summary, header)
        if rows and sheet:
            write_reconstruction_sheet(rows, files, output, sheet)
        if summary is not None:
            _print_metrics(rows, summary, output)
        failures.finish(len(rows), "pictures")


@app.command()
def encode(
    paths: Pictures,
    model: Model,
    output: Output,
    shard_size: Annotated[int, typer.Option(min=1, help="Pictures per file, at most.")] = 256,
    latents_dtype: Annotated[Dtype, typer.Option(help="Precision of the stored latents.")] = Dtype.float32,
    batch_size: BatchSize = 8,
    device: Device = None,
    dtype: ModelDtype = Dtype.float32,
    tiling: Tiling = False,
    tile_size: TileSize = None,
    tile_overlap: TileOverlap = None,
    revision: Revision = None,
    recursive: Recursive = False,
) -> None:
    """Write the latents of pictures to safetensors files that `dinotok decode` turns back into pictures."""
    with user_errors():
        import torch

        from .folders import check_output, find_files
        from .hub import find_tokenizer
        from .latent_files import LatentsOrigin, check_has_no_shards, open_shard
        from .transcoding import encode_files

        check_output(output)
        check_has_no_shards(output)
        files = find_files(paths, recursive=recursive, exclude=output)
        source = find_tokenizer(model, revision)
        settings = RunSettings(batch_size, device, dtype, tiling, tile_size, tile_overlap)
        tokenizer = settings.load(source)
        origin = LatentsOrigin(
            model=source.name,
            revision=source.revision,
            digest=source.digest,
            class_name=source.class_name,
            patch_size=tokenizer.config["patch_size"],
            settings=settings.describe(tokenizer),
        )
        failures, done = Failures(), 0
        stored = getattr(torch, latents_dtype.value)
        for path in encode_files(tokenizer, files, output, origin, failures.add, batch_size, shard_size, stored):
            count = len(open_shard(path).sizes)
            done += count
            typer.echo(f"{path}: latents of {count} pictures")
        failures.finish(done, "pictures")


@app.command()
def decode(
    latents: Annotated[
        list[Path], typer.Argument(metavar="LATENTS...", help="Files of `dinotok encode`, or folders.")
    ],
    output: Output,
    model: Annotated[str | None, typer.Option(help="Where the model is now; by default where the files say.")] = None,
    allow_revision_mismatch: Annotated[
        bool, typer.Option("--allow-revision-mismatch", help="Decode with another model than the one that encoded.")
    ] = False,
    batch_size: BatchSize = 8,
    device: Device = None,
    dtype: ModelDtype = Dtype.float32,
    tiling: Tiling = False,
    tile_size: TileSize = None,
    tile_overlap: TileOverlap = None,
    revision: Revision = None,
    recursive: Recursive = False,
) -> None:
    """Turn files of latents back into pictures of the original sizes."""
    with user_errors():
        from .folders import check_output, find_files
        from .transcoding import check_same_model, decode_files, find_tokenizer_of, open_shards

        check_output(output)
        failures = Failures()
        shards = open_shards(find_files(latents, (".safetensors",), recursive), failures.add)
        if not shards:
            failures.finish(0, "files of latents")
        source = find_tokenizer_of(shards[0].origin, model, revision)
        if not allow_revision_mismatch:
            check_same_model(shards[0].origin, source)
        settings = RunSettings(batch_size, device, dtype, tiling, tile_size, tile_overlap)
        done = len(list(decode_files(settings.load(source), shards, output, failures.add, batch_size)))
        typer.echo(f"{output}: {done} pictures")
        failures.finish(done, "pictures")


@contextmanager
def user_errors() -> Iterator[None]:
    """Turn an error that a user can mend into one line on stderr and exit status 2."""
    try:
        yield
    except (ValueError, OSError, MemoryError, ImportError) as error:
        _fail(error)
    except RuntimeError as error:
        if "out of memory" not in str(error):
            raise
        _fail(MemoryError(f"{error} Try a smaller --batch-size, --tiling or --dtype bfloat16."))


def check_device(name: str | None) -> str:
    """Choose a device, or check the one that was asked for.

    Args:
        name: Such as `cpu` or `cuda:1`; None to choose.

    Returns:
        Its name.

    Raises:
        ValueError: If torch has no such device.
    """
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=torch.device(name)).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device={name!r} cannot be used here: {_one_line(error)}") from error
    return name


def main() -> None:
    """Run the command line."""
    app(prog_name="dinotok")


def _fail(error: BaseException) -> None:
    typer.echo(f"error: {_one_line(error)}", err=True)
    raise typer.Exit(NOTHING_DONE) from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _report_header(source: "TokenizerFiles") -> dict[str, Any]:
    from . import __version__

    return {
        "dinotok_version": __version__,
        "model": source.name,
        "model_revision": source.revision,
        "model_digest": source.digest,
        "class_name": source.class_name,
    }


def _print_metrics(rows: list[dict[str, Any]], summary: dict[str, float], output: Path) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("picture", "size", "PSNR (dB)", "SSIM")
    for row in rows[:_MAX_TABLE_ROWS]:
        scores = (f"{row['psnr']:.2f}", _number(row["ssim"]))
        table.add_row(Text(row["file"], overflow="fold"), f"{row['width']}x{row['height']}", *scores)
    left_out = len(rows) - _MAX_TABLE_ROWS
    if left_out > 0:
        table.add_row(f"... {left_out} more in metrics.json")
    table.add_section()
    table.add_row(f"mean of {len(rows)} pictures", "", f"{summary['psnr']:.2f}", _number(summary["ssim"]))
    table.add_row("pooled over all pixels", "", f"{summary['psnr_pooled']:.2f}", "")
    console = Console()
    console.print(table)
    console.print(Text(f"Written to {output}", overflow="fold"))


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.4f}"
