"""What `training_scripts/train_tokenizer.py` trains and how it is scored, apart from the loop."""

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .bundled import bundled_models
from .configs import config_path
from .data import PictureLoader, to_pixels
from .folders import write_png
from .hub import load_tokenizer, tokenizer_classes
from .image_processor import ImageProcessor
from .losses import (
    AdversarialSchedule,
    adaptive_weight,
    discriminator_loss,
    generator_loss,
    pixel_loss,
    semantic_loss,
)
from .lpips import LPIPS
from .metrics import ReconstructionMetrics
from .models.autoencoder_dinotok import AutoencoderDINOTok
from .models.discrete import DiscreteTokenizer
from .models.discriminators import FeatureDiscriminator, PatchDiscriminator
from .models.encoders import FrozenEncoder
from .models.tokenizer_model import TokenizerModel
from .pictures import SheetEntry, sheet
from .reports import to_pictures, usage_of
from .training import log_picture, mean_over_processes, read_json, trainable
from .transcoding import code_counters

PIXEL_LOSSES: tuple[Literal["l1", "l2"], ...] = ("l1", "l2")
LOSSES = (*PIXEL_LOSSES, "lpips", "adversarial", "semantic", "codebook")
SHEET_PICTURES, TOKENS_PER_CODE = 8, 32


def build_tokenizer(model: str) -> tuple[TokenizerModel, bool]:
    """Build or load the tokenizer that a run trains.

    Args:
        model: A tokenizer's folder, Hub repository or bundled name, to go on from; or a recipe: a JSON file, or the
            name of a bundled configuration. A recipe has the class under `_class_name`, `encoder`, the folder or
            repository of the frozen encoder, or `autoencoder`, the tokenizer that a `VQModelDINOTok` starts from, and
            any other argument of the constructor.

    Returns:
        The tokenizer, and whether it is new, so that its closed-form parts are still to be fitted.

    Raises:
        ValueError: If a recipe names no class or an unknown one, or has no encoder.
        OSError: If an encoder or tokenizer cannot be had.
    """
    if os.path.isdir(model) or model in bundled_models():
        return load_tokenizer(model), False
    if not model.endswith(".json"):
        try:
            model = str(config_path(model))
        except ValueError:
            return load_tokenizer(model), False
    recipe = {key: value for key, value in read_json(model).items() if key != "_diffusers_version"}
    name = recipe.pop("_class_name", None)
    if name not in tokenizer_classes():
        raise ValueError(f"_class_name={name!r} in {model!r} is none of {', '.join(sorted(tokenizer_classes()))}.")
    tokenizer_class: Any = tokenizer_classes()[name]
    start = recipe.pop("autoencoder", None)
    if start is not None:
        if not hasattr(tokenizer_class, "from_autoencoder"):
            raise ValueError(f"{model!r}: a {name} starts from an encoder, not from an autoencoder.")
        return tokenizer_class.from_autoencoder(load_tokenizer(start), **recipe), True
    encoder = recipe.pop("encoder", None) or recipe.pop("encoder_repository", None)
    if encoder is None:
        raise ValueError(f"{model!r} names no encoder: add 'encoder', a folder or a Hub repository.")
    derived = ("encoder_config", "encoder_repository", "encoder_digest", "image_mean", "image_std", "latent_channels")
    recipe = {key: value for key, value in recipe.items() if key not in derived}
    return tokenizer_class.from_encoder(encoder, revision=recipe.pop("encoder_revision", None), **recipe), True


def fit_tokenizer(tokenizer: TokenizerModel, batches: Callable[[], Iterator[torch.Tensor]]) -> None:
    """Give a new tokenizer its closed-form start.

    Args:
        tokenizer: Changed in place.
        batches: Returns pixels to fit on, anew each time it is called.
    """
    autoencoder_fit = getattr(super(type(tokenizer), tokenizer), "fit", None)
    fit: Any = getattr(tokenizer, "fit", None)
    if isinstance(tokenizer, DiscreteTokenizer):
        if autoencoder_fit is not None and not _is_fitted(tokenizer):
            autoencoder_fit(batches())
        fit(batches(), max_tokens=max(2**18, TOKENS_PER_CODE * max(tokenizer.codebook_sizes.values())))
    elif fit is not None:
        fit(batches())
    else:
        tokenizer.fit_latents_statistics(batches())
    if isinstance(tokenizer, AutoencoderDINOTok) and (
        isinstance(tokenizer, DiscreteTokenizer) or tokenizer.config["linear_kernel_size"] > 1
    ):
        tokenizer.fit_linear_decoder(batches())


def _is_fitted(tokenizer: TokenizerModel) -> bool:
    return tokenizer.config["latents_mean"] is not None


def parse_losses(values: Sequence[str]) -> dict[str, float]:
    """Read the weights of the losses.

    Args:
        values: Such as `["l1=1", "lpips=0.5"]`.

    Returns:
        The weight of every loss in `LOSSES`, 0 where none is given.

    Raises:
        ValueError: If one is unknown, named twice, no number or negative, or if all are 0.
    """
    weights: dict[str, float] = {}
    for value in values:
        name, _, number = value.partition("=")
        if name not in LOSSES or name in weights:
            raise ValueError(f"{value!r} is not one of {', '.join(f'{known}=WEIGHT' for known in LOSSES)}, each once.")
        try:
            weights[name] = float(number)
        except ValueError:
            raise ValueError(f"{value!r} has no number after the '='.") from None
        if not 0 <= weights[name] < math.inf:
            raise ValueError(f"{value!r} is not a finite weight of at least 0.")
    if not any(weights.get(name) for name in ("l1", "l2", "lpips")):
        raise ValueError(f"losses={list(values)} has no reconstruction loss: give l1, l2 or lpips a weight.")
    return {name: weights.get(name, 0.0) for name in LOSSES}


def load_lpips(name: str | None, device: torch.device) -> LPIPS:
    """Load the perceptual net of a run.

    Raises:
        ValueError: If none is named.
        OSError: If it cannot be had.
    """
    if name is None:
        raise ValueError("The lpips loss needs weights: pass --perceptual_net with a file, a folder or a repository.")
    net = LPIPS.from_file(name) if os.path.isfile(name) else LPIPS.from_pretrained(name)
    return net.to(device)


def reconstruction_loss(
    made: "ObjectiveOutput", pixels: torch.Tensor, weights: Mapping[str, float], lpips: LPIPS | None
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the weighted pixel and perceptual losses in float32, and every loss by name, without its weight."""
    sample = made.sample.float()
    terms: dict[str, torch.Tensor] = {kind: pixel_loss(sample, pixels, kind) for kind in PIXEL_LOSSES if weights[kind]}
    if lpips is not None:
        terms["lpips"] = lpips(sample, pixels).mean()
    total = torch.stack([weights[name] * value for name, value in terms.items()]).sum()
    others = {"codebook": made.codebook_loss, "semantic": made.semantic_loss}
    return total, {**terms, **{name: value for name, value in others.items() if weights[name]}}


class ObjectiveOutput(NamedTuple):
    """What a tokenizer makes of a batch of pictures.

    Attributes:
        sample: Reconstructions `(B, 3, H, W)`.
        latents: Before quantization, detached.
        codebook_loss: Scalar; 0 for a continuous tokenizer.
        semantic_loss: Scalar; 0 where its weight is 0.
    """

    sample: torch.Tensor
    latents: torch.Tensor
    codebook_loss: torch.Tensor
    semantic_loss: torch.Tensor


class TokenizerObjective(nn.Module):
    """A tokenizer and the terms of its loss that need more than its reconstruction: one module for `accelerate`.

    Args:
        tokenizer: What is trained.
        semantic: Whether the semantic term is wanted: the cosine to the frozen encoder's features of the picture
            (VFMTok, arXiv 2507.08441), predicted from the latents by a tokenizer that has `predict_features`, else
            read by the frozen encoder from the reconstruction.
    """

    def __init__(self, tokenizer: TokenizerModel, semantic: bool):
        super().__init__()
        self.tokenizer = tokenizer
        self.semantic = semantic
        self.predicts_features = hasattr(tokenizer, "predict_features")
        if self.predicts_features and not semantic:
            tokenizer.freeze_feature_branch()  # DistributedDataParallel wants a gradient for everything else

    def forward(self, pixels: torch.Tensor) -> ObjectiveOutput:
        """Return reconstruction and loss terms of pixels `(B, 3, H, W)`."""
        latents = self.tokenizer.encode(pixels).latent
        quantized, codebook_loss = latents, latents.new_zeros(())
        if isinstance(self.tokenizer, DiscreteTokenizer):
            found = self.tokenizer.quantize(latents)
            quantized, codebook_loss = found.latents, found.loss
        sample = self.tokenizer.decode(quantized).sample
        term = self._semantic_loss(pixels, quantized, sample) if self.semantic else latents.new_zeros(())
        return ObjectiveOutput(sample, latents.detach(), codebook_loss, term)

    def _semantic_loss(self, pixels: torch.Tensor, latents: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        if self.predicts_features:
            target = self.tokenizer.target_features(pixels)
            return semantic_loss(self.tokenizer.predict_features(latents), target)
        with torch.no_grad():
            target = self.tokenizer.encoder(pixels)[0]
        return semantic_loss(self.tokenizer.encoder(sample)[0], target)


class Adversary:
    """A discriminator on its schedule: what the tokenizer pays to fool it, and its own learning.

    Args:
        name: "patch" for a PatchGAN, with the hinge losses of VQGAN; else the folder or repository of the frozen
            encoder whose features it reads, with the tokenizer's loss non-saturating, as in VFMTok.
        schedule: When it learns and how much it counts.
        accelerator: Prepares it and its optimizer.
        learning_rate: Of AdamW.
    """

    def __init__(self, name: str, schedule: AdversarialSchedule, accelerator: Accelerator, learning_rate: float):
        self.schedule = schedule
        self.accelerator = accelerator
        is_patch = name == "patch"
        self.kind: Literal["hinge", "non_saturating"] = "hinge" if is_patch else "non_saturating"
        module = PatchDiscriminator() if is_patch else FeatureDiscriminator(FrozenEncoder.from_encoder(name))
        self.module: nn.Module = module.to(accelerator.device)
        self.parameters = trainable(self.module)
        optimizer = torch.optim.AdamW(self.parameters, learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
        self.wrapped, self.optimizer = accelerator.prepare(self.module, optimizer)

    def term(
        self, loss: torch.Tensor, sample: torch.Tensor, last_layer: torch.Tensor, step: int
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return what the tokenizer pays, and its parts by name; nothing before the discriminator has warmed up.

        Args:
            loss: Its reconstruction loss; the term pulls as hard on the last layer (`adaptive_weight`).
            sample: Its reconstructions.
            last_layer: The weight of its last layer.
            step: Optimizer steps done.
        """
        weight = self.schedule.weight(step)
        if not weight:
            return loss.new_zeros(()), {}
        for parameter in self.parameters:  # no gradients for it here
            parameter.requires_grad_(False)
        paid = generator_loss(self.module(sample.float()), self.kind)
        for parameter in self.parameters:
            parameter.requires_grad_(True)
        balance = adaptive_weight(loss, paid, last_layer, reduce=mean_over_processes(self.accelerator))
        return weight * balance * paid, {"adversarial": paid, "adaptive_weight": balance}

    def backward(
        self, pixels: torch.Tensor, sample: torch.Tensor, step: int, accumulation: int, last: bool
    ) -> dict[str, torch.Tensor]:
        """Compute its gradients on pictures and reconstructions, if it is to learn; return its loss by name."""
        if not self.schedule.trains_discriminator(step):
            return {}
        with accumulating(self.wrapped, last):
            real, fake = self.wrapped(torch.cat([pixels, sample.detach().float()])).chunk(2)
            loss = discriminator_loss(real, fake)
            self.accelerator.backward(loss / accumulation)
        return {"discriminator": loss}


def accumulating(module: nn.Module, last: bool):
    """A context in which gradients are summed over processes only for the `last` of several batches."""
    return nullcontext() if last or not isinstance(module, DistributedDataParallel) else module.no_sync()


class Validation(NamedTuple):
    """What a validation found.

    Attributes:
        scores: Numbers by name, as trackers get them.
        sheet: Pictures beside their reconstructions; None except on the main process.
    """

    scores: dict[str, float]
    sheet: Any


@torch.no_grad()
def validate(
    tokenizer: TokenizerModel, loader: PictureLoader, accelerator: Accelerator, lpips: LPIPS | None
) -> Validation:
    """Score reconstructions of validation pictures over all processes.

    Args:
        tokenizer: In evaluation mode, with the weights to be scored.
        loader: Of the validation pictures; `once` is read.
        accelerator: Gathers the scores.
        lpips: Perceptual distance; None leaves it out.
    """
    metrics, counters = ReconstructionMetrics(), code_counters(tokenizer)
    pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
    for batch in loader.once():
        pixels = to_pixels(batch["pixel_values"].to(accelerator.device))
        latents = tokenizer.encode(pixels).latent
        if isinstance(tokenizer, DiscreteTokenizer):
            found = tokenizer.quantize(latents)
            latents = found.latents
            for index, counter in enumerate(counters.values()):
                counter.update(found.indices[:, index])
        sample = tokenizer.decode(latents).sample.float()
        metrics.update(sample, pixels, lpips)
        if len(pairs) < SHEET_PICTURES:
            pairs += list(zip(pixels.cpu(), sample.cpu(), strict=True))
    counts = [counter.counts for counter in counters.values()]
    parts = gather_object([(metrics, counts, pairs[:SHEET_PICTURES])])
    metrics, pairs = ReconstructionMetrics(), [pair for part in parts for pair in part[2]]
    for part in parts:
        metrics.merge(part[0])
    for index, counter in enumerate(counters.values()):
        counter.counts = torch.stack([part[1][index] for part in parts]).sum(0)
    scores = {f"validation/{key}": value for key, value in metrics.compute().items() if isinstance(value, float)}
    for name, usage in usage_of(counters).items():
        scores[f"validation/{name}_usage"] = usage["usage"]
        scores[f"validation/{name}_perplexity"] = usage["perplexity"]
    picture = _draw(pairs[:SHEET_PICTURES]) if accelerator.is_main_process else None
    return Validation(scores, picture)


def _draw(pairs: list[tuple[torch.Tensor, torch.Tensor]]):
    processor = ImageProcessor(patch_size=1)
    entries = [SheetEntry([], to_pictures(processor, torch.stack(pair).clamp(-1, 1))) for pair in pairs]
    return sheet(["original", "reconstruction"], entries, columns=2)


def log_validation(found: Validation, accelerator: Accelerator, folder: Path, step: int) -> None:
    """Give the scores to the trackers and the sheet to them and to `folder/validation`."""
    accelerator.log(found.scores, step)
    if found.sheet is None:
        return
    path = folder / "validation" / f"step-{step:08d}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_png(found.sheet, path)
    log_picture(accelerator, "reconstructions", found.sheet, step)


def describe(scores: Mapping[str, float]) -> str:
    """The scores of a validation on one line."""
    return ", ".join(f"{name.removeprefix('validation/')} {value:.4g}" for name, value in scores.items())
