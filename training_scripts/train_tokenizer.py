"""Train an image tokenizer on a frozen encoder: continuous or discrete, DINO-Tok or VFMTok.

    python training_scripts/train_tokenizer.py --model RECIPE --dataset PICTURES --output_dir runs/tokenizer

The model is a recipe (JSON: the class, the frozen encoder and the constructor's arguments) or a tokenizer to go on
from. A new one is first fitted in closed form. Run the script under `accelerate launch` or `torchrun` for several
processes; README.md beside it has the recipes of the papers. Everything that a run needs to go on, or to be run again,
is in its output folder: `start` (the tokenizer before training), checkpoints, `validation`, and `tokenizer`, the
result, with `training.json`.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from tqdm import tqdm

from dinotok.data import PictureLoader, PictureTransform, load_pictures, pixel_batches, to_pixels
from dinotok.hub import load_tokenizer
from dinotok.losses import AdversarialSchedule, StepGuard
from dinotok.models.discrete import DiscreteTokenizerModel
from dinotok.models.tokenizer_model import TokenizerModel
from dinotok.tokenizer_training import (
    Adversary,
    TokenizerObjective,
    accumulating,
    build_tokenizer,
    describe,
    fit_tokenizer,
    load_lpips,
    log_validation,
    parse_losses,
    reconstruction_loss,
    validate,
)
from dinotok.training import (
    Checkpoints,
    StopRequest,
    averaged,
    make_accelerator,
    make_ema,
    parse_options,
    publish,
    sum_over_processes,
    trainable,
    training_record,
)

# Crops that closed-form fits see, and at most of each picture.
FIT_CROPS, FIT_CROPS_PER_PICTURE = 8192, 64
MAX_VALIDATION_PICTURES = 1000
WARMUP_SHARE, MAX_GRADIENT_NORM, LOGGING_STEPS = 0.02, 1.0, 20
DISCRIMINATOR_WARMUP, DISCRIMINATOR_RAMP = 500, 1000  # steps it learns alone, and steps until its weight is full


@dataclass(frozen=True)
class TokenizerOptions:
    """Options of a run; `training.json` beside the weights is one as well.

    Attributes:
        model: A recipe (JSON file or bundled name), or a tokenizer's folder or repository to go on from.
        dataset: Folder, parquet file, web data set or name of a data set of pictures.
        output_dir: Of the run.
        validation_dataset: Pictures that are not trained on; by default a tenth of the data set, at most 1,000.
        streaming: Read the data set as a stream rather than by row.
        resolution: Side of the square crops in pixels.
        batch_size: Pictures per process and batch.
        gradient_accumulation_steps: Batches per optimizer step.
        max_train_steps: Optimizer steps.
        learning_rate: Of AdamW, for tokenizer and discriminator, after 2 % of the steps.
        lr_scheduler: Of diffusers: cosine, constant_with_warmup, ...
        mixed_precision: no or bf16; losses are in float32 either way.
        gradient_checkpointing: Save memory in the decoder, for time.
        ema_decay: Of the averaged weights, which are what is validated and saved; 0 for none.
        losses: Weights, as `l1=1 lpips=1`; there are l1, l2, lpips, adversarial, semantic and codebook. Without
            `codebook`, a discrete tokenizer keeps its codes, and only what decodes them is trained.
        perceptual_net: LPIPS weights: a safetensors file, or a folder or repository that has the vgg net's.
        discriminator: patch, or the encoder whose features a discriminator reads.
        adversarial_start: The step in which the discriminator begins to learn.
        checkpointing_steps: Steps between checkpoints, each with a validation.
        resume_from_checkpoint: latest, or the folder of a checkpoint.
        num_workers: Processes that decode pictures.
        seed: Of weights and data.
        report_to: tensorboard, wandb or trackio.
        push_to_hub: Repository that the result is uploaded to.
    """

    model: str
    dataset: str
    output_dir: str
    validation_dataset: str | None = None
    streaming: bool = False
    resolution: int = 256
    batch_size: int = 16
    gradient_accumulation_steps: int = 1
    max_train_steps: int = 100000
    learning_rate: float = 1e-4
    lr_scheduler: str = "cosine"
    mixed_precision: str = "no"
    gradient_checkpointing: bool = False
    ema_decay: float = 0.999
    losses: list[str] = field(default_factory=lambda: ["l1=1", "codebook=1"])
    perceptual_net: str | None = None
    discriminator: str = "patch"
    adversarial_start: int = 5000
    checkpointing_steps: int = 5000
    resume_from_checkpoint: str | None = None
    num_workers: int = 2
    seed: int = 0
    report_to: str | None = None
    push_to_hub: str | None = None


def make_loaders(options: TokenizerOptions, accelerator: Accelerator) -> tuple[PictureLoader, PictureLoader]:
    """Open the training and the validation pictures."""
    pictures = load_pictures(options.dataset, streaming=options.streaming)
    if options.validation_dataset:
        held_out = load_pictures(options.validation_dataset)
    elif options.streaming:
        raise ValueError("A stream cannot be split: pass --validation_dataset.")
    else:
        count = min(max(len(pictures) // 10, 1), MAX_VALIDATION_PICTURES)
        if count >= len(pictures):
            raise ValueError(f"{options.dataset!r} has {len(pictures)} pictures; at least 2 are needed.")
        parts = pictures.train_test_split(test_size=count, seed=options.seed)
        pictures, held_out = parts["train"], parts["test"]
        accelerator.print(f"{count} of {count + len(pictures)} pictures are held out for validation.")
    if len(held_out) > MAX_VALIDATION_PICTURES:
        held_out = held_out.select(range(0, len(held_out), len(held_out) // MAX_VALIDATION_PICTURES))
    shared = {
        "num_workers": options.num_workers,
        "rank": accelerator.process_index,
        "world_size": accelerator.num_processes,
        "label_column": None,
    }
    crops = PictureTransform(options.resolution, crop="random", flip=True)
    centres = PictureTransform(options.resolution, crop="center")
    return (
        PictureLoader(pictures, crops, options.batch_size, seed=options.seed, **shared),
        PictureLoader(held_out, centres, options.batch_size, **shared),
    )


def crops_to_fit(loader: PictureLoader, accelerator: Accelerator) -> Iterator[torch.Tensor]:
    """Yield this process's share of the pixels that closed-form fits see."""
    count = FIT_CROPS if loader.num_samples is None else min(FIT_CROPS, FIT_CROPS_PER_PICTURE * loader.num_samples)
    return pixel_batches(loader, count // accelerator.num_processes)


def start_tokenizer(
    options: TokenizerOptions, start: Path, accelerator: Accelerator, loader: PictureLoader, resuming: bool
) -> TokenizerModel:
    """Build the tokenizer and fit it in closed form, or load what the interrupted run started with."""
    if resuming:
        return load_tokenizer(str(start)).to(accelerator.device)
    tokenizer, is_new = build_tokenizer(options.model)
    tokenizer.to(accelerator.device)
    if is_new:
        accelerator.print(f"Fitting a {type(tokenizer).__name__} in closed form ...")
        fit_tokenizer(tokenizer, lambda: crops_to_fit(loader, accelerator))
    if accelerator.is_main_process:
        tokenizer.save_pretrained(start, include_encoder=tokenizer.config["encoder_repository"] is None)
    accelerator.wait_for_everyone()
    return tokenizer


@dataclass
class Parts:
    """What a run consists of, after `accelerator.prepare`."""

    accelerator: Accelerator
    objective: TokenizerObjective
    wrapped: torch.nn.Module  # the objective, as the accelerator wraps it
    optimizers: list
    scheduler: torch.optim.lr_scheduler.LRScheduler
    ema: EMAModel
    guard: StepGuard
    weights: dict[str, float]
    lpips: torch.nn.Module | None
    adversary: Adversary | None


def build_parts(options: TokenizerOptions, tokenizer: TokenizerModel, accelerator: Accelerator) -> Parts:
    """Build what trains a tokenizer, prepare it and register it for checkpoints."""
    weights = parse_losses(options.losses)
    if isinstance(tokenizer, DiscreteTokenizerModel) and not weights["codebook"]:
        tokenizer.freeze_coding()
    objective = TokenizerObjective(tokenizer, semantic=bool(weights["semantic"]))
    optimizer = torch.optim.AdamW(trainable(objective), options.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    scheduler = get_scheduler(
        options.lr_scheduler,
        optimizer,
        num_warmup_steps=round(WARMUP_SHARE * options.max_train_steps),
        num_training_steps=options.max_train_steps,
    )
    ema, guard = make_ema(objective, options.ema_decay), StepGuard(reduce=sum_over_processes(accelerator))
    wrapped, optimizer = accelerator.prepare(objective, optimizer)
    accelerator.register_for_checkpointing(scheduler, ema, guard)
    optimizers, adversary = [optimizer], None
    if weights["adversarial"]:
        schedule = AdversarialSchedule(
            options.adversarial_start, DISCRIMINATOR_WARMUP, DISCRIMINATOR_RAMP, weights["adversarial"]
        )
        adversary = Adversary(options.discriminator, schedule, accelerator, options.learning_rate)
        optimizers.append(adversary.optimizer)
    lpips = load_lpips(options.perceptual_net, accelerator.device) if weights["lpips"] else None
    return Parts(accelerator, objective, wrapped, optimizers, scheduler, ema, guard, weights, lpips, adversary)


def train_step(parts: Parts, batches: Iterator, step: int, accumulation: int) -> dict[str, torch.Tensor]:
    """Take one optimizer step over several batches, and return the losses of the last by name."""
    tokenizer, accelerator, adversary = parts.objective.tokenizer, parts.accelerator, parts.adversary
    values: dict[str, torch.Tensor] = {}
    for part in range(1, accumulation + 1):
        pixels = to_pixels(next(batches)["pixel_values"].to(accelerator.device))
        with accumulating(parts.wrapped, part == accumulation):
            made = parts.wrapped(pixels)
            loss, values = reconstruction_loss(made, pixels, parts.weights, parts.lpips)
            if adversary is not None:
                term, paid = adversary.term(loss, made.sample, tokenizer.decoder.conv_out.weight, step)
                loss, values = loss + term, values | paid
            loss = loss + parts.weights["codebook"] * made.codebook_loss
            loss = loss + parts.weights["semantic"] * made.semantic_loss
            accelerator.backward(loss / accumulation)
        values |= {"loss": loss}
        if adversary is not None:
            values |= adversary.backward(pixels, made.sample, step, accumulation, part == accumulation)
    norms = [accelerator.clip_grad_norm_(trainable(parts.objective), MAX_GRADIENT_NORM)]
    if adversary is not None:
        norms.append(accelerator.clip_grad_norm_(adversary.parameters, MAX_GRADIENT_NORM))
    if parts.guard.ok(*values.values(), *norms):
        for optimizer in parts.optimizers:
            optimizer.step()
        if parts.weights["codebook"] and hasattr(tokenizer, "update_codebook"):
            tokenizer.update_codebook(made.latents)
        parts.ema.step(trainable(parts.objective))
    parts.scheduler.step()
    for optimizer in parts.optimizers:
        optimizer.zero_grad()
    return values


def score(parts: Parts, validation: PictureLoader, output: Path, step: int) -> dict[str, float]:
    """Validate the averaged weights, and show what was found."""
    accelerator, tokenizer = parts.accelerator, parts.objective.tokenizer
    with averaged(parts.objective, parts.ema):
        found = validate(tokenizer, validation, accelerator, parts.lpips)
    log_validation(found, accelerator, output, step)
    accelerator.print(f"step {step}: {describe(found.scores)}")
    return found.scores


def main(options: TokenizerOptions) -> TokenizerModel:
    """Train, and return the tokenizer with its averaged weights."""
    output, steps = Path(options.output_dir), options.max_train_steps
    accelerator = make_accelerator(output, options)
    loader, validation = make_loaders(options, accelerator)
    checkpoints = Checkpoints(output, accelerator)
    resumed = checkpoints.find(options.resume_from_checkpoint)
    start = resumed.parent / "start" if resumed else output / "start"
    tokenizer = start_tokenizer(options, start, accelerator, loader, resuming=resumed is not None)
    if options.gradient_checkpointing:
        tokenizer.enable_gradient_checkpointing()
    parts = build_parts(options, tokenizer, accelerator)
    step = first = checkpoints.load(resumed)

    scores = {} if resumed else score(parts, validation, output, 0)
    progress = tqdm(total=steps, initial=first, disable=not accelerator.is_main_process)
    accumulation = options.gradient_accumulation_steps
    batches = loader.batches(start=first * accumulation)
    with StopRequest() as stop:
        for step in range(first + 1, steps + 1):
            values = train_step(parts, batches, step - 1, accumulation)
            progress.update()
            if step % LOGGING_STEPS == 0:
                numbers = {name: value.item() for name, value in values.items()}
                progress.set_postfix(loss=f"{numbers['loss']:.4f}")
                numbers |= {"learning_rate": parts.scheduler.get_last_lr()[0], "skipped_steps": parts.guard.skipped}
                accelerator.log(numbers | {"skipped_pictures": loader.num_skipped}, step)
            stopping = stop.made(accelerator)
            if stopping or step == steps or step % options.checkpointing_steps == 0:
                checkpoints.save(step)
                scores = scores if stopping else score(parts, validation, output, step)
            if stopping:
                accelerator.print(f"Stopped after step {step}: go on with --resume_from_checkpoint latest.")
                break
    progress.close()
    batches.close()

    parts.ema.copy_to(trainable(parts.objective))
    tokenizer.eval().fit_latents_statistics(crops_to_fit(loader, accelerator))
    if accelerator.is_main_process:
        record = training_record(options, steps=step, skipped_steps=parts.guard.skipped, **scores)
        publish(tokenizer, output / "tokenizer", record, options.push_to_hub)
        accelerator.print(f"The tokenizer is in {output / 'tokenizer'}: {describe(scores)}")
    accelerator.end_training()
    return tokenizer


if __name__ == "__main__":
    main(parse_options(TokenizerOptions))
