"""What `training_scripts/train_autoregressive.py` is made of, beside its loop."""

import math
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import ModelMixin
from peft import LoraConfig
from torch import nn

import dinotok

from .configs import config_path
from .data import PictureLoader, PictureTransform, load_pictures, to_pixels
from .models.discrete import DiscreteTokenizerModel
from .models.transformer_random_autoregressive import (
    RandomAutoregressiveTransformer2DModel,
    random_share_at,
    sample_orders,
)
from .picture_order import mix
from .picture_sources import label_names
from .token_caches import TokenLoader, is_token_cache, open_token_cache
from .training import read_json

LORA_MODULES = ("to_qkv", "to_out", "gate_up", "down", "feed_forward.0", "feed_forward.3")


class AutoregressiveOptions(Protocol):
    """The options of the script that are read here; see there."""

    model: str
    resolution: int
    batch_size: int
    gradient_checkpointing: bool
    class_dropout: float
    scored_share: float
    anneal_steps: list[int]
    lora_rank: int
    num_workers: int
    seed: int


class TokenObjective(nn.Module):
    """The transformer and its loss."""

    def __init__(self, transformer: ModelMixin):
        super().__init__()
        self.transformer = transformer

    def forward(self, indices: torch.Tensor, labels: torch.Tensor, **conditions: torch.Tensor) -> torch.Tensor:
        """Return the mean negative log-likelihood of an index in nats, for each codebook `(K,)`.

        Args:
            indices: `(B, K, h, w)`.
            labels: `(B,)`.
            conditions: `positions` to score in place of all, or `orders`, as the transformer takes them.
        """
        logits = self.transformer(indices, labels, **conditions).logits
        if "positions" in conditions:
            indices = indices.flatten(2).take_along_dim(conditions["positions"][:, None], dim=2)
        losses = [F.cross_entropy(book.flatten(0, -2), indices[:, k].flatten()) for k, book in enumerate(logits)]
        return torch.stack(losses)


class TokenSource:
    """Batches of tokens: read from a cache, or made from pictures by a tokenizer."""

    def __init__(self, name: str, options: AutoregressiveOptions, accelerator: Accelerator, tokenizer, training: bool):
        ranks = {"rank": accelerator.process_index, "world_size": accelerator.num_processes}
        self.tokenizer, self.accelerator, self.pictures = tokenizer, accelerator, not is_token_cache(name)
        self.loader: TokenLoader | PictureLoader
        if not self.pictures:
            cache = open_token_cache(name)
            self.codebook_sizes, self.grid = list(cache.description.codebook_sizes.values()), cache.description.grid
            self.label_names = cache.description.label_names
            self.loader = TokenLoader(cache, options.batch_size, seed=options.seed, **ranks)
            return
        if tokenizer is None:
            raise ValueError(f"{name!r} is no cache of tokens; pictures need a --tokenizer.")
        dataset = load_pictures(name)
        transform = PictureTransform(options.resolution, crop="random" if training else "center", flip=training)
        self.loader = PictureLoader(
            dataset, transform, options.batch_size, seed=options.seed, num_workers=options.num_workers, **ranks
        )
        self.codebook_sizes = list(tokenizer.codebook_sizes.values())
        blank = torch.zeros(1, 3, options.resolution, options.resolution, device=accelerator.device)
        self.grid = list(tokenizer.encode_to_indices(blank).shape[2:])
        self.label_names = label_names(dataset)

    def batches(self, start: int = 0) -> Generator[tuple[torch.Tensor, torch.Tensor], None, None]:
        """Yield indices `(B, K, h, w)` and labels without end, on the device."""
        yield from map(self._tokens, self.loader.batches(start))

    def once(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield every row once."""
        yield from map(self._tokens, self.loader.once())

    @torch.no_grad()
    def _tokens(self, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
        device = self.accelerator.device
        if not self.pictures:
            return batch["indices"].to(device), batch["labels"].to(device)
        with self.accelerator.autocast():
            indices = self.tokenizer.encode_to_indices(to_pixels(batch["pixel_values"].to(device)))
        return indices, batch["labels"].to(device)


def build_transformer(
    options: AutoregressiveOptions, source: TokenSource, tokenizer: DiscreteTokenizerModel | None = None
) -> ModelMixin:
    """Build the model for the data, or load one that fits it; freeze it and add adapters for LoRA.

    A new model whose code vectors are as wide as the tokenizer's begins with those.
    """
    data = {
        "codebook_sizes": source.codebook_sizes,
        "num_classes": len(source.label_names),
        "sample_size": list(source.grid),
    }
    if Path(options.model).is_dir():
        config = read_json(Path(options.model) / "config.json")
        model = getattr(dinotok, config["_class_name"]).from_pretrained(options.model)
        for name, value in data.items():
            if name != "sample_size" and model.config[name] != value:
                raise ValueError(f"{options.model!r} has {name}={model.config[name]}, but the data has {value}.")
    else:
        config = read_json(options.model if options.model.endswith(".json") else config_path(options.model))
        model = getattr(dinotok, config["_class_name"]).from_config({**config, **data})
        if tokenizer is not None:
            start_from_codes(model, tokenizer)
    _check_conditions(options, model)
    if options.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    if options.lora_rank:
        model.requires_grad_(False)
        modules = [name for name in LORA_MODULES if any(key.endswith(f".{name}") for key, _ in model.named_modules())]
        model.add_adapter(LoraConfig(r=options.lora_rank, lora_alpha=options.lora_rank, target_modules=modules))
    return model


def _check_conditions(options: AutoregressiveOptions, model: ModelMixin) -> None:
    in_random_orders = isinstance(model, RandomAutoregressiveTransformer2DModel)
    if not 0 < options.scored_share <= 1 or (in_random_orders and options.scored_share != 1):
        rule = "must be 1 for a model in random orders" if in_random_orders else "must be in (0, 1]"
        raise ValueError(f"scored_share={options.scored_share} {rule}.")
    if len(options.anneal_steps) != 2:
        raise ValueError(f"anneal_steps={options.anneal_steps} must be two steps, the start and the end.")


@torch.no_grad()
def start_from_codes(model: ModelMixin, tokenizer: DiscreteTokenizerModel) -> bool:
    """Set the code vectors of a new model to those of the tokenizer, where they have the same widths.

    Similar codes are then similar to the model before it has seen any: what counts when data is little. The vectors of
    a codebook are centred and divided by one number, so that their mean square is 1.

    Args:
        model: An autoregressive transformer; changed in place.
        tokenizer: With codes of any kind.

    Returns:
        Whether the widths were the same.
    """
    embeddings = getattr(model, "code_embeddings", None)
    vectors = list(tokenizer.code_vectors.values())
    if embeddings is None or [table.weight.shape for table in embeddings] != [table.shape for table in vectors]:
        return False
    for embedding, codes in zip(embeddings, vectors, strict=True):
        centred = codes.float() - codes.float().mean(0)
        embedding.weight.copy_(centred / centred.square().mean().sqrt().clamp(min=1e-6))
    return True


def conditions(
    options: AutoregressiveOptions, labels: torch.Tensor, model: ModelMixin, step: int, rank: int
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Drop classes, and draw orders or the positions to be scored, from the seed, the step and the process alone."""
    generator = torch.Generator().manual_seed(mix("conditions", options.seed, step, rank))
    dropped = torch.rand(len(labels), generator=generator) < options.class_dropout
    labels = labels.masked_fill(dropped.to(labels.device), model.config.num_classes)
    rows, columns = model.config.sample_size
    if isinstance(model, RandomAutoregressiveTransformer2DModel):
        share = random_share_at(step, *options.anneal_steps)
        return labels, {"orders": sample_orders(len(labels), rows * columns, share, generator).to(labels.device)}
    if options.scored_share == 1:
        return labels, {}
    count = math.ceil(options.scored_share * rows * columns)
    positions = torch.rand(len(labels), rows * columns, generator=generator).topk(count).indices
    return labels, {"positions": positions.to(labels.device)}


@torch.no_grad()
def validate(objective: TokenObjective, source: TokenSource, accelerator: Accelerator) -> dict[str, float]:
    """Return the mean negative log-likelihood of validation tokens in nats, by codebook and in bits per position."""
    total, count = torch.zeros(len(source.codebook_sizes), device=accelerator.device), 0
    for indices, labels in source.once():
        total += objective(indices, labels) * len(labels)
        count += len(labels)
    sums = accelerator.reduce(torch.cat([total, total.new_tensor([count])]), "sum").double()
    losses = (sums[:-1] / sums[-1]).tolist()
    scores = {f"validation/loss_{k}": loss for k, loss in enumerate(losses)}
    return {**scores, "validation/bits_per_position": sum(losses) / torch.log(torch.tensor(2.0)).item()}
