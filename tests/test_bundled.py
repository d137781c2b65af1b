"""Models of the package are found by name, where nothing else of that name is meant."""

import os

from dinotok.bundled import bundled_models, resolve_bundled


def test_names_resolve_and_everything_else_stays(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in bundled_models():
        folder = resolve_bundled(name)
        assert os.path.isfile(os.path.join(folder, "config.json"))
        (tmp_path / name).mkdir()
        assert resolve_bundled(name) == name  # a folder of the user's goes first
    for other in ("facebook/dinov2-base", "no-such-model", str(tmp_path), "../models", ""):
        assert resolve_bundled(other) == other
