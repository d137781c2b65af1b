"""Laws of the package as a whole: what it bundles, who imports whom, what is never committed, which versions fit."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from PIL import Image

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src"
MODULES = sorted((SOURCE / "dinotok").rglob("*.py"))


def module_name(path: Path) -> str:
    """Return the dotted name of a source file: `dinotok.models.encoders`, or `dinotok` for `__init__.py`."""
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def inside(name: str, packages: tuple[str, ...]) -> bool:
    """Tell whether a dotted name is one of the packages or lies in one."""
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def imported_names(node: ast.AST, path: Path) -> list[str]:
    """Return the absolute dotted names of an import statement; `from a import b` gives `a.b`."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    package = path.relative_to(SOURCE).parent.parts  # a relative import starts at the folder of the file
    base = package[: len(package) - node.level + 1] if node.level else ()
    return [".".join((*base, *filter(None, [node.module]), alias.name)) for alias in node.names]


def walk(node: ast.AST, functions: bool = True) -> Iterator[ast.AST]:
    """Yield all nodes below `node`, without `if TYPE_CHECKING` blocks and, on request, without function bodies."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) and not functions:
            continue
        yield child
        yield from walk(child, functions)


def all_imports(path: Path, functions: bool = True) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {name for node in walk(tree, functions) for name in imported_names(node, path)}


each_module = pytest.mark.parametrize("path", MODULES, ids=module_name)


# What the package bundles


def photographs() -> list[Path]:
    folder = resources.files("dinotok") / "assets" / "photographs"
    return sorted(path for path in Path(str(folder)).iterdir() if path.suffix != ".md")


def test_photographs_are_small_colour_images_of_different_shapes():
    sizes = set()
    for path in photographs():
        with Image.open(path) as image:
            image.load()
            assert (image.format, image.mode) == ("JPEG", "RGB"), path.name
            assert max(image.size) <= 640, path.name
            sizes.add(image.size)
    assert len(photographs()) >= 4
    assert any(width != height for width, height in sizes)
    assert sum(path.stat().st_size for path in photographs()) < 700_000


def test_every_photograph_has_its_source_and_no_source_is_left_over():
    rows = (photographs()[0].parent / "SOURCES.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"^\| `(.+?)` \|", rows, flags=re.MULTILINE)) == [path.name for path in photographs()]


def test_package_is_typed():
    assert (resources.files("dinotok") / "py.typed").is_file()


# Who imports whom

FORBIDDEN_IMPORTS = {
    "dinotok.models": ("accelerate", "datasets", "dinotok.training", "dinotok.pipelines"),
    "dinotok.statistics": ("dinotok.models",),
    "dinotok.losses": ("dinotok.models",),
    "dinotok.metrics": ("dinotok.models",),
    "dinotok.data": ("dinotok.models",),
}
OPTIONAL_PACKAGES = ("torchvision", "timm", "lpips", "torch_fidelity", "gradio", "ray")
PICKLES = ("pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib")


def is_public_name_of_root(name: str) -> bool:
    """Tell whether `name` is a public name that `dinotok/__init__.py` would load from anywhere in the package."""
    parts = name.split(".")
    submodules = {module_name(path) for path in MODULES}
    return parts[0] == "dinotok" and not inside(name, tuple(submodules - {"dinotok"})) and parts[-1][0] != "_"


@each_module
def test_layers_import_downwards(path: Path):
    for layer, forbidden in FORBIDDEN_IMPORTS.items():
        if inside(module_name(path), (layer,)):
            names = all_imports(path)
            assert not {name for name in names if inside(name, forbidden)}
            assert not {name for name in names if is_public_name_of_root(name)}, "import from the defining module"


@each_module
def test_optional_packages_are_imported_lazily(path: Path):
    assert not {name for name in all_imports(path, functions=False) if inside(name, OPTIONAL_PACKAGES)}


@each_module
def test_no_pickle_is_loaded(path: Path):
    assert not {name for name in all_imports(path) if inside(name, PICKLES)}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            assert "weights_only=True" in ast.unparse(node), f"line {node.lineno}"
    assert "torch.load" not in all_imports(path), "call it as torch.load(..., weights_only=True)"


@each_module
def test_library_code_raises_instead_of_asserting(path: Path):
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    assert [node.lineno for node in nodes if isinstance(node, ast.Assert)] == []


def test_import_of_the_package_loads_no_heavy_library():
    heavy = ["torch", "diffusers", "transformers"]
    code = f"import sys, dinotok; print(sorted(set({heavy}) & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


# What must not be committed: paths of one machine, hosts of one package registry

MACHINE_FOLDERS = "|".join(("work", "opt", "root", "home"))
FORBIDDEN_TEXT = {
    "a path of one machine": rf"(?<![\w.])/(?:{MACHINE_FOLDERS})/",
    "a file URL": r"\bfile:/{3}",
    "a package registry": r"\b(?:pypi|pythonhosted)\.org\b|\bdownload\.pytorch\.org\b",
    "a package index": r"(?:index-url|find-links)[\s=]+\S*:/{2}",
}


def files_to_commit() -> list[Path]:
    """Return the tracked files and the new ones that git does not ignore."""
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if result.returncode != 0:
        pytest.skip("not a git checkout")
    return [path for name in result.stdout.split("\0") if name and (path := ROOT / name).is_file()]


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("see /" + "work/x", "a path of one machine"),
        ('"/' + 'home/me/x"', "a path of one machine"),
        ("file:" + "///x", "a file URL"),
        ("https://" + "pypi" + ".org/simple", "a package registry"),
        ("--extra-index-url" + " http" + "://host/simple", "a package index"),
    ],
)
def test_forbidden_text_is_recognised(text: str, kind: str):
    assert re.search(FORBIDDEN_TEXT[kind], text)


@pytest.mark.parametrize("text", ["framework/x", "https://host.org/homepage/", "a/work/x", "../root/x", "find-links"])
def test_ordinary_text_is_allowed(text: str):
    assert not [kind for kind, pattern in FORBIDDEN_TEXT.items() if re.search(pattern, text)]


def test_no_file_names_a_machine_or_a_registry():
    found = []
    for path in files_to_commit():
        content = path.read_bytes()
        if b"\0" in content:  # not text
            continue
        for number, line in enumerate(content.decode("utf-8").splitlines(), start=1):
            kinds = [kind for kind, pattern in FORBIDDEN_TEXT.items() if re.search(pattern, line)]
            found += [f"{path.relative_to(ROOT)}:{number}: {kind}" for kind in kinds]
    assert found == []


# Which versions fit


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def constraints() -> dict[str, str]:
    """Return name and version of every line of constraints.txt; a line of any other form is an error."""
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    rows = [re.fullmatch(r"([\w.-]+)==([\w.]+)", line) for line in lines]  # no URL, no local version as in +cpu
    assert [line for line, row in zip(lines, rows, strict=True) if row is None] == []
    return {canonicalize_name(row[1]): row[2] for row in rows if row}


@pytest.mark.parametrize("text", [*project()["dependencies"], *project()["optional-dependencies"]["dev"]])
def test_tested_version_is_in_the_supported_range(text: str):
    requirement = Requirement(text)
    version = constraints()[canonicalize_name(requirement.name)]
    assert requirement.specifier.contains(version)


ALSO_SUPPORTED = {"torch": "2.11.0", "transformers": "5.17.0", "accelerate": "1.15.0", "huggingface-hub": "1.33.0"}


def test_ranges_admit_the_older_versions_we_promise():
    ranges = {canonicalize_name(r.name): r.specifier for r in map(Requirement, project()["dependencies"])}
    assert {name: version for name, version in ALSO_SUPPORTED.items() if version not in ranges[name]} == {}
