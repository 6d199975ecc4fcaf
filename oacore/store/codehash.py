"""Hash of the library code that a stage runs, for Snakemake's `params`: Snakemake does not see changes of imported
modules.

The syntax tree without docstrings is hashed, so comments, docstrings and formatting never trigger a re-run. Imports
inside the two packages are followed, except modules whose effect reaches a rule in another way.
"""

import ast
import hashlib
from functools import cache
from importlib.util import find_spec
from pathlib import Path

PACKAGES = ("oacore", "oakernels")


# Settings reach a rule through its params, paths through its inputs and outputs; messages, how a file gets its name and
# how a stage is called are no results.
NOT_FOLLOWED = {
    f"oacore.{name}"
    for name in (
        *("errors", "progress", "jobs", "runner", "running"),
        *("store.layout", "store.fingerprint", "store.atomic", "store.codehash"),
    )
} | {"oacore"}


def codehash(*modules: str) -> str:
    """Ten hex digits over modules and everything that they import from our packages."""
    digest = hashlib.sha256()
    for name in sorted(set[str]().union(*map(_reachable, modules))):
        digest.update(f"{name}\n{_tree(name)[0]}\n".encode())
    return digest.hexdigest()[:10]


def every_module() -> list[str]:
    """The names of all modules of our packages."""
    return [
        ".".join((package, *path.relative_to(_root(package)).with_suffix("").parts)).removesuffix(".__init__")
        for package in PACKAGES
        for path in sorted(_root(package).rglob("*.py"))
    ]


def _reachable(module: str) -> set[str]:
    reached, queue = set[str](), [module]
    while queue:
        name = queue.pop()
        if name not in reached:
            reached.add(name)
            queue += _tree(name)[1]
    return reached


@cache
def _tree(module: str) -> tuple[str, list[str]]:
    """A module's syntax tree without docstrings, and the modules of ours that it imports anywhere, functions
    included.
    """
    path = _path(module)
    assert path is not None, f"{module} is not one of our modules"
    tree = ast.parse(path.read_text(encoding="utf-8"))
    imported: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            imported |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(
            node, clean=False
        ):
            node.body = node.body[1:]
    ours = [name for name in sorted(imported) if name.split(".")[0] in PACKAGES and _is_followed(name) and _path(name)]
    return ast.dump(tree), ours


def _is_followed(module: str) -> bool:
    return module not in NOT_FOLLOWED and module.split(".")[:2] != ["oacore", "config"]


def _path(module: str) -> Path | None:
    """A module's file, found without importing it: an import of oacore.models.load would pull in torch."""
    package, _, rest = module.partition(".")
    root = _root(package)
    base = root.joinpath(*rest.split(".")) if rest else root
    return next((path for path in (base.with_suffix(".py"), base / "__init__.py") if path.is_file()), None)


@cache
def _root(package: str) -> Path:
    spec = find_spec(package)
    assert spec is not None and spec.origin is not None, f"{package} is not installed"
    return Path(spec.origin).parent
