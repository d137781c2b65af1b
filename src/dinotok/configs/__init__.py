"""Model configurations of published size, as JSON files."""

from pathlib import Path

_FOLDER = Path(__file__).parent


def config_path(name: str) -> Path:
    """Return the file of a bundled configuration, for `Model.from_config(Model.load_config(config_path(name)))`.

    Args:
        name: Such as `autoencoder_dinotok_dinov3_base`.

    Raises:
        ValueError: If there is none of that name; the message lists those there are.
    """
    path = _FOLDER / f"{name}.json"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in _FOLDER.glob("*.json")))
        raise ValueError(f"There is no configuration {name!r}; there are {known}.")
    return path
