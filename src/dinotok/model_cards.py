"""Model cards, rendered: prose and facts from JSON, numbers from the files that a benchmark or an evaluation wrote."""

import math
import re
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from jinja2 import Environment, StrictUndefined, TemplateError
from safetensors import safe_open

from .bundled import bundled_folder, bundled_models
from .card_results import NOT_SCORED, eval_results, results_table
from .hub import read_config

_PACKAGE = Path(__file__).parent
_WIDTH = 119
_HEADER = ("license", "license_name", "license_link", "library_name", "pipeline_tag", "base_model", "datasets", "tags")
_PROSE = ("description", "latents", "training", "limits", "licence")


@dataclass(frozen=True)
class CardSource:
    """A card's JSON and where its files are.

    Attributes:
        name: Of the card.
        values: The JSON; see `docs/hub.md`.
        root: What its paths are relative to.
        model: The folder of the model, for facts; None if there is none here.
        shared: Paragraphs that cards have in common.
    """

    name: str
    values: dict[str, Any]
    root: Path
    model: Path | None
    shared: dict[str, Any]


def card_names(folder: Path) -> list[str]:
    """Return the names of the cards in a folder: its JSON files, but for those that begin with an underscore."""
    return sorted(path.stem for path in folder.glob("*.json") if not path.name.startswith("_"))


def read_card(path: Path, model: Path | None = None) -> CardSource:
    """Read the JSON of a card.

    Args:
        path: Of the file, named by the card; paths in it are relative to the folder around its own.
        model: The folder of the model; by default that of the model of the package of this name, if there is one.

    Raises:
        OSError: If there is no such file.
        ValueError: If it is not JSON.
    """
    name, shared = path.stem, path.with_name("_shared.json")
    if model is None and name in bundled_models():
        model = bundled_folder(name)
    return CardSource(
        name=name,
        values=read_config(path, name, "model card"),
        root=path.resolve().parents[1],
        model=model,
        shared=read_config(shared, name, "model card") if shared.is_file() else {},
    )


def published_card(name: str) -> str | None:
    """Return the rendered card of a model of the package, which lies beside `src/` or in the installed package."""
    for folder in (_PACKAGE / "model_cards", _PACKAGE.parents[1] / "model_cards"):
        if (folder / f"{name}.md").is_file():
            return (folder / f"{name}.md").read_text(encoding="utf-8")
    return None


def render_card(card: CardSource) -> str:
    """Return a card as Markdown with a YAML header.

    Raises:
        OSError: If the page of commands is missing; missing results are rows that say so.
        ValueError: If the JSON lacks a part, or names a value that is nowhere.
    """
    environment = Environment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    facts = model_facts(card.model) | {"shared": card.shared, "name": card.name}

    def prose(paragraphs: str | Sequence[str]) -> str:
        several = [paragraphs] if isinstance(paragraphs, str) else paragraphs
        texts = [environment.from_string(text).render(facts) for text in several]
        return "\n\n".join(_wrapped(part) for text in texts for part in text.split("\n\n"))

    values = card.values
    try:
        page = {key: prose(values.get(key, [])) for key in _PROSE}
        snippets = [
            {
                **snippet,
                "text": prose(snippet.get("text", "")),
                "code": environment.from_string("\n".join(snippet["code"])).render(facts),
            }
            for snippet in values["snippets"]
        ]
        results = [
            prose(part) if isinstance(part, str) else f"{_table(card, part)}\n\n{prose(_note(part))}"
            for part in values["results"]
        ]
        text = environment.from_string((_PACKAGE / "assets" / "model_card.md").read_text("utf-8")).render(
            page,
            name=card.name,
            header=_header(card),
            snippets=snippets,
            commands=training_commands(card),
            commit=values.get("commit", "unknown"),
            results=results,
        )
    except TemplateError as error:
        raise ValueError(f"The card of {card.name!r}: {error}.") from error
    except KeyError as error:
        raise ValueError(f"The card of {card.name!r} lacks {error}.") from error
    return text


def training_commands(card: CardSource) -> str:
    """Return the commands that made a model, from the page that has them all.

    The JSON says `{"page": ..., "runs": [...]}`: those commands are taken that read or write one of the runs' folders.
    """
    wanted = card.values.get("commands")
    if not wanted:
        return ""
    blocks = re.findall(r"^```bash\n(.*?)^```$", (card.root / wanted["page"]).read_text("utf-8"), re.M | re.S)
    options = re.compile(r"--(?:output_dir|source) (\S+)")
    statements = [statement for block in blocks for statement in _statements(block)]
    found = [
        statement
        for statement in statements
        if any(
            run == path or path.startswith(f"{run}/") for run in wanted["runs"] for path in options.findall(statement)
        )
    ]
    if not found:
        raise ValueError(f"{wanted['page']} has no command for {', '.join(wanted['runs'])}.")
    return "\n".join(found)


def model_facts(folder: Path | None) -> dict[str, Any]:
    """Return what the files of a model say: `config`, number of `parameters`, and `bits` per position of its codes.

    Args:
        folder: Of a model, or of a pipeline, whose components then have a `config` and `parameters` each.
    """
    if folder is None:
        return {}
    if not (folder / "config.json").is_file():
        parts = {path.parent.name: model_facts(path.parent) for path in sorted(folder.glob("*/config.json"))}
        return {key: {name: facts[key] for name, facts in parts.items()} for key in ("config", "parameters")}
    config = read_config(folder / "config.json", folder.name, "model")
    facts: dict[str, Any] = {"config": config, "parameters": _count_parameters(folder)}
    books = [value for key, value in sorted(config.items()) if key.endswith("codebook_size")]
    if books:
        facts["bits"] = round(sum(math.log2(size) for size in books), 2)
        if "query_grid" not in config:  # one position for each patch
            facts["bits_per_pixel"] = facts["bits"] / config["patch_size"] ** 2
    return facts


def plain_card(name: str, folder: Path) -> str:
    """Return a card that says what the files of a model say.

    Args:
        name: Of the repository.
        folder: Of a model or a pipeline.
    """
    facts = model_facts(folder)
    index = folder / "model_index.json"
    config = read_config(index, name, "pipeline") if index.is_file() else facts["config"]
    class_name = config.get("_class_name") or config.get("architectures", ["AutoModel"])[0]
    class_name = class_name[-1] if isinstance(class_name, list) else class_name
    loader = {
        "text": "",
        "code": [
            "from diffusers import AutoModel",
            "",
            f'model = AutoModel.from_pretrained("{name}", trust_remote_code=True)',
        ],
    }
    if index.is_file():
        loader["code"] = [line.replace("AutoModel", "DiffusionPipeline") for line in loader["code"]]
    values = {
        "library_name": "diffusers" if "_class_name" in config else "transformers",
        "tags": ["dinotok", class_name],
        "description": f"A {class_name} of dinotok.",
        "snippets": [loader],
        "training": "Not described yet.",
        "results": [f"{NOT_SCORED}."],
        "limits": "Not described yet.",
        "licence": "Not stated yet: it depends on the pictures of the training and on the frozen encoder.",
    }
    return render_card(CardSource(name, values, root=folder, model=folder, shared={}))


def _table(card: CardSource, table: dict[str, Any]) -> str:
    return results_table(card.root, card.model, table)


def _note(table: dict[str, Any]) -> str:
    return " ".join(part for part in (table.get("note"), f"`{table['command']}` prints all again.") if part)


def _header(card: CardSource) -> str:
    values = {key: card.values[key] for key in _HEADER if key in card.values}
    scores = [
        result for entry in card.values.get("model_index", ()) for result in eval_results(card.root, card.model, entry)
    ]
    if scores:
        values |= {"model_name": card.name, "eval_results": scores}
    return ModelCardData(**values, ignore_metadata_errors=False).to_yaml().strip()


def _statements(block: str) -> Iterator[str]:
    """The commands of a block, each with the lines that continue it; a loop is one."""
    lines: list[str] = []
    for line in block.splitlines():
        lines.append(line)
        inside = sum(part.split(" ")[0] == "for" for part in lines) > sum(part == "done" for part in lines)
        if not line.endswith("\\") and not inside:
            yield "\n".join(lines)
            lines = []


def _wrapped(text: str) -> str:
    """Wrap a paragraph, code in one piece."""
    whole = re.sub(r"`[^`]*`", lambda code: code[0].replace(" ", "\0"), text)
    return textwrap.fill(whole, _WIDTH, break_long_words=False, break_on_hyphens=False).replace("\0", " ")


def _count_parameters(folder: Path) -> int:
    total = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            total += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    return total
