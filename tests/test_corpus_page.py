"""What docs/corpus.md says can be typed, works; its tables are the committed results."""

import json
import re

import pytest
from typer.testing import CliRunner

from dinotok.cli import app
from tests.test_readme import RESULTS, ROOT, blocks, run_commands, run_snippet
from tests.tiny_corpora import encoded_pictures, write_archive, write_parquet


@pytest.fixture
def shards(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_parquet(tmp_path / "shards" / "a.parquet", encoded_pictures(2), [0, 1])
    write_archive(tmp_path / "shards" / "b.tar", encoded_pictures(1), [1])
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    return tmp_path / "shards"


def test_commands_and_snippets_of_the_page_run_in_order(shards):
    run_commands("docs/corpus.md")
    names: dict = {}
    for snippet in blocks("docs/corpus.md", "python"):
        if "corpus_ray" not in snippet:
            run_snippet(snippet, names)
    assert names["indices"].shape == (2, 2, 16, 16) and set(names["row"]) == {"indices", "label", "picture", "view"}
    assert len(json.loads((shards.parent / "corpus" / "latents" / "summary.json").read_text())["failures"]) == 0


def test_the_job_array_of_the_page_shares_the_work(shards, monkeypatch):
    (script,) = blocks("docs/corpus.md", "sh")
    first, last = map(int, re.search(r"--array=(\d+)-(\d+)", script).groups())
    command = next(line for line in script.splitlines() if line.startswith("srun dinotok ")).split()[2:]
    for name, value in (("MIN", first), ("MAX", last), ("COUNT", last - first + 1)):
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", str(value))
    for task, made in ((first + 1, 1), (first, 1)):
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", str(task))
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 0 and f"worker {task} of 32: {made} files" in result.output, result.output
    assert "is complete: 2 files, 3 pictures" in result.output


@pytest.mark.slow
def test_the_snippet_on_ray_runs(shards, monkeypatch):
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    ray = pytest.importorskip("ray")
    (snippet,) = (snippet for snippet in blocks("docs/corpus.md", "python") if "corpus_ray" in snippet)
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, _node_ip_address="127.0.0.1")
    names = {"__name__": "__main__"}
    try:
        run_snippet(snippet, names)
    finally:
        ray.shutdown()
    assert names["report"].pictures == 3 and names["report"].summary["files"] == 2


@pytest.mark.parametrize("name", ["corpus", "corpus_costs", "corpus_kills"])
def test_tables_of_the_page_are_the_committed_results(name):
    table = [line for line in (RESULTS / f"{name}.md").read_text("utf-8").splitlines() if line.startswith("|")]
    page = (ROOT / "docs" / "corpus.md").read_text("utf-8")
    assert table and all(line in page for line in table)
