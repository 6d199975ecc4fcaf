"""docs/extending.md: its circuit method, edge ablation type and lens, each one new file and one row, go through the
whole pipeline.
"""

import os
import re
import shutil
import subprocess
import sys

import pandas as pd
import pytest
import yaml
from test_docs import ROOT, apply, blocks

from oacore.config.model import SHIPPED_DEMO

FILES = ("oacore/circuits/writes.py", "oacore/circuits/half_mean.py", "oacore/lenses/bias.py")
CONFIG = """
device: cpu
limits: { threads: 1 }
tasks:
  ioi: { n_train: 24, n_validation: 12, n_test: 16 }
ablation: { methods: [zero, mean] }
circuits:
  methods: [writes, random]
  ablations: [mean, half_mean]
  sizes: [40, 0.5, 479]
  seeds: [0, 1]
  n_prompts: 8
lenses:
  tasks: [ioi]
  lenses: [oca, bias, logit]
  oca: { max_steps: 2 }
  tuned: { first_round: 10, max_steps: 40, batch_size: 12 }
  pictures: 1
  faithfulness: { lenses: [bias], layers: [1], n_prompts: 4, n_directions: 3, resample_sizes: [2] }
"""
OWN = ("results/demo/ioi/circuits/writes-half_mean/pareto.csv", "results/demo/ioi/lens/bias.safetensors")


@pytest.fixture(scope="module")
def extended(tmp_path_factory):
    """A copy of the repository with the page's files and rows, and its run; (folder, what a dry run printed)."""
    folder = tmp_path_factory.mktemp("extended")
    for name in ("oacore", "kernels", "workflow"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("Snakefile", "environment.yml"):
        shutil.copy(ROOT / name, folder)
    for name, code in zip(FILES, blocks("docs/extending.md", "python")[2:-2], strict=True):
        assert not (folder / name).exists()
        (folder / name).write_text(code)
    for row in blocks("docs/extending.md", "diff")[1:]:
        assert row.count("@@") == 1 and not re.search("^-", row, re.M), "one row, and nothing taken away"
        apply(row, folder)
    shutil.copytree(SHIPPED_DEMO, folder / "my-model")
    (folder / "my.yaml").write_text(yaml.safe_dump({"model": "my-model"} | yaml.safe_load(CONFIG)))

    def said(*command):
        command = [sys.executable, "-m", *command]
        result = subprocess.run(command, cwd=folder, env=environment(folder), capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout + result.stderr

    options = ("--cores", "2", "--configfile", "my.yaml")
    dry = said("snakemake", "-n", *options)
    # Their own jobs by the workflow, the others in one process: ten starts of Python less.
    said("snakemake", *OWN, *options)
    said("oacore", "all", "--config", "my.yaml")
    assert "Nothing to be done" in said("snakemake", *options)
    return folder, dry


def environment(folder):
    return os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (folder, folder / "kernels")))}


def test_a_dry_run_estimates_them(extended):
    _, dry = extended
    jobs = dict(re.findall(r"^(circuits|lens_fit) +(\d+) ", dry, re.M))
    assert jobs == {"circuits": "4", "lens_fit": "2"}, dry
    assert re.search(r"^circuits .* ioi writes", dry, re.M), dry


def test_their_results_are_in_the_tables(extended):
    folder, _ = extended
    pareto = pd.read_csv(folder / "results/demo/ioi/circuits/pareto.csv")
    assert set(pareto["method"]) == {"writes", "random"} and set(pareto["ablation"]) == {"mean", "half_mean"}
    whole = pareto[(pareto["method"] == "writes") & (pareto["knob"] == 479)]
    assert len(whole) == 4 and (whole["kl_nats"] == 0).all(), "a circuit of all edges is the model"
    some = pareto[(pareto["method"] == "writes") & (pareto["knob"] == 0.5)].set_index("ablation")["kl_nats"]
    assert (some["mean"].to_numpy() != some["half_mean"].to_numpy()).all() and some.gt(0).all()
    loss = pd.read_csv(folder / "results/demo/ioi/lens/loss.csv").set_index(["lens", "layer"])["kl_nats"]
    assert (loss["bias"] <= loss["logit"]).all() and (loss["bias"] < loss["logit"]).sum() >= 3, (
        "a fitted shift is better than none, and is none where it is not"
    )
    assert set(pd.read_csv(folder / "results/demo/ioi/lens/faithfulness.csv")["lens"]) == {"bias"}


def test_figures_and_report_show_them(extended):
    folder, _ = extended
    results = folder / "results/demo"
    drawn = {path.name for path in (results / "ioi").rglob("*.svg")}
    assert {"pareto_half_mean.svg", "circuit_half_mean.svg", "ablation_types_writes.svg", "loss.svg"} <= drawn
    text = (results / "report.html").read_text()
    for note in (
        "Scores each edge by the mean size of what its source writes, whoever reads it.",
        "An ablated edge carries half of its source",
        "A fitted vector is added to the residual stream before the final norm and unembedding.",
    ):
        assert note in text, note
