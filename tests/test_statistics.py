"""Streaming statistics equal what numpy computes on all the data at once."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dinotok.statistics import ReservoirSample, StreamingMoments, _draw, cluster_sums, kmeans


def rows(count: int, channels: int, seed: int, offset: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(channels, channels, generator=generator, dtype=torch.float64)
    return torch.randn(count, channels, generator=generator, dtype=torch.float64) @ mixing + offset


@settings(max_examples=30, deadline=None)
@given(
    count=st.integers(2, 60),
    channels=st.integers(1, 7),
    targets=st.integers(0, 4),
    cuts=st.lists(st.integers(0, 60), max_size=5),
    offset=st.sampled_from([0.0, 1e3, -1e6]),
)
def test_any_split_gives_the_statistics_of_the_whole(count, channels, targets, cuts, offset):
    x, y = rows(count, channels, 0, offset), rows(count, targets, 1, offset)
    edges = [0, *sorted(min(cut, count) for cut in cuts), count]
    moments = StreamingMoments(channels, targets)
    for start, stop in zip(edges, edges[1:], strict=False):
        moments.update(x[start:stop], y[start:stop])
    assert moments.count == count
    tolerance = 1e-9 * max(1.0, abs(offset))
    np.testing.assert_allclose(moments.mean, x.mean(0), rtol=1e-12, atol=1e-12)
    expected = np.atleast_2d(np.cov(x.numpy().T, bias=True))
    np.testing.assert_allclose(moments.covariance, expected, rtol=1e-7, atol=tolerance)
    np.testing.assert_allclose(moments.variance, expected.diagonal(), rtol=1e-7, atol=tolerance)


def test_variance_far_from_zero_survives():
    """E[xx] - E[x]E[x] in float64 would give 0 or worse here."""
    x = 1e9 + torch.tensor([[-1.0], [0.0], [1.0]], dtype=torch.float64)
    assert StreamingMoments(1).update(x[:1]).update(x[1:]).variance.item() == pytest.approx(2 / 3)


@pytest.mark.parametrize("covariance", [True, False])
def test_merge_is_update_in_any_order(covariance):
    x = rows(50, 4, 2)
    whole = StreamingMoments(4, covariance=covariance).update(x)
    parts = [StreamingMoments(4, covariance=covariance).update(part) for part in x.split(13)]
    merged = StreamingMoments(4, covariance=covariance)
    for part in reversed(parts):
        merged.merge(part)
    torch.testing.assert_close(merged.variance, whole.variance)
    torch.testing.assert_close(merged.mean, whole.mean)


def test_pca_of_a_known_distribution():
    basis = torch.linalg.qr(rows(5, 5, 3))[0]
    spectrum = torch.tensor([9.0, 4.0, 1.0, 0.25, 0.01], dtype=torch.float64)
    samples = rows(4000, 5, 4)
    white = (samples - samples.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(samples.T, correction=0))).T
    pca = StreamingMoments(5).update(white * spectrum.sqrt() @ basis.T + 7).pca()
    torch.testing.assert_close(pca.eigenvalues, spectrum, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close((pca.components.T @ basis).abs(), torch.eye(5, dtype=torch.float64), atol=1e-6, rtol=0)
    torch.testing.assert_close(pca.components.T @ pca.components, torch.eye(5, dtype=torch.float64))
    assert (pca.components.gather(0, pca.components.abs().argmax(0, keepdim=True)) > 0).all()


def test_ridge_is_least_squares_when_the_penalty_vanishes_and_shrinks_when_it_grows():
    x, noise = rows(200, 4, 5, 3.0), rows(200, 2, 6)
    y = x @ rows(4, 2, 7) + 5 + 0.1 * noise
    moments = StreamingMoments(4, 2).update(x[:90], y[:90]).update(x[90:], y[90:])
    weight, bias = moments.ridge(alpha=0.0)
    design = torch.cat([x, torch.ones(200, 1, dtype=torch.float64)], 1)
    expected = torch.linalg.lstsq(design, y).solution
    torch.testing.assert_close(torch.cat([weight, bias[None]]), expected, rtol=1e-6, atol=1e-7)
    shrunk, intercept = moments.ridge(alpha=1e9)
    assert shrunk.abs().max() < 1e-6
    torch.testing.assert_close(intercept, y.mean(0), rtol=1e-5, atol=1e-5)


def test_ridge_on_a_projection_is_ridge_on_projected_rows():
    x, y, projection = rows(80, 5, 8, 2.0), rows(80, 3, 9, -4.0), rows(5, 2, 10)
    ours = StreamingMoments(5, 3).update(x, y).ridge(projection, 1e-3)
    direct = StreamingMoments(2, 3).update(x @ projection, y).ridge(alpha=1e-3)
    for a, b in zip(ours, direct, strict=True):
        torch.testing.assert_close(a, b)


def test_bad_rows_are_named():
    moments = StreamingMoments(3, 2)
    with pytest.raises(ValueError, match=r"rows of shape \(N, 3\), got \(4, 2\)"):
        moments.update(torch.zeros(4, 2), torch.zeros(4, 2))
    with pytest.raises(ValueError, match="NaN"):
        moments.update(torch.full((1, 3), torch.nan), torch.zeros(1, 2))
    with pytest.raises(ValueError, match="4 rows came with 3 targets"):
        moments.update(torch.zeros(4, 3), torch.zeros(3, 2))
    with pytest.raises(ValueError, match="0 rows"):
        _ = moments.mean
    with pytest.raises(ValueError, match="covariance=True"):
        _ = StreamingMoments(2, covariance=False).update(torch.ones(3, 2)).covariance


# ---------------------------------------------------------------------------------------------------- reservoir sample


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def numbered(count: int, start: int = 0) -> torch.Tensor:
    """Rows that say which they are."""
    return torch.arange(start, start + count).float()[:, None].expand(-1, 2)


@settings(max_examples=50, deadline=None)
@given(capacity=st.integers(1, 12), sizes=st.lists(st.integers(0, 9), max_size=6), merged=st.booleans())
def test_a_sample_is_distinct_rows_of_the_stream_up_to_capacity(capacity, sizes, merged):
    sample, other = ReservoirSample(capacity, generator()), ReservoirSample(capacity, generator(1))
    seen = 0
    for position, size in enumerate(sizes):
        (other if merged and position % 2 else sample).update(numbered(size, seen))
        seen += size
    sample.merge(other)
    assert len(sample) == min(capacity, seen)
    if not seen:
        with pytest.raises(ValueError, match="sample is empty"):
            _ = sample.rows
        return
    assert sample.rows.shape == (min(capacity, seen), 2) and sample.rows.dtype == torch.float32
    drawn = sample.rows[:, 0].tolist()
    assert len(set(drawn)) == len(drawn) and set(drawn) <= set(range(seen))
    assert torch.equal(sample.rows[:, 0], sample.rows[:, 1])


@pytest.mark.parametrize("merged", [False, True])
def test_every_row_is_as_likely_to_be_kept(merged):
    """Rows 0 to 19 in batches of unequal size, 5 kept, 2,000 times: 500 of each, 105 of each pair, +- 5 sigma."""
    counts, pairs, keys = torch.zeros(20), torch.zeros(20, 20), generator()
    for _ in range(2000):
        sample, other = ReservoirSample(5, keys), ReservoirSample(5, keys)
        for start, stop in ((0, 1), (1, 8), (8, 10), (10, 20)):
            (other if merged and start >= 8 else sample).update(numbered(stop - start, start))
        drawn = sample.merge(other).rows[:, 0].long()
        counts[drawn] += 1
        pairs[drawn[:, None], drawn] += 1
    assert (counts - 500).abs().max() < 5 * (2000 * 0.25 * 0.75) ** 0.5
    expected = 2000 * 5 * 4 / (20 * 19)
    assert (pairs - pairs.diag().diag() - expected * (1 - torch.eye(20))).abs().max() < 5 * expected**0.5


def test_a_sample_of_any_float_type_is_a_copy():
    rows = torch.randn(4, 3, dtype=torch.bfloat16).requires_grad_()
    sample = ReservoirSample(9, generator()).update(rows)
    assert torch.equal(sample.rows, rows.detach().float()) and not sample.rows.requires_grad
    sample.update(torch.zeros(100, 3))
    assert len(sample) == 9


def test_what_does_not_fit_a_sample_is_named():
    with pytest.raises(ValueError, match="capacity=0"):
        ReservoirSample(0, generator())
    with pytest.raises(ValueError, match=r"\(N, D\), got \(3,\)"):
        ReservoirSample(4, generator()).update(torch.zeros(3))
    with pytest.raises(ValueError, match=r"\(N, 2\), got \(3, 5\)"):
        ReservoirSample(4, generator()).update(torch.zeros(1, 2)).update(torch.zeros(3, 5))


# ------------------------------------------------------------------------------------------------------------- k-means


def nearest(vectors: torch.Tensor, centres: torch.Tensor) -> torch.Tensor:
    return torch.cdist(vectors, centres).argmin(1)


def squared_error(vectors: torch.Tensor, centres: torch.Tensor) -> float:
    return torch.cdist(vectors.double(), centres.double()).amin(1).square().sum().item()


def blobs(num_clusters: int, size: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    centres = 30 * torch.randn(num_clusters, 4, generator=generator(seed))
    noise = torch.randn(num_clusters * size, 4, generator=generator(seed + 1))
    return centres, centres.repeat(size, 1) + 0.05 * noise


def test_cluster_sums_are_those_of_a_loop(monkeypatch):
    monkeypatch.setattr("dinotok.statistics._CHUNK", 7)
    vectors, indices = torch.randn(30, 3, generator=generator()), torch.randint(5, (30,), generator=generator())
    counts, sums = cluster_sums(vectors, indices, 6)
    for cluster in range(6):
        assert counts[cluster] == (indices == cluster).sum()
        torch.testing.assert_close(sums[cluster], vectors[indices == cluster].double().sum(0))


def test_kmeans_finds_separated_clusters():
    centres, vectors = blobs(8, 40)
    found = kmeans(vectors, 8, nearest, generator(), plus_plus=True)
    assert found.shape == (8, 4) and found.dtype == torch.float32
    means = vectors.view(40, 8, 4).mean(0)
    torch.testing.assert_close(found[nearest(centres, found)], means, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("plus_plus", [False, True])
def test_every_iteration_of_kmeans_lowers_the_error_and_the_end_is_a_fixed_point(plus_plus):
    vectors = torch.randn(300, 3, generator=generator())
    errors = [
        squared_error(vectors, kmeans(vectors, 20, nearest, generator(1), iterations, plus_plus))
        for iterations in range(12)
    ]
    assert all(after <= before * (1 + 1e-5) for before, after in zip(errors, errors[1:], strict=False))
    assert errors[-1] < 0.9 * errors[0]
    centres = kmeans(vectors, 20, nearest, generator(1), 1000, plus_plus)
    counts, sums = cluster_sums(vectors, nearest(vectors, centres), 20)
    torch.testing.assert_close((sums / counts[:, None]).float(), centres, rtol=1e-5, atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(distinct=st.integers(1, 12), clusters=st.integers(1, 12), seed=st.integers(0, 1000))
def test_no_centre_is_wasted_while_there_are_distinct_rows(distinct, clusters, seed):
    """A few rows, most of them copies of one: random starts waste nearly every centre on the copies."""
    values = torch.randn(distinct, 2, generator=generator(seed))
    vectors = torch.cat([values, values[:1].expand(40, 2)])
    centres = kmeans(vectors, clusters, nearest, generator(seed))
    used = len(nearest(vectors, centres).unique())
    assert used == min(distinct, clusters)
    if clusters >= distinct:
        assert squared_error(vectors, centres) < 1e-6


def test_moved_centres_go_where_the_error_is():
    vectors = torch.cat([torch.zeros(200, 2), torch.tensor([[1e-3, 0.0], [50.0, 50.0]])])
    hits = 0
    for seed in range(20):
        centres = kmeans(vectors, 2, nearest, generator(seed))
        hits += squared_error(vectors, centres) < 1e-3
    assert hits >= 19


def test_positions_are_drawn_by_weight_and_evenly_where_there_is_none():
    weights, source = torch.tensor([0.0, 1.0, 3.0, 0.0]), generator()
    drawn = torch.stack([_draw(weights, 4, source) for _ in range(1000)])
    assert (drawn.sort(1).values == torch.arange(4)).all()
    assert (drawn[:, 0] == 2).float().mean().item() == pytest.approx(0.75, abs=0.07)
    assert (drawn[:, 2] == 0).float().mean().item() == pytest.approx(0.5, abs=0.08)  # those without weight come last


def test_a_better_start_gives_a_better_end():
    _, vectors = blobs(16, 20)
    ends = {
        plus_plus: [
            squared_error(vectors, kmeans(vectors, 16, nearest, generator(seed), 50, plus_plus)) for seed in range(15)
        ]
        for plus_plus in (False, True)
    }
    assert sum(ends[True]) < 0.7 * sum(ends[False])


def test_kmeans_of_many_distances_begins_on_a_part_and_ends_on_all(monkeypatch):
    vectors, seen = torch.randn(400, 3, generator=generator()), []

    def watched(rows: torch.Tensor, centres: torch.Tensor) -> torch.Tensor:
        seen.append(len(rows))
        return nearest(rows, centres)

    whole = squared_error(vectors, kmeans(vectors, 20, watched, generator(1), 12))
    assert set(seen) == {400}
    seen.clear()
    monkeypatch.setattr("dinotok.statistics._MANY_DISTANCES", 8000)
    centres = kmeans(vectors, 20, watched, generator(1), 12)
    assert set(seen) == {160, 400} and seen == sorted(seen)
    assert seen.count(160) <= 9 and seen.count(400) <= 3
    assert squared_error(vectors, centres) < 1.05 * whole
    seen.clear()
    kmeans(vectors[:319], 20, watched, generator(1), 2)  # a part would be more than half
    assert seen == [319] * 2


def test_kmeans_needs_as_many_rows_as_clusters():
    for plus_plus in (False, True):
        assert len(kmeans(torch.randn(5, 2), 5, nearest, generator(), plus_plus=plus_plus).unique(dim=0)) == 5
        with pytest.raises(ValueError, match="4 rows cannot fill 5 clusters"):
            kmeans(torch.randn(4, 2), 5, nearest, generator(), plus_plus=plus_plus)


# ----------------------------------------------------------------------------------------------------------- processes


def _merge_with_the_other(rank: int, queue, address: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    moments = StreamingMoments(4, 2).update(rows(60, 4, 11)[rank::2], rows(60, 2, 12)[rank::2]).all_reduce()
    sample = ReservoirSample(8, generator(rank)).update(numbered(30, 100 * rank)).all_gather()
    lopsided = ReservoirSample(8, generator(rank))
    if rank == 1:
        lopsided.update(numbered(5))
    lopsided.all_gather()
    nothing = ReservoirSample(8, generator(rank)).all_gather()
    queue.put(
        {
            "moments": (
                moments.count,
                moments.mean.tolist(),
                moments.covariance.tolist(),
                moments.ridge()[0].tolist(),
            ),
            "samples": (sample.rows.tolist(), lopsided.rows.tolist(), len(nothing)),
        }
    )
    torch.distributed.destroy_process_group()


def test_two_processes_end_with_the_statistics_and_the_sample_of_one(tmp_path):
    context = torch.multiprocessing.get_context("spawn")
    queue = context.Queue()
    address = f"file://{tmp_path / 'rendezvous'}"
    workers = [context.Process(target=_merge_with_the_other, args=(rank, queue, address)) for rank in range(2)]
    for worker in workers:
        worker.start()
    results = [queue.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join()
    assert results[0] == results[1]
    count, mean, covariance, weight = results[0]["moments"]
    one = StreamingMoments(4, 2).update(rows(60, 4, 11), rows(60, 2, 12))
    assert count == 60
    np.testing.assert_allclose(mean, one.mean)
    np.testing.assert_allclose(covariance, one.covariance)
    np.testing.assert_allclose(weight, one.ridge()[0])
    sample, lopsided, nothing = results[0]["samples"]
    merged = ReservoirSample(8, generator(0)).update(numbered(30))
    merged.merge(ReservoirSample(8, generator(1)).update(numbered(30, 100)))
    assert sorted(sample) == sorted(merged.rows.tolist())
    assert 0 < sum(row[0] >= 100 for row in sample) < 8
    assert sorted(lopsided) == numbered(5).tolist() and nothing == 0


def test_reduced_rank_regression_is_eckart_young_on_the_predictions():
    """Without penalty, the error beyond least squares is what the dropped singular values hold."""
    x, y = rows(300, 6, 20, 2.0), rows(300, 6, 21) @ rows(6, 5, 22)
    y = y + x @ rows(6, 5, 23)
    moments = StreamingMoments(6, 5).update(x[:100], y[:100]).update(x[100:], y[100:])
    x, y = x - x.mean(0), y - y.mean(0)
    fitted = x @ torch.linalg.lstsq(x, y).solution
    least = (y - fitted).square().sum()
    spectrum = torch.linalg.svdvals(fitted)
    for rank in (1, 3, 5):
        projection, weight = moments.reduced_rank_regression(rank, alpha=0.0)
        assert projection.shape == (6, rank) and weight.shape == (rank, 5)
        error = (y - x @ projection @ weight).square().sum()
        torch.testing.assert_close(error, least + spectrum[rank:].square().sum(), rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(weight @ weight.T, torch.eye(rank, dtype=torch.float64))
