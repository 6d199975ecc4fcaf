"""What re-runs after which change, exactly: every config key and every module, on a finished run, by Snakemake's own
plan.
"""

import ast
import shutil
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import get_args

import pytest
import yaml
from conftest import snakemake_dag, stage_of
from pydantic import BaseModel

from oacore.config.model import DEMO_TRAINED, SHIPPED_DEMO, DemoModel
from oacore.config.read import load_config
from oacore.config.run import Config
from oacore.models.demo import build_demo
from oacore.store import codehash as codehash_module
from oacore.store.layout import Layout

ROOT = Path(__file__).parents[2]
TINY = yaml.safe_load((ROOT / "tests/configs/tiny.yaml").read_text())


def planned(values, path):
    """Jobs by stage that Snakemake would run for a config."""
    return Counter(stage_of(job.rule.name) for job in snakemake_dag(values, path).needrun_jobs()) - Counter(["all"])


@pytest.fixture(scope="module")
def finished(tiny_run, tmp_path_factory):
    """The tiny config where its run was finished, and a file for changed ones."""
    config, layout = tiny_run
    values = TINY | {"cache_dir": str(config.cache_dir), "results_dir": str(config.results_dir)}
    path = tmp_path_factory.mktemp("staleness") / "config.yaml"
    assert planned(values, path) == {}, "the run is not finished"
    return values, path, layout


def with_value(values, path, value):
    """The config with the dotted path set; sections on the way are made."""
    key, _, rest = path.partition(".")
    return values | {key: with_value(values.get(key) or {}, rest, value) if rest else value}


REPORT = {"report": 1}
GAPS = {"gaps": 2, "figures": 2} | REPORT
SHOWN = {"circuit_figures": 1} | REPORT
CONSTANTS = {
    "optimal": 4,
    "circuits": 4,
    "circuit_figures": 1,
} | GAPS  # EAP, EAP-IG, ACDC, exact take them
DRAWN = {"interaction_figures": 1} | REPORT
INTERACTIONS = {"interactions": 2} | DRAWN
RANKED = {"interaction_ranking": 1} | INTERACTIONS
COMPARED = {"removal_figures": 1} | REPORT
REMOVED = {"removal": 2} | COMPARED
ONE_REMOVED = {"removal": 1} | COMPARED
TRACED = {"tracing": 1, "tracing_figures": 1} | REPORT
TRACING = {"tracing_fit": 1} | TRACED
MEASURED = {"lens_evaluation": 1, "lens_figures": 1} | REPORT
LENSES = {"lens_fit": 6, "lens_faithfulness": 1, "lens_truthfulness": 1} | MEASURED
OCA = LENSES | {"lens_fit": 3}  # oca, oca_shared, linear_oca
TUNED = MEASURED | {"lens_fit": 4}  # tuned twice, linear_oca, grad
FAITHFULNESS = {"lens_faithfulness": 1, "lens_figures": 1} | REPORT
TRUTHFULNESS = {"lens_truthfulness": 1, "lens_figures": 1} | REPORT
IMPORTANCE = {"vision": 2, "vision_figures": 1} | REPORT
NETWORK = {"vision_model": 1} | IMPORTANCE
OF_IOI = {"prompts": 1, "activations": 1, "optimal": 2, "gaps": 1, "figures": 1, "circuits": 16} | SHOWN | RANKED
OF_FACTS = {"prompts": 1, "activations": 1, "optimal": 2, "gaps": 1, "figures": 1} | TRACING | REMOVED
OF_TEXT = {"prompts": 1, "activations": 1} | LENSES
RESULTS = {"optimal": 4, "circuits": 16} | GAPS | SHOWN | RANKED | REMOVED | TRACING | LENSES | IMPORTANCE
OF_MODEL = {"model": 1, "prompts": 3, "activations": 3} | {k: v for k, v in RESULTS.items() if "vision" not in k}
PROMPTS = {"prompts": 3, "activations": 3} | RESULTS
EVERYTHING = OF_MODEL | NETWORK
NOTHING: dict[str, int] = {}
TRAINING_KEYS = tuple(DemoModel.model_fields)

# Every leaf of the config: another value, and how many jobs of which rules run again.
KEYS = {
    "run": ("other", RESULTS),
    "revision": ("main", REPORT),  # the demo has none
    "dtype": ("bf16", OF_MODEL),
    "precision": ("ieee", OF_MODEL),
    "device": ("auto", NOTHING),
    "store_weights": (False, NOTHING),
    "seed": (1, PROMPTS | NETWORK),
    "cache_dir": ("{elsewhere}", EVERYTHING),
    "results_dir": ("{elsewhere}", RESULTS),
    "limits.tokens_per_batch": (1000, NOTHING),
    "limits.memory_gb": (1, NOTHING),
    "limits.threads": (2, NOTHING),
    **{f"tasks.ioi.n_{split}": (40, OF_IOI) for split in ("train", "validation", "test")},
    **{f"tasks.greater_than.n_{split}": (40, {"prompts": 1} | REPORT) for split in ("train", "validation", "test")},
    **{f"tasks.facts.n_{split}": (40, OF_FACTS) for split in ("train", "validation", "test")},
    "tasks.facts.path": ("{demo}/facts.csv", OF_FACTS),
    "tasks.facts.unseen": ("subjects_and_relations", OF_FACTS),
    **{f"tasks.text.n_{split}": (40, OF_TEXT) for split in ("train", "validation", "test")},
    "tasks.text.path": ("{demo}/text.json", OF_TEXT),
    "tasks.text.n_tokens": (9, OF_TEXT),
    "tasks.text.passages": ("lines", OF_TEXT),
    "tasks.text.windows": ("first", OF_TEXT),
    "ablation.tasks": (["ioi"], REPORT),
    "ablation.methods": (["zero", "mean", "optimal", "optimal_positional"], GAPS),
    "ablation.components": (["head", "mlp", "attention_layer"], CONSTANTS),
    **{
        f"ablation.optimal.{key}": (7, CONSTANTS) for key in ("learning_rate", "batch_size", "first_round", "max_steps")
    },
    "ablation.optimal.tolerance": (0.5, CONSTANTS),
    "circuits.methods": (["ugs", "hcgs", "topk", "eap", "eap_ig", "acdc", "exact"], SHOWN),
    "circuits.ablations": (["optimal"], {"circuit_figures": 1} | REPORT),
    "circuits.objective": ("logit_diff", {"circuits": 14} | SHOWN),  # EAP takes it in any case
    "circuits.seeds": ([0, 2], {"circuits": 16} | SHOWN),
    "circuits.lambdas": ([1e-3, 1e-2], {"circuits": 4} | SHOWN),
    "circuits.thresholds": ([0.06], {"circuits": 2} | SHOWN),
    "circuits.sizes": ([40, 0.3], {"circuits": 10} | SHOWN),
    "circuits.n_prompts": (5, {"circuits": 8} | SHOWN),
    "circuits.ig_steps": (4, {"circuits": 2} | SHOWN),
    **{
        f"circuits.masks.{key}": (7, {"circuits": 6} | SHOWN)
        for key in ("n_steps", "n_samples", "n_prompts", "learning_rate")
    },
    **{f"circuits.masks.{key}": (7, {"circuits": 6} | SHOWN) for key in ("constants_rate", "record_every")},
    "circuits.masks.dynamic_window": (True, {"circuits": 6} | SHOWN),
    **{
        f"circuits.refit.{key}": (7, {"circuits": 8} | SHOWN)
        for key in ("learning_rate", "batch_size", "first_round", "max_steps")
    },
    "circuits.refit.tolerance": (0.5, {"circuits": 8} | SHOWN),
    "interactions.tasks": (["facts"], RANKED),
    "interactions.ablations": (["optimal"], DRAWN),
    "interactions.n_components": (2, INTERACTIONS),
    "interactions.components": (["a1.h1"], INTERACTIONS),
    "interactions.mediators": ("component", INTERACTIONS),
    **{f"interactions.refit.{key}": (7, RANKED) for key in ("learning_rate", "batch_size", "first_round", "max_steps")},
    "interactions.refit.tolerance": (0.5, RANKED),
    "removal.forget": ({"facts": "lives in the city"}, REMOVED),
    "removal.retain": ({"facts": "works as"}, REMOVED),
    "removal.paraphrases": ({"facts": "Friends"}, REMOVED),
    "removal.held_out": ({"facts": "Clients"}, REMOVED),
    "removal.methods": (["ugs"], COMPARED),
    "removal.ablations": (["optimal", "zero"], REMOVED),  # of the new one
    "removal.weight": (0.5, REMOVED),
    "removal.edge_prices": ([1e-1], ONE_REMOVED),
    "removal.component_prices": ([1e-1], REPORT),
    "removal.sizes": ([2], ONE_REMOVED),
    "removal.ranks": ([2], REPORT),
    "removal.seeds": ([1], REMOVED),
    **{f"removal.{key}": (7, REPORT) for key in ("n_prompts", "ig_steps")},
    **{
        f"removal.masks.{key}": (7, ONE_REMOVED)
        for key in ("n_steps", "n_samples", "n_prompts", "learning_rate", "constants_rate", "record_every")
    },
    "removal.masks.dynamic_window": (True, ONE_REMOVED),
    **{f"removal.refit.{key}": (7, REMOVED) for key in ("learning_rate", "batch_size", "first_round", "max_steps")},
    "removal.refit.tolerance": (0.5, REMOVED),
    **{f"removal.relearn.{key}": (7, REMOVED) for key in ("n_prompts", "learning_rate", "max_steps")},
    "tracing.corruptions": (["gaussian"], TRACED),
    "tracing.noise_scales": ([1, 2], TRACED),
    "tracing.n_draws": (3, TRACED),
    "tracing.sites": (["mlp"], TRACING),
    "tracing.positions": (["last"], TRACING),
    "tracing.windows": ([1], TRACING),
    "tracing.answer": ("joint", TRACING),
    "tracing.pictures": (1, TRACED),
    **{f"tracing.fit.{key}": (7, TRACING) for key in ("learning_rate", "batch_size", "first_round", "max_steps")},
    "tracing.fit.tolerance": (0.5, TRACING),
    "lenses.tasks": (["text", "ioi"], LENSES),
    "lenses.lenses": (["oca", "oca_shared", "linear_oca", "tuned", "logit", "grad"], MEASURED),
    "lenses.init": (["identity"], MEASURED),
    "lenses.positions": ("all", {"lens_activations": 1} | LENSES),
    **{f"lenses.oca.{key}": (7, OCA) for key in ("learning_rate", "batch_size", "first_round", "max_steps")},
    "lenses.oca.tolerance": (0.5, OCA),
    **{f"lenses.tuned.{key}": (7, TUNED) for key in ("learning_rate", "batch_size", "first_round", "max_steps")},
    "lenses.tuned.tolerance": (0.5, TUNED),
    "lenses.grad_prompts": (5, {"lens_fit": 1} | MEASURED),
    "lenses.lengths": ([7], MEASURED),
    "lenses.pictures": (0, MEASURED),
    "lenses.faithfulness.lenses": (["oca", "mean"], FAITHFULNESS),
    "lenses.faithfulness.layers": ([1], FAITHFULNESS),
    "lenses.faithfulness.n_prompts": (5, FAITHFULNESS),
    "lenses.faithfulness.n_directions": (4, FAITHFULNESS),
    "lenses.faithfulness.resample_sizes": ([2], FAITHFULNESS),
    "lenses.faithfulness.target_kl": (0.1, FAITHFULNESS),
    "lenses.truthfulness.datasets": (["{demo}/labels.csv"], TRUTHFULNESS),
    "lenses.truthfulness.n_demonstrations": (3, TRUTHFULNESS),
    "lenses.truthfulness.n_inputs": (20, TRUTHFULNESS),
    "lenses.truthfulness.template": ("{text}: {label}", TRUTHFULNESS),
    "lenses.truthfulness.separator": (";", TRUTHFULNESS),
    "lenses.truthfulness.lenses": (["logit"], TRUTHFULNESS),
    "vision.units": (["channels"], {"vision_figures": 1} | REPORT),
    "vision.layer": (1, IMPORTANCE | {"vision": 1}),
    "vision.replacements": (["zero"], IMPORTANCE),
    "vision.n_pairs": (3, IMPORTANCE),
    "vision.ig_steps": (3, IMPORTANCE),
    "vision.budgets": ([2000], IMPORTANCE),
    "vision.seeds": ([1], IMPORTANCE),
    **{f"vision.images.n_{split}": (30, NETWORK) for split in ("network", "train", "validation", "test")},
    "vision.network.widths": ([5, 6], NETWORK),
    **{f"vision.network.{key}": (2, NETWORK) for key in ("branches", "n_steps", "batch_size", "learning_rate")},
    "vision.network.min_accuracy": (0.1, NETWORK),
    **{f"vision.fit.{key}": (7, IMPORTANCE) for key in ("learning_rate", "batch_size", "first_round", "max_steps")},
    "vision.fit.tolerance": (0.5, IMPORTANCE),
    "compare": (["{other}"], {"comparison": 1} | REPORT),
}


def leaves(section=Config, prefix=""):
    """Dotted paths of all keys that hold a value."""
    for name, field in section.model_fields.items():
        inner = next((kind for kind in (field.annotation, *get_args(field.annotation)) if _is_section(kind)), None)
        if inner is None:
            yield f"{prefix}{name}"
        else:
            yield from leaves(inner, f"{prefix}{name}.")


def _is_section(kind):
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def test_the_table_has_every_key():
    training = {f"demo_model.{key}" for key in TRAINING_KEYS}
    of_study = {key for key in leaves() if key.startswith("study.")}  # in test_study.py: such a run has other jobs
    pretrained = {key for key in leaves() if key.startswith("vision.pretrained.")}  # in a test of its own
    assert {*KEYS, *training, *of_study, *pretrained, "model", "circuits.tasks", "tracing.tasks"} == set(leaves())


def filled(value, places):
    """Places in braces put in; other braces, as a template has, stay."""
    if isinstance(value, list):
        return [filled(item, places) for item in value]
    if not isinstance(value, str):
        return value
    for name, place in places.items():
        value = value.replace(f"{{{name}}}", place)
    return value


def positive(counts):
    return {rule: count for rule, count in counts.items() if count}


@pytest.fixture
def places(other, tmp_path):
    return {"demo": str(SHIPPED_DEMO), "elsewhere": str(tmp_path), "other": str(other)}


@pytest.fixture(scope="module")
def other(finished, tmp_path_factory):
    """The config of another finished run, of the same results."""
    values, _, layout = finished
    root = tmp_path_factory.mktemp("other")
    shutil.copytree(layout.results_dir, root / "other")
    (root / "other.yaml").write_text(yaml.safe_dump(values | {"run": "other", "results_dir": str(root)}))
    return root / "other.yaml"


@pytest.mark.parametrize("key", KEYS)
def test_each_key_re_runs_what_depends_on_it(finished, places, key):
    values, path, _ = finished
    value, expected = KEYS[key]
    changed = with_value(values, key, filled(value, places))
    assert planned(changed, path) == positive(expected)


def test_another_model_re_runs_all(finished, places):
    values, path, _ = finished
    paths = {"tasks.facts.path": "facts.csv", "tasks.text.path": "text.json"}
    for key, value in {
        "model": places["demo"],
        **{key: f"{places['demo']}/{name}" for key, name in paths.items()},
    }.items():
        values = with_value(values, key, value)
    values = with_value(values, "lenses.truthfulness.datasets", [f"{places['demo']}/labels.csv"])
    assert planned(values, path) == positive(OF_MODEL)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run up to model.json of a demo model that is trained in the workflow, a little."""
    root = tmp_path_factory.mktemp("trained")
    shares = {f"min_{name}": 0 for name in ("ioi_accuracy", "year_mass", "fact_accuracy")}
    values = {
        "model": DEMO_TRAINED,
        "device": "cpu",
        "demo_model": {"n_steps": 2, "batch_size": 6} | shares,
        "tasks": {"ioi": TINY["tasks"]["ioi"]},
        "cache_dir": str(root),
        "results_dir": str(root / "results"),
    }
    path = root / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    layout = Layout(load_config(path))
    command = [sys.executable, "-m", "snakemake", layout.model_json, "--cores", "1", "--configfile", path]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert {"demo", "model"}.isdisjoint(planned(values, path)), "both are there"
    return values, path, layout


def test_the_workflow_trains_what_the_library_trains(trained, tmp_path):
    """The same bits, as its training.json says."""
    values, _, layout = trained
    build_demo(tmp_path / "demo", DemoModel(**values["demo_model"]))
    ours, theirs = (
        {path.name: path.read_bytes() for path in Path(folder).glob("[!.]*")}
        for folder in (tmp_path / "demo", layout.demo_model)
    )
    assert ours == theirs


@pytest.mark.parametrize("key", TRAINING_KEYS)
def test_each_training_key_trains_anew(trained, key, tmp_path):
    values, _, _ = trained
    value = 0.5 if "min" in key else {"n_heads": 2, "d_model": 64}.get(key, 7)  # heads share the width
    changed = planned(with_value(values, f"demo_model.{key}", value), tmp_path / "config.yaml")
    assert changed["demo"] == changed["model"] == 1


def test_a_pretrained_network_re_runs_what_is_of_a_network(finished, tmp_path):
    values, path, _ = finished
    for name in ("model", "images"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "any").write_text(name)
    for number in range(90):
        (tmp_path / f"images/{number}.png").write_text(f"{number}")
    of_vision = {key: value for key, value in values["vision"].items() if key != "network"}
    named = {"model": str(tmp_path / "model"), "images": str(tmp_path / "images")}
    assert planned(with_value(values, "vision", of_vision | {"pretrained": named}), path) == positive(NETWORK)


def test_a_task_from_a_file_leaves_the_others_as_they_are(finished, tmp_path):
    values, path, _ = finished
    (tmp_path / "mine.csv").write_text("clean,corrupt,right\n" + "".join(f"{i} a,{i} b,x\n" for i in range(20)))
    changed = with_value(values, "tasks.mine", {"pairs": str(tmp_path / "mine.csv"), "n_train": 0.8})
    assert planned(changed, path) == {"prompts": 1} | REPORT


def test_another_task_that_is_traced_leaves_the_first_as_it_is(finished, tmp_path):
    values, path, _ = finished
    rows = "".join(f"{i} a,{i} b,x,a\n" for i in range(20))
    (tmp_path / "mine.csv").write_text(f"clean,corrupt,right,subject\n{rows}")
    changed = with_value(values, "tasks.mine", {"pairs": str(tmp_path / "mine.csv")})
    changed = with_value(changed, "tracing.tasks", ["facts", "mine"])
    assert planned(changed, path) == {"prompts": 1} | TRACING
    assert planned(with_value(values, "tracing.tasks", ["facts"]), path) == REPORT


def test_circuits_of_another_task_are_that_task_s(finished):
    values, path, _ = finished
    without_eap = [method for method in TINY["circuits"]["methods"] if method != "eap"]  # which facts refuse
    changed = with_value(with_value(values, "circuits.tasks", ["facts"]), "circuits.methods", without_eap)
    assert planned(changed, path) == {"circuits": 14} | SHOWN


@pytest.fixture(scope="module")
def code(finished, tmp_path_factory):
    """Where code hashes are taken of a copy of both packages, parsed once; `change(module, source)` puts another source
    in.
    """
    root = tmp_path_factory.mktemp("packages")
    for package in codehash_module.PACKAGES:
        shutil.copytree(codehash_module._root(package), root / package, ignore=shutil.ignore_patterns("__pycache__"))
    patch = pytest.MonkeyPatch()
    parsed: dict = {}
    parse = codehash_module._tree.__wrapped__

    def tree(module):
        if module not in parsed:
            parsed[module] = parse(module)
        return parsed[module]

    patch.setattr(codehash_module, "_root", lambda package: root / package)
    patch.setattr(codehash_module, "_tree", tree)

    class Code:
        modules = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py"))

        @staticmethod
        def change(module, edit):
            """Edit a module's source; returns what undoes it."""
            path = root / module
            source = path.read_text()
            name = module.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
            path.write_text(edit(source))
            parsed.pop(name, None)

            def undo():
                path.write_text(source)
                parsed.pop(name, None)

            return undo

    yield Code
    patch.undo()


def test_comments_docstrings_and_formatting_re_run_nothing(finished, code):
    """In all modules at once."""

    def edit(source):
        tree = ast.parse(source)
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
                node.body[0].value.value = "Another docstring."
        return "# A comment.\n" + ast.unparse(tree) + "\n\n\n# Another.\n"

    undo = [code.change(module, edit) for module in code.modules]
    try:
        assert planned(*finished[:2]) == {}
    finally:
        for each in undo:
            each()


# Which rules take up what a rule makes.
NEXT = {
    "model": "prompts activations optimal gaps figures circuits circuit_figures interaction_ranking interactions "
    "interaction_figures removal removal_figures tracing_fit tracing tracing_figures lens_fit lens_evaluation "
    "lens_faithfulness lens_truthfulness lens_figures report",
    "prompts": "activations optimal gaps circuits interaction_ranking interactions removal tracing_fit tracing "
    "lens_fit lens_evaluation lens_faithfulness lens_truthfulness report",
    "activations": "optimal gaps circuits interaction_ranking interactions lens_fit lens_evaluation lens_faithfulness "
    "lens_truthfulness",
    "optimal": "gaps figures circuits",
    "gaps": "figures report",
    "figures": "report",
    "circuits": "circuit_figures",
    "circuit_figures": "report",
    "interaction_ranking": "interactions",
    "interactions": "interaction_figures",
    "interaction_figures": "report",
    "removal": "removal_figures",
    "removal_figures": "report",
    "tracing_fit": "tracing",
    "tracing": "tracing_figures report",
    "tracing_figures": "report",
    "lens_fit": "lens_evaluation lens_faithfulness lens_truthfulness",
    "lens_evaluation": "lens_figures report",
    "lens_faithfulness": "lens_figures report",
    "lens_truthfulness": "lens_figures report",
    "lens_figures": "report",
    "vision_model": "vision vision_figures report",
    "vision": "vision_figures",
    "vision_figures": "report",
    "report": "",
}

# The first rules that use each module, without those that come after them anyway.
MODULES = {
    "model": "engine/forward engine/parity inputs models/load models/registered models/stored stages/model "
    "store/checksums "
    "store/reader store/writer tasks/prompts tasks/stored",
    "model vision_model": "models/graph models/hub models/weights store/artefacts store/provenance",
    "model vision": "store/items",
    "gaps circuits interactions tracing lens_evaluation vision": "store/samples",
    "prompts": "engine/clean stages/prompts tasks/generate",
    "prompts vision_model": "draws",
    "activations removal": "engine/activations engine/prompts engine/statistics",
    "activations": "stages/activations",
    "optimal interaction_ranking removal tracing_fit lens_fit vision": "fits/descent fits/record fits/replayed "
    "fits/resume fits/watch fits/whitening metrics",
    "optimal": "ablation/ablate ablation/components ablation/optimal stages/optimal",
    "gaps circuits interaction_ranking removal tracing lens_evaluation vision": "fits/convergence",
    "gaps": "ablation/gaps ablation/replacements stages/gaps",
    "figures": "ablation/plots ablation/tables fits/curves stages/figures",
    "figures circuit_figures interaction_figures removal_figures tracing_figures lens_figures vision_figures": ""
    "report/figures report/numbers",
    "figures circuit_figures interaction_figures removal_figures tracing_figures vision_figures": "report/series",
    "circuits": "circuits/mib_file stages/circuits",
    "circuits removal": "circuits/circuit circuits/search",
    "circuits interaction_ranking": "circuits/judge",
    "circuits interaction_ranking removal": "circuits/constants circuits/evaluate circuits/numbers "
    "circuits/passes circuits/replacements circuits/task engine/buffers engine/folded engine/fused "
    "engine/masked engine/masked_backward engine/masked_blocks engine/masked_pass oakernels/attention "
    "oakernels/attention_backward oakernels/choices oakernels/constants oakernels/masked_mix "
    "oakernels/masked_mix_backward oakernels/operands oakernels/projection oakernels/rms oakernels/runtime",
    "circuit_figures": "circuits/drawing circuits/fronts circuits/plots circuits/stability stages/circuit_figures",
    "interaction_ranking": "interactions/edges interactions/ranking stages/interaction_ranking",
    "interactions": "interactions/effects stages/interactions",
    "interaction_figures": "interactions/plots stages/interaction_figures",
    "removal": "engine/edge_pass removal/ablated removal/behaviours removal/constants removal/loss removal/measure "
    "removal/relearn removal/request removal/validation stages/removal",
    "removal_figures": "stages/removal_figures",
    "removal_figures report": "removal/plots",
    "tracing_fit": "stages/tracing_fit tracing/facts tracing/fit tracing/places tracing/recall tracing/restore "
    "tracing/subjects",
    "tracing": "stages/tracing tracing/corruptions tracing/effects tracing/pictures tracing/tables tracing/trace",
    "tracing_figures": "stages/tracing_figures tracing/plots",
    "lens_fit": "lenses/fit lenses/kl lenses/lens lenses/numbers lenses/rows lenses/task stages/lens_fit",
    "lens_evaluation": "lenses/evaluate lenses/pictures stages/lens_evaluation",
    "lens_evaluation lens_faithfulness lens_truthfulness": "lenses/logit",
    "lens_faithfulness": "lenses/faithfulness stages/lens_faithfulness",
    "lens_truthfulness": "lenses/labelled lenses/truthfulness stages/lens_truthfulness",
    "lens_figures": "lenses/drawing lenses/plots lenses/tables stages/lens_figures",
    "vision_model": "stages/vision_model vision/data vision/network vision/pretrained vision/source vision/train "
    "vision/units",
    "vision": "stages/vision vision/agreement vision/attributions vision/budgets vision/curves vision/fit "
    "vision/measures vision/passes vision/replacements vision/shapley vision/study vision/tables",
    "vision_figures": "stages/vision_figures vision/plots",
    "report": "ablation/report circuits/report compare/differences compare/report "
    "interactions/report lenses/report removal/report report/cells "
    "report/convergence report/page report/parts report/svg stages/report tracing/peaks tracing/report "
    "study/exponents study/member study/plots study/quality study/report study/tables vision/report",
    # Settings and rows reach rules as parameters; messages, paths and locks are no results; tools and estimates are in
    # no rule, and what no row of the tiny run names is in none of its jobs.
    # Training is in a table of its own.
    "": "__init__ __main__ errors jobs plan progress runner running verify ablation/__init__ api/__init__ "
    "api/circuits api/experiments api/model api/register api/results api/settings api/tasks circuits/__init__ "
    "circuits/manual circuits/mib circuits/mib_tools compare/__init__ compare/circuits compare/numbers compare/page "
    "compare/runs compare/settings stages/comparison config/__init__ config/__main__ config/ablation config/base "
    "config/circuits config/colors config/explain config/interactions config/lenses config/model config/read "
    "config/removal config/rows config/run config/study config/tasks config/tracing config/vision "
    "config/yaml_file "
    "engine/__init__ estimate/__init__ estimate/ablation estimate/case "
    "estimate/circuits estimate/families estimate/inputs estimate/interactions estimate/lens_evaluation "
    "estimate/lenses estimate/masked estimate/need estimate/passes estimate/run estimate/sizes estimate/table "
    "estimate/removal estimate/throughput estimate/tracing fits/__init__ interactions/__init__ lenses/__init__ "
    "models/__init__ models/architecture models/demo models/form sharing/__init__ sharing/bundle sharing/card "
    "sharing/hub removal/__init__ removal/erasure removal/export report/__init__ stages/__init__ stages/demo "
    "stages/study_member stages/study_cost study/__init__ study/attribution study/comparison study/effort "
    "study/estimates stages/study_figures tasks/greater_than tasks/pairs "
    "tasks/template stages/lens_activations store/__init__ store/atomic store/codehash store/fingerprint "
    "store/housekeeping store/layout store/locks "
    "tasks/__init__ tracing/__init__ vision/__init__ oakernels/__init__",
}
FIRST_OF = {module: rules.split() for rules, modules in MODULES.items() for module in modules.split()}

# What trains a demo model.
TRAINING = "fits/resume models/__init__ models/architecture models/demo stages/demo store/artefacts store/provenance "
TRAINING += "tasks/greater_than tasks/ioi tasks/prompts"

# What computes some rows of a registry, and what these share: the jobs of these rows alone.
OF_ROWS = {
    "circuits/ugs": {"circuits": 4} | SHOWN | ONE_REMOVED,  # topk learns with its sampler
    "circuits/hcgs": {"circuits": 2} | SHOWN,
    "circuits/topk": {"circuits": 2} | SHOWN,
    "circuits/learn": {"circuits": 6} | SHOWN | ONE_REMOVED,
    "circuits/edges": {"circuits": 6} | SHOWN | ONE_REMOVED,
    "circuits/eap": {"circuits": 4} | SHOWN | ONE_REMOVED,
    "circuits/exact": {"circuits": 2} | SHOWN,
    "circuits/acdc": {"circuits": 2} | SHOWN,
    "circuits/random": {"circuits": 2} | SHOWN,
    "removal/learned": ONE_REMOVED,
    "removal/ranked": ONE_REMOVED,
    "lenses/constant": LENSES | {"lens_fit": 3},
    "lenses/affine": {"lens_fit": 4} | MEASURED,
    "tasks/counts": OF_TEXT,  # and pairs, of which the tiny run has none
    "tasks/facts": OF_FACTS,
    "tasks/files": OF_FACTS,  # and pairs, of which the tiny run has none
    "tasks/ioi": OF_IOI,
    "tasks/text": OF_TEXT,
}


def and_after(rules):
    """These rules and all that come after them."""
    found, queue = set(), list(rules)
    while queue:
        if (rule := queue.pop()) not in found:
            found.add(rule)
            queue += NEXT[rule].split()
    return found


def test_the_table_has_every_module(code):
    assert {module.removeprefix("oacore/").removesuffix(".py") for module in code.modules} == {*FIRST_OF, *OF_ROWS}
    reached = {
        name.removeprefix("oacore.").replace(".", "/") for name in codehash_module._reachable("oacore.stages.demo")
    }
    assert reached == {name.removesuffix("/__init__") for name in TRAINING.split()}


def test_code_of_training_trains_anew(trained, code):
    assert planned_with(trained, code, "models/demo")["demo"] == 1
    assert planned_with(trained, code, "models/load")["demo"] == 0


def planned_with(finished, code, module):
    """What a real change of a module, at its end, re-runs."""
    undo = code.change(
        f"{'' if module.startswith('oakernels') else 'oacore/'}{module}.py",
        lambda source: f"{source}\nCHANGED = True\n",
    )
    try:
        return planned(*finished[:2])
    finally:
        undo()


@pytest.fixture(scope="module")
def hashed(finished):
    """Modules by stage: those whose code the jobs of the tiny run hash."""
    hashed = defaultdict(set)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(codehash_module, "codehash", lambda *modules: " ".join(modules))
        for job in snakemake_dag(*finished[:2], forced=True).jobs:
            for root in job.params.get("code", "").split():
                hashed[stage_of(job.rule.name)] |= codehash_module._reachable(root)
    return hashed


@pytest.mark.parametrize("module", FIRST_OF)
def test_each_module_is_hashed_by_what_uses_it(hashed, module):
    name = f"{'' if module.startswith('oakernels') else 'oacore/'}{module.removesuffix('/__init__')}".replace("/", ".")
    assert and_after({stage for stage, names in hashed.items() if name in names}) == and_after(FIRST_OF[module])


@pytest.mark.parametrize("module", [modules.split()[0] for modules in MODULES.values()])
def test_a_changed_module_re_runs_what_hashes_it(finished, code, module):
    """One module for each set of rules. All jobs of a rule or none, but for circuits of methods that take no fitted
    constants.
    """
    counts = planned_with(finished, code, module)
    assert set(counts) == and_after(FIRST_OF[module])
    partly = {"circuits"}  # of fitted constants alone, where only these change
    assert all(
        count == EVERYTHING[rule] for rule, count in counts.items() if rule not in partly or rule in FIRST_OF[module]
    )


@pytest.mark.parametrize("module", OF_ROWS)
def test_the_code_of_a_row_re_runs_its_own_jobs(finished, code, module):
    """Another method, lens or task stays as it is."""
    assert planned_with(finished, code, module) == positive(OF_ROWS[module])
