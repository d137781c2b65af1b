"""What a step of the denoiser costs beside diffusers' DiTTransformer2DModel of the same width, depth and tokens.

    python benchmarks/denoiser_step.py [--hidden-size 384 --layers 12 --heads 6]

Both have random weights (speed does not depend on them), patch size 1 and the same latents; calls alternate, and the
table shows medians and the median of the per-round ratios. Training is one forward and one backward pass.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import result_tables
import torch
from diffusers import DiTTransformer2DModel

from dinotok import DiffusionTransformer2DModel

RESULTS = Path(__file__).parent / "results" / "denoiser_step.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden-size", type=int, default=384)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--channels", type=int, default=256, help="of the latents")
    parser.add_argument("--grid", type=int, default=16, help="rows and columns of the latents")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    width, heads = arguments.hidden_size, arguments.heads
    theirs = DiTTransformer2DModel(
        heads,
        width // heads,
        arguments.channels,
        num_layers=arguments.layers,
        sample_size=arguments.grid,
        patch_size=1,
    )
    ours = DiffusionTransformer2DModel(
        arguments.channels, hidden_size=width, num_layers=arguments.layers, num_attention_heads=heads
    )
    shape = (arguments.batch_size, arguments.channels, arguments.grid, arguments.grid)
    latents = torch.randn(shape, device=arguments.device)
    labels = torch.randint(1000, shape[:1], device=arguments.device)
    times = torch.rand(shape[:1], device=arguments.device)
    steps = {  # theirs counts time in 0..1000
        "DiffusionTransformer2DModel": (ours, lambda: ours(latents, times, labels).sample),
        "diffusers DiTTransformer2DModel": (theirs, lambda: theirs(latents, (1000 * times).long(), labels).sample),
    }

    @torch.no_grad()
    def sample(model, step):
        step()

    def train(model, step):
        model.zero_grad(set_to_none=True)
        step().square().mean().backward()

    rows = {}
    for work in (sample, train):
        times_of: dict[str, list[float]] = {name: [] for name in steps}
        for model, _ in steps.values():
            model.to(arguments.device).train(work is train)
        for turn in range(arguments.rounds + 2):
            for name, (model, step) in steps.items():
                start = time.perf_counter()
                work(model, step)
                if arguments.device != "cpu":
                    torch.cuda.synchronize()
                if turn >= 2:  # the first two rounds warm up
                    times_of[name].append(time.perf_counter() - start)
        reference = times_of["diffusers DiTTransformer2DModel"]
        for name, values in times_of.items():
            rows[f"{name}, {work.__name__}"] = {
                "millions of parameters": round(steps[name][0].num_parameters() / 1e6, 1),
                "milliseconds": round(1000 * statistics.median(values), 1),
                "ratio": round(statistics.median(t / r for t, r in zip(values, reference, strict=True)), 3),
            }
    table = ["| step | parameters, M | median, ms | ratio |", "|---|---|---|---|"]
    table += [f"| {name} | {' | '.join(map(str, row.values()))} |" for name, row in rows.items()]
    RESULTS.write_text(json.dumps({"settings": vars(arguments), "rows": rows}, indent=2) + "\n")
    result_tables.write_table(table, __doc__, RESULTS)


if __name__ == "__main__":
    main()
