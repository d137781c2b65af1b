"""How benchmarks keep their results, and print them as tables."""

import json
from pathlib import Path
from typing import Any

from dinotok.folders import writing


def save(results: Any, path: Path) -> None:
    """Write results as JSON, whole or not at all: a benchmark that goes on finds what is finished."""
    with writing(path) as temporary:
        temporary.write_text(json.dumps(results, indent=2) + "\n")


def write_table(lines: list[str], documentation: str, results: Path) -> None:
    """Print a table in Markdown, and write it beside the results, under the first line of a benchmark's docstring."""
    text = "\n".join(lines)
    print(text)
    results.with_suffix(".md").write_text(f"{documentation.splitlines()[0]}\n\n{text}\n")
