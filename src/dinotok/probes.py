"""What a representation knows of the classes of pictures: probes without a gradient step."""

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
    if bank.ndim != 2 or queries.ndim != 2 or bank.shape[1] != queries.shape[1]:
        raise ValueError(f"bank {tuple(bank.shape)} and queries {tuple(queries.shape)} are not (N, D) and (M, D).")
    if len(bank) != len(bank_labels) or len(queries) != len(labels):
        raise ValueError(f"{len(bank)} and {len(queries)} rows came with {len(bank_labels)} and {len(labels)} labels.")
    if not 1 <= num_neighbours <= len(bank):
        raise ValueError(f"num_neighbours={num_neighbours} must lie between 1 and the {len(bank)} rows of the bank.")
    similarity = F.normalize(queries.float(), dim=1) @ F.normalize(bank.float(), dim=1).T  # (M, N)
    values, neighbours = similarity.topk(num_neighbours, dim=1)
    votes = torch.zeros(len(queries), int(bank_labels.max()) + 1, device=queries.device)
    votes.scatter_add_(1, bank_labels[neighbours], (values / temperature).exp())
    return float((votes.argmax(1) == labels).float().mean())
