"""The experiments as Python functions: they are the stages, they share the store with the pipeline, and they compute
nothing twice.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml

import oacore as oa
from oacore import running
from oacore.api import circuits, settings
from oacore.circuits.mib_file import load_circuit
from oacore.config.model import SHIPPED_DEMO
from oacore.config.read import load_config
from oacore.config.tasks import Pairs
from oacore.errors import UserError
from oacore.jobs import files_of
from oacore.models.hub import load_tokenizer
from oacore.running import run_behind
from oacore.store.items import Items
from oacore.store.layout import Layout
from oacore.store.locks import hold
from oacore.tasks.prompts import SPLITS
from oacore.tasks.stored import read_prompts

ROOT = Path(__file__).parents[1]
PAIRS = ROOT / "config/pairs-example.csv"
FIT = {"first_round": 2, "max_steps": 4, "batch_size": 4}
GAPS = {"methods": ["zero", "mean", "optimal"], "optimal": FIT}
SEARCH = {"lambdas": [1e-3, 1e-1], "masks": {"n_steps": 6, "n_samples": 2, "n_prompts": 2, "learning_rate": 6}}
SEARCH |= {"refit": FIT}
RANKING = {"method": "eap_ig", "optimal": FIT, "n_prompts": 4, "refit": FIT}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    root = tmp_path_factory.mktemp("api")
    return oa.load("demo", device="cpu", threads=1, cache_dir=root / "cache", results_dir=root / "results")


@pytest.fixture(scope="module")
def task(model):
    return oa.pairs(PAIRS, model)


@pytest.fixture
def written(monkeypatch):
    """The kinds of items that are written from now on."""
    kinds, write = [], Items._write

    def counting(self, *arguments):
        kinds.append(self.kind)
        return write(self, *arguments)

    monkeypatch.setattr(Items, "_write", counting)
    return kinds


def clear_results(model):
    """As if nothing had been concluded so far; the cache stays."""
    shutil.rmtree(model.settings["results_dir"], ignore_errors=True)


# The package


def test_importing_the_package_imports_nothing_that_takes_time():
    code = "import sys, oacore; dir(oacore); print({'torch', 'pandas', 'pydantic', 'numpy', 'yaml'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "set()\n"


def test_the_package_has_its_functions_and_no_others():
    assert set(oa.API) <= set(dir(oa)) and all(callable(getattr(oa, name)) for name in oa.API)
    with pytest.raises(AttributeError, match="module 'oacore' has no attribute 'gasp'"):
        oa.gasp  # noqa: B018


def test_no_function_has_the_name_of_a_package():
    """Whose import would take its place."""
    assert not [
        name for name in oa.API if list((ROOT / "oacore").glob(f"{name}*")) and (ROOT / "oacore" / name).is_dir()
    ]


# Models and tasks


def test_a_model_says_what_it_is(model):
    assert repr(model).startswith("demo: gpt2, 4 layers of 4 heads, width 128, 479 edges; parity with Hugging Face ")
    assert model.facts["parity"]["max_abs_log_prob"] < 1e-4


def test_a_task_shows_its_prompts(task):
    assert repr(task) == "pairs_example: 36 train, 12 validation, 12 test prompts"
    rows = pd.read_csv(PAIRS).set_index("clean")
    for split, count in task.counts.items():
        prompts = task.prompts(split)
        assert len(prompts) == count and prompts["cluster"].nunique() == count / 2
        theirs = rows.loc[prompts["text"]]
        assert prompts["counterfactual"].tolist() == theirs["corrupt"].tolist()
        assert prompts["answers"].str.strip().tolist() == theirs["right"].tolist()
        assert prompts["wrong_answers"].str.strip().tolist() == theirs["wrong"].tolist()
    with pytest.raises(ValueError, match="split 'dev'; allowed: train, validation, test"):
        task.prompts("dev")


def test_a_task_is_called_as_its_file_as_far_as_it_can_be(model, tmp_path):
    names = {"My pairs-2": "my_pairs_2", "ioi": "pairs_ioi", "2026": "pairs_2026", "logs": "pairs_logs"}
    for stem, name in names.items():
        assert oa.pairs(shutil.copy(PAIRS, tmp_path / f"{stem}.csv"), model).name == name
    assert oa.pairs(PAIRS, model, name="give", n_test=4).counts["test"] == 4


# The experiments


def test_gaps_are_those_of_the_pipeline(model, task, written, tmp_path):
    """The same file, from the same items; and the config that a result gives is that of its run."""
    gaps = oa.gaps(model, task, **GAPS)
    assert len(gaps.table) == 3 * 20 and gaps.table["gap_nats"].gt(-1e-6).all() and list(gaps.tables)[1] == "summary"
    assert set(gaps.figures) == {"gap_distributions", "layer_head_heatmap", "convergence_curves"}
    assert gaps.figures["gap_distributions"]._repr_svg_().lstrip().startswith("<?xml")
    assert "<table" in gaps._repr_html_() and "a0.h0" in repr(gaps)
    gaps.figures["gap_distributions"].save(tmp_path / "gaps.svg")
    assert (tmp_path / "gaps.svg").read_text() == gaps.figures["gap_distributions"].svg
    assert set(written) == {"constants", "gaps"}

    written.clear()
    (tmp_path / "config.yaml").write_text(gaps.config)
    config = load_config(tmp_path / "config.yaml")
    assert config == gaps.settings
    layout = run_behind(config.model_copy(update={"run": "mine"}), "gaps")
    assert not written
    assert Path(layout.ablation(task.name, "gaps.csv")).read_bytes() == (
        (gaps.folder / task.name / "ablation/gaps.csv").read_bytes()
    )


def test_a_second_call_computes_nothing(model, task, written, capsys):
    before = oa.gaps(model, task, **GAPS)
    capsys.readouterr()
    written.clear()
    again = oa.gaps(model, task, **GAPS)
    assert capsys.readouterr().out == "" and not written, "its files are there"
    clear_results(model)
    anew = oa.gaps(model, task, **GAPS)
    assert "all 6 are in the store" in capsys.readouterr().out and not written
    for other in (again, anew):
        pd.testing.assert_frame_equal(before.table, other.table, check_exact=True)
        assert before.figures == other.figures and before.folder == other.folder


def test_what_the_pipeline_has_computed_is_found(model, task, written):
    wanted = {"circuits": {"methods": ["random"], "ablations": ["mean"], "sizes": [60, 120], "seeds": [0, 1]}}
    values = {**model.settings, "run": "theirs", "tasks": {task.name: task.settings}, "ablation": {"tasks": []}}
    path = Path(model.settings["results_dir"]).parent / "theirs.yaml"
    path.write_text(yaml.safe_dump(values | wanted))
    config = load_config(path)
    run_behind(config, "circuit_figures")
    assert written
    written.clear()
    fronts = oa.fronts(model, task, **wanted["circuits"])
    assert not written and list(fronts.tables) == ["pareto", "fronts", "stability", "edge_frequency"]
    theirs, ours = (
        Path(Layout(each).circuits(task.name, "pareto.csv")).read_bytes() for each in (config, fronts.settings)
    )
    assert theirs == ours and len(fronts.table) == 4
    assert set(fronts.figures) == {"pareto_mean", "circuit_mean"}


@pytest.fixture(scope="module")
def found(model, task):
    return oa.circuit(model, task, method="ugs", edges=450, **SEARCH)


def test_a_circuit_has_its_edges_and_its_loss(model, task, found, tmp_path):
    pareto = found.tables["pareto"]
    assert len(pareto) == 2 and found.n_edges == len(found.edges) == found.row["edges"] <= 450
    assert list(found.edges) == ["source", "destination", "score"] and found.edges["score"].is_monotonic_decreasing
    assert found.table is found.edges and found.kl_nats > 0 and found.se_nats > 0
    assert found.draw()._repr_svg_().startswith("<svg") and f"{found.n_edges} edges" in found.draw().svg
    found.save(tmp_path / "circuit.json")
    assert (load_circuit(tmp_path / "circuit.json").mask == found.found.mask).all()


def test_another_number_of_edges_is_another_choice(model, task, found, written):
    pareto = found.tables["pareto"]
    smallest = int(pareto["edges"].min())
    assert oa.circuit(model, task, edges=smallest, **SEARCH).n_edges == smallest and not written
    refusal = f"edges: {smallest - 1}; allowed: at least {smallest}, the size of the smallest .*; other `lambdas`"
    with pytest.raises(UserError, match=refusal):
        oa.circuit(model, task, edges=smallest - 1, **SEARCH)


def test_circuits_are_chosen_on_validation_prompts(model, task, found, monkeypatch):
    """Among those that are small enough, whatever they lose on the test prompts."""
    read = circuits.read

    def changed(*arguments):
        return read(*arguments).assign(edges=[80, 60], validation_kl_nats=[0.1, 0.2], kl_nats=[9.0, 0.01])

    monkeypatch.setattr(circuits, "read", changed)
    knobs = [oa.circuit(model, task, edges=edges, **SEARCH).row["knob"] for edges in (100, 80, 79, 60)]
    assert knobs == [1e-3, 1e-3, 1e-1, 1e-1]


def test_ranking_methods_take_the_best_edges(model, task, written):
    """With constants of the components, which the gaps have fitted where they were asked for."""
    oa.gaps(model, task, **GAPS)
    written.clear()
    circuit = oa.circuit(model, task, edges=90, **RANKING)
    assert circuit.tables["pareto"]["knob"].tolist() == [90] and 0 < circuit.n_edges <= 90
    assert "constants" not in written and "circuits" in written
    written.clear()
    assert oa.circuit(model, task, edges=91, **RANKING).n_edges <= 91 and "circuits" not in written


def test_a_circuit_is_judged_as_the_pipeline_judges_it(model, task, found, written):
    again = found.evaluate(task)
    assert not written and again.loc[0, ["kl_nats", "se_nats", "logit_diff"]].tolist() == [
        found.row[name] for name in ("kl_nats", "se_nats", "logit_diff")
    ]
    assert again["steps"].tolist() == [4] and again["n_prompts"].tolist() == [12]
    zero = found.evaluate(task, ablation="zero")
    assert zero["kl_nats"].iloc[0] > again["kl_nats"].iloc[0] and zero["steps"].isna().all()
    other = found.evaluate(oa.task("ioi", model, n_train=12, n_validation=8, n_test=9))
    assert list(other) == list(again) and other["task"].tolist() == ["ioi"] and other["n_prompts"].tolist() == [9]
    assert other["edges"].tolist() == [found.n_edges] and other["kl_nats"].gt(0).all()
    with pytest.raises(UserError, match=r"circuits.ablations\[0\]: 'zeros'.*did you mean 'zero'"):
        found.evaluate(task, ablation="zeros")


def test_effects(model, task):
    found = oa.effects(model, task, ablations=["mean", "optimal"], n_components=2, mediators="layer", refit=FIT)
    assert list(found.tables) == ["effects", "paths", "interactions"]
    effects, pairs = found.table, found.tables["interactions"]
    assert len(effects) == 2 * 2 and effects["total_nats"].gt(0).all() and len(pairs) == 2
    assert set(effects["component"]) == set(pairs["first"]) | set(pairs["second"])
    assert "interactions_optimal" in found.figures


def test_removal(model):
    """Of one kind of facts, while the other is kept; the table is the pipeline's, read with its provenance."""
    facts = oa.task("facts", model, n_train=60, n_validation=16, n_test=40)
    asked = {"forget": {"facts": "city|home|streets|Friends"}, "retain": {"facts": "works as|profession|good|best"}}
    asked |= {"methods": ["gap", "random"]}
    found = oa.remove(model, [facts], **asked, ablations=["mean"], sizes=[1, 3], relearn={"max_steps": 0})
    assert list(found.tables) == ["front"] and set(found.figures) == {"front_mean"}
    assert found.table["ablations"].tolist() == [1, 3] * 2 and found.table["retain_kl_nats"].gt(0).all()
    assert found.folder.joinpath("removal/front.csv").exists()
    with pytest.raises(UserError, match=r"removal.retain.ioi: unknown key; allowed: the config.s tasks: facts"):
        oa.remove(model, [facts], **asked | {"retain": "ioi"})


def test_importance_of_a_network_s_units(model, tmp_path):
    places = {name: model.settings[name] for name in ("cache_dir", "results_dir")}
    few = {"images": {"n_network": 200, "n_train": 20, "n_validation": 5, "n_test": 10}, "budgets": [300], "n_pairs": 1}
    network = {"widths": [5], "branches": 1, "n_steps": 60, "min_accuracy": 0}
    asked = {"units": ["channels"], "layer": 1, "replacements": ["zero"], "ig_steps": 2}
    found = oa.importance(**asked, **few, network=network, **places)
    assert found.table.query("method == 'zero'")["importance_nats"].ge(0).all() and len(found.table) == 4 * 5
    assert list(found.tables) == ["importance", "agreement", "curves", "sanity"] and "curves_channels" in found.figures
    assert oa.importance(**asked, **few, network=network, **places).folder == found.folder
    with pytest.raises(UserError, match=r"vision.pretrained.images: missing"):
        oa.importance("microsoft/resnet-18", **places)


def test_tracing(model):
    facts = oa.task("facts", model, n_train=20, n_validation=8, n_test=8)
    traced = oa.trace(model, facts, corruptions=["mean"], sites=["mlp"], positions=["last"], windows=[1], pictures=1)
    assert traced.table["aie"].between(-1, 1).all() and len(traced.table) == 4
    assert list(traced.tables) == ["aie", "pictures"] and "fact_0" in " ".join(traced.figures)
    assert traced.folder.joinpath("facts/tracing/aie.csv").exists()


def test_facts_from_a_file_of_pairs_are_traced_as_the_task_facts_is(model, tmp_path):
    facts = oa.task("facts", model, n_train=20, n_validation=8, n_test=8)
    asked = {"sites": ["mlp"], "positions": ["last_subject"], "windows": [1], "pictures": ["lives"], "fit": FIT}
    asked |= {"corruptions": ["oat", "oat_cautious", "gaussian", "mean", "token_replacement"], "noise_scales": [2]}
    config = settings.config_of(model.settings, {"facts": facts.settings}, tracing=asked)
    expected = oa.trace(model, facts, **asked).tables
    tokenizer = load_tokenizer(SHIPPED_DEMO)
    rows = []
    for split in SPLITS:
        prompts = read_prompts(Layout(config).prompts("facts"), split)
        for row, text in enumerate(prompts.text):
            first, end = prompts.subject[row]
            corrupt, subject, right = (
                tokenizer.decode(ids).strip()
                for ids in (
                    prompts.counterfactual[row, 1 : prompts.lengths[row]],
                    prompts.tokens[row, first:end],
                    prompts.continuation[row][prompts.continuation[row] >= 0],
                )
            )
            rows.append((text, corrupt, right, split, f"{split} {prompts.cluster[row]}", subject))
    columns = ["clean", "corrupt", "right", "split", "group", "subject"]
    pd.DataFrame(rows, columns=columns).to_csv(tmp_path / "told.csv", index=False)
    told = oa.trace(model, oa.pairs(tmp_path / "told.csv", model), **asked)
    assert told.folder.joinpath("told/tracing/aie.csv").exists()
    for name, table in expected.items():
        pd.testing.assert_frame_equal(told.tables[name], table, check_exact=True)


def test_lenses(model):
    text = oa.task("text", model, n_tokens=8, n_train=40, n_validation=20, n_test=20)
    lens = oa.lens(model, text, lenses=["oca", "logit"], oca=FIT, lengths=[6], pictures=1)
    assert list(lens.tables) == ["loss", "pictures", "lengths"] and len(lens.table) == 2 * 4
    assert {"loss", "agreement", "lengths", "prompt_0"} == set(lens.figures)
    assert lens.tables["pictures"].notna().all(axis=None)


# What results depend on


def test_results_have_a_folder_for_all_that_determines_them(model, task, tmp_path, monkeypatch):
    path = Path(shutil.copy(PAIRS, tmp_path / "pairs.csv"))
    folders = []

    def note(**changes):
        section = {"methods": ["zero"], "tasks": ["mine"]} | changes
        config = settings.config_of(model.settings, {"mine": {"pairs": str(path)}}, section)
        folders.append(Layout(config).results_dir)

    note()
    note(methods=["zero", "mean"])
    path.write_text("\n".join(path.read_text().splitlines()[:-2]) + "\n")
    note()
    monkeypatch.setattr(settings, "_code", lambda: "edited")
    note()
    monkeypatch.setattr(settings, "version", lambda package: "3.0")
    note()
    assert len(set(folders)) == 5
    note()
    assert folders[-1] == folders[-2]


def test_what_other_code_has_cached_is_made_anew(model, tmp_path, monkeypatch):
    """Of Python's own; what Snakemake has made has no note, and is taken as it is."""
    shutil.copytree(model.settings["cache_dir"], tmp_path / "cache")
    moved = oa.load(device="cpu", threads=1, cache_dir=tmp_path / "cache", results_dir=tmp_path / "results")
    task, run_stage, code_of, ran = oa.pairs(PAIRS, moved), running.run_stage, running._code_of, []

    def noting(stage, *arguments, **wildcards):
        ran.append(stage)
        run_stage(stage, *arguments, **wildcards)

    def stages_run():
        ran.clear()
        oa.circuit(moved, task, method="random", ablation="mean", edges=300)
        return list(ran)

    monkeypatch.setattr(running, "run_stage", noting)
    assert stages_run() == ["circuits"] and stages_run() == []
    monkeypatch.setattr(running, "_code_of", lambda stage, what: "new" if stage == "prompts" else code_of(stage, what))
    monkeypatch.setattr(settings, "_code", lambda: "new")
    assert stages_run() == ["prompts", "activations", "circuits"] and stages_run() == []
    for note in (tmp_path / "cache").rglob(".*.code"):
        note.unlink()
    monkeypatch.setattr(running, "_code_of", lambda stage, what: "newer")
    assert stages_run() == []


def test_locks_end_with_the_call(model, task, tmp_path):
    oa.gaps(model, task, **GAPS)
    unknown = "\n".join(f"a {word} b,b {word} a,x,y" for word in ("zebra", *"cdefghij"))
    (tmp_path / "bad.csv").write_text(f"clean,corrupt,right,wrong\n{unknown}\n")
    with pytest.raises(UserError, match="has no token for 'zebra'"):
        oa.pairs(tmp_path / "bad.csv", model)
    with pytest.raises(UserError, match="config is not valid"):
        oa.gaps(model, task, methods=["zeros"])
    cache = Path(task.model.settings["cache_dir"])
    for lock in [*cache.rglob(".lock"), *Path(model.settings["results_dir"]).rglob(".lock")]:
        file = hold(lock, "a folder", wait=False)
        assert file is not None
        file.close()


@pytest.mark.parametrize(
    ("call", "problem"),
    [
        (lambda model, task: oa.load("demmo", threads=1, device="gpu"), r"device: 'gpu'; allowed: auto, cpu, cuda"),
        (lambda model, task: oa.load("demo", thread=1), r"limits.thread: unknown key.*did you mean 'threads'"),
        (lambda model, task: oa.load("./no-model"), "model: './no-model' is not a directory"),
        (lambda model, task: oa.task("iio", model), "tasks.iio: unknown key.*did you mean 'ioi'"),
        (lambda model, task: oa.task("ioi", model, n_trian=3), "tasks.ioi.n_trian: unknown key"),
        (lambda model, task: oa.pairs("no.csv", model), "tasks.no.pairs: 'no.csv' does not exist"),
        (lambda model, task: oa.gaps(model, task, method=["zero"]), "ablation.method: unknown key.*'methods'"),
        (lambda model, task: oa.circuit(model, task, method="ugz"), r"circuits.methods\[0\]: 'ugz'.*'ugs'"),
        (lambda model, task: oa.circuit(model, task, ablation="optimum"), r"circuits.ablations\[0\]: 'optimum'"),
        (lambda model, task: oa.circuit(model, task, lambda_=[1]), "circuits.lambda_: unknown key.*'lambdas'"),
        (
            lambda model, task: oa.circuit(model, task, method="eap", ablation="mean", edges=0),
            r"circuits.sizes\[0\]: 0",
        ),
        (
            lambda model, task: oa.effects(model, task, ablation="mean"),
            "interactions.ablation: unknown key.*'ablations'",
        ),
        (lambda model, task: oa.trace(model, task), "has 60 rows without a subject"),
        (lambda model, task: oa.lens(model, task, lenses=["tuned_lens"]), r"lenses.lenses\[0\]: 'tuned_lens'"),
    ],
)
def test_bad_settings_are_refused_as_the_config_s(model, task, call, problem):
    with pytest.raises(UserError, match=problem):
        call(model, task)


def test_a_task_s_settings_are_the_config_s(task):
    assert set(Pairs.model_fields) >= set(task.settings)


def test_only_what_is_asked_for_runs(model, task, written):
    """A circuit without the components' constants fits none, and no report is written."""
    clear_results(model)
    circuit = oa.circuit(model, task, method="random", ablation="mean", edges=200)
    assert not list(circuit.folder.rglob("ablation")) and not list(circuit.folder.rglob("report.html"))
    outputs = files_of(Layout(circuit.settings), "circuits", task=task.name, method="random", ablation="mean")[1]
    assert all(path.exists() for path in outputs.every())
