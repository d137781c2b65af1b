"""Inpainting with any pipeline that calls back after each step, whatever the number of its latent channels."""

from typing import Any

import torch
import torch.nn.functional as F


class InpaintingCallback:
    """A `callback_on_step_end` that redraws the masked part of a picture and keeps the rest.

    After each step, the latents outside the mask become the picture's, at the noise level that the step ended at
    (RePaint, arXiv 2201.09865, equation 8a, without its resampling). `StableDiffusionInpaintPipeline` does the same
    with a denoiser of 4 channels, and refuses others than 4 and 9; `StableDiffusion3InpaintPipeline` others than 16
    and 33.

    It fits every pipeline of diffusers and dinotok whose loop holds latents `(B, C, h, w)`. Those of Flux are packed;
    `FluxInpaintPipeline` itself takes any number of channels. Latents must lie where their pixels are: the tokens of
    VFMTok do not.

    Args:
        latents: `(1 or B, C, h, w)`, of the picture, as the denoiser models them: what `encode` of dinotok's
            tokenizers returns, `(latents - shift_factor) * scaling_factor` of others.
        mask: `(1 or B, 1, H, W)`, in pixels or latents; above 0.5 is redrawn. A latent is, if any of its pixels is.
        noise: `(B, C, h, w)`: pass the same to the pipeline, `latents=noise`.

    Raises:
        ValueError: If a shape does not fit the others.
    """

    def __init__(self, latents: torch.Tensor, mask: torch.Tensor, noise: torch.Tensor):
        if noise.ndim != 4 or latents.shape[1:] != noise.shape[1:] or latents.shape[0] not in (1, noise.shape[0]):
            raise ValueError(f"Latents {tuple(latents.shape)} do not fit noise {tuple(noise.shape)}.")
        if mask.ndim != 4 or mask.shape[1] != 1 or mask.shape[0] not in (1, noise.shape[0]):
            raise ValueError(f"The mask must have shape (1 or {noise.shape[0]}, 1, H, W), got {tuple(mask.shape)}.")
        if any(side % cells for side, cells in zip(mask.shape[2:], noise.shape[2:], strict=True)):
            raise ValueError(
                f"The mask is {mask.shape[2]}x{mask.shape[3]}, no multiple of the {noise.shape[2]}x{noise.shape[3]} "
                "latents."
            )
        self.latents, self.noise = latents.expand_as(noise), noise
        self.redrawn = F.adaptive_max_pool2d((mask > 0.5).float(), noise.shape[2:]) > 0  # (1 or B, 1, h, w)

    def __call__(self, pipeline: Any, step: int, timestep: torch.Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        """Return the latents that the pipeline goes on with.

        Args:
            pipeline: With a `scheduler` and `num_timesteps`.
            step: Of the pipeline's loop, from 0.
            timestep: Of that step.
            tensors: With `latents`.

        Raises:
            ValueError: If the pipeline's latents have another shape.
        """
        latents = tensors["latents"]
        if latents.shape != self.noise.shape:
            raise ValueError(f"The pipeline has latents {tuple(latents.shape)}, not {tuple(self.noise.shape)}.")
        left = pipeline.num_timesteps - step - 1
        kept = self.latents.to(latents)
        if left:
            kept = _add_noise(pipeline.scheduler, kept, self.noise.to(latents), pipeline.scheduler.timesteps[-left])
        return {**tensors, "latents": torch.where(self.redrawn.to(latents.device), latents, kept)}


def _add_noise(scheduler: Any, latents: torch.Tensor, noise: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    """Bring latents to the noise level of a time."""
    timesteps = timestep[None].to(latents.device)
    if hasattr(scheduler, "scale_noise"):  # flow matching
        return scheduler.scale_noise(latents, timesteps, noise)
    return scheduler.add_noise(latents, noise, timesteps)
