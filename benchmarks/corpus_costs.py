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
    "gpu_utilisation": 0.35,  # of a plain PyTorch forward pass of a ViT-B in large batches
    "gpu_dollars_per_hour": 3.0,
    "cpu_dollars_per_core_hour": 0.04,
    "storage_dollars_per_terabyte_month": 23.0,
    "input_bytes_per_picture": 60_000,  # a JPEG of about 400 x 300 pixels
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
    lines = ["What large corpora cost: computed by `python benchmarks/corpus.py table`.", ""]
    lines += ["| model, one core (measured) | pictures | core hours | days on 64 cores | dollars | output |"]
    lines += ["|---|---|---|---|---|---|"]
    for name, row in measured.items():
        for count in ASSUMPTIONS["corpora"]:
            hours = count / row["pictures/CPU s"] / 3600
            dollars = hours * ASSUMPTIONS["cpu_dollars_per_core_hour"]
            size = _bytes(count * row["bytes/picture out"])
            lines.append(
                f"| {name} | {count:,} | {_number(hours)} | {_number(hours / 64 / 24)} | {_number(dollars)} | {size} |"
            )
    decode = max(row["pictures/CPU s"] / (row["decode %"] / 100) for row in measured.values())
    rate, gpus = gpu_rate(), ASSUMPTIONS["gpus"]
    lines += ["", f"| ViT-B/16 on one {ASSUMPTIONS['gpu']} (estimated) | |", "|---|---|"]
    lines += [
        f"| FLOPs of a picture: encoder, two codebooks | {encoder_flops():.3g}, {quantizer_flops():.3g} |",
        f"| pictures/s at {ASSUMPTIONS['gpu_utilisation']:.0%} of the peak | {rate:,.0f} |",
        f"| pictures/s that one core decodes (measured) | {decode:,.0f} |",
        f"| cores that feed one GPU | {rate / decode:.1f} |",
        "",
        f"| pictures | GPU hours | days on {gpus} GPUs | dollars, GPUs | dollars, cores | input | tokens | latents | "
        "dollars a month: input, tokens, latents |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for count in ASSUMPTIONS["corpora"]:
        hours = count / rate / 3600
        cores = count / decode / 3600 * ASSUMPTIONS["cpu_dollars_per_core_hour"]
        sizes = [
            count * each
            for each in (ASSUMPTIONS["input_bytes_per_picture"], output_bytes("tokens"), output_bytes("latents"))
        ]
        month = ", ".join(_number(size / 1e12 * ASSUMPTIONS["storage_dollars_per_terabyte_month"]) for size in sizes)
        cells = [
            f"{count:,}",
            _number(hours),
            _number(hours / gpus / 24),
            _number(hours * ASSUMPTIONS["gpu_dollars_per_hour"]),
        ]
        cells += [_number(cores), *map(_bytes, sizes), month]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


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
