"""The k-NN probe votes as DINO's does; the linear probe finds what is linear."""

import pytest
import torch

from dinotok.probes import knn_accuracy, linear_accuracy


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


def test_linear_probe_tells_clusters_apart_and_not_shuffled_labels():
    bank, queries = clusters(200, 0), clusters(100, 1)
    found = linear_accuracy(*bank, *queries, learning_rates=(1e-6, 0.1), epochs=5)
    assert found.accuracy > 0.95 and found.learning_rate == 0.1 and found.accuracies[1e-6] < found.accuracy
    shuffled = bank[1][torch.randperm(200, generator=torch.Generator().manual_seed(0))]
    assert linear_accuracy(bank[0], shuffled, *queries, epochs=5).accuracy < 0.45


def test_linear_probe_is_deterministic_keeps_the_random_state_and_does_not_see_scale():
    bank, queries = clusters(60, 0), clusters(40, 1)
    state = torch.get_rng_state()
    found = linear_accuracy(*bank, *queries, epochs=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert linear_accuracy(*bank, *queries, epochs=2) == found
    assert linear_accuracy(bank[0] * 1000, bank[1], queries[0] * 1000, queries[1], epochs=2).accuracy == pytest.approx(
        found.accuracy, abs=0.03
    )


def test_a_rate_of_the_grid_learns_what_it_learns_alone():
    bank, queries = clusters(60, 0), clusters(40, 1)
    together = linear_accuracy(*bank, *queries, learning_rates=(0.01, 0.1), epochs=3)
    for rate in (0.01, 0.1):
        alone = linear_accuracy(*bank, *queries, learning_rates=(rate,), epochs=3)
        assert alone.accuracy == pytest.approx(together.accuracies[rate], abs=0.026)


def test_linear_probe_names_what_is_wrong():
    bank, labels = clusters(10, 0)
    with pytest.raises(ValueError, match="NaN"):
        linear_accuracy(bank * float("nan"), labels, bank, labels)
    with pytest.raises(ValueError, match="train nothing"):
        linear_accuracy(bank, labels, bank, labels, learning_rates=())
    with pytest.raises(ValueError, match="9 labels"):
        linear_accuracy(bank, labels, bank, labels[:9])
