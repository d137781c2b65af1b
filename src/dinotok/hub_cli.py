"""`dinotok export`, `push` and `card`: from a model's folder to a repository of the Hub."""

from pathlib import Path
from typing import Annotated

import typer

from .command_line import Revision, user_errors

CARDS_DIFFER = 1


def export(
    model: Annotated[str, typer.Argument(help="Folder, Hub repository, or model of the package.")],
    output: Annotated[Path, typer.Argument(help="Folder to make, which then is a repository.")],
    card: Annotated[
        Path | None, typer.Option(help="Model card (.md) or its JSON; by default the card that the model has.")
    ] = None,
    revision: Revision = None,
) -> None:
    """Write a model or pipeline as a Hub repository: weights, configs, code that needs no dinotok, and card."""
    with user_errors():
        from .hub_export import export_repository

        made = export_repository(model, output, revision, card)
        _print_files(made.files)
        for note in made.notes:
            typer.echo(f"note: {note}", err=True)
        typer.echo(f"Written to {made.folder}")


def push(
    folder: Annotated[Path, typer.Argument(help="Folder of `dinotok export`.")],
    repository: Annotated[str, typer.Argument(help="Such as user/tokenizer; made if it is missing.")],
    private: Annotated[
        bool | None, typer.Option("--private/--public", help="Of a new repository; by default the owner's setting.")
    ] = None,
    message: Annotated[str, typer.Option(help="Of the commit.")] = "Upload model",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List what would be uploaded, and stop.")] = False,
) -> None:
    """Upload a repository's folder to the Hub; started again after an interruption, it goes on."""
    with user_errors():
        from .hub_upload import check_repository, push_folder

        _print_files(check_repository(folder, repository))
        if dry_run:
            typer.echo(f"Nothing was uploaded: without --dry-run, this goes to {repository}.")
            return
        typer.echo(push_folder(folder, repository, private, message))


def card(
    names: Annotated[list[str] | None, typer.Argument(metavar="[NAME]...", help="Of JSON files of cards.")] = None,
    folder: Annotated[Path, typer.Option(help="Where the JSON files are, and the cards go.")] = Path("model_cards"),
    render_all: Annotated[bool, typer.Option("--all", help="Render every card of the folder.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Write nothing; fail if a card is not up to date.")] = False,
) -> None:
    """Render model cards from JSON: prose and facts from FOLDER/NAME.json, numbers from the results it names."""
    with user_errors():
        from .folders import writing
        from .model_cards import card_names, read_card, render_card

        if bool(names) == render_all:
            raise ValueError("Name cards, or pass --all.")
        outdated = []
        for name in card_names(folder) if render_all else names or ():
            path, text = folder / f"{name}.md", render_card(read_card(folder / f"{name}.json"))
            if path.is_file() and path.read_text(encoding="utf-8") == text:
                continue
            outdated.append(path)
            if not check:
                with writing(path) as temporary:
                    temporary.write_text(text, encoding="utf-8")
        word = "is not up to date" if check else "written"
        for path in outdated:
            typer.echo(f"{path} {word}")
        if outdated and check:
            raise typer.Exit(CARDS_DIFFER)


def _print_files(files: dict[str, int]) -> None:
    width = max(map(len, files))
    for name, size in files.items():
        typer.echo(f"{name:<{width}}  {_size(size):>10}")
    typer.echo(f"{f'{len(files)} files':<{width}}  {_size(sum(files.values())):>10}")


def _size(count: int) -> str:
    for unit, power in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= power:
            return f"{count / power:.2f} {unit}"
    return f"{count} B"
