"""Write a model or a pipeline as a folder that is exactly a Hub repository: weights, configs, code and card."""

import inspect
import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file

from .bundled import bundled_folder, bundled_models, resolve_bundled
from .generation import BUNDLED_TOKENIZER, TOKENIZER_COMPONENTS, find_pipeline
from .hub import AUTO_MAP, locate, read_config
from .hub_code import standalone_code
from .hub_upload import CARD_NAME, repository_files
from .models.tokenizer_model import ENCODER_PREFIX
from .pipeline_helpers import write_pipeline_code

_INDEX, _CONFIG = "model_index.json", "config.json"
# What belongs to a model; nothing else of a folder is published.
_FILES = ("*.json", "*.safetensors", CARD_NAME)
_PATTERNS = (*_FILES, "*/*.json", "*/*.safetensors")


@dataclass
class Export:
    """What was written.

    Attributes:
        folder: The repository.
        files: Its files, relative to it, with `/`, and their sizes in bytes.
        notes: What its owner should know before publishing it.
    """

    folder: Path
    files: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def export_repository(
    name_or_path: str, output: Path, revision: str | None = None, card: Path | None = None
) -> Export:
    """Write a folder that can be pushed to the Hub, and that loads where dinotok is not installed.

    Weights are copied as they are; an encoder that only the package has joins those of its tokenizer. A tokenizer or
    a transformer gets one file of code, which `config.json` names for diffusers' `AutoModel`; a pipeline gets
    `pipeline.py`, and the tokenizer of the package that it stands on, if it names one. An encoder is a model of
    transformers, and needs no code.

    Args:
        name_or_path: A folder that `save_pretrained` wrote, a repository, or a model of the package.
        output: The folder to make; missing or empty.
        revision: Branch, tag or commit of a repository.
        card: A card to copy (.md), or its JSON to render; by default that of the package's model or the one in the
            folder, or one that says what the files say.

    Raises:
        OSError: If files are missing, or there is no such folder or repository.
        ValueError: If it is no model of dinotok, or could not be loaded by anybody else.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"output={str(output)!r} is there already and not empty: name another, or delete it.")
    source, _ = locate(name_or_path, revision, _PATTERNS)
    bundled = name_or_path if resolve_bundled(name_or_path) != name_or_path else None
    output.parent.mkdir(parents=True, exist_ok=True)
    export = Export(output)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as temporary:
        folder = Path(temporary) / "repository"
        folder.mkdir()
        export_into = _export_pipeline if (source / _INDEX).is_file() else _export_model
        export_into(name_or_path, source, folder, export.notes)
        text = _card(bundled, folder, output.name, export.notes) if card is None else _given_card(card, folder)
        (folder / CARD_NAME).write_text(text, encoding="utf-8")
        if output.is_dir():
            output.rmdir()
        folder.rename(output)
    export.files = repository_files(output)
    return export


def _export_model(name: str, source: Path, folder: Path, notes: list[str]) -> None:
    """Copy a tokenizer, a transformer or an encoder, and write its code."""
    import dinotok

    config = read_config(source / _CONFIG, name, "model")
    _copy(source, folder)
    _check_weights(folder, name)
    class_name = config.get("_class_name")
    if class_name is None and "model_type" in config:
        return  # transformers knows it
    if class_name not in dinotok.__all__:
        raise ValueError(f"{name!r} holds a {class_name}, which is no model of dinotok.")
    _complete_tokenizer(config, folder, notes)
    module = inspect.getmodule(getattr(dinotok, class_name))
    file = str(module and module.__name__).rpartition(".")[2]
    _write_json(folder / _CONFIG, {**_without_path(config), AUTO_MAP: {"AutoModel": f"{file}.{class_name}"}})
    (folder / f"{file}.py").write_text(standalone_code([class_name]), encoding="utf-8")


def _export_pipeline(name: str, source: Path, folder: Path, notes: list[str]) -> None:
    """Copy a pipeline with all its components, and write its code."""
    import dinotok

    found = find_pipeline(source)
    index = read_config(source / _INDEX, name, "pipeline") | {"_class_name": found.class_name}
    _copy(source, folder)
    for component in (path for path in sorted(source.iterdir()) if path.name in index and path.is_dir()):
        _copy(component, folder / component.name)
    tokenizer = TOKENIZER_COMPONENTS[found.class_name]
    if index.pop(BUNDLED_TOKENIZER, None) is not None:
        bundled = bundled_folder(str(found.tokenizer))
        _copy(bundled, folder / tokenizer)
        index[tokenizer] = ["dinotok", read_config(bundled / _CONFIG, bundled.name, "tokenizer")["_class_name"]]
    for path in folder.glob(f"*/{_CONFIG}"):
        config = read_config(path, name, "model")
        _check_weights(path.parent, f"{name}/{path.parent.name}")
        _complete_tokenizer(config, path.parent, notes)
        _write_json(path, _without_path(config))
    rows = [row[1] for row in index.values() if isinstance(row, list) and row[1] in dinotok.__all__]
    write_pipeline_code(folder, index, standalone_code([*dict.fromkeys(rows), found.class_name]))


def _copy(source: Path, folder: Path) -> None:
    """Copy what belongs to a model."""
    folder.mkdir(exist_ok=True)
    for path in (path for pattern in _FILES for path in source.glob(pattern) if path.name[0] != "."):
        shutil.copyfile(path, folder / path.name)


def _check_weights(folder: Path, name: str) -> None:
    if not any(folder.glob("*.safetensors")):
        raise FileNotFoundError(f"{name!r} has no weights in safetensors.")


def _complete_tokenizer(config: Mapping[str, Any], folder: Path, notes: list[str]) -> None:
    """Add an encoder that only the package has to the weights of a tokenizer, and say whose weights it needs.

    Raises:
        ValueError: If the encoder is neither in the files nor where anybody else could get it.
    """
    if "encoder_config" not in config:
        return
    repository = config.get("encoder_repository")
    files = sorted(folder.glob("*.safetensors"))
    inside = any(name.startswith(ENCODER_PREFIX) for path in files for name in _tensor_names(path))
    if not inside and repository is None:
        raise ValueError(
            "The tokenizer was saved without its encoder, which came from a local folder: nobody else could load it. "
            "Save it with include_encoder=True."
        )
    if repository in bundled_models():
        if not inside:
            _add_encoder(files[0], bundled_folder(repository) / "model.safetensors")
    elif repository is not None:
        verb = "are in these files" if inside else "are fetched from there"
        notes.append(f"The encoder's weights, of {repository}, {verb}: its licence holds for what you publish.")


def _add_encoder(weights: Path, encoder: Path) -> None:
    """Put an encoder into the file of a tokenizer that was saved without."""
    with safe_open(weights, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(weights) | {ENCODER_PREFIX + name: tensor for name, tensor in load_file(encoder).items()}
    save_file(tensors, weights, metadata)


def _tensor_names(path: Path) -> list[str]:
    with safe_open(path, "pt") as file:
        return list(file.keys())


def _without_path(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config without the folder that it was loaded from."""
    return {key: value for key, value in config.items() if key != "_name_or_path"}


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _given_card(path: Path, folder: Path) -> str:
    from .model_cards import read_card, render_card

    if path.suffix == ".json":
        return render_card(read_card(path, folder))
    return path.read_text(encoding="utf-8")


def _card(bundled: str | None, folder: Path, name: str, notes: list[str]) -> str:
    """The card of a model of the package, or the one beside the weights, or a plain one."""
    from .model_cards import plain_card, published_card

    if bundled in bundled_models() and (text := published_card(str(bundled))) is not None:
        return text
    if (folder / CARD_NAME).is_file():
        return (folder / CARD_NAME).read_text(encoding="utf-8")
    notes.append(f"{CARD_NAME} says only what the files say: complete it, its licence first.")
    return plain_card(name, folder)
