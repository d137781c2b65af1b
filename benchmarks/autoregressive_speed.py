"""Decoding speed at LlamaGen-B size: with the cache, without it, and beside transformers' Llama with a static cache.

    python benchmarks/autoregressive_speed.py [--batch-sizes 1 8 --positions 256 --rounds 3]

Random weights (speed does not depend on them), sampling without guidance, the same width, depth and codes. Calls are
interleaved; tables show medians, and the median of the per-round ratios to ours. Without the cache, every index needs
the whole prefix again: measured at 8 lengths spread over the sequence. The second table is the share of a picture's
time that each part of `DINOTokARPipeline` takes, with two indices per position and a tokenizer of ViT-B size.

`--clock cpu` counts the processor's time instead of the clock on the wall: on a machine that others use, with one
thread, that is about what an idle one would show.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dinotok import AutoregressiveTransformer2DModel, VQModelDINOTok, config_path
from dinotok.decoding import draw, index_probabilities, uniform_noise
from dinotok.pipelines.class_conditional_autoregressive import DINOTokARPipeline

RESULTS = Path(__file__).parent / "results" / "autoregressive_speed.json"
LENGTHS = 8


def decode_cached(model: AutoregressiveTransformer2DModel, batch_size: int, positions: int) -> None:
    """The loop of the pipeline, for one codebook."""
    noise = uniform_noise(batch_size, positions, torch.Generator().manual_seed(0))
    cache = model.allocate_cache(batch_size, (positions, 1))
    chosen, labels = None, torch.zeros(batch_size, dtype=torch.long)
    for step in range(positions):
        logits = model(chosen, labels, cache, return_dict=False)[0][0]
        chosen, labels = draw(index_probabilities(logits), noise[:, step]), None


def decode_uncached(model: AutoregressiveTransformer2DModel, batch_size: int, positions: int) -> None:
    """A share `LENGTHS / positions` of decoding that keeps no keys and values."""
    labels = torch.zeros(batch_size, dtype=torch.long)
    for step in range(LENGTHS):
        length = (2 * step + 1) * positions // (2 * LENGTHS)
        prefix = torch.zeros(batch_size, length, dtype=torch.long)
        logits = model(prefix, labels, model.allocate_cache(batch_size, (positions, 1))).logits[0]
        draw(index_probabilities(logits), torch.rand(batch_size))


def make_llama(model: AutoregressiveTransformer2DModel) -> LlamaForCausalLM:
    """transformers' model of the same size."""
    config = LlamaConfig(
        vocab_size=model.config.codebook_sizes[0],
        hidden_size=model.config.hidden_size,
        intermediate_size=model.config.intermediate_size,
        num_hidden_layers=model.config.num_layers,
        num_attention_heads=model.config.num_attention_heads,
        max_position_embeddings=1024,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def decode_llama(llama: LlamaForCausalLM, batch_size: int, positions: int) -> None:
    """`generate` with a static cache, sampling from all codes."""
    llama.generate(
        torch.zeros(batch_size, 1, dtype=torch.long),
        attention_mask=torch.ones(batch_size, 1, dtype=torch.long),
        max_new_tokens=positions,
        do_sample=True,
        top_k=0,
        cache_implementation="static",
        disable_compile=True,
    )


def interleave(
    calls: dict[str, Callable[[int], None]], positions: int, rounds: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Seconds of every call, round by round, after a short one to warm up."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call(2 * LENGTHS)
    for _ in range(rounds):
        for name, call in calls.items():
            start = clock()
            call(positions)
            times[name].append(clock() - start)
    return times


def speed_rows(times: dict[str, list[float]], batch_size: int, positions: int) -> list[dict]:
    """One row of the table for each call; the first is ours."""
    scaled = {
        name: [value * positions / LENGTHS if "without" in name else value for value in values]
        for name, values in times.items()
    }
    ours = next(iter(scaled.values()))
    return [
        {
            "batch": batch_size,
            "call": name,
            "tokens per second": round(batch_size * positions / statistics.median(values), 1),
            "ours is faster by": round(statistics.median(v / o for v, o in zip(values, ours, strict=True)), 2),
        }
        for name, values in scaled.items()
    ]


def time_split(clock: Callable[[], float]) -> list[dict]:
    """Seconds of each part of one picture."""
    transformer = AutoregressiveTransformer2DModel.from_config(
        AutoregressiveTransformer2DModel.load_config(config_path("autoregressive_dinotok_b"))
    )
    config = VQModelDINOTok.load_config(config_path("autoencoder_dinotok_dinov2_base"))
    pipeline = DINOTokARPipeline(transformer.eval(), VQModelDINOTok(**without_private(config)).eval())
    pipeline.set_progress_bar_config(disable=True)
    seconds: dict[str, float] = {}
    timed = {"transformer's body": "_body", "head": "head.next_logits", "tokenizer": "vqvae.decode"}
    for name, path in timed.items():
        *owners, method = (path if path.startswith("vqvae") else f"transformer.{path}").split(".")
        owner = pipeline
        for attribute in owners:
            owner = getattr(owner, attribute)
        setattr(owner, method, _timing(getattr(owner, method), name, seconds, clock))
    start = clock()
    pipeline(0, generator=torch.Generator().manual_seed(0))
    total = clock() - start
    seconds["the rest"] = total - sum(seconds.values())
    return [
        {"part": name, "seconds": round(value, 2), "share": round(value / total, 3)} for name, value in seconds.items()
    ]


def _timing(function: Callable, name: str, seconds: dict[str, float], clock: Callable[[], float]) -> Callable:
    def timed(*arguments, **options):
        start = clock()
        result = function(*arguments, **options)
        seconds[name] = seconds.get(name, 0.0) + clock() - start
        return result

    return timed


def without_private(config: dict) -> dict:
    """A configuration without the entries that say what wrote it."""
    return {name: value for name, value in config.items() if not name.startswith("_")}


def markdown(rows: list[dict]) -> str:
    """A table."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--positions", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    arguments = parser.parse_args()
    clock = time.perf_counter if arguments.clock == "wall" else time.process_time
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    model = AutoregressiveTransformer2DModel().eval()
    llama = make_llama(model)
    rows = []
    for batch_size in arguments.batch_sizes:
        calls = {
            "ours": partial(decode_cached, model, batch_size),
            "transformers' Llama, static cache": partial(decode_llama, llama, batch_size),
            "ours, without the cache": partial(decode_uncached, model, batch_size),
        }
        times = interleave(calls, arguments.positions, arguments.rounds, clock)
        rows += speed_rows(times, batch_size, arguments.positions)
        print(markdown(rows))
    split = time_split(clock)
    print(markdown(split))
    results = {"settings": vars(arguments), "torch": torch.__version__, "rows": rows, "split": split}
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")
    how = (
        f"{arguments.threads} thread(s), {arguments.clock} time, {arguments.rounds} rounds, torch {torch.__version__}."
    )
    text = f"{__doc__.splitlines()[0]}\n\n{how}\n\n{markdown(rows)}\n\nParts of one picture:\n\n{markdown(split)}\n"
    RESULTS.with_suffix(".md").write_text(text)


if __name__ == "__main__":
    main()
