"""How the two indices of a position are best predicted, and whether semantic tokens are learned faster.

    python benchmarks/autoregressive_study.py --train runs/tokens/train128 --val runs/tokens/val128 [--steps 600]

Four small transformers, trained alike on tokens of Imagenette that `cache_tokens.py` made with a tokenizer of two
codebooks: the same body, rows, learning rates and number of steps.

    semantic, then texture    one token per position; a head of depth 1 predicts texture given semantic
    parallel heads            one token per position; a head of depth 0 predicts both at once
    one flat sequence         one token per index, so twice the sequence, in one codebook of all codes
    patch codes               as the first, on pictures quantized without an encoder: two codebooks of the same sizes,
                              by k-means of patches of pixels, the second of what the first leaves

The first three model the same tokens, so their bits per position can be compared. Other tokens have other bits; for
patch codes against the tokenizer's, the measure is the class accuracy of pictures drawn (k-NN of the features of a
supervised ViT-Ti/16), beside that of validation photographs that only went through the codes.
"""

import argparse
import json
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import result_tables
import torch
from diffusers.optimization import get_scheduler
from generation_study import Judge
from patch_codes import BATCH, PATCH, PatchCodes
from photographs import load_photographs
from torch.nn.functional import interpolate, pad
from tqdm import tqdm

from dinotok import AutoregressiveTransformer2DModel
from dinotok.autoregressive_training import TokenObjective, conditions, start_from_codes
from dinotok.hub import load_tokenizer
from dinotok.models.discrete import DiscreteTokenizerModel
from dinotok.pipelines.class_conditional_autoregressive import DINOTokARPipeline
from dinotok.probes import knn_accuracy
from dinotok.token_caches import TokenLoader, open_token_cache
from training_scripts.train_autoregressive import AutoregressiveOptions

RESULTS = Path(__file__).parent / "results" / "autoregressive_study.json"
BODY = {
    "hidden_size": 256,
    "num_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 680,
    "tie_codes": True,
    "dropout": 0.1,
}
OPTIONS = AutoregressiveOptions(model="", dataset="", output_dir="", scored_share=0.25, learning_rate=1e-3)
TOP_K = 200


class EncoderCodes:
    """The tokens of the caches, and the tokenizer that they are of."""

    def __init__(self, train: str, val: str):
        caches = {"train": open_token_cache(train), "val": open_token_cache(val)}
        self.tokenizer = load_tokenizer(caches["train"].description.tokenizer)
        self.code_vectors = self.tokenizer.code_vectors
        self.grid = list(caches["train"].description.grid)
        self.loaders = {name: TokenLoader(cache, BATCH) for name, cache in caches.items()}

    def train(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for batch in self.loaders["train"].batches():
            yield batch["indices"], batch["labels"]

    def val(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for batch in self.loaders["val"].once():
            yield batch["indices"], batch["labels"]

    @torch.no_grad()
    def decode(self, indices: torch.Tensor) -> torch.Tensor:
        return self.tokenizer.decode(self.tokenizer.indices_to_latents(indices)).sample.clamp(-1, 1)


class Flat:
    """Two indices side by side, as one grid twice as wide over one codebook.

    Attributes:
        code_vectors: Of all codes, each codebook's of mean square 1 and the narrower ones padded.
    """

    def __init__(self, tables: Sequence[torch.Tensor]):
        self.offsets = torch.tensor([0, *(len(table) for table in tables[:-1])]).cumsum(0)
        width = max(table.shape[1] for table in tables)
        centred = [table - table.mean(0) for table in tables]
        scaled = [table / table.square().mean().sqrt() for table in centred]
        self.code_vectors = {"all": torch.cat([pad(table, (0, width - table.shape[1])) for table in scaled])}

    def __call__(self, indices: torch.Tensor) -> torch.Tensor:
        return (indices + self.offsets[:, None, None]).movedim(1, -1).flatten(2)[:, None]


def train(name: str, codes, head_depth: int, steps: int, referee: "Referee") -> list[dict]:
    """Train one transformer, and score it at a quarter, a half and all of the steps."""
    torch.manual_seed(0)
    flat = Flat(list(codes.code_vectors.values())) if name == "one flat sequence" else None
    tables = list((flat or codes).code_vectors.values())
    model = AutoregressiveTransformer2DModel(
        [len(table) for table in tables],
        num_classes=10,
        sample_size=[codes.grid[0], 2 * codes.grid[1]] if flat else codes.grid,
        head_depth=head_depth,
        code_dims=[table.shape[1] for table in tables],
        **BODY,
    )
    start_from_codes(model, flat or codes)
    objective = TokenObjective(model).train()
    optimizer = torch.optim.AdamW(model.parameters(), OPTIONS.learning_rate, betas=(0.9, 0.95), weight_decay=0.05)
    scheduler = get_scheduler("cosine", optimizer, num_warmup_steps=steps // 20, num_training_steps=steps)
    rows, seconds, batches = [], 0.0, codes.train()
    for step in tqdm(range(1, steps + 1), desc=name, mininterval=30):
        indices, labels = next(batches)
        labels, scored = conditions(OPTIONS, labels, model, step, rank=0)
        start = time.process_time()
        losses = objective(flat(indices) if flat else indices, labels, **scored)
        losses.mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        seconds += time.process_time() - start
        if step in (steps // 4, steps // 2, steps):
            row = {"step": step, "cpu_seconds_per_step": seconds / step, **score(model.eval(), codes, flat)}
            rows.append(row if flat else row | referee.score(model, codes))
            objective.train()
    return rows


@torch.no_grad()
def score(model: AutoregressiveTransformer2DModel, codes, flat: Flat | None) -> dict[str, float]:
    """Bits of a position of validation pictures, in all."""
    objective, total, count = TokenObjective(model), 0.0, 0
    for indices, labels in codes.val():
        losses = objective(flat(indices) if flat else indices, labels)
        total += len(labels) * float(losses.sum()) * (2 if flat else 1)
        count += len(labels)
    return {"bits_per_position": total / count / math.log(2)}


class Referee:
    """Class accuracy of pictures, by the nearest photographs of a bank."""

    def __init__(self, pictures: int, side: int, tokenizer: DiscreteTokenizerModel):
        self.judge, self.pictures, self.tokenizer = Judge(), pictures, tokenizer
        bank, self.labels = load_photographs("train", 2000)
        self.bank = self._features(interpolate(bank, size=(side, side), mode="bicubic", antialias=True))

    def score(self, model: AutoregressiveTransformer2DModel, codes) -> dict[str, float]:
        """Draw pictures of all classes in turn, from the most likely codes, without guidance."""
        pipeline = DINOTokARPipeline(model, self.tokenizer)  # whose pictures are not asked for, only indices
        pipeline.set_progress_bar_config(disable=True)
        labels, pixels = torch.arange(self.pictures) % 10, []
        for seed, part in enumerate(labels.split(50)):
            generator = torch.Generator().manual_seed(seed)
            drawn = pipeline(part.tolist(), top_k=TOP_K, generator=generator, output_type="latent").images
            pixels.append(codes.decode(drawn))
        pixels = torch.cat(pixels)
        return {"class_accuracy": self._accuracy(pixels, labels)}

    def ceiling(self, codes) -> float:
        """The accuracy on validation photographs after the codes."""
        found = [(codes.decode(indices), labels) for indices, labels in codes.val()]
        return self._accuracy(torch.cat([pixels for pixels, _ in found]), torch.cat([labels for _, labels in found]))

    def _accuracy(self, pixels: torch.Tensor, labels: torch.Tensor) -> float:
        features = self._features(((pixels + 1) * 127.5).round().byte())
        return knn_accuracy(self.bank, self.labels, features, labels)

    def _features(self, pictures: torch.Tensor) -> torch.Tensor:
        return self.judge.describe(pictures, "features", inception=False)["encoder"]


def write_table(results: dict) -> None:
    lines = [
        "| tokens and order | steps | bits per position | class accuracy | CPU s a step |",
        "|---|---|---|---|---|",
    ]
    for name, rows in results["rows"].items():
        for row in rows:
            accuracy = f"{row['class_accuracy']:.1%}" if "class_accuracy" in row else "-"
            lines.append(
                f"| {name} | {row['step']} | {row['bits_per_position']:.2f} | {accuracy} | "
                f"{row['cpu_seconds_per_step']:.2f} |"
            )
    for name, accuracy in results["ceilings"].items():
        lines.append(f"| photographs through {name} | - | - | {accuracy:.1%} | - |")
    result_tables.write_table(lines, __doc__, RESULTS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", required=True, help="folder of cache_tokens.py")
    parser.add_argument("--val", required=True, help="likewise")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--pictures", type=int, default=200, help="drawn for the class accuracy")
    arguments = parser.parse_args()
    settings = {"steps": arguments.steps, "batch": BATCH, "pictures": arguments.pictures}
    results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    if results.get("settings") != settings:
        results = {"settings": settings, "rows": {}, "ceilings": {}}
    encoder = EncoderCodes(arguments.train, arguments.val)
    referee = Referee(arguments.pictures, PATCH * encoder.grid[0], encoder.tokenizer)
    wanted = [("semantic, then texture", 1), ("parallel heads", 0), ("one flat sequence", 0), ("patch codes", 1)]
    for name, head_depth in wanted:
        if name in results["rows"]:
            continue
        codes, label = encoder, "the tokenizer's codes"
        if name == "patch codes":
            codes, label = PatchCodes([len(table) for table in encoder.code_vectors.values()], encoder.grid), name
        if label not in results["ceilings"]:
            results["ceilings"][label] = referee.ceiling(codes)
        results["rows"][name] = train(name, codes, head_depth, arguments.steps, referee)
        result_tables.save(results, RESULTS)
    write_table(results)


if __name__ == "__main__":
    main()
