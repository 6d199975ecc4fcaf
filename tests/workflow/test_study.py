"""A study end to end: two members behind one job each, what re-runs after which change, and files that are refused."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest
import yaml
from conftest import snakemake_dag
from test_corrupted_files import flip_bits, of_another_model

from oacore import running
from oacore.config.read import load_config, parse_config
from oacore.config.study import ESTIMATORS, ReferenceFit, Study
from oacore.errors import UserError
from oacore.jobs import STUDY_TABLES, promised
from oacore.plan import plan
from oacore.report.numbers import FLOOR
from oacore.runner import run_stage
from oacore.store import codehash as codehash_module
from oacore.store.housekeeping import pieces
from oacore.store.layout import Layout
from oacore.study import member as member_module
from oacore.study.member import clear_stale, identity

ROOT = Path(__file__).parents[2]
SMALL = yaml.safe_load((ROOT / "tests/configs/study.yaml").read_text())
FINISHED = {"study_figures": 1, "report": 1}
COSTS = {"study_cost": 2} | FINISHED
ONE = {"study_member": 1, "study_cost": 1} | FINISHED
BOTH = {"study_member": 2} | COSTS


@pytest.fixture(scope="module")
def studied(tmp_path_factory):
    """Values, config and layout of a finished study."""
    root = tmp_path_factory.mktemp("study")
    values = SMALL | {"cache_dir": str(root / "cache"), "results_dir": str(root / "results")}
    path = root / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    command = [sys.executable, "-m", "snakemake", "--cores", "2", "--configfile", path]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    config = load_config(path)
    return values, config, Layout(config)


def planned(values, path):
    return Counter(job.rule.name for job in snakemake_dag(values, path).needrun_jobs()) - Counter(["all"])


def changed(values, path, value):
    key, _, rest = path.partition(".")
    return values | {key: changed(values.get(key) or {}, rest, value) if rest else value}


def test_outputs_are_those_promised(studied):
    _, config, layout = studied
    found = {
        str(path)
        for path in Path(layout.results_dir).rglob("[!.]*")
        if path.is_file() and path.suffix not in (".log", ".tsv")
    }
    assert found == set(promised(layout))
    for name, member in config.members().items():
        own = Layout(member)
        assert Path(own.report).is_file() and own.results_dir.endswith(f"study-{name}")
        link = f'href="{os.path.relpath(own.report, layout.results_dir)}"'
        assert link in Path(layout.report).read_text()


def test_tables_are_complete(studied):
    layout = studied[2]
    tables = {name: pd.read_csv(layout.study(f"{name}.csv")) for name in STUDY_TABLES}
    cost, accuracy = tables["cost"], tables["accuracy"]
    assert list(cost.columns) == [
        *("model", "n_weights", "task", "method", "measure", "forward_passes", "backward_passes", "seconds", "peak_mb"),
        *("quality", "quality_se"),
    ]
    methods = {*ESTIMATORS, "optimal_converged"}
    for name, more in {"one": {"ugs", "random"}, "two": set()}.items():
        assert set(cost.loc[cost["model"] == name, "method"]) == methods | more
    assert (cost[["seconds", "peak_mb"]] > 0).all().all()
    # A fit needs more than 4 passes; the reference has no budget.
    assert Counter(accuracy["method"]) == dict.fromkeys(ESTIMATORS, 4)
    assert accuracy["budget"].isna().sum() == 2 == (accuracy["budget"] == 64).sum() / len(ESTIMATORS)
    assert set(tables["exponents"]["quantity"]) == {"seconds", "passes x weights"}
    assert set(tables["payoff"]["method"]) == set(ESTIMATORS) - {"optimal"}
    assert set(tables["comparison"]["measure"]) == {
        "spearman_with_counterfactual",
        "median_ratio_optimal_to_method",
        "median_ratio_optimal_positional_to_method",
        "front_ratio_to_ugs_mean",
    }


def test_the_reference_is_as_the_member_s_own_run_has_it(studied):
    """With the same settings of the fit, the same constants: OA's share of the mean gap follows from the table."""
    _, config, layout = studied
    for name, member in config.members().items():
        gaps = pd.read_csv(Layout(member).ablation("ioi", "gaps.csv")).pivot(
            index="component", columns="method", values="gap_nats"
        )
        accuracy = pd.read_csv(layout.study(f"{name}/accuracy.csv"))
        mean = accuracy[(accuracy["method"] == "mean") & (accuracy["budget"] == 64)].iloc[0]
        measured = gaps[gaps["optimal"] > FLOOR]
        assert mean["excess"] == pytest.approx((measured["mean"] / measured["optimal"] - 1).median(), rel=1e-5)
        assert mean["spearman"] == pytest.approx(gaps["mean"].corr(gaps["optimal"], method="spearman"))


# Every leaf of the section: another value, and the jobs that run again.
KEYS = {
    "study.models": (SMALL["study"]["models"] | {"two": {"demo_model": {"n_layers": 3}}}, ONE),
    "study.models.new": ({"seed": 5}, ONE),
    "study.tasks": (["ioi"], {"report": 1}),
    "study.methods": (["optimal", "mean"], COSTS),
    "study.budgets": ([64], COSTS),
    **{f"study.fit.{key}": (0.5 if key == "tolerance" else 5, COSTS) for key in ReferenceFit.model_fields},
    "seed": (1, BOTH),
    "ablation.optimal.max_steps": (5, BOTH),
    "demo_model.d_model": (32, BOTH),
    "limits.threads": (2, {}),
    "run": ("other", BOTH),
}


def test_the_table_has_every_key():
    sections = {f"study.{key}" for key in Study.model_fields if key != "fit"}
    assert {*sections, *(f"study.fit.{key}" for key in ReferenceFit.model_fields)} <= set(KEYS)


@pytest.mark.parametrize("key", KEYS)
def test_each_key_re_runs_what_depends_on_it(studied, tmp_path, key):
    value, expected = KEYS[key]
    assert planned(changed(studied[0], key, value), tmp_path / "config.yaml") == expected


def test_a_finished_study_has_nothing_to_do_and_a_member_that_comes_costs_its_own(studied, tmp_path):
    values, config, _ = studied
    assert planned(values, tmp_path / "config.yaml") == {}
    assert all(step.n_new == 0 for step in plan(config)), "and nothing new in the store"
    more = parse_config(changed(values, "study.models.new", {"demo_model": {"n_layers": 3}}))
    new = {step.job: step.says for step in plan(more) if step.n_new != 0}
    assert new["study_cost new"] == "known after study_member new"
    assert {job.partition(":")[0] for job in new} == {"new", "study_cost new"}


def test_the_code_of_a_member_is_that_of_its_experiments(studied, monkeypatch):
    """Stages and rows of the sections that it has, whatever the study's own."""
    hashed = set()
    monkeypatch.setattr(member_module, "codehash", lambda *modules: hashed.update(modules) or "x")
    members = studied[1].members()
    before = identity(members["two"])
    assert {"oacore.stages.demo", "oacore.stages.optimal", "oacore.tasks.ioi"} <= hashed
    assert not any("circuit" in name or "study" in name for name in hashed)
    identity(members["one"])
    assert {"oacore.stages.circuits", "oacore.circuits.ugs"} <= hashed
    monkeypatch.setattr(member_module, "codehash", lambda *modules: "other")
    assert identity(members["two"]) != before


def test_modules_are_hashed_by_what_uses_them(studied, tmp_path, monkeypatch):
    hashed = {}
    monkeypatch.setattr(codehash_module, "codehash", lambda *modules: " ".join(modules))
    for job in snakemake_dag(studied[0], tmp_path / "config.yaml", forced=True).jobs:
        for root in job.params.get("code", "").split():
            hashed.setdefault(job.rule.name, set()).update(codehash_module._reachable(root))
    own = "oacore.study."
    of_study = {rule: {name.removeprefix(own) for name in of if own in name} for rule, of in hashed.items()}
    measuring = {"attribution", "comparison", "effort", "estimates", "member", "quality", "tables"}
    assert of_study["study_cost"] == measuring
    assert of_study["study_member"] == {"comparison", "member"}
    assert of_study["study_figures"] == {"exponents", "member", "plots", "quality", "tables"}
    assert {"report", "plots"} <= of_study["report"]


def test_without_snakemake_the_same_numbers_and_stale_results_go(studied, tmp_path):
    values, _, layout = studied
    config = parse_config(values | {"results_dir": str(tmp_path)})
    for stage in ("study_member", "study_cost"):  # from the store, which has what was measured, clock and all
        run_stage(stage, config, member="two")
    for name in ("cost", "accuracy", "comparison"):
        files = [Path(each.study(f"two/{name}.csv")) for each in (Layout(config), layout)]
        assert files[0].read_bytes() == files[1].read_bytes()
    member = config.members()["two"]
    own = Layout(member)
    gaps, mine = Path(own.ablation("ioi", "gaps.csv")), Path(own.results_dir) / "mine.txt"
    mine.write_text("kept")
    clear_stale(own)
    assert gaps.exists(), "it is today's"
    clear_stale(Layout(member.model_copy(update={"seed": 7})))
    assert not gaps.exists() and mine.exists() and Path(own.model_json).exists()


def test_a_member_takes_no_cache_of_other_code(studied, monkeypatch):
    """What has no note is Snakemake's: as old as the mark that it left."""
    own = Layout(studied[1].members()["one"])
    shared = {Path(path) for path in own.cache_files()}
    assert running._stale(own) == set()
    monkeypatch.setattr(running, "cache_is_outdated", lambda layout: True)
    assert running._stale(own) == set(), "each has a note of today's code"
    monkeypatch.setattr(running, "_note", lambda *job: Path("none"))
    assert running._stale(own) == shared


def test_what_members_need_is_not_removed(studied):
    assert all(piece.needed for piece in pieces([studied[1]]))


READ_BY = {
    "run": ("one/run.json", "study_cost", {"member": "one"}),
    "cost": ("one/cost.csv", "study_figures", {}),
    "comparison": ("two/comparison.csv", "study_figures", {}),
    "exponents": ("exponents.csv", "report", {}),
    "figure": ("figures/cost_ioi.svg", "report", {}),
}


@pytest.mark.parametrize("harm", [flip_bits, of_another_model], ids=lambda harm: harm.__name__)
@pytest.mark.parametrize("name", READ_BY)
def test_stages_refuse_bad_files(studied, name, harm):
    _, config, layout = studied
    file, stage, what = READ_BY[name]
    path = Path(layout.study(file))
    kept = {each: each.read_bytes() for each in (path, path.with_name(f".{path.name}.seal")) if each.exists()}
    try:
        harm(path)
        with pytest.raises(UserError, match=str(path)):
            run_stage(stage, config, **what)
    finally:
        for each, content in kept.items():
            each.write_bytes(content)
