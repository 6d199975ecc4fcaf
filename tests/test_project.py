"""The house rules: dependencies agree, imports point down, code hashes see code and nothing else."""

import ast
import re
import tomllib
from pathlib import Path

import pytest
import yaml

from oacore import __version__
from oacore.store import codehash as codehash_module
from oacore.store.codehash import codehash

ROOT = Path(__file__).parents[1]
CONDA_NAMES = {"torch": "pytorch", "snakemake": "snakemake-minimal", "matplotlib": "matplotlib-base"}

# Lower floors know nothing of higher ones, and rooms of one floor nothing of each other: no experiment imports another.
# A room is a folder of oacore, or a module directly in it; one that is missing here fails the test: give it a floor.
FLOORS = (
    ("__init__", "errors", "progress", "draws", "metrics"),
    ("config",),
    ("store",),
    ("tasks", "report", "fits", "jobs", "verify"),
    ("models",),
    ("engine",),
    ("inputs",),
    ("ablation", "circuits", "tracing", "lenses", "vision"),
    # Interactions are judged as circuits are; removal learns masks as they are learned; a study measures what the
    # ablation of components costs, beside what circuits did.
    ("interactions", "removal", "study"),
    ("compare",),
    ("runner",),
    ("running",),  # whose caller may be a stage: a study's member is a run of its own
    # The estimate shares the numbers of the experiments (how much they do at a time), so that it stands above them; it
    # asks no stage, and a stage that asked it would be stale whenever a formula changes.
    ("stages", "estimate"),
    ("plan", "sharing"),
    ("api", "__main__"),
)


def requirements():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found = {"python": project["requires-python"]}
    for line in (
        project["dependencies"] + project["optional-dependencies"]["slurm"] + project["optional-dependencies"]["vision"]
    ):
        name, specifier = re.fullmatch(r"([\w-]+)([^;]*)(?:;.*)?", line).groups()
        found[name] = specifier.strip()
    return found


def conda():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert environment["channels"] == ["conda-forge", "bioconda", "nodefaults"]
    plain = [line for line in environment["dependencies"] if isinstance(line, str)]
    pip = next(line["pip"] for line in environment["dependencies"] if isinstance(line, dict))
    assert "pip" in plain
    return dict(re.fullmatch(r"([\w-]+)(.*)", line).groups() for line in [*plain, *pip])


def test_environment_yml_agrees_with_pyproject():
    found = conda()
    for name, specifier in requirements().items():
        assert found.get(CONDA_NAMES.get(name, name)) == specifier, name
    extra = set(found) - {CONDA_NAMES.get(name, name) for name in requirements()}
    assert extra == {"pip"}


def test_constraints_are_inside_the_ranges():
    from packaging.specifiers import SpecifierSet

    wanted = requirements()
    lines = [line.split(";")[0] for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line]
    pins = dict(line.strip().split("==") for line in lines)
    assert {"torch", "triton", "transformers"} <= set(pins)
    for name, version in pins.items():
        assert version in SpecifierSet(wanted[name]), name


def test_every_dependency_is_imported_somewhere():
    imports = set()
    for path in [*ROOT.glob("oacore/**/*.py"), *ROOT.glob("kernels/**/*.py"), ROOT / "Snakefile"]:
        text = path.read_text()
        imports |= set(re.findall(r"^\s*(?:import|from) (\w+)", text, re.M))
    names = {
        name: {"pyyaml": "yaml", "transformer-lens": "transformer_lens", "scikit-learn": "sklearn"}.get(name, name)
        for name in requirements()
        if name not in ("python", "snakemake-executor-plugin-slurm")  # Snakemake finds its plugins itself
    }
    unused = {name for name, module in names.items() if module not in imports}
    assert not unused


def floor_of(module):
    name = module.split(".")[0]
    return next(number for number, names in enumerate(FLOORS) if name in names)


@pytest.mark.parametrize(
    "path", sorted(ROOT.glob("oacore/**/*.py")), ids=lambda path: path.relative_to(ROOT).as_posix()
)
def test_imports_point_down(path):
    parts = path.relative_to(ROOT / "oacore").with_suffix("").parts
    own = floor_of(parts[0])
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom | ast.Import):
            continue
        module = node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
        names = [f"{module}.{alias.name}" for alias in node.names] if module == "oacore" else [module or ""]
        for name in names:
            if not name.startswith("oacore.") or name == "oacore.__version__":
                continue
            target = name.removeprefix("oacore.").split(".")[0]
            assert floor_of(target) < own or target == parts[0], f"{path.name} imports {name}, which is not below it"


def test_kernels_know_nothing_of_the_library():
    for path in ROOT.glob("kernels/oakernels/**/*.py"):
        assert "oacore" not in path.read_text()


def test_no_pickle_and_no_remote_code():
    for path in [*ROOT.glob("oacore/**/*.py"), *ROOT.glob("kernels/**/*.py")]:
        text = path.read_text()
        assert not re.search(r"\bpickle\b|torch\.(save|load)\(|trust_remote_code=True", text), path


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A small package in place of ours."""
    (tmp_path / "low.py").write_text("def low():\n    return 1\n")
    (tmp_path / "high.py").write_text("from oacore.low import low\n\n\ndef high():\n    return low()\n")
    (tmp_path / "alone.py").write_text("X = 1\n")
    (tmp_path / "__init__.py").write_text("")
    monkeypatch.setattr(codehash_module, "_root", lambda name: tmp_path)

    def hashed(module="oacore.high"):
        codehash_module._tree.cache_clear()
        return codehash(module)

    yield tmp_path, hashed
    codehash_module._tree.cache_clear()


def test_code_hash_follows_imports(package):
    root, hashed = package
    before = hashed()
    (root / "low.py").write_text("def low():\n    return 2\n")
    assert hashed() != before
    assert hashed("oacore.alone") == hashed("oacore.alone") != before


def test_code_hash_ignores_comments_docstrings_and_unrelated_modules(package):
    root, hashed = package
    before = hashed()
    (root / "low.py").write_text('"""Doc."""\n\n\ndef low():\n    """Doc."""\n    return 1  # why\n')
    (root / "alone.py").write_text("X = 2\n")
    assert hashed() == before


def test_code_hash_of_stages_covers_what_they_compute_with():
    reachable = codehash_module._reachable
    assert {
        "oacore.engine.forward",
        "oacore.models.load",
        "oacore.engine.clean",
        "oacore.store.writer",
    } <= reachable("oacore.stages.activations")
    assert "oacore.ablation.optimal" in reachable("oacore.stages.optimal")
    assert "oacore.ablation.optimal" not in reachable("oacore.stages.activations"), (
        "a change of the fit must not re-run the cache"
    )
    assert "oacore.ablation.plots" not in reachable("oacore.stages.gaps")


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == __version__ and citation["license"] == "MIT"
    assert citation["preferred-citation"]["title"] == citation["references"][0]["title"]
