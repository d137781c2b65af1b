"""Losses of tokenizer training, as functions of tensors, and what keeps adversarial training from breaking a run.

Everything is computed in float32 whatever the precision of the arguments. LPIPS is in `dinotok.lpips`; the codebook
and commitment losses come from the quantizers.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

PixelLossKind = Literal["l1", "l2"]
AdversarialLossKind = Literal["hinge", "non_saturating"]
Reduce = Callable[[torch.Tensor], torch.Tensor]


def pixel_loss(pixels: torch.Tensor, target: torch.Tensor, kind: PixelLossKind = "l1") -> torch.Tensor:
    """Compute the mean absolute (`l1`) or mean squared (`l2`) difference of all values.

    Args:
        pixels: Reconstructions `(B, 3, H, W)`.
        target: Pictures `(B, 3, H, W)` in [-1, 1].
        kind: Which of the two.

    Returns:
        A scalar; 2 or 4 for black against white.

    Raises:
        ValueError: If the shapes differ or the kind is unknown.
    """
    _check_shapes("pixels", pixels, "target", target)
    if kind == "l1":
        return F.l1_loss(pixels.float(), target.float())
    if kind == "l2":
        return F.mse_loss(pixels.float(), target.float())
    raise ValueError(f"kind={kind!r} is not one of l1, l2.")


def semantic_loss(predicted_features: torch.Tensor, target_features: torch.Tensor) -> torch.Tensor:
    """Compute `1 - cosine similarity` between two feature grids, averaged over batch and positions.

    VFMTok's semantic reconstruction objective (arXiv 2507.08441, "feature reconstruction", weight 1 there); its
    code has `mean(1 - cos(F_hat, F))` over the channels, with F the frozen encoder's last layer after its norm.

    Args:
        predicted_features: `(B, D, h, w)`, from a decoder or from the frozen encoder on the reconstruction.
        target_features: `(B, D, h, w)`, of the picture; detach them, or compute them without gradients.

    Returns:
        A scalar in [0, 2]. A position where a vector is zero counts 1.

    Raises:
        ValueError: If the shapes differ or are not `(B, D, h, w)`.
    """
    _check_shapes("predicted_features", predicted_features, "target_features", target_features)
    if target_features.ndim != 4:
        raise ValueError(f"Features have shape {tuple(target_features.shape)}; expected (B, D, h, w).")
    return 1 - F.cosine_similarity(predicted_features.float(), target_features.float(), dim=1, eps=1e-6).mean()


def hinge_discriminator_loss(real_logits: torch.Tensor, fake_logits: torch.Tensor) -> torch.Tensor:
    """Compute `(mean max(0, 1 - real) + mean max(0, 1 + fake)) / 2`.

    Lim and Ye, "Geometric GAN" (arXiv 1705.02894), with the factor 1/2 of VQGAN's code (arXiv 2012.09841).

    Args:
        real_logits: Of pictures, any shape.
        fake_logits: Of reconstructions, any shape.

    Returns:
        A scalar; 1 for a discriminator that says 0, 0 once all logits are beyond 1 on their own side.
    """
    return 0.5 * (F.relu(1 - real_logits.float()).mean() + F.relu(1 + fake_logits.float()).mean())


def non_saturating_discriminator_loss(real_logits: torch.Tensor, fake_logits: torch.Tensor) -> torch.Tensor:
    """Compute `(mean softplus(-real) + mean softplus(fake)) / 2`, the mean binary cross-entropy.

    Goodfellow et al., "Generative Adversarial Networks" (arXiv 1406.2661), equation 1 with its sign turned, and the
    factor 1/2 of VQGAN's code.

    Args:
        real_logits: Of pictures, any shape.
        fake_logits: Of reconstructions, any shape.

    Returns:
        A scalar; log 2 for a discriminator that says 0.
    """
    return 0.5 * (F.softplus(-real_logits.float()).mean() + F.softplus(fake_logits.float()).mean())


def discriminator_loss(
    real_logits: torch.Tensor, fake_logits: torch.Tensor, kind: AdversarialLossKind = "hinge"
) -> torch.Tensor:
    """Compute the loss of this kind: `hinge_discriminator_loss` or `non_saturating_discriminator_loss`.

    Raises:
        ValueError: If the kind is unknown.
    """
    if kind == "hinge":
        return hinge_discriminator_loss(real_logits, fake_logits)
    if kind == "non_saturating":
        return non_saturating_discriminator_loss(real_logits, fake_logits)
    raise ValueError(f"kind={kind!r} is not one of hinge, non_saturating.")


def generator_loss(fake_logits: torch.Tensor, kind: AdversarialLossKind = "hinge") -> torch.Tensor:
    """Compute what the tokenizer pays for logits of its reconstructions.

    `hinge` is `-mean(fake)`, its gradient the same for every logit; `non_saturating` is `mean softplus(-fake)`, whose
    gradient fades where the discriminator is already fooled. VFMTok trains its discriminator with the former and its
    tokenizer with the latter.

    Args:
        fake_logits: Of reconstructions, any shape.
        kind: Which of the two.

    Returns:
        A scalar; the hinge one is unbounded below.

    Raises:
        ValueError: If the kind is unknown.
    """
    if kind == "hinge":
        return -fake_logits.float().mean()
    if kind == "non_saturating":
        return F.softplus(-fake_logits.float()).mean()
    raise ValueError(f"kind={kind!r} is not one of hinge, non_saturating.")


def adaptive_weight(
    reconstruction_loss: torch.Tensor,
    adversarial_loss: torch.Tensor,
    last_layer: torch.Tensor,
    max_weight: float = 1e4,
    reduce: Reduce | None = None,
) -> torch.Tensor:
    """Compute the weight that lets the adversarial loss pull as hard on the last layer as the reconstruction loss.

    `|grad reconstruction| / (|grad adversarial| + 1e-6)`, both at the weight of the decoder's last layer: VQGAN
    (arXiv 2012.09841), equation 7, where the delta is 1e-6 (its code has 1e-4). Both losses keep their graphs.

    Args:
        reconstruction_loss: Scalar, pixel and perceptual loss together in VQGAN.
        adversarial_loss: Scalar of `generator_loss`.
        last_layer: The parameter, for example `decoder.conv_out.weight`.
        max_weight: The result is clamped to [0, `max_weight`].
        reduce: Averages a tensor over processes, so that all get the weight that one process would with all their
            pictures; without it, each has its own.

    Returns:
        A detached scalar, float32 and always finite: 0 if either gradient has NaN or infinite values, which leaves the
        adversarial loss out of this step; `max_weight` if the adversarial gradient is zero and the other is not.

    Raises:
        ValueError: If a loss does not depend on `last_layer`, or `max_weight` is negative or not finite.
    """
    if not 0 <= max_weight < math.inf:
        raise ValueError(f"max_weight={max_weight} is not a finite number of at least 0.")
    norms = []
    for name, loss in (("reconstruction_loss", reconstruction_loss), ("adversarial_loss", adversarial_loss)):
        gradient = _gradient(name, loss, last_layer)
        norms.append(torch.linalg.vector_norm(gradient if reduce is None else reduce(gradient)))
    weight = (norms[0] / (norms[1] + 1e-6)).clamp(0, max_weight)
    finite = norms[0].isfinite() & norms[1].isfinite()
    return torch.where(finite, weight, torch.zeros_like(weight)).detach()


def _gradient(name: str, loss: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    gradient = None
    if loss.requires_grad:
        (gradient,) = torch.autograd.grad(loss, parameter, retain_graph=True, allow_unused=True)
    if gradient is None:
        raise ValueError(f"{name} does not depend on last_layer of shape {tuple(parameter.shape)}.")
    return gradient.detach().float()


@dataclass(frozen=True)
class AdversarialSchedule:
    """When the discriminator learns, and how much it counts: first not at all, then alone, then rising linearly.

    Steps are optimizer steps, counted from 0. A discriminator that enters the tokenizer's loss untrained pushes it in
    random directions, so it learns `warmup_steps` on its own before.

    Attributes:
        start_step: The first step in which the discriminator learns.
        warmup_steps: How many steps it learns before it enters the tokenizer's loss.
        ramp_steps: In how many steps its weight rises from 0 to `final_weight`; 0 is a jump.
        final_weight: What it is then; 0 turns all of this off.

    Raises:
        ValueError: If one is negative, or the weight not finite.
    """

    start_step: int = 0
    warmup_steps: int = 0
    ramp_steps: int = 0
    final_weight: float = 0.5

    def __post_init__(self):
        for name in ("start_step", "warmup_steps", "ramp_steps", "final_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} is not a finite number of at least 0.")

    def trains_discriminator(self, step: int) -> bool:
        """Tell whether the discriminator learns in this step."""
        return self.final_weight > 0 and step >= self.start_step

    def weight(self, step: int) -> float:
        """Return the weight of the adversarial loss in the tokenizer's loss: 0 up to the end of the warm-up."""
        past = step - self.start_step - self.warmup_steps
        if past < 0:
            return 0.0
        return self.final_weight * min(1.0, past / self.ramp_steps if self.ramp_steps else 1.0)


class StepGuard:
    """Decide which steps to skip because a loss or gradient is not finite, and when to give up.

    Ask once for every optimizer step, after the backward pass and before `optimizer.step()`, with everything that has
    to be finite: losses and norms of gradients. Asking twice in a step would count it twice, and a finite loss would
    end a row of infinite gradients.

    Args:
        max_consecutive: Skipped steps in a row to put up with.
        max_total: Skipped steps to put up with in the whole run.
        reduce: Sums a tensor over processes, so that all skip a step if one has to; for example
            `lambda flag: accelerator.reduce(flag, "sum")`. Without it, there is one process.

    Attributes:
        skipped: Steps skipped so far.
        consecutive: Of these, the ones since the last good step.
    """

    def __init__(self, max_consecutive: int = 10, max_total: int = 100, reduce: Reduce | None = None):
        for name, limit in (("max_consecutive", max_consecutive), ("max_total", max_total)):
            if limit < 0:
                raise ValueError(f"{name}={limit} is negative.")
        self.max_consecutive = max_consecutive
        self.max_total = max_total
        self.reduce = reduce
        self.skipped = 0
        self.consecutive = 0

    def ok(self, *values: torch.Tensor) -> bool:
        """Tell whether all values are finite on all processes, and count the step if not.

        On a GPU this waits for the values.

        Args:
            *values: Losses, norms of gradients; of any shape, all on one device.

        Returns:
            False if the step is to be skipped.

        Raises:
            FloatingPointError: If that was one skipped step too many, in a row or in total; on all processes at once.
            ValueError: If there are no values.
        """
        if not values:
            raise ValueError("There are no values to check.")
        bad = torch.stack([(~value.detach().isfinite()).any() for value in values]).any().float()
        if self.reduce is not None:
            bad = self.reduce(bad)
        if not bad.item():
            self.consecutive = 0
            return True
        self.skipped += 1
        self.consecutive += 1
        self._check_limits()
        return False

    def _check_limits(self) -> None:
        for count, limit, scope in (
            (self.consecutive, self.max_consecutive, "in a row"),
            (self.skipped, self.max_total, "in total"),
        ):
            if count > limit:
                raise FloatingPointError(
                    f"A loss or gradient is not finite after {count} skipped steps {scope}; the limit is {limit}. "
                    "Lower the learning rate or the adversarial weight, or train in bfloat16 or float32."
                )

    def state_dict(self) -> dict[str, int]:
        """Return the counts, as plain numbers."""
        return {"skipped": self.skipped, "consecutive": self.consecutive}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Restore what `state_dict` returned."""
        self.skipped, self.consecutive = int(state["skipped"]), int(state["consecutive"])


def _check_shapes(name: str, values: torch.Tensor, target_name: str, target: torch.Tensor) -> None:
    if values.shape != target.shape:
        raise ValueError(f"{name} {tuple(values.shape)} and {target_name} {tuple(target.shape)} differ in shape.")
