"""The notebooks of the documentation run, and print the numbers that they show."""

import re
import shutil
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted(ROOT.glob("docs/notebooks/*.ipynb"))
DIGITS = 1e-3  # the relative difference that numbers may have: another CPU rounds otherwise
NUMBER = re.compile(r"-?\d+\.?\d*(?:e[-+]\d+)?")
# What differs from one version of the code, or one CPU, to the next: names of runs, and rounding itself.
ITS_OWN = re.compile(r"api-[0-9a-f]{10}|(?<=Hugging Face )\S+(?= nats)")


def names(path):
    return path.stem


@pytest.mark.parametrize("path", NOTEBOOKS, ids=names)
def test_a_notebook_is_small_and_has_its_outputs(path):
    cells = nbformat.read(path, 4).cells
    assert path.stat().st_size < 300_000
    outputs = [output for cell in cells if cell.cell_type == "code" for output in cell.outputs]
    assert {output.output_type for output in outputs} == {"stream", "execute_result"}
    assert not [output for output in outputs if output.get("name") == "stderr"], "it has times"
    for target in re.findall(
        r"\]\(([^)#]+)\)", "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    ):
        assert (path.parent / target).exists(), target


@pytest.mark.parametrize("path", NOTEBOOKS, ids=names)
def test_a_notebook_prints_what_it_shows(path, tmp_path, monkeypatch):
    for name in ("IPYTHONDIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR"):  # not the user's
        monkeypatch.setenv(name, str(tmp_path / name))
    here = tmp_path / "docs/notebooks"  # a checkout in which nothing has run
    here.mkdir(parents=True)
    shutil.copytree(ROOT / "config", tmp_path / "config")
    shown, notebook = nbformat.read(path, 4), nbformat.read(path, 4)
    NotebookClient(notebook, timeout=280, kernel_name="python3", resources={"metadata": {"path": str(here)}}).execute()
    for stored, run in zip(shown.cells, notebook.cells, strict=True):
        if stored.cell_type == "code":
            assert same(printed(stored), printed(run)), f"{stored.source}\n\n{printed(stored)}\n\n{printed(run)}"
            assert drawn(stored) == drawn(run)


def printed(cell):
    """What a cell prints and shows as text, without progress."""
    texts = [
        output.text if output.output_type == "stream" else output.data["text/plain"]
        for output in cell.outputs
        if output.get("name") != "stderr"
    ]
    return " ".join(ITS_OWN.sub("...", "\n".join(texts)).split())


def drawn(cell):
    """How many figures it shows; their outlines follow the numbers."""
    return sum("image/svg+xml" in output.get("data", {}) for output in cell.outputs)


def same(stored, run):
    """Whether texts are equal but for the last digits of their numbers."""
    numbers = [[float(number) for number in NUMBER.findall(text)] for text in (stored, run)]
    return NUMBER.sub("#", stored) == NUMBER.sub("#", run) and numbers[1] == pytest.approx(numbers[0], rel=DIGITS)


def test_the_comparison_sees_what_is_wrong():
    assert same("kl 0.014168 at 46", "kl 0.014169 at 46")
    assert not same("kl 0.014168 at 46", "kl 0.0142 at 47") and not same("kl 0.0142", "se 0.0142")
