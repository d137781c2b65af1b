"""Whole corpora: the output is the model's, whoever makes it, and however often they are killed."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load
from typer.testing import CliRunner

from dinotok.caches import DESCRIPTION_NAME
from dinotok.cli import app
from dinotok.corpus import Corpus, CorpusOptions, encode_corpus, slurm_share
from dinotok.corpus_encoder import CorpusEncoder
from dinotok.corpus_manifests import is_done
from dinotok.corpus_shards import ShardError, read_shard
from dinotok.data import PictureTransform, to_pixels
from dinotok.hub import load_tokenizer
from dinotok.latent_caches import LatentLoader, open_latent_cache
from dinotok.token_caches import TokenLoader, open_token_cache
from tests.tiny_corpora import CORRUPT, encoded_pictures, files_of, tiny_corpus, write_archive, write_parquet
from tests.tiny_tokenizers import tiny_discrete_tokenizer, tiny_tokenizer
from training_scripts import cache_latents, cache_tokens

RESOLUTION = 32


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    tiny_discrete_tokenizer().save_pretrained(folder / "discrete")
    tiny_tokenizer().save_pretrained(folder / "continuous")
    return folder


@pytest.fixture
def options(models):
    return CorpusOptions(str(models / "discrete"), resolution=RESOLUTION, classes="2", batch_size=2)


def run(folder, output, options, **arguments):
    """Encode a corpus; shards that fail are errors."""

    def fail(name, error):
        raise error

    return encode_corpus(Corpus.find([folder], output, options), fail, "cpu", **arguments)


def direct(path, model, size=RESOLUTION):
    """What the model itself makes of the pictures of a shard, two at a time as the workers do."""
    transform, model = PictureTransform(size, "center"), load_tokenizer(str(model))
    pixels = [transform(sample.picture, torch.Generator()) for sample in read_shard(path, "image", "label")]
    with torch.inference_mode():
        batches = [to_pixels(torch.stack(pixels[i : i + 2])) for i in range(0, len(pixels), 2)]
        encode = getattr(model, "encode_to_indices", None) or (lambda batch: model.encode(batch).latent)
        return torch.cat([encode(batch) for batch in batches])


def test_tokens_are_those_of_the_model_and_training_reads_them(tmp_path, options):
    folder = tiny_corpus(tmp_path / "in")
    report = run(folder, tmp_path / "out", options)
    assert (report.made, report.pictures, report.failed) == (4, 15, 0)
    cache = open_token_cache(tmp_path / "out")
    assert cache.shape == (2, 2, 2) and cache.description.label_names == ["0", "1"]
    expected = torch.cat([direct(path, options.model) for path in sorted(folder.iterdir())[:3]])
    batches = list(TokenLoader(cache, batch_size=4).once())
    assert torch.equal(torch.cat([batch["indices"] for batch in batches]), expected)
    assert torch.cat([batch["labels"] for batch in batches]).tolist() == [0, 1, 0, 1, 0] * 3
    first = cache.description.shard_size
    assert cache.dataset["picture"][:] == [shard * first + row for shard in range(3) for row in range(5)]
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["files"] == 4 and summary["pictures"] == summary["samples"] == 15 and summary["failures"] == []
    assert report.summary == summary and next(TokenLoader(cache, 4).batches())["indices"].shape == (4, 2, 2, 2)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_latents_are_those_of_the_model_and_training_reads_them(tmp_path, options, models, dtype):
    folder = tiny_corpus(tmp_path / "in")
    options = replace(options, model=str(models / "continuous"), dtype=dtype, classes=None, label_column=None)
    run(folder, tmp_path / "out", options)
    cache = open_latent_cache(tmp_path / "out")
    expected = torch.cat([direct(path, options.model) for path in sorted(folder.iterdir())[:3]])
    found = [cache.row(row) for row in range(len(cache))]
    assert torch.equal(torch.stack([latents for latents, _ in found]), expected.to(getattr(torch, dtype)))
    assert {label for _, label in found} == {0} and cache.description.label_names == ["picture"]
    assert next(LatentLoader(cache, 4).batches())["latents"].shape == (4, *expected.shape[1:])
    assert next(iter(cache.to_dataset()))["label"] == 0


@pytest.mark.parametrize("kind", ["discrete", "continuous"])
def test_one_shard_gives_what_the_caching_scripts_give(tmp_path, options, models, kind):
    path = write_parquet(tmp_path / "in" / "all.parquet", encoded_pictures(7), [0, 1, 0, 1, 0, 1, 1])
    script = {"discrete": cache_tokens, "continuous": cache_latents}[kind]
    same = {"resolution": RESOLUTION, "crop": "random", "flip": True, "views": 2, "batch_size": 3, "seed": 5}
    if kind == "continuous":
        same |= {"crop": "center", "dtype": "float32"}
    script.main(script.CacheOptions(str(models / kind), str(path), str(tmp_path / "cache"), num_workers=0, **same))
    run(path, tmp_path / "out", replace(options, model=str(models / kind), **same))
    ours, theirs = files_of(tmp_path / "out"), files_of(tmp_path / "cache")
    names = [name for name in theirs if name != DESCRIPTION_NAME]
    if kind == "continuous":  # safetensors shuffles the metadata
        ours, theirs = ({name: load(files[name]) for name in names} for files in (ours, theirs))
        assert all(torch.equal(ours[name][key], theirs[name][key]) for name in names for key in theirs[name])
    assert len(names) == 2 and (kind == "continuous" or all(ours[name] == theirs[name] for name in names))


@pytest.mark.parametrize("kind", ["discrete", "continuous"])
def test_any_number_of_workers_and_threads_writes_the_same_bytes(tmp_path, options, models, kind):
    folder, options = tiny_corpus(tmp_path / "in", shards=5), replace(options, model=str(models / kind))
    run(folder, tmp_path / "one", options)
    for rank in (2, 0, 1):
        report = run(folder, tmp_path / "three", replace(options, num_workers=2), rank=rank, world_size=3)
    assert report.summary is not None  # the last one sums up, whatever its rank
    assert files_of(tmp_path / "one") == files_of(tmp_path / "three")


def test_finished_files_are_left_alone_and_damaged_ones_made_anew_on_request(tmp_path, options):
    folder, output = tiny_corpus(tmp_path / "in"), tmp_path / "out"
    run(folder, output, options)
    before = files_of(output)
    assert run(folder, output, options).made == 0
    (output / "tokens-00-00001.parquet").write_bytes(b"damaged")
    (output / "manifests" / "tokens-00-00002.json").unlink()
    assert run(folder, output, options).made == 1 and files_of(output) != before
    assert run(folder, output, options, verify=True).made == 1 and files_of(output) == before


def test_an_incomplete_corpus_is_not_taken_for_a_complete_one(tmp_path, options):
    report = run(tiny_corpus(tmp_path / "in"), tmp_path / "out", options, world_size=2)
    assert report.made == 2 and report.summary is None and not (tmp_path / "out" / "summary.json").exists()
    with pytest.raises(ValueError, match="is not complete: 2 of 4 files are missing"):
        open_token_cache(tmp_path / "out")


# what cannot be read


@pytest.mark.parametrize("write", [write_parquet, write_archive])
def test_corrupt_samples_are_counted_and_listed(tmp_path, options, write):
    good = encoded_pictures(3)
    path = tmp_path / "in" / ("a.parquet" if write is write_parquet else "a.tar")
    write(path, [good[0], CORRUPT, good[1], None, good[2]], [0, 1, 1, 1, 2])
    report = run(path, tmp_path / "out", options)
    manifest = json.loads((tmp_path / "out" / "manifests" / "tokens-00-00000.json").read_text())
    assert (manifest["samples"], manifest["pictures"], manifest["failed"]) == (5, 2, 3)
    keys = ["a/1.jpg", "a/3.jpg", "a/4.jpg"] if write is write_parquet else ["s/001", "s/003", "s/004"]
    assert [failure["key"] for failure in manifest["failures"]] == keys
    assert [failure["row"] for failure in manifest["failures"]] == [1, 3, 4]
    corrupt, missing, label = (failure["reason"] for failure in manifest["failures"])
    assert "not a readable image" in corrupt and " at 0x" not in corrupt
    assert ("no bytes" in missing or "no picture" in missing) and "label 2, not in 0..1" in label
    assert report.summary["failures"][0] == {"shard": path.name, **manifest["failures"][0]}
    assert open_token_cache(tmp_path / "out").dataset["picture"][:] == [0, 2]


def test_latents_that_are_not_finite_in_their_dtype_are_failures(tmp_path, options, models):
    model = tiny_tokenizer()
    model.register_to_config(latents_std=[1e-30] * len(model.config.latents_std))
    model.save_pretrained(tmp_path / "overflowing")
    path = write_parquet(tmp_path / "in" / "a.parquet", encoded_pictures(3), [0, 0, 0])
    with pytest.raises(ShardError, match="3 of 3 samples cannot be used.*NaN or infinite"):
        run(path, tmp_path / "out", replace(options, model=str(tmp_path / "overflowing"), max_failed_share=0))


def test_too_many_failures_fail_the_shard_and_the_others_go_on(tmp_path, options):
    good = encoded_pictures(3)
    write_parquet(tmp_path / "in" / "a.parquet", [CORRUPT] * 6 + good[:1], [0] * 7)
    write_archive(tmp_path / "in" / "b.tar", good, [0, 1, 0])
    failures = []
    corpus = Corpus.find([tmp_path / "in"], tmp_path / "out", options)
    report = encode_corpus(corpus, lambda name, error: failures.append((name, str(error))), "cpu")
    ((name, message),) = failures
    assert name == "a.parquet" and "6 of 7 samples cannot be used" in message and "a/0.jpg" in message
    assert (report.made, report.failed, report.summary) == (1, 1, None)
    assert run(tmp_path / "in", tmp_path / "out", replace(options, max_failed_share=0.05)).summary["failed"] == 6


@pytest.mark.parametrize("kind", ["header", "data", "end"])
def test_a_damaged_archive_fails_unless_everything_is_accepted(tmp_path, options, kind):
    path = write_archive(tmp_path / "in" / "a.tar", encoded_pictures(4), [0, 1, 0, 1])
    content = path.read_bytes()
    third = content.index(b"s/002.jpg")
    if kind == "header":  # tarfile takes it for the end
        path.write_bytes(content[: third + 150] + b"xxxx" + content[third + 154 :])
    else:
        path.write_bytes(content[: third + 700] if kind == "data" else content[:third])
    with pytest.raises(ShardError, match="truncated"):
        run(path, tmp_path / "out", options)
    summary = run(path, tmp_path / "out", replace(options, max_failed_share=1)).summary
    assert summary["pictures"] == 2
    assert "truncated" in json.loads((tmp_path / "out" / "manifests" / "tokens-00-00000.json").read_text())["damage"]


def test_a_damaged_table_fails(tmp_path, options):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(ShardError, match="not a parquet file"):
        run(tmp_path / "in", tmp_path / "out", options)


# settings


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"resolution": 48}, r"with grid=\[2, 2\], not \[3, 3\]"),
        ({"crop": "random"}, "with crop='center', not 'random'"),
        ({"classes": "3"}, r"with label_names=\['0', '1'\], not"),
        ({"label_column": None}, "label_column='label', not None"),
        ({"model": "continuous"}, "is not of this version's format"),
    ],
)
def test_other_settings_are_refused_and_nothing_is_changed(tmp_path, options, models, change, message):
    folder, output = tiny_corpus(tmp_path / "in"), tmp_path / "out"
    run(folder, output, options, world_size=2)
    before = files_of(output)
    if "model" in change:
        change = {"model": str(models / change["model"])}
    with pytest.raises(ValueError, match=message):
        run(folder, output, replace(options, **change))
    assert files_of(output) == before


def test_other_weights_and_other_shards_are_refused(tmp_path, options):
    folder, output = tiny_corpus(tmp_path / "in"), tmp_path / "out"
    run(folder, output, options, world_size=2)
    tiny_discrete_tokenizer(seed=1).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="with tokenizer_digest="):
        run(folder, output, replace(options, model=str(tmp_path / "other")))
    write_archive(folder / "001.tar", encoded_pictures(1), [0])
    with pytest.raises(ValueError, match=r"another corpus, with '001.tar' of \d+ bytes where now '001.tar' has"):
        run(folder, output, options)
    (folder / "001.tar").unlink()
    with pytest.raises(ValueError, match="another corpus, with '001.tar' of"):
        run(folder, output, options)


def test_folders_of_something_else_are_refused(tmp_path, options):
    folder = tiny_corpus(tmp_path / "in")
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / DESCRIPTION_NAME).write_text("{}")
    with pytest.raises(ValueError, match="is a cache, but not of a corpus"):
        run(folder, tmp_path / "cache", options)
    (tmp_path / "tokens").mkdir()
    (tmp_path / "tokens" / "tokens-14x14-00000.parquet").touch()
    with pytest.raises(ValueError, match="has 1 shards already"):
        run(folder, tmp_path / "tokens", options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mixed_precision": "fp16"}, "mixed_precision='fp16'"),
        ({"dtype": "int8"}, "dtype='int8'"),
        ({"views": 0}, "views=0"),
        ({"max_failed_share": 1.5}, "max_failed_share=1.5"),
    ],
)
def test_values_of_options_are_checked(options, change, message):
    with pytest.raises(ValueError, match=message):
        replace(options, **change)


# workers


def test_tasks_of_a_job_array_share_the_work():
    def share(task, first, last, step=1, count=None, **arguments):
        names = ("ID", task), ("MIN", first), ("MAX", last), ("STEP", step)
        count = (last - first) // step + 1 if count is None else count
        environment = {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in (*names, ("COUNT", count))}
        return slurm_share(environment, **arguments)

    assert slurm_share({}) == (0, 1) and slurm_share({}, 3, 4) == (3, 4)
    assert [share(task, 0, 3) for task in range(4)] == [(0, 4), (1, 4), (2, 4), (3, 4)]
    assert [share(task, 1, 5, 2) for task in (1, 3, 5)] == [(0, 3), (1, 3), (2, 3)]
    both = {share(task, 0, 2, rank=rank, world_size=2) for task in range(3) for rank in range(2)}
    assert both == {(rank, 6) for rank in range(6)}  # a torchrun in every task
    with pytest.raises(ValueError, match="has 2 tasks from 3 to 7 by 1: submit one without gaps"):
        share(3, 3, 7, count=2)


def test_the_command_encodes_reports_and_goes_on(tmp_path, models, monkeypatch):
    folder = tiny_corpus(tmp_path / "in")
    names = tmp_path / "classes.txt"
    names.write_text("cat\ndog\n")
    command = ["encode-corpus", str(folder), str(tmp_path / "out"), "--model", str(models / "discrete")]
    command += ["--resolution", str(RESOLUTION), "--device", "cpu", "--classes", str(names)]
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "2")
    monkeypatch.setenv("SLURM_ARRAY_TASK_MAX", "1")
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0 and "worker 1 of 2: 2 files of 5 pictures" in result.output, result.output
    assert "is not complete" in result.output
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID")
    result = CliRunner().invoke(app, command)
    assert "2 files of 10 pictures made" in result.output and "is complete: 4 files, 15 pictures" in result.output
    assert open_token_cache(tmp_path / "out").description.label_names == ["cat", "dog"]
    result = CliRunner().invoke(app, command[:-2])
    assert result.exit_code == 2 and "pass --classes" in result.stderr and result.stderr.count("\n") == 1
    write_parquet(tmp_path / "bad" / "a.parquet", [CORRUPT] * 6, [0] * 6)
    result = CliRunner().invoke(app, [command[0], str(tmp_path / "bad"), str(tmp_path / "none"), *command[3:]])
    assert result.exit_code == 1 and "failed a.parquet: 6 of 6" in result.stderr and "1 shards failed" in result.stdout


def test_an_actor_of_ray_makes_the_same_files(tmp_path, options):
    from dinotok.corpus_ray import CorpusActor

    folder = tiny_corpus(tmp_path / "in")
    write_parquet(folder / "bad.parquet", [CORRUPT] * 6, [0] * 6)
    corpus = Corpus.find([folder], tmp_path / "actor", options)
    actor = CorpusActor(corpus)
    rows = [actor({"number": np.int64(number)}) for number in [*range(5), 0]]
    assert [row["made"] for row in rows] == [1, 1, 1, 1, 0, 0] and [row["pictures"] for row in rows] == [
        5,
        5,
        5,
        0,
        0,
        0,
    ]
    assert "6 of 6 samples" in rows[4]["error"] and rows[4]["shard"] == "bad.parquet"
    encode_corpus(Corpus.find([folder], tmp_path / "out", options), lambda name, error: None, "cpu")
    assert files_of(tmp_path / "actor") == files_of(tmp_path / "out")


@pytest.mark.slow
def test_ray_makes_the_same_files(tmp_path, options, monkeypatch):
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    ray = pytest.importorskip("ray")
    from dinotok.corpus_ray import encode_corpus_with_ray

    folder = tiny_corpus(tmp_path / "in")
    run(folder, tmp_path / "out", options)
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, _node_ip_address="127.0.0.1")
    try:
        corpus = Corpus.find([folder], tmp_path / "ray", options)
        report = encode_corpus_with_ray(corpus, lambda name, error: None, num_actors=2)
    finally:
        ray.shutdown()
    assert (report.made, report.pictures) == (4, 15) and report.summary["files"] == 4
    assert files_of(tmp_path / "ray") == files_of(tmp_path / "out")


def command_of(folder, output, options, *launcher):
    arguments = [str(folder), str(output), "--model", options.model, "--resolution", str(RESOLUTION)]
    code = "import torch; torch.set_num_threads(1); from dinotok.cli import main; main()"
    start = launcher or (sys.executable, "-c", code)
    return [*start, "encode-corpus", *arguments, "--classes", "2", "--batch-size", "2", "--device", "cpu"]


@pytest.mark.slow
def test_two_processes_of_torchrun_write_what_one_writes(tmp_path, options):
    folder = tiny_corpus(tmp_path / "in", shards=6)
    write_parquet(folder / "999.parquet", [CORRUPT] * 6, [0] * 6)  # fails, and torchrun stops no other worker for it
    main = tmp_path / "worker.py"
    main.write_text("from dinotok.cli import main\n\nmain()\n")
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(main))
    outputs = {}
    for name, launcher in (("one", ()), ("two", torchrun)):
        command = command_of(folder, tmp_path / name, options, *launcher)
        result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert result.returncode == 1 and "failed 999.parquet" in result.stderr, result.stderr
        outputs[name] = files_of(tmp_path / name)
    assert len(outputs["one"]) == 2 + 2 * 6 and outputs["one"] == outputs["two"]
    assert "worker 1 of 2" in result.stdout


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_kills_at_random_moments_lose_and_double_nothing(tmp_path, options, seed):
    folder = tiny_corpus(tmp_path / "in", shards=12)
    options = replace(options, max_failed_share=0.5)
    write_archive(folder / "500.tar", [*encoded_pictures(4), CORRUPT], [0, 1, 0, 1, 0])
    run(folder, tmp_path / "undisturbed", options)
    corpus, generator, kills, seen = Corpus.find([folder], tmp_path / "out", options), random.Random(seed), 0, {}
    while kills < 8:
        child = os.fork()
        if not child:
            status = 1
            try:
                encode_corpus(corpus, lambda name, error: None, "cpu")
                status = 0
            finally:
                os._exit(status)
        time.sleep(generator.uniform(0, 0.4))
        os.kill(child, signal.SIGKILL)
        kills += os.waitpid(child, 0)[1] == signal.SIGKILL
        kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("tokens-*")}
        assert seen.items() <= kept.items()  # what was finished is neither lost nor made again
        seen = kept
        if len(kept) == 13:
            shutil.rmtree(tmp_path / "out")
            seen = {}
    run(folder, tmp_path / "out", options)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "undisturbed")


def test_a_kill_between_the_two_renames_loses_nothing(tmp_path, options, monkeypatch):
    """The manifest is there and the file is not: the file counts as missing, and is made again."""
    folder = tiny_corpus(tmp_path / "in")
    run(folder, tmp_path / "undisturbed", options)
    encoder = CorpusEncoder(Corpus.find([folder], tmp_path / "out", options), "cpu")
    replace_file = os.replace

    def killed(source, target):
        if target == encoder.paths()[0]:
            raise KeyboardInterrupt
        replace_file(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            encoder.encode(0)
    assert (tmp_path / "out" / "manifests" / "tokens-00-00000.json").is_file()
    assert not is_done(encoder.paths()[0])
    assert run(folder, tmp_path / "out", options).made == 4
    assert files_of(tmp_path / "out") == files_of(tmp_path / "undisturbed")
