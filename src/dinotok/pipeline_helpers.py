"""What the pipelines share: class labels by name, and the code files that lie beside the weights."""

import difflib
import inspect
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

ClassLabels = int | str | Sequence[int | str] | torch.Tensor


def class_ids(
    labels: ClassLabels, num_classes: int, id2label: Mapping[int, str] | Mapping[str, str] | None = None
) -> list[int]:
    """Return the ids of classes given by id or name.

    Args:
        labels: One or several. Names are compared without regard to case, whole or each of the comma-separated.
        num_classes: Ids are below it; `num_classes` itself, the null class, is allowed too.
        id2label: Names by id; several names of one class are separated by commas.

    Returns:
        A list, also of one label.

    Raises:
        ValueError: If there is no label, an id is out of range, or a name is unknown or that of several classes.
    """
    if isinstance(labels, torch.Tensor):
        labels = labels.flatten().tolist()
    several = [labels] if isinstance(labels, int | str) else list(labels)
    if not several:
        raise ValueError("class_labels is empty: name at least one class.")
    return [
        _id_of_name(label, id2label) if isinstance(label, str) else _checked_id(label, num_classes)
        for label in several
    ]


def _checked_id(label: int, num_classes: int) -> int:
    if not isinstance(label, int) or not 0 <= label <= num_classes:
        raise ValueError(f"Class id {label!r} is not in 0..{num_classes} ({num_classes} is the null class).")
    return label


def _id_of_name(label: str, id2label: Mapping[int, str] | Mapping[str, str] | None) -> int:
    if not id2label:
        raise ValueError(f"Class {label!r} is a name, but this pipeline has no id2label: pass ids.")
    ids: dict[str, list[int]] = {}
    for index, names in id2label.items():
        for name in {part.strip().lower() for part in (names, *names.split(","))}:
            ids.setdefault(name, []).append(int(index))
    found = ids.get(label.strip().lower(), [])
    if len(found) != 1:
        similar = ", ".join(difflib.get_close_matches(label.lower(), ids, n=3, cutoff=0.5)) or "none similar"
        problem = f"is the name of the classes {found}: pass an id" if found else f"is not known ({similar})"
        raise ValueError(f"Class {label!r} {problem}.")
    return found[0]


class PipelineCodeMixin:
    """Saves a pipeline with the code that loads it; a base class of it, before `DiffusionPipeline`.

    The class is alone in its file, which has absolute imports only. With that file beside the weights,
    `DiffusionPipeline.from_pretrained(..., trust_remote_code=True)` works where nothing has imported dinotok yet; the
    class's own `from_pretrained` needs no code files, and no trust.
    """

    def save_config(self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs) -> None:
        """Write `model_index.json`, the pipeline's file as `pipeline.py`, and a line of code for each component.

        Args:
            save_directory: The folder.
            push_to_hub: As in diffusers, and so are the others.
            **kwargs: Likewise.
        """
        super().save_config(save_directory, push_to_hub=push_to_hub, **kwargs)  # type: ignore[misc]
        index_file = Path(save_directory) / self.config_name  # type: ignore[attr-defined]
        index = json.loads(index_file.read_text(encoding="utf-8"))
        own = type(self).__module__  # of the components as well, where a repository's code is used without dinotok
        for row in index.values():
            if isinstance(row, list) and row[0] == own:
                row[0] = "dinotok"
        code = Path(inspect.getfile(type(self))).read_text(encoding="utf-8")
        write_pipeline_code(index_file.parent, {**index, "_class_name": type(self).__name__}, code)

    @classmethod
    def _dict_from_json_file(cls, json_file: str | os.PathLike[str]) -> dict[str, Any]:
        """Read `model_index.json`; asked for by its class, the pipeline does not look for code beside the weights."""
        index = super()._dict_from_json_file(json_file)  # type: ignore[misc]
        if isinstance(index.get("_class_name"), list):
            index["_class_name"] = index["_class_name"][1]
        return index


def write_pipeline_code(folder: Path, index: Mapping[str, Any], code: str) -> None:
    """Write `pipeline.py`, a line of code for each component of dinotok, and `model_index.json` that names them.

    Args:
        folder: With a folder for each component.
        index: For `model_index.json`; `_class_name` is the class in `code`.
        code: For `pipeline.py`.
    """
    rows: dict[str, Any] = {**index, "_class_name": ["pipeline", index["_class_name"]]}
    for name, row in index.items():
        if isinstance(row, list) and str(row[0]).split(".")[0] == "dinotok":
            rows[name] = ["dinotok", row[1]]
            _write(folder / name / "dinotok.py", f"from dinotok import {row[1]} as {row[1]}\n")
    _write(folder / "pipeline.py", code)
    _write(folder / "model_index.json", json.dumps(rows, indent=2, sort_keys=True) + "\n")


def _write(path: Path, text: str) -> None:
    """Write a file, complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
