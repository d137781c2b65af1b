"""Streaming statistics equal what numpy computes on all the data at once."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dinotok.statistics import StreamingMoments


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


def _moments_of_my_share(rank: int, queue, address: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    moments = StreamingMoments(4, 2).update(rows(60, 4, 11)[rank::2], rows(60, 2, 12)[rank::2]).all_reduce()
    queue.put((moments.count, moments.mean.tolist(), moments.covariance.tolist(), moments.ridge()[0].tolist()))
    torch.distributed.destroy_process_group()


def test_two_processes_end_with_the_statistics_of_one(tmp_path):
    context = torch.multiprocessing.get_context("spawn")
    queue = context.Queue()
    address = f"file://{tmp_path / 'rendezvous'}"
    workers = [context.Process(target=_moments_of_my_share, args=(rank, queue, address)) for rank in range(2)]
    for worker in workers:
        worker.start()
    results = [queue.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join()
    assert results[0] == results[1]
    one = StreamingMoments(4, 2).update(rows(60, 4, 11), rows(60, 2, 12))
    assert results[0][0] == 60
    np.testing.assert_allclose(results[0][1], one.mean)
    np.testing.assert_allclose(results[0][2], one.covariance)
    np.testing.assert_allclose(results[0][3], one.ridge()[0])
