"""`dinotok push`, by the real huggingface_hub, to a process that speaks the Hub's endpoints.

The server is `tests/hub_server.py`, whose docstring lists what it covers: regular files in the commit, large files by
Git LFS with basic transfer and verification. The Xet storage that the real Hub prefers is switched off in the client,
so that path is huggingface_hub's word; tokens and private repositories are not tried either.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dinotok.hub_export import export_repository
from dinotok.hub_upload import check_repository
from tests.tiny_tokenizers import tiny_tokenizer

CARD = "---\nlicense: mit\n---\n# A model\n"


class LocalHub:
    """A server process.

    Attributes:
        address: Of the server.
        folder: What it was sent.
    """

    def __init__(self, process: subprocess.Popen, folder: Path):
        self.process, self.folder = process, folder
        self.address = process.stdout.readline().strip()

    def environment(self, home: Path) -> dict[str, str]:
        """Of a client with a home of its own, that knows this Hub only."""
        without = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        return {**without, "HF_ENDPOINT": self.address, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}

    def requests(self) -> list[dict]:
        return [json.loads(line) for line in (self.folder / "log.jsonl").read_text().splitlines()]

    def clear(self) -> None:
        (self.folder / "log.jsonl").write_text("")


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> Iterator[LocalHub]:
    folder = tmp_path_factory.mktemp("hub")
    command = [sys.executable, str(Path(__file__).with_name("hub_server.py")), str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    yield LocalHub(process, folder)
    process.terminate()
    process.wait()


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("repositories")
    tiny_tokenizer().save_pretrained(folder / "saved")
    (folder / "card.md").write_text(CARD)
    return export_repository(str(folder / "saved"), folder / "tokenizer", card=folder / "card.md").folder


def push(hub: LocalHub, home: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", "from dinotok.cli import main; main()", "push", *arguments]
    return subprocess.run(command, env=hub.environment(home), capture_output=True, text=True, timeout=300)


def test_a_dry_run_lists_what_would_go(repository):
    files = check_repository(repository, "someone/tokenizer")
    assert set(files) == {
        "README.md",
        "autoencoder_dinotok.py",
        "config.json",
        "diffusion_pytorch_model.safetensors",
    }
    assert all((repository / name).stat().st_size == size for name, size in files.items())


def test_a_push_that_broke_off_goes_on(hub, repository, tmp_path):
    (repository / ".cache").mkdir(exist_ok=True)
    (repository / ".cache" / "notes").write_text("hidden files stay")
    (hub.folder / "refuse-commits").touch()
    refused = push(hub, tmp_path, str(repository), "someone/tokenizer")
    assert refused.returncode == 2 and "refused" in refused.stderr and "Traceback" not in refused.stderr
    uploads = [one for one in hub.requests() if one["method"] == "PUT"]
    weights = (repository / "diffusion_pytorch_model.safetensors").stat().st_size
    assert [one["bytes"] for one in uploads] == [weights]

    (hub.folder / "refuse-commits").unlink()
    hub.clear()
    done = push(hub, tmp_path, str(repository), "someone/tokenizer")
    assert done.returncode == 0, done.stderr
    assert f"{hub.address}/someone/tokenizer/commit/" in done.stdout and "4 files" in done.stdout
    assert not [one for one in hub.requests() if one["method"] == "PUT"]  # the weights are there already
    download = [
        sys.executable,
        "-c",
        "import sys, huggingface_hub as h; print(h.snapshot_download('someone/tokenizer', local_dir=sys.argv[1]))",
        str(tmp_path / "copy"),
    ]
    subprocess.run(download, env=hub.environment(tmp_path), check=True, capture_output=True, timeout=300)
    for name in check_repository(repository, "someone/tokenizer"):
        assert (tmp_path / "copy" / name).read_bytes() == (repository / name).read_bytes()
    assert not (tmp_path / "copy" / ".cache" / "notes").exists()


def test_what_is_not_fit_to_be_published_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="is no folder"):
        check_repository(tmp_path / "nothing", "someone/tokenizer")
    with pytest.raises(ValueError, match="neither config.json nor model_index.json"):
        check_repository(tmp_path, "someone/tokenizer")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"has no README\.md"):
        check_repository(tmp_path, "someone/tokenizer")
    (tmp_path / "README.md").write_text("---\ntags: []\n---\n")
    with pytest.raises(ValueError, match="states no licence"):
        check_repository(tmp_path, "someone/tokenizer")
    (tmp_path / "README.md").write_text(CARD)
    assert check_repository(tmp_path, "someone/tokenizer") == {"README.md": len(CARD), "config.json": 2}
    with pytest.raises(ValueError, match="cannot be the name of a repository"):
        check_repository(tmp_path, "a/b/c")
    (tmp_path / "old.bin").touch()
    with pytest.raises(ValueError, match=r"old\.bin may be a pickle"):
        check_repository(tmp_path, "someone/tokenizer")
