"""What encoding costs beside the bare backbone, and beside diffusers' AutoencoderRAE on the same backbone.

    python benchmarks/encode_overhead.py [--hidden-size 768 --layers 12]

One DINOv2 with registers of ViT-B size (random weights: speed does not depend on them), pictures of 256 px, which
both autoencoders resize to the 224 px of 16 x 16 patches; the bare backbone gets 224 px at once. The calls are
interleaved; the table shows medians and the median of the per-round ratios to the bare backbone.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import result_tables
import torch
from diffusers import AutoencoderRAE

from dinotok import AutoencoderDINOTok

RESULTS = Path(__file__).parent / "results" / "encode_overhead.json"


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden-size", type=int, default=768)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    rae = AutoencoderRAE(
        encoder_hidden_size=arguments.hidden_size,
        encoder_num_hidden_layers=arguments.layers,
        decoder_num_hidden_layers=1,
        image_size=256,
    ).eval()
    config = {**rae.encoder.config.to_dict(), "model_type": "dinov2_with_registers"}
    ours = AutoencoderDINOTok(encoder_config=config, block_out_channels=(32,) * 5).eval()
    for model in (rae, ours):
        model.to(arguments.device)
    backbone = ours.encoder.model
    pixels = torch.rand(arguments.batch_size, 3, 256, 256, device=arguments.device) * 2 - 1
    small = torch.rand(arguments.batch_size, 3, 224, 224, device=arguments.device)
    calls = {
        "bare backbone, 224 px": lambda: backbone(small).last_hidden_state,
        "AutoencoderDINOTok.encode (deep + 64 texture channels)": lambda: ours.encode(pixels).latent,
        "diffusers AutoencoderRAE.encode (last layer only)": lambda: rae.encode(pixels).latent,
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(arguments.rounds + 2):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if arguments.device != "cpu":
                torch.cuda.synchronize()
            if turn >= 2:  # the first two rounds warm up
                times[name].append(time.perf_counter() - start)
    bare = next(iter(times.values()))
    rows = {
        name: {
            "milliseconds": round(1000 * statistics.median(values), 1),
            "ratio": round(statistics.median(t / b for t, b in zip(values, bare, strict=True)), 3),
        }
        for name, values in times.items()
    }
    table = ["| call | median, ms | ratio to the bare backbone |", "|---|---|---|"]
    table += [f"| {name} | {row['milliseconds']} | {row['ratio']} |" for name, row in rows.items()]
    RESULTS.write_text(json.dumps({"settings": vars(arguments), "rows": rows}, indent=2) + "\n")
    result_tables.write_table(table, __doc__, RESULTS)


if __name__ == "__main__":
    main()
