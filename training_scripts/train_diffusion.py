"""Train a class-conditional denoiser on the latents of a tokenizer.

    python training_scripts/train_diffusion.py --model diffusion_transformer_s --dataset latents/train \
        --tokenizer TOKENIZER --output_dir runs/diffusion

The data is what `cache_latents.py` wrote, or a labelled data set of pictures, which are then encoded in every step.
Run it under `accelerate launch` or `torchrun` for several processes. An interrupted run goes on with
`--resume_from_checkpoint latest` as if nothing had happened. The result is a whole pipeline in `pipeline` (only the
transformer where there is no tokenizer, only adapters with `--lora_rank`), `training.json` beside it.

The paper's generator (LightningDiT-XL on 832 channels, 80 epochs of ImageNet in batches of 1,024), on 8 processes:

    --model diffusion_transformer_xl --batch_size 128 --max_train_steps 100000 --time_distribution logit_normal \
        --time_shift 1 --mixed_precision bf16

and in the manner of RAE's DiT-DH (arXiv 2510.11690), with the time shift for 832 channels, 7.21:

    --model diffusion_transformer_dh_xl --batch_size 128 --max_train_steps 100000 --mixed_precision bf16
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from diffusers.optimization import get_scheduler
from tqdm import tqdm

from dinotok import DiffusionTransformer2DModel
from dinotok.diffusion_training import (
    LatentSource,
    build_objective,
    build_transformer,
    evaluate,
    make_draws,
    save,
)
from dinotok.hub import load_tokenizer
from dinotok.losses import StepGuard
from dinotok.training import (
    Checkpoints,
    StopRequest,
    averaged,
    make_accelerator,
    make_ema,
    parse_options,
    sum_over_processes,
    trainable,
    training_record,
)

MAX_GRADIENT_NORM, LOGGING_STEPS = 1.0, 20


@dataclass(frozen=True)
class DiffusionOptions:
    """Options of a run; `training.json` beside the weights is one as well.

    Attributes:
        model: A bundled configuration, a JSON file with one, or the folder of a denoiser or pipeline to go on from.
            Channels, classes and size of a configuration are replaced by those of the data.
        dataset: Folder of `cache_latents.py`, or a labelled data set of pictures.
        output_dir: Of the run.
        tokenizer: Folder or Hub repository; needed for pictures and for samples.
        validation_dataset: As `dataset`; not trained on. None by default.
        resolution: Side of the square crops of pictures, in pixels.
        batch_size: Rows per process and step.
        gradient_checkpointing: Save memory, for time.
        max_train_steps: Optimizer steps.
        learning_rate: Of AdamW.
        lr_scheduler: Of diffusers: constant_with_warmup, cosine, ...
        warmup_steps: Of the learning rate.
        class_dropout: Share of samples whose class is the null class.
        time_distribution: uniform or logit_normal.
        time_shift: Of training and sampling times towards noise; by default the one for the size of the latents.
        channel_weighting: none, or decoder: half of the weight of the channels' errors goes to those that move pixels
            most. The minimum of the loss stays; what a small denoiser learns first changes.
        lora_rank: Train adapters of that rank instead of the weights; 0 trains the weights.
        mixed_precision: no or bf16; the loss is in float32 either way.
        ema_decay: Of the averaged weights, which are what is validated, sampled and saved.
        checkpointing_steps: Steps between checkpoints, each with a validation and a sheet of samples.
        resume_from_checkpoint: latest, or the folder of a checkpoint.
        num_workers: Processes that decode pictures.
        seed: Of weights, order, times, noise and dropped classes.
        report_to: tensorboard, wandb or trackio.
    """

    model: str
    dataset: str
    output_dir: str
    tokenizer: str | None = None
    validation_dataset: str | None = None
    resolution: int = 256
    batch_size: int = 32
    gradient_checkpointing: bool = False
    max_train_steps: int = 100000
    learning_rate: float = 2e-4
    lr_scheduler: str = "constant_with_warmup"
    warmup_steps: int = 500
    class_dropout: float = 0.1
    time_distribution: Literal["uniform", "logit_normal"] = "uniform"
    time_shift: float | None = None
    channel_weighting: Literal["none", "decoder"] = "none"
    lora_rank: int = 0
    mixed_precision: str = "no"
    ema_decay: float = 0.9999
    checkpointing_steps: int = 5000
    resume_from_checkpoint: str | None = None
    num_workers: int = 2
    seed: int = 0
    report_to: str | None = None


def main(options: DiffusionOptions) -> DiffusionTransformer2DModel:
    """Train, and return the denoiser with its averaged weights."""
    output = Path(options.output_dir)
    accelerator = make_accelerator(output, options)
    checkpoints = Checkpoints(output, accelerator)
    resumed = checkpoints.find(options.resume_from_checkpoint)
    tokenizer = load_tokenizer(options.tokenizer).to(accelerator.device) if options.tokenizer else None
    source = LatentSource(options.dataset, options, accelerator, tokenizer, training=True)
    validation = None
    if options.validation_dataset:
        validation = LatentSource(options.validation_dataset, options, accelerator, tokenizer, training=False)

    transformer = build_transformer(options, source)
    objective = build_objective(options, transformer, tokenizer, source).to(accelerator.device).train()
    optimizer = torch.optim.AdamW(trainable(objective), options.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    scheduler = get_scheduler(
        options.lr_scheduler,
        optimizer,
        num_warmup_steps=options.warmup_steps,
        num_training_steps=options.max_train_steps,
    )
    ema = make_ema(objective, options.ema_decay)
    ema.to(accelerator.device)
    guard = StepGuard(reduce=sum_over_processes(accelerator))
    wrapped, optimizer = accelerator.prepare(objective, optimizer)
    accelerator.register_for_checkpointing(scheduler, ema, guard)
    step = first = checkpoints.load(resumed)

    scores: dict[str, float] = {}
    progress = tqdm(total=options.max_train_steps, initial=first, disable=not accelerator.is_main_process)
    batches = source.batches(start=first)
    classes, rank = transformer.config.num_classes, accelerator.process_index
    with StopRequest() as stop:
        for step in range(first + 1, options.max_train_steps + 1):
            latents, labels = next(batches)
            losses = wrapped(latents, make_draws(options, latents, labels, classes, step, rank))
            loss = losses.mean()
            accelerator.backward(loss)
            norm = accelerator.clip_grad_norm_(trainable(objective), MAX_GRADIENT_NORM)
            if guard.ok(loss, norm):
                optimizer.step()
                ema.step(trainable(objective))
            scheduler.step()
            optimizer.zero_grad()
            progress.update()
            if step % LOGGING_STEPS == 0:
                values = {"loss": loss.item(), "gradient_norm": norm.item(), "skipped_steps": guard.skipped}
                progress.set_postfix(loss=f"{values['loss']:.4f}")
                accelerator.log({**values, "learning_rate": scheduler.get_last_lr()[0]}, step)
            stopping, last = stop.made(accelerator), step == options.max_train_steps
            if step % options.checkpointing_steps == 0 or stopping or last:
                checkpoints.save(step)
                if not stopping:
                    with averaged(objective, ema):
                        sheet = output / "samples" / f"step-{step:08d}.png"
                        scores = evaluate(objective, source, validation, tokenizer, accelerator, options, sheet)
                    accelerator.log(scores, step)
            if stopping:
                accelerator.print(f"Stopped after step {step}: go on with --resume_from_checkpoint latest.")
                break
    progress.close()
    batches.close()
    ema.copy_to(trainable(objective))
    transformer.eval()
    if accelerator.is_main_process and step == options.max_train_steps:
        record = training_record(options, steps=step, skipped_steps=guard.skipped, **scores)
        folder = save(transformer, tokenizer, source, options, output, record)
        accelerator.print(f"The result is in {folder}.")
    accelerator.end_training()
    return transformer


if __name__ == "__main__":
    main(parse_options(DiffusionOptions))
