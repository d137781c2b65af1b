"""The `dinotok` command. Every command is a few lines around a function that can be imported."""

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .command_line import BatchSize, Device, Dtype, ModelDtype, Output, Revision, check_device, one_line, user_errors
from .convert.cli import convert_app
from .corpus_cli import encode_corpus
from .evaluation.cli import evaluate_app
from .generate_cli import generate
from .hub_cli import card, export, push

# torch, diffusers and what imports them wait until a command runs: `dinotok --help` is quick.
if TYPE_CHECKING:
    from .hub import TokenizerFiles
    from .models.quantizers import CodeCounter
    from .models.tokenizer_model import TokenizerModel

app = typer.Typer(
    help="Image tokenizers on frozen vision foundation models.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_show_locals=False,
)

app.add_typer(convert_app, name="convert")
app.add_typer(evaluate_app, name="evaluate")
for command in (generate, encode_corpus, export, push, card):
    app.command()(command)

SOME_FAILED = 1
_MAX_TABLE_ROWS = 20


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
        encoder: Folder or repository of the frozen encoder, for a model saved without; None is what its config says.
    """

    batch_size: int
    device: str | None
    dtype: Dtype
    tiling: bool
    tile_size: int | None
    tile_overlap: int | None
    encoder: str | None

    def load(self, source: "TokenizerFiles") -> "TokenizerModel":
        """Load a tokenizer to the device, and switch tiling on if it is wanted.

        Raises:
            ValueError: If the device does not exist or the tile sizes do not fit the model.
        """
        import torch

        device = check_device(self.device)
        model = source.load(getattr(torch, self.dtype.value), self.encoder).to(device)
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

        self.entries.append({"file": name, "reason": one_line(error)})
        tqdm.write(f"skipped {name}: {one_line(error)}", file=sys.stderr)

    def finish(self, done: int, what: str) -> None:
        """End the command with the status that says whether all, some or none of the files worked."""
        if not done:
            raise ValueError(f"None of {len(self.entries)} {what} could be used.")
        if self.entries:
            typer.echo(f"{len(self.entries)} skipped, {done} done.", err=True)
            raise typer.Exit(SOME_FAILED)


Pictures = Annotated[
    list[Path], typer.Argument(metavar="PATH...", help="Pictures, parquet files of pictures, and folders of both.")
]
ImageColumn = Annotated[str, typer.Option(help="Where parquet files have their pictures.")]
Model = Annotated[str, typer.Option(help="Folder or Hub repository of a tokenizer.")]
Encoder = Annotated[str | None, typer.Option(help="Folder or repository of the encoder, for a model saved without.")]
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
    """Encode and decode photographs with the models of the package: offline, in under a minute."""
    with user_errors():
        from .folders import check_output
        from .quickstart import print_quickstart, run_quickstart

        check_output(output)
        typer.echo("Encoding and decoding photographs with the models of the package ...")
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
    encoder: Encoder = None,
    revision: Revision = None,
    image_column: ImageColumn = "image",
    recursive: Recursive = False,
) -> None:
    """Encode and decode pictures; write PNG files, sheet.png and metrics.json, and print PSNR and SSIM."""
    with user_errors():
        from .folders import check_output, find_pictures
        from .hub import find_tokenizer
        from .metrics import ReconstructionMetrics
        from .reports import write_reconstruction_sheet, write_report
        from .transcoding import code_counters, reconstruct_files

        failures = Failures()
        files = find_pictures(paths, failures.add, recursive, output, image_column)
        check_output(output, files)
        source = find_tokenizer(model, revision)
        settings = RunSettings(batch_size, device, dtype, tiling, tile_size, tile_overlap, encoder)
        tokenizer = settings.load(source)
        metrics, counters = ReconstructionMetrics(), code_counters(tokenizer)
        rows = list(reconstruct_files(tokenizer, files, output, metrics, failures.add, batch_size, counters))
        summary = metrics.compute() if rows else None
        header = _report_header(source) | {"settings": settings.describe(tokenizer)}
        write_report(output / "metrics.json", rows, failures.entries, summary, header, counters)
        if rows and sheet:
            write_reconstruction_sheet(rows, files, output, sheet, tokenizer.image_size)
        if summary is not None:
            _print_metrics(rows, summary)
            _print_usage(counters)
            typer.echo(f"Written to {output}")
        failures.finish(len(rows), "pictures")


@app.command()
def encode(
    paths: Pictures,
    model: Model,
    output: Output,
    tokens: Annotated[
        bool | None,
        typer.Option("--tokens/--latents", help="What to write; by default tokens if the model has codebooks."),
    ] = None,
    shard_size: Annotated[
        int | None,
        typer.Option(min=1, help="Pictures per file, at most; by default 4096 for tokens, 256 for latents."),
    ] = None,
    latents_dtype: Annotated[Dtype, typer.Option(help="Precision of the stored latents.")] = Dtype.float32,
    batch_size: BatchSize = 8,
    device: Device = None,
    dtype: ModelDtype = Dtype.float32,
    tiling: Tiling = False,
    tile_size: TileSize = None,
    tile_overlap: TileOverlap = None,
    encoder: Encoder = None,
    revision: Revision = None,
    image_column: ImageColumn = "image",
    recursive: Recursive = False,
) -> None:
    """Write pictures as tokens (parquet) or latents (safetensors) that `dinotok decode` turns back into pictures."""
    with user_errors():
        import torch

        from .folders import check_output, find_pictures
        from .hub import find_tokenizer
        from .shards import ModelOrigin, check_has_no_shards
        from .transcoding import code_counters, encode_files, encode_files_to_tokens, open_shard_file

        check_output(output)
        check_has_no_shards(output)
        failures = Failures()
        files = find_pictures(paths, failures.add, recursive, output, image_column)
        source = find_tokenizer(model, revision)
        settings = RunSettings(batch_size, device, dtype, tiling, tile_size, tile_overlap, encoder)
        tokenizer = settings.load(source)
        origin = ModelOrigin(
            model=source.name,
            revision=source.revision,
            digest=source.digest,
            class_name=source.class_name,
            patch_size=tokenizer.config["patch_size"],
            settings=settings.describe(tokenizer),
            image_size=tokenizer.image_size,
        )
        arguments = (tokenizer, files, output, origin, failures.add, batch_size)
        if tokens or (tokens is None and code_counters(tokenizer)):
            shards = encode_files_to_tokens(*arguments, shard_size or 4096)
        else:
            shards = encode_files(*arguments, shard_size or 256, getattr(torch, latents_dtype.value))
        done = 0
        for path in shards:
            shard = open_shard_file(path)
            done += len(shard.sizes)
            typer.echo(f"{path}: {shard.content} of {len(shard.sizes)} pictures")
        failures.finish(done, "pictures")


@app.command()
def decode(
    shards: Annotated[list[Path], typer.Argument(metavar="SHARDS...", help="Files of `dinotok encode`, or folders.")],
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
    encoder: Encoder = None,
    revision: Revision = None,
    recursive: Recursive = False,
) -> None:
    """Turn files of tokens or latents back into pictures of the original sizes."""
    with user_errors():
        from .folders import check_output, find_files
        from .transcoding import check_same_model, decode_files, find_tokenizer_of, open_shards

        check_output(output)
        failures = Failures()
        found = open_shards(find_files(shards, (".safetensors", ".parquet"), recursive), failures.add)
        if not found:
            failures.finish(0, "files of tokens or latents")
        source = find_tokenizer_of(found[0], model, revision)
        if not allow_revision_mismatch:
            check_same_model(found[0], source)
        settings = RunSettings(batch_size, device, dtype, tiling, tile_size, tile_overlap, encoder)
        done = len(list(decode_files(settings.load(source), found, output, failures.add, batch_size)))
        typer.echo(f"{output}: {done} pictures")
        failures.finish(done, "pictures")


@app.command()
def codebook(
    paths: Pictures,
    model: Model,
    output: Output,
    codes: Annotated[int, typer.Option(min=1, help="How many of the most used codes to show.")] = 64,
    patches: Annotated[int, typer.Option(min=1, help="Patches to show for each code, of as many pictures.")] = 8,
    batch_size: BatchSize = 8,
    device: Device = None,
    dtype: ModelDtype = Dtype.float32,
    tiling: Tiling = False,
    tile_size: TileSize = None,
    tile_overlap: TileOverlap = None,
    encoder: Encoder = None,
    revision: Revision = None,
    image_column: ImageColumn = "image",
    recursive: Recursive = False,
) -> None:
    """Show what the codes of a discrete tokenizer stand for, and how often pictures use them."""
    with user_errors():
        from .codebooks import study_codebooks, write_codebook_study
        from .folders import check_output, find_pictures
        from .hub import find_tokenizer
        from .image_processor import ImageProcessor

        check_output(output)
        failures = Failures()
        files = find_pictures(paths, failures.add, recursive, output, image_column)
        source = find_tokenizer(model, revision)
        settings = RunSettings(batch_size, device, dtype, tiling, tile_size, tile_overlap, encoder)
        tokenizer = settings.load(source)
        study = study_codebooks(tokenizer, files, failures.add, batch_size, patches)
        if study.num_pictures:
            header = _report_header(source) | {"settings": settings.describe(tokenizer)}
            processor = ImageProcessor.from_model(tokenizer)
            written = write_codebook_study(study, files, processor, output, failures.add, header, codes)
            _print_usage(study.counters)
            typer.echo("\n".join(map(str, written)))
        failures.finish(study.num_pictures, "pictures")


def main() -> None:
    """Run the command line."""
    app(prog_name="dinotok")


def _report_header(source: "TokenizerFiles") -> dict[str, Any]:
    from . import __version__
    from .hub import model_header

    return {"dinotok_version": __version__, **model_header(source)}


def _print_metrics(rows: list[dict[str, Any]], summary: dict[str, float]) -> None:
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
    Console().print(table)


def _print_usage(counters: Mapping[str, "CodeCounter"]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("codebook", "codes", "used", "perplexity", "tokens")
    for name, counter in counters.items():
        usage = counter.compute()
        share, numbers = f"{usage.usage:.1%}", (f"{usage.perplexity:,.1f}", f"{usage.num_tokens:,}")
        table.add_row(name, f"{usage.codebook_size:,}", share, *numbers)
    if counters:
        Console().print(table)


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.4f}"
