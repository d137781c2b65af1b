"""Laws of the quantizers: what is looked up, what is learned, and what stays equal across dtypes and processes."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from dinotok.models.finite_scalar_quantizer import FiniteScalarQuantizer
from dinotok.models.quantizers import CodeCounter, DominantSubspaceQuantizer, VectorQuantizer, broadcast_state
from dinotok.statistics import StreamingMoments

CHANNELS, SIZE = 6, 24
VARIANTS = {
    "dsq": {"rank": 3},
    "reweighted": {"eigenvalue_power": 0.25},
    "plain": {},
    "cosine": {"rank": 4, "cosine": True},
}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_rows(count: int, seed: int = 0) -> torch.Tensor:
    """Rows of unequal variances in no axis-parallel basis, far from zero."""
    mixing = torch.linalg.qr(torch.randn(CHANNELS, CHANNELS, generator=generator(99)))[0]
    scales = torch.tensor([4.0, 3.0, 2.0, 1.0, 0.5, 0.25])
    return torch.randn(count, CHANNELS, generator=generator(seed)) * scales @ mixing.T + 5


def to_grid(rows: torch.Tensor, width: int = 5) -> torch.Tensor:
    return rows.view(2, -1, width, CHANNELS).permute(0, 3, 1, 2)


def to_rows(grid: torch.Tensor) -> torch.Tensor:
    return grid.permute(0, 2, 3, 1).flatten(0, 2)


def subspace_quantizer(rows: torch.Tensor | None = None, **options) -> DominantSubspaceQuantizer:
    rows = random_rows(400) if rows is None else rows
    quantizer = DominantSubspaceQuantizer(CHANNELS, SIZE, **options)
    quantizer.set_pca(StreamingMoments(CHANNELS).update(rows).pca(), len(rows), "ab" * 32)
    return quantizer.fit(rows, generator())


def vector_quantizer(**options) -> VectorQuantizer:
    return VectorQuantizer(SIZE, CHANNELS, **options).fit(random_rows(400), generator())


def every_quantizer():
    yield from (subspace_quantizer(**options) for options in VARIANTS.values())
    yield from (vector_quantizer(), vector_quantizer(normalize=True))


# --------------------------------------------------------------------------------------------------- codes and indices


def test_quantized_latents_are_those_of_the_indices_with_and_without_gradients():
    for quantizer in every_quantizer():
        latents = to_grid(random_rows(60, 1)).requires_grad_()
        output = quantizer(latents)
        assert output.indices.shape == (2, 6, 5) and output.indices.dtype == torch.int64
        assert torch.equal(output.latents, quantizer.indices_to_latents(output.indices))
        with torch.no_grad():
            assert torch.equal(quantizer(latents).latents, output.latents)
        half = latents.detach().bfloat16()
        output = quantizer(half)
        assert output.latents.dtype == torch.bfloat16 and output.loss.dtype == torch.float32
        assert torch.equal(output.latents, quantizer.indices_to_latents(output.indices).bfloat16())


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_subspace_look_up_is_its_formula(options):
    quantizer, rows = subspace_quantizer(**options), random_rows(60, 1)
    output = quantizer(to_grid(rows))
    rank, power = options.get("rank", CHANNELS), options.get("eigenvalue_power", 0.0)
    mean, basis = quantizer.mean.double(), quantizer.components.double()
    y, codes = (rows.double() - mean) @ basis, quantizer.codebook.double()
    weights = quantizer.eigenvalues[:rank].double() ** (2 * power)
    costs = (weights * (y[:, None] - codes).square()).sum(-1)
    if options.get("cosine"):
        costs = -F.cosine_similarity(y[:, None], codes, dim=-1)
    expected = costs.argmin(1)
    assert torch.equal(output.indices.flatten(), expected)
    torch.testing.assert_close(
        to_rows(output.latents).double(), mean + codes[expected] @ basis.T, rtol=1e-5, atol=1e-5
    )
    weights /= weights.mean()
    assert output.loss.item() == pytest.approx((weights * (y - codes[expected]).square()).mean().item(), rel=1e-5)
    torch.testing.assert_close(quantizer.weights.mean(), torch.tensor(1.0))


def test_permuting_the_codebook_permutes_the_indices():
    latents, order = to_grid(random_rows(60, 1)), torch.randperm(SIZE, generator=generator(3))
    for quantizer in every_quantizer():
        before = quantizer(latents)
        with torch.no_grad():
            quantizer.codebook.copy_(quantizer.codebook[order].clone())
        after = quantizer(latents)
        assert torch.equal(order[after.indices], before.indices)
        torch.testing.assert_close(after.latents, before.latents)


def test_full_rank_is_plain_vector_quantization_in_a_rotated_basis():
    rows = random_rows(60, 1)
    subspace, plain = subspace_quantizer(), VectorQuantizer(SIZE, CHANNELS)
    plain.codebook.data.copy_(subspace.lift(subspace.codebook))
    ours, expected = subspace(to_grid(rows)), plain(to_grid(rows))
    assert torch.equal(ours.indices, expected.indices)
    torch.testing.assert_close(ours.latents, expected.latents)
    torch.testing.assert_close(ours.loss, expected.commitment_loss)


def test_low_rank_ignores_what_lies_outside_the_subspace():
    quantizer, rows = subspace_quantizer(rank=3), random_rows(60, 1)
    outside = torch.eye(CHANNELS) - quantizer.components @ quantizer.components.T
    moved = rows + 10 * torch.randn(60, CHANNELS, generator=generator(4)) @ outside
    before, after = quantizer(to_grid(rows)), quantizer(to_grid(moved))
    assert torch.equal(before.indices, after.indices)
    codes = to_rows(after.latents) - quantizer.mean
    torch.testing.assert_close(codes @ outside, torch.zeros(60, CHANNELS), rtol=0, atol=1e-5)


def test_eigenvalue_power_is_a_scaling_of_the_coordinates():
    power, rows = 0.25, random_rows(200, 1)
    weighted, plain = subspace_quantizer(eigenvalue_power=power), subspace_quantizer()
    scales = plain.eigenvalues**power
    plain.components.mul_(scales)  # y_i lambda_i^a
    plain.codebook.copy_(weighted.codebook * scales)
    unweighted = subspace_quantizer()
    unweighted.codebook.copy_(weighted.codebook)
    expected = plain(to_grid(rows)).indices
    assert torch.equal(weighted(to_grid(rows)).indices, expected)
    assert not torch.equal(unweighted(to_grid(rows)).indices, expected)


def test_a_fixed_point_has_no_loss():
    for quantizer in every_quantizer():
        codes = quantizer.indices_to_latents(torch.arange(SIZE).view(2, 3, 4))
        output = quantizer(codes)
        assert torch.equal(output.indices, torch.arange(SIZE).view(2, 3, 4))
        assert output.loss.item() < 1e-9
        torch.testing.assert_close(output.latents, codes)


def test_code_distances_are_least_at_the_chosen_code():
    latents = to_grid(random_rows(60, 1))
    for quantizer in every_quantizer():
        chosen = quantizer(latents).indices
        least = quantizer.code_distances(latents, chosen)
        others = [quantizer.code_distances(latents, torch.full_like(chosen, code)) for code in range(SIZE)]
        torch.testing.assert_close(torch.stack(others).amin(0), least, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.uint16])
def test_indices_of_any_integer_type(dtype):
    indices = torch.randint(SIZE, (2, 6, 5), generator=generator())
    for quantizer in every_quantizer():
        assert torch.equal(quantizer.indices_to_latents(indices.to(dtype)), quantizer.indices_to_latents(indices))


# ----------------------------------------------------------------------------------------------------------- gradients


def test_the_gradient_goes_straight_through():
    for quantizer in every_quantizer():
        if getattr(quantizer, "normalize", False):
            continue
        latents = to_grid(random_rows(60, 1)).requires_grad_()
        upstream = torch.randn(latents.shape, generator=generator(5))
        (gradient,) = torch.autograd.grad((quantizer(latents).latents * upstream).sum(), latents)
        assert torch.equal(gradient, upstream)


def test_the_gradient_goes_straight_through_to_normalised_latents():
    quantizer = vector_quantizer(normalize=True)
    latents = to_grid(random_rows(60, 1)).requires_grad_()
    upstream = torch.randn(latents.shape, generator=generator(5))
    (ours,) = torch.autograd.grad((quantizer(latents).latents * upstream).sum(), latents)
    (expected,) = torch.autograd.grad((F.normalize(latents, dim=1) * upstream).sum(), latents)
    torch.testing.assert_close(ours, expected)


def test_losses_pull_codes_to_latents_and_latents_to_codes():
    """d/dc mean (c - x)^2 = 2 (c - x) / (N D), summed over the latents of a code; the other loss the reverse."""
    quantizer, rows = vector_quantizer(commitment_weight=0.3), random_rows(60, 1)
    latents = to_grid(rows).requires_grad_()
    output = quantizer(latents)
    output.loss.backward()
    indices, codes = output.indices.flatten(), quantizer.codebook.detach()
    difference = 2 * (codes[indices] - rows) / rows.numel()
    expected = torch.zeros(SIZE, CHANNELS).index_add_(0, indices, difference)
    torch.testing.assert_close(quantizer.codebook.grad, expected)
    torch.testing.assert_close(to_rows(latents.grad), -0.3 * difference)
    assert output.codebook_loss.item() == pytest.approx((codes[indices] - rows).square().mean().item(), rel=1e-5)
    assert output.commitment_loss.item() == output.codebook_loss.item()
    assert output.loss.item() == pytest.approx(1.3 * output.codebook_loss.item())


def test_subspace_loss_reaches_the_latents_only():
    quantizer, rows = subspace_quantizer(rank=3), random_rows(60, 1)
    latents = to_grid(rows).requires_grad_()
    output = quantizer(latents)
    output.loss.backward()
    projected = (rows - quantizer.mean) @ quantizer.components
    expected = 2 * (projected - quantizer.codebook[output.indices.flatten()]) / projected.numel()
    torch.testing.assert_close(to_rows(latents.grad), expected @ quantizer.components.T)
    assert not list(quantizer.parameters())


def test_normalised_quantizer_sees_directions_only():
    quantizer = vector_quantizer(normalize=True)
    latents = to_grid(random_rows(60, 1))
    output = quantizer(latents)
    torch.testing.assert_close(output.latents.norm(dim=1), torch.ones(2, 6, 5))
    assert torch.equal(quantizer(7 * latents).indices, output.indices)
    with torch.no_grad():
        quantizer.codebook.mul_(torch.rand(SIZE, 1, generator=generator()) + 0.5)
    assert torch.equal(quantizer(latents).indices, output.indices)
    torch.testing.assert_close(quantizer(latents).loss, output.loss)


def test_entropy_term_is_its_formula_and_reaches_its_extremes():
    codebook = 100 * torch.eye(4, CHANNELS)

    def entropy_loss(rows: torch.Tensor, temperature: float) -> torch.Tensor:
        quantizer = VectorQuantizer(4, CHANNELS, 0.25, entropy_weight=1.0, entropy_temperature=temperature)
        quantizer.codebook.data.copy_(codebook)
        plain = VectorQuantizer(4, CHANNELS, 0.25)
        plain.codebook.data.copy_(codebook)
        grid = rows[:, :, None, None].requires_grad_()
        loss = quantizer(grid).loss - plain(grid).loss
        assert torch.isfinite(torch.autograd.grad(loss, grid)[0]).all()
        return loss.detach()

    assert entropy_loss(codebook.clone(), 1.0).item() == pytest.approx(-math.log(4), abs=1e-3)  # all, each surely
    assert entropy_loss(codebook[:1].repeat(4, 1), 1.0).item() == pytest.approx(0, abs=1e-3)  # one, surely
    assert entropy_loss(torch.zeros(4, CHANNELS), 1.0).item() == pytest.approx(0, abs=1e-3)  # all, each equally
    rows = random_rows(30, 1)
    p = (-(rows[:, None] - codebook).square().sum(-1).double() / 500).softmax(-1)
    expected = torch.special.entr(p).sum(-1).mean() - torch.special.entr(p.mean(0)).sum()
    assert -math.log(4) < expected < -0.1
    assert entropy_loss(rows, 500.0).item() == pytest.approx(expected.item(), rel=0.05)


def test_training_the_codebook_lowers_the_error():
    torch.manual_seed(0)
    quantizer, latents = VectorQuantizer(SIZE, CHANNELS), to_grid(random_rows(400))
    optimizer = torch.optim.Adam(quantizer.parameters(), 0.3)
    losses = []
    for _ in range(30):
        loss = quantizer(latents).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


# ----------------------------------------------------------------------------------------- moving averages, dead codes


def test_update_is_the_moving_average_of_counts_and_sums():
    decay, rows = 0.9, random_rows(60, 1)
    quantizer = subspace_quantizer(rank=3, ema_decay=decay, dead_code_threshold=0.0)
    counts, sums = quantizer.code_counts.double(), quantizer.code_sums.double()
    projected, indices = quantizer.project(rows), quantizer(to_grid(rows)).indices.flatten()
    for code in range(SIZE):
        mine = projected[indices == code].double()
        counts[code] = decay * counts[code] + (1 - decay) * len(mine) * SIZE / 60
        sums[code] = decay * sums[code] + (1 - decay) * mine.sum(0) * SIZE / 60
    assert quantizer.update_codebook(to_grid(rows)) == 0
    torch.testing.assert_close(quantizer.code_counts.double(), counts, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(quantizer.code_sums.double(), sums, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(quantizer.codebook.double(), sums / counts[:, None], rtol=1e-4, atol=1e-5)
    assert quantizer.num_updates == 1


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_a_fitted_codebook_is_stationary_under_updates_on_the_same_tokens(options):
    rows = random_rows(400)
    quantizer = DominantSubspaceQuantizer(CHANNELS, SIZE, **options)
    quantizer.set_pca(StreamingMoments(CHANNELS).update(rows).pca(), 400)
    quantizer.fit(rows, generator(), num_iterations=200)
    before = {key: value.clone() for key, value in quantizer.state_dict().items()}
    assert all(quantizer.update_codebook(to_grid(rows)) == 0 for _ in range(30))
    torch.testing.assert_close(quantizer.codebook, before["codebook"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(quantizer.code_counts, before["code_counts"], rtol=1e-4, atol=1e-5)
    assert quantizer.code_counts.mean().item() == pytest.approx(1)


def test_a_fitted_codebook_survives_batches_with_fewer_tokens_than_codes():
    rows = random_rows(2000)
    quantizer = subspace_quantizer(rows)
    error = quantizer(to_grid(rows)).loss
    moved = 0
    for step in range(400):
        choice = torch.randint(2000, (10,), generator=generator(step))
        moved += quantizer.update_codebook(to_grid(rows[choice]))
    assert moved <= 2
    assert quantizer(to_grid(rows)).loss < 1.1 * error


def test_updates_follow_tokens_that_move():
    rows = random_rows(400)
    quantizer = subspace_quantizer(ema_decay=0.9)
    for _ in range(60):
        quantizer.update_codebook(to_grid(rows + 2))
    fitted = subspace_quantizer(rows + 2)
    assert quantizer(to_grid(rows + 2)).loss < 1.1 * fitted(to_grid(rows + 2)).loss


def test_dead_codes_are_moved_to_current_tokens_and_start_anew():
    rows = random_rows(400)
    quantizer = subspace_quantizer(ema_decay=0.5)
    quantizer.codebook[:6] = 1e3
    quantizer.code_sums[:6] = 1e3 * quantizer.code_counts[:6, None]
    moved = [quantizer.update_codebook(to_grid(rows)) for _ in range(4)]
    before = quantizer.code_counts.clone()
    assert moved[:3] == [0, 0, 0]
    while not moved[-1]:
        before = quantizer.code_counts.clone()
        moved.append(quantizer.update_codebook(to_grid(rows)))
    revived = before * 0.5 < quantizer.dead_code_threshold
    assert moved[-1] == revived.sum() > 0
    projected = quantizer.project(rows)
    assert ((quantizer.codebook[revived][:, None] - projected).abs().amax(-1).amin(1) == 0).all()
    assert len(quantizer.codebook[revived].unique(dim=0)) == moved[-1]
    assert (quantizer.code_counts[revived] == 1).all()
    assert torch.equal(quantizer.code_sums[revived], quantizer.codebook[revived])


def test_reviving_raises_the_usage():
    rows = random_rows(400)
    usages = []
    for threshold in (0.0, 0.03):
        quantizer = subspace_quantizer(ema_decay=0.8, dead_code_threshold=threshold)
        quantizer.codebook.mul_(0.01).add_(50 * torch.eye(SIZE, CHANNELS))  # nearly all codes are far away
        quantizer.code_counts.fill_(1)
        quantizer.code_sums.copy_(quantizer.codebook)
        for _ in range(60):
            quantizer.update_codebook(to_grid(rows))
        usages.append(CodeCounter(SIZE).update(quantizer(to_grid(rows)).indices).compute().usage)
    assert usages[0] < 0.95 < usages[1]


def test_codes_without_tokens_stay_where_they_are_if_none_are_revived():
    rows = random_rows(40)
    quantizer = subspace_quantizer(ema_decay=0.1, dead_code_threshold=0.0)
    quantizer.codebook[0] = 1e3
    quantizer.code_sums[0] = 1e3 * quantizer.code_counts[0]
    for _ in range(60):  # 0.1 ** 60 is no float32
        quantizer.update_codebook(to_grid(rows))
    torch.testing.assert_close(quantizer.codebook[0], torch.full((CHANNELS,), 1e3))
    assert torch.isfinite(quantizer.codebook).all()


def test_fewer_tokens_than_dead_codes_revive_what_they_can():
    quantizer = subspace_quantizer(ema_decay=0.5)
    quantizer.code_counts.fill_(1e-3)
    quantizer.code_sums.copy_(quantizer.codebook * 1e-3)
    assert quantizer.update_codebook(to_grid(random_rows(10, 1))) == 10


def test_every_update_draws_other_tokens():
    quantizer, drawn = subspace_quantizer(), []
    for _ in range(2):
        quantizer.code_counts.fill_(1e-3)
        quantizer.code_sums.copy_(quantizer.codebook * 1e-3)
        quantizer.update_codebook(to_grid(random_rows(400)))
        drawn.append({tuple(code) for code in quantizer.codebook[quantizer.code_counts == 1].tolist()})
    assert len(drawn[0] & drawn[1]) < 5 < min(map(len, drawn))


def test_resumed_updates_equal_straight_ones():
    batches = [to_grid(random_rows(60, seed)) for seed in range(1, 9)]
    options = {"rank": 3, "ema_decay": 0.6, "dead_code_threshold": 0.3}
    straight = subspace_quantizer(**options)
    moved = [straight.update_codebook(batch) for batch in batches[:4]]
    resumed = DominantSubspaceQuantizer(CHANNELS, SIZE, **options)
    resumed.load_state_dict(straight.state_dict())
    moved += [straight.update_codebook(batch) for batch in batches[4:]]
    assert [resumed.update_codebook(batch) for batch in batches[4:]] == moved[4:]
    assert sum(moved[4:]) > 0
    for key, value in straight.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key


# ----------------------------------------------------------------------------------------------------------------- fit


def test_fit_finds_separated_clusters_and_uses_every_code():
    centres = 20 * torch.randn(SIZE, CHANNELS, generator=generator(6))
    rows = centres.repeat(20, 1) + 0.01 * torch.randn(20 * SIZE, CHANNELS, generator=generator(7))
    subspace = subspace_quantizer(rows).fit(rows, generator(), plus_plus=True)
    codes = subspace.lift(subspace.codebook)
    torch.testing.assert_close(codes[torch.cdist(centres, codes).argmin(1)], centres, rtol=0, atol=0.05)
    for quantizer in (subspace, VectorQuantizer(SIZE, CHANNELS).fit(rows, generator())):
        assert CodeCounter(SIZE).update(quantizer(to_grid(rows, 4)).indices).compute().num_dead == 0


def test_fit_keeps_the_subspace_and_where_it_came_from():
    quantizer = subspace_quantizer(rank=3)
    pca = StreamingMoments(CHANNELS).update(random_rows(400)).pca()
    torch.testing.assert_close(quantizer.components, pca.components[:, :3].float())
    torch.testing.assert_close(quantizer.eigenvalues, pca.eigenvalues.float())
    assert quantizer.token_count == 400
    assert bytes(quantizer.encoder_digest.tolist()).hex() == "ab" * 32


# ----------------------------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_state_stays_float32(dtype):
    latents = to_grid(random_rows(60, 1))
    for quantizer in every_quantizer():
        indices = quantizer(latents).indices
        before = {key: value.clone() for key, value in quantizer.state_dict().items()}
        quantizer.to(dtype)
        for key, value in quantizer.state_dict().items():
            assert value.dtype == before[key].dtype and torch.equal(value, before[key]), key
        assert torch.equal(quantizer(latents).indices, indices)


def test_autocast_changes_nothing():
    latents, rows = to_grid(random_rows(60, 1)), random_rows(100, 2)
    for quantizer in (*every_quantizer(), vector_quantizer(entropy_weight=0.1)):
        expected = quantizer(latents)
        with torch.autocast("cpu", torch.bfloat16):
            output = quantizer(latents)
            codes = quantizer.indices_to_latents(output.indices)
        assert torch.equal(output.indices, expected.indices)
        assert torch.equal(output.latents, expected.latents) and torch.equal(codes, expected.latents)
        assert torch.equal(output.loss, expected.loss)
    states = []
    for enabled in (False, True):
        quantizer = subspace_quantizer(rank=3)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            quantizer.update_codebook(latents)
            quantizer.fit(rows, generator(8))
        states.append(quantizer.codebook)
    assert torch.equal(*states)


# ------------------------------------------------------------------------------------------------------------ counting


def test_usage_and_perplexity_over_a_whole_set_equal_naive_counts():
    batches = [torch.randint(0, 9, (2, 3, size), generator=generator(size)) for size in (1, 4, 7)]
    counter = CodeCounter(12)
    for batch in batches:
        counter.update(batch)
    usage = counter.compute()
    everything = torch.cat([batch.flatten() for batch in batches]).tolist()
    frequencies = [everything.count(code) / len(everything) for code in set(everything)]
    assert usage.num_tokens == len(everything) == 72
    assert (usage.codebook_size, usage.num_dead) == (12, 12 - len(frequencies))
    assert usage.usage == len(frequencies) / 12
    assert usage.perplexity == pytest.approx(math.exp(-sum(p * math.log(p) for p in frequencies)))
    uniform = CodeCounter(5).update(torch.arange(5)).compute()
    assert (uniform.usage, uniform.num_dead) == (1, 0) and uniform.perplexity == pytest.approx(5)
    assert CodeCounter(5).compute().num_dead == 5 and CodeCounter(5).compute().perplexity == 0


# ----------------------------------------------------------------------------------------------------------- processes


def half_dead_quantizer() -> DominantSubspaceQuantizer:
    quantizer = DominantSubspaceQuantizer(CHANNELS, 16, rank=4, ema_decay=0.6)
    codes = torch.randn(16, 4, generator=generator(1))
    codes[::2] += 50
    quantizer.codebook.copy_(codes)
    quantizer.code_sums.copy_(codes)
    return quantizer


def toy_batches() -> list[torch.Tensor]:
    return list(torch.randn(12, 5, CHANNELS, 3, 3, generator=generator(2)))


def _update_with_my_share(rank: int, address: str, folder: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    quantizer = half_dead_quantizer()
    moved = [quantizer.update_codebook(batch[:2] if rank == 0 else batch[2:]) for batch in toy_batches()]
    torch.save({**quantizer.state_dict(), "moved": torch.tensor(moved)}, folder / f"rank{rank}.pt")
    torch.manual_seed(rank)
    vectors = VectorQuantizer(3, 2)
    broadcast_state(vectors)
    torch.save(vectors.codebook, folder / f"vectors{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_end_with_the_codebook_of_one(tmp_path):
    torch.multiprocessing.spawn(_update_with_my_share, (f"file://{tmp_path / 'rendezvous'}", tmp_path), nprocs=2)
    states = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    one = half_dead_quantizer()
    moved = torch.tensor([one.update_codebook(batch) for batch in toy_batches()])
    assert torch.equal(states[0]["moved"], moved) and moved.sum() >= 8  # codes were revived on the way
    for key, value in one.state_dict().items():
        assert torch.equal(states[0][key], states[1][key]), key
        torch.testing.assert_close(states[0][key], value, rtol=1e-5, atol=1e-6)
    codebooks = [torch.load(tmp_path / f"vectors{rank}.pt") for rank in range(2)]
    assert torch.equal(*codebooks)


# -------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 7}, "rank=7 must lie between 1 and the 6"),
        ({"rank": 0}, "rank=0"),
        ({"eigenvalue_power": -0.1}, "eigenvalue_power=-0.1"),
        ({"ema_decay": 1.0}, "ema_decay=1.0"),
        ({"dead_code_threshold": 1.0}, "dead_code_threshold=1.0"),
        ({"codebook_size": 0}, "codebook_size=0"),
    ],
)
def test_numbers_out_of_range_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        DominantSubspaceQuantizer(**{"channels": 6, "codebook_size": 8, **options})
    with pytest.raises(ValueError, match="0 codes"):
        VectorQuantizer(0, 4)


def test_bad_latents_indices_and_rows_are_named():
    for quantizer in every_quantizer():
        with pytest.raises(ValueError, match=r"\(B, 6, h, w\), got \(2, 5, 3, 3\)"):
            quantizer(torch.zeros(2, 5, 3, 3))
        with pytest.raises(ValueError, match=r"\(B, 6, h, w\), got \(2, 6\)"):
            quantizer(torch.zeros(2, 6))
        for bad in (-1, SIZE):
            with pytest.raises(ValueError, match=rf"\[0, 24\), got \[{bad}, {bad}\]"):
                quantizer.indices_to_latents(torch.full((1, 1, 1), bad))
        with pytest.raises(ValueError, match="integers, got torch.float32"):
            quantizer.indices_to_latents(torch.zeros(1, 1, 1))
        with pytest.raises(ValueError, match="23 rows cannot fill 24 clusters"):
            quantizer.fit(random_rows(23), generator())
        with pytest.raises(ValueError, match=r"\(N, 6\), got \(30, 5\)"):
            quantizer.fit(torch.zeros(30, 5), generator())
    with pytest.raises(ValueError, match="over 3 channels, the quantizer over 6"):
        subspace_quantizer().set_pca(StreamingMoments(3).update(torch.randn(9, 3)).pca(), 9)
    with pytest.raises(ValueError, match=r"\[0, 4\), got \[0, 4\]"):
        CodeCounter(4).update(torch.tensor([0, 4]))


# ------------------------------------------------------------------------------------------ finite scalar quantization


@pytest.mark.parametrize("levels", [[8, 5, 5, 5], [2], [3, 2, 4]])
def test_finite_scalar_codes_are_a_grid_of_fixed_points(levels):
    quantizer = FiniteScalarQuantizer(levels)
    indices = torch.arange(math.prod(levels)).view(1, 1, -1)
    codes = quantizer.indices_to_latents(indices)
    assert quantizer.codebook_size == len(codes.flatten(2)[0].unique(dim=1)[0]) == math.prod(levels)
    for channel, count in enumerate(levels):
        steps = (torch.arange(count) - count // 2) / (count // 2)  # the paper's: -1 to 1, or to 1 - 2 / L if L is even
        torch.testing.assert_close(codes[0, channel].unique(), steps)
    latents = 2 * torch.randn(2, len(levels), 60, 100, generator=generator())
    output = quantizer(latents)
    assert torch.equal(output.latents, quantizer.indices_to_latents(output.indices))
    assert output.loss.item() == 0
    assert len(output.indices.unique()) > 0.95 * quantizer.codebook_size


def test_finite_scalar_latents_round_to_the_nearest_level_with_the_gradient_of_tanh():
    latents = torch.linspace(-3, 3, 41).view(1, 1, 1, -1).requires_grad_()
    output = FiniteScalarQuantizer([5])(latents)
    bounded = latents.tanh() * 2.002
    assert torch.equal(output.latents, bounded.round() / 2)
    (ours,) = torch.autograd.grad(output.latents.sum(), latents)
    (expected,) = torch.autograd.grad(bounded.sum() / 2, latents)
    torch.testing.assert_close(ours, expected)


def test_finite_scalar_errors_are_named():
    with pytest.raises(ValueError, match=r"levels=\[4, 1\]"):
        FiniteScalarQuantizer([4, 1])
    with pytest.raises(ValueError, match=r"\(B, 2, h, w\), got \(1, 3, 1, 1\)"):
        FiniteScalarQuantizer([4, 4])(torch.zeros(1, 3, 1, 1))
    with pytest.raises(ValueError, match=r"\[0, 16\)"):
        FiniteScalarQuantizer([4, 4]).indices_to_latents(torch.tensor([[[16]]]))


def test_a_codebook_of_directions_starts_on_the_sphere():
    """Else its first gradients, which pass through the normalisation, are larger by the inverse of a tiny norm."""
    codebook = VectorQuantizer(50, 6, normalize=True).codebook
    torch.testing.assert_close(codebook.norm(dim=1), torch.ones(50))
