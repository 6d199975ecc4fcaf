"""The workflow where jobs share no file system: its files lie in a store, by Snakemake's storage plugins."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import same_gaps

ROOT = Path(__file__).parents[2]
TINY = yaml.safe_load((ROOT / "tests/configs/tiny.yaml").read_text())


@pytest.mark.skipif(shutil.which("rsync") is None, reason="the storage plugin fs calls rsync, which is not installed")
def test_files_may_lie_in_a_store(tiny_run, tmp_path):
    """The same gaps as in a run without; a second run finds them in the store."""
    _, layout = tiny_run
    store, work = tmp_path / "store", tmp_path / "work"
    shutil.copytree(layout.model_dir, store / "cache" / Path(layout.model_dir).name)
    work.mkdir()
    own = TINY | {"ablation": {"tasks": ["ioi"], "methods": ["zero", "mean", "counterfactual"]}}
    own = {key: value for key, value in own.items() if key in ("run", "model", "device", "limits", "tasks", "ablation")}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(own | {"store_weights": False}))
    command = [sys.executable, "-m", "snakemake", "--cores", "1", "--configfile", str(tmp_path / "config.yaml")]
    command += ["--snakefile", str(ROOT / "Snakefile"), "--workflow-profile", str(ROOT / "profiles/default")]
    command += ["--default-storage-provider", "fs", "--default-storage-prefix", f"{store}/"]
    command += ["--shared-fs-usage", "persistence", "sources", "source-cache", "software-deployment"]
    command += ["--", "results/tiny/ioi/ablation/gaps.csv"]
    first, second = (subprocess.run(command, cwd=work, capture_output=True, text=True) for _ in range(2))
    assert first.returncode == 0, first.stdout + first.stderr
    assert second.returncode == 0 and "Nothing to be done" in second.stdout + second.stderr, second.stderr
    assert {path.name for path in work.iterdir()} == {".snakemake"}
    ours = store / "results/tiny/ioi/ablation/gaps.csv"
    assert same_gaps(ours, layout.ablation("ioi", "gaps.csv"), own["ablation"]["methods"])
