"""The recipe of an image: its install step is everybody's, and what it copies is enough. No engine builds it here."""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RECIPE = (ROOT / "workflow/envs/Containerfile").read_text()
RULES = dict(re.findall(r"^([\w./-]+): ([^#=\n]*)", (ROOT / "Makefile").read_text(), re.M))


def needs(target):
    """What a target of the Makefile is made after."""
    own = RULES.get(target, "").split()
    return {name for each in own for name in (each, *needs(each))}


def test_the_image_is_installed_as_the_gate_installs():
    (target,) = re.findall(r"^RUN .*\bmake (\S+)$", RECIPE, re.M)
    assert target == "install" and ".venv/.installed" in needs(target)
    assert "make test\n" in (ROOT / ".ci/run").read_text()
    assert needs(target) < needs("test") and needs(target) < needs("demo") | {target}
    assert not re.findall(r"pip install", RECIPE), "the Makefile says what is installed"


def test_its_python_is_one_that_the_project_takes():
    version = re.search(r"^FROM \S*python:([\d.]+)-slim$", RECIPE, re.M)[1]
    assert f">={version}" == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    environment = (ROOT / "Makefile").read_text()
    assert "ENV PYTHONDONTWRITEBYTECODE=1" in RECIPE and "PYTHONDONTWRITEBYTECODE" in environment


@pytest.fixture
def image(tmp_path):
    """A folder with what the recipe copies, where it copies it."""
    folder = tmp_path / "image"
    folder.mkdir()
    for line in re.findall(r"^COPY (.*)$", RECIPE, re.M):
        *sources, target = line.split()
        for source in sources:
            if (ROOT / source).is_dir():
                shutil.copytree(ROOT / source, folder / target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(ROOT / source, folder / target)
    (link,) = re.findall(r"^RUN ln -s (\S+) (\S+)", RECIPE, re.M)
    (folder / link[1]).symlink_to(link[0])
    return folder


def test_what_it_copies_plans_a_run_from_another_folder(image, tmp_path):
    """And installs: pyproject.toml's own files are there."""
    project = tomllib.loads((image / "pyproject.toml").read_text())["project"]
    assert (image / project["readme"]).is_file() and (image / "constraints.txt").is_file()
    (tmp_path / "my.yaml").write_text("run: mine\ndevice: cpu\ntasks: {ioi: {}}\n")
    command = [sys.executable, "-m", "snakemake", "-n", "--cores", "1", "--configfile", "my.yaml"]
    result = subprocess.run(
        [*command, "--snakefile", image / "Snakefile"],
        cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": f"{image}:{image / 'kernels'}", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "results/mine/report.html" in result.stdout + result.stderr
    assert f"{image}/profiles/default" in result.stderr + result.stdout
