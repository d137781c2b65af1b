"""What encoding a corpus costs, and that killed workers neither lose nor double anything.

    python benchmarks/corpus.py throughput [--models dinotok-tiny-vq dinotok-tiny-ae] [--resolutions 256 64]
    python benchmarks/corpus.py kills [--model dinotok-tiny-vq] [--shards 200] [--kills 30]
    python benchmarks/corpus.py table

`throughput`: one process and one thread encode `--pictures` photographs (the package's own, in crops of 256 pixels,
JPEG, in WebDataset shards; with DINOTOK_DATA, Imagenette at 224 pixels), after one shard to warm up. Rates are per
second of CPU time of the process, so they are per core, whatever else the machine does; shares are of wall-clock time.

`kills`: a worker encodes `--shards` small shards, and is killed by SIGKILL `--kills` times: after a random number of
files and a random moment more, and a new worker goes on. Then the output is compared with that of an undisturbed
worker, file by file and byte by byte, leftovers included, and no finished file may have vanished or been made twice.

`table`: time, storage and cost of large corpora, from the committed rates; see `docs/corpus.md` for the assumptions.
"""

import argparse
import io
import json
import os
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from corpus_costs import cost_table
from corpus_samples import photograph_crops, write_corpus
from PIL import Image

from dinotok.corpus import Corpus, CorpusOptions, encode_corpus
from dinotok.corpus_encoder import CorpusEncoder
from dinotok.corpus_manifests import MANIFESTS

RESULTS = Path(__file__).parent / "results"
STAGES = ("digest", "decode", "encode", "quantize", "write")


def fail(name: str, error: Exception) -> None:
    raise error


def measure(model: str, resolution: int, shards: Path, folder: Path, batch_size: int) -> dict[str, Any]:
    """Encode a corpus with one model; the first shard warms up."""
    options = CorpusOptions(model, resolution=resolution, label_column=None, batch_size=batch_size)
    encoder = CorpusEncoder(Corpus.find([shards], folder / f"{model}-{resolution}", options), "cpu")
    paths = encoder.paths()
    encoder.encode(0)
    encoder.times.seconds.clear()
    start, cpu_start = time.perf_counter(), time.process_time()
    manifests = [encoder.encode(number) for number in range(1, len(paths))]
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    pictures = sum(manifest["pictures"] for manifest in manifests)
    total = sum(encoder.times.seconds.values())
    return {
        "model": model,
        "resolution": resolution,
        "pictures": pictures,
        "pictures/CPU s": round(pictures / cpu_seconds, 2),
        "pictures/s": round(pictures / seconds, 2),
        **{f"{stage} %": round(100 * encoder.times.seconds.get(stage, 0.0) / total, 2) for stage in STAGES},
        "bytes/picture in": round(sum(m["input"]["bytes"] for m in manifests) / pictures),
        "bytes/picture out": round(sum(m["output"]["bytes"] for m in manifests) / pictures),
    }


def mean_pixels(pictures: list[bytes]) -> int:
    sizes = [Image.open(io.BytesIO(data)).size for data in pictures]
    return round(sum(width * height for width, height in sizes) / len(sizes))


def throughput(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source, pictures = photograph_crops(arguments.pictures + arguments.shard_pictures)
        shards = write_corpus(folder / "in", pictures, arguments.shard_pictures)
        for model in arguments.models:
            for resolution in arguments.resolutions:
                rows.append(measure(model, resolution, shards, folder, arguments.batch_size))
                print(json.dumps(rows[-1]), flush=True)
    settings = {"photographs": source, "batch_size": arguments.batch_size, "threads": 1, "torch": torch.__version__}
    settings |= {"pictures_per_shard": arguments.shard_pictures, "pixels_per_picture": mean_pixels(pictures)}
    (RESULTS / "corpus.json").write_text(json.dumps({"settings": settings, "rows": rows}, indent=1) + "\n")
    table = [f"| {' | '.join(rows[0])} |", "|---" * len(rows[0]) + "|"]
    table += [f"| {' | '.join(map(str, row.values()))} |" for row in rows]
    title = f"What encoding a corpus costs: one thread, {source}, batches of {arguments.batch_size}."
    text = "\n".join([title, "", *table]) + "\n"
    (RESULTS / "corpus.md").write_text(text)
    print(text)


def worker(corpus: Corpus) -> int:
    """Start a worker as a process of its own, which shares the imported libraries; return its number."""
    child = os.fork()
    if not child:
        status = 1
        try:
            encode_corpus(corpus, fail, "cpu")
            status = 0
        finally:
            os._exit(status)
    return child


def finished(output: Path) -> dict[str, int]:
    """Return when each finished file was published: its manifest is there before it."""
    files = [path for path in output.glob("*-00-*") if (output / MANIFESTS / f"{path.stem}.json").is_file()]
    return {path.name: path.stat().st_mtime_ns for path in files}


def kill(corpus: Corpus, files: int, seconds: float) -> dict[str, Any] | None:
    """Kill a new worker when so many files and then so many seconds have passed; None if it was done before."""
    before = finished(corpus.output)
    child = worker(corpus)
    while len(finished(corpus.output)) < len(before) + files:
        if os.waitpid(child, os.WNOHANG)[0]:
            return None
        time.sleep(0.002)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    killed = os.waitpid(child, 0)[1] == signal.SIGKILL
    after = finished(corpus.output)
    kept = all(after.get(name) == when for name, when in before.items())
    unfinished = [path.name for path in (corpus.output / ".staging").glob("*/*")]  # of all kills so far
    row = {"files_before": len(before), "files_after": len(after), "kept": kept, "unfinished": len(unfinished)}
    return row if killed else None


def contents(folder: Path) -> Iterator[tuple[str, bytes]]:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            yield path.relative_to(folder).as_posix(), path.read_bytes()


def kills(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    generator = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _, pictures = photograph_crops(arguments.shards * arguments.shard_pictures)
        write_corpus(folder / "in", pictures, arguments.shard_pictures, corrupt_every=97)
        options = CorpusOptions(arguments.model, resolution=arguments.resolution, label_column=None, batch_size=4)
        undisturbed, disturbed = (Corpus.find([folder / "in"], folder / out, options) for out in ("one", "two"))
        start = time.perf_counter()
        report = encode_corpus(undisturbed, fail, "cpu")
        per_file = (time.perf_counter() - start) / report.files
        rows: list[dict[str, Any]] = []
        mean_files = arguments.shards / (arguments.kills + 1)
        while len(rows) < arguments.kills:
            left = report.files - len(finished(disturbed.output))
            files = min(generator.randint(0, int(1.6 * mean_files)), left - (arguments.kills - len(rows)))
            row = kill(disturbed, max(files, 0), generator.uniform(0, 2 * per_file))
            if row is None:
                raise SystemExit(f"The corpus was complete after {len(rows)} kills: give it more shards.")
            rows.append(row)
            print(f"kill {len(rows)}: {json.dumps(row)}", flush=True)
        before = finished(disturbed.output)
        last = encode_corpus(disturbed, fail, "cpu")
        after = finished(disturbed.output)
        kept = all(row["kept"] for row in rows) and all(after[name] == when for name, when in before.items())
        first, second = dict(contents(undisturbed.output)), dict(contents(disturbed.output))
        result = {
            "settings": {key: value for key, value in vars(arguments).items() if key != "run"},
            "kills": len(rows),
            "unfinished_files_left_by_kills": rows[-1]["unfinished"],
            "kills_before_a_worker_had_a_file": sum(row["files_before"] == row["files_after"] for row in rows),
            "files_made_after_the_last_kill": last.made,
            "finished_files_kept_untouched": kept,
            "files_compared": len(first),
            "files_that_differ": sorted(name for name in first | second if first.get(name) != second.get(name)),
            "pictures": last.summary["pictures"] if last.summary else None,
            "failed_samples": last.summary["failed"] if last.summary else None,
            "rows": rows,
        }
        shutil.rmtree(folder / "in")
    path = RESULTS / "corpus_kills.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    path.with_suffix(".md").write_text(kills_table(result))
    print(kills_table(result))
    if result["files_that_differ"] or not kept:
        raise SystemExit("The output is not that of an undisturbed run.")


def kills_table(result: dict[str, Any]) -> str:
    """Return what came of the kills, as Markdown."""
    settings = result["settings"]
    rows = {
        "shards": settings["shards"],
        "pictures, and corrupt ones left out": f"{result['pictures']}, {result['failed_samples']}",
        "kills": result["kills"],
        "of them before the worker had finished a file": result["kills_before_a_worker_had_a_file"],
        "unfinished files that they left": result["unfinished_files_left_by_kills"],
        "finished files that were lost or made again": "none" if result["finished_files_kept_untouched"] else "some",
        "files compared with an undisturbed run": result["files_compared"],
        "of them different in any byte, missing or left over": len(result["files_that_differ"]) or "none",
    }
    lines = [
        f"A worker killed at random moments ({settings['model']}), and one that was not.",
        "",
        "| | |",
        "|---|---|",
    ]
    return "\n".join([*lines, *(f"| {name} | {value} |" for name, value in rows.items())]) + "\n"


def table(arguments: argparse.Namespace) -> None:
    text = cost_table(json.loads((RESULTS / "corpus.json").read_text()))
    (RESULTS / "corpus_costs.md").write_text(text)
    print(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("throughput")
    command.add_argument("--models", nargs="+", default=["dinotok-tiny-vq", "dinotok-tiny-ae"])
    command.add_argument("--resolutions", type=int, nargs="+", default=[256, 64])
    command.add_argument("--pictures", type=int, default=512)
    command.add_argument("--shard-pictures", type=int, default=128)
    command.add_argument("--batch-size", type=int, default=8)
    command.set_defaults(run=throughput)
    command = commands.add_parser("kills")
    command.add_argument("--model", default="dinotok-tiny-vq")
    command.add_argument("--shards", type=int, default=200)
    command.add_argument("--shard-pictures", type=int, default=6)
    command.add_argument("--kills", type=int, default=30)
    command.add_argument("--resolution", type=int, default=64)
    command.add_argument("--seed", type=int, default=0)
    command.set_defaults(run=kills)
    commands.add_parser("table").set_defaults(run=table)
    arguments = parser.parse_args()
    RESULTS.mkdir(exist_ok=True)
    arguments.run(arguments)


if __name__ == "__main__":
    main()
