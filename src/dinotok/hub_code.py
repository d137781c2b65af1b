"""One self-contained Python file of the classes that a Hub repository needs, written from the modules of the package.

diffusers fetches one file of code for a pipeline and one for a model, and nothing that these import relatively: code
that works without the package has to be a single file. It is made when a folder is exported, so it is never a second
copy in this repository.
"""

import ast
import hashlib
import importlib
import importlib.util
import inspect
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import ModuleType

_PACKAGE = __package__

_BEGIN = """\
# diffusers runs a file of code anew at every load, and for folders always in the module of that file's name. Under a
# name made of its content, the classes of one load are those of the next, and no other file can replace them.
_LOADED_AS, __name__ = __name__, "dinotok_code_{digest}"
sys.modules.setdefault(__name__, sys.modules[_LOADED_AS])
"""

_END = '''\
def _settle(loaded_as: str, is_pipeline: bool) -> None:
    """Keep the classes of an installed dinotok, or else of the first load."""
    try:
        installed = importlib.import_module("dinotok")
    except ModuleNotFoundError:
        installed = None
    if hasattr(installed, "__version__"):  # a folder of that name is a module, too
        globals().update({{name: getattr(installed, name) for name in installed.__all__ if name in _PUBLIC}})
    else:
        first = sys.modules[__name__]
        globals().update(vars(first))
        if is_pipeline:  # where diffusers looks for the components that model_index.json lists as ["dinotok", class]
            diffusers.pipelines.dinotok = first
    module = types.ModuleType(loaded_as)  # the next load runs in a module of its own
    vars(module).update(globals(), __name__=loaded_as)
    sys.modules[loaded_as] = module


_PUBLIC = {public}
_settle(_LOADED_AS, is_pipeline={is_pipeline})
'''

_NEEDED = ("import importlib", "import sys", "import types", "import diffusers.pipelines")


@dataclass
class _Module:
    """A module of the package, taken apart.

    Attributes:
        name: Dotted.
        body: Its source without imports and module docstring.
        imports: Statements that import from elsewhere, one name each.
        needs: Modules of the package that it imports from.
        names: What it defines, with the source of each definition.
    """

    name: str
    body: str = ""
    imports: list[str] = field(default_factory=list)
    needs: list[str] = field(default_factory=list)
    names: dict[str, str] = field(default_factory=dict)


def standalone_code(class_names: Sequence[str]) -> str:
    """Return one Python file that defines public classes of dinotok and all they need from the package.

    Where dinotok is installed, the file hands out the installed classes; where it is not, its own.

    Args:
        class_names: Such as `AutoencoderDINOTok`; a pipeline's components, then the pipeline itself.

    Raises:
        ValueError: If two modules use one name for different things, or import in a way that a single file cannot
            follow.
    """
    from diffusers import DiffusionPipeline

    import dinotok

    classes = [getattr(dinotok, name) for name in class_names]
    modules: dict[str, _Module] = {}
    for one in classes:
        _collect(inspect.getmodule(one), modules)
    _separate_names(list(modules.values()))
    parts = [f"# {'-' * 20} {_file_of(module.name)}\n\n{module.body.strip()}\n" for module in modules.values()]
    code = "\n\n".join(parts)
    imports = sorted({*_NEEDED, *(line for module in modules.values() for line in module.imports)}, key=_import_order)
    public = sorted(name for name in dinotok.__all__ if any(name in module.names for module in modules.values()))
    header = (
        f'"""{", ".join(class_names)}: dinotok {dinotok.__version__} in one file (Apache-2.0).\n\n'
        'Written by `dinotok export` from the modules named below; an installed dinotok goes first.\n"""'
    )
    end = _END.format(public=public, is_pipeline=issubclass(classes[-1], DiffusionPipeline))
    digest = hashlib.sha256("\n".join([*imports, code, end]).encode()).hexdigest()[:16]
    return "\n\n".join([header, "\n".join(imports), _BEGIN.format(digest=digest), code, end])


def _collect(module: ModuleType | None, found: dict[str, _Module]) -> None:
    """Add a module, after those that it needs."""
    if module is None or module.__name__ in found:
        return
    taken = _take_apart(module)
    for name in taken.needs:
        _collect(importlib.import_module(name), found)
    found[taken.name] = taken


def _take_apart(module: ModuleType) -> _Module:
    """Split a module into what it defines and what it imports."""
    source = inspect.getsource(module)
    lines = source.splitlines()
    taken = _Module(module.__name__)
    dropped: set[int] = set()
    tree = ast.parse(source)
    _refuse_late_imports(tree, module.__name__)
    for index, node in enumerate(tree.body):
        if isinstance(node, ast.Import | ast.ImportFrom):
            _take_import(node, module, taken)
        elif not (_is_docstring(node, index) or _names_package(node)):
            taken.names.update(dict.fromkeys(_defined_names(node), ast.unparse(node)))
            continue
        dropped.update(range(node.lineno - 1, node.end_lineno or node.lineno))
        if _names_package(node):  # with the comment above it
            above = node.lineno - 2
            while above >= 0 and lines[above].startswith("#"):
                dropped.add(above)
                above -= 1
    taken.body = "\n".join(line for number, line in enumerate(lines) if number not in dropped)
    return taken


def _take_import(node: ast.Import | ast.ImportFrom, module: ModuleType, taken: _Module) -> None:
    if isinstance(node, ast.Import):
        outside = [alias for alias in node.names if alias.name.split(".")[0] != _PACKAGE]
        taken.imports += [f"import {_spelled(alias)}" for alias in outside]
        return
    source = "." * node.level + (node.module or "")
    if node.level:
        source = importlib.util.resolve_name(source, module.__package__)
    if source.split(".")[0] != _PACKAGE:
        taken.imports += [f"from {source} import {_spelled(alias)}" for alias in node.names]
        return
    if renamed := [alias for alias in node.names if alias.asname not in (None, alias.name)]:
        raise ValueError(f"{module.__name__} imports {renamed[0].name} as {renamed[0].asname}: one file has one name.")
    if source == _PACKAGE:
        raise ValueError(f"{module.__name__} imports from the package itself: name the module instead.")
    taken.needs.append(source)


def _refuse_late_imports(tree: ast.Module, name: str) -> None:
    """Refuse imports from the package that are inside something: they would fail when they run."""
    outer = set(tree.body)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node not in outer and (node.level or _PACKAGE in str(node.module)):
            raise ValueError(f"{name}, line {node.lineno}: an import from the package within a block.")


def _is_docstring(node: ast.stmt, index: int) -> bool:
    return index == 0 and isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _names_package(node: ast.stmt) -> bool:
    """Whether a statement is `diffusers.pipelines.dinotok = dinotok`, which a pipeline without dinotok cannot run."""
    return isinstance(node, ast.Assign) and isinstance(node.value, ast.Name) and node.value.id == _PACKAGE


def _defined_names(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [node.name]
    return [child.id for child in ast.walk(node) if isinstance(child, ast.Name) and isinstance(child.ctx, ast.Store)]


def _separate_names(modules: list[_Module]) -> None:
    """Rename a module's private names that an earlier one uses for other things; refuse it of public names."""
    owners: dict[str, tuple[str, str]] = {}
    for module in modules:
        bound = {**module.names, **{line.split()[-1].split(".")[0]: line for line in module.imports}}
        for name, source in bound.items():
            known, owner = owners.setdefault(name, (source, module.name))
            if source == known or _same_root(source, known):
                continue
            if not name.startswith("_") or name not in module.names or _is_member(name, module.body):
                raise ValueError(f"{owner} and {module.name} use {name!r} for different things; rename one of them.")
            new = f"{name}_of_{module.name.rpartition('.')[2]}"
            module.body = re.sub(rf"(?<![\w.]){name}(?!\w)", new, module.body)


def _is_member(name: str, source: str) -> bool:
    """Whether something's attribute has this name, too, which renaming by text would split from its uses."""
    return re.search(rf"\.{name}(?!\w)", source) is not None


def _same_root(first: str, second: str) -> bool:
    """Whether both are imports such as `import torch` and `import torch.distributed`, which bind one name."""
    roots = [line.split()[1].split(".")[0] for line in (first, second) if line.startswith("import ")]
    return len(roots) == 2 and roots[0] == roots[1] and " as " not in first + second


def _spelled(alias: ast.alias) -> str:
    return alias.name if alias.asname is None else f"{alias.name} as {alias.asname}"


def _import_order(line: str) -> tuple[bool, str]:
    return line.startswith("from"), line


def _file_of(name: str) -> str:
    return f"{name.replace('.', '/')}.py"
