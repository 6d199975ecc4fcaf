"""Several pipelines, one cache: started at once they wait for one another, and nothing is computed twice."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from oacore.config.read import load_config
from oacore.store.layout import Layout
from oacore.store.reader import Reader

ROOT = Path(__file__).parents[2]
TINY = ROOT / "tests/configs/tiny.yaml"


@pytest.fixture
def place(tmp_path, tiny_run):
    """Make a working folder with a config of its own: (config file, layout as seen from there); with `gated`, in its
    cache the model that has passed the gate, which takes most of the time.
    """

    def make(name, cache_dir, results_dir="results", run="tiny", gated=False):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        values = yaml.safe_load(TINY.read_text())
        values |= {
            "run": run,
            "tasks": {"ioi": values["tasks"]["ioi"]},
            "cache_dir": str(cache_dir),
            "results_dir": str(results_dir),
        }
        values["ablation"]["tasks"] = ["ioi"]
        del (
            values["circuits"],
            values["interactions"],
            values["removal"],
            values["tracing"],
            values["lenses"],
            values["vision"],
        )  # of other tasks
        path = folder / f"{run}.yaml"
        path.write_text(yaml.safe_dump(values))
        layout = Layout(load_config(path))
        if gated and not (folder / layout.model_json).exists():
            (folder / layout.model_dir).mkdir(parents=True)
            for theirs, ours in ((tiny_run[1].model_json, layout.model_json), (tiny_run[1].weights, layout.weights)):
                shutil.copy(theirs, folder / ours)
        return path, layout

    return make


def command(path, *targets, cores=1):
    arguments = ["--snakefile", ROOT / "Snakefile", "--directory", path.parent, "--configfile", path, "--cores", cores]
    return [sys.executable, "-m", "snakemake", *map(str, targets), *map(str, arguments)]


def started(line, cwd=ROOT, **options):
    return subprocess.Popen(line, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)


def rules_run(output):
    return re.findall(r"^done in \S+: (\w+)", output, re.M)


@pytest.mark.parametrize("shared", ["results", "cache"])
def test_two_pipelines_at_once(place, tmp_path, shared):
    """One working folder and results, or two with one cache: both succeed, each job ran once, and what they made is
    whole.
    """
    if shared == "results":
        first, layout = place("a", "cache", gated=True)
        second = first
    else:
        first, layout = place("a", tmp_path / "cache", gated=True)
        second, _ = place("b", tmp_path / "cache", gated=True)
    target = layout.activations("ioi")
    runs = [started(command(path, target)) for path in (first, second)]
    outputs = [run.communicate(timeout=300)[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], outputs
    assert sorted(rules_run(outputs[0]) + rules_run(outputs[1])) == ["activations", "prompts"]
    assert sum("waiting until it has ended" in output for output in outputs) == 1
    assert sum("Nothing to be done" in output for output in outputs) == 1
    with Reader(first.parent / target) as reader:
        assert all(len(reader[name][:]) for name in reader.names)


def test_another_working_copy_takes_the_cache_through_snakemake(place, tmp_path):
    """`--cache`: the second copy computes nothing, whatever its own folders are called."""
    environment = os.environ | {"SNAKEMAKE_OUTPUT_CACHE": str(tmp_path / "shared")}
    (tmp_path / "shared").mkdir()
    made = []
    for name in ("a", "b"):
        path, layout = place(name, f"cache-{name}")
        run = started([*command(path, layout.activations("ioi")), "--cache"], env=environment)
        output = run.communicate(timeout=300)[0]
        assert run.returncode == 0, output
        made.append(
            [
                (path.parent / file).read_bytes()
                for file in (layout.model_json, layout.weights, layout.prompts("ioi"), layout.activations("ioi"))
            ]
        )
        assert [(path.parent / file).is_symlink() for file in (layout.model_json, layout.prompts("ioi"))] == [
            True,
            True,
        ]
        assert output.count("Symlinking output file") == 4
        assert output.count("Moving output file") == (4 if name == "a" else 0), "nothing is new in the second copy"
        assert all(not log.read_text() for log in (path.parent / layout.model_dir).rglob("*.log")) == (name == "b"), (
            "no job spoke there"
        )
    assert made[0] == made[1]


def test_a_fresh_checkout_and_a_copied_folder_re_run_nothing_and_an_edited_file_does(place, tmp_path):
    """Times are all new there, and in any order."""
    path, layout = place("a", "cache", gated=True)
    run = started(command(path, layout.activations("ioi")))
    output = run.communicate(timeout=300)[0]
    assert run.returncode == 0, output
    copied, checkout = tmp_path / "b", tmp_path / "checkout"
    shutil.copytree(path.parent, copied)
    shutil.copytree(ROOT / "workflow", checkout / "workflow", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "Snakefile", checkout)
    (checkout / "profiles").symlink_to("workflow/profiles")
    now = time.time()
    (checkout / "workflow/scripts/stage.py").touch()
    for age, file in enumerate((layout.model_json, layout.prompts("ioi"), layout.activations("ioi"))):
        os.utime(copied / file, (now - age, now - age))

    def again():
        line = [sys.executable, "-m", "snakemake", layout.activations("ioi"), "--cores", "1", "--configfile"]
        run = started([*line, str(copied / path.name), "-n", "-s", str(checkout / "Snakefile")], cwd=copied)
        return run.communicate(timeout=300)[0]

    output = again()
    assert "Nothing to be done" in output, output
    with open(copied / layout.model_json, "a") as file:
        file.write("\n")
    output = again()
    stats = dict(re.findall(r"^(\w+) +(\d+)$", output, re.M))
    assert stats == {"prompts": "1", "activations": "1", "total": "2"}, output


def test_a_killed_pipeline_unlocks_only_when_its_jobs_have_ended(place):
    """SIGKILL to Snakemake alone: its job goes on, `--unlock` is refused until that has ended, then the next call
    finishes the run.
    """
    path, layout = place("a", "cache")
    line = command(path, layout.activations("ioi"))
    run = started(line, start_new_session=True)
    log = path.parent / layout.model_dir / "logs/model.log"
    deadline = time.monotonic() + 120
    while not log.exists():
        assert run.poll() is None and time.monotonic() < deadline, "the first job never began"
        time.sleep(0.02)
    time.sleep(0.2)  # the log is opened right before the lock is taken
    os.kill(run.pid, signal.SIGKILL)
    os.killpg(run.pid, signal.SIGSTOP)  # the job must not end while we look
    run.wait()
    refused = subprocess.run([*line, "--unlock"], cwd=ROOT, capture_output=True, text=True)
    os.killpg(run.pid, signal.SIGCONT)
    assert refused.returncode == 2 and re.search(r"error: .*\.jobs\.lock: held by", refused.stderr), refused.stderr
    while subprocess.run(["pgrep", "-g", str(run.pid)], capture_output=True).returncode == 0:
        assert time.monotonic() < deadline, "the job never ended"
        time.sleep(0.1)
    locked = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert locked.returncode != 0 and "--unlock" in locked.stderr, locked.stderr
    assert subprocess.run([*line, "--unlock"], cwd=ROOT, capture_output=True).returncode == 0
    finished = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
