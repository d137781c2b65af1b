"""The k-NN probe votes as DINO's does."""

import pytest
import torch

from dinotok.probes import knn_accuracy


def clusters(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.eye(5, 8) * 4
    labels = torch.arange(count) % 5
    return centres[labels] + torch.randn(count, 8, generator=generator), labels


def test_separate_clusters_are_told_apart_and_shuffled_labels_are_not():
    bank, queries = clusters(200, 0), clusters(100, 1)
    assert knn_accuracy(*bank, *queries) > 0.97
    shuffled = queries[1][torch.randperm(100, generator=torch.Generator().manual_seed(0))]
    assert knn_accuracy(*bank, queries[0], shuffled) < 0.4


def test_votes_are_weighted_by_similarity():
    bank = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.6, 0.8]])
    labels, query = torch.tensor([0, 1, 1]), torch.tensor([[1.0, 0.0]])
    assert knn_accuracy(bank, labels, query, torch.tensor([0]), 3, temperature=0.07) == 1.0
    assert knn_accuracy(bank, labels, query, torch.tensor([1]), 3, temperature=10.0) == 1.0  # a plain majority


def test_length_does_not_count():
    bank, labels = clusters(60, 0)
    lengths = torch.rand(60, 1, generator=torch.Generator().manual_seed(2)) * 9 + 0.1
    queries = clusters(30, 1)
    assert knn_accuracy(bank * lengths, labels, *queries) == knn_accuracy(bank, labels, *queries)


def test_bad_arguments():
    bank, labels = clusters(10, 0)
    with pytest.raises(ValueError, match="num_neighbours=20 .* 10 rows"):
        knn_accuracy(bank, labels, bank, labels)
    with pytest.raises(ValueError, match=r"\(10, 7\)"):
        knn_accuracy(bank, labels, bank[:, :7], labels, 3)
    with pytest.raises(ValueError, match="9 labels"):
        knn_accuracy(bank, labels, bank, labels[:9], 3)
