import dataclasses
import json
import math

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from dinotok.lpips import LPIPS
from dinotok.metrics import ReconstructionMetrics, fid, mean_squared_error, pooled_psnr, psnr, ssim
from tests.conftest import random_pixels


def make_pair(height=24, width=37, batch_size=2, noise=0.1, seed=0):
    """A reconstruction that overshoots [-1, 1] here and there, and its target."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.rand(batch_size, 3, height, width, generator=generator) * 2 - 1
    return target + noise * torch.randn(target.shape, generator=generator), target


def to_8bit_array(pixels):
    """`(3, H, W)` in [-1, 1] to the uint8 array a PNG would hold."""
    return ((pixels.clamp(-1, 1) * 0.5 + 0.5) * 255).round().byte().permute(1, 2, 0).numpy()


def skimage_ssim(picture, target):
    return structural_similarity(
        picture / 255,
        target / 255,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        data_range=1.0,
        channel_axis=-1,
    )


@settings(deadline=None, max_examples=20)
@given(height=st.integers(1, 40), width=st.integers(1, 40), noise=st.floats(0.05, 1), seed=st.integers(0, 99))
def test_psnr_agrees_with_skimage_on_8bit_pictures(height, width, noise, seed):
    pixels, target = make_pair(height, width, noise=noise, seed=seed)
    for value, one, other in zip(psnr(pixels, target), pixels, target, strict=True):
        expected = peak_signal_noise_ratio(to_8bit_array(other), to_8bit_array(one), data_range=255)
        assert value.item() == pytest.approx(expected, abs=1e-4)


@settings(deadline=None, max_examples=10)
@given(height=st.integers(11, 40), width=st.integers(11, 40), noise=st.floats(0.05, 1), seed=st.integers(0, 99))
def test_ssim_agrees_with_skimage_on_reflected_borders(height, width, noise, seed):
    # skimage leaves out windows across the border; after reflecting by half a window it has the same ones.
    pixels, target = make_pair(height, width, noise=noise, seed=seed)
    for value, one, other in zip(ssim(pixels, target), pixels, target, strict=True):
        arrays = [np.pad(to_8bit_array(p), ((5, 5), (5, 5), (0, 0)), "reflect") for p in (one, other)]
        assert value.item() == pytest.approx(skimage_ssim(*arrays), abs=1e-4)


def test_ssim_is_near_skimage_with_its_own_borders():
    pixels, target = make_pair(height=96, width=128, batch_size=1, noise=0.3)
    expected = skimage_ssim(to_8bit_array(pixels[0]), to_8bit_array(target[0]))
    assert ssim(pixels, target).item() == pytest.approx(expected, abs=5e-3)


def test_identical_pictures_are_perfect():
    _, target = make_pair()
    assert psnr(target, target).tolist() == [math.inf, math.inf]
    assert ssim(target, target).tolist() == pytest.approx([1, 1])


def test_black_against_white_is_zero_decibel():
    white = torch.ones(1, 3, 5, 7)
    assert mean_squared_error(-white, white).item() == 1
    assert psnr(-white, white).item() == 0


def test_differences_below_half_a_step_and_overshoot_do_not_count():
    target = torch.full((1, 3, 12, 15), 1.0)
    assert psnr(target + 0.5, target).item() == math.inf
    assert psnr(target - 0.9 / 255, target).item() == math.inf
    assert psnr(target - 1.1 / 255, target).item() == pytest.approx(20 * math.log10(255))


@pytest.mark.parametrize("metric", [mean_squared_error, psnr, ssim])
def test_metrics_are_per_picture_symmetric_and_take_half_precision(metric):
    pixels, target = make_pair(batch_size=3, noise=0.3)
    pixels = pixels.clamp(-1, 1)
    values = metric(pixels, target)
    assert values.shape == (3,)
    for i in range(3):
        torch.testing.assert_close(metric(pixels[i : i + 1], target[i : i + 1])[0], values[i])
    torch.testing.assert_close(metric(target, pixels), values)
    assert metric(pixels.bfloat16(), target).dtype == torch.float32
    assert not metric(pixels.requires_grad_(), target).requires_grad


@pytest.mark.parametrize(("height", "width"), [(10, 30), (30, 10), (1, 1)])
def test_ssim_is_nan_below_its_window(height, width):
    assert ssim(*make_pair(height, width)).isnan().tolist() == [True, True]


def test_ssim_is_defined_from_its_window_on():
    assert not ssim(*make_pair(11, 11)).isnan().any()


def test_pooled_psnr_averages_errors_not_decibels():
    assert pooled_psnr([0.01, 0.03]) == pytest.approx(-10 * math.log10(0.02))
    assert pooled_psnr(torch.tensor([0.01, 0.03])) == pytest.approx(-10 * math.log10(0.02))
    assert pooled_psnr([0.0, 0.0]) == math.inf


@pytest.mark.parametrize("errors", [[], [0.1, -0.1], [0.1, math.nan], [math.nan]])
def test_pooled_psnr_refuses_what_is_no_error(errors):
    with pytest.raises(ValueError, match="at least one error"):
        pooled_psnr(errors)


def test_pooled_psnr_is_at_most_the_mean():
    metrics = ReconstructionMetrics()
    for noise in (0.05, 0.5):
        metrics.update(*make_pair(noise=noise))
    result = metrics.compute()
    assert result["psnr_pooled"] < result["psnr"]


@pytest.mark.parametrize("split", [1, 2, 4])
def test_batching_does_not_change_the_result(split):
    pixels, target = make_pair(batch_size=4, noise=0.3)
    metrics = ReconstructionMetrics()
    for batch in zip(pixels.split(split), target.split(split), strict=True):
        metrics.update(*batch)
    assert metrics.compute() == pytest.approx(
        {
            "psnr": psnr(pixels, target).mean().item(),
            "psnr_pooled": pooled_psnr(mean_squared_error(pixels, target)),
            "ssim": ssim(pixels, target).mean().item(),
            "num_images": 4,
        }
    )


def test_update_returns_the_metrics_of_every_picture():
    pixels, target = make_pair()
    results = ReconstructionMetrics().update(pixels, target)
    assert [result["psnr"] for result in results] == psnr(pixels, target).tolist()
    assert [result["ssim"] for result in results] == ssim(pixels, target).tolist()
    assert [result["mean_squared_error"] for result in results] == mean_squared_error(pixels, target).tolist()


def test_pooling_weighs_pictures_by_their_pixels_and_ssim_skips_small_ones():
    metrics = ReconstructionMetrics()
    large, small = torch.ones(1, 3, 12, 20), torch.ones(1, 3, 5, 8)
    metrics.update(large, large)
    metrics.update(-small, small)
    result = metrics.compute()
    assert result["psnr_pooled"] == pytest.approx(-10 * math.log10(40 / 280))
    assert result["psnr"] == math.inf
    assert result["ssim"] == pytest.approx(1)
    assert result["num_images"] == 2


def test_without_a_picture_large_enough_ssim_is_nan():
    metrics = ReconstructionMetrics()
    metrics.update(*make_pair(10, 12))
    assert math.isnan(metrics.compute()["ssim"])


def test_merging_and_restoring_equal_one_pass():
    pairs = [make_pair(20, 30, seed=1), make_pair(15, 12, seed=2)]
    whole, first, second = ReconstructionMetrics(), ReconstructionMetrics(), ReconstructionMetrics()
    for pair, part in zip(pairs, (first, second), strict=True):
        whole.update(*pair)
        part.update(*pair)
    first.merge(ReconstructionMetrics(**dataclasses.asdict(second)))
    assert first.compute() == pytest.approx(whole.compute())
    assert second.num_images == 2


def test_nothing_seen_is_an_error():
    with pytest.raises(ValueError, match="num_images=0"):
        ReconstructionMetrics().compute()


@pytest.mark.parametrize("metric", [mean_squared_error, psnr, ssim, ReconstructionMetrics().update])
@pytest.mark.parametrize(
    ("pixels", "target", "message"),
    [
        (torch.zeros(1, 3, 12, 14), torch.zeros(1, 3, 14, 12), r"\(1, 3, 12, 14\).*\(1, 3, 14, 12\) differ"),
        (torch.zeros(3, 12, 14), torch.zeros(3, 12, 14), r"\(3, 12, 14\); expected"),
        (torch.zeros(1, 1, 12, 14), torch.zeros(1, 1, 12, 14), r"\(1, 1, 12, 14\); expected"),
        (torch.zeros(0, 3, 12, 14), torch.zeros(0, 3, 12, 14), r"\(0, 3, 12, 14\); expected"),
        (torch.zeros(1, 3, 12, 14), torch.full((1, 3, 12, 14), 1.5), r"\[1.5, 1.5\], not in \[-1, 1\]"),
        (torch.zeros(1, 3, 12, 14), torch.full((1, 3, 12, 14), math.nan), "target has values"),
        (torch.full((1, 3, 12, 14), math.nan), torch.zeros(1, 3, 12, 14), "pixels contain NaN"),
        (torch.zeros(1, 3, 12, 14, dtype=torch.uint8), torch.zeros(1, 3, 12, 14), "pixels have dtype torch.uint8"),
    ],
)
def test_wrong_input_is_named(metric, pixels, target, message):
    with pytest.raises(ValueError, match=message):
        metric(pixels, target)


# LPIPS


@pytest.fixture(scope="module")
def lpips() -> LPIPS:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LPIPS("squeeze")


def test_lpips_is_averaged_under_the_name_of_its_net(lpips):
    pixels, target = make_pair(20, 30, batch_size=3, noise=0.3)
    plain, metrics = ReconstructionMetrics(), ReconstructionMetrics()
    plain.update(pixels, target)
    results = metrics.update(pixels[:2], target[:2], lpips) + metrics.update(pixels[2:], target[2:], lpips)
    saved = [((p * 0.5 + 0.5).clamp(0, 1) * 255).round() / 127.5 - 1 for p in (pixels, target)]
    expected = lpips(*saved)
    assert [result["lpips_squeeze"] for result in results] == pytest.approx(expected.tolist(), rel=1e-4)
    assert (lpips(pixels, target) - expected).abs().min() > 1e-4 * expected.abs().max()  # rounding and clamping count
    summary = metrics.compute()
    assert summary.pop("lpips_squeeze") == pytest.approx(expected.mean().item(), rel=1e-4)
    assert summary == pytest.approx(plain.compute())
    assert "lpips_squeeze" not in plain.compute()


def test_lpips_survives_merging_and_restoring(lpips):
    pairs = [make_pair(20, 30, seed=1), make_pair(25, 18, seed=2)]
    whole, first, second = ReconstructionMetrics(), ReconstructionMetrics(), ReconstructionMetrics()
    for pair, part in zip(pairs, (first, second), strict=True):
        whole.update(*pair, lpips=lpips)
        part.update(*pair, lpips=lpips)
    merged = ReconstructionMetrics()
    merged.merge(first)
    merged.merge(ReconstructionMetrics(**json.loads(json.dumps(dataclasses.asdict(second)))))
    assert merged.compute() == pytest.approx(whole.compute())


def test_lpips_skips_pictures_that_are_too_small(lpips):
    metrics = ReconstructionMetrics()
    (result,) = metrics.update(*make_pair(16, 30, batch_size=1), lpips=lpips)
    assert math.isnan(result["lpips_squeeze"]) and math.isnan(metrics.compute()["lpips_squeeze"])
    pixels, target = make_pair(17, 30, batch_size=1)
    (result,) = metrics.update(pixels, target, lpips=lpips)
    assert metrics.compute()["lpips_squeeze"] == result["lpips_squeeze"]


def test_lpips_of_different_nets_is_not_mixed(lpips):
    one, other = ReconstructionMetrics(lpips_net="alex"), ReconstructionMetrics(lpips_net="vgg")
    with pytest.raises(ValueError, match="net='squeeze' cannot be averaged with that of net='alex'"):
        one.update(*make_pair(20, 30), lpips=lpips)
    with pytest.raises(ValueError, match="net='vgg' cannot be averaged with that of net='alex'"):
        one.merge(other)
    assert one.num_images == 0


# FID


class ColorFeatures(torch.nn.Module):
    """Mean and spread of each colour, in units of the full range."""

    num_features = 6

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        values = images.double().flatten(2) / 255
        return torch.cat([values.mean(2), values.std(2)], dim=1)


def picture_sets():
    real = [random_pixels(4, 3, 20, 24, seed=1), random_pixels(3, 3, 30, 16, seed=2)]
    return real, [random_pixels(5, 3, 18, 18, seed=3) * 1.2 + 0.3]


def test_fid_has_its_closed_form():
    real, fake = picture_sets()
    moments = []
    for batches in (real, fake):
        rounded = [((p * 0.5 + 0.5).clamp(0, 1) * 255).round() for p in batches]
        features = np.concatenate([ColorFeatures()(p).numpy() for p in rounded])
        moments.append((features.mean(0), np.cov(features, rowvar=False)))
    (mean, covariance), (other_mean, other_covariance) = moments
    root = scipy.linalg.sqrtm(covariance @ other_covariance).real
    expected = ((mean - other_mean) ** 2).sum() + np.trace(covariance + other_covariance - 2 * root)
    assert fid(ColorFeatures(), real, fake) == pytest.approx(expected, rel=1e-4)
    assert expected > 0.01


def test_fid_is_zero_for_equal_sets_symmetric_and_does_not_see_batches():
    real, fake = picture_sets()
    assert fid(ColorFeatures(), real, reversed(real)) == pytest.approx(0, abs=1e-7)
    forth = fid(ColorFeatures(), real, fake)
    assert fid(ColorFeatures(), iter(fake), iter(real)) == pytest.approx(forth, rel=1e-5)
    assert fid(ColorFeatures(), [p[None] for batch in real for p in batch], fake) == pytest.approx(forth, rel=1e-6)


def test_fid_names_what_is_wrong():
    real, fake = picture_sets()
    with pytest.raises(ValueError, match="fake_batches hold 1 pictures; expected at least 2"):
        fid(ColorFeatures(), real, [fake[0][:1]])
    with pytest.raises(ValueError, match="real_batches hold 0 pictures"):
        fid(ColorFeatures(), [], fake)
    with pytest.raises(ValueError, match="torch.uint8 of shape"):
        fid(ColorFeatures(), real, [torch.zeros(2, 3, 8, 8, dtype=torch.uint8)])
    with pytest.raises(ValueError, match="NaN"):
        fid(ColorFeatures(), real, [fake[0] * math.nan])
