"""Choose indices from logits: filters, guidance and its schedules, and draws that a generator decides."""

import math
from collections.abc import Sequence

import torch

GUIDANCE_SCHEDULES = ("constant", "rising")


def check_sampling(temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> None:
    """Check the parameters of `index_probabilities`.

    Raises:
        ValueError: If one is out of range.
    """
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ValueError(f"temperature={temperature} must be 0 (the most likely index) or a positive number.")
    if top_k < 0:
        raise ValueError(f"top_k={top_k} must be 0 (all codes) or a positive number.")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p} must lie in (0, 1]; 1 takes all codes.")


def index_probabilities(
    logits: torch.Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
) -> torch.Tensor:
    """Turn logits to the probabilities to draw from.

    Args:
        logits: `(B, codes)`.
        temperature: Divides the logits; 0 gives all to the most likely code.
        top_k: Keep that many of the most likely codes, and those as likely as the last of them; 0 keeps all.
        top_p: Then keep the fewest of the most likely codes that have at least this probability together (nucleus
            sampling, Holtzman et al., arXiv 1904.09751).

    Returns:
        `(B, codes)`; each row sums to 1, and codes that are not kept have 0.

    Raises:
        ValueError: If a parameter is out of range.
    """
    check_sampling(temperature, top_k, top_p)
    if temperature == 0:
        return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
    logits = logits / temperature
    if 0 < top_k < logits.shape[-1]:
        least = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    probabilities = logits.softmax(-1)
    if top_p < 1:
        ranked, order = probabilities.sort(dim=-1, descending=True, stable=True)
        before = ranked.cumsum(-1) - ranked
        probabilities = torch.zeros_like(ranked).scatter_(-1, order, ranked.masked_fill(before >= top_p, 0.0))
        probabilities = probabilities / probabilities.sum(-1, keepdim=True)
    return probabilities


def draw(probabilities: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """Draw an index from each row, by the inverse of the cumulative distribution.

    Args:
        probabilities: `(B, codes)`.
        uniforms: `(B,)` in [0, 1), float32.

    Returns:
        `(B, 1)` int64; never an index of probability 0.
    """
    precise = torch.float32 if probabilities.device.type == "mps" else torch.float64
    cumulative = probabilities.to(precise).cumsum(-1)
    targets = uniforms[:, None].to(precise) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, targets, right=True).clamp(max=probabilities.shape[-1] - 1)


def uniform_noise(
    batch_size: int,
    steps: int,
    generator: torch.Generator | Sequence[torch.Generator] | None,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """Draw all random numbers of a generation at once, so that each belongs to its sample and step.

    They are drawn where the generator lives: one on the CPU gives the same numbers for every device.

    Args:
        batch_size: Samples.
        steps: Draws of each.
        generator: One for all samples, or one for each: then a batch draws what single samples draw.
        device: Of the result.

    Returns:
        `(batch_size, steps)` float32 in [0, 1).

    Raises:
        ValueError: If there are several generators, but not one for each sample.
    """
    if generator is None or isinstance(generator, torch.Generator):
        where = device if generator is None else generator.device
        return torch.rand(batch_size, steps, generator=generator, device=where).to(device)
    if len(generator) != batch_size:
        raise ValueError(f"There are {len(generator)} generators for {batch_size} samples.")
    return torch.cat([torch.rand(1, steps, generator=one, device=one.device).to(device) for one in generator])


def guide(logits: torch.Tensor, scale: float) -> torch.Tensor:
    """Combine the logits of a doubled batch, `unconditional + scale * (conditional - unconditional)`.

    Classifier-free guidance (Ho & Salimans, arXiv 2207.12598), in the convention where 1 means none.

    Args:
        logits: `(2 B, codes)`: the conditional half, then the unconditional one.
        scale: How far to go.

    Returns:
        `(B, codes)`.
    """
    conditional, unconditional = logits.chunk(2)
    return unconditional + scale * (conditional - unconditional)


def check_guidance(guidance_scale: float, schedule: str = "constant", guidance_power: float = 1.0) -> None:
    """Check the parameters of `guidance_at`.

    Raises:
        ValueError: If a number is out of range, or there is no such schedule.
    """
    if not (math.isfinite(guidance_scale) and guidance_scale >= 0):
        raise ValueError(f"guidance_scale={guidance_scale} must not be negative; 1 is no guidance.")
    if schedule not in GUIDANCE_SCHEDULES:
        raise ValueError(f"guidance_schedule={schedule!r} is none of {', '.join(GUIDANCE_SCHEDULES)}.")
    if not (math.isfinite(guidance_power) and guidance_power > 0):
        raise ValueError(f"guidance_power={guidance_power} must be positive.")


def guidance_at(
    progress: float, guidance_scale: float, schedule: str = "constant", guidance_power: float = 1.0
) -> float:
    """Return the guidance scale of a step.

    Args:
        progress: The share of positions that are there already, in [0, 1).
        guidance_scale: What a constant schedule uses, and a rising one tends to.
        schedule: `"constant"`, or `"rising"`: from 1 by the power-cosine schedule of MDT (Gao et al., arXiv
            2303.14389) and RAR (Yu et al., arXiv 2411.00776),
            `1 + (guidance_scale - 1) * (1 - cos(pi * progress ** guidance_power)) / 2`.
        guidance_power: Of the rising schedule; above 1 the guidance comes later.

    Raises:
        ValueError: See `check_guidance`.
    """
    check_guidance(guidance_scale, schedule, guidance_power)
    if schedule == "constant":
        return guidance_scale
    return 1 + (guidance_scale - 1) * (1 - math.cos(math.pi * progress**guidance_power)) / 2
