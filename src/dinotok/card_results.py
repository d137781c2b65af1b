"""Numbers of a model card, from the files that a benchmark or an evaluation wrote."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult

from .evaluation.reports import model_index
from .generation import find_pipeline

NOT_SCORED = "Not scored yet"

# The tables of results: what a row is, and the columns with how a value of the results file is written.
TABLES: dict[str, tuple[str, dict[str, str]]] = {
    "reconstruction": (
        "size",
        {
            "validation photographs": "{num_images}",
            "PSNR (pooled)": "{psnr:.2f} ({psnr_pooled:.2f}) dB",
            "SSIM": "{ssim:.3f}",
            "LPIPS alex, squeeze": "{lpips_alex:.3f}, {lpips_squeeze:.3f}",
            "FID-768": "{fid_768:.3f}",
            "codes used (semantic, texture)": "{semantic_usage:.1%}, {texture_usage:.1%}",
        },
    ),
    "accuracy": ("representation, mean over a picture", {"k-NN accuracy": "{value:.1%}"}),
    "generation": (
        "setting",
        {
            "FID-768, val": "{fid_768_val:.3f}",
            "FID-768, train": "{fid_768_train:.3f}",
            "class accuracy": "{accuracy:.1%}",
            "CPU s a picture": "{cpu_seconds_per_picture:.2f}",
        },
    ),
    "metrics": ("metric", {"value": "{value:.4g}"}),
}


def results_table(root: Path, model: Path | None, table: Mapping[str, Any]) -> str:
    """Return a table of results.

    Args:
        root: What the file's path is relative to.
        model: The folder of the model.
        table: `table`, a name in `TABLES`; `file` of results; `rows`, each with a `label` and a `path` into the file,
            or `each` to make rows of everything at the path; `digest`, a path to that of the model which was scored.

    Returns:
        Markdown. A row that is not in the file, or is of a model with another digest, says that it is not scored.
    """
    first, columns = TABLES[table["table"]]
    results = _results(root, model, table)
    lines = [f"| {' | '.join((first, *columns))} |", "|---" * (1 + len(columns)) + "|"]
    for label, values in (found for row in table["rows"] for found in _found_rows(results, row)):
        cells = [NOT_SCORED, *"-" * (len(columns) - 1)] if values is None else _cells(values, columns.values())
        lines.append(f"| {' | '.join((label, *cells))} |")
    return "\n".join(lines)


def eval_results(root: Path, model: Path | None, entry: Mapping[str, Any]) -> list[EvalResult]:
    """Return entries of a `model-index`, by the evaluation's own maker; none for what is not scored.

    Args:
        root: What the file's path is relative to.
        model: The folder of the model.
        entry: `file`, a report of `dinotok evaluate` or a benchmark's results; `path` to the values in it, by default
            `metrics`; names of `metrics` in it, or what they are called in the block by that name; `task` and
            `task_name`; `dataset` and `split`, if the file does not say.
    """
    results = _results(root, model, entry)
    values = _lookup(results, entry.get("path", ["metrics"]))
    if values is None:
        return []
    report = {
        "dataset": entry.get("dataset") or results["dataset"],
        "split": entry.get("split") or results["split"],
        "metrics": {metric: values[name] for name, metric in _metric_names(entry) if values.get(name) is not None},
    }
    return model_index(report, entry["task"], entry["task_name"])


def _metric_names(entry: Mapping[str, Any]) -> list[tuple[str, str]]:
    names = entry["metrics"]
    return list(names.items()) if isinstance(names, Mapping) else [(name, name) for name in names]


def _results(root: Path, model: Path | None, entry: Mapping[str, Any]) -> Any:
    """A file of results; nothing if there is none, or if it is about other weights."""
    path = root / entry["file"]
    if not path.is_file():
        return {}
    results = json.loads(path.read_text(encoding="utf-8"))
    if "digest" in entry and model is not None:
        scored = _lookup(results, entry["digest"])
        if scored != find_pipeline(model).digest:
            return {}
    return results


def _found_rows(results: Any, row: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any] | None]]:
    found = _lookup(results, row["path"])
    if row.get("each") and found:
        yield from ((label, _as_row(values)) for label, values in found.items())
    else:
        yield row["label"], None if found is None else _as_row(found)


def _as_row(values: Any) -> Mapping[str, Any]:
    return values if isinstance(values, Mapping) else {"value": values}


def _lookup(values: Any, path: Sequence[str]) -> Any:
    for key in path:
        values = values.get(key) if isinstance(values, Mapping) else None
    return values


def _cells(values: Mapping[str, Any], formats: Iterable[str]) -> list[str]:
    cells = []
    for text in formats:
        try:
            cells.append(text.format_map(values))
        except KeyError:
            cells.append("-")
    return cells
