"""What the commands share: options, and errors told in one line."""

from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

NOTHING_DONE = 2


class Dtype(StrEnum):
    """Names of torch dtypes, as options."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


Output = Annotated[Path, typer.Option(help="Folder for the results; made if it is missing.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of the Hub repository.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Pictures of one size that go through the model together.")]
Device = Annotated[str | None, typer.Option(help="Such as cuda:1; by default cuda if there is a GPU, else cpu.")]
ModelDtype = Annotated[Dtype, typer.Option(help="Precision of the model.")]


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
        raise ValueError(f"device={name!r} cannot be used here: {one_line(error)}") from error
    return name


def _fail(error: BaseException) -> None:
    typer.echo(f"error: {one_line(error)}", err=True)
    raise typer.Exit(NOTHING_DONE) from error


def one_line(error: BaseException) -> str:
    """Return what an error says, or its name if it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__
