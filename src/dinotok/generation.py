"""Find a pipeline by its name, whatever its class, and draw with it: every picture has a seed of its own."""

import hashlib
import inspect
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image

from .bundled import bundled_folder
from .hub import folder_digest, load_tokenizer, locate, read_config

# The pipelines, and what each calls its tokenizer.
TOKENIZER_COMPONENTS = {"DINOTokDiTPipeline": "vae", "DINOTokARPipeline": "vqvae"}
# The entry of `model_index.json` that names a tokenizer of the package, in place of a folder beside the transformer.
BUNDLED_TOKENIZER = "_bundled_tokenizer"

_INDEX = "model_index.json"
_SCHEDULER = Path("scheduler", "scheduler_config.json")
_FILES = (_INDEX, "*/config.json", _SCHEDULER.as_posix(), "*/*.safetensors", "*/*.safetensors.index.json")


@dataclass(frozen=True)
class PipelineFiles:
    """The files of one pipeline, on this machine.

    Attributes:
        name: The folder or repository, as it was asked for.
        folder: Where the files are.
        commit: The commit of the repository; None for a folder.
        class_name: The pipeline's class.
        tokenizer: The name of the bundled tokenizer that it stands on; None if its own lies in the folder.
    """

    name: str
    folder: Path
    commit: str | None
    class_name: str
    tokenizer: str | None

    @property
    def revision(self) -> str:
        """The commit, or for a folder, which has none, its digest."""
        return self.commit or self.digest

    @cached_property
    def digest(self) -> str:
        """What identifies the pipeline: SHA-256 over the digests of its models and the scheduler's settings."""
        index = read_config(self.folder / _INDEX, self.name, "pipeline")
        tokenizer = TOKENIZER_COMPONENTS[self.class_name]
        folders = {
            name: self.folder / name for name in sorted(index) if (self.folder / name / "config.json").is_file()
        }
        if self.tokenizer is not None:
            folders[tokenizer] = bundled_folder(self.tokenizer)
        parts: dict[str, Any] = {name: folder_digest(folder) for name, folder in folders.items()}
        if (self.folder / _SCHEDULER).is_file():
            settings = read_config(self.folder / _SCHEDULER, self.name, "pipeline")
            parts["scheduler"] = {key: value for key, value in settings.items() if key[0] != "_"}
        return f"sha256:{hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()}"

    @property
    def defaults(self) -> dict[str, Any]:
        """The options of the pipeline's `__call__` that have a default, and the default."""
        parameters = inspect.signature(pipeline_class(self.class_name).__call__).parameters.values()
        return {one.name: one.default for one in parameters if one.default is not one.empty}

    def load(self, dtype: torch.dtype | None = None) -> DiffusionPipeline:
        """Load the pipeline, in evaluation mode.

        Args:
            dtype: Of the weights; by default float32.

        Raises:
            ValueError: If the weights do not fit the configs.
            OSError: If files are missing or damaged.
        """
        dtype = dtype or torch.float32
        components: dict[str, Any] = {}
        if self.tokenizer is not None:
            folder = str(bundled_folder(self.tokenizer))
            components[TOKENIZER_COMPONENTS[self.class_name]] = load_tokenizer(folder, dtype=dtype)
        return pipeline_class(self.class_name).from_pretrained(self.folder, dtype=dtype, **components)


def pipeline_class(name: str) -> type[DiffusionPipeline]:
    """Return the class of a pipeline: `DINOTokDiTPipeline` or `DINOTokARPipeline`."""
    import dinotok

    return getattr(dinotok, name)


def find_pipeline(name_or_path: str | os.PathLike[str], revision: str | None = None) -> PipelineFiles:
    """Find out what a pipeline is, and fetch its files if it is on the Hub and not in the cache.

    No code of a repository is run: the pipelines are those of the package.

    Args:
        name_or_path: A folder that `save_pretrained` wrote, a repository such as `user/pipeline`, or the name of a
            pipeline that comes with the package, such as `dinotok-tiny-dit`.
        revision: Branch, tag or commit of the repository.

    Raises:
        OSError: If there is no such folder or repository, or it cannot be reached.
        ValueError: If it does not hold one of dinotok's pipelines, or a folder is given a revision.
    """
    name = os.fspath(name_or_path)
    folder, commit = locate(name, revision, _FILES)
    index = read_config(folder / _INDEX, name, "pipeline")
    class_name = index.get("_class_name")
    class_name = class_name[-1] if isinstance(class_name, list) and class_name else class_name
    if class_name not in TOKENIZER_COMPONENTS:
        known = " and ".join(TOKENIZER_COMPONENTS)
        raise ValueError(f"{name!r} holds a {class_name}; dinotok's pipelines are {known}.")
    tokenizer = index.get(BUNDLED_TOKENIZER)
    if tokenizer is not None:
        bundled_folder(tokenizer)
    return PipelineFiles(name, folder, commit, class_name, tokenizer)


def load_pipeline(
    name_or_path: str | os.PathLike[str], revision: str | None = None, dtype: torch.dtype | None = None
) -> DiffusionPipeline:
    """Load a pipeline whose class is not known.

    Args:
        name_or_path: A folder that `save_pretrained` wrote, a repository such as `user/pipeline`, or the name of a
            pipeline that comes with the package, such as `dinotok-tiny-dit`.
        revision: Branch, tag or commit of the repository.
        dtype: Of the weights; by default float32.

    Returns:
        A `DINOTokDiTPipeline` or a `DINOTokARPipeline`.

    Raises:
        OSError: If there is no such folder or repository, or it cannot be reached.
        ValueError: If it does not hold one of dinotok's pipelines, or its weights do not fit its configs.
    """
    return find_pipeline(name_or_path, revision).load(dtype)


def draw_pictures(
    pipeline: DiffusionPipeline,
    class_ids: Sequence[int],
    seeds: Sequence[int],
    batch_size: int = 8,
    options: Mapping[str, Any] | None = None,
) -> Iterator[Image.Image]:
    """Draw pictures batch by batch; a picture is that of its class and seed, whatever is drawn with it.

    Args:
        pipeline: A `DINOTokDiTPipeline` or a `DINOTokARPipeline`.
        class_ids: Of every picture.
        seeds: Of every picture: of a generator of its own, on the CPU, so that devices draw the same noise.
        batch_size: Pictures that are drawn together.
        options: Of the pipeline's `__call__`.

    Yields:
        The pictures, in order.

    Raises:
        ValueError: If there are not as many seeds as classes, or an option is invalid.
    """
    if len(class_ids) != len(seeds):
        raise ValueError(f"{len(class_ids)} classes came with {len(seeds)} seeds; every picture has one of each.")
    for start in range(0, len(seeds), batch_size):
        chosen = slice(start, start + batch_size)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds[chosen]]
        yield from pipeline(list(class_ids[chosen]), generator=generators, **(options or {})).images
