"""A corpus, shard by shard, to tokens or latents: any number of workers, each of which may be killed at any moment.

    OUT/corpus.json                    which shards it is made from
    OUT/cache.json                     what the files are of, as `caches` has it
    OUT/tokens-00-00000.parquet ...    one file for every view of every shard: those of `token_caches`, `latent_caches`
    OUT/manifests/tokens-00-00000.json ...   counts, failures, digests and model of each
    OUT/summary.json                   of all manifests, once all files are there

A file is made in a folder of its own below `OUT/.staging`, and renamed after its manifest. So a file that is there is
whole and has its manifest; what a killed worker leaves is made anew, with the same bytes. The number of a file is that
of its shard: nothing is there twice.
"""

import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from tqdm import tqdm

from .corpus_manifests import is_done, summarize
from .corpus_shards import DEFAULT_IMAGE_COLUMN, ShardError, find_shards
from .evaluation.passes import wait_for_all
from .folders import FoundFile, OnFailure
from .latent_caches import DTYPES
from .picture_samples import DEFAULT_LABEL_COLUMN
from .transforms import CropName


@dataclass(frozen=True)
class CorpusOptions:
    """What becomes of a corpus. All but the last three decide the output; the last three do not, but for the last bit.

    Attributes:
        model: Folder or Hub repository of a tokenizer: tokens come out of one with codebooks, latents of another.
        revision: Branch, tag or commit of the repository.
        encoder: Folder or repository of the frozen encoder, for a model saved without.
        resolution: Side of the square crops in pixels; None for that of a model that has only one, else 256.
        crop: "center", "random" or "random_resized"; see `PictureTransform`.
        flip: Mirror pictures: every second view of centred latents, others at random.
        views: Of every picture.
        seed: Of crops and flips.
        mixed_precision: Of the model: "no" or "bf16".
        dtype: Of stored latents: "float16", "bfloat16" or "float32".
        image_column: As in `read_shard`.
        label_column: As in `read_shard`; None for pictures without labels, then of the one class "picture".
        classes: As in `class_names`.
        max_failed_share: More unreadable samples than this share of a shard (counted as at least 500) make it fail;
            1 accepts every shard, and of a damaged one what comes before the damage.
        batch_size: Pictures encoded together.
        num_workers: Threads that decode pictures while the model runs; 0 to do one after the other.
    """

    model: str
    revision: str | None = None
    encoder: str | None = None
    resolution: int | None = None
    crop: CropName = "center"
    flip: bool = False
    views: int = 1
    seed: int = 0
    mixed_precision: str = "no"
    dtype: str = "float16"
    image_column: str = DEFAULT_IMAGE_COLUMN
    label_column: str | None = DEFAULT_LABEL_COLUMN
    classes: str | None = None
    max_failed_share: float = 0.01
    batch_size: int = 32
    num_workers: int = 0

    def __post_init__(self):
        if self.mixed_precision not in ("no", "bf16"):
            raise ValueError(f"mixed_precision={self.mixed_precision!r} is neither 'no' nor 'bf16'.")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype!r} is none of {', '.join(DTYPES)}.")
        if self.views < 1 or self.batch_size < 1 or self.num_workers < 0:
            numbers = f"views={self.views}, batch_size={self.batch_size}, num_workers={self.num_workers}"
            raise ValueError(f"{numbers}: the first two have to be positive, the last not negative.")
        if not 0 <= self.max_failed_share <= 1:
            raise ValueError(f"max_failed_share={self.max_failed_share} is not in [0, 1].")


@dataclass(frozen=True)
class Corpus:
    """The shards of a corpus, and what is to become of them: all that a worker needs, wherever it sees the folders.

    Attributes:
        shards: In the order of their numbers.
        output: Folder of the results.
        options: See there.
    """

    shards: tuple[FoundFile, ...]
    output: Path
    options: CorpusOptions

    @classmethod
    def find(
        cls, paths: Iterable[str | os.PathLike[str]], output: str | os.PathLike[str], options: CorpusOptions
    ) -> Self:
        """Find the shards; see `find_shards`, also for what it raises."""
        output = Path(os.path.abspath(output))
        return cls(tuple(find_shards(paths, output)), output, options)


@dataclass(frozen=True)
class WorkerReport:
    """What one worker did.

    Attributes:
        files: Of the corpus.
        made: By this worker.
        failed: Of its share: their shards cannot be used.
        pictures: In the files it made.
        seconds: It took, without loading the model.
        summary: Of the corpus, if that is complete now; see `summarize`.
    """

    files: int
    made: int
    failed: int
    pictures: int
    seconds: float
    summary: dict[str, Any] | None


def encode_corpus(
    corpus: Corpus,
    on_failure: OnFailure,
    device: str | None = None,
    rank: int = 0,
    world_size: int = 1,
    verify: bool = False,
) -> WorkerReport:
    """Make this worker's share of the files of a corpus, without those that are there, and sum up a complete one.

    The share is every `world_size`-th file from `rank` on. It depends on nothing else: workers need not know of each
    other, no claim of a killed one is left to expire, and a later call may have any number of workers. Those of a
    `torchrun` wait for each other at the end.

    Args:
        corpus: From `Corpus.find`.
        on_failure: Called with the name and the error of a shard that cannot be used; the others go on.
        device: As in `CorpusEncoder`.
        rank: Of this worker.
        world_size: Number of workers.
        verify: Compare the content of files that are there with their manifests, and make damaged ones anew.

    Returns:
        What was done.

    Raises:
        ValueError: As `CorpusEncoder`, or if `rank` is not one of the workers.
        OSError: As `CorpusEncoder`, or if a file cannot be written.
    """
    from .corpus_encoder import CorpusEncoder

    if not 0 <= rank < world_size:
        raise ValueError(f"rank={rank} is not in [0, world_size={world_size}).")
    encoder, start = CorpusEncoder(corpus, device), time.perf_counter()
    paths = encoder.paths()
    made = failed = pictures = 0
    with tqdm(total=len(paths[rank::world_size]), unit=" files", disable=None if rank == 0 else True) as progress:
        for number in range(rank, len(paths), world_size):
            if not is_done(paths[number], verify):
                try:
                    pictures += encoder.encode(number)["pictures"]
                    made += 1
                except ShardError as error:
                    on_failure(encoder.shard_of(number).name, error)
                    failed += 1
            progress.set_postfix_str(f"{pictures / (time.perf_counter() - start):.1f} pictures/s", refresh=False)
            progress.update()
    seconds = time.perf_counter() - start
    wait_for_all()
    summary = summarize(corpus.output, [path.name for path in paths])
    return WorkerReport(len(paths), made, failed, pictures, seconds, summary)


def slurm_share(environment: Mapping[str, str], rank: int = 0, world_size: int = 1) -> tuple[int, int]:
    """Return rank and number of workers when every task of a SLURM job array has so many of them.

    Args:
        environment: Of the process.
        rank: Within its task: of a `torchrun`, for one with several devices.
        world_size: Of its task.

    Raises:
        ValueError: If the array has gaps, so that its tasks are not 0 ... n - 1 after all.
    """
    if "SLURM_ARRAY_TASK_ID" not in environment:
        return rank, world_size
    task, count, first, last, step = (
        int(environment.get(f"SLURM_ARRAY_TASK_{name}", default))
        for name, default in (("ID", "0"), ("COUNT", "1"), ("MIN", "0"), ("MAX", "0"), ("STEP", "1"))
    )
    if (last - first) // step + 1 != count or (task - first) % step:
        raise ValueError(
            f"The job array has {count} tasks from {first} to {last} by {step}: submit one without gaps, of any size "
            "(--array=0-7); what is done already is not done again."
        )
    return (task - first) // step * world_size + rank, count * world_size
