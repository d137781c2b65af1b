"""Exact nearest-code search in bounded memory.

Scores are computed in float32, with a rigorous bound on their rounding error. Where the bound decides the winner, that
is the answer; the few vectors it does not decide are settled in float64. So an index is a function of its vector, the
codebook and the weights alone: not of tile sizes, threads, device, matmul precision or the other vectors.
"""

import math
from collections.abc import Iterator

import torch

GROUPS = 16  # codes of a tile are compared in strided groups of this many; tiles hold a multiple of it
SLACK = 1.05  # covers the rounding of the error bounds themselves


def nearest_codes(
    vectors: torch.Tensor,
    codebook: torch.Tensor,
    *,
    weights: torch.Tensor | None = None,
    cosine: bool = False,
    max_bytes: int | None = None,
) -> torch.Tensor:
    """Find the nearest code of every vector, without the `(N, K)` matrix of distances.

    The index is `argmin_j sum_i w_i (x_i - c_ji)^2`, or with `cosine` `argmax_j sum_i w_i x_i c_ji / |c_j|_w` (a zero
    code has cosine 0), as evaluated in float64 in a fixed order of summation; equal values go to the lowest index. It
    does not depend on `max_bytes`, autocast or the float32 matmul precision. Indices carry no gradient.

    Codes closer to each other than float32 resolves cost extra time, never a wrong index; equal codes cost none.

    Args:
        vectors: `(N, D)`, floating point. N may be 0.
        codebook: `(K, D)`, floating point, on the same device.
        weights: `(D,)`, non-negative weight of each dimension; 1 by default.
        cosine: Compare directions instead of distances.
        max_bytes: Working memory beside a few numbers per vector and per code. Very small values are rounded up to
            one row of 16 codes. Default: 16 MiB plus 16 KiB per dimension on CPU (scores stay in cache), 512 MiB on
            other devices.

    Returns:
        `(N,)` int64 indices in `[0, K)`.

    Raises:
        ValueError: If a shape, dtype, device or `max_bytes` does not fit, a value is not finite or a weight negative.

    The error bound of a float32 inner product is Higham, "Accuracy and Stability of Numerical Algorithms", eq. 3.5.
    """
    _check(vectors, codebook, weights, max_bytes)
    if max_bytes is None:
        max_bytes = 2**24 + 2**14 * vectors.shape[1] if vectors.device.type == "cpu" else 2**29
    vectors, codebook = vectors.detach(), codebook.detach()
    weights = None if weights is None else weights.detach().to(torch.promote_types(weights.dtype, torch.float32))
    if vectors.device.type == "mps":  # has no float64
        weights = None if weights is None else weights.cpu()
        found = _OPERATORS.nearest_codes(vectors.cpu(), codebook.cpu(), weights, cosine, max_bytes)
        return found.to(vectors.device)
    return _OPERATORS.nearest_codes(vectors, codebook, weights, cosine, max_bytes)


def _check(vectors: torch.Tensor, codebook: torch.Tensor, weights: torch.Tensor | None, max_bytes: int | None) -> None:
    if vectors.ndim != 2:
        raise ValueError(f"vectors of shape {tuple(vectors.shape)} must be (N, D).")
    if codebook.ndim != 2 or codebook.shape[0] == 0 or codebook.shape[1] == 0:
        raise ValueError(f"codebook of shape {tuple(codebook.shape)} must be (K, D) with K >= 1 and D >= 1.")
    if vectors.shape[1] != codebook.shape[1]:
        raise ValueError(f"vectors have D={vectors.shape[1]}, the codebook has D={codebook.shape[1]}: must be equal.")
    if weights is not None and weights.shape != codebook.shape[1:]:
        raise ValueError(f"weights of shape {tuple(weights.shape)} must be (D,) = ({codebook.shape[1]},).")
    for name, tensor in (("vectors", vectors), ("codebook", codebook), ("weights", weights)):
        if tensor is None:
            continue
        if not tensor.dtype.is_floating_point:
            raise ValueError(f"{name} have dtype {tensor.dtype}, must be floating point.")
        if tensor.device != codebook.device:
            raise ValueError(f"{name} are on {tensor.device}, the codebook on {codebook.device}: must be the same.")
    if max_bytes is not None and max_bytes <= 0:
        raise ValueError(f"max_bytes={max_bytes} must be positive.")


def _nearest_codes(
    vectors: torch.Tensor, codebook: torch.Tensor, weights: torch.Tensor | None, cosine: bool, max_bytes: int
) -> torch.Tensor:
    with torch.autocast(vectors.device.type, enabled=False):
        return _Search(codebook, weights, cosine, max_bytes)(vectors)


def _fake_nearest_codes(
    vectors: torch.Tensor, codebook: torch.Tensor, weights: torch.Tensor | None, cosine: bool, max_bytes: int
) -> torch.Tensor:
    return vectors.new_empty(vectors.shape[0], dtype=torch.int64)


# A custom operator is opaque to torch.compile and torch.export: no graph break, and the same kernels as in eager mode.
# The code beside weights on the Hub has a name of its own and runs anew at every load: registering an operator again
# would destroy the one that models in use call.
_NAMESPACE = __name__.partition(".")[0]
_OPERATORS = getattr(torch.ops, _NAMESPACE)
if not hasattr(_OPERATORS, "nearest_codes"):
    _operator = torch.library.custom_op(f"{_NAMESPACE}::nearest_codes", _nearest_codes, mutates_args=())
    _operator.register_fake(_fake_nearest_codes)


class _Search:
    """One codebook, seen as scores `s_j = <x, c_j> + bias_j`: the nearest code has the largest score.

    Both sides are centred about the codebook mean and scaled by `sqrt(w)`, so weights cost nothing and a common offset
    costs no precision. For distances `bias_j = -|c_j|^2 / 2`; for cosines both sides are normalised instead of centred
    and `bias_j = 0`.
    """

    def __init__(self, codebook: torch.Tensor, weights: torch.Tensor | None, cosine: bool, max_bytes: int) -> None:
        self.codebook, self.weights, self.cosine, self.max_bytes = codebook, weights, cosine, max_bytes
        self.dim = codebook.shape[1]
        self.scale = None
        if weights is not None:
            if not bool((weights.isfinite() & (weights >= 0)).all()):
                raise ValueError("weights must be finite and non-negative.")
            self.scale = (weights / weights.max().clamp(min=torch.finfo(weights.dtype).tiny)).float().sqrt()
        sample = codebook[:: math.ceil(16 * codebook.numel() / max_bytes)]  # for any centre the answer is the same
        self.center = None if cosine else sample.mean(0, dtype=torch.float32).nan_to_num()
        self.norms, duplicates = self._survey()
        self.bias = torch.zeros_like(self.norms) if cosine else self.norms.square() / -2
        self.bias[duplicates] = -math.inf

    def __call__(self, vectors: torch.Tensor) -> torch.Tensor:
        """Indices `(N,)` of the best float32 score, with those the error bound does not decide replaced."""
        indices, best, undecided = self._scan(vectors)
        rows = undecided.nonzero()[:, 0]
        if len(rows):
            indices[rows] = self._settle(vectors, rows, best[rows])
        return indices

    def _survey(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Norm `(K,)` of every projected code, and the indices of codes that equal an earlier code."""
        norms, keys = torch.empty(2, len(self.codebook), dtype=torch.float32, device=self.codebook.device)
        probe = torch.arange(1, self.dim + 1, dtype=torch.float32, device=self.codebook.device).sin()
        step = max(1, self.max_bytes // (16 * self.dim))
        for start in range(0, len(self.codebook), step):
            codes = self._project(self.codebook[start : start + step])
            torch.linalg.vector_norm(codes, dim=1, out=norms[start : start + step])
            torch.mv(codes, probe, out=keys[start : start + step])
        if not bool(norms.isfinite().all()) and not bool(self.codebook.isfinite().all()):
            raise ValueError("The codebook has values that are not finite.")
        keys, order = keys.sort(stable=True)
        same_key = (keys[1:] == keys[:-1]).nonzero()[:, 0]
        duplicates = [order[:0]]
        for pair in same_key.split(step):
            equal = (self.codebook[order[pair]] == self.codebook[order[pair + 1]]).all(1)
            duplicates.append(order[pair + 1][equal])
        return norms, torch.cat(duplicates)

    def _project(self, rows: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """Rows in float32, centred and scaled; for cosines of unit norm (a zero row stays zero)."""
        projected = torch.empty(rows.shape, dtype=torch.float32, device=rows.device) if out is None else out
        if self.center is None:
            projected.copy_(rows)
        else:
            torch.sub(rows, self.center, out=projected)
        if self.scale is not None:
            projected.mul_(self.scale)
        if self.cosine:
            for order in (math.inf, 2.0):  # the largest value first, so that no square overflows or vanishes
                norms = torch.linalg.vector_norm(projected, order, dim=1, keepdim=True)
                projected.div_(norms.masked_fill_(norms == 0, 1.0))
        return projected

    def _margin(self, norms: torch.Tensor) -> torch.Tensor:
        """A score this far below the best one belongs to a worse code, whatever was rounded; `(N,)` for `|x|`.

        Each score is off by at most `u (D + 16) (|x| |c| + |c|^2 / 2)`, a cosine by `u (3 D / 2 + 16)`. Only codes
        with `|c| <= 2 |x| + min |c|` can win: the others are farther from `x` than the shortest code.
        """
        matmul = _matmul_rounding(norms.device)
        if self.cosine:
            return torch.full_like(norms, 2 * SLACK * (2.0**-24 * (1.5 * self.dim + 16) + matmul))
        unit = 2.0**-24 * (self.dim + 16) + matmul
        tiny = 2.0**-120 * (self.dim + 16)  # what underflow may hide
        reach = (SLACK * (2 * norms + self.norms.min())).clamp(max=SLACK * self.norms.max())
        return 2 * SLACK * unit * (norms * reach + reach.square() / 2) + tiny * (1 + norms) * (1 + reach)

    def _tiles(self, rows: int, max_bytes: int) -> tuple[int, int]:
        """Rows and codes of a tile: about half the bytes for scores, a multiple of 16 codes."""
        floats = max_bytes // 4
        codes = min(math.isqrt(2 * floats), floats // (4 * self.dim))
        codes = max(1, min(math.ceil(len(self.codebook) / GROUPS), codes // GROUPS)) * GROUPS
        return max(1, min(rows, floats // (2 * codes), floats // (8 * self.dim))), codes

    def _code_tiles(self, codes: int) -> Iterator[tuple[int, torch.Tensor]]:
        """Start and `(codes, D + 1)` projected codes beside their bias; the last tile is padded with bias -inf."""
        tile = torch.zeros(codes, self.dim + 1, dtype=torch.float32, device=self.codebook.device)
        for start in range(0, len(self.codebook), codes):
            valid = min(codes, len(self.codebook) - start)
            self._project(self.codebook[start : start + valid], out=tile[:valid, :-1])
            tile[:valid, -1] = self.bias[start : start + valid]
            tile[valid:, :-1], tile[valid:, -1] = 0, -math.inf
            yield start, tile

    def _scan(self, vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Index and score of the best code by float32 score, and whether the second best is within the margin."""
        count, device = len(vectors), vectors.device
        best, second = torch.full((2, count), -math.inf, dtype=torch.float32, device=device)
        norms = torch.empty(count, dtype=torch.float32, device=device)
        indices = torch.zeros(count, dtype=torch.int64, device=device)
        rows, codes = self._tiles(count, self.max_bytes)
        scores = torch.empty(rows, codes, dtype=torch.float32, device=device)
        block = torch.ones(rows, self.dim + 1, dtype=torch.float32, device=device)  # the last column adds the bias
        for start, tile in self._code_tiles(codes):
            for first in range(0, count, rows):
                part = slice(first, min(first + rows, count))
                size = part.stop - first
                x = self._project(vectors[part], out=block[:size, :-1])
                if start == 0:
                    torch.linalg.vector_norm(x, dim=1, out=norms[part])
                torch.mm(block[:size], tile.T, out=scores[:size])
                _merge(best[part], second[part], indices[part], *_top2(scores[:size]), start)
        if not bool(norms.isfinite().all()) and not bool(vectors.isfinite().all()):
            raise ValueError("The vectors have values that are not finite.")
        margin = self._margin(norms)
        return indices, best - margin, ~(best - second > margin)  # not `<=`: a NaN is undecided

    def _settle(self, vectors: torch.Tensor, undecided: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
        """Indices for the rows `undecided`: of the codes above `threshold`, the first of least float64 cost."""
        device = vectors.device
        cost = torch.full((len(undecided),), math.inf, dtype=torch.float64, device=device)
        indices = torch.full((len(undecided),), len(self.codebook), dtype=torch.int64, device=device)
        rows, codes = self._tiles(len(undecided), self.max_bytes // 8)  # a candidate is two int64, its mask a byte
        pairs = max(1, self.max_bytes // (64 * self.dim))
        for start, tile in self._code_tiles(codes):
            for part in torch.arange(len(undecided), device=device).split(rows):
                x = self._project(vectors[undecided[part]])
                scores = torch.addmm(tile[:, -1], x, tile[:, :-1].T)[:, : len(self.codebook) - start]
                candidates = (~(scores < threshold[part, None])).nonzero()
                for row, code in (pair.unbind(1) for pair in candidates.split(pairs)):
                    row, code = part[row], code + start
                    self._improve(cost, indices, row, code, self._cost(vectors[undecided[row]], self.codebook[code]))
        return indices

    def _cost(self, vectors: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        """Float64 cost `(M,)` of M pairs: the definition of nearest."""
        x, c = vectors.double(), codes.double()
        w = 1.0 if self.weights is None else self.weights.double()
        if not self.cosine:
            return _sum(x.sub_(c).square_().mul_(w))
        norms = _sum(c.square() * w).sqrt_()
        return _sum(x.mul_(c).mul_(w)).div_(torch.where(norms > 0, norms, 1.0)).neg_()

    @staticmethod
    def _improve(
        cost: torch.Tensor, indices: torch.Tensor, row: torch.Tensor, code: torch.Tensor, new: torch.Tensor
    ) -> None:
        """Lower `cost[row]` to `new` where that is less, and keep the lowest index of the least cost."""
        before = cost.clone()
        cost.scatter_reduce_(0, row, new, "amin")
        indices.masked_fill_(cost < before, torch.iinfo(torch.int64).max)
        least = new == cost[row]
        indices.scatter_reduce_(0, row[least], code[least], "amin")


def _top2(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Largest score of every row, its position, and the second largest, each `(n,)`, for `(n, 16 g)` scores.

    An argmax over all scores would cost more than the matrix product. The maximum over 16 strided groups is one fast
    elementwise pass; positions are then sought among one sixteenth of the numbers.
    """
    grouped = scores.view(len(scores), GROUPS, -1)
    tops = grouped.amax(1)
    best, group = tops.max(1)
    members = grouped.gather(2, group[:, None, None].expand(-1, GROUPS, 1)).squeeze(2)
    member = members.argmax(1)
    tops.scatter_(1, group[:, None], -math.inf)
    members.scatter_(1, member[:, None], -math.inf)
    second = torch.maximum(tops.amax(1), members.amax(1))
    return best, member * tops.shape[1] + group, second


def _merge(
    best: torch.Tensor,
    second: torch.Tensor,
    indices: torch.Tensor,
    new_best: torch.Tensor,
    position: torch.Tensor,
    new_second: torch.Tensor,
    start: int,
) -> None:
    """Update best, second best and index in place with those of one tile."""
    indices.copy_(torch.where(new_best > best, position + start, indices))
    torch.maximum(second, torch.maximum(new_second, torch.minimum(best, new_best)), out=second)
    torch.maximum(best, new_best, out=best)


def _sum(terms: torch.Tensor) -> torch.Tensor:
    """Sum over the last dimension by halving: elementwise additions only, so the order never depends on the shape."""
    while terms.shape[1] > 1:
        half = terms.shape[1] // 2
        folded = terms[:, :half] + terms[:, half : 2 * half]
        terms = torch.cat([folded, terms[:, 2 * half :]], 1)
    return terms[:, 0]


def _matmul_rounding(device: torch.device) -> float:
    """Relative error of a product whose factors the current float32 matmul precision may shorten first."""
    matmul = getattr(torch.backends.mkldnn if device.type == "cpu" else torch.backends.cuda, "matmul", None)
    try:
        precision = matmul.fp32_precision  # type: ignore[union-attr]
    except AttributeError:  # torch < 2.9
        precision = torch.get_float32_matmul_precision()
    if precision in ("none", "ieee", "highest"):
        return 0.0
    return 2.0**-9 if precision in ("tf32", "high") else 2.0**-7
