"""The pipeline on a real SLURM of two nodes, with the profile that is shipped: a job is cancelled, a node drained, the
bits stay the same.

Not part of the plain `pytest`, because it starts daemons as root: `make test-slurm`.
"""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import yaml

from oacore.config.read import load_config
from oacore.store.layout import Layout

ROOT = Path(__file__).parents[2]
CLUSTER = Path(__file__).with_name("cluster.sh")
TINY = ROOT / "tests/configs/tiny.yaml"

# The test cluster instead of the user's; it keeps no accounts, and nobody waits for its file system.
OVERLAY = ["--workflow-profile", "slurm", "--default-resources", "slurm_partition=main", "--latency-wait", "10"]
OVERLAY += ["--slurm-status-command", "squeue", "--slurm-init-seconds-before-status-checks", "1"]

FIT = "rule_optimal_wildcards_ioi_optimal"  # the plugin's comment of that job
VARIES = (".pareto.csv.seal", ".lock", ".jobs.lock")  # how long something took, and who had a lock


@pytest.fixture
def cluster():
    """Two idle nodes."""
    up = subprocess.run([CLUSTER, "up"], capture_output=True, text=True)
    if up.returncode == 77:
        pytest.skip(up.stderr.strip())
    assert up.returncode == 0, up.stderr
    yield
    subprocess.run([CLUSTER, "down"], check=True)


@pytest.fixture
def config(tmp_path):
    """One task, and three jobs that want a GPU at once; relative folders, so that reports name the same."""
    values = yaml.safe_load(TINY.read_text())
    # auto: rules ask for a GPU, and where torch finds none they compute on the CPU.
    values |= {
        "device": "auto",
        "tasks": {"ioi": values["tasks"]["ioi"]},
        "cache_dir": "cache",
        "results_dir": "results",
    }
    values["ablation"] |= {"methods": ["mean", "optimal"], "tasks": ["ioi"]}
    values["circuits"] |= {"methods": ["ugs", "hcgs"], "ablations": ["optimal"], "seeds": [0]}
    for section in ("interactions", "removal", "tracing", "lenses", "vision"):  # more jobs of the same kind
        del values[section]
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture
def start():
    """Start Snakemake in an empty folder of its own; what still runs at the end of the test is killed."""
    started = []

    def start(config, folder, *options):
        folder.mkdir()
        command = [sys.executable, "-m", "snakemake", "--directory", folder, "--configfile", config, *options]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        with open(folder / "out.txt", "w") as out:
            started.append(subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=out, env=environment))
        return started[-1]

    yield start
    for workflow in started:
        workflow.kill()


def finish(workflow, folder):
    assert workflow.wait(timeout=900) == 0, (folder / "out.txt").read_text()[-5000:]


def slurm_jobs():
    """What SLURM knows of every job, finished ones included."""
    lines = subprocess.run(
        ["scontrol", "show", "job", "--oneliner"], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    return [dict(re.findall(r"(\w+)=(\S*)", line)) for line in lines if "JobId=" in line]


def wait_for(workflow, condition):
    while not (found := condition()):
        assert workflow.poll() is None, "the workflow ended before it came to that"
        time.sleep(0.1)
    return found


def two_running_and_one_queued():
    """All jobs, at such a moment."""
    jobs = slurm_jobs()
    states = [job["JobState"] for job in jobs]
    return jobs if states.count("RUNNING") == 2 and "PENDING" in states else None


def files_in(folder):
    return {
        path.relative_to(folder)
        for path in (*folder.glob("cache/*/ioi-*/*"), *folder.glob("results/**/*"))
        if path.is_file()
    }


def content(path):
    """A file without what it says about how long its making took."""
    if path.name == "pareto.csv":
        return pd.read_csv(path).drop(columns=["fit_seconds", "peak_mb"]).to_csv()
    return path.read_bytes()


def test_a_cancelled_job_and_a_drained_node_leave_the_same_bits(cluster, start, config, tmp_path):
    local, remote = tmp_path / "local", tmp_path / "slurm"
    # At the same time as the other, which mostly waits for SLURM.
    alone = start(config, local, "--cores", "1", "--resources", "gpu=1")

    checkpoint = remote / Layout(load_config(config)).ablation("ioi", ".constants-optimal-checkpoint-fit.safetensors")
    workflow = start(config, remote, *OVERLAY)
    before = wait_for(workflow, two_running_and_one_queued)
    drained = next(job["NodeList"] for job in before if job["JobState"] == "RUNNING" and job["Comment"] != FIT)
    subprocess.run(["scontrol", "update", f"nodename={drained}", "state=drain", "reason=test"], check=True)
    wait_for(workflow, checkpoint.exists)
    (cancelled,) = (job for job in slurm_jobs() if job["Comment"] == FIT)
    subprocess.run(["scancel", cancelled["JobId"]], check=True)
    finish(workflow, remote)
    finish(alone, local)

    jobs = slurm_jobs()
    assert {job["JobId"] for job in jobs if job["JobState"] != "COMPLETED"} == {cancelled["JobId"]}
    assert {job["TresPerJob"] for job in jobs} == {"gres:gpu:1"}, "also of the job that runs two rules"
    assert any(job["Comment"].endswith("_activations_prompts") for job in jobs)
    (retried,) = (job for job in jobs if job["Comment"] == FIT and job["JobState"] == "COMPLETED")
    assert "mem=16000M" in cancelled["TRES"] and "mem=32000M" in retried["TRES"]
    queued = {job["JobId"] for job in jobs} - {job["JobId"] for job in before if job["JobState"] != "PENDING"}
    assert {job["NodeList"] for job in jobs} == {"n1", "n2"}
    assert drained not in {job["NodeList"] for job in jobs if job["JobId"] in queued}

    assert files_in(remote) == files_in(local), "nothing is missing, nothing half-written"
    for path in files_in(local):
        if path.parent.name != "logs" and path.suffix != ".tsv" and path.name not in VARIES:  # .tsv: times of jobs
            assert content(remote / path) == content(local / path), path
