"""What a representation knows of the classes of pictures: nearest neighbours, and a linear classifier."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F


def knn_accuracy(
    bank: torch.Tensor,
    bank_labels: torch.Tensor,
    queries: torch.Tensor,
    labels: torch.Tensor,
    num_neighbours: int = 20,
    temperature: float = 0.07,
) -> float:
    """Classify by the nearest neighbours' votes, weighted by `exp(cosine / temperature)` (DINO, arXiv 2104.14294).

    Args:
        bank: Representations of labelled pictures, `(N, D)`.
        bank_labels: `(N,)` int64, non-negative.
        queries: `(M, D)`.
        labels: The truth, `(M,)`.
        num_neighbours: Voters of each query; at most N.
        temperature: Positive.

    Returns:
        The share of queries that got the right label, in [0, 1].

    Raises:
        ValueError: If shapes do not fit or there are fewer than `num_neighbours` in the bank.
    """
    _check(bank, bank_labels, queries, labels)
    if not 1 <= num_neighbours <= len(bank):
        raise ValueError(f"num_neighbours={num_neighbours} must lie between 1 and the {len(bank)} rows of the bank.")
    similarity = F.normalize(queries.float(), dim=1) @ F.normalize(bank.float(), dim=1).T  # (M, N)
    values, neighbours = similarity.topk(num_neighbours, dim=1)
    votes = torch.zeros(len(queries), int(bank_labels.max()) + 1, device=queries.device)
    votes.scatter_add_(1, bank_labels[neighbours], (values / temperature).exp())
    return float((votes.argmax(1) == labels).float().mean())


@dataclass(frozen=True)
class LinearProbe:
    """What a linear classifier on frozen representations reached.

    Attributes:
        accuracy: The best share of queries that got the right label, in [0, 1].
        learning_rate: With which it was reached.
        accuracies: Of every learning rate.
    """

    accuracy: float
    learning_rate: float
    accuracies: dict[float, float]


def linear_accuracy(
    bank: torch.Tensor,
    bank_labels: torch.Tensor,
    queries: torch.Tensor,
    labels: torch.Tensor,
    learning_rates: Sequence[float] = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0),
    epochs: int = 20,
    batch_size: int = 128,
    seed: int = 0,
) -> LinearProbe:
    """Train a linear classifier by SGD for every learning rate of a grid, and report the best (DINOv2, 2304.07193).

    As DINOv2 does at larger size: momentum 0.9, no weight decay, a cosine schedule to zero, learning rates for a batch
    of 256, and the best of the grid on the queries themselves, which makes the number an optimistic one. Here on
    representations that are standardised by the bank's mean and deviation, in float32. The classifiers of the grid
    are trained together and see the same batches; the result follows from the arguments alone.

    Args:
        bank: Representations of labelled pictures, `(N, D)`.
        bank_labels: `(N,)` int64, non-negative.
        queries: `(M, D)`.
        labels: The truth, `(M,)`.
        learning_rates: The grid, for a batch of 256.
        epochs: Passes over the bank.
        batch_size: Of a step.
        seed: Of initial weights and order.

    Raises:
        ValueError: If shapes do not fit, a value is not finite, or the grid is empty.
    """
    _check(bank, bank_labels, queries, labels)
    if not learning_rates or epochs < 1 or batch_size < 1:
        raise ValueError(f"learning_rates={learning_rates}, epochs={epochs}, batch_size={batch_size} train nothing.")
    if not (bank.isfinite().all() and queries.isfinite().all()):
        raise ValueError("The representations contain NaN or infinite values.")
    generator = torch.Generator().manual_seed(seed)
    mean, deviation = bank.float().mean(0), bank.float().std(0, correction=0).clamp(min=1e-6)
    rows, tests = (bank.float() - mean) / deviation, (queries.float() - mean) / deviation
    classes = int(bank_labels.max()) + 1
    weights = 0.01 * torch.randn(bank.shape[1], classes, generator=generator).to(rows)
    weights = weights.repeat(len(learning_rates), 1, 1).requires_grad_()  # (R, D, K)
    biases = rows.new_zeros(len(learning_rates), 1, classes).requires_grad_()
    momenta = [torch.zeros_like(weights), torch.zeros_like(biases)]
    rates = torch.tensor(learning_rates, device=rows.device).view(-1, 1, 1) * batch_size / 256
    steps = epochs * -(-len(rows) // batch_size)
    step = 0
    for _ in range(epochs):
        for chosen in torch.randperm(len(rows), generator=generator).to(rows.device).split(batch_size):
            logits = rows[chosen] @ weights + biases  # (R, B, K)
            truth = bank_labels[chosen].expand(len(learning_rates), -1)
            loss = F.cross_entropy(logits.flatten(0, 1), truth.flatten(), reduction="sum") / len(chosen)
            gradients = torch.autograd.grad(loss, (weights, biases))
            scale = rates * 0.5 * (1 + math.cos(math.pi * step / steps))
            with torch.no_grad():
                for parameter, gradient, momentum in zip((weights, biases), gradients, momenta, strict=True):
                    momentum.mul_(0.9).add_(gradient)
                    parameter -= scale * momentum
            step += 1
    with torch.no_grad():
        right = ((tests @ weights + biases).argmax(2) == labels).float().mean(1).tolist()
    accuracies = dict(zip(learning_rates, right, strict=True))
    best = max(accuracies, key=accuracies.__getitem__)
    return LinearProbe(accuracies[best], best, accuracies)


def _check(bank: torch.Tensor, bank_labels: torch.Tensor, queries: torch.Tensor, labels: torch.Tensor) -> None:
    if bank.ndim != 2 or queries.ndim != 2 or bank.shape[1] != queries.shape[1]:
        raise ValueError(f"bank {tuple(bank.shape)} and queries {tuple(queries.shape)} are not (N, D) and (M, D).")
    if len(bank) != len(bank_labels) or len(queries) != len(labels):
        raise ValueError(f"{len(bank)} and {len(queries)} rows came with {len(bank_labels)} and {len(labels)} labels.")
