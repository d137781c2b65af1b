"""Vector quantizers: from latents to indices of a codebook and back."""

import math
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed
import torch.nn.functional as F
from diffusers.utils import BaseOutput
from torch import nn

from ..statistics import PCA, cluster_sums, kmeans
from .buffers import Float32Module
from .nearest import nearest_codes


@dataclass
class QuantizerOutput(BaseOutput):
    """What quantizing latents gives.

    Attributes:
        latents: The codes, in the shape and dtype of the input; gradients go straight through to it.
        indices: int64: `(B, h, w)` of one quantizer, `(B, number of codebooks, h, w)` of a tokenizer.
        loss: Scalar float32: what training adds to its objective, weights included.
        codebook_loss: Scalar: mean squared distance that pulls codes to latents (van den Oord et al. 2017, eq. 3,
            second term).
        commitment_loss: Scalar: the same distance, pulling latents to codes (third term, without its weight).
    """

    latents: torch.Tensor
    indices: torch.Tensor
    loss: torch.Tensor
    codebook_loss: torch.Tensor | None = None
    commitment_loss: torch.Tensor | None = None


@dataclass
class CodebookUsage:
    """How a codebook is used over a whole data set.

    Attributes:
        codebook_size: K.
        num_tokens: How many indices were counted.
        usage: Share of codes used at least once, in [0, 1].
        perplexity: exp of the entropy of the code frequencies, in [1, K].
        num_dead: Codes never used.
    """

    codebook_size: int
    num_tokens: int
    usage: float
    perplexity: float
    num_dead: int


class CodeCounter:
    """Counts code frequencies over a whole evaluation set, not over a rolling window.

    Args:
        codebook_size: K.
    """

    def __init__(self, codebook_size: int):
        self.counts = torch.zeros(codebook_size, dtype=torch.int64)

    def update(self, indices: torch.Tensor) -> "CodeCounter":
        """Add int64 indices of any shape.

        Raises:
            ValueError: If one is outside `[0, K)`.
        """
        indices = checked_indices(indices.cpu(), len(self.counts))
        self.counts += torch.bincount(indices.flatten(), minlength=len(self.counts))
        return self

    def compute(self) -> CodebookUsage:
        """Return usage, perplexity and dead codes; with nothing counted, all codes are dead."""
        total = int(self.counts.sum())
        used = int((self.counts > 0).sum())
        p = self.counts[self.counts > 0].double() / max(total, 1)
        perplexity = float(torch.exp(-(p * p.log()).sum())) if total else 0.0
        size = len(self.counts)
        return CodebookUsage(size, total, used / size, perplexity, size - used)


class VectorQuantizer(Float32Module):
    """A codebook that is trained by gradients (VQ-VAE, van den Oord et al. 2017).

    Args:
        codebook_size: K.
        codebook_dim: D, the channels of the latents.
        commitment_weight: Weight of the commitment loss.
        normalize: Look up by cosine: latents and codes are normalised to unit length, and so is the output
            (ViT-VQGAN, Yu et al. 2022). The gradient then goes straight through to the normalised latents.
        entropy_weight: Weight of `mean entropy per latent - entropy of the mean assignment` (MAGVIT-v2, Yu et al.
            2024, eq. 5), in [-log K, 0], which spreads the use of codes. It needs all `N x K` distances in memory; 0
            leaves it out.
        entropy_temperature: Of the soft assignments in that term.

    Raises:
        ValueError: If a size is not positive.
    """

    def __init__(
        self,
        codebook_size: int,
        codebook_dim: int,
        commitment_weight: float = 0.25,
        normalize: bool = False,
        entropy_weight: float = 0.0,
        entropy_temperature: float = 0.01,
    ):
        super().__init__()
        if codebook_size < 1 or codebook_dim < 1:
            raise ValueError(f"A codebook of {codebook_size} codes of {codebook_dim} dimensions holds nothing.")
        self.codebook_size = codebook_size
        self.codebook_dim = codebook_dim
        self.commitment_weight = commitment_weight
        self.normalize = normalize
        self.entropy_weight = entropy_weight
        self.entropy_temperature = entropy_temperature
        codebook = torch.empty(codebook_size, codebook_dim, dtype=torch.float32)
        codebook.uniform_(-1 / codebook_size, 1 / codebook_size)
        self.codebook = nn.Parameter(F.normalize(codebook, dim=-1) if normalize else codebook)

    def forward(self, latents: torch.Tensor) -> QuantizerOutput:
        """Replace every latent by its nearest code.

        Args:
            latents: `(B, D, h, w)`.

        Returns:
            `.latents` are `indices_to_latents(.indices)`, rounded to the dtype of the latents.

        Raises:
            ValueError: If the shape is another.
        """
        vectors, codebook = self._prepared(_to_rows(latents, self.codebook_dim)), self._prepared(self.codebook)
        indices = nearest_codes(vectors, codebook)
        codes = codebook[indices]
        codebook_loss = F.mse_loss(codes, vectors.detach())
        commitment_loss = F.mse_loss(vectors, codes.detach())
        loss = codebook_loss + self.commitment_weight * commitment_loss
        if self.entropy_weight:
            loss = loss + self.entropy_weight * self._entropy_loss(vectors, codebook)
        quantized = straight_through(_to_grid(vectors, latents), _to_grid(codes, latents))
        return QuantizerOutput(
            quantized.to(latents.dtype), _index_grid(indices, latents), loss, codebook_loss, commitment_loss
        )

    def indices_to_latents(self, indices: torch.Tensor) -> torch.Tensor:
        """Return the codes `(B, D, h, w)`, float32, of integer indices `(B, h, w)`.

        Raises:
            ValueError: If an index is outside `[0, K)`.
        """
        indices = checked_indices(indices, self.codebook_size)
        return self._prepared(self.codebook)[indices].permute(0, 3, 1, 2)

    def code_distances(self, latents: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        """Return the squared distance `(B, h, w)` of latents `(B, D, h, w)` to codes, as the look-up measures it."""
        vectors = self._prepared(_to_rows(latents, self.codebook_dim))
        codes = self._prepared(self.codebook)[checked_indices(indices, self.codebook_size).flatten()]
        return (vectors - codes).square().sum(1).view_as(indices)

    @torch.no_grad()
    def fit(self, rows: torch.Tensor, generator: torch.Generator, num_iterations: int = 20) -> "VectorQuantizer":
        """Set the codebook to the k-means centres of a sample of latents.

        Args:
            rows: `(N, D)`, N at least `codebook_size`.
            generator: On the CPU.
            num_iterations: Of Lloyd's algorithm.

        Raises:
            ValueError: If the shape is another or there are too few rows.
        """
        _check_rows(rows, self.codebook_dim)
        rows = self._prepared(rows.to(self.codebook.device))
        search = partial(nearest_codes, cosine=self.normalize)
        self.codebook.copy_(self._prepared(kmeans(rows, self.codebook_size, search, generator, num_iterations)))
        return self

    def _prepared(self, rows: torch.Tensor) -> torch.Tensor:
        rows = rows.float()
        return F.normalize(rows, dim=-1) if self.normalize else rows

    def _entropy_loss(self, vectors: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
        log_p = (-torch.cdist(vectors, codebook).square() / self.entropy_temperature).log_softmax(-1)  # (N, K)
        log_mean = log_p.logsumexp(0) - math.log(len(vectors))  # (K,)
        return (log_mean.exp() * log_mean).sum() - (log_p.exp() * log_p).sum(-1).mean()


class DominantSubspaceQuantizer(Float32Module):
    """Vector quantization in the dominant subspace of a frozen encoder's features (DINO-Tok, arXiv 2511.20565).

    With the global PCA (mu, V, lambda) over a training set, a latent z is looked up as

        y = V_k^T (z - mu),    j = argmin_j sum_i w_i (y_i - c_ji)^2,    z_q = mu + V_k c_j,    w_i ~ lambda_i^(2a)

    `rank` k and `eigenvalue_power` a make one class of both versions of the paper: a = 0 and k < D is
    Dominant-Subspace Quantization (v2), k = D and a > 0 the PCA reweighting of v1 (a = 0.25 is the one public
    attempt's), k = D and a = 0 plain vector quantization in a rotated basis. The formulas are reconstructed from the
    abstracts; rank, power and distance are not stated by the authors.

    The features are frozen, so the codebook is no gradient race but k-means: `fit` starts it, `update_codebook`
    follows with exponential moving averages. Everything is float32 whatever the model's dtype, and under autocast.

    Args:
        channels: D.
        codebook_size: K.
        rank: k, at most D; `None` for D.
        eigenvalue_power: a, not negative.
        cosine: Compare directions in the subspace. Codes keep their length.
        ema_decay: Of the codes' moving averages.
        dead_code_threshold: A code whose moving average of tokens falls below this share of the mean code's is moved
            to a current token. Without any it takes a code `log(threshold) / log(ema_decay)` updates to die, 350 by
            default, so batches with fewer tokens than codes do no harm. 0 lets all codes be.

    Attributes:
        mean: `(D,)`: mu.
        components: `(D, k)`: the first k columns of V.
        eigenvalues: `(D,)`: lambda, descending.
        codebook: `(K, k)`: codes in the subspace.
        code_counts: `(K,)`: moving average of how many tokens of an update a code gets, in units of the mean code's
            number: 1 on average, whatever the size of a batch, and after `fit` what updates on the same tokens keep.
        code_sums: `(K, k)`: moving average of the sum of these tokens, in the same unit;
            `codebook = code_sums / code_counts`.
        token_count: How many tokens the PCA was measured on.
        num_updates: How often `update_codebook` ran; seeds the choice of tokens for dead codes.
        encoder_digest: 32 bytes: SHA-256 of the encoder the statistics belong to, zeros if unknown.

    Raises:
        ValueError: If a number is out of range.
    """

    mean: torch.Tensor
    components: torch.Tensor
    eigenvalues: torch.Tensor
    codebook: torch.Tensor
    code_counts: torch.Tensor
    code_sums: torch.Tensor
    token_count: torch.Tensor
    num_updates: torch.Tensor
    encoder_digest: torch.Tensor

    def __init__(
        self,
        channels: int,
        codebook_size: int,
        rank: int | None = None,
        eigenvalue_power: float = 0.0,
        cosine: bool = False,
        ema_decay: float = 0.99,
        dead_code_threshold: float = 0.03,
    ):
        super().__init__()
        rank = channels if rank is None else rank
        if codebook_size < 1:
            raise ValueError(f"codebook_size={codebook_size} must be positive.")
        if not 1 <= rank <= channels:
            raise ValueError(f"rank={rank} must lie between 1 and the {channels} channels.")
        if eigenvalue_power < 0:
            raise ValueError(f"eigenvalue_power={eigenvalue_power} must not be negative: it would favour noise.")
        if not 0 < ema_decay < 1:
            raise ValueError(f"ema_decay={ema_decay} must lie between 0 and 1.")
        if not 0 <= dead_code_threshold < 1:
            raise ValueError(f"dead_code_threshold={dead_code_threshold} must lie in [0, 1).")
        self.channels, self.codebook_size, self.rank = channels, codebook_size, rank
        self.eigenvalue_power, self.cosine = eigenvalue_power, cosine
        self.ema_decay, self.dead_code_threshold = ema_decay, dead_code_threshold
        codebook = torch.randn(codebook_size, rank, dtype=torch.float32)
        self.register_buffer("mean", torch.zeros(channels, dtype=torch.float32))
        self.register_buffer("components", torch.eye(channels, rank, dtype=torch.float32))
        self.register_buffer("eigenvalues", torch.ones(channels, dtype=torch.float32))
        self.register_buffer("codebook", codebook)
        self.register_buffer("code_counts", torch.ones(codebook_size, dtype=torch.float32))
        self.register_buffer("code_sums", codebook.clone())
        self.register_buffer("token_count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("num_updates", torch.zeros((), dtype=torch.int64))
        self.register_buffer("encoder_digest", torch.zeros(32, dtype=torch.uint8))

    @property
    def weights(self) -> torch.Tensor:
        """`(k,)`: w, with mean 1."""
        powers = self.eigenvalues[: self.rank].clamp(min=1e-12) ** (2 * self.eigenvalue_power)
        return powers / powers.mean()

    def forward(self, latents: torch.Tensor) -> QuantizerOutput:
        """Replace every latent by its nearest code. Nothing is updated here, in training mode neither.

        Args:
            latents: `(B, D, h, w)`.

        Returns:
            `.latents` are `indices_to_latents(.indices)`, rounded to the dtype of the latents. `.loss` is the
            commitment loss in the weighted subspace: its gradient reaches the latents only, and means something only
            where a trained layer makes them.

        Raises:
            ValueError: If the shape is another.
        """
        projected = self.project(_to_rows(latents, self.channels))  # (N, k)
        indices = self._search(projected, self.codebook)  # (N,)
        codes = self.codebook[indices]  # (N, k)
        loss = (self.weights * (projected - codes).square()).mean()
        quantized = _to_grid(self.lift(codes), latents).to(latents.dtype)  # (B, D, h, w)
        quantized = straight_through(latents, quantized)
        return QuantizerOutput(quantized, _index_grid(indices, latents), loss, commitment_loss=loss)

    def indices_to_latents(self, indices: torch.Tensor) -> torch.Tensor:
        """Return the lifted codes `(B, D, h, w)`, float32, of integer indices `(B, h, w)`.

        Raises:
            ValueError: If an index is outside `[0, K)`.
        """
        indices = checked_indices(indices, self.codebook_size)
        rows = self.lift(self.codebook[indices.flatten()])
        return rows.unflatten(0, indices.shape).permute(0, 3, 1, 2)

    def code_distances(self, latents: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        """Return how far latents `(B, D, h, w)` are from codes, `(B, h, w)`, as the look-up measures it.

        That is the squared distance in the weighted subspace, between directions if `cosine`.
        """
        scale = self.weights.sqrt()
        vectors = self.project(_to_rows(latents, self.channels)) * scale
        codes = self.codebook[checked_indices(indices, self.codebook_size).flatten()] * scale
        if self.cosine:
            vectors, codes = F.normalize(vectors, dim=1), F.normalize(codes, dim=1)
        return (vectors - codes).square().sum(1).view_as(indices)

    def project(self, rows: torch.Tensor) -> torch.Tensor:
        """`(N, D)` to the subspace, `(N, k)` float32: `V_k^T (z - mu)`."""
        with torch.autocast(rows.device.type, enabled=False):
            return (rows.float() - self.mean) @ self.components

    def lift(self, rows: torch.Tensor) -> torch.Tensor:
        """`(N, k)` back, `(N, D)` float32: `mu + V_k y`; what lies outside the subspace becomes the mean."""
        with torch.autocast(rows.device.type, enabled=False):
            return self.mean + rows.float() @ self.components.T

    @torch.no_grad()
    def set_pca(self, pca: PCA, token_count: int, encoder_digest: str | None = None) -> "DominantSubspaceQuantizer":
        """Take over the subspace from streaming statistics.

        Args:
            pca: Over D channels.
            token_count: How many tokens it was measured on.
            encoder_digest: Hexadecimal SHA-256 of the encoder's weights.

        Raises:
            ValueError: If it has another number of channels.
        """
        if len(pca.mean) != self.channels:
            raise ValueError(f"The PCA is over {len(pca.mean)} channels, the quantizer over {self.channels}.")
        self.mean.copy_(pca.mean)
        self.components.copy_(pca.components[:, : self.rank])
        self.eigenvalues.copy_(pca.eigenvalues)
        self.token_count.fill_(token_count)
        if encoder_digest is not None:
            self.encoder_digest.copy_(torch.tensor(list(bytes.fromhex(encoder_digest)), dtype=torch.uint8))
        return self

    @torch.no_grad()
    def fit(
        self, rows: torch.Tensor, generator: torch.Generator, num_iterations: int = 20, plus_plus: bool = False
    ) -> "DominantSubspaceQuantizer":
        """Set the codebook to the k-means centres of a sample of latents, in the weighted subspace.

        Args:
            rows: `(N, D)`, N at least `codebook_size`; they may stay on the CPU, only their projections are moved.
            generator: On the CPU.
            num_iterations: Of Lloyd's algorithm.
            plus_plus: Start with k-means++.

        Raises:
            ValueError: If the shape is another or there are too few rows.
        """
        _check_rows(rows, self.channels)
        projected = torch.cat([self.project(part.to(self.codebook.device)) for part in rows.split(2**16)])
        centres = kmeans(projected, self.codebook_size, self._search, generator, num_iterations, plus_plus)
        counts = torch.bincount(self._search(projected, centres), minlength=self.codebook_size).float()
        self._set_codes(slice(None), centres, (counts / counts.mean()).clamp(min=1e-6))
        return self

    @torch.no_grad()
    def update_codebook(self, latents: torch.Tensor) -> int:
        """Move the codes towards the means of their tokens (EMA k-means, van den Oord et al. 2017, appendix A).

        Under `torch.distributed` the sums of all processes count, and every rank ends with the same codebook, equal to
        that of one process with the joined batch. Codes that have died are moved to random current tokens, and their
        averages start anew.

        Args:
            latents: `(B, D, h, w)`.

        Returns:
            How many codes were moved.
        """
        rows = self.project(_to_rows(latents, self.channels))
        counts, sums = cluster_sums(rows, self._search(rows, self.codebook), self.codebook_size)
        _sum_over_processes(counts, sums)
        unit = counts.mean().clamp(min=1 / self.codebook_size)
        self.code_counts.lerp_((counts / unit).float().to(rows.device), 1 - self.ema_decay)
        self.code_sums.lerp_((sums / unit).float().to(rows.device), 1 - self.ema_decay)
        seen = self.code_counts[:, None] > 1e-20  # the others keep their code: 0 / 0 is not one
        self.codebook.copy_(torch.where(seen, self.code_sums / self.code_counts[:, None], self.codebook))
        dead = (self.code_counts < self.dead_code_threshold).nonzero()[:, 0]
        if len(dead):
            tokens = _same_random_rows(rows, len(dead), torch.Generator().manual_seed(int(self.num_updates)))
            dead = dead[: len(tokens)]
            self._set_codes(dead, tokens, torch.ones(len(dead), device=tokens.device))
        self.num_updates += 1
        return len(dead)

    def _set_codes(self, where: slice | torch.Tensor, codes: torch.Tensor, counts: torch.Tensor) -> None:
        self.codebook[where] = codes
        self.code_counts[where] = counts
        self.code_sums[where] = codes * counts[:, None]

    def _search(self, rows: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        weights = self.weights if self.eigenvalue_power else None
        return nearest_codes(rows, codes, weights=weights, cosine=self.cosine)


def checked_indices(indices: torch.Tensor, codebook_size: int) -> torch.Tensor:
    """Return indices as int64; on a GPU their values are not read.

    Raises:
        ValueError: If they are no integers, or one is outside `[0, codebook_size)`.
    """
    if indices.dtype.is_floating_point or indices.dtype.is_complex or indices.dtype == torch.bool:
        raise ValueError(f"Indices must be integers, got {indices.dtype}.")
    indices = indices.long()
    if indices.device.type == "cpu" and indices.numel() and not torch.compiler.is_compiling():
        low, high = int(indices.min()), int(indices.max())
        if low < 0 or high >= codebook_size:
            raise ValueError(f"Indices must lie in [0, {codebook_size}), got [{low}, {high}].")
    return indices


def _check_rows(rows: torch.Tensor, channels: int) -> None:
    if rows.ndim != 2 or rows.shape[1] != channels:
        raise ValueError(f"Expected rows of shape (N, {channels}), got {tuple(rows.shape)}.")


def _to_rows(latents: torch.Tensor, channels: int) -> torch.Tensor:
    """`(B, D, h, w)` to `(B * h * w, D)` float32."""
    if latents.ndim != 4 or latents.shape[1] != channels:
        raise ValueError(f"Latents must have shape (B, {channels}, h, w), got {tuple(latents.shape)}.")
    return latents.permute(0, 2, 3, 1).flatten(0, 2).float()


def _to_grid(rows: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    batch, _, height, width = like.shape
    return rows.unflatten(0, (batch, height, width)).permute(0, 3, 1, 2)


def _index_grid(indices: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    batch, _, height, width = like.shape
    return indices.unflatten(0, (batch, height, width))


def straight_through(latents: torch.Tensor, quantized: torch.Tensor) -> torch.Tensor:
    """Exactly `quantized`, in its dtype, with the gradient of `latents` (Bengio et al. 2013)."""
    return quantized.detach() + (latents - latents.detach()).to(quantized.dtype)


def broadcast_state(module: nn.Module) -> None:
    """Give every process the parameters and buffers of the first: equal sums on unequal machines round differently."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        for tensor in module.state_dict().values():
            torch.distributed.broadcast(tensor, 0)


def _sum_over_processes(*tensors: torch.Tensor) -> None:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        for tensor in tensors:
            torch.distributed.all_reduce(tensor)


def _same_random_rows(rows: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    """Return `count` random rows (fewer if there are fewer) of all processes' rows, the same ones on every rank."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    rank = torch.distributed.get_rank() if distributed else 0
    world_size = torch.distributed.get_world_size() if distributed else 1
    sizes = torch.zeros(world_size, dtype=torch.int64, device=rows.device)
    sizes[rank] = len(rows)
    _sum_over_processes(sizes)
    start = int(sizes[:rank].sum())
    chosen = torch.randperm(int(sizes.sum()), generator=generator)[:count].to(rows.device) - start
    mine = (chosen >= 0) & (chosen < len(rows))
    drawn = torch.zeros(len(chosen), rows.shape[1], dtype=rows.dtype, device=rows.device)
    drawn[mine] = rows[chosen[mine]]
    _sum_over_processes(drawn)
    return drawn
