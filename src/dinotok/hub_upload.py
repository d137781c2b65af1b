"""Upload a repository's folder to the Hub, or say what would go."""

from pathlib import Path

from huggingface_hub import ModelCard, create_repo, upload_folder
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

CARD_NAME = "README.md"
# Formats that run code when they are read.
_PICKLES = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")
# What connection errors derive from: the HTTP library's own class, `httpx` or `httpx2` by huggingface_hub's version.
_HTTP_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]


def repository_files(folder: Path) -> dict[str, int]:
    """Return the files of a folder, relative to it with `/`, and their sizes; hidden ones are left out."""
    relative = {path: path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()}
    return {
        name.as_posix(): path.stat().st_size
        for path, name in relative.items()
        if not any(part.startswith(".") for part in name.parts)
    }


def check_repository(folder: Path, repo_id: str) -> dict[str, int]:
    """Return what would be uploaded, relative names and sizes in bytes, if it is fit to be.

    Args:
        folder: Such as `dinotok export` writes.
        repo_id: Such as `user/tokenizer`.

    Raises:
        OSError: If there is no such folder.
        ValueError: If it holds no model, no valid card or a pickle, or the name cannot be one of a repository.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{str(folder)!r} is no folder.")
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"{repo_id!r} cannot be the name of a repository: {error}") from error
    files = repository_files(folder)
    if not {"config.json", "model_index.json"} & files.keys():
        raise ValueError(f"{str(folder)!r} has neither config.json nor model_index.json: make it by `dinotok export`.")
    if pickles := [name for name in files if name.endswith(_PICKLES)]:
        raise ValueError(
            f"{pickles[0]} may be a pickle, which runs code when it is read: only safetensors are pushed."
        )
    if CARD_NAME not in files:
        raise ValueError(f"{str(folder)!r} has no {CARD_NAME}: make it by `dinotok export`.")
    if ModelCard.load(folder / CARD_NAME).data.license is None:
        raise ValueError(f"{CARD_NAME} states no licence: complete its header first.")
    return files


def push_folder(folder: Path, repo_id: str, private: bool | None = None, message: str = "Upload model") -> str:
    """Upload a folder; the repository is made if it is missing, and other files in it stay.

    Called again after an interruption, it goes on: what is there already is not sent again.

    Args:
        folder: Its files but the hidden ones.
        repo_id: Such as `user/tokenizer`.
        private: Of a new repository; None for the owner's default.
        message: Of the commit.

    Returns:
        The address of the commit.

    Raises:
        OSError: If the Hub refuses or cannot be reached, or the connection breaks.
    """
    try:
        repo_id = create_repo(repo_id, private=private, exist_ok=True).repo_id
        commit = upload_folder(
            repo_id=repo_id, folder_path=folder, commit_message=message, ignore_patterns=[".*", "*/.*"]
        )
    except HfHubHTTPError as error:
        raise OSError(f"The Hub refused: {error}") from error
    except (_HTTP_ERROR, RuntimeError) as error:
        raise OSError(f"The upload to {repo_id!r} broke off, and goes on when it is started again: {error}") from error
    return commit.commit_url
