"""The package's surface is what runs: all that is public has a caller in oacore, the kernels or their benchmarks."""

import ast
from pathlib import Path

import oakernels

ROOT = Path(__file__).parents[2]
KERNELS = [path for path in ROOT.glob("kernels/oakernels/*.py") if path.name != "__init__.py"]
CALLERS = [*KERNELS, *ROOT.glob("oacore/**/*.py"), *ROOT.glob("kernels/bench/*.py")]


def test_every_public_function_and_class_has_a_caller_outside_tests() -> None:
    public, used = set[str](), set[str]()
    for path in CALLERS:
        tree = ast.parse(path.read_text())
        used |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        if path in KERNELS:
            definitions = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
            public |= {node.name for node in definitions if not node.name.startswith("_")}
    assert public
    assert public <= used, public - used
    assert set(oakernels.__all__) <= public
