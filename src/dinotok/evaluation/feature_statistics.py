"""Reference statistics: mean and covariance of a set's features, with the recipe that made them and a digest."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..folders import writing
from ..statistics import StreamingMoments

_FORMAT = "dinotok.feature_statistics"


@dataclass(frozen=True)
class Gaussian:
    """The normal distribution that is fitted to features.

    Attributes:
        count: Rows it was fitted to.
        mean: `(D,)` float64.
        covariance: `(D, D)` float64, of the sample: divided by `count - 1`.
    """

    count: int
    mean: torch.Tensor
    covariance: torch.Tensor

    @classmethod
    def fit(cls, batches: Iterable[torch.Tensor]) -> "Gaussian":
        """Fit to rows `(N, D)` that come in batches; sums are float64.

        Raises:
            ValueError: If there are fewer than two rows, or a value is not finite.
        """
        moments: StreamingMoments | None = None
        for rows in batches:
            moments = moments or StreamingMoments(rows.shape[1])
            moments.update(rows)
        return cls.from_moments(moments or StreamingMoments(1))

    @classmethod
    def from_moments(cls, moments: StreamingMoments) -> "Gaussian":
        """Take the sums of `StreamingMoments`, for example merged ones.

        Raises:
            ValueError: If they are of fewer than two rows.
        """
        count = moments.count
        if count < 2:
            raise ValueError(f"A covariance needs at least 2 pictures, got {count}.")
        return cls(count, moments.mean, moments.covariance * (count / (count - 1)))


@dataclass(frozen=True)
class FeatureStatistics:
    """What is kept of the features of a set of pictures.

    Attributes:
        gaussians: By kind: `features`, and `spatial_features` where the extractor has them.
        recipe: How they were made: `resolution`, `crop`, `resize`, `extractor`, `pictures` (a digest), `count`, ...
        features: All rows `(N, D)` float32, for KID, precision and recall; None if they were not kept.
    """

    gaussians: dict[str, Gaussian]
    recipe: dict[str, Any] = field(default_factory=dict)
    features: torch.Tensor | None = None

    @property
    def count(self) -> int:
        """Pictures."""
        return self.gaussians["features"].count

    def digest(self) -> str:
        """Return `sha256:` and the digest of tensors and recipe."""
        digest = hashlib.sha256(json.dumps(self.recipe, sort_keys=True).encode())
        for name, tensor in sorted(self._tensors().items()):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode() + tensor.numpy().tobytes())
        return f"sha256:{digest.hexdigest()}"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file, whole or not at all; recipe and digest are its metadata."""
        metadata = {"format": _FORMAT, "recipe": json.dumps(self.recipe, sort_keys=True), "digest": self.digest()}
        with writing(Path(path)) as temporary:
            save_file(self._tensors(), temporary, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "FeatureStatistics":
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is no such file, or its content does not have the digest it names.
        """
        name = os.fspath(path)
        if not os.path.isfile(name):
            raise FileNotFoundError(f"There is no file {name!r}.")
        try:
            with safe_open(name, "pt") as file:
                metadata = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no mapping
        except SafetensorError as error:
            raise ValueError(f"{name!r} is damaged or no safetensors file: {error}.") from error
        if metadata.get("format") != _FORMAT:
            raise ValueError(f"{name!r} was not written by `dinotok evaluate statistics`.")
        recipe = json.loads(metadata["recipe"])
        kinds = [key.removesuffix(".mean") for key in tensors if key.endswith(".mean")]
        gaussians = {k: Gaussian(recipe["count"], tensors[f"{k}.mean"], tensors[f"{k}.covariance"]) for k in kinds}
        statistics = cls(gaussians, recipe, tensors.get("rows"))
        if statistics.digest() != metadata.get("digest"):
            raise ValueError(f"{name!r} does not have the digest {metadata.get('digest')} that it names.")
        return statistics

    def check(self, resolution: int, extractor: Mapping[str, str]) -> None:
        """Refuse another resolution or extractor than the statistics were made with.

        Args:
            resolution: Of the pictures to compare, in pixels.
            extractor: What `Extractor.describe` returns.

        Raises:
            ValueError: If one differs; it names both.
        """
        if self.recipe.get("resolution") != resolution:
            raise ValueError(f"The statistics are of resolution {self.recipe.get('resolution')}, not {resolution}.")
        made_with = self.recipe.get("extractor", {})
        for key in sorted({*made_with, *extractor}):
            if made_with.get(key) != extractor.get(key):
                raise ValueError(
                    f"The statistics were made with another extractor: its {key} is {made_with.get(key)!r}, not "
                    f"{extractor.get(key)!r}."
                )

    def _tensors(self) -> dict[str, torch.Tensor]:
        tensors = {}
        for kind, gaussian in self.gaussians.items():
            tensors[f"{kind}.mean"], tensors[f"{kind}.covariance"] = gaussian.mean, gaussian.covariance
        if self.features is not None:
            tensors["rows"] = self.features
        return {name: tensor.contiguous() for name, tensor in tensors.items()}


def frechet_distance(one: Gaussian, other: Gaussian) -> float:
    """Compute `|m - m'|^2 + trace(C + C' - 2 (C C')^(1/2))` in float64 (Heusel et al., arXiv 1706.08500, section 4).

    The trace of the root is that of `(R C' R)^(1/2)` with the symmetric root R of C, from eigenvalues of symmetric
    matrices: no general matrix root, which fails for singular covariances.

    Returns:
        At least 0.

    Raises:
        ValueError: If the widths differ.
    """
    if one.mean.shape != other.mean.shape:
        raise ValueError(f"Features of {len(one.mean)} and {len(other.mean)} dimensions cannot be compared.")
    values, vectors = torch.linalg.eigh(one.covariance)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    product = root @ other.covariance @ root
    trace_of_root = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
    traces = one.covariance.trace() + other.covariance.trace()
    return max(0.0, float((one.mean - other.mean).square().sum() + traces - 2 * trace_of_root))


def few_pictures(count: int, dimensions: int, what: str) -> str | None:
    """Say what is wrong with a Fréchet distance of so few pictures, or return None.

    Args:
        count: Pictures.
        dimensions: Of the features; a covariance of full rank needs one picture more.
        what: Name of the set.
    """
    if count > dimensions:
        return None
    return (
        f"The {what} are {count} pictures, and a covariance of {dimensions} features needs at least {dimensions + 1} "
        "for full rank: the distance would be far too large"
    )
