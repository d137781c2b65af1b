"""What `training_scripts/train_diffusion.py` is made of, beside its loop."""

import json
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import torch
from accelerate import Accelerator
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.utils import make_image_grid
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import nn

from .configs import config_path
from .data import PictureLoader, PictureTransform, load_pictures, to_pixels
from .flow_matching import dimension_shift, interpolate, sample_times, shift_time, velocity_target
from .folders import write_png
from .latent_caches import LatentLoader, is_latent_cache, open_latent_cache
from .models.discrete import DiscreteTokenizer
from .models.tokenizer_model import TokenizerModel
from .models.transformer_diffusion import DiffusionTransformer2DModel
from .picture_order import mix
from .picture_sources import label_names
from .pipelines.class_conditional_diffusion import DINOTokDiTPipeline  # type: ignore[import-not-found, unused-ignore]
from .training import RECORD_NAME, read_json, write_json

SHEET_CLASSES, SHEET_SEEDS, SHEET_STEPS = 10, 4, 25
WEIGHTING_PICTURES = 4
LORA_MODULES = ["to_q", "to_k", "to_v", "to_out.0", "gate_up", "down"]


class DiffusionOptions(Protocol):
    """The options of the script that are read here; see there."""

    model: str
    resolution: int
    batch_size: int
    gradient_checkpointing: bool
    class_dropout: float
    time_distribution: Any
    time_shift: float | None
    channel_weighting: Literal["none", "decoder"]
    lora_rank: int
    num_workers: int
    seed: int


class LatentSource:
    """Batches of latents: read from a cache, or made from pictures by a tokenizer.

    Args:
        name: Folder of a cache, or a data set of pictures.
        options: Of the run.
        accelerator: Says which share of a batch is this process's, and where it is to be.
        tokenizer: For pictures.
        training: Crop and mirror pictures at random.

    Attributes:
        shape: `(C, h, w)`.
        label_names: Of the classes.

    Raises:
        ValueError: If pictures come without a continuous tokenizer, or the cache is damaged or another tokenizer's.
    """

    def __init__(
        self,
        name: str,
        options: DiffusionOptions,
        accelerator: Accelerator,
        tokenizer: TokenizerModel | None,
        training: bool,
    ):
        ranks = {"rank": accelerator.process_index, "world_size": accelerator.num_processes}
        self.tokenizer, self.accelerator, self.pictures = tokenizer, accelerator, not is_latent_cache(name)
        self.loader: LatentLoader | PictureLoader
        if not self.pictures:
            cache = open_latent_cache(name)
            self.shape, self.label_names = tuple(cache.description.shape), cache.description.label_names
            self.loader = LatentLoader(cache, options.batch_size, seed=options.seed, **ranks)
        else:
            if tokenizer is None or isinstance(tokenizer, DiscreteTokenizer):
                raise ValueError(f"{name!r} is no cache of latents; pictures need a continuous --tokenizer.")
            dataset = load_pictures(name)
            transform = PictureTransform(options.resolution, crop="random" if training else "center", flip=training)
            self.loader = PictureLoader(
                dataset, transform, options.batch_size, seed=options.seed, num_workers=options.num_workers, **ranks
            )
            blank = torch.zeros(1, 3, options.resolution, options.resolution, device=accelerator.device)
            with torch.no_grad():
                self.shape = tuple(tokenizer.encode(blank).latent.shape[1:])
            self.label_names = label_names(dataset)
        if tokenizer is not None and tokenizer.config["latent_channels"] != self.shape[0]:
            raise ValueError(
                f"{name!r} has {self.shape[0]} channels, the tokenizer {tokenizer.config['latent_channels']}."
            )

    def batches(self, start: int = 0) -> Generator[tuple[torch.Tensor, torch.Tensor], None, None]:
        """Yield latents `(B, C, h, w)` float32 and labels without end, on the device."""
        yield from map(self._latents, self.loader.batches(start))

    def once(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield every row once."""
        yield from map(self._latents, self.loader.once())

    @torch.no_grad()
    def _latents(self, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        device = self.accelerator.device
        labels = batch["labels"].to(device)
        if self.tokenizer is None or not self.pictures:
            return batch["latents"].to(device), labels
        with self.accelerator.autocast():
            latents = self.tokenizer.encode(to_pixels(batch["pixel_values"].to(device))).latent
        return latents.float(), labels


class Draws(NamedTuple):
    """What is random in a training step.

    Attributes:
        labels: `(B,)`, some of them the null class.
        times: `(B,)` float32.
        noise: `(B, C, h, w)` float32.
    """

    labels: torch.Tensor
    times: torch.Tensor
    noise: torch.Tensor


class DenoisingObjective(nn.Module):
    """The denoiser and its loss: the mean squared error of the velocity (arXiv 2209.03003, eq. 1), in float32.

    Args:
        transformer: The denoiser.
        channel_weights: `(C,)`, of the channels' errors; 1 by default. Whatever they are, the same velocity has the
            least loss; they say what a small denoiser learns first.
    """

    def __init__(self, transformer: DiffusionTransformer2DModel, channel_weights: torch.Tensor | None = None):
        super().__init__()
        self.transformer = transformer
        weights = torch.ones(1) if channel_weights is None else channel_weights.float()
        self.register_buffer("channel_weights", weights[:, None, None], persistent=False)

    def forward(self, latents: torch.Tensor, draws: Draws) -> torch.Tensor:
        """Return the loss of each row of latents `(B, C, h, w)`, `(B,)`."""
        noisy = interpolate(latents, draws.noise, draws.times)
        velocity = self.transformer(noisy, draws.times, draws.labels).sample.float()
        errors = (velocity - velocity_target(latents, draws.noise)).square() * self.channel_weights
        return errors.mean(dim=(1, 2, 3))


@torch.no_grad()
def channel_weights(tokenizer: TokenizerModel, latents: torch.Tensor) -> torch.Tensor:
    """Weights of the channels' errors: half of it all in equal shares, half by how much a channel moves the pixels.

    The equal shares are for channels that mean something and move few pixels, as the deep part of DINO-Tok's latents.

    Args:
        tokenizer: Decodes latents.
        latents: `(B, C, h, w)`: where it is measured.

    Returns:
        `(C,)` with mean 1: the mean of 1 and of a number in proportion to the root mean square change of the pixels
        when the channel is raised by 1 at the central position.
    """
    row, column = latents.shape[2] // 2, latents.shape[3] // 2
    latents = latents.to(tokenizer.dtype)
    decoded = tokenizer.decode(latents).sample
    changes = []
    for channel in range(latents.shape[1]):
        moved = latents.clone()
        moved[:, channel, row, column] += 1
        changes.append((tokenizer.decode(moved).sample - decoded).float().square().mean().sqrt())
    weights = torch.stack(changes)
    return 0.5 + 0.5 * weights / weights.mean()


def build_objective(
    options: DiffusionOptions,
    transformer: DiffusionTransformer2DModel,
    tokenizer: TokenizerModel | None,
    source: LatentSource,
) -> DenoisingObjective:
    """Put the loss of a run around its denoiser.

    Raises:
        ValueError: If channels are to be weighted by a decoder and there is none.
    """
    if options.channel_weighting == "none":
        return DenoisingObjective(transformer)
    if tokenizer is None:
        raise ValueError(f"channel_weighting={options.channel_weighting!r} needs a --tokenizer.")
    return DenoisingObjective(transformer, channel_weights(tokenizer, next(source.once())[0][:WEIGHTING_PICTURES]))


def time_shift(options: DiffusionOptions, shape: tuple[int, ...]) -> float:
    """Return the shift of the options, or the one for latents `(C, h, w)` of this size."""
    return dimension_shift(torch.Size(shape).numel()) if options.time_shift is None else options.time_shift


def make_draws(
    options: DiffusionOptions, latents: torch.Tensor, labels: torch.Tensor, num_classes: int, step: int, rank: int
) -> Draws:
    """Drop labels, draw times and noise: for each row from the seed, the step and its place in the global batch alone.

    So the draws of several processes, joined in the order of their ranks, are those of one with the joined batch.
    """
    device, shift = latents.device, time_shift(options, tuple(latents.shape[1:]))
    dropped, times, noise = [], [], []
    for row in range(rank * len(labels), (rank + 1) * len(labels)):
        generator = torch.Generator(device).manual_seed(mix("draws", options.seed, step, row))
        dropped.append(torch.rand(1, generator=generator, device=device) < options.class_dropout)
        times.append(sample_times(1, options.time_distribution, shift, generator=generator, device=device))
        noise.append(torch.randn(latents.shape[1:], generator=generator, device=device))
    return Draws(labels.masked_fill(torch.cat(dropped), num_classes), torch.cat(times), torch.stack(noise))


def build_transformer(options: DiffusionOptions, source: LatentSource) -> DiffusionTransformer2DModel:
    """Build the denoiser for the data, or load one that fits it; freeze it and add adapters for LoRA.

    Raises:
        ValueError: If a loaded one has other channels or classes than the data.
    """
    channels, height, width = source.shape
    data = {"in_channels": channels, "num_classes": len(source.label_names)}
    if Path(options.model).is_dir():
        folder = Path(options.model)
        folder = folder / "transformer" if (folder / "model_index.json").is_file() else folder
        model = DiffusionTransformer2DModel.from_pretrained(folder)
        for name, value in data.items():
            if model.config[name] != value:
                raise ValueError(f"{options.model!r} has {name}={model.config[name]}, but the data has {value}.")
    else:
        config = read_json(options.model if options.model.endswith(".json") else config_path(options.model))
        model = DiffusionTransformer2DModel.from_config({**config, **data, "sample_size": max(height, width)})
    if options.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    if options.lora_rank:
        model.requires_grad_(False)
        model.add_adapter(LoraConfig(r=options.lora_rank, lora_alpha=options.lora_rank, target_modules=LORA_MODULES))
    return model


@torch.no_grad()
def validate(
    objective: DenoisingObjective, source: LatentSource, accelerator: Accelerator, options: DiffusionOptions
) -> dict[str, float]:
    """Return the mean loss on validation latents, with the same times and noise every time, evenly over the times."""
    shift, rank = time_shift(options, source.shape), accelerator.process_index
    total = torch.zeros(2, device=accelerator.device)
    for number, (latents, labels) in enumerate(source.once()):
        generator = torch.Generator(latents.device).manual_seed(mix("validation", number, rank))
        noise = torch.randn(latents.shape, generator=generator, device=latents.device)
        times = shift_time((torch.arange(len(labels), device=latents.device) + 0.5) / len(labels), shift)
        losses = objective(latents, Draws(labels, times, noise))
        total += torch.stack([losses.sum(), losses.new_tensor(len(losses))])
    loss, count = accelerator.reduce(total, "sum").tolist()
    return {"validation/loss": loss / count}


def make_pipeline(
    transformer: DiffusionTransformer2DModel,
    tokenizer: TokenizerModel,
    source: LatentSource,
    options: DiffusionOptions,
) -> DINOTokDiTPipeline:
    """Join what was trained and the tokenizer, with the times it was trained on."""
    shift = options.time_shift
    scheduler = FlowMatchEulerDiscreteScheduler(
        shift=1.0 if shift is None else shift, use_dynamic_shifting=shift is None, time_shift_type="linear"
    )
    return DINOTokDiTPipeline(transformer, tokenizer, scheduler, id2label=dict(enumerate(source.label_names)))


def draw_sheet(pipeline: DINOTokDiTPipeline, source: LatentSource, path: Path, seed: int) -> None:
    """Draw a row of pictures of each of the first classes, without guidance, always from the same noise."""
    labels = range(min(SHEET_CLASSES, len(source.label_names)))
    pipeline.set_progress_bar_config(disable=True)
    images = []
    for label in labels:
        generators = [torch.Generator().manual_seed(mix(seed, label, column)) for column in range(SHEET_SEEDS)]
        images += pipeline(
            label,
            num_inference_steps=SHEET_STEPS,
            num_images_per_label=SHEET_SEEDS,
            height=source.shape[1] * pipeline.vae_scale_factor,
            width=source.shape[2] * pipeline.vae_scale_factor,
            generator=generators,
        ).images
    write_png(make_image_grid(images, len(labels), SHEET_SEEDS), path)


def evaluate(
    objective: DenoisingObjective,
    source: LatentSource,
    validation: LatentSource | None,
    tokenizer: TokenizerModel | None,
    accelerator: Accelerator,
    options: DiffusionOptions,
    sheet: Path,
) -> dict[str, float]:
    """Score validation latents if there are any, and draw a sheet of samples if there is a tokenizer.

    Args:
        objective: With the weights to be scored, in evaluation mode.
        source: Of the training latents: their classes and size.
        validation: Its latents.
        tokenizer: Decodes samples.
        accelerator: Sums over processes; the main one draws.
        options: Of the run.
        sheet: Where to.

    Returns:
        Scores by name.
    """
    scores = {} if validation is None else validate(objective, validation, accelerator, options)
    if scores:
        numbers = {name: round(value, 5) for name, value in scores.items()}
        accelerator.print(json.dumps({"file": sheet.stem, **numbers}))
    if tokenizer is not None and accelerator.is_main_process:
        draw_sheet(make_pipeline(objective.transformer, tokenizer, source, options), source, sheet, options.seed)
    return scores


def save(
    transformer: DiffusionTransformer2DModel,
    tokenizer: TokenizerModel | None,
    source: LatentSource,
    options: DiffusionOptions,
    output: Path,
    record: dict[str, Any],
) -> Path:
    """Write the result: adapters, a pipeline, or without a tokenizer the transformer alone.

    Returns:
        Its folder.
    """
    if options.lora_rank:
        folder = output / "lora"
        DINOTokDiTPipeline.save_lora_weights(folder, transformer_lora_layers=get_peft_model_state_dict(transformer))
    elif tokenizer is None:
        folder = output / "transformer"
        transformer.save_pretrained(folder)
    else:
        folder = output / "pipeline"
        make_pipeline(transformer, tokenizer, source, options).save_pretrained(folder)
    write_json(folder / RECORD_NAME, record)
    return folder
