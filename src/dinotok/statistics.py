"""Streaming statistics in float64: the closed-form part of a tokenizer.

Nothing here holds the data: every class takes batches of rows and keeps sums. Two instances merge exactly, in any
order, so shards and processes can be combined.
"""

from dataclasses import dataclass

import torch
import torch.distributed


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
        eigenvalues, vectors = torch.linalg.eigh(self.covariance)
        vectors = vectors.flip(1)
        largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
        return PCA(self.mean, eigenvalues.flip(0).clamp(min=0), vectors * largest.sign())

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
