"""Models of the package are found by name, where nothing else of that name is meant."""

import os

import pytest

from dinotok.bundled import bundled_folder, bundled_models, resolve_bundled


def test_names_resolve_and_everything_else_stays(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in bundled_models():
        folder = resolve_bundled(name)
        assert {"config.json", "model_index.json"} & set(os.listdir(folder))
        assert os.fspath(bundled_folder(name)) == folder
        (tmp_path / name).mkdir()
        assert resolve_bundled(name) == name  # a folder of the user's goes first
        assert os.fspath(bundled_folder(name)) == folder  # but not here
    for other in ("facebook/dinov2-base", "no-such-model", str(tmp_path), "../models", ""):
        assert resolve_bundled(other) == other
    with pytest.raises(ValueError, match="'no-such-model' is not among the models of the package"):
        bundled_folder("no-such-model")
