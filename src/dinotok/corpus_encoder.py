"""One shard to one file of tokens or latents: what every engine that shares a corpus among workers calls."""

import os
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .corpus import Corpus
from .corpus_files import Row, write_file
from .corpus_manifests import begin_corpus, begin_files, file_identity, publish, staging, versions
from .corpus_reading import DecodedSample, ShardReader
from .corpus_shards import ShardError, class_names, read_shard
from .data import PictureTransform, to_pixels
from .folders import FoundFile
from .hub import find_tokenizer, model_header
from .latent_caches import DTYPES, LatentCacheDescription
from .models.discrete import DiscreteTokenizer
from .picture_order import mix
from .picture_samples import PictureReader
from .token_caches import CacheDescription
from .transcoding import encode_batch, indices_of_batch

# As `PictureLoader`: the share of failures is judged as if a shard had at least so many samples.
_MIN_SEEN = 500
_MAX_PER_SHARD = 1_000_000
_DEFAULT_RESOLUTION = 256


class StageTimes:
    """Seconds of every stage of the work.

    Args:
        device: Of the model; what runs on a GPU is waited for, so that every stage has its own time.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time in the block to a stage."""
        start = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds[name] += time.perf_counter() - start


class CorpusEncoder:
    """Makes the files of a corpus, with one model on one device.

    Args:
        corpus: See there.
        device: Of the model; by default `cuda` if there is a GPU, else `cpu`.

    Attributes:
        description: Of the files, as `open_token_cache` and `open_latent_cache` read it.
        times: Where the time went, for all calls of `encode` together.

    Raises:
        ValueError: If the output folder is of other shards, another model or other settings; see `class_names` too.
        OSError: If the model cannot be found, or the folder not be written.
    """

    def __init__(self, corpus: Corpus, device: str | torch.device | None = None):
        options = corpus.options
        self._label_column, names = class_names(
            [shard.path for shard in corpus.shards], options.label_column, options.classes
        )
        columns = {"image_column": options.image_column, "label_column": self._label_column}
        sizes = [[shard.name, shard.path.stat().st_size] for shard in corpus.shards]
        begin_corpus(corpus.output, {**columns, "shards": sizes})
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        files = find_tokenizer(options.model, options.revision)
        self.corpus, self.model = corpus, files.load(encoder=options.encoder).to(device)
        self.times = StageTimes(self.model.device)
        self._header = model_header(files)
        self._resolution = options.resolution or self.model.image_size or _DEFAULT_RESOLUTION
        self._mirrors = options.flip and options.crop == "center" and not isinstance(self.model, DiscreteTokenizer)
        self._transform = PictureTransform(self._resolution, options.crop, options.flip and not self._mirrors)
        self.description = self._describe(files.digest, names)
        self._parts = self.description.shards()
        begin_files(corpus.output, self.description)

    def paths(self) -> list[Path]:
        """Return all files of the corpus, view by view, whether they are there or not."""
        return [self.description.shard_path(self.corpus.output, *one) for one in self._parts]

    def shard_of(self, number: int) -> FoundFile:
        """Return the shard that a file is made from, by the number of the file in `paths`."""
        return self.corpus.shards[self._parts[number][1].start // self.description.shard_size]

    def encode(self, number: int) -> dict[str, Any]:
        """Make one file, whole or not at all, whether it is there or not.

        Args:
            number: Which of `paths`.

        Returns:
            Its manifest.

        Raises:
            ShardError: If its shard is damaged or too large, or too many samples cannot be used.
            OSError: If it cannot be read, or the file not be written.
        """
        (view, pictures), source = self._parts[number], self.shard_of(number)
        with self.times.stage("digest"):
            identity = file_identity(source.path)
        found = self._encode_samples(source, view, pictures)
        with self.times.stage("write"), staging(self.corpus.output) as folder:
            made = write_file(folder, self.description, view, pictures, found.rows)
            manifest = {
                "file": made.name,
                "view": view,
                "shard": source.name,
                "first_picture": pictures.start,
                "samples": found.samples,
                "pictures": len(found.rows),
                "failed": len(found.failures),
                "failures": sorted(found.failures, key=lambda failure: failure["row"]),
                "damage": found.damage,
                "input": identity,
                "output": file_identity(made),
                **self._header,
                "versions": versions(),
            }
            publish(made, manifest, self.corpus.output)
        return manifest

    def _describe(self, digest: str, names: list[str]) -> CacheDescription | LatentCacheDescription:
        options, count = self.corpus.options, len(self.corpus.shards)
        shard_size = min(_MAX_PER_SHARD, 2**31 // count)  # numbers of pictures are int32
        common: dict[str, Any] = {
            "tokenizer": options.model,
            "tokenizer_digest": digest,
            "dataset": os.path.commonpath([shard.path.parent for shard in self.corpus.shards]),
            "num_pictures": count * shard_size,
            "label_names": names,
            "resolution": self._resolution,
            "crop": options.crop,
            "flip": options.flip,
            "views": options.views,
            "seed": options.seed,
            "shard_size": shard_size,
            "mixed_precision": options.mixed_precision,
        }
        blank = torch.zeros(1, 3, self._resolution, self._resolution, dtype=torch.uint8)
        shape = list(self._values(blank, view=0)[0].shape[1:])
        if isinstance(self.model, DiscreteTokenizer):
            sizes = dict(self.model.codebook_sizes)
            return CacheDescription(**common, codebook_sizes=sizes, grid=shape[1:])
        return LatentCacheDescription(**common, shape=shape, dtype=options.dtype)

    def _encode_samples(self, source: FoundFile, view: int, pictures: range) -> "_Found":
        options, found = self.corpus.options, _Found([], [])
        seed = mix("view", options.seed, view, pictures.start)  # as `caches.shard_loader`
        label_column = None if self._label_column is None else "label"
        reader = ShardReader(
            PictureReader(self._transform, seed, "image", label_column),
            self.description.check_label,
            max_samples=len(pictures),
            accept_damage=options.max_failed_share == 1,
        )
        samples = read_shard(source.path, options.image_column, self._label_column)
        batches = reader.batches(samples, options.batch_size, options.num_workers)
        while batch := self._next(batches):
            self._encode_batch(batch, view, pictures, found)
        found.damage = reader.damage
        found.check(options.max_failed_share)
        return found

    def _next(self, batches: Iterator[list[DecodedSample]]) -> list[DecodedSample]:
        with self.times.stage("decode"):
            return next(batches, [])

    def _encode_batch(self, batch: list[DecodedSample], view: int, pictures: range, found: "_Found") -> None:
        found.samples += len(batch)
        good = []
        for decoded in batch:
            if decoded.sample.pixels is None:
                found.fail(decoded, decoded.sample.reason)
            else:
                good.append((decoded, decoded.sample.pixels))
        if not good:
            return
        values, finite = self._values(torch.stack([pixels for _, pixels in good]), view)
        for (decoded, _), value, is_finite in zip(good, values, finite, strict=True):
            if not is_finite:
                found.fail(decoded, "Its latents have NaN or infinite values.")
            else:
                found.rows.append((pictures[decoded.sample.index], decoded.sample.label or 0, value))

    @torch.inference_mode()
    def _values(self, pixels: torch.Tensor, view: int) -> tuple[torch.Tensor, list[bool]]:
        """Indices or latents of uint8 pictures, as they are stored, and whether the latents are finite."""
        options, device = self.corpus.options, self.model.device
        with torch.autocast(device.type, torch.bfloat16, enabled=options.mixed_precision == "bf16"):
            with self.times.stage("encode"):
                values = to_pixels(pixels.to(device))
                latents = encode_batch(self.model, values.flip(3) if self._mirrors and view % 2 else values)
            if isinstance(self.model, DiscreteTokenizer):
                with self.times.stage("quantize"):
                    values = indices_of_batch(self.model, latents)
            else:
                values = latents = latents.to(DTYPES[options.dtype])
        return values.cpu(), latents.isfinite().flatten(1).all(1).tolist()


@dataclass
class _Found:
    """What came of a shard."""

    rows: list[Row]
    failures: list[dict[str, Any]]
    samples: int = 0
    damage: str | None = None

    def fail(self, decoded: DecodedSample, reason: str) -> None:
        self.failures.append({"key": decoded.key, "row": decoded.sample.index, "reason": reason})

    def check(self, max_failed_share: float) -> None:
        """Raise a `ShardError` if too many samples failed."""
        if len(self.failures) > max_failed_share * max(self.samples, _MIN_SEEN):
            raise ShardError(
                f"{len(self.failures)} of {self.samples} samples cannot be used, and max_failed_share="
                f"{max_failed_share} of at least {_MIN_SEEN} is allowed. The first: {self.failures[0]['key']!r}: "
                f"{self.failures[0]['reason']}"
            )
