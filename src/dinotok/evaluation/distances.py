"""How alike two sets of features are beyond their Gaussians: KID, precision and recall, and the Inception score."""

import warnings

import torch
from torch import nn

_NEIGHBOURS = 3
_BLOCK = 1024
KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000


class _Identity(nn.Identity):
    num_features = 0


def kernel_distance(real: torch.Tensor, fake: torch.Tensor, seed: int = 0) -> tuple[float, float]:
    """Compute the Kernel Inception Distance by torchmetrics (Binkowski et al., arXiv 1801.01401).

    Args:
        real: Features `(N, D)`.
        fake: `(M, D)`.
        seed: Of the 100 subsets of 1000 features, or of all of the smaller set if it has fewer.

    Returns:
        Mean and standard deviation over the subsets. Unbiased, so it may be below 0.

    Raises:
        ValueError: If a set has fewer than two rows.
    """
    from torchmetrics.image.kid import KernelInceptionDistance

    size = min(KID_SUBSET_SIZE, len(real), len(fake))
    if size < 2:
        raise ValueError(f"KID needs at least 2 pictures of each set, got {len(real)} and {len(fake)}.")
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")  # it keeps all features in memory; so do we
        torch.manual_seed(seed)
        metric = KernelInceptionDistance(feature=_Identity(), subsets=KID_SUBSETS, subset_size=size)
        metric.update(real.double(), real=True)
        metric.update(fake.double(), real=False)
        mean, deviation = metric.compute()
    return mean.item(), deviation.item()


def precision_recall(real: torch.Tensor, fake: torch.Tensor, neighbours: int = _NEIGHBOURS) -> tuple[float, float]:
    """Compute improved precision and recall (Kynkäänniemi et al., arXiv 1904.06991, equations 1 and 2).

    A row is covered by a set if it is no farther from some row of it than that row's k-th nearest neighbour. Published
    numbers compare 10,000 references with 50,000 samples: state both.

    Args:
        real: Features `(N, D)`.
        fake: `(M, D)`.
        neighbours: k.

    Returns:
        The share of `fake` that `real` covers, and the share of `real` that `fake` covers.

    Raises:
        ValueError: If a set has no more than k rows.
    """
    if min(len(real), len(fake)) <= neighbours:
        raise ValueError(f"{len(real)} and {len(fake)} pictures have no {neighbours} neighbours each.")
    return _covered(fake, real, _radii(real, neighbours)), _covered(real, fake, _radii(fake, neighbours))


def inception_score(logits: torch.Tensor, splits: int = 10, seed: int = 0) -> tuple[float, float]:
    """Compute `exp(E KL(p(y|x) || p(y)))` (Salimans et al., arXiv 1606.03498).

    Args:
        logits: `(N, K)`, of the classifier without its bias, as its authors do.
        splits: Parts of equal size over which mean and deviation are taken; at most N.
        seed: Of the order in which samples are put into parts.

    Returns:
        Mean and standard deviation over the parts.

    Raises:
        ValueError: If there are fewer samples than parts.
    """
    if not 1 <= splits <= len(logits):
        raise ValueError(f"{len(logits)} samples cannot be split into {splits} parts.")
    order = torch.randperm(len(logits), generator=torch.Generator().manual_seed(seed))
    scores = []
    for part in logits[order].double().tensor_split(splits):
        log_p = part.log_softmax(1)
        log_marginal = log_p.logsumexp(0) - torch.tensor(len(part), dtype=torch.float64).log()
        scores.append((log_p.exp() * (log_p - log_marginal)).sum(1).mean().exp())
    values = torch.stack(scores)
    return values.mean().item(), values.std(correction=0).item()


def _distances(rows: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    # Exact: by a matrix product, equal rows would be apart, and duplicates outside each other's radius of zero.
    return torch.cdist(rows.float(), others.float(), compute_mode="donot_use_mm_for_euclid_dist")


def _radii(rows: torch.Tensor, neighbours: int) -> torch.Tensor:
    """Return how far the k-th nearest other row is from each, `(N,)`."""
    found = [_distances(block, rows).kthvalue(neighbours + 1, dim=1).values for block in rows.split(_BLOCK)]
    return torch.cat(found)


def _covered(rows: torch.Tensor, by: torch.Tensor, radii: torch.Tensor) -> float:
    inside = [(_distances(block, by) <= radii).any(1) for block in rows.split(_BLOCK)]
    return torch.cat(inside).double().mean().item()
