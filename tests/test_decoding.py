"""Filters, draws and guidance obey their laws."""

import math

import pytest
import torch

from dinotok.decoding import draw, guidance_at, guide, index_probabilities, uniform_noise


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.randn(6, 33, generator=torch.Generator().manual_seed(0)) * 2


def test_without_filters_it_is_a_softmax(logits):
    torch.testing.assert_close(index_probabilities(logits), logits.softmax(-1))
    torch.testing.assert_close(index_probabilities(logits, top_k=33), logits.softmax(-1))
    torch.testing.assert_close(index_probabilities(logits, top_k=100), logits.softmax(-1))


@pytest.mark.parametrize("temperature", [0.0, 1e-4])
def test_temperature_zero_is_the_most_likely_index(logits, temperature):
    expected = torch.nn.functional.one_hot(logits.argmax(-1), 33).float()
    torch.testing.assert_close(index_probabilities(logits, temperature), expected)


@pytest.mark.parametrize("top_k", [1, 5, 32])
def test_top_k_keeps_the_k_most_likely_in_their_proportions(logits, top_k):
    probabilities = index_probabilities(logits, temperature=0.7, top_k=top_k)
    assert ((probabilities > 0).sum(-1) == top_k).all()
    for row, scores in zip(probabilities, logits, strict=True):
        kept = scores.topk(top_k).indices
        torch.testing.assert_close(row[kept], (scores[kept] / 0.7).softmax(0))


@pytest.mark.parametrize("top_p", [0.01, 0.5, 0.9])
def test_top_p_keeps_the_fewest_codes_with_that_probability(logits, top_p):
    full = logits.softmax(-1)
    for row, original in zip(index_probabilities(logits, top_p=top_p), full, strict=True):
        kept = row > 0
        assert original[kept].sum() >= top_p - 1e-6
        assert original[kept].sum() - original[kept].min() < top_p
        assert original[kept].min() >= original[~kept].max()
        torch.testing.assert_close(row[kept], original[kept] / original[kept].sum())


def test_top_p_sees_what_top_k_left(logits):
    first = index_probabilities(logits, top_k=4)
    torch.testing.assert_close(
        index_probabilities(logits, top_k=4, top_p=0.8), index_probabilities(first.log(), top_p=0.8)
    )


@pytest.mark.parametrize(
    "values", [{"temperature": -1}, {"temperature": math.nan}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}]
)
def test_parameters_out_of_range_are_refused(logits, values):
    with pytest.raises(ValueError, match=next(iter(values))):
        index_probabilities(logits, **values)


def test_draws_follow_the_probabilities():
    probabilities = torch.tensor([0.0, 0.5, 0.0, 0.3, 0.2, 0.0])
    uniforms = (torch.arange(1000) + 0.5) / 1000
    counts = draw(probabilities.expand(1000, -1), uniforms).flatten().bincount(minlength=6)
    torch.testing.assert_close(counts / 1000, probabilities, atol=0.002, rtol=0)


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-24])
def test_the_ends_of_the_unit_interval_draw_no_impossible_index(uniform):
    probabilities = torch.tensor([[0.0, 1e-9, 0.0], [0.0, 0.3, 0.0]])
    assert draw(probabilities, torch.full((2,), uniform)).tolist() == [[1], [1]]


def test_a_generator_for_each_sample_makes_batches_equal_singles():
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    batch = uniform_noise(2, 7, generators)
    singles = [uniform_noise(1, 7, torch.Generator().manual_seed(seed)) for seed in (3, 4)]
    assert torch.equal(batch, torch.cat(singles))
    with pytest.raises(ValueError, match="2 generators for 3 samples"):
        uniform_noise(3, 7, generators)


def test_guidance_of_one_is_the_conditional_half(logits):
    torch.testing.assert_close(guide(logits, 1.0), logits[:3])
    torch.testing.assert_close(guide(logits, 0.0), logits[3:])
    torch.testing.assert_close(guide(logits, 3.0) - logits[3:], 3 * (logits[:3] - logits[3:]))


@pytest.mark.parametrize("power", [0.5, 1.0, 2.75])
def test_a_rising_schedule_starts_at_one_and_tends_to_the_scale(power):
    scales = [guidance_at(step / 256, 16.0, "rising", power) for step in range(257)]
    assert scales[0] == 1
    assert scales == sorted(scales)
    assert scales[-1] == pytest.approx(16)
    assert guidance_at(0.5 ** (1 / power), 16.0, "rising", power) == pytest.approx(8.5)  # cos(pi / 2) = 0
    assert {guidance_at(step / 256, 16.0) for step in range(256)} == {16.0}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((2.0, "falling"), "guidance_schedule='falling' is none of constant, rising"),
        ((-1.0,), "guidance_scale=-1.0"),
        ((math.inf,), "guidance_scale=inf"),
        ((2.0, "rising", 0.0), "guidance_power=0.0"),
    ],
)
def test_guidance_out_of_range_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        guidance_at(0.5, *values)
