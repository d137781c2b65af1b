"""An evaluation as a table, as JSON, and as the `model-index` of a model card."""

import json
import math
import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import EvalResult, ModelCardData

from ..folders import writing

_LIBRARIES = ("torchmetrics", "safetensors", "pillow", "datasets", "diffusers", "transformers")
SSIM = {"window": "Gaussian 11x11, sigma 1.5, reflected borders", "data_range": "1.0 for pixels in [0, 1], 8 bits"}


def environment() -> dict[str, str]:
    """Return the versions of the libraries that numbers depend on."""
    from .. import __version__

    return {"dinotok": __version__, "torch": torch.__version__, **{name: version(name) for name in _LIBRARIES}}


def write_evaluation(report: dict[str, Any], output: Path) -> None:
    """Write `evaluation.json`, where numbers that JSON cannot express are null with a note."""
    nulls = {name for name, value in report["metrics"].items() if not math.isfinite(value)}
    notes = {name: f"null stands for {report['metrics'][name]}" for name in sorted(nulls)}
    metrics = {name: None if name in nulls else value for name, value in report["metrics"].items()}
    text = json.dumps({**report, "metrics": metrics, "notes": notes}, indent=2, allow_nan=False, default=str)
    with writing(output / "evaluation.json") as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def model_index(report: dict[str, Any], task: str, task_name: str) -> list[EvalResult]:
    """Return a report's entries for the `model-index` of a model card.

    Args:
        report: With `dataset`, `split` and `metrics`; values that are not finite are left out.
        task: Of the Hub, such as `image-to-image`.
        task_name: In words.
    """
    dataset, split = str(report["dataset"]), str(report["split"]).split("[")[0]
    return [
        EvalResult(
            task_type=task,
            task_name=task_name,
            dataset_type=Path(dataset).name if os.path.exists(dataset) else dataset,  # a path is nobody else's
            dataset_name=Path(dataset).name,
            dataset_split=split,
            metric_type=name,
            metric_value=round(value, 4),
        )
        for name, value in report["metrics"].items()
        if math.isfinite(value)
    ]


def write_model_index(report: dict[str, Any], output: Path, task: str, task_name: str) -> None:
    """Write `model-index.md`: the YAML block to put at the head of a model card.

    Args:
        report: As in `model_index`, and `model`.
        output: Folder.
        task: As in `model_index`, and so is the next.
        task_name: Likewise.
    """
    name, results = Path(str(report["model"])).name, model_index(report, task, task_name)
    data = ModelCardData(model_name=name, eval_results=results, ignore_metadata_errors=False)
    with writing(output / "model-index.md") as temporary:
        temporary.write_text(f"---\n{data.to_yaml()}\n---\n", encoding="utf-8")


def print_evaluation(report: dict[str, Any]) -> None:
    """Print the metrics, the use of the codebooks and the warnings."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table("metric", "value")
    for name, value in report["metrics"].items():
        table.add_row(name, f"{value:.4f}")
    console.print(table)
    if report.get("codebooks"):
        table = Table("codebook", "codes", "used", "perplexity", "tokens")
        for name, usage in report["codebooks"].items():
            size, share, tokens = usage["codebook_size"], usage["usage"], usage["num_tokens"]
            table.add_row(name, f"{size:,}", f"{share:.1%}", f"{usage['perplexity']:,.1f}", f"{tokens:,}")
        console.print(table)
    for warning in report["warnings"]:
        console.print(f"warning: {warning}.")
