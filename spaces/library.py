"""The models of the demo: found by name, fetched within limits, the last few kept in memory."""

import re
from functools import lru_cache

from diffusers import DiffusionPipeline
from huggingface_hub import HfApi, is_offline_mode

from dinotok.bundled import bundled_folder, bundled_models
from dinotok.command_line import check_device
from dinotok.generate_cli import SHORT_NAMES
from dinotok.generation import PipelineFiles, find_pipeline
from dinotok.hub import find_tokenizer
from dinotok.models.tokenizer_model import TokenizerModel

MAX_DOWNLOAD = 4 * 2**30
_REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
_KEPT = 2


class Library:
    """Loads tokenizers and generators by name, and keeps the last two of each.

    No code of a repository is run: the classes are those of the package, the weights are safetensors.

    Args:
        allow_folders: Whether names may also be folders of this machine; not where strangers type them.
        max_download: Bytes of weights that a repository may have.
    """

    def __init__(self, allow_folders: bool = False, max_download: int = MAX_DOWNLOAD):
        self.allow_folders, self.max_download = allow_folders, max_download
        self.device = check_device(None)
        self.tokenizer = lru_cache(_KEPT)(self._load_tokenizer)
        self.pipeline = lru_cache(_KEPT)(self._load_pipeline)

    def find_generator(self, name: str) -> PipelineFiles:
        """Find out what a generator is, without loading its weights.

        Args:
            name: One of the package, or a repository such as `user/pipeline`.

        Raises:
            ValueError: If the name is none, the repository is too large or holds something else.
            OSError: If it cannot be reached.
        """
        return find_pipeline(self.check_name(name))

    def check_name(self, name: str) -> str:
        """Return the name of a model if it may be loaded here.

        Args:
            name: One of the package, or a repository such as `user/tokenizer`.

        Raises:
            ValueError: If it is neither, is a generator that this version of the package lacks, or the repository is
                too large.
        """
        name = name.strip()
        if name in bundled_models() or self.allow_folders:
            return name
        if name in SHORT_NAMES.values():
            raise ValueError(f"{name} is not part of this version of the package.")
        if not _REPOSITORY.fullmatch(name):
            raise ValueError(f"{name!r} is neither a model of the package nor a Hub repository (owner/name).")
        size = repository_size(name)
        if size > self.max_download:
            raise ValueError(
                f"{name!r} has {size / 2**30:.1f} GB of weights; at most {self.max_download / 2**30:.1f} are taken."
            )
        return name

    def _load_tokenizer(self, name: str) -> TokenizerModel:
        model = find_tokenizer(self.check_name(name)).load()
        return model.to(self.device)

    def _load_pipeline(self, name: str) -> DiffusionPipeline:
        pipeline = self.find_generator(name).load().to(self.device)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline


def bundled_tokenizers() -> list[str]:
    """Return the names of the tokenizers that come with the package."""
    return [
        name for name in bundled_models() if (bundled_folder(name) / "diffusion_pytorch_model.safetensors").is_file()
    ]


def bundled_generators() -> list[str]:
    """Return the names of the generators that come with the package."""
    return [name for name in bundled_models() if (bundled_folder(name) / "model_index.json").is_file()]


def missing_generators() -> list[str]:
    """Return the names of the generators that a version of the package can have, and this one has not."""
    return sorted(set(SHORT_NAMES.values()) - set(bundled_generators()))


def repository_size(name: str) -> int:
    """Return the bytes of all safetensors files of a Hub repository; 0 if the Hub does not say."""
    if is_offline_mode():
        return 0
    try:
        files = HfApi().model_info(name, files_metadata=True).siblings or []
    except Exception:  # missing, gated, out of reach, ...: fetching it will say which, or find it in the cache
        return 0
    return sum(file.size or 0 for file in files if file.rfilename.endswith(".safetensors"))
