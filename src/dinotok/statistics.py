"""Streaming statistics in float64: the closed-form part of a tokenizer.

Nothing here holds the data: every class takes batches of rows and keeps sums, or a sample of bounded size. Two
instances merge exactly, in any order, so shards and processes can be combined.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed

_CHUNK = 2**16  # rows that are copied to float64 at a time
_MANY_DISTANCES, _PART_OF_ROWS = 2**34, 8  # see kmeans


@dataclass
class PCA:
    """Principal components of a distribution over D channels.

    Attributes:
        mean: `(D,)` float64.
        eigenvalues: `(D,)` float64, descending: the variance along each component.
        components: `(D, D)` float64 with orthonormal columns; `components[:, i]` belongs to `eigenvalues[i]`. Signs
            are fixed (the entry of largest magnitude is positive), so equal statistics give equal components.
    """

    mean: torch.Tensor
    eigenvalues: torch.Tensor
    components: torch.Tensor


class StreamingMoments:
    """Mean and covariance of x, and optionally the cross-covariance of x with y, from batches.

    Batches are merged by the pairwise update of Chan, Golub and LeVeque (1983): stable for data far from zero, where
    the textbook E[xx] - E[x]E[x] is not.

    Args:
        channels: D, the width of x.
        target_channels: E, the width of y; 0 for none.
        covariance: Keep the `(D, D)` covariance of x; otherwise only its diagonal, the variance.
    """

    def __init__(self, channels: int, target_channels: int = 0, covariance: bool = True):
        shape = (channels, channels) if covariance else (channels,)
        self.count = 0
        self._mean = torch.zeros(channels, dtype=torch.float64)
        self._scatter = torch.zeros(shape, dtype=torch.float64)
        self._target_mean = torch.zeros(target_channels, dtype=torch.float64)
        self._cross = torch.zeros(channels, target_channels, dtype=torch.float64)

    def update(self, rows: torch.Tensor, targets: torch.Tensor | None = None) -> "StreamingMoments":
        """Add rows.

        Args:
            rows: `(N, D)`, any float type.
            targets: `(N, E)`, the y of the same N rows.

        Raises:
            ValueError: If a shape does not fit or a value is not finite.
        """
        batch = self._empty()
        batch.count = rows.shape[0]
        if batch.count == 0:
            return self
        x = self._checked(rows, len(self._mean), "rows")
        batch._mean = x.mean(0)
        x = x - batch._mean
        batch._scatter = x.T @ x if self._scatter.ndim == 2 else x.square().sum(0)
        if targets is None:
            targets = rows.new_empty(batch.count, 0)
        y = self._checked(targets, len(self._target_mean), "targets")
        if len(y) != batch.count:
            raise ValueError(f"{batch.count} rows came with {len(y)} targets.")
        batch._target_mean = y.mean(0)
        batch._cross = x.T @ (y - batch._target_mean)
        return self.merge(batch)

    def merge(self, other: "StreamingMoments") -> "StreamingMoments":
        """Add all rows that another instance has seen."""
        if other.count == 0:
            return self
        total = self.count + other.count
        weight = self.count * other.count / total
        delta = other._mean.cpu() - self._mean
        target_delta = other._target_mean.cpu() - self._target_mean
        outer = torch.outer(delta, delta) if self._scatter.ndim == 2 else delta.square()
        self._scatter += other._scatter.cpu() + weight * outer
        self._cross += other._cross.cpu() + weight * torch.outer(delta, target_delta)
        self._mean += delta * (other.count / total)
        self._target_mean += target_delta * (other.count / total)
        self.count = total
        return self

    def all_reduce(self) -> "StreamingMoments":
        """Merge with the other processes of the default group, in rank order; every rank ends with the same sums."""
        if not torch.distributed.is_available() or not torch.distributed.is_initialized():
            return self
        parts = [self] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(parts, self)
        merged = self._empty()
        for part in parts:
            merged.merge(part)
        self.__dict__.update(merged.__dict__)
        return self

    @property
    def mean(self) -> torch.Tensor:
        """`(D,)` float64."""
        self._require_rows(1)
        return self._mean.clone()

    @property
    def target_mean(self) -> torch.Tensor:
        """`(E,)` float64."""
        self._require_rows(1)
        return self._target_mean.clone()

    @property
    def covariance(self) -> torch.Tensor:
        """`(D, D)` float64, divided by the number of rows (the population's, not the sample's)."""
        self._require_rows(1)
        if self._scatter.ndim != 2:
            raise ValueError("Only the variance was kept: build StreamingMoments with covariance=True.")
        return self._scatter / self.count

    @property
    def variance(self) -> torch.Tensor:
        """`(D,)` float64, divided by the number of rows."""
        self._require_rows(1)
        return (self._scatter.diagonal() if self._scatter.ndim == 2 else self._scatter) / self.count

    def pca(self) -> PCA:
        """Return the principal components of x."""
        return PCA(self.mean, *_descending_eigenvectors(self.covariance))

    def ridge(self, projection: torch.Tensor | None = None, alpha: float = 1e-6) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the ridge regression of y on x, or on `x @ projection`.

        Minimises `mean ||y - (x P) W - b||^2 + alpha * s * ||W||^2` with `s` the mean variance of the regressors.

        Args:
            projection: `(D, K)`; `None` for the identity.
            alpha: Strength of the penalty, relative to the regressors' variance.

        Returns:
            `W` of shape `(K, E)` and `b` of shape `(E,)`, float64.
        """
        covariance, cross, mean = self.covariance, self._cross / self.count, self._mean
        if projection is not None:
            projection = projection.double()
            covariance, cross, mean = projection.T @ covariance @ projection, projection.T @ cross, mean @ projection
        scale = covariance.diagonal().mean().clamp(min=torch.finfo(torch.float64).tiny)
        penalty = alpha * scale * torch.eye(len(covariance), dtype=torch.float64)
        weight = torch.linalg.solve(covariance + penalty, cross)
        return weight, self._target_mean - mean @ weight

    def reduced_rank_regression(self, rank: int, alpha: float = 1e-6) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the best linear map from x to y through `rank` numbers (Izenman, 1975), with a ridge penalty.

        The ridge regression's predictions are projected on their first principal components U, so that
        `y ~ (x - mean) P W + target_mean` with `W = U^T` orthonormal: distances between `x P` are distances between
        predictions, and no other map of this rank has a smaller squared error (for `alpha = 0`).

        Args:
            rank: K, at most D and E.
            alpha: As in `ridge`.

        Returns:
            `P` of shape `(D, K)` and `W` of shape `(K, E)`, float64; the first numbers explain most.
        """
        regression, _ = self.ridge(alpha=alpha)
        predicted = regression.T @ self.covariance @ regression
        directions = _descending_eigenvectors(predicted)[1][:, :rank]
        return regression @ directions, directions.T

    def _empty(self) -> "StreamingMoments":
        channels, target_channels = self._cross.shape
        return StreamingMoments(channels, target_channels, self._scatter.ndim == 2)

    def _checked(self, values: torch.Tensor, channels: int, what: str) -> torch.Tensor:
        if values.ndim != 2 or values.shape[1] != channels:
            raise ValueError(f"Expected {what} of shape (N, {channels}), got {tuple(values.shape)}.")
        if not torch.isfinite(values).all():
            raise ValueError(f"The {what} contain NaN or infinite values.")
        return values.to("cpu" if values.device.type == "mps" else values.device, torch.float64)

    def _require_rows(self, minimum: int) -> None:
        if self.count < minimum:
            raise ValueError(f"Statistics of {self.count} rows are undefined: at least {minimum} needed.")


def _descending_eigenvectors(covariance: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvalues, largest first, and eigenvectors as columns, each with its largest entry positive."""
    eigenvalues, vectors = torch.linalg.eigh(covariance)
    vectors = vectors.flip(1)
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return eigenvalues.flip(0).clamp(min=0), vectors * largest.sign()


class ReservoirSample:
    """A uniform random sample, without replacement, of the rows of a stream of unknown length.

    Every row gets a random key and those with the largest keys are kept, so samples merge like sums do. Rows are kept
    in float32 on the CPU, in one block that is never copied.

    Args:
        capacity: Rows to keep, at most.
        generator: Source of the keys; on the CPU.

    Raises:
        ValueError: If the capacity is not positive.
    """

    def __init__(self, capacity: int, generator: torch.Generator):
        if capacity < 1:
            raise ValueError(f"capacity={capacity} must be positive.")
        self.capacity = capacity
        self.generator = generator
        self._rows: torch.Tensor | None = None
        self._keys = torch.arange(-capacity, 0, dtype=torch.float64)  # negative: free slots, the first go first

    def __len__(self) -> int:
        return int((self._keys >= 0).sum())

    def update(self, rows: torch.Tensor) -> "ReservoirSample":
        """Offer rows `(N, D)`.

        Raises:
            ValueError: If the shape is another.
        """
        return self._offer(torch.rand(rows.shape[0], generator=self.generator, dtype=torch.float64), rows)

    def merge(self, other: "ReservoirSample") -> "ReservoirSample":
        """Offer all rows that another instance was offered; its generator must have had another seed."""
        return self._offer(other._keys[: len(other)], other.rows) if len(other) else self

    def all_gather(self) -> "ReservoirSample":
        """Merge with the other processes' samples, in rank order; every rank ends with the same one.

        The ranks' generators must have different seeds. Only rows that stay are sent.
        """
        if not torch.distributed.is_available() or not torch.distributed.is_initialized():
            return self
        parts: list = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(parts, self._keys[: len(self)].clone())
        keys = torch.cat(parts)
        least = keys.topk(min(self.capacity, len(keys))).values.min() if len(keys) else keys.new_zeros(())
        mine = (self._keys >= least).nonzero()[:, 0]
        rows = None if self._rows is None else self._rows[mine]
        torch.distributed.all_gather_object(parts, (self._keys[mine], rows))
        merged = ReservoirSample(self.capacity, self.generator)
        for keys, rows in parts:
            if rows is not None:
                merged._offer(keys, rows)
        self.__dict__.update(merged.__dict__)
        return self

    @property
    def rows(self) -> torch.Tensor:
        """`(min(N, capacity), D)` float32, in no particular order; a view that the next update changes.

        Raises:
            ValueError: If there were no rows.
        """
        if self._rows is None or not len(self):
            raise ValueError("The sample is empty: no rows were offered.")
        return self._rows[: len(self)]

    def _offer(self, keys: torch.Tensor, rows: torch.Tensor) -> "ReservoirSample":
        if self._rows is None and rows.ndim == 2:
            self._rows = torch.empty(self.capacity, rows.shape[1])
        if self._rows is None or rows.shape[1:] != self._rows.shape[1:]:
            channels = "D" if self._rows is None else self._rows.shape[1]
            raise ValueError(f"Expected rows of shape (N, {channels}), got {tuple(rows.shape)}.")
        chosen = torch.zeros(self.capacity + len(keys), dtype=torch.bool)
        chosen[torch.cat([self._keys, keys]).topk(self.capacity).indices] = True
        slots = (~chosen[: self.capacity]).nonzero()[:, 0]
        arrivals = chosen[self.capacity :].nonzero()[:, 0]  # as many
        self._keys[slots] = keys[arrivals]
        self._rows[slots] = rows.detach()[arrivals.to(rows.device)].float().cpu()
        return self


def cluster_sums(rows: torch.Tensor, indices: torch.Tensor, num_clusters: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Count and sum the rows of every cluster.

    Args:
        rows: `(N, D)` float.
        indices: `(N,)` int64, the cluster of every row.
        num_clusters: K.

    Returns:
        Counts `(K,)` and sums `(K, D)`, float64, on the rows' device (on the CPU where that has no float64).
    """
    device = torch.device("cpu") if rows.device.type == "mps" else rows.device
    counts = torch.bincount(indices.to(device), minlength=num_clusters).double()
    sums = torch.zeros(num_clusters, rows.shape[1], dtype=torch.float64, device=device)
    for part, cluster in zip(rows.split(_CHUNK), indices.split(_CHUNK), strict=True):
        sums.index_add_(0, cluster.to(device), part.to(device).double())
    return counts, sums


def kmeans(
    rows: torch.Tensor,
    num_clusters: int,
    nearest: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    generator: torch.Generator,
    num_iterations: int = 20,
    plus_plus: bool = False,
) -> torch.Tensor:
    """Lloyd's algorithm.

    A cluster that loses all its rows is moved to one of the rows that are worst represented, drawn in proportion to
    their squared error, so no centre is wasted while there are distinct rows left.

    Where there are 2^34 distances and more, the first three quarters of the iterations see 8 random rows per cluster:
    early on, centres move so far that a part shows them the way as well, in a fraction of the time.

    Args:
        rows: `(N, D)` float, N at least `num_clusters`.
        num_clusters: K.
        nearest: Returns the `(N,)` index of the nearest centre: `nearest(rows, centres)`.
        generator: For the start and for moved centres; on the CPU, wherever the rows are.
        num_iterations: At most; ends earlier when assignments stay.
        plus_plus: Start with k-means++ (Arthur and Vassilvitskii, 2007), which takes K passes over the rows, instead
            of K different random rows.

    Returns:
        Centres `(K, D)`, float32.

    Raises:
        ValueError: If there are fewer rows than clusters.
    """
    rows = rows.float()
    if not 1 <= num_clusters <= len(rows):
        raise ValueError(f"{len(rows)} rows cannot fill {num_clusters} clusters: at least as many rows are needed.")
    if plus_plus:
        centres = _plus_plus(rows, num_clusters, generator)
    else:
        centres = rows[torch.randperm(len(rows), generator=generator)[:num_clusters].to(rows.device)]
    on_part = 0
    if len(rows) * num_clusters >= _MANY_DISTANCES and len(rows) >= 2 * _PART_OF_ROWS * num_clusters:
        on_part = 3 * num_iterations // 4
        part = torch.randperm(len(rows), generator=generator)[: _PART_OF_ROWS * num_clusters].to(rows.device)
        centres = _lloyd(rows[part], centres, nearest, generator, on_part)
    return _lloyd(rows, centres, nearest, generator, num_iterations - on_part)


def _lloyd(
    rows: torch.Tensor,
    centres: torch.Tensor,
    nearest: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    generator: torch.Generator,
    num_iterations: int,
) -> torch.Tensor:
    previous = None
    for _ in range(num_iterations):
        indices = nearest(rows, centres)
        if previous is not None and torch.equal(indices, previous):
            break
        previous = indices
        counts, sums = cluster_sums(rows, indices, len(centres))
        centres = (sums / counts.clamp(min=1)[:, None]).float().to(rows.device)
        empty = (counts == 0).nonzero()[:, 0].to(rows.device)
        if len(empty):
            centres[empty] = rows[_draw(_squared_errors(rows, centres, indices), len(empty), generator)]
    return centres


def _plus_plus(rows: torch.Tensor, num_clusters: int, generator: torch.Generator) -> torch.Tensor:
    first = int(torch.randint(len(rows), (1,), generator=generator))
    centres = [rows[first]]
    errors = (rows - centres[0]).square().sum(1)
    for _ in range(num_clusters - 1):
        centres.append(rows[_draw(errors, 1, generator)[0]])
        errors = torch.minimum(errors, (rows - centres[-1]).square().sum(1))
    return torch.stack(centres)


def _squared_errors(rows: torch.Tensor, centres: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    chunks = zip(rows.split(_CHUNK), indices.split(_CHUNK), strict=True)
    return torch.cat([(part - centres[cluster]).square().sum(1) for part, cluster in chunks])


def _draw(weights: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    """Draw `count` different positions with probability in proportion to `weights`; uniformly where all are zero.

    Exponential races (Efraimidis and Spirakis, 2006): unlike `torch.multinomial`, for any number of weights.
    """
    races = torch.empty(len(weights), dtype=torch.float64).exponential_(generator=generator)
    scores = weights.cpu().double() / races
    scores = torch.where(scores > 0, scores, -races)  # rows of zero weight come last, in random order
    return scores.topk(count).indices.to(weights.device)
