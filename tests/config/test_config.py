"""Every wrong key or value gives one message that names the path, the value and what is allowed."""

import copy
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from oacore.config.explain import describe_fields, describe_names
from oacore.config.model import ARCHITECTURES
from oacore.config.read import load_config, parse_config
from oacore.config.removal import ROLES
from oacore.config.run import Config
from oacore.errors import UserError

ROOT = Path(__file__).parents[2]
GOOD = {"tasks": {"ioi": None}}


def message(values):
    with pytest.raises(UserError) as caught:
        parse_config(values)
    return str(caught.value)


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({**GOOD, "sede": 1}, ["sede: unknown key (value 1)", "allowed: run, model", "did you mean 'seed'?"]),
        ({"tasks": {"ioi": {"n_trian": 3}}}, ["tasks.ioi.n_trian: unknown key", "did you mean 'n_train'?"]),
        (
            {"tasks": {"iio": None}},
            ["tasks.iio: unknown key", "allowed: ioi, greater_than, facts, text", "did you mean 'ioi'?"],
        ),
        (
            {**GOOD, "ablation": {"methods": ["optmal"]}},
            ["ablation.methods[0]: 'optmal'", "allowed: zero, mean", "did you mean 'optimal'?"],
        ),
        ({**GOOD, "ablation": {"components": ["heads"]}}, ["ablation.components[0]: 'heads'", "did you mean 'head'?"]),
        ({**GOOD, "dtype": "fp16"}, ["dtype: 'fp16'", "allowed: fp32, bf16"]),
        ({**GOOD, "seed": "many"}, ["seed: 'many'", "integer"]),
        ({**GOOD, "seed": -1}, ["seed: -1", "greater than or equal to 0"]),
        ({**GOOD, "limits": {"tokens_per_batch": 1}}, ["limits.tokens_per_batch: 1", "64"]),
        ({**GOOD, "limits": None}, ["limits: None", "a mapping with the keys tokens_per_batch"]),
        ({**GOOD, "run": "../escape"}, ["run: '../escape'", "pattern"]),
        ({"tasks": {}}, ["tasks: none given", "ioi, greater_than, facts, text"]),
        ({"tasks": "ioi"}, ["tasks: 'ioi'", "a mapping with the keys ioi"]),
        ({}, ["tasks: missing"]),
        ([1], ["config: [1] is not a mapping"]),
        ({"model": "gpt2", "tasks": {"text": {}}}, ["tasks.text.path: missing", "text file"]),
        ({"tasks": {"text": {"path": "no/such.txt"}}}, ["tasks.text.path: 'no/such.txt' does not exist"]),
        ({**GOOD, "model": "./nowhere"}, ["model: './nowhere' is not a directory"]),
        ({"model": "gpt2", "tasks": {"facts": None}}, ["tasks.facts.path: missing", "CSV"]),
        (
            {**GOOD, "ablation": {"methods": ["optimal_positional"]}},
            ["ablation: optimal_positional starts from the optimal constants"],
        ),
    ],
)
def test_wrong_values(values, parts):
    text = message(values)
    assert all(part in text for part in parts), text


def test_all_problems_are_listed_at_once():
    assert len(message({**GOOD, "sede": 1, "dtype": "x"}).splitlines()) == 3


def test_wrong_architecture_stops_before_any_job(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "lama"}))
    text = message({**GOOD, "model": str(tmp_path)})
    assert "architecture 'lama'" in text and ", ".join(ARCHITECTURES) in text and "did you mean 'llama'?" in text


def test_files_that_are_no_config(tmp_path):
    with pytest.raises(UserError, match=r"none\.yaml: No such file"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("a: [1")
    with pytest.raises(UserError, match="not valid YAML"):
        load_config(tmp_path / "bad.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not UTF-8"):
        load_config(tmp_path / "binary.yaml")


@pytest.mark.parametrize("name", ["demo", "demo-full", "gpt2", "pairs"])
def test_shipped_configs_are_valid(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = load_config(ROOT / f"config/{name}.yaml")
    assert config.run == name


def test_template_is_valid_once_its_paths_exist(tmp_path):
    text = (ROOT / "config/local-model.yaml").read_text()
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text(json.dumps({"model_type": "llama"}))
    (tmp_path / "text.txt").write_text("words")
    path = tmp_path / "mine.yaml"
    path.write_text(
        text.replace("../path/to/text.txt", str(tmp_path / "text.txt")).replace(
            "../path/to/model", str(tmp_path / "model")
        )
    )
    assert load_config(path).tasks.selected().keys() == {"text"}


def test_training_settings_are_of_a_model_that_is_trained():
    """With the shipped model, or another one, they would change nothing."""
    trained = parse_config({**GOOD, "model": "demo-trained", "demo_model": {"n_steps": 5}})
    assert trained.trains_demo and trained.is_demo and trained.demo_model.n_steps == 5
    assert parse_config(trained.model_dump(mode="json")) == trained
    for model in ("demo", "gpt2"):
        with pytest.raises(UserError, match=rf"demo_model: .* model is '{model}'; allowed: with model: demo-trained"):
            parse_config({**GOOD, "model": model, "demo_model": {"n_steps": 5}})
        config = parse_config({**GOOD, "model": model})
        assert not config.trains_demo and config.is_demo == (model == "demo")
        assert parse_config(config.model_dump(mode="json")) == config


def test_a_run_may_be_a_number():
    assert parse_config({**GOOD, "run": 3}).run == "3"


def test_readme_documents_every_key():
    text = (ROOT / "config/README.md").read_text()
    for key, default, description in describe_fields():
        assert f"| `{key}` | {default} | {description} |" in text, (
            f"run `python -m oacore.config`: {key} is missing or outdated"
        )
    keys, names = text.split("## All keys")[1].split("## All names")
    assert keys.count("\n| `") == len(describe_fields())
    assert re.findall(r"^\| `(.+?)` \| `(.+?)` \| (.+) \|$", names, re.M) == describe_names()


@pytest.mark.parametrize(("key", "name"), [row[:2] for row in describe_names() if row[0] != "tasks"])
def test_the_page_of_an_experiment_has_every_name(key, name):
    """In a table; `gaussian-k` for noise of k standard deviations."""
    page = f"docs/{key.partition('.')[0]}.md"
    rows = [line for line in (ROOT / page).read_text().splitlines() if line.startswith("| `")]
    assert any(re.search(rf"`{name}(-k)?`", row.split(" | ")[0]) for row in rows), f"{page}: {name}"


def test_validating_imports_no_heavy_library():
    code = (
        "import sys, oacore.config.run, oacore.store.layout, oacore.store.codehash; "
        "oacore.store.codehash.codehash('oacore.stages.gaps');print([m for m in ('torch', 'transformers', "
        "'transformer_lens', 'h5py', 'pandas', 'matplotlib') if m in sys.modules])"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


@pytest.mark.parametrize("values", [GOOD, {"tasks": {"greater_than": {"n_test": 7}}, "seed": 3}])
def test_a_dumped_config_is_the_same_config(values):
    config = parse_config(values)
    assert parse_config(config.model_dump(mode="json")) == config


def test_config_is_frozen():
    with pytest.raises(ValueError, match="frozen"):
        Config.model_validate(GOOD).seed = 1


CIRCUITS = {"tasks": {"ioi": None}}


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"circuits": {"methods": ["ugz"]}}, ["circuits.methods[0]", "'ugz'", "did you mean 'ugs'"]),
        ({"interactions": {"ablations": ["optimum"]}}, ["interactions.ablations[0]", "did you mean 'optimal'"]),
        ({"interactions": {"tasks": ["facts"]}}, ["interactions.tasks", "facts", "ioi"]),
        ({"interactions": {"n_components": 0}}, ["interactions.n_components: 0", "allowed"]),
        ({"interactions": {"components": ["m1", "m1"]}}, ["interactions.components", "repeats"]),
        ({"vision": {"units": ["chanels"]}}, ["vision.units[0]", "did you mean 'channels'"]),
        ({"vision": {"replacements": ["zero", "zero"]}}, ["vision.replacements: zero, zero", "repeats"]),
        ({"vision": {"layer": 7}}, ["vision.layer: 7", "0 to 6"]),
        ({"vision": {"network": {"widths": [4] * 5}}}, ["vision.network.widths: [4, 4, 4, 4, 4]", "at most 4"]),
        ({"vision": {"network": {"widths": [4, 0]}}}, ["vision.network.widths[1]: 0", "greater than or equal to 1"]),
        ({"vision": {"budgets": [0]}}, ["vision.budgets[0]: 0", "greater than or equal to 1"]),
        ({"vision": {"images": {"n_test": 1000}}}, ["vision.images: 2350 in all splits", "1797 in all"]),
        ({"study": None}, ["study.models", "missing"]),
        ({"study": {"models": {}}}, ["study.models: {}", "at least 1"]),
        ({"study": {"models": {"a/b": None}}}, ["study.models.a/b", "pattern"]),
        ({"study": {"models": {"a": {"run": "x"}}}}, ["study.models.a.run", "the study's own"]),
        ({"study": {"models": {"a": {"sed": 1}}}}, ["study.models.a.sed: unknown key", "did you mean 'seed'"]),
        ({"study": {"models": {"a": {"model": "./none"}}}}, ["study.models.a.model: './none'", "allowed"]),
        (
            {"study": {"models": {"a": {"model": "demo-trained", "demo_model": {"d_model": 6}}}}},
            ["study.models.a.demo_model.d_model: 6", "multiple of n_heads, 4"],
        ),
        ({"study": {"models": {"a": {"ablation": {"tasks": []}}}}}, ["study.models.a.ablation.tasks", "ioi"]),
        ({"study": {"models": {"a": None}, "tasks": ["facts"]}}, ["study.tasks: facts", "ioi"]),
        ({"study": {"models": {"a": None}}, "compare": ["a.yaml"]}, ["compare: with study", "of its members"]),
        ({"study": {"models": {"a": None}, "methods": ["meen"]}}, ["study.methods[0]", "did you mean 'mean'"]),
        ({"study": {"models": {"a": None}, "budgets": [4, 4]}}, ["study.budgets: 4, 4", "repeats"]),
        (
            {"study": {"models": {"a": None}}, "tasks": {"ioi": None, "text": None}},
            ["study.methods: 'attribution'", "text has no wrong answers"],
        ),
        ({"removal": {"forget": "ioi"}}, ["removal.retain", "missing"]),
        ({"removal": {"forget": "fact", "retain": "ioi"}}, ["removal.forget", "fact", "ioi"]),
        ({"removal": {"forget": {"ioi": "("}, "retain": "ioi"}}, ["removal", "'('", "no regular expression"]),
        ({"removal": {"forget": [], "retain": "ioi"}}, ["removal.forget: nothing", "one task"]),
        ({"removal": {"forget": "ioi", "retain": "ioi", "ablations": ["resample"]}}, ["'resample'", "optimal"]),
        ({"removal": {"forget": "ioi", "retain": "ioi", "methods": ["ugz"]}}, ["'ugz'", "did you mean 'ugs'"]),
        ({"circuits": {"tasks": ["facts"]}}, ["circuits.tasks", "facts", "ioi"]),
        ({"circuits": {"methods": ["manual"]}}, ["'manual'", "GPT-2-small"]),
        ({"circuits": {"lambdas": [0.001, 0.001]}}, ["lambdas", "repeats"]),
        ({"circuits": {"lambdas": [-1]}}, ["circuits.lambdas[0]", "-1"]),
        ({"circuits": {"sizes": [0]}}, ["circuits.sizes[0]", "0"]),
        ({"circuits": {}, "ablation": {"methods": ["zero"]}}, ["'optimal'", "ablation.methods"]),
        ({"circuits": {}, "tasks": {"ioi": None, "facts": None}}, ["'eap'", "facts", "no wrong answers"]),
        (
            {"circuits": {"methods": ["ugs"], "objective": "logit_diff"}, "tasks": {"facts": None}},
            ["logit_diff", "facts"],
        ),
    ],
)
def test_circuits_that_make_no_sense_are_refused_with_the_reason(change, parts):
    with pytest.raises(UserError) as error:
        parse_config(CIRCUITS | change)
    for part in parts:
        assert part in str(error.value), str(error.value)


def test_an_empty_circuits_section_asks_for_the_defaults():
    assert parse_config(CIRCUITS).circuits is None and parse_config(CIRCUITS).circuit_tasks() == ()
    config = parse_config(CIRCUITS | {"circuits": None})
    assert config.circuits is not None and config.circuit_tasks() == ("ioi",)
    assert config.circuits.objective_of("eap") == "logit_diff" and config.circuits.objective_of("ugs") == "kl"


TRACED = {"model": "demo", "tasks": {"facts": None}}


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"tracing": {}, "tasks": {"ioi": None}}, ["tracing", "tasks.facts"]),
        ({"tracing": {"tasks": ["ioi"]}, "tasks": {"ioi": None}}, ["tracing.tasks: ioi has no subjects", "facts"]),
        ({"tracing": {"tasks": ["fact"]}}, ["tracing.tasks: fact", "did you mean 'facts'"]),
        ({"tracing": {"tasks": ["facts", "facts"]}}, ["tasks", "repeats"]),
        ({"tracing": {"windows": [1, 4]}}, ["tracing", "windows: 4", "odd"]),
        ({"tracing": {"windows": [3, 3]}}, ["windows", "repeats"]),
        ({"tracing": {"corruptions": ["gausian"]}}, ["tracing.corruptions[0]", "did you mean 'gaussian'"]),
        ({"tracing": {"noise_scales": [0]}}, ["tracing.noise_scales[0]", "0"]),
        ({"tracing": {"answer": "all"}}, ["tracing.answer", "'all'", "joint"]),
        ({"tracing": {"pictures": -1}}, ["pictures: -1"]),
        ({"tracing": {"fit": {"learning_rat": 1}}}, ["tracing.fit.learning_rat", "did you mean 'learning_rate'"]),
        ({"tracing": {"positions": []}}, ["tracing.positions"]),
    ],
)
def test_tracing_that_makes_no_sense_is_refused_with_the_reason(change, parts):
    with pytest.raises(UserError) as error:
        parse_config(TRACED | change)
    for part in parts:
        assert part in str(error.value)


def test_tracing_names_what_it_makes():
    assert parse_config(TRACED).tracing is None
    tracing = parse_config(TRACED | {"tracing": None}).tracing
    assert tracing.fitted and tracing.corruption_names()[:5] == (
        "oat",
        "oat_cautious",
        "oat_shared",
        "gaussian-1",
        "gaussian-3",
    )
    assert tracing.figures() == ("aie_attention", "aie_mlp", "noise_scales", "fact_0", "fact_1", "fact_2")
    settings = {
        "corruptions": ["gaussian", "mean"],
        "noise_scales": [0.5],
        "pictures": ["Oslo", "Paris"],
        "sites": ["block"],
    }
    tracing = parse_config(TRACED | {"tracing": settings}).tracing
    assert not tracing.fitted and tracing.corruption_names() == ("gaussian-0.5", "mean")
    assert tracing.figures() == ("aie_block", "fact_0", "fact_1")


LENSED = {"model": "demo", "tasks": {"ioi": None, "text": None}}


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"lenses": {"lenses": ["linear_oca"]}}, ["lenses", "list oca too"]),
        ({"lenses": {"lenses": ["tunned"]}}, ["lenses.lenses[0]", "did you mean 'tuned'"]),
        (
            {"lenses": {"faithfulness": {"lenses": ["oca_shared"]}}},
            ["faithfulness.lenses: oca_shared", "lenses.lenses"],
        ),
        ({"lenses": {"tasks": ["facts"]}}, ["lenses.tasks: facts", "ioi, text"]),
        ({"lenses": {"tasks": ["ioi"], "lengths": [5]}}, ["lenses.lengths", "text"]),
        ({"lenses": {"init": ["identity", "identity"]}}, ["init", "repeats"]),
        ({"lenses": {"truthfulness": {"template": "{text}: {label}."}}}, ["template", "ends in {label}"]),
        (
            {"model": "gpt2", "tasks": {"ioi": None}, "lenses": {"truthfulness": None}},
            ["lenses.truthfulness.datasets: missing"],
        ),
        (
            {"lenses": {"truthfulness": {"datasets": ["no-such.csv"]}}},
            ["lenses.truthfulness.datasets", "does not exist"],
        ),
        ({"ablation": {"tasks": ["facts"]}}, ["ablation.tasks: facts", "ioi, text"]),
    ],
)
def test_lenses_that_make_no_sense_are_refused_with_the_reason(change, parts):
    with pytest.raises(UserError) as error:
        parse_config(LENSED | change)
    for part in parts:
        assert part in str(error.value)


def test_lenses_name_what_they_make():
    assert parse_config(LENSED).lens_tasks() == ()
    config = parse_config(LENSED | {"lenses": None})
    assert (
        config.lens_tasks() == ("text",)
        and config.lenses.tables() == ("loss",)
        and config.lenses.figures() == ("loss", "agreement")
    )
    assert config.lenses.files() == (
        "oca",
        "linear_oca",
        "tuned-identity",
        "tuned-random",
        "logit",
        "mean",
        "resample",
        "grad",
    )
    assert config.lenses.fitted_files() == ("oca", "linear_oca", "tuned-identity", "tuned-random", "grad")
    assert parse_config({"model": "demo", "tasks": {"ioi": None}, "lenses": None}).lens_tasks() == ("ioi",)
    every = parse_config(LENSED | {"lenses": {"lengths": [5], "faithfulness": None, "truthfulness": None}}).lenses
    assert every.tables() == ("loss", "lengths", "faithfulness", "truthfulness")
    assert every.figures() == ("loss", "agreement", "lengths", "similarity", "correlation", "truthfulness")


TINY = yaml.safe_load((Path(__file__).parents[1] / "configs/tiny.yaml").read_text())


def paths_in(values, path=()):
    """Paths of all keys of a parsed YAML tree."""
    for key, value in values.items():
        yield (*path, key)
        if isinstance(value, dict):
            yield from paths_in(value, (*path, key))


def changed(path, replace):
    """The tiny config with the item at the path replaced: `replace(its mapping, its key)`."""
    values = copy.deepcopy(TINY)
    section = values
    for key in path[:-1]:
        section = section[key]
    replace(section, path[-1])
    return values


@pytest.mark.parametrize("path", paths_in(TINY), ids=".".join)
def test_every_misspelled_key_is_refused(path):
    def misspell(section, key):
        section[f"{key}x"] = section.pop(key)

    with pytest.raises(UserError) as info:
        parse_config(changed(path, misspell))
    assert ".".join(path) + "x: unknown key" in str(info.value) and f"did you mean '{path[-1]}'" in str(info.value)


# A key that takes what the others refuse.
TAKES = {"run": (-3,), "model": ("none of these",), "tracing.pictures": (["none of these"],)}
TAKES |= {f"removal.{role}.facts": ("none of these",) for role in ROLES}  # a pattern that the prompts refuse


@pytest.mark.parametrize("path", paths_in(TINY), ids=".".join)
def test_every_wrong_value_is_refused_with_its_key(path):
    """Values of other types, and numbers far from any that makes sense."""
    name = ".".join(path)
    for wrong in ([[]], {"a": {}}, "none of these", -3, float("nan"), [-3], ["none of these"]):
        if wrong in TAKES.get(name, ()) or (name == "run" and isinstance(wrong, float)):
            continue
        with pytest.raises(UserError) as info:
            parse_config(changed(path, lambda section, key, wrong=wrong: section.__setitem__(key, wrong)))
        assert name in str(info.value), f"{name}: {wrong!r}: {info.value}"


def is_part(less, more):
    """Fewer keys and shorter lists, and the same numbers."""
    if isinstance(less, dict):
        return all(key in more and is_part(value, more[key]) for key, value in less.items())
    return set(less) <= set(more) if isinstance(less, list) else less == more


def test_what_the_demo_computes_is_part_of_the_full_demo():
    """So that the full one finds it in the store, and README's numbers hold for both."""
    demo, full = (load_config(ROOT / f"config/{name}.yaml") for name in ("demo", "demo-full"))
    asked = demo.model_dump(mode="json", exclude_unset=True) | {"run": full.run}
    assert is_part(asked, full.model_dump(mode="json"))
    assert not is_part(
        full.model_dump(mode="json", exclude_unset=True) | {"run": demo.run}, demo.model_dump(mode="json")
    )


@pytest.mark.parametrize("missing", ["sklearn", "captum"])
def test_vision_without_its_packages_is_one_error(missing, monkeypatch):
    """The others do not need them."""
    monkeypatch.setattr(
        "oacore.config.read.find_spec", lambda name: None if name == missing else importlib.util.find_spec(name)
    )
    found = message(GOOD | {"vision": None})
    assert re.fullmatch(
        r"vision: (scikit-learn|captum) can't be imported; allowed: .*pip install 'oacore\[vision\]'`", found
    )
    assert parse_config(GOOD).vision is None


def test_members_of_a_study_are_the_file_with_their_own_values():
    base = {
        "run": "s",
        "model": "demo-trained",
        "demo_model": {"n_steps": 9, "batch_size": 4},
        "tasks": {"ioi": {"n_test": 30}},
        "circuits": None,
    }
    models = {
        "a": {"demo_model": {"n_layers": 2, "n_steps": 5}, "tasks": {"ioi": {"n_train": 40}}},
        "b": {"model": "demo", "seed": 3, "circuits": {"lambdas": [0.1]}},
        "c": None,
    }
    members = parse_config(base | {"study": {"models": models}}).members()
    alone = {
        "a": {"demo_model": {"n_layers": 2, "n_steps": 5, "batch_size": 4}}
        | {"tasks": {"ioi": {"n_train": 40, "n_test": 30}}},
        "b": {"model": "demo", "seed": 3, "circuits": {"lambdas": [0.1]}},
        "c": {},
    }
    for name, values in alone.items():
        expected = base | values | {"run": f"s-{name}"}
        if name == "b":
            del expected["demo_model"]  # which says how another model is trained
        assert members[name] == parse_config(expected) and members[name].study is None
    assert parse_config(base).members() == {}


def test_a_dumped_study_is_the_same_study():
    config = parse_config(GOOD | {"study": {"models": {"a": {"seed": 1}, 3: None}}})
    assert parse_config(config.model_dump(mode="json")) == config and list(config.members()) == ["a", "3"]
