"""Models that come with the package, found by name where a folder or Hub repository is expected."""

import os
from pathlib import Path

_FOLDER = Path(__file__).parent / "assets" / "models"


def bundled_models() -> list[str]:
    """Return the names of the models that come with the package, pipelines included."""
    return sorted(path.name for path in _FOLDER.iterdir() if path.is_dir()) if _FOLDER.is_dir() else []


def bundled_folder(name: str) -> Path:
    """Return the folder of a bundled model, whatever else may have its name.

    Raises:
        ValueError: If there is no such model in the package.
    """
    if name not in bundled_models():
        raise ValueError(f"{name!r} is not among the models of the package: {', '.join(bundled_models())}.")
    return _FOLDER / name


def resolve_bundled(name_or_path: str | os.PathLike[str]) -> str:
    """Return the folder of a bundled model, or anything else as it is.

    Args:
        name_or_path: A folder, a Hub repository, or a name such as `dinotok-tiny-ae`; a folder here goes first.
    """
    name = os.fspath(name_or_path)
    return str(_FOLDER / name) if name in bundled_models() and not os.path.exists(name) else name
