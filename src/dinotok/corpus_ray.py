"""The same work on a Ray cluster: a pool of actors with a model each, and a shard for whichever is free.

For clusters where Ray runs already, and for machines that come and go: Ray gives the shards of a lost machine to
others, and `encode` makes each file whole or not at all. Needs the extra `distributed`.
"""

import time
from typing import Any

import torch

from .corpus import Corpus, WorkerReport
from .corpus_encoder import CorpusEncoder
from .corpus_manifests import is_done, summarize
from .corpus_shards import ShardError
from .folders import OnFailure

_MAX_BLOCKS = 10_000


class CorpusActor:
    """Encodes shards for `ray.data.Dataset.map`: a row goes in and comes out with what became of its file.

    Rows are whole numbers and strings; tokens and latents go to the output folder, not through Ray. (Ray writes numpy
    columns as a type of its own, which `datasets` does not read.)

    Args:
        corpus: See there; every machine has to see its folders.
    """

    def __init__(self, corpus: Corpus):
        self.encoder = CorpusEncoder(corpus)
        self.paths = self.encoder.paths()

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Make the file of `row["number"]`, unless it is there.

        Returns:
            The row, with `shard`, `made` (0 or 1), `pictures` in a file that was made, and `error` (empty if none).
        """
        number = int(row["number"])
        result = {"number": number, "shard": self.encoder.shard_of(number).name, "made": 0, "pictures": 0, "error": ""}
        if is_done(self.paths[number]):
            return result
        try:
            pictures = self.encoder.encode(number)["pictures"]
        except ShardError as error:
            return result | {"error": str(error)}
        return result | {"made": 1, "pictures": pictures}


def encode_corpus_with_ray(
    corpus: Corpus, on_failure: OnFailure, num_actors: int = 1, num_cpus: float = 1, num_gpus: float | None = None
) -> WorkerReport:
    """Do what `encode_corpus` does, for all files, with actors of Ray, which starts here if `ray.init` has not run.

    The output is the same, byte for byte, as that of other workers on the same kind of machine, and either goes on
    with what the other began.

    Args:
        corpus: From `Corpus.find`.
        on_failure: Called with the name and the error of a shard that cannot be used; the others go on.
        num_actors: Models that work at once.
        num_cpus: Cores of each.
        num_gpus: GPUs of each; by default 1 if this machine has any, else 0.

    Returns:
        What was done, by all actors.

    Raises:
        ImportError: If Ray is not installed.
        ValueError: As `encode_corpus`.
        OSError: As `encode_corpus`.
    """
    import ray.data

    num_gpus = float(torch.cuda.is_available()) if num_gpus is None else num_gpus
    # Settings that do not fit fail here, in one line, and not in every actor.
    paths = CorpusEncoder(corpus, "cpu").paths()
    start = time.perf_counter()
    rows = [{"number": number} for number in range(len(paths))]
    results = ray.data.from_items(rows, override_num_blocks=min(len(rows), _MAX_BLOCKS)).map(
        CorpusActor,
        fn_constructor_args=(corpus,),
        compute=ray.data.ActorPoolStrategy(size=num_actors),
        num_cpus=num_cpus,
        num_gpus=num_gpus,
    )
    made = failed = pictures = 0
    for row in results.iter_rows():
        made, pictures = made + row["made"], pictures + row["pictures"]
        if row["error"]:
            failed += 1
            on_failure(row["shard"], ShardError(row["error"]))
    seconds = time.perf_counter() - start
    return WorkerReport(
        len(paths), made, failed, pictures, seconds, summarize(corpus.output, [path.name for path in paths])
    )
