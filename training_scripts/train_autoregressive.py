"""Train an autoregressive transformer on the tokens of a data set, class-conditionally.

    python training_scripts/train_autoregressive.py --model autoregressive_dinotok_b --dataset tokens/train \
        --tokenizer TOKENIZER --output_dir runs/autoregressive

The data set is what `cache_tokens.py` wrote, or labelled pictures, which are then tokenized on the way. With a
tokenizer, every validation draws a sheet of samples, and the result is a pipeline. Recipes, each with
`--mixed_precision bf16` and the global batch size split over the processes:

    VFMTok GPT-B, L      --model autoregressive_vfmtok_l --batch_size 512 --max_train_steps 750000
    VFMTok RAR-L         --model random_autoregressive_vfmtok_l --batch_size 2048 --max_train_steps 250000 \
                         --learning_rate 4e-4 --lr_scheduler cosine --warmup_steps 62500 --weight_decay 0.03 \
                         --beta_2 0.96 --ema_decay 0 --anneal_steps 125000 187500
    DINO-Tok AR (as in   --model autoregressive_dinotok_l --batch_size 256 --max_train_steps 1500000
    VFMTok's and MGVQ's)
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import ModelMixin
from diffusers.optimization import get_scheduler
from diffusers.utils import make_image_grid
from tqdm import tqdm

from dinotok.autoregressive_training import (
    TokenObjective,
    TokenSource,
    build_transformer,
    conditions,
    validate,
)
from dinotok.folders import write_png
from dinotok.hub import find_tokenizer
from dinotok.losses import StepGuard
from dinotok.models.tokenizer_model import TokenizerModel
from dinotok.picture_order import mix
from dinotok.pipelines.class_conditional_autoregressive import DINOTokARPipeline
from dinotok.training import (
    RECORD_NAME,
    Checkpoints,
    StopRequest,
    averaged,
    make_accelerator,
    make_ema,
    parse_options,
    sum_over_processes,
    trainable,
    training_record,
    write_json,
)

MAX_GRADIENT_NORM, LOGGING_STEPS = 1.0, 20
SHEET_LABELS, SHEET_COLUMNS = 8, 4


@dataclass(frozen=True)
class AutoregressiveOptions:
    """Options of a run; `training.json` beside the weights is one as well.

    Attributes:
        model: A bundled configuration, a JSON file with one, or a folder of a model to go on from. Codebooks, classes
            and grid of a configuration are replaced by those of the data.
        dataset: Folder of `cache_tokens.py`, or a labelled data set of pictures.
        output_dir: Of the run.
        tokenizer: Folder or Hub repository; needed for pictures and for samples. A configuration whose `code_dims`
            are the widths of its codes starts from their vectors.
        validation_dataset: As `dataset`; not trained on. None by default.
        resolution: Side of the square crops of pictures, in pixels.
        batch_size: Rows per process and step.
        gradient_checkpointing: Save memory, for time.
        max_train_steps: Optimizer steps.
        learning_rate: Of AdamW.
        lr_scheduler: Of diffusers: constant_with_warmup, cosine, ...
        warmup_steps: Of the learning rate.
        weight_decay: Of matrices.
        beta_2: Of AdamW; the first is 0.9.
        class_dropout: Share of samples whose class is the null class.
        scored_share: Of the positions, drawn anew for every row; the others are context alone. Below 1, a step with
            large codebooks takes less time and memory; the expected gradient is the same.
        anneal_steps: Of models trained in random orders: the step from which on orders become raster order, and that
            from which on all are.
        lora_rank: Train adapters of that rank instead of the weights; 0 trains the weights.
        mixed_precision: no or bf16; the loss is in float32 either way.
        ema_decay: Of the averaged weights, which are what is validated and saved; 0 for none.
        checkpointing_steps: Steps between checkpoints, each with a validation and a sheet.
        resume_from_checkpoint: latest, or the folder of a checkpoint.
        num_workers: Processes that decode pictures.
        seed: Of weights, order and dropped classes.
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
    learning_rate: float = 1e-4
    lr_scheduler: str = "constant_with_warmup"
    warmup_steps: int = 500
    weight_decay: float = 0.05
    beta_2: float = 0.95
    class_dropout: float = 0.1
    scored_share: float = 1.0
    anneal_steps: list[int] = field(default_factory=lambda: [0, 0])
    lora_rank: int = 0
    mixed_precision: str = "no"
    ema_decay: float = 0.9999
    checkpointing_steps: int = 5000
    resume_from_checkpoint: str | None = None
    num_workers: int = 2
    seed: int = 0
    report_to: str | None = None


def evaluate(
    objective: TokenObjective,
    validation: TokenSource | None,
    tokenizer: TokenizerModel | None,
    accelerator: Accelerator,
    sheet: Path,
    seed: int,
) -> dict[str, float]:
    """Score validation tokens if there are any, and draw a sheet of samples if there is a tokenizer.

    Args:
        objective: With the weights to be scored, in evaluation mode.
        validation: Its tokens.
        tokenizer: Decodes samples.
        accelerator: Sums over processes; the main one draws.
        sheet: Where to.
        seed: Of the samples, the same ones every time.

    Returns:
        Scores by name.
    """
    scores = {} if validation is None else validate(objective, validation, accelerator)
    if scores:
        accelerator.print(
            json.dumps({"file": sheet.stem, **{name: round(value, 4) for name, value in scores.items()}})
        )
    if tokenizer is not None and accelerator.is_main_process:
        draw_sheet(objective.transformer, tokenizer, sheet, seed)
    return scores


def draw_sheet(transformer: ModelMixin, tokenizer: TokenizerModel, path: Path, seed: int) -> None:
    """Draw one picture of each of the first classes, without guidance."""
    pipeline = DINOTokARPipeline(transformer, tokenizer)
    pipeline.set_progress_bar_config(disable=True)
    labels = list(range(min(SHEET_LABELS, transformer.config.num_classes)))
    images = pipeline(labels, generator=[torch.Generator().manual_seed(mix(seed, label)) for label in labels]).images
    images += [images[0].copy().point(lambda _: 255) for _ in range(-len(images) % SHEET_COLUMNS)]
    write_png(make_image_grid(images, len(images) // SHEET_COLUMNS, SHEET_COLUMNS), path)


def save(
    transformer: ModelMixin,
    tokenizer: TokenizerModel | None,
    source: TokenSource,
    output: Path,
    record: dict,
    lora: bool,
) -> None:
    """Write the result: adapters, a pipeline, or without a tokenizer the transformer alone."""
    if lora:
        transformer.save_lora_adapter(output / "lora")
        write_json(output / "lora" / RECORD_NAME, record)
    elif tokenizer is None:
        transformer.save_pretrained(output / "transformer")
        write_json(output / "transformer" / RECORD_NAME, record)
    else:
        names = dict(enumerate(source.label_names))
        DINOTokARPipeline(transformer, tokenizer, id2label=names).save_pretrained(output / "pipeline")
        write_json(output / "pipeline" / RECORD_NAME, record)


def main(options: AutoregressiveOptions) -> ModelMixin:
    """Train, and return the transformer with its averaged weights."""
    output = Path(options.output_dir)
    accelerator = make_accelerator(output, options)
    checkpoints = Checkpoints(output, accelerator)
    resumed = checkpoints.find(options.resume_from_checkpoint)
    tokenizer = find_tokenizer(options.tokenizer).load().to(accelerator.device) if options.tokenizer else None
    source = TokenSource(options.dataset, options, accelerator, tokenizer, training=True)
    validation = None
    if options.validation_dataset:
        validation = TokenSource(options.validation_dataset, options, accelerator, tokenizer, training=False)

    transformer = build_transformer(options, source, tokenizer)
    objective = TokenObjective(transformer).to(accelerator.device).train()
    matrices = [p for p in trainable(objective) if p.ndim > 1]
    others = [p for p in trainable(objective) if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": options.weight_decay}, {"params": others, "weight_decay": 0.0}],
        options.learning_rate,
        betas=(0.9, options.beta_2),
    )
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
    first = checkpoints.load(resumed)

    scores: dict[str, float] = {}
    progress = tqdm(total=options.max_train_steps, initial=first, disable=not accelerator.is_main_process)
    batches = source.batches(start=first)
    with StopRequest() as stop:
        for step in range(first + 1, options.max_train_steps + 1):
            indices, labels = next(batches)
            labels, conditioned = conditions(options, labels, transformer, step, accelerator.process_index)
            losses = wrapped(indices, labels, **conditioned)
            accelerator.backward(losses.mean())
            norm = accelerator.clip_grad_norm_(trainable(objective), MAX_GRADIENT_NORM)
            if guard.ok(losses, norm):
                optimizer.step()
                ema.step(trainable(objective))
            scheduler.step()
            optimizer.zero_grad()
            progress.update()
            if step % LOGGING_STEPS == 0:
                values = {f"loss_{k}": loss for k, loss in enumerate(losses.tolist())}
                progress.set_postfix({name: f"{value:.3f}" for name, value in values.items()})
                accelerator.log({**values, "learning_rate": scheduler.get_last_lr()[0]}, step)
            stopping, last = stop.made(accelerator), step == options.max_train_steps
            if step % options.checkpointing_steps == 0 or stopping or last:
                checkpoints.save(step)
                if not stopping:
                    with averaged(objective, ema):
                        sheet = output / "samples" / f"step-{step:08d}.png"
                        scores = evaluate(objective, validation, tokenizer, accelerator, sheet, options.seed)
                    accelerator.log(scores, step)
            if stopping:
                accelerator.print(f"Stopped after step {step}: go on with --resume_from_checkpoint latest.")
                return transformer
    progress.close()
    batches.close()
    ema.copy_to(trainable(objective))
    transformer.eval()
    if accelerator.is_main_process:
        record = training_record(options, steps=options.max_train_steps, **scores)
        save(transformer, tokenizer, source, output, record, lora=bool(options.lora_rank))
    accelerator.end_training()
    return transformer


if __name__ == "__main__":
    main(parse_options(AutoregressiveOptions))
