"""Find a tokenizer by its name, whatever its class: a folder, or a repository of the Hub."""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .bundled import resolve_bundled
from .models.tokenizer_model import TokenizerModel

if TYPE_CHECKING:
    from .generation import PipelineFiles

# The entry of `config.json` that names code for `AutoModel.from_pretrained(..., trust_remote_code=True)`.
AUTO_MAP = "auto_map"
_WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model-?????-of-?????.safetensors")
_FILES = ("config.json", "diffusion_pytorch_model.safetensors.index.json", *_WEIGHTS)


def model_header(files: "TokenizerFiles | PipelineFiles") -> dict[str, str]:
    """Return what a report says of the model that it is about."""
    return {
        "model": files.name,
        "model_revision": files.revision,
        "model_digest": files.digest,
        "class_name": files.class_name,
    }


@dataclass(frozen=True)
class TokenizerFiles:
    """The files of one tokenizer, on this machine.

    Attributes:
        name: The folder or repository, as it was asked for.
        folder: Where the files are.
        commit: The commit of the repository; None for a folder.
        digest: See `folder_digest`.
        class_name: The tokenizer's class.
    """

    name: str
    folder: Path
    commit: str | None
    digest: str
    class_name: str

    @property
    def revision(self) -> str:
        """The commit, or for a folder, which has none, its digest."""
        return self.commit or self.digest

    def load(self, dtype: torch.dtype | None = None, encoder: str | None = None) -> TokenizerModel:
        """Load the tokenizer, in evaluation mode.

        Args:
            dtype: Of the weights; by default float32.
            encoder: Folder or repository of the frozen encoder, for a tokenizer saved without it; by default the one
                that its config names.

        Returns:
            A model of the class that the config names.

        Raises:
            EncoderUnavailableError: If it was saved without its encoder, and that is out of reach.
            ValueError: If the weights do not fit the config.
            OSError: If files are damaged.
        """
        tokenizer_class = tokenizer_classes()[self.class_name]
        return tokenizer_class.from_pretrained(self.folder, encoder=encoder, dtype=dtype).eval()


def tokenizer_classes() -> dict[str, type[TokenizerModel]]:
    """Return the tokenizers among the public names of dinotok."""
    import dinotok

    values = [getattr(dinotok, name) for name in dinotok.__all__]
    return {v.__name__: v for v in values if isinstance(v, type) and issubclass(v, TokenizerModel)}


def find_tokenizer(name_or_path: str, revision: str | None = None) -> TokenizerFiles:
    """Find out what a tokenizer is, and fetch its files if it is on the Hub and not in the cache.

    Args:
        name_or_path: A folder that `save_pretrained` wrote, a repository such as `user/tokenizer`, or the name of a
            model that comes with the package, such as `dinotok-tiny-ae`.
        revision: Branch, tag or commit of the repository.

    Returns:
        Its files, class and exact version.

    Raises:
        OSError: If there is no such folder or repository, or it cannot be reached.
        ValueError: If it does not hold one of dinotok's tokenizers, or a folder is given a revision.
    """
    folder, commit = locate(name_or_path, revision, _FILES)
    config = read_config(folder / "config.json", name_or_path, "tokenizer")
    class_name = config.get("_class_name")
    if class_name not in tokenizer_classes():
        known = ", ".join(sorted(tokenizer_classes()))
        raise ValueError(f"{name_or_path!r} holds a {class_name}, not one of dinotok's tokenizers: {known}.")
    return TokenizerFiles(
        name=name_or_path,
        folder=folder,
        commit=commit,
        digest=folder_digest(folder),
        class_name=class_name,
    )


def load_tokenizer(
    name_or_path: str,
    revision: str | None = None,
    dtype: torch.dtype | None = None,
    encoder: str | None = None,
) -> TokenizerModel:
    """Load a tokenizer whose class is not known.

    Args:
        name_or_path: A folder that `save_pretrained` wrote, or a repository such as `user/tokenizer`.
        revision: Branch, tag or commit of the repository.
        dtype: Of the weights; by default float32.
        encoder: Folder or repository of the frozen encoder, for a tokenizer saved without it.

    Returns:
        A model of the class that its `config.json` names, in evaluation mode.

    Raises:
        OSError: If there is no such folder or repository, or it cannot be reached.
        ValueError: If it does not hold one of dinotok's tokenizers, or its weights do not fit its config.
    """
    return find_tokenizer(name_or_path, revision).load(dtype, encoder)


def folder_digest(folder: str | os.PathLike[str]) -> str:
    """Identify the tokenizer in a folder by what is in its files: SHA-256 over the weights and the config.

    The config counts because the latents' mean and standard deviation are in it; entries that begin with an
    underscore, which say what wrote it, and `auto_map`, which names code beside it, do not.

    Args:
        folder: Written by `save_pretrained`.

    Returns:
        `sha256:` and 64 hexadecimal digits, the same wherever the folder lies.

    Raises:
        OSError: If the folder has no weights or no config.
        ValueError: If the config is not JSON.
    """
    folder = Path(folder)
    weights = sorted(path for pattern in _WEIGHTS for path in folder.glob(pattern))
    if not weights:
        raise FileNotFoundError(f"{str(folder)!r} has no {_WEIGHTS[0]}.")
    config = {
        key: value
        for key, value in read_config(folder / "config.json", str(folder), "model").items()
        if key[0] != "_" and key != AUTO_MAP
    }
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for path in weights:
        with path.open("rb") as file:
            digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return f"sha256:{digest.hexdigest()}"


def read_config(path: Path, name: str, kind: str) -> dict[str, Any]:
    """Read a JSON file that describes a model.

    Args:
        path: Of the file.
        name: What the user called the model, for errors.
        kind: What the model should be, for errors.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it is not JSON, or no dictionary.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{name!r} has no {path.name}, so it is not a {kind}.") from None
    except ValueError as error:
        raise ValueError(f"The {path.name} of {name!r} is not valid JSON: {error}.") from error
    if not isinstance(config, dict):
        raise ValueError(f"The {path.name} of {name!r} holds a {type(config).__name__}, not a dictionary.")
    return config


def locate(name: str, revision: str | None, patterns: Sequence[str]) -> tuple[Path, str | None]:
    """Find the folder of a model, which is fetched if it is on the Hub and not in the cache.

    Args:
        name: A folder, the name of a model of the package, or a repository.
        revision: Branch, tag or commit of the repository.
        patterns: Of the files of a repository that are wanted.

    Returns:
        The folder, and the commit of a repository; None for a folder.

    Raises:
        OSError: If there is no such folder or repository, or it cannot be reached.
        ValueError: If a folder is given a revision.
    """
    path = resolve_bundled(name)
    if not os.path.isdir(path):
        folder = download(name, revision, patterns)
        return folder, folder.name  # the cache keeps a snapshot in a folder named by its commit
    if revision is not None:
        raise ValueError(f"revision={revision!r} is for repositories of the Hub; {name!r} is a folder.")
    return Path(path), None


def download(name: str, revision: str | None, patterns: Sequence[str]) -> Path:
    """Return the folder of a repository's files, fetched if they are not in the cache.

    Args:
        name: Such as `user/tokenizer`.
        revision: Branch, tag or commit.
        patterns: Which files.

    Raises:
        OSError: If there is no such repository, or it cannot be reached.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    where = f"{name!r}" + (f" at revision {revision!r}" if revision else "")
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(patterns)))
    except HFValidationError as error:
        raise FileNotFoundError(f"{name!r} is neither a folder nor the name of a repository (owner/name).") from error
    except OSError as error:  # not found, gated, offline and not in the cache, ...
        raise OSError(f"{where} is no folder here and cannot be had from the Hub: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
