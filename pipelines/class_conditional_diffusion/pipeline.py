"""Class-conditional pictures from a diffusion transformer and an image tokenizer. Part of dinotok (Apache-2.0).

`save_pretrained` puts this file beside the weights as `pipeline.py`; it needs `pip install dinotok`.
"""

import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import diffusers.pipelines
import torch
from diffusers import (
    AutoencoderRAE,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    ImagePipelineOutput,
)
from diffusers.image_processor import VaeImageProcessor
from diffusers.loaders import SanaLoraLoaderMixin
from diffusers.models.modeling_utils import ModelMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor

import dinotok
from dinotok.flow_matching import dimension_shift, set_sigmas, sigma_grid
from dinotok.models.transformer_diffusion import DiffusionTransformer2DModel
from dinotok.pipeline_helpers import ClassLabels, PipelineCodeMixin, class_ids

# Where diffusers looks for the class of a component that `model_index.json` lists as ["dinotok", class].
diffusers.pipelines.dinotok = dinotok

_LORA_FILE = "pytorch_lora_weights.safetensors"


class DINOTokDiTPipeline(PipelineCodeMixin, DiffusionPipeline, SanaLoraLoaderMixin):
    """Draw pictures of classes: noise, flow matching in the latents of a tokenizer, decoding.

    LoRA adapters of the transformer load as in other pipelines: `load_lora_weights`, `set_adapters`, `fuse_lora`, ...
    (diffusers' loader for pipelines whose only adapted part is a transformer).

    Args:
        transformer: Predicts the velocity of noisy latents.
        vae: A tokenizer of dinotok, or diffusers' `AutoencoderKL` or `AutoencoderRAE`.
        scheduler: Flow-matching scheduler. With `use_dynamic_shifting` in its config, times are shifted by
            `sqrt(channels * height * width / 4096)` of the latents of each call, otherwise by its `shift`.
        guide: A weaker transformer on the same latents (fewer steps or layers). With it, guidance is AutoGuidance
            (Karras et al., arXiv 2406.02507); without it, classifier-free guidance.
        id2label: Names by class id; several names of one class are separated by commas.

    Raises:
        ValueError: If the transformer is for another number of channels than the autoencoder has.
    """

    model_cpu_offload_seq = "guide->transformer->vae"
    _optional_components = ["guide"]
    _callback_tensor_inputs = ["latents"]

    def __init__(
        self,
        transformer: DiffusionTransformer2DModel,
        vae: ModelMixin,
        scheduler: SchedulerMixin,
        guide: DiffusionTransformer2DModel | None = None,
        id2label: dict[int, str] | dict[str, str] | None = None,
    ):
        super().__init__()
        self.register_modules(transformer=transformer, vae=vae, scheduler=scheduler, guide=guide)
        self.register_to_config(id2label=id2label and {str(index): name for index, name in id2label.items()})
        _check_channels(transformer, vae)
        self.vae_scale_factor = _pixels_per_latent(vae)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)

    # ------------------------------------------------------------------------------------------------ generation

    @torch.no_grad()
    def __call__(
        self,
        class_labels: ClassLabels,
        num_inference_steps: int = 50,
        guidance_scale: float = 1.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        height: int | None = None,
        width: int | None = None,
        num_images_per_label: int = 1,
        sigmas: Sequence[float] | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[DiffusionPipeline, int, torch.Tensor, dict[str, Any]], dict] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple:
        """Draw pictures.

        Args:
            class_labels: Class ids, or names that `id2label` knows: one or several.
            num_inference_steps: Steps of the solver. Euler evaluates the denoiser once in each, Heun twice in each
                but the last.
            guidance_scale: How far the velocity is moved away from that of the null class, or of the `guide`. 1 is no
                guidance, and costs half.
            guidance_interval: Times between which guidance acts, in [0, 1]; 1 is noise.
            height: Of the pictures in pixels; the transformer's `sample_size` by default.
            width: Likewise.
            num_images_per_label: Pictures of each label.
            sigmas: Noise levels from 1 down, the last one where sampling ends, instead of equal steps shifted
                towards noise; such as `dinotok.flow_matching.reference_sigma_grid`. Replaces `num_inference_steps`.
            generator: Source of the noise: one for all, or one for each picture, so that no picture depends on the
                rest of the batch.
            latents: `(B, C, h, w)` noise to start from.
            output_type: `pil`, `np` `(B, H, W, 3)` or `pt` `(B, 3, H, W)` in [0, 1], or `latent` as the transformer
                models them.
            return_dict: Return an output object rather than a tuple.
            callback_on_step_end: Called as `callback(pipeline, step, timestep, tensors)` after each evaluation; may
                return changed tensors.
            callback_on_step_end_tensor_inputs: Which tensors it gets: `latents`.

        Returns:
            `.images`: label by label, `num_images_per_label` of each.

        Raises:
            ValueError: If a label is unknown, a size no multiple of a patch, or another argument out of range.
        """
        _check_options(guidance_interval, num_images_per_label, output_type, callback_on_step_end_tensor_inputs)
        device = self._execution_device
        labels = torch.tensor(self.label_ids(class_labels), device=device).repeat_interleave(num_images_per_label)
        latents = self._prepare_latents(len(labels), height, width, generator, latents, device)
        self._set_timesteps(num_inference_steps, sigmas, latents[0].numel(), device)
        options = self._step_options(generator)
        timesteps = self.scheduler.timesteps
        self._guidance_scale, self._num_timesteps = guidance_scale, len(timesteps)
        times = (timesteps / self.scheduler.config.num_train_timesteps).tolist()
        with self.progress_bar(total=len(timesteps)) as progress:
            for index, (timestep, time) in enumerate(zip(timesteps, times, strict=True)):
                scale = self._guidance_scale if guidance_interval[0] <= time <= guidance_interval[1] else 1.0
                velocity = self._velocity(latents, time, labels, scale)
                latents = self.scheduler.step(velocity, timestep, latents, return_dict=False, **options)[0]
                if callback_on_step_end is not None:
                    tensors = {name: latents for name in callback_on_step_end_tensor_inputs}
                    latents = callback_on_step_end(self, index, timestep, tensors).get("latents", latents)
                progress.update()
        images = latents if output_type == "latent" else self._decode(latents)
        images = self.image_processor.postprocess(images, output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    @property
    def guidance_scale(self) -> float:
        """Of the running call; a callback may set `_guidance_scale`, as in diffusers' pipelines."""
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        """Evaluations of the running call, counted once each whatever guidance costs."""
        return self._num_timesteps

    def _velocity(self, latents: torch.Tensor, time: float, labels: torch.Tensor, scale: float) -> torch.Tensor:
        """Return the velocity at a time, float32, guided unless the scale is 1."""

        def predict(model: DiffusionTransformer2DModel, latents: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            moment = torch.full((len(labels),), time, device=latents.device)
            return model(latents.to(model.dtype), moment, labels, return_dict=False)[0].float()

        if scale == 1:
            return predict(self.transformer, latents, labels)
        if self.guide is not None:
            strong, weak = predict(self.transformer, latents, labels), predict(self.guide, latents, labels)
        else:
            null = torch.full_like(labels, self.transformer.config.num_classes)
            both = predict(self.transformer, torch.cat([latents, latents]), torch.cat([labels, null]))
            strong, weak = both.chunk(2)
        return weak + scale * (strong - weak)

    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Turn latents as the transformer models them into pixels in [-1, 1].

        The tokenizers of dinotok and `AutoencoderRAE` normalise latents themselves; those of other autoencoders are
        scaled by whoever uses them. `AutoencoderRAE` speaks of pixels in [0, 1].
        """
        if not (_is_tokenizer(self.vae) or isinstance(self.vae, AutoencoderRAE)):
            latents = _unscaled(latents, self.vae.config)
        pixels = self.vae.decode(latents.to(self.vae.dtype), return_dict=False)[0].float()
        return 2 * pixels - 1 if isinstance(self.vae, AutoencoderRAE) else pixels

    # ----------------------------------------------------------------------------------------------- preparation

    def label_ids(self, labels: ClassLabels) -> list[int]:
        """Return class ids of ids or names, in a list.

        Args:
            labels: One or several. Names are compared without regard to case, whole or each of the comma-separated.

        Raises:
            ValueError: If an id is out of range, or a name is unknown or that of several classes.
        """
        return class_ids(labels, self.transformer.config.num_classes, self.config.id2label)

    def _prepare_latents(
        self,
        batch: int,
        height: int | None,
        width: int | None,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None,
        device: torch.device,
    ) -> torch.Tensor:
        """Return float32 noise, or check what was passed."""
        config, factor = self.transformer.config, self.vae_scale_factor
        size = [config.sample_size * factor if side is None else side for side in (height, width)]
        unit = factor * config.patch_size
        if any(side <= 0 or side % unit for side in size):
            raise ValueError(
                f"Height and width must be positive multiples of {unit} (patches of {config.patch_size} latents of "
                f"{factor} pixels), got {size[0]}x{size[1]}."
            )
        if isinstance(self.vae, AutoencoderRAE) and set(size) != {self.vae.config.image_size}:
            raise ValueError(f"AutoencoderRAE decodes {self.vae.config.image_size} px squares only, got {size}.")
        shape = (batch, config.in_channels, size[0] // factor, size[1] // factor)
        if isinstance(generator, list) and len(generator) != batch:
            raise ValueError(f"{len(generator)} generators were passed for {batch} pictures.")
        if latents is None:
            return randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        if tuple(latents.shape) != shape and (height, width) != (None, None):
            raise ValueError(f"Latents must have shape {shape}, got {tuple(latents.shape)}.")
        if latents.ndim != 4 or latents.shape[:2] != shape[:2]:
            raise ValueError(f"Latents must have shape ({batch}, {shape[1]}, h, w), got {tuple(latents.shape)}.")
        return latents.to(device, torch.float32)

    def _set_timesteps(
        self, num_steps: int, sigmas: Sequence[float] | None, dimension: int, device: torch.device
    ) -> None:
        """Give the scheduler its noise levels."""
        if isinstance(self.scheduler, FlowMatchEulerDiscreteScheduler | FlowMatchHeunDiscreteScheduler):
            dynamic = self.scheduler.config.get("use_dynamic_shifting")
            shift = dimension_shift(dimension) if dynamic else self.scheduler.config.shift
            set_sigmas(self.scheduler, sigmas or sigma_grid(num_steps, shift), device)
        elif sigmas is not None:
            raise ValueError(
                f"sigmas are for the flow-matching schedulers; this one is {type(self.scheduler).__name__}."
            )
        else:
            self.scheduler.set_timesteps(num_steps, device=device)

    def _step_options(self, generator: torch.Generator | list[torch.Generator] | None) -> dict[str, Any]:
        takes_generator = "generator" in inspect.signature(self.scheduler.step).parameters
        return {"generator": generator} if takes_generator else {}

    # ------------------------------------------------------------------------------------------------ files

    def load_lora_weights(
        self, pretrained_model_name_or_path_or_dict: str | os.PathLike[str] | dict[str, torch.Tensor], **kwargs
    ) -> None:
        """Load a LoRA adapter of the transformer; see diffusers' method of this name.

        Args:
            pretrained_model_name_or_path_or_dict: Folder, repository or weights.
            **kwargs: `adapter_name`, `weight_name` (by default what `save_lora_weights` writes), ...
        """
        if not isinstance(pretrained_model_name_or_path_or_dict, dict):
            kwargs.setdefault("weight_name", _LORA_FILE)  # which diffusers does not guess offline
            kwargs.setdefault("use_safetensors", True)
        super().load_lora_weights(pretrained_model_name_or_path_or_dict, **kwargs)


def _check_channels(transformer: DiffusionTransformer2DModel, vae: ModelMixin) -> None:
    channels = vae.config["encoder_hidden_size" if isinstance(vae, AutoencoderRAE) else "latent_channels"]
    if transformer.config.in_channels != channels:
        raise ValueError(
            f"The transformer models {transformer.config.in_channels} channels, but the latents of this "
            f"{type(vae).__name__} have {channels}."
        )


def _is_tokenizer(vae: ModelMixin) -> bool:
    """Whether it is one of dinotok, also if its class is the copy that lies beside the weights on the Hub."""
    return "encoder_digest" in vae.config


def _unscaled(latents: torch.Tensor, config: Mapping[str, Any]) -> torch.Tensor:
    """Undo what pipelines of diffusers do to latents: SD3's scale and shift, or SDXL's statistics per channel."""
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is not None and std is not None:
        mean, std = (latents.new_tensor(values)[:, None, None] for values in (mean, std))
        return latents * std / config["scaling_factor"] + mean
    return latents / config["scaling_factor"] + (config.get("shift_factor") or 0.0)


def _pixels_per_latent(vae: ModelMixin) -> int:
    if _is_tokenizer(vae) or isinstance(vae, AutoencoderRAE):
        return vae.config.patch_size
    return 2 ** (len(vae.config.block_out_channels) - 1)


def _check_options(
    guidance_interval: tuple[float, float], num_images_per_label: int, output_type: str, tensor_inputs: Sequence[str]
) -> None:
    low, high = guidance_interval
    if not 0 <= low <= high <= 1:
        raise ValueError(f"guidance_interval={guidance_interval} must be two times in order, within [0, 1].")
    if num_images_per_label < 1:
        raise ValueError(f"num_images_per_label={num_images_per_label} must be at least 1.")
    if output_type not in ("pil", "np", "pt", "latent"):
        raise ValueError(f"output_type={output_type!r} is none of 'pil', 'np', 'pt', 'latent'.")
    if set(tensor_inputs) - {"latents"}:
        raise ValueError(f"callback_on_step_end_tensor_inputs={list(tensor_inputs)} may name 'latents' only.")
