"""`spaces/` is a repository that the Hub can run: its header, its requirements, and files that need no others."""

import ast
import sys
import tomllib
from pathlib import Path

import yaml
from packaging.requirements import Requirement
from packaging.version import Version

from tests.spaces.conftest import SPACE

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text("utf-8"))["project"]


def test_the_header_names_the_app_and_versions_that_the_package_takes():
    header = yaml.safe_load((SPACE / "README.md").read_text("utf-8").split("---\n")[1])
    assert (header["sdk"], header["license"]) == ("gradio", PROJECT["license"].lower())
    assert (SPACE / header["app_file"]).is_file()
    assert len(header["short_description"]) <= 60  # the Hub's limit
    (gradio,) = (Requirement(text) for text in PROJECT["optional-dependencies"]["demo"])
    assert Version(header["sdk_version"]) in gradio.specifier
    assert PROJECT["requires-python"] == f">={header['python_version']}"


def test_the_requirements_are_this_package():
    (requirement,) = (Requirement(line) for line in (SPACE / "requirements.txt").read_text("utf-8").splitlines())
    assert requirement.name == PROJECT["name"] and requirement.extras == {"demo"}
    assert Version(PROJECT["version"]) in requirement.specifier


def test_the_files_import_each_other_and_what_is_installed_only():
    own = {path.stem for path in SPACE.glob("*.py")}
    comes_along = {"dinotok", "diffusers", "gradio", "huggingface_hub", "numpy", "PIL", "torch"}
    for path in SPACE.glob("*.py"):
        tree = ast.parse(path.read_text("utf-8"))
        names = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        names |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        assert {name.split(".")[0] for name in names} <= own | comes_along | sys.stdlib_module_names, path.name
