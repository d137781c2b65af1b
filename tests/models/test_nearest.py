"""Laws of the exact nearest-code search."""

import inspect
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile

import dinotok.models.nearest
from dinotok.models.nearest import nearest_codes

MAX_BYTES = [1, 3_000, 50_000, 1_000_000, 2**25]


def costs(vectors, codebook, weights=None, cosine=False):
    """Float64 brute force, `(N, K)`."""
    x, c = vectors.double().numpy()[:, None], codebook.double().numpy()[None]
    w = 1.0 if weights is None else weights.double().numpy()
    if not cosine:
        return (w * (x - c) ** 2).sum(-1)
    norms = [np.sqrt((w * a**2).sum(-1)) for a in (x, c)]
    x_norm, c_norm = (np.where(norm > 0, norm, 1.0) for norm in norms)
    return -(w * x * c).sum(-1) / (x_norm * c_norm)


def assert_nearest(indices, table, tolerance=1e-12):
    """Each index has the least cost of its row, up to float64 rounding."""
    chosen = table[np.arange(len(table)), indices.numpy()]
    assert (chosen <= table.min(1) + tolerance * np.abs(table).max(initial=0.0)).all()


def ambiguous(seed=0, dim=24, offset=0.0):
    """A codebook of pairs one float32 step apart and exact copies, and vectors halfway between two codes."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(40, dim, generator=generator) + offset
    steps = base.clone()
    steps[:, 0] = torch.nextafter(base[:, 0], torch.tensor(math.inf))
    codebook = torch.cat([base, steps, base])[torch.randperm(120, generator=generator)]
    pairs = torch.randint(0, 120, (2, 100), generator=generator)
    vectors = torch.cat([(codebook[pairs[0]] + codebook[pairs[1]]) / 2, base])
    return vectors, codebook


@settings(max_examples=50, deadline=None)
@given(
    shape=st.tuples(st.integers(0, 40), st.integers(1, 70), st.integers(1, 20)),
    dtypes=st.tuples(*[st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64])] * 2),
    offset=st.sampled_from([0.0, 1.0, 500.0]),
    scale=st.sampled_from([1e-2, 1.0, 30.0]),
    weighted=st.booleans(),
    cosine=st.booleans(),
    max_bytes=st.sampled_from([None, *MAX_BYTES]),
    seed=st.integers(0, 2**31),
)
def test_equals_brute_force(shape, dtypes, offset, scale, weighted, cosine, max_bytes, seed):
    n, k, d = shape
    generator = torch.Generator().manual_seed(seed)
    vectors = (scale * torch.randn(n, d, generator=generator) + offset).to(dtypes[0])
    codebook = (scale * torch.randn(k, d, generator=generator) + offset).to(dtypes[1])
    weights = torch.rand(d, generator=generator).square() if weighted else None
    indices = nearest_codes(vectors, codebook, weights=weights, cosine=cosine, max_bytes=max_bytes)
    assert indices.dtype == torch.int64 and indices.shape == (n,)
    assert_nearest(indices, costs(vectors, codebook, weights, cosine))


@settings(max_examples=30, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 40), st.integers(1, 200), st.integers(1, 6)),
    max_bytes=st.sampled_from([None, *MAX_BYTES]),
    seed=st.integers(0, 2**31),
)
def test_exact_ties_go_to_the_lowest_index(shape, max_bytes, seed):
    n, k, d = shape
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randint(-2, 3, (n, d), generator=generator).float()  # small integers: many ties, exact arithmetic
    codebook = torch.randint(-2, 3, (k, d), generator=generator).float()
    expected = costs(vectors, codebook).argmin(1)  # numpy: the first occurrence
    assert nearest_codes(vectors, codebook, max_bytes=max_bytes).tolist() == expected.tolist()


@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_indices_depend_on_nothing_but_values(offset, cosine):
    vectors, codebook = ambiguous(offset=offset)
    expected = nearest_codes(vectors, codebook, cosine=cosine)
    assert_nearest(expected, costs(vectors, codebook, cosine=cosine), 1e-15 * codebook.shape[1])
    for max_bytes in MAX_BYTES:
        assert nearest_codes(vectors, codebook, cosine=cosine, max_bytes=max_bytes).equal(expected)
    alone = [nearest_codes(vector[None], codebook, cosine=cosine) for vector in vectors[::16]]
    assert torch.cat(alone).equal(expected[::16])
    threads = torch.get_num_threads()
    torch.set_num_threads(3 - min(threads, 2))
    try:
        assert nearest_codes(vectors, codebook, cosine=cosine).equal(expected)
    finally:
        torch.set_num_threads(threads)
    strided = torch.stack([vectors, vectors], 2)[..., 0]
    assert nearest_codes(strided, codebook.T.contiguous().T, cosine=cosine).equal(expected)


def test_float32_alone_would_not_do():
    vectors, codebook = ambiguous(offset=100.0)
    table = costs(vectors, codebook)
    scores = vectors @ codebook.T - codebook.square().sum(1) / 2
    naive = table[np.arange(len(table)), scores.argmax(1).numpy()]
    assert (naive > table.min(1)).sum() > 25


@pytest.mark.parametrize("max_bytes", [20_000, None])
def test_equal_codes_give_the_first(max_bytes):
    generator = torch.Generator().manual_seed(0)
    codebook = torch.randn(300, 8, generator=generator)[torch.randint(0, 300, (3_000,), generator=generator)]
    first = [int((codebook == code).all(1).nonzero()[0]) for code in codebook]
    assert nearest_codes(codebook, codebook, max_bytes=max_bytes).tolist() == first
    assert nearest_codes(codebook, torch.zeros(5_000, 8), max_bytes=max_bytes).max() == 0


@pytest.mark.parametrize("cosine", [False, True])
def test_permuting_the_codebook_permutes_the_indices(cosine):
    vectors, codebook = torch.randn(2, 500, 16, generator=torch.Generator().manual_seed(0)).unbind()
    order = torch.randperm(500, generator=torch.Generator().manual_seed(1))
    permuted = nearest_codes(vectors, codebook[order], cosine=cosine)
    assert order[permuted].equal(nearest_codes(vectors, codebook, cosine=cosine))


def test_laws_of_the_metric():
    generator = torch.Generator().manual_seed(0)
    vectors, codebook = torch.randn(300, 12, generator=generator), torch.randn(200, 12, generator=generator)
    weights = torch.rand(12, generator=generator)
    plain, weighted = nearest_codes(vectors, codebook), nearest_codes(vectors, codebook, weights=weights)
    assert nearest_codes(vectors, codebook, weights=torch.full((12,), 3.0)).equal(plain)
    assert nearest_codes(vectors * weights.sqrt(), codebook * weights.sqrt()).equal(weighted)
    assert not weighted.equal(plain)
    masked = (torch.arange(12) < 5).float()
    assert nearest_codes(vectors, codebook, weights=masked).equal(nearest_codes(vectors[:, :5], codebook[:, :5]))
    unit = torch.nn.functional.normalize(codebook)
    assert nearest_codes(vectors, codebook, cosine=True).equal(nearest_codes(vectors, unit))
    scales = torch.logspace(-30, 30, 200)[:, None]
    assert nearest_codes(vectors * 1e-25, codebook * scales, cosine=True).equal(nearest_codes(vectors, unit))


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e19, 1e30, 3e37])
def test_scores_beyond_float32_are_still_exact(scale):
    generator = torch.Generator().manual_seed(0)
    vectors, codebook = scale * torch.randn(2, 50, 6, generator=generator)
    codebook[7] = 0.0
    assert_nearest(nearest_codes(vectors, codebook, max_bytes=10_000), costs(vectors, codebook))


def test_an_outlier_code_changes_nothing():
    generator = torch.Generator().manual_seed(0)
    vectors, codebook = torch.randn(400, 8, generator=generator), torch.randn(300, 8, generator=generator)
    outliers = torch.cat([codebook, torch.full((1, 8), 1e8), torch.full((1, 8), -1e18)])
    assert nearest_codes(vectors, outliers).equal(nearest_codes(vectors, codebook))


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_reduced_matmul_precision_changes_nothing(precision, monkeypatch):
    vectors, codebook = ambiguous(dim=64)
    expected = {cosine: nearest_codes(vectors, codebook, cosine=cosine) for cosine in (False, True)}

    def shortened(factor):  # what a device may do under this setting
        mask = -(2**13) if precision == "high" else -(2**16)
        return (factor.contiguous().view(torch.int32) & mask).view(torch.float32)

    mm, addmm = torch.mm, torch.addmm
    monkeypatch.setattr(torch, "mm", lambda a, b, out: mm(shortened(a), shortened(b), out=out))
    monkeypatch.setattr(torch, "addmm", lambda c, a, b: addmm(c, shortened(a), shortened(b)))
    torch.set_float32_matmul_precision(precision)
    try:
        for cosine, indices in expected.items():
            assert nearest_codes(vectors, codebook, cosine=cosine).equal(indices)
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(dtype):
    vectors, codebook = (tensor.to(dtype) for tensor in ambiguous())
    expected = nearest_codes(vectors, codebook)
    with torch.autocast("cpu", torch.bfloat16):
        assert nearest_codes(vectors, codebook).equal(expected)
    assert nearest_codes(vectors.float(), codebook.float()).equal(expected)


def test_compiles_without_a_graph_break():
    vectors, codebook = ambiguous()

    def quantize(vectors, codebook):
        return codebook[nearest_codes(vectors, codebook, weights=codebook[0].abs())] + vectors

    compiled = torch.compile(quantize, fullgraph=True, backend="aot_eager")
    assert compiled(vectors, codebook).equal(quantize(vectors, codebook))


def test_code_that_runs_again_leaves_the_operator_of_the_first_run():
    """As files of code from the Hub do at every load."""
    source = inspect.getsource(dinotok.models.nearest)
    runs = [{"__name__": "some_repository_code"} for _ in range(2)]
    for names in runs:
        exec(compile(source, "nearest.py", "exec"), names)
    assert "_operator" in runs[0] and "_operator" not in runs[1]
    vectors, codebook = ambiguous()
    expected = nearest_codes(vectors, codebook)
    for names in runs:
        assert torch.equal(names["nearest_codes"](vectors, codebook), expected)
    assert hasattr(torch.ops.some_repository_code, "nearest_codes")


def test_operator_contract():
    vectors, codebook = ambiguous()
    torch.library.opcheck(torch.ops.dinotok.nearest_codes.default, (vectors, codebook, None, False, 10_000))


def test_indices_carry_no_gradient():
    vectors, codebook = (tensor.requires_grad_() for tensor in ambiguous())
    indices = nearest_codes(vectors, codebook)
    assert not indices.requires_grad
    (vectors - codebook[indices]).square().sum().backward()
    assert vectors.grad is not None and codebook.grad is not None
    with torch.inference_mode():
        assert nearest_codes(vectors, codebook).equal(indices)


def test_smallest_shapes():
    assert nearest_codes(torch.empty(0, 3), torch.randn(5, 3)).shape == (0,)
    assert nearest_codes(torch.randn(4, 3), torch.randn(1, 3)).tolist() == [0] * 4
    codes = torch.tensor([[-1.0], [0.0], [1.0]])
    assert nearest_codes(torch.tensor([[-0.5], [0.4], [9.0], [-9.0]]), codes).tolist() == [0, 1, 2, 0]
    assert nearest_codes(torch.tensor([[-0.5], [0.0], [9.0]]), codes, cosine=True).tolist() == [0, 0, 2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vectors": torch.zeros(3)}, r"vectors of shape \(3,\)"),
        ({"codebook": torch.zeros(0, 4)}, r"codebook of shape \(0, 4\)"),
        ({"codebook": torch.zeros(3, 5)}, "D=4, the codebook has D=5"),
        ({"vectors": torch.zeros(2, 4, dtype=torch.int64)}, "dtype torch.int64"),
        ({"weights": torch.ones(3)}, r"weights of shape \(3,\)"),
        ({"weights": torch.tensor([1.0, -1.0, 1.0, 1.0])}, "weights must be finite and non-negative"),
        ({"weights": torch.full((4,), math.nan)}, "weights must be finite and non-negative"),
        ({"vectors": torch.full((2, 4), math.nan)}, "vectors have values that are not finite"),
        ({"vectors": torch.full((2, 4), math.inf), "cosine": True}, "vectors have values that are not finite"),
        ({"codebook": torch.full((3, 4), math.inf)}, "codebook has values that are not finite"),
        ({"codebook": torch.full((3, 4), math.nan), "cosine": True}, "codebook has values that are not finite"),
        ({"vectors": torch.zeros(2, 4, device="meta")}, "vectors are on meta"),
        ({"max_bytes": 0}, "max_bytes=0"),
    ],
)
def test_errors_name_the_value_and_the_rule(change, message):
    arguments = {"vectors": torch.zeros(2, 4), "codebook": torch.zeros(3, 4), **change}
    with pytest.raises(ValueError, match=message):
        nearest_codes(**arguments)


def peak_bytes(function):
    """Largest sum of live allocations during a call."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(np.cumsum([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]))


@pytest.mark.parametrize(
    ("n", "k", "dim", "dtype", "clustered"),
    [
        (2_000, 20_000, 8, torch.float32, False),
        (100, 3_000, 256, torch.bfloat16, False),
        (16, 2**18, 4, torch.float32, False),
        (200, 3_000, 16, torch.float32, True),
    ],
)
@pytest.mark.parametrize("max_bytes", [400_000, 2**22])
def test_memory_is_bounded(n, k, dim, dtype, clustered, max_bytes):
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(n, dim, generator=generator).to(dtype)
    codebook = torch.randn(k, dim, generator=generator).to(dtype)
    if clustered:  # in two places: half the codes are candidates for every vector
        codebook = codebook[torch.arange(k) % 2] + 1e-7 * codebook
    peak = peak_bytes(lambda: nearest_codes(vectors, codebook, max_bytes=max_bytes))
    assert peak < max_bytes + 64 * (n + k + dim) + 10_000


def test_largest_codebook():
    generator = torch.Generator().manual_seed(0)
    codebook = torch.randn(2**18, 8, generator=generator)
    vectors = torch.randn(6, 8, generator=generator)
    indices = nearest_codes(vectors, codebook)
    assert_nearest(indices, costs(vectors, codebook))
    assert indices.max() > 2**16
