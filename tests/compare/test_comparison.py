"""`compare:` in a config: made once, made anew when either run changes, and refused before any work."""

import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import yaml
from conftest import snakemake_dag, stage_of

from oacore.config.read import load_config, parse_config
from oacore.errors import UserError
from oacore.jobs import check_compared, files_of, planned
from oacore.store.artefacts import read_table, write_table
from oacore.store.layout import Layout
from oacore.store.provenance import Provenance

ROOT = Path(__file__).parents[2]
MADE = {"comparison": 1, "report": 1}


@pytest.fixture
def beside(tiny_run, tmp_path):
    """The values of a finished run that is to be set beside another, of the same numbers; and the other."""
    config, other = (
        tiny_run[0].model_copy(update={"results_dir": tmp_path, "run": name}) for name in ("tiny", "before")
    )
    for copy in (config, other):
        shutil.copytree(tiny_run[1].results_dir, Layout(copy).results_dir)
    file = tmp_path / "before.yaml"
    file.write_text(yaml.safe_dump(other.model_dump(mode="json")))
    return config.model_dump(mode="json") | {"compare": [str(file)]}, other


def stale(values, path):
    """Jobs by stage that Snakemake would run."""
    return Counter(stage_of(job.rule.name) for job in snakemake_dag(values, path).needrun_jobs()) - Counter(["all"])


def test_a_comparison_is_made_once_and_anew_when_either_run_changes(beside, tmp_path):
    values, other = beside
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    command = [sys.executable, "-m", "snakemake", "--cores", "1", "--configfile", path]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert stale(values, path) == {}
    config = load_config(path)
    layout = Layout(config)
    numbers = read_table(f"{layout.results_dir}/compared-with-before.csv")
    assert len(numbers) > 100 and (numbers["difference"] == 0).all()
    report = re.sub(r"<[^>]+>|\u200b", "", Path(layout.report).read_text())
    assert "Compared with before" in report and "compared-with-before.html" in report
    assert Path(f"{layout.results_dir}/compared-with-before.html").is_file()
    theirs, ours = (Path(of.ablation("ioi", "gaps-by-prompt.safetensors")) for of in (Layout(other), layout))
    original = theirs.read_bytes()
    theirs.write_bytes(original + b" ")
    assert stale(values, path) == MADE
    theirs.write_bytes(original)
    ours.write_bytes(original + b" ")
    assert stale(values, path) == MADE


def test_another_list_of_runs_makes_the_report_anew(beside, tmp_path):
    values, _ = beside
    assert stale(values | {"compare": []}, tmp_path / "config.yaml") == {}
    assert "comparison" not in dict(planned(parse_config(values | {"compare": []})))


def test_what_can_t_be_compared_stops_before_any_work(beside, tmp_path):
    values, other = beside
    config = parse_config(values)
    check_compared(config)
    table = Path(Layout(other).ablation("ioi", "gaps.csv"))
    table.unlink()
    with pytest.raises(UserError, match=rf"compare: .*before\.yaml: {table} is missing; allowed: configs of finished"):
        check_compared(config)
    itself = tmp_path / "itself.yaml"
    itself.write_text(yaml.safe_dump(values))
    with pytest.raises(UserError, match=r"itself\.yaml: the results of this run itself; allowed: configs of other"):
        check_compared(parse_config(values | {"compare": [str(itself)]}))
    twice = values | {"compare": values["compare"] * 2}
    with pytest.raises(UserError, match=r"before\.yaml: a second run 'before'; allowed: each `run:` once"):
        check_compared(parse_config(twice))
    (tmp_path / "bad.yaml").write_text("tasks: {iio: {}}")
    with pytest.raises(UserError, match=r"(?s)compare: .*bad\.yaml: .*tasks\.iio: unknown key"):
        check_compared(parse_config(values | {"compare": [str(tmp_path / "bad.yaml")]}))
    with pytest.raises(UserError, match=r"compare: '.*none\.yaml' does not exist; allowed: an existing file"):
        parse_config(values | {"compare": [str(tmp_path / "none.yaml")]})


def test_it_reads_what_both_have_and_all_circuits(beside):
    """A method that one of them lacks is drawn beside the others'; a task that it lacks is none of the page."""
    values, other = beside
    circuits = other.circuits.model_copy(update={"methods": ("ugs",)})
    ablation = other.ablation.model_copy(update={"tasks": ("facts",)})
    file = Path(values["compare"][0])
    file.write_text(
        yaml.safe_dump(other.model_copy(update={"circuits": circuits, "ablation": ablation}).model_dump(mode="json"))
    )
    read = files_of(Layout(parse_config(values)), "comparison", other="before")[0]
    assert any("/hcgs-optimal/pareto.csv" in str(path) for path in read.all("results"))
    assert not any("/hcgs-optimal/" in str(path) for path in read.all("others"))
    assert not any("/ioi/ablation/" in str(path) for path in read.every())


def test_a_table_of_another_model_is_refused_by_the_report(beside, tmp_path):
    from oacore.runner import run_stage

    values, _ = beside
    config = parse_config(values)
    path = Path(Layout(config).results_dir, "compared-with-before.csv")
    write_table(path, read_table(Layout(config).ablation("ioi", "gaps.csv")), Provenance({"model_hash": "0"}))
    with pytest.raises(UserError, match=rf"{path}: model_hash is '0'"):
        run_stage("report", config)
