"""What a change of a finished run costs: new items and nothing else, in every table to the bit what a run from nothing
gives. docs/cache.md has the table.
"""

import shutil
from collections import Counter
from pathlib import Path

import pytest
import yaml

from oacore import runner
from oacore.config.read import parse_config
from oacore.jobs import planned
from oacore.store.items import FOLDER, Items
from oacore.store.layout import Layout

PICTURES = ("tracing_figures", "lens_figures", "report")  # stages that write no tables
TINY = yaml.safe_load((Path(__file__).parents[1] / "configs/tiny.yaml").read_text())


def less():
    """The tiny run with fewer tasks, methods, ablation types, corruptions, sites and lenses, some in another order, and
    another name.
    """
    values = yaml.safe_load(yaml.safe_dump(TINY)) | {"run": "less"}
    values["ablation"] |= {"tasks": ["ioi"], "methods": ["gaussian", "mean", "counterfactual", "optimal"]}
    values["circuits"] |= {
        "methods": ["random", "acdc", "eap", "hcgs", "ugs"],
        "ablations": ["optimal"],
        "seeds": [1, 0],
    }
    values["tracing"] |= {"corruptions": ["oat", "mean", "gaussian"], "sites": ["mlp"], "windows": [3]}
    values["lenses"] |= {"lenses": ["logit", "tuned", "oca", "mean"], "init": ["identity"], "lengths": []}
    return values


def more():
    """That, with something new of every kind, and without experiments of which nothing is new."""
    values = less() | {"run": "more"}
    for section in ("interactions", "removal", "vision"):
        del values[section]
    values["ablation"]["components"] = ["mlp", "attention_layer", "head"]
    circuits = values["circuits"]
    circuits["lambdas"] = [1e-2, *circuits["lambdas"]]
    circuits["sizes"] = [0.3, *circuits["sizes"]]
    circuits["thresholds"] = [*circuits["thresholds"], 0.2]
    circuits["masks"]["record_every"] = 3
    values["tracing"] |= {"windows": [1, 5, 3], "noise_scales": [3, 2], "pictures": 3}
    values["lenses"] |= {"lenses": ["grad", *values["lenses"]["lenses"]], "grad_prompts": 3, "pictures": 2}
    values["lenses"]["faithfulness"] |= {"lenses": ["mean", "oca"], "layers": [3, 2]}
    return values


@pytest.fixture
def run(own_copy, monkeypatch):
    """Run a config where the tiny run lies finished: the layout, and what was new as a count by kind and, of its own,
    what the config says of it.
    """
    new = Counter()
    write = Items._write

    def counting(self, own, item, took):
        words = [str(value) for value in own.values() if isinstance(value, str | float) and len(str(value)) < 20]
        new[self.kind, self.shared.get("method", words[0] if words else "")] += 1
        return write(self, own, item, took)

    monkeypatch.setattr(Items, "_write", counting)
    monkeypatch.setattr(runner, "planned", lambda config: (job for job in planned(config) if job[0] not in PICTURES))

    def run(values, cache=own_copy.cache_dir):
        new.clear()
        places = {"cache_dir": str(cache), "results_dir": str(cache / "results")}
        config = parse_config(values | places)
        runner.run_missing(config)
        return Layout(config), dict(new)

    return run


def tables(layout):
    """Every file of a run by name, but for pictures, and for what says how long something took."""
    root = Path(layout.results_dir)
    timed = ("pareto.csv", ".pareto.csv.seal", ".lock", ".jobs.lock", "report.html")
    files = (path for path in root.rglob("*") if path.is_file() and path.suffix not in (".png", ".svg"))
    return {str(path.relative_to(root)): path.read_bytes() for path in files if path.name not in timed}


def test_less_of_a_run_or_another_name_for_it_computes_nothing(run, tiny_run):
    layout, new = run(less())
    # Of fewer places another constant is the best one for the corrupted run, and the two pictures under it are new.
    assert set(new) <= {("effects", "oat_shared")} and sum(new.values()) <= 2
    ours, theirs = tables(layout), tables(tiny_run[1])
    kept = ("text/lens/oca.safetensors", "text/lens/tuned-identity.safetensors", "ioi/circuits/ugs-optimal/0.1-s1.json")
    assert all(ours[name] == theirs[name] for name in kept)


def test_more_of_a_run_computes_what_is_new_and_gives_what_a_run_from_nothing_gives(run, own_copy, tmp_path):
    layout, new = run(more())
    # A lambda or threshold is a mask or walk for each of two seeds, and scores hold for every size.
    assert new["circuits", "ugs"] == new["circuits", "hcgs"] == new["circuits", "acdc"] == 2
    assert ("circuits", "eap") not in new and new["circuits", "random"] == 2
    assert new["constants", "optimal"] == 1 and new["gaps", "mean"] == new["gaps", "optimal"] == 1
    # Windows of 5 layers at three positions, and a third picture; the tiny run has windows of 1 and 3, and scale 3.
    assert new["place-constants", "mlp.last.5"] == new["lenses", "grad"] == 1
    assert new["effects", "mean"] == 3 and new["effects", "gaussian-2"] == 9
    assert new["lens-losses", "grad"] == 1 and new["faithfulness", "mean"] == 2 and new["faithfulness", "oca"] == 1
    fresh = tmp_path / "fresh"
    model_dir = Path(Layout(own_copy).model_dir)
    shutil.copytree(model_dir, fresh / model_dir.name, ignore=shutil.ignore_patterns(FOLDER))
    again, everything = run(more(), cache=fresh)
    assert sum(everything.values()) > 2 * sum(new.values())
    ours, theirs = tables(layout), tables(again)
    assert set(ours) == set(theirs)
    assert [name for name in ours if ours[name] != theirs[name]] == []


def test_other_test_prompts_cost_what_is_measured_on_them(run):
    values = less()
    for task in values["tasks"].values():
        task["n_test"] += 4
    _, new = run(values)
    assert {kind for kind, _ in new} == {"gaps", "losses", "effects", "removals", "lens-losses", "faithfulness"}
