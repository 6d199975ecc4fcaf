"""Damage to any file between stages, and files of another model, are refused by name: never a silently different
number.
"""

import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from oacore.circuits import circuit, mib_file
from oacore.config.model import DEMO_TRAINED, SHIPPED_DEMO
from oacore.errors import UserError
from oacore.fits.resume import Resumable
from oacore.inputs import model_source
from oacore.runner import run_stage
from oacore.store.artefacts import (
    read_json,
    read_svg,
    read_table,
    read_tensors,
    write_json,
    write_svg,
    write_table,
    write_tensors,
)
from oacore.store.items import FOLDER
from oacore.store.layout import SPLITS, Layout, circuit_file
from oacore.store.provenance import Provenance
from oacore.store.reader import Reader
from oacore.store.writer import Writer
from oacore.tasks.stored import ARRAYS, read_prompts


@pytest.fixture(scope="module")
def run(tiny_run, tmp_path_factory):
    """(config, layout) of one copy of the tiny run that every test leaves as it found it; without items, which spare a
    stage the reading of what they were computed from.
    """
    config, layout = tiny_run
    root = tmp_path_factory.mktemp("copy")
    for folder in (*layout.cache_folders, layout.results_dir):
        place = root / Path(folder).relative_to(config.cache_dir)
        shutil.copytree(folder, place, ignore=shutil.ignore_patterns(FOLDER))
    (other := root / "other.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    config = config.model_copy(
        update={"cache_dir": root, "results_dir": root / "results", "run": "copy", "compare": (other,)}
    )
    Path(config.results_dir, "tiny").rename(Layout(config).results_dir)
    run_stage("comparison", config, other="tiny")
    shutil.copytree(SHIPPED_DEMO, Layout(config).demo_model)  # as a model that was trained there
    return config, Layout(config)


def read_everything(path):
    with Reader(path) as reader:
        return {name: reader[name][:] for name in reader.names}, reader.metadata


def read_all_splits(path):
    return [{name: getattr(read_prompts(path, split), name) for name in (*ARRAYS, "text", "meta")} for split in SPLITS]


def read_circuit(path):
    read = mib_file.load_circuit(path, signed=True)
    return read.mask, read.scores, read.facts, read.node_scores


def read_sealed(path):
    """The table that a seal belongs to."""
    return read_table(path.with_name(path.name.removeprefix(".").removesuffix(".seal")))


def read_demo(config, layout, path):
    model_source(config.model_copy(update={"model": DEMO_TRAINED}), Path(layout.model_json))
    return Path(path).read_bytes()


# A file of each type, by its path under the run's folders, and what reads it.
READERS = {
    "prompts.h5": (lambda layout: layout.prompts("facts"), read_all_splits),
    "activations.h5": (lambda layout: layout.activations("ioi"), read_everything),
    "model.json": (lambda layout: layout.model_json, read_json),
    "constants.safetensors": (lambda layout: layout.constants("ioi", "optimal"), read_tensors),
    "search.safetensors": (lambda layout: layout.circuits("ioi", "ugs-optimal/search.safetensors"), read_tensors),
    "circuit.json": (lambda layout: layout.circuits("ioi", f"eap-optimal/{circuit_file(40, 0)}"), read_circuit),
    "gaps.csv": (lambda layout: layout.ablation("ioi", "gaps.csv"), read_table),
    "seal": (lambda layout: layout.ablation("ioi", ".gaps.csv.seal"), read_sealed),
    "figure.svg": (lambda layout: layout.ablation("ioi", "gap_distributions.svg"), read_svg),
    "lens.safetensors": (lambda layout: layout.lens("text", "oca.safetensors"), read_tensors),
    "by-prompt.safetensors": (lambda layout: layout.lens("text", "loss-by-prompt.safetensors"), read_tensors),
    "demo/config.json": (lambda layout: f"{layout.demo_model}/config.json", "demo"),
    "demo/model.safetensors": (lambda layout: f"{layout.demo_model}/model.safetensors", "demo"),
    "demo/facts.csv": (lambda layout: f"{layout.demo_model}/facts.csv", "demo"),
    "checkpoint": (
        lambda layout: layout.ablation("ioi", ".a-checkpoint.safetensors"),
        lambda path: Resumable(path, "x").load(),
    ),
}


def same(a, b):
    """Whether two readings are equal, arrays bit by bit."""
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, pd.DataFrame):
        return a.equals(b)
    return a == b


@pytest.mark.parametrize("kind", READERS)
def test_damage_is_refused_or_changes_nothing(run, kind):
    """Any truncation, flipped bit or overwritten byte: an error that names the file, or the very same content."""
    config, layout = run
    where, read = READERS[kind]
    path = Path(where(layout))
    read = partial(read_demo, config, layout) if read == "demo" else read
    if kind == "checkpoint":
        Resumable(path, "x").save({"step": torch.tensor(3), "value": torch.randn(20, 4)})
    original, content = path.read_bytes(), read(path)
    refused = []

    @settings(max_examples=40, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(
        how=st.sampled_from(["flip", "flip", "flip", "truncate", "overwrite", "append"]),
        place=st.floats(0, 1),
        bit=st.integers(0, 7),
    )
    def damaged(how, place, bit):
        at = min(int(place * len(original)), len(original) - 1)
        changed = bytearray(original)
        match how:
            case "flip":
                changed[at] ^= 1 << bit
            case "truncate":
                changed = changed[:at]
            case "overwrite":
                changed[at : at + 64] = bytes(len(changed[at : at + 64]))
            case "append":
                changed += b"\0" * (at + 1)
        path.write_bytes(changed)
        try:
            found = read(path)
        except UserError as error:
            refused.append((how, str(error)))
        else:
            assert same(found, content), f"{how} at byte {at}, bit {bit}, went unseen"

    try:
        damaged()
        assert {"flip", "truncate"} <= {how for how, _ in refused}
        named = str(path.with_name("gaps.csv")) if kind == "seal" else str(path)
        assert all(str(path) in message or named in message for _, message in refused)
        path.unlink()
        with pytest.raises(UserError) if kind != "checkpoint" else pytest.raises(AssertionError):
            assert read(path) is not None
    finally:
        path.write_bytes(original)


# Every file that a stage reads, the stage, and what that is run for.
READ_BY = {
    "prompts": (lambda layout: layout.prompts("ioi"), "activations", {"task": "ioi"}),
    "facts": (lambda layout: layout.prompts("facts"), "tracing", {"task": "facts"}),
    "activations": (lambda layout: layout.activations("ioi"), "gaps", {"task": "ioi"}),
    "activations of circuits": (
        lambda layout: layout.activations("ioi"),
        "circuits",
        {"task": "ioi", "method": "random", "ablation": "optimal"},
    ),
    "activations of lenses": (lambda layout: layout.activations("text"), "lens_fit", {"task": "text", "lens": "oca"}),
    "constants": (lambda layout: layout.constants("ioi", "optimal"), "gaps", {"task": "ioi"}),
    "constants of circuits": (
        lambda layout: layout.constants("ioi", "optimal"),
        "circuits",
        {"task": "ioi", "method": "eap", "ablation": "optimal"},
    ),
    "curves": (lambda layout: layout.constants("ioi", "optimal_positional"), "figures", {"task": "ioi"}),
    "gaps": (lambda layout: layout.ablation("ioi", "gaps.csv"), "figures", {"task": "ioi"}),
    "summary": (lambda layout: layout.ablation("ioi", "summary.csv"), "report", {}),
    "figure": (lambda layout: layout.ablation("ioi", "convergence_curves.svg"), "report", {}),
    "pareto of a method": (
        lambda layout: layout.circuits("ioi", "ugs-optimal/pareto.csv"),
        "circuit_figures",
        {"task": "ioi"},
    ),
    "circuit": (
        lambda layout: layout.circuits("ioi", f"random-optimal/{circuit_file(40, 1)}"),
        "circuit_figures",
        {"task": "ioi"},
    ),
    "losses of a method": (
        lambda layout: layout.circuits("ioi", "hcgs-counterfactual/losses.safetensors"),
        "circuit_figures",
        {"task": "ioi"},
    ),
    "pareto": (lambda layout: layout.circuits("ioi", "pareto.csv"), "report", {}),
    "fronts": (lambda layout: layout.circuits("ioi", "fronts.csv"), "report", {}),
    "drawing": (lambda layout: layout.circuits("ioi", "figures/circuit_optimal.svg"), "report", {}),
    "ranking": (
        lambda layout: layout.interactions("ioi", "ranking.csv"),
        "interactions",
        {"task": "ioi", "ablation": "mean"},
    ),
    "effects of an ablation type": (
        lambda layout: layout.interactions("ioi", "optimal/effects.csv"),
        "interaction_figures",
        {"task": "ioi"},
    ),
    "interactions": (lambda layout: layout.interactions("ioi", "interactions.csv"), "report", {}),
    "paths drawn": (lambda layout: layout.interactions("ioi", "figures/paths_mean.svg"), "report", {}),
    "front of a method": (lambda layout: layout.removal("ugs-optimal/front.csv"), "removal_figures", {}),
    "facts forgotten": (
        lambda layout: layout.prompts("facts"),
        "removal",
        {"method": "gap", "ablation": "optimal"},
    ),
    "front of all": (lambda layout: layout.removal("front.csv"), "report", {}),
    "front drawn": (lambda layout: layout.removal("figures/front_optimal.svg"), "report", {}),
    "weights of the network": (
        lambda layout: layout.vision_model("weights.safetensors"),
        "vision",
        {"units": "blocks"},
    ),
    "importance of blocks": (lambda layout: layout.vision("blocks/importance.csv"), "vision_figures", {}),
    "agreement": (lambda layout: layout.vision("agreement.csv"), "report", {}),
    "importances drawn": (lambda layout: layout.vision("figures/importance_blocks.svg"), "report", {}),
    "tracing constants": (
        lambda layout: layout.tracing("facts", "constants.safetensors"),
        "tracing",
        {"task": "facts"},
    ),
    "aie": (lambda layout: layout.tracing("facts", "aie.csv"), "tracing_figures", {"task": "facts"}),
    "pictures": (lambda layout: layout.tracing("facts", "pictures.csv"), "tracing_figures", {"task": "facts"}),
    "facts.json": (lambda layout: layout.tracing("facts", "facts.json"), "report", {}),
    "lens": (lambda layout: layout.lens("text", "tuned-identity.safetensors"), "lens_evaluation", {"task": "text"}),
    "loss": (lambda layout: layout.lens("text", "loss.csv"), "lens_figures", {"task": "text"}),
    "lens figure": (lambda layout: layout.lens("text", "figures/prompt_0.svg"), "report", {}),
    "numbers of two runs": (lambda layout: f"{layout.results_dir}/compared-with-tiny.csv", "report", {}),
}
OTHER = "0" * 64


def of_other(facts):
    return Provenance(noted=facts | {"model_hash": OTHER})


def of_another_model(path):
    """Rewrite a file as a run of another model would have written it: intact, and wrong here."""
    match path.suffix:
        case ".h5":
            with Reader(path) as reader:
                arrays, facts = {name: reader[name][:] for name in reader.names}, dict(reader.metadata)
            ours = {key: value for key, value in facts.items() if not key.endswith("_version")}
            with Writer(path, of_other(ours)) as writer:
                for name, array in arrays.items():
                    writer.put(name, array)
        case ".safetensors":
            facts, tensors = read_tensors(path)
            write_tensors(path, tensors, of_other(facts))
        case ".json" if "circuits" in str(path):
            ours = mib_file.load_circuit(path)
            facts = ours.facts | {"model_hash": OTHER}
            mib_file.save_circuit(path, circuit.Circuit(**{**vars(ours), "facts": facts}))
        case ".json":
            write_json(path, read_json(path) | {"model_hash": OTHER})
        case ".csv":
            facts = json.loads(path.with_name(f".{path.name}.seal").read_text())
            ours = {key: value for key, value in facts.items() if key not in ("sha256", "table", "schema_version")}
            write_table(path, read_table(path, keep_default_na=False), of_other(ours))
        case ".svg":
            write_svg(path, read_svg(path), of_other({}))


def flip_bits(path):
    """One in the middle of each page: a stage may read a part of the file only."""
    content = bytearray(path.read_bytes())
    for page in range(0, len(content), 4096):
        content[(page + min(page + 4096, len(content))) // 2] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize("harm", [flip_bits, of_another_model], ids=lambda harm: harm.__name__)
@pytest.mark.parametrize("name", READ_BY)
def test_stages_refuse_bad_files(run, name, harm):
    """The stage that reads a file stops, names it, and says what is wrong."""
    config, layout = run
    where, stage, what = READ_BY[name]
    path = Path(where(layout))
    kept = {file: file.read_bytes() for file in (path, path.with_name(f".{path.name}.seal")) if file.exists()}
    try:
        harm(path)
        with pytest.raises(UserError) as info:
            run_stage(stage, config, **what)
        assert str(path) in str(info.value)
        if harm is of_another_model:
            assert "model_hash" in str(info.value) and OTHER in str(info.value)
    finally:
        for file, content in kept.items():
            file.write_bytes(content)


@pytest.mark.parametrize("place", [0.0, 0.001, 0.5, 1.0])
def test_damaged_weights_are_refused(run, place):
    config, layout = run
    path = Path(layout.weights)
    original = path.read_bytes()
    changed = bytearray(original)
    changed[round(place * (len(original) - 1))] ^= 1
    try:
        path.write_bytes(changed)
        with pytest.raises(UserError, match=f"{path}: damaged or edited"):
            run_stage("gaps", config, task="ioi")
        path.unlink()
        with pytest.raises(UserError, match=f"{path}: missing"):
            run_stage("gaps", config, task="ioi")
    finally:
        path.write_bytes(original)


def test_weights_other_than_the_gated_ones_are_refused(run):
    """Where they are not stored, but loaded anew."""
    config, layout = run
    config, path = config.model_copy(update={"store_weights": False}), Path(layout.model_json)
    original = path.read_bytes()
    try:
        of_another_model(path)
        with pytest.raises(UserError, match="weight hash"):
            run_stage("gaps", config, task="ioi")
    finally:
        path.write_bytes(original)
