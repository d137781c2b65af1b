"""Which models the demo loads, and which it refuses."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import library
import pytest
from huggingface_hub import HfApi
from library import Library, bundled_generators, bundled_tokenizers, missing_generators, repository_size

from dinotok.bundled import bundled_models
from tests.tiny_tokenizers import tiny_tokenizer


def test_models_of_the_package_are_listed_by_kind():
    assert bundled_tokenizers() == ["dinotok-tiny-ae", "dinotok-tiny-vq"]
    assert "dinotok-tiny-dit" in bundled_generators()
    assert not set(missing_generators()) & set(bundled_models())


def test_a_tokenizer_is_loaded_once():
    models = Library()
    assert models.tokenizer("dinotok-tiny-ae") is models.tokenizer("dinotok-tiny-ae")


@pytest.mark.parametrize("name", ["/etc/passwd", "../secrets", "folder", "a/b/c", "http://host/x", "", "owner/na me"])
def test_strangers_name_models_of_the_package_or_the_hub_only(name):
    with pytest.raises(ValueError, match="neither a model of the package nor a Hub repository"):
        Library().check_name(name)


def test_folders_are_for_those_who_start_the_server(tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path / "mine")
    assert Library(allow_folders=True).tokenizer(str(tmp_path / "mine")).config.texture_channels == 8
    with pytest.raises(ValueError, match="neither"):
        Library().tokenizer(str(tmp_path / "mine"))


def test_a_repository_out_of_reach_is_a_sentence():
    with pytest.raises(OSError, match="'owner/tokenizer' is no folder here and cannot be had from the Hub"):
        Library().tokenizer("owner/tokenizer")
    with pytest.raises(OSError, match="cannot be had from the Hub"):
        Library().find_generator(" owner/pipeline ")


def test_a_generator_that_this_version_lacks_is_named(monkeypatch):
    monkeypatch.setattr(library, "bundled_models", lambda: ["dinotok-tiny-ae"])
    with pytest.raises(ValueError, match="dinotok-tiny-ar is not part of this version of the package"):
        Library().find_generator("dinotok-tiny-ar")


@pytest.fixture
def hub(monkeypatch):
    """A server that answers as the Hub does when asked what a repository has."""
    files = [
        {"rfilename": "model.safetensors", "size": 3 * 2**30},
        {"rfilename": "transformer/part.safetensors", "size": 2 * 2**30},
        {"rfilename": "picture.png", "size": 9 * 2**30},
    ]

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self):
            found = self.path.startswith("/api/models/owner/large") and "blobs" in self.path
            body = json.dumps({"id": "owner/large", "siblings": files} if found else {"error": "not found"}).encode()
            self.send_response(200 if found else 404)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(library, "is_offline_mode", lambda: False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(library, "HfApi", lambda: HfApi(endpoint=f"http://127.0.0.1:{server.server_port}"))
    yield server
    server.shutdown()
    server.server_close()


def test_a_large_repository_is_refused_before_it_is_fetched(hub):
    with pytest.raises(ValueError, match=r"'owner/large' has 5\.0 GB of weights; at most 4\.0 are taken"):
        Library().check_name("owner/large")
    assert Library(max_download=5 * 2**30).check_name("owner/large") == "owner/large"
    assert repository_size("owner/missing") == 0
