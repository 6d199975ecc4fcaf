"""Rules and the command line name the same files, and the workflow works as a module of another one."""

import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml
from conftest import same_gaps, snakemake_dag

from oacore.config.read import parse_config
from oacore.jobs import STAGES, WITHOUT_GPU, files_of, planned
from oacore.store.layout import Layout
from oacore.store.locks import CACHE_STAGES

ROOT = Path(__file__).parents[2]
TINY = yaml.safe_load((ROOT / "tests/configs/tiny.yaml").read_text())


def jobs_of_rules(values, folder):
    """Every job of the workflow: (stage, wildcards, inputs, outputs), files by name."""
    return [
        (job.params.stage, dict(job.wildcards.items()), by_name(job.input), by_name(job.output))
        for job in snakemake_dag(values, folder / "config.yaml", forced=True).jobs
        if job.rule.name != "all"
    ]


def by_name(files):
    return {name: [paths] if isinstance(paths, str) else [str(path) for path in paths] for name, paths in files.items()}


@pytest.mark.parametrize("positions", ["last", "all"])
def test_rules_name_the_files_that_the_command_line_takes(tmp_path, positions):
    values = TINY | {"cache_dir": str(tmp_path / "cache"), "results_dir": str(tmp_path / "results")}
    values |= {"lenses": TINY["lenses"] | {"positions": positions}}
    config = parse_config(values)
    layout = Layout(config)
    expected = {}
    for stage, wildcards in planned(config):
        inputs, outputs = files_of(layout, stage, **wildcards)
        expected[stage, *wildcards.values()] = inputs.named(), outputs.named()
    found = {}
    for stage, wildcards, inputs, outputs in jobs_of_rules(values, tmp_path):
        if "task_dir" in wildcards:
            wildcards = {"task": layout.task_of(wildcards["task_dir"])}
        found[stage, *(wildcards[name] for name in STAGES[stage][1])] = inputs, outputs
    assert set(found) == set(expected)
    for job, files in expected.items():
        assert found[job] == files, job


def test_whatever_may_take_a_gpu_is_timed(tmp_path):
    """In a file of its own; but for shared files, which a job may find in Snakemake's cache, and then takes no time."""
    values = TINY | {"cache_dir": str(tmp_path / "cache"), "results_dir": str(tmp_path / "results")}
    timed = dict[str, set[str]]()
    jobs = [job for job in snakemake_dag(values, tmp_path / "config.yaml", forced=True).jobs if job.rule.name != "all"]
    for job in jobs:
        timed.setdefault(job.params.stage, set()).add(str(job.benchmark))
    computing = set(timed) - {*WITHOUT_GPU, *CACHE_STAGES}
    assert computing and all(timed[stage] == {"None"} for stage in set(timed) - computing)
    files = [file for stage in computing for file in timed[stage]]
    folder = f"{values['results_dir']}/tiny/benchmarks/"
    assert all(file.startswith(folder) and file.endswith(".tsv") for file in files)
    assert len(set(files)) == sum(job.params.stage in computing for job in jobs)


def test_the_times_of_a_finished_run(tiny_run):
    _, layout = tiny_run
    table = pd.read_csv(f"{layout.results_dir}/benchmarks/ioi/gaps.tsv", sep="\t")
    assert len(table) == 1 and table["s"].iloc[0] > 0


MODULE = f"""
configfile: "config.yaml"

rule size:
    input: "mine.txt"

module oa:
    snakefile: "{ROOT / "Snakefile"}"
    config: config["oa"]
    prefix: "sub"

use rule * from oa as oa_*

rule mine:
    input: rules.oa_report.output.report
    output: "mine.txt"
    shell: "wc -c < {{input}} > {{output}}"
"""


def test_the_workflow_is_a_module_of_another(tiny_run, tmp_path):
    """Under a prefix and with other rule names: the same gaps as in a run of its own, and no file outside of the
    prefix.
    """
    _, layout = tiny_run
    shutil.copytree(layout.model_dir, tmp_path / "sub/cache" / Path(layout.model_dir).name)
    own = TINY | {"ablation": {"tasks": ["ioi"], "methods": ["zero", "mean", "counterfactual"]}}
    own = {
        key: value
        for key, value in own.items()
        if key not in ("circuits", "interactions", "removal", "tracing", "lenses", "vision")
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"oa": own}))
    (tmp_path / "Snakefile").write_text(MODULE)
    command = [sys.executable, "-m", "snakemake", "--cores", "1"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert int((tmp_path / "mine.txt").read_text()) > 10_000
    names = {path.name for path in tmp_path.iterdir()} - {".snakemake"}
    assert names == {"Snakefile", "config.yaml", "mine.txt", "sub"}
    assert {path.name for path in (tmp_path / "sub").iterdir()} == {"cache", "results"}
    ours = tmp_path / "sub/results/tiny/ioi/ablation/gaps.csv"
    assert same_gaps(ours, layout.ablation("ioi", "gaps.csv"), own["ablation"]["methods"])
    assert (tmp_path / "sub/results/tiny/.lock").exists(), "the run's locks lie where its files do"
