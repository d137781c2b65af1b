"""Deformable sampling as one weighted sum of rows, against one `grid_sample` per level, at VFMTok's released size.

    python benchmarks/vfmtok_speed.py [--batch-size 1 --rounds 15]

256 queries, 8 heads, 4 levels of 24 x 24 features, 4 points each: forward, and forward with backward. Calls alternate.
On a CPU the times are those of the process (one thread, so that other load counts little); the memory is what the
operation's intermediate tensors take, by their sizes.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from dinotok.models.deformable_attention import sample_regions

RESULTS = Path(__file__).parent / "results" / "vfmtok_speed.json"
QUERIES, HEADS, LEVELS, POINTS, SIDE, HEAD_DIM = 256, 8, 4, 4, 24, 64


def sample_level_by_level(values: list[torch.Tensor], locations: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The usual formulation: bilinear samples of one level after the other, kept until they are summed."""
    samples = []
    for level, grid in enumerate(values):
        maps = grid.permute(0, 3, 4, 1, 2).flatten(0, 1)
        places = locations[:, :, :, level].transpose(1, 2).flatten(0, 1) * 2 - 1
        samples.append(F.grid_sample(maps, places, mode="bilinear", padding_mode="zeros", align_corners=False))
    stacked = torch.stack(samples, dim=-2).flatten(-2)  # (B * heads, head_dim, Q, levels * points)
    shares = weights.transpose(1, 2).flatten(0, 1).flatten(2)[:, None]
    summed = (stacked * shares).sum(-1)
    return summed.unflatten(0, (len(values[0]), -1)).permute(0, 3, 1, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    batch, device = arguments.batch_size, arguments.device
    values = [
        torch.randn(batch, SIDE, SIDE, HEADS, HEAD_DIM, device=device, requires_grad=True) for _ in range(LEVELS)
    ]
    shape = (batch, QUERIES, HEADS, LEVELS, POINTS)
    locations = torch.rand(*shape, 2, device=device, requires_grad=True)
    weights = torch.rand(shape, device=device, requires_grad=True)
    inputs = [*values, locations, weights]
    functions = {"one grid_sample per level": sample_level_by_level, "weighted sum of rows": sample_regions}
    times: dict[str, dict[str, list[float]]] = {name: {"forward": [], "both": []} for name in functions}
    clock = time.process_time if device == "cpu" else time.perf_counter
    outputs = [function(values, locations, weights) for function in functions.values()]
    difference = (outputs[0] - outputs[1]).abs().max().item()
    for turn in range(arguments.rounds + 2):
        for name, function in functions.items():
            start = clock()
            with torch.no_grad():
                function(values, locations, weights)
            _wait(device)
            middle = clock()
            torch.autograd.grad(function(values, locations, weights).sum(), inputs)
            _wait(device)
            if turn >= 2:  # the first two rounds warm up
                times[name]["forward"].append(middle - start)
                times[name]["both"].append(clock() - middle)
    samples = batch * QUERIES * HEADS * LEVELS * POINTS
    memory = {"one grid_sample per level": samples * HEAD_DIM * 4, "weighted sum of rows": samples * 4 * (4 + 8)}
    usual = times["one grid_sample per level"]
    rows = {
        name: {
            "forward_ms": round(1000 * statistics.median(found["forward"]), 2),
            "forward_speedup": round(statistics.median(map(_ratio, usual["forward"], found["forward"])), 2),
            "forward_backward_ms": round(1000 * statistics.median(found["both"]), 2),
            "forward_backward_speedup": round(statistics.median(map(_ratio, usual["both"], found["both"])), 2),
            "intermediate_mib": round(memory[name] / 2**20, 1),
        }
        for name, found in times.items()
    }
    columns = list(next(iter(rows.values())))
    table = ["| sampling | " + " | ".join(columns) + " |", "|" + "---|" * (1 + len(columns))]
    table += [f"| {name} | " + " | ".join(map(str, row.values())) + " |" for name, row in rows.items()]
    print("\n".join([*table, f"largest difference: {difference:.1e}"]))
    RESULTS.write_text(
        json.dumps({"settings": vars(arguments), "difference": difference, "rows": rows}, indent=2) + "\n"
    )
    RESULTS.with_suffix(".md").write_text(f"{__doc__.splitlines()[0]}\n\n" + "\n".join(table) + "\n")


def _ratio(usual: float, ours: float) -> float:
    return usual / ours


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
