"""Distil a small vision transformer out of a big frozen one: features of the last layer, class token and patches.

    python training_scripts/distill_encoder.py --teacher facebook/dinov2-base --dataset PICTURES \
        --output_dir runs/encoder --max_train_steps 100000

The student learns to predict the teacher's features, each channel standardised over the data, so the loss is the
share of their variance that stays unexplained. What comes out is a folder in `transformers`' layout with its
`preprocessor_config.json`: `AutoencoderDINOTok.from_encoder(folder)` stands on it. Where the widths differ, the
student predicts through a linear head, which is not kept. Run it under `accelerate launch` or `torchrun` for several
processes.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from torch import nn
from tqdm import tqdm

from dinotok import FrozenEncoder, config_path
from dinotok.data import PictureLoader, PictureTransform, load_pictures, pixel_batches, to_pixels
from dinotok.losses import StepGuard
from dinotok.probes import knn_accuracy
from dinotok.statistics import StreamingMoments
from dinotok.training import (
    RECORD_NAME,
    Checkpoints,
    StopRequest,
    averaged,
    make_accelerator,
    make_ema,
    parse_options,
    read_json,
    sum_over_processes,
    trainable,
    training_record,
    write_json,
)

IMAGE_MEAN, IMAGE_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
STATISTICS_PICTURES = 1024
WEIGHT_DECAY, MAX_GRADIENT_NORM = 0.05, 1.0


@dataclass(frozen=True)
class DistillationOptions:
    """Options of a run; `training.json` beside the weights is one as well.

    Attributes:
        teacher: Folder or Hub repository of a vision transformer.
        dataset: Folder, parquet file or name of a data set of pictures.
        output_dir: For the student, its checkpoints and its record.
        student: A bundled configuration, a JSON file with a `transformers` configuration, or a folder to go on from.
        validation_dataset: Pictures that are not trained on; none by default.
        resolution: Side of the square crops in pixels, a multiple of the student's patch size.
        batch_size: Pictures per process and step.
        max_train_steps: Optimizer steps.
        learning_rate: Of AdamW, after the warm-up.
        lr_scheduler: Of diffusers: cosine, constant_with_warmup, ...
        warmup_steps: Of the learning rate.
        mixed_precision: no or bf16.
        ema_decay: Of the averaged weights, which are what is saved.
        checkpointing_steps: Steps between checkpoints, each with a validation.
        resume_from_checkpoint: latest, or the folder of a checkpoint.
        num_workers: Processes that decode pictures.
        seed: Of weights and data.
        report_to: tensorboard, wandb or trackio.
    """

    teacher: str
    dataset: str
    output_dir: str
    student: str = "encoder_dinov3_tiny"
    validation_dataset: str | None = None
    resolution: int = 224
    batch_size: int = 64
    max_train_steps: int = 10000
    learning_rate: float = 1e-3
    lr_scheduler: str = "cosine"
    warmup_steps: int = 500
    mixed_precision: str = "no"
    ema_decay: float = 0.999
    checkpointing_steps: int = 1000
    resume_from_checkpoint: str | None = None
    num_workers: int = 2
    seed: int = 0
    report_to: str | None = None


class Distillation(nn.Module):
    """Student, head and the teacher's statistics: what is trained, and its loss."""

    def __init__(self, student: FrozenEncoder, teacher: FrozenEncoder):
        super().__init__()
        self.student = student
        for name, parameter in student.model.named_parameters():
            parameter.requires_grad_("mask_token" not in name)  # which no picture here needs
        same = student.hidden_size == teacher.hidden_size
        self.head = nn.Identity() if same else nn.Linear(student.hidden_size, teacher.hidden_size)
        self.register_buffer("mean", torch.zeros(2, 1, teacher.hidden_size))  # class token, patches
        self.register_buffer("std", torch.ones(2, 1, teacher.hidden_size))

    def forward(self, pixels: torch.Tensor, class_target: torch.Tensor, patch_target: torch.Tensor) -> torch.Tensor:
        """Return the unexplained shares of the variance of class tokens and of patches, `(2,)`."""
        predicted = class_and_patches(self.student, pixels)
        errors = []
        for kind, target in enumerate((class_target, patch_target)):
            error = (self.head(predicted[kind]).float() - target.float()) / self.std[kind]
            errors.append(error.square().mean())
        return torch.stack(errors)


def class_and_patches(encoder: FrozenEncoder, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The class token `(B, 1, D)` and the patches `(B, h * w, D)` of the last layer."""
    tokens = encoder.tokens(pixels)[0]
    count = (pixels.shape[2] // encoder.patch_size) * (pixels.shape[3] // encoder.patch_size)
    return tokens[:, :1], tokens[:, -count:]


def build_student(name: str) -> FrozenEncoder:
    """Build the student: random weights for a configuration, trained ones for a folder."""
    if os.path.isdir(name):
        return FrozenEncoder.from_encoder(name)
    config = read_json(name if name.endswith(".json") else config_path(name))
    return FrozenEncoder(config, IMAGE_MEAN, IMAGE_STD)


@torch.no_grad()
def measure_teacher(objective: Distillation, teacher: FrozenEncoder, batches: Iterable[torch.Tensor]) -> None:
    """Set the statistics that targets are standardised with."""
    moments = [StreamingMoments(teacher.hidden_size, covariance=False) for _ in range(2)]
    for pixels in batches:
        for one, tokens in zip(moments, class_and_patches(teacher, pixels), strict=True):
            one.update(tokens.flatten(0, 1))
    for kind, one in enumerate(moments):
        one.all_reduce()
        objective.mean[kind, 0] = one.mean.float()
        objective.std[kind, 0] = one.variance.sqrt().clamp(min=1e-6).float()


@torch.no_grad()
def validate(objective: Distillation, teacher: FrozenEncoder, loader: PictureLoader, accelerator: Accelerator) -> dict:
    """Score the student on validation pictures: unexplained shares, and k-NN accuracy where there are labels.

    The k-NN bank is every second picture, the queries are the others; representations are class token and mean patch.
    """
    shares, rows, labels = [], {"student": [], "teacher": []}, []
    for batch in loader.once():
        pixels = to_pixels(batch["pixel_values"].to(accelerator.device))
        targets = class_and_patches(teacher, pixels)
        shares.append(accelerator.gather(objective(pixels, *targets)[None].repeat(len(pixels), 1)))
        for name, tokens in (("student", class_and_patches(objective.student, pixels)), ("teacher", targets)):
            rows[name].append(accelerator.gather(torch.stack([tokens[0].mean(1), tokens[1].mean(1)], 1)))
        if "labels" in batch:
            labels.append(accelerator.gather(batch["labels"].to(accelerator.device)))
    shares = torch.cat(shares).mean(0)
    scores = {"validation/class_unexplained": float(shares[0]), "validation/patches_unexplained": float(shares[1])}
    if labels:
        truth = torch.cat(labels)
        for name, parts in rows.items():
            for kind, what in enumerate(("class", "patches")):
                found = torch.cat(parts)[:, kind]
                voters = min(20, len(truth[::2]))
                accuracy = knn_accuracy(found[::2], truth[::2], found[1::2], truth[1::2], voters)
                scores[f"validation/{name}_knn_{what}"] = accuracy
    return scores


def save_student(student: FrozenEncoder, folder: Path, record: dict) -> None:
    """Write the student as `transformers` and `from_encoder` read it, file by file whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as unfinished:
        student.model.save_pretrained(unfinished)
        mean, std = (values.flatten().tolist() for values in (student.normalization.mean, student.normalization.std))
        processor = {"image_mean": mean, "image_std": std, "do_normalize": True, "do_rescale": True}
        (Path(unfinished) / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n")
        for path in sorted(Path(unfinished).iterdir()):
            shutil.move(path, folder / path.name)
    write_json(folder / RECORD_NAME, record)


def main(options: DistillationOptions) -> FrozenEncoder:
    """Train, and return the student with its averaged weights."""
    output = Path(options.output_dir)
    accelerator = make_accelerator(output, options)
    checkpoints = Checkpoints(output, accelerator)
    resumed = checkpoints.find(options.resume_from_checkpoint)
    ranks = {"rank": accelerator.process_index, "world_size": accelerator.num_processes}
    transform = PictureTransform(options.resolution, crop="random_resized", flip=True)
    loader = PictureLoader(
        load_pictures(options.dataset),
        transform,
        options.batch_size,
        seed=options.seed,
        num_workers=options.num_workers,
        **ranks,
    )
    validation = None
    if options.validation_dataset:
        centre = PictureTransform(options.resolution, crop="center")
        validation = PictureLoader(
            load_pictures(options.validation_dataset), centre, options.batch_size, label_column="label", **ranks
        )

    student = build_student(options.student)
    teacher = FrozenEncoder.from_encoder(options.teacher, patch_size=student.patch_size).to(accelerator.device)
    objective = Distillation(student, teacher).to(accelerator.device)
    decayed = [p for p in trainable(objective) if p.ndim > 1]
    others = [p for p in trainable(objective) if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}],
        options.learning_rate,
        betas=(0.9, 0.95),
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
    if not first:
        pictures = pixel_batches(loader, STATISTICS_PICTURES // accelerator.num_processes)
        measure_teacher(objective, teacher, (pixels.to(accelerator.device) for pixels in pictures))

    scores: dict = {}
    progress = tqdm(total=options.max_train_steps, initial=first, disable=not accelerator.is_main_process)
    batches = loader.batches(start=first)
    with StopRequest() as stop:
        for step in range(first + 1, options.max_train_steps + 1):
            pixels = to_pixels(next(batches)["pixel_values"].to(accelerator.device))
            with torch.no_grad(), accelerator.autocast():
                targets = class_and_patches(teacher, pixels)
            shares = wrapped(pixels, *targets)
            loss = shares.sum()
            accelerator.backward(loss)
            norm = accelerator.clip_grad_norm_(trainable(objective), MAX_GRADIENT_NORM)
            if guard.ok(loss, norm):
                optimizer.step()
                ema.step(trainable(objective))
            scheduler.step()
            optimizer.zero_grad()
            progress.update()
            if step % 20 == 0:
                values = {"class_unexplained": shares[0].item(), "patches_unexplained": shares[1].item()}
                progress.set_postfix({name: f"{value:.3f}" for name, value in values.items()})
                accelerator.log({**values, "learning_rate": scheduler.get_last_lr()[0]}, step)
            stopping, last = stop.made(accelerator), step == options.max_train_steps
            if step % options.checkpointing_steps == 0 or stopping or last:
                checkpoints.save(step)
                if validation is not None and not stopping:
                    with averaged(objective, ema):
                        scores = validate(objective, teacher, validation, accelerator)
                    accelerator.log(scores, step)
                    accelerator.print(json.dumps({"step": step, **{k: round(v, 4) for k, v in scores.items()}}))
            if stopping:
                accelerator.print(f"Stopped after step {step}: go on with --resume_from_checkpoint latest.")
                break
    progress.close()
    batches.close()
    with averaged(objective, ema):
        if accelerator.is_main_process:
            record = training_record(options, steps=step if first < options.max_train_steps else first, **scores)
            save_student(accelerator.unwrap_model(wrapped).student, output / "encoder", record)
    accelerator.end_training()
    ema.copy_to(trainable(objective))
    return objective.student


if __name__ == "__main__":
    main(parse_options(DistillationOptions))
