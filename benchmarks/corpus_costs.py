"""Time, storage and cost of encoding large corpora: the arithmetic behind the tables of docs/corpus.md.

    python benchmarks/corpus.py table

Measured: pictures per core, bytes per picture and the share of decoding (`corpus.json`). Assumed, and not measured:
everything in `ASSUMPTIONS`. The rate of a GPU is estimated from the arithmetic of a ViT-B/16 at 256 pixels:

    FLOPs of a picture = layers * (24 * tokens * width^2 + 4 * tokens^2 * width)
    pictures/s         = utilisation * peak / FLOPs

which counts a multiplication and an addition as two; the quantizer adds 2 * tokens * codes * rank for each codebook.
"""

from typing import Any

ASSUMPTIONS: dict[str, Any] = {
    "corpora": [10**6, 10**8, 10**9],
    "gpu": "H100 SXM",
    "gpu_peak_flops": 989e12,  # bfloat16, dense, from NVIDIA's data sheet
    "gpu_utilisation": 0.2,  # of a plain PyTorch forward pass of a ViT-B in large batches
    "gpu_dollars_per_hour": 3.0,
    "cpu_dollars_per_core_hour": 0.04,
    "storage_dollars_per_terabyte_month": 23.0,
    "input_bytes_per_picture": 60_000,
    "input_pixels_per_picture": 400 * 300,
    "cores": 64,
    "gpus": 8,
}
TOKENS, WIDTH, LAYERS = 261, 768, 12  # 16 x 16 patches of a 256-pixel picture, a class token and 4 registers
GRID = 256
CODES, RANK, CODEBOOKS = 16_384, 64, 2
TEXTURE_CHANNELS = 64


def encoder_flops() -> int:
    """Of a ViT-B/16 at 256 pixels, for a picture."""
    return LAYERS * (24 * TOKENS * WIDTH**2 + 4 * TOKENS**2 * WIDTH)


def quantizer_flops() -> int:
    """Of two codebooks of 16,384 codes in 64 dimensions, for a picture."""
    return CODEBOOKS * 2 * GRID * CODES * RANK


def gpu_rate() -> float:
    """Pictures a second that one GPU encodes: an estimate."""
    peak = ASSUMPTIONS["gpu_utilisation"] * ASSUMPTIONS["gpu_peak_flops"]
    return peak / (encoder_flops() + quantizer_flops())


def output_bytes(what: str) -> int:
    """Bytes of a picture: two codes of uint16 per patch; or float16 latents of all channels."""
    return GRID * CODEBOOKS * 2 if what == "tokens" else GRID * (WIDTH + TEXTURE_CHANNELS) * 2


def cost_table(results: dict[str, Any]) -> str:
    """Return the tables as Markdown.

    Args:
        results: Content of `corpus.json`.
    """
    measured = {row["model"]: row for row in results["rows"] if row["resolution"] == 256}
    larger = ASSUMPTIONS["input_pixels_per_picture"] / results["settings"]["pixels_per_picture"]
    decode = max(row["pictures/CPU s"] / (row["decode %"] / 100) for row in measured.values()) / larger
    title = "What large corpora cost: computed by `python benchmarks/corpus.py table`."
    return "\n".join([title, "", *_core_rows(measured), "", *_gpu_facts(decode), "", *_gpu_rows(decode)]) + "\n"


def _core_rows(measured: dict[str, dict[str, Any]]) -> list[str]:
    """What the models of the package cost on cores."""
    cores, price = ASSUMPTIONS["cores"], ASSUMPTIONS["cpu_dollars_per_core_hour"]
    lines = [f"| model, one core (measured) | pictures | core hours | hours on {cores} cores | dollars | output |"]
    lines.append("|---|---|---|---|---|---|")
    for name, row in measured.items():
        for count in ASSUMPTIONS["corpora"]:
            hours = count / row["pictures/CPU s"] / 3600
            numbers = map(_number, (hours, hours / cores, hours * price))
            cells = (name, f"{count:,}", *numbers, _bytes(count * row["bytes/picture out"]))
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def _gpu_facts(decode: float) -> list[str]:
    rate = gpu_rate()
    return [
        f"| ViT-B/16 on one {ASSUMPTIONS['gpu']} (estimated) | |",
        "|---|---|",
        f"| GFLOPs a picture: encoder, codebooks | {encoder_flops() / 1e9:.1f}, {quantizer_flops() / 1e9:.1f} |",
        f"| pictures/s at {ASSUMPTIONS['gpu_utilisation']:.0%} of the peak | {_number(rate)} |",
        f"| pictures/s that one core decodes (measured, larger ones in proportion) | {_number(decode)} |",
        f"| cores that feed one GPU | {rate / decode:.0f} |",
    ]


def _gpu_rows(decode: float) -> list[str]:
    """What a model of the papers' size costs on GPUs."""
    gpus, month = ASSUMPTIONS["gpus"], ASSUMPTIONS["storage_dollars_per_terabyte_month"]
    heads = ["pictures", "GPU hours", f"hours on {gpus} GPUs", "dollars, GPUs", "dollars, cores"]
    heads += ["input", "tokens", "latents", "dollars a month: input, tokens, latents"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for count in ASSUMPTIONS["corpora"]:
        hours = count / gpu_rate() / 3600
        cores = count / decode / 3600 * ASSUMPTIONS["cpu_dollars_per_core_hour"]
        each = (ASSUMPTIONS["input_bytes_per_picture"], output_bytes("tokens"), output_bytes("latents"))
        sizes = [count * one for one in each]
        numbers = map(_number, (hours, hours / gpus, hours * ASSUMPTIONS["gpu_dollars_per_hour"], cores))
        kept = ", ".join(_number(size / 1e12 * month) for size in sizes)
        lines.append(f"| {' | '.join([f'{count:,}', *numbers, *map(_bytes, sizes), kept])} |")
    return lines


def _number(value: float) -> str:
    """Three digits, and no more than are meant."""
    if value < 0.01:
        return f"{value:.1g}"
    return f"{float(f'{value:.2g}'):,.0f}" if value >= 10 else f"{value:.2g}"


def _bytes(size: float) -> str:
    for unit, limit in (("PB", 1e15), ("TB", 1e12), ("GB", 1e9)):
        if size >= limit:
            return f"{_number(size / limit)} {unit}"
    return f"{_number(size / 1e6)} MB"
