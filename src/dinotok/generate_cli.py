"""`dinotok generate`: pictures of classes, from the pipelines of the package or others."""

import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .command_line import BatchSize, Device, Dtype, ModelDtype, Output, Revision, check_device, user_errors

if TYPE_CHECKING:
    from PIL import Image

    from .generation import PipelineFiles

SHORT_NAMES = {"diffusion": "dinotok-tiny-dit", "autoregressive": "dinotok-tiny-ar"}
# What the small pipelines of the package draw best with; options that are given come first.
PRESETS: dict[str, dict[str, Any]] = {"diffusion": {"num_inference_steps": 25, "guidance_scale": 3.0}}
REPORT_NAME = "generation.json"
_FLAGS = {
    "num_inference_steps": "--steps",
    "guidance_scale": "--guidance-scale",
    "guidance_interval": "--guidance-interval",
    "temperature": "--temperature",
    "top_k": "--top-k",
    "top_p": "--top-p",
    "height": "--height",
    "width": "--width",
}
_MAX_SHEET_COLUMNS = 8


def generate(
    class_label: Annotated[list[str], typer.Option(help="Name or id of a class; may be given several times.")],
    output: Output,
    model: Annotated[
        str,
        typer.Option(help="diffusion or autoregressive, of the package; or folder or Hub repository of a pipeline."),
    ] = "diffusion",
    num_images: Annotated[int, typer.Option(min=1, help="Pictures of each class.")] = 4,
    seed: Annotated[
        int, typer.Option(min=0, max=2**62, help="Of the first picture of each class; the next has the next.")
    ] = 0,
    steps: Annotated[int | None, typer.Option(min=1, help="Of the solver. Diffusion only.")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="1 is no guidance.")] = None,
    guidance_interval: Annotated[
        tuple[float, float] | None,
        typer.Option(metavar="LOW HIGH", help="Times of guidance, 1 being noise. Diffusion only."),
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="0 takes the likeliest. Autoregressive only.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Draw from so many codes; 0 is all. Autoregressive only.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw from this probability. Autoregressive only.")] = None,
    height: Annotated[int | None, typer.Option(min=1, help="Pixels; by default what it was trained on.")] = None,
    width: Annotated[int | None, typer.Option(min=1, help="Likewise.")] = None,
    sheet: Annotated[bool, typer.Option(help="Write sheet.png, with a row for each class.")] = True,
    batch_size: BatchSize = 8,
    device: Device = None,
    dtype: ModelDtype = Dtype.float32,
    revision: Revision = None,
) -> None:
    """Draw pictures of classes; write PNG files, sheet.png and generation.json."""
    options = {
        "num_inference_steps": steps,
        "guidance_scale": guidance_scale,
        "guidance_interval": guidance_interval,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "height": height,
        "width": width,
    }
    with user_errors():
        import torch

        from .folders import check_output
        from .generation import draw_pictures, find_pipeline
        from .pipeline_helpers import class_ids

        check_output(output)
        files = find_pipeline(pipeline_name(model), revision)
        options = PRESETS.get(model, {}) | check_options(files, options)
        start = time.perf_counter()
        pipeline = files.load(getattr(torch, dtype.value)).to(check_device(device))
        pipeline.set_progress_bar_config(leave=False)
        names, num_classes = pipeline.config.id2label, pipeline.transformer.config.num_classes
        labels = [int(label) if label.isdecimal() else label for label in class_label]
        ids = list(dict.fromkeys(class_ids(labels, num_classes, names)))
        seeds = list(range(seed, seed + num_images))
        wanted = [(index, one) for index in ids for one in seeds]
        loaded = time.perf_counter()
        rows, pictures = [], []
        drawn = draw_pictures(
            pipeline, [index for index, _ in wanted], [one for _, one in wanted], batch_size, options
        )
        for (index, one), picture in zip(wanted, drawn, strict=True):
            rows.append(_save(picture, output, index, (names or {}).get(str(index)), one))
            pictures.append(picture)
        if sheet:
            _write_sheet(rows, pictures, output)
        settings = {
            **{name: value for name, value in files.defaults.items() if name in _FLAGS},
            **options,
            "batch_size": batch_size,
            "device": str(pipeline.device),
            "dtype": dtype.value,
        }
        seconds = {"loading": loaded - start, "drawing": time.perf_counter() - loaded}
        write_generation_report(output / REPORT_NAME, files, settings, seconds, rows)
        typer.echo(f"{output}: {len(rows)} pictures in {seconds['drawing']:.1f} s")


def pipeline_name(model: str) -> str:
    """Return the name behind a short one, or another name as it is.

    Raises:
        ValueError: If it is a short name, and the package does not have that pipeline.
    """
    from .bundled import bundled_models

    name = SHORT_NAMES.get(model, model)
    if model in SHORT_NAMES and name not in bundled_models():
        raise ValueError(f"This version of the package has no {name}: give --model the folder of a pipeline.")
    return name


def check_options(files: "PipelineFiles", options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that were given, if the pipeline has them all.

    Raises:
        ValueError: If it has not.
    """
    given = {name: value for name, value in options.items() if value is not None}
    known = files.defaults
    foreign = [_FLAGS[name] for name in given if name not in known]
    if foreign:
        taken = ", ".join(flag for name, flag in _FLAGS.items() if name in known)
        raise ValueError(f"{files.name!r} is a {files.class_name}, which has no {', '.join(foreign)}; it has {taken}.")
    return given


def write_generation_report(
    path: Path,
    files: "PipelineFiles",
    settings: dict[str, Any],
    seconds: dict[str, float],
    rows: list[dict[str, Any]],
) -> None:
    """Write what was drawn, and with what, as JSON; whole or not at all."""
    import json

    from . import __version__
    from .folders import writing
    from .hub import model_header

    report = {
        "dinotok_version": __version__,
        **model_header(files),
        "tokenizer": files.tokenizer,
        "settings": settings,
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "pictures": rows,
    }
    with writing(path) as temporary:
        temporary.write_text(json.dumps(report, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _save(picture: "Image.Image", output: Path, index: int, name: str | None, seed: int) -> dict[str, Any]:
    """Write a picture under a name that no other class and seed has, and describe it."""
    from .folders import write_png

    slug = re.sub(r"\W+", "-", (name or "").split(",")[0].lower())[:40].strip("-")
    file = "-".join(part for part in (f"{index:03d}", slug, str(seed)) if part) + ".png"
    write_png(picture, output / file)
    size = {"width": picture.width, "height": picture.height}
    return {"file": file, "class_id": index, "class_name": name, "seed": seed, **size}


def _write_sheet(rows: list[dict[str, Any]], pictures: "list[Image.Image]", output: Path) -> None:
    """A row for each class, with its first pictures."""
    from .folders import SHEET_NAME, write_png
    from .pictures import SheetEntry, sheet

    by_class: dict[int, list[int]] = {}
    for place, row in enumerate(rows):
        by_class.setdefault(row["class_id"], []).append(place)
    shown = [places[:_MAX_SHEET_COLUMNS] for places in by_class.values()]
    titles = [f"seed {rows[place]['seed']}" for place in shown[0]]
    entries = [
        SheetEntry([rows[places[0]]["class_name"] or f"class {index}"], [pictures[place] for place in places])
        for index, places in zip(by_class, shown, strict=True)
    ]
    write_png(sheet(titles, entries), output / SHEET_NAME)
