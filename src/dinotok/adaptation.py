"""Take a denoiser that was trained on one autoencoder's latents to another's."""

from typing import Any, TypeVar

import torch
from diffusers.models.modeling_utils import ModelMixin

DenoiserT = TypeVar("DenoiserT", bound=ModelMixin)


@torch.no_grad()
def adapt_denoiser(
    denoiser: DenoiserT,
    in_channels: int,
    out_channels: int | None = None,
    patch_size: int | None = None,
    sample_size: int | None = None,
) -> tuple[DenoiserT, list[str]]:
    """Copy a denoiser for other latents: all its weights, but new projections from and to them.

    The copy has to be trained: it knows the new latents no more than an untrained one does, only the rest of its work.
    The projection from latents begins as in an untrained model and the one to latents at zero, so the copy first
    predicts zero and not noise.

    `from_pretrained(..., ignore_mismatched_sizes=True)` of diffusers 0.42 is no substitute: it leaves the new weights
    as memory happens to be, NaN included.

    Args:
        denoiser: `UNet2DConditionModel`, `DiTTransformer2DModel`, `SD3Transformer2DModel`, `FluxTransformer2DModel`,
            `DiffusionTransformer2DModel` or another whose config has `in_channels`.
        in_channels: Of what it gets: the latents' channels; four times as many for Flux, which joins 2 x 2 latents.
        out_channels: Of what it predicts; `in_channels` by default. Twice as many for a learned variance.
        patch_size: Latents per token and side; the denoiser's own by default.
        sample_size: Rows and columns of latents that a pipeline draws by default; likewise.

    Returns:
        The copy, and the names of its new parameters.

    Raises:
        ValueError: If the denoiser's config does not have what is to be changed.
    """
    changes = {"in_channels": in_channels, "patch_size": patch_size, "sample_size": sample_size}
    changes = {name: value for name, value in changes.items() if value is not None}
    if out_channels is not None or "out_channels" in denoiser.config:
        changes["out_channels"] = in_channels if out_channels is None else out_channels
    for name in changes:
        if name not in denoiser.config:
            raise ValueError(f"{type(denoiser).__name__} has no {name} in its config.")
    copy = type(denoiser).from_config(_all_values(denoiser.config) | changes).to(denoiser.device)
    known = denoiser.state_dict()
    kept = {name: known[name].clone() for name, own in copy.state_dict().items() if _fits(own, known.get(name))}
    copy.load_state_dict(kept, strict=False, assign=True)  # some weights stay float32 whatever the rest is
    new = [name for name, _ in copy.named_parameters() if name not in kept]
    for name in new:
        parameter = copy.get_parameter(name)
        parameter.data = parameter.data.to(denoiser.dtype)
        if name not in known or len(parameter) != len(known[name]):  # its rows are channels of latents
            parameter.zero_()
    return copy.train(denoiser.training), new


def _all_values(config: Any) -> dict[str, Any]:
    """A config whose values are all meant, defaults or not."""
    return {name: value for name, value in config.items() if name not in ("_use_default_values", "_name_or_path")}


def _fits(own: torch.Tensor, other: torch.Tensor | None) -> bool:
    return other is not None and own.shape == other.shape
