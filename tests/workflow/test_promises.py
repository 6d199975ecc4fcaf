"""Files that a run promises: what is missing is made again, what no config asks for goes, and a lost seal is named."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import snakemake_dag

from oacore.errors import UserError
from oacore.jobs import promised
from oacore.runner import run_stage
from oacore.store.artefacts import read_table
from oacore.store.layout import Layout

ROOT = Path(__file__).parents[2]

LOST = {
    "constants": (lambda layout: layout.constants("ioi", "optimal"), {"optimal"}),
    "summary": (lambda layout: layout.ablation("ioi", "summary.csv"), {"gaps"}),
    "figure": (lambda layout: layout.ablation("facts", "layer_head_heatmap.png"), {"figures"}),
    "circuit": (lambda layout: layout.circuits("ioi", "acdc-optimal/0.05-s1.json"), {"circuits_acdc"}),
    "pareto": (lambda layout: layout.circuits("ioi", "pareto.csv"), {"circuit_figures"}),
    "search": (lambda layout: layout.circuits("ioi", "ugs-optimal/search.safetensors"), {"circuits_ugs"}),
    "ranking": (lambda layout: layout.interactions("ioi", "ranking.csv"), {"interaction_ranking", "interactions"}),
    "effects": (lambda layout: layout.interactions("ioi", "mean/effects.csv"), {"interactions"}),
    "paths": (lambda layout: layout.interactions("ioi", "figures/paths_mean.svg"), {"interaction_figures"}),
    "front": (lambda layout: layout.removal("front.csv"), {"removal_figures"}),
    "ablations": (lambda layout: layout.removal("gap-optimal/ablations.safetensors"), {"removal"}),
    "importance": (lambda layout: layout.vision("blocks/importance.csv"), {"vision"}),
    "importances": (lambda layout: layout.vision("figures/importance_blocks.png"), {"vision_figures"}),
    "facts": (lambda layout: layout.tracing("facts", "facts.json"), {"tracing"}),
    "lens": (lambda layout: layout.lens("text", "grad.safetensors"), {"lens_fit"}),
    "drawing": (lambda layout: layout.lens("text", "figures/prompt_0.svg"), {"lens_figures"}),
}


@pytest.mark.parametrize("what", LOST)
def test_a_lost_file_is_made_again(own_copy, tmp_path, what):
    layout, (place, rules) = Layout(own_copy), LOST[what]
    values = own_copy.model_dump(mode="json")
    Path(place(layout)).unlink()
    planned = {job.rule.name for job in snakemake_dag(values, tmp_path / "config.yaml").needrun_jobs()}
    assert rules <= planned and not planned & {"model", "prompts", "activations"}


def test_every_result_is_promised(tiny_run):
    config, layout = tiny_run
    root = Path(layout.results_dir)
    # What a job printed, and what it took, is no result.
    found = {str(path) for path in root.rglob("[!.]*") if path.is_file() and path.suffix not in (".log", ".tsv")}
    extra = {str(path) for path in root.rglob("constants.safetensors") if path.parent.name != "tracing"}  # of circuits
    assert found - extra == set(promised(Layout(config)))


def test_a_circuit_of_a_knob_that_is_gone_goes(own_copy):
    layout = Layout(own_copy)
    folder = Path(layout.circuits("ioi", "ugs-optimal"))
    before = {path: path.read_bytes() for path in folder.iterdir() if path.suffix == ".json"}
    shutil.copy(folder / "0.1-s0.json", folder / "0.7-s0.json")
    run_stage("circuits", own_copy, task="ioi", method="ugs", ablation="optimal")
    assert {path: path.read_bytes() for path in folder.iterdir() if path.suffix == ".json"} == before


def test_a_table_without_its_seal_is_the_one_to_delete(own_copy):
    """As after `cp results/*`, which leaves hidden files behind."""
    table = Path(Layout(own_copy).ablation("ioi", "gaps.csv"))
    table.with_name(".gaps.csv.seal").unlink()
    with pytest.raises(UserError, match=r"gaps.csv: has lost its seal, .gaps.csv.seal; delete it and run the same"):
        read_table(table)


def test_the_terminal_shows_a_line_for_each_job_and_the_results(own_copy, tmp_path):
    """Snakemake's own log has the files and reasons."""
    layout, path = Layout(own_copy), tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(own_copy.model_dump(mode="json")))
    Path(layout.report).unlink()
    command = [sys.executable, "-m", "snakemake", "--cores", "2", "--configfile", path]
    shown = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True).stdout
    (job,) = (line for line in shown.splitlines() if line.startswith("done in"))
    report = [line for line in shown.splitlines() if line.startswith("report: ")][-1]
    assert re.fullmatch(r"done in 0:00:\d\d: report", job) and report == f"report: {layout.report}"
    assert f"{layout.ablation('ioi', '')[:-1]}: gaps.csv, summary.csv" in shown and "1 of 2 steps" in shown
    loud = ("reason:", "Finished jobid", "Select jobs", "eligible for caching")
    assert not [word for word in loud if word in shown]
    log = ROOT / re.search(r"Complete log\S*: (\S+)", shown)[1]
    assert all(word in log.read_text() for word in loud[:3])
