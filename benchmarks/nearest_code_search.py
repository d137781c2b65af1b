"""Nearest-code search: dinotok beside diffusers, vector-quantize-pytorch and torch.cdist, on the same inputs.

    python benchmarks/nearest_code_search.py                # the committed table; minutes
    python benchmarks/nearest_code_search.py --num-vectors 2048 --codebook-sizes 1024

Writes `results/nearest_code_search.md` and `.json` next to this file. `vector-quantize-pytorch` is optional.
Time: median over interleaved repeats. Memory: the largest sum of live tensor allocations during one call, from the
allocation events of torch's profiler (inputs and codebook not counted, nor buffers inside the matrix product).
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from dinotok.models.nearest import nearest_codes

RESULTS = Path(__file__).parent / "results" / "nearest_code_search"
METHODS = ("dinotok", "diffusers", "vector-quantize-pytorch", "torch.cdist")
MIB, GIB = 2**20, 2**30


def build(method: str, codebook: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """A function from vectors `(N, D)` to indices `(N,)`; None where the library is missing."""
    if method == "dinotok":
        return lambda vectors: nearest_codes(vectors, codebook)
    if method == "torch.cdist":
        return lambda vectors: torch.cdist(vectors, codebook).argmin(1)
    if method == "diffusers":
        from diffusers.models.autoencoders.vae import VectorQuantizer

        quantizer = VectorQuantizer(*codebook.shape, beta=0.25)
        quantizer.embedding.weight.data = codebook
        return lambda vectors: quantizer(vectors.T[None, :, :, None])[2][2]
    try:
        from vector_quantize_pytorch import VectorQuantize
    except ImportError:
        return None
    peer = VectorQuantize(dim=codebook.shape[1], codebook_size=codebook.shape[0]).eval()
    peer._codebook.embed.data = codebook[None]
    return lambda vectors: peer(vectors[None])[1][0]


def inputs(num_vectors: int, codebook_size: int, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Standard normal vectors and codes, float32."""
    generator = torch.Generator().manual_seed(0)
    codebook = torch.randn(codebook_size, dim, generator=generator)
    return torch.randn(num_vectors, dim, generator=generator), codebook


def with_extra_memory(
    search: Callable[[torch.Tensor], torch.Tensor], vectors: torch.Tensor
) -> tuple[torch.Tensor, int]:
    """Indices, and the peak of the bytes allocated while they were searched."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        indices = search(vectors)
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return indices, max(accumulate(event.nbytes() for event in events))


@torch.no_grad()
def measure(num_vectors: int, codebook_size: int, dim: int, seconds: float) -> dict:
    """Median seconds, extra bytes and disagreeing indices of every method that is installed."""
    vectors, codebook = inputs(num_vectors, codebook_size, dim)
    searches = {method: search for method in METHODS if (search := build(method, codebook)) is not None}
    found = {method: with_extra_memory(search, vectors) for method, search in searches.items()}
    ours = found["dinotok"][0]
    times: dict[str, list[float]] = {method: [] for method in searches}
    start = time.perf_counter()
    while len(times["dinotok"]) < 3 or (time.perf_counter() - start < seconds and len(times["dinotok"]) < 21):
        for method, search in searches.items():
            before = time.perf_counter()
            search(vectors)
            times[method].append(time.perf_counter() - before)
    return {
        "num_vectors": num_vectors,
        "codebook_size": codebook_size,
        "dim": dim,
        "repeats": len(times["dinotok"]),
        "seconds": {method: statistics.median(values) for method, values in times.items()},
        "extra_bytes": {method: extra for method, (_, extra) in found.items()},
        "differing": {method: int((indices != ours).sum()) for method, (indices, _) in found.items()},
    }


def cell(row: dict, method: str) -> str:
    """Time and extra memory of one method, and how many indices differ from ours."""
    if method not in row["seconds"]:
        return "not installed"
    text = f"{1e3 * row['seconds'][method]:.0f} ms, {row['extra_bytes'][method] / MIB:.0f} MiB"
    return text + (f" ({row['differing'][method]} differ)" if row["differing"][method] else "")


def table(rows: list[dict]) -> str:
    """Markdown: one line per shape, the ratio to the fastest and to the leanest peer last."""
    lines = [f"| N | K | D | {' | '.join(METHODS)} | speed | memory |", "|" + "---|" * (len(METHODS) + 5)]
    for row in rows:
        peers = [method for method in row["seconds"] if method != "dinotok"]
        speed = min(row["seconds"][method] for method in peers) / row["seconds"]["dinotok"]
        memory = row["extra_bytes"]["dinotok"] / min(row["extra_bytes"][method] for method in peers)
        reduced = f" (at {row['reduced_from']} peers need {row['needs_gib']:.0f} GiB)" if row["reduced_from"] else ""
        cells = " | ".join(cell(row, method) for method in METHODS)
        shape = f"{row['num_vectors']}{reduced} | {row['codebook_size']} | {row['dim']}"
        lines.append(f"| {shape} | {cells} | {speed:.2f}x | 1/{1 / memory:.0f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-vectors", type=int, default=16_384)
    parser.add_argument("--codebook-sizes", type=int, nargs="+", default=[1_024, 16_384, 262_144])
    parser.add_argument("--dims", type=int, nargs="+", default=[12, 64, 768])
    parser.add_argument("--max-gib", type=float, default=1.0, help="largest N x K matrix a peer may build")
    parser.add_argument("--seconds", type=float, default=5.0, help="time for the repeats of a shape, at least 3")
    options = parser.parse_args()

    rows = []
    for codebook_size in options.codebook_sizes:
        needs_gib = 4 * options.num_vectors * codebook_size / GIB
        fitting = min(options.num_vectors, int(options.max_gib / needs_gib * options.num_vectors))
        for dim in options.dims:
            row = measure(fitting, codebook_size, dim, options.seconds)
            row["needs_gib"], row["reduced_from"] = (
                needs_gib,
                options.num_vectors if needs_gib > options.max_gib else None,
            )
            rows.append(row)
            print(table(rows[-1:]).splitlines()[-1], flush=True)
    machine = {
        "torch": torch.__version__,
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "wait_policy": os.environ.get("OMP_WAIT_POLICY", "default"),
    }
    note = (
        f"float32, torch {torch.__version__}, CPU, {machine['threads']} threads. Median time and peak extra memory of "
        "one search; `differ`: indices unlike ours. Speed: the fastest peer's time over ours. Memory: ours over the "
        f"leanest peer's. Peers build the N x K matrix of distances: where it exceeds {options.max_gib:g} GiB, all "
        "search fewer vectors, and the line says what the full number needs."
    )
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.with_suffix(".md").write_text(f"# Nearest-code search\n\n{note}\n\n{table(rows)}\n")
    RESULTS.with_suffix(".json").write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
    print(f"\n{table(rows)}")


if __name__ == "__main__":
    main()
