"""`verify` on runs whose numbers are known: what it takes from their tables, its verdicts, what it records."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from oacore.__main__ import main
from oacore.config.model import SHIPPED_DEMO
from oacore.config.read import load_config
from oacore.store.artefacts import read_table, write_table
from oacore.store.provenance import Provenance
from oacore.verify import compare, expected_file, numbers, recorded

SETTINGS = {
    "run": "fake",
    "model": "demo",
    "tasks": {"ioi": {}, "facts": {}, "text": {}},
    "ablation": {"tasks": ["ioi"]},
    "circuits": {"tasks": ["ioi"], "methods": ["ugs", "random"], "ablations": ["counterfactual"]},
    "tracing": {"windows": [3, 1]},
    "lenses": None,
}


def rows(columns, *values):
    return pd.DataFrame(values, columns=columns.split())


TABLES = {
    "ioi/ablation/gaps.csv": rows(
        "component method gap_nats",
        *(("a0.h0", "zero", 1.0), ("a0.h1", "zero", 2.0), ("m0", "zero", 3.0), ("m1", "zero", 10.0)),
        *(("a0.h0", "optimal", 2e-8), ("a0.h1", "optimal", 4e-8), ("m0", "optimal", 6e-8), ("m1", "optimal", 0.5)),
    ),
    "ioi/ablation/summary.csv": rows(
        "method spearman_with_counterfactual median_ratio_optimal_to_method median_ratio_optimal_positional_to_method",
        ("zero", 0.8, 0.4, 0.3),
        ("optimal", 0.9, 1.0, float("nan")),
    ),
    "ioi/circuits/pareto.csv": rows(
        "method ablation seed edges kl_nats validation_kl_nats",
        ("ugs", "counterfactual", 0, 20, 0.5, 0.4),
        ("ugs", "counterfactual", 0, 50, 0.05, 0.2),  # lucky on the test prompts
        ("ugs", "counterfactual", 1, 50, 0.1, 0.1),
        ("ugs", "counterfactual", 0, 90, 0.3, 0.3),
        ("ugs", "counterfactual", 0, 200, 0.01, 0.01),
        ("random", "counterfactual", 0, 61, 4.0, 4.0),
    ),
    "ioi/circuits/fronts.csv": rows(
        "ablation method other ratio",
        ("counterfactual", "ugs", "random", 0.02),
        ("counterfactual", "random", "ugs", 50.0),
    ),
    "facts/tracing/aie.csv": rows(
        "corruption site position window layer aie",
        ("oat", "mlp", "last", 1, 0, 0.1),
        ("oat", "mlp", "last_subject", 1, 1, 0.3),
        ("oat", "mlp", "last", 3, 2, 0.9),
        ("mean", "mlp", "last", 1, 0, -0.1),
        ("mean", "mlp", "last", 1, 1, -0.2),
        ("oat", "attention", "last", 1, 2, 0.2),
    ),
    "text/lens/loss.csv": rows(
        "lens init layer kl_nats",
        *(("oca", None, 0, 1.0), ("oca", None, 1, 0.5), ("tuned", "identity", 0, 3.0), ("tuned", "random", 0, 4.0)),
    ),
}

GAPS, SUMMARY, PARETO, FRONTS, AIE, LOSS = TABLES
RATIO = "median_ratio_optimal{}_to_method"
BY_HAND = {
    (GAPS, "method=zero, median", "gap_nats"): 2.5,
    (GAPS, "method=optimal, median", "gap_nats"): 5e-8,
    (SUMMARY, "method=zero", "spearman_with_counterfactual"): 0.8,
    (SUMMARY, "method=optimal", "spearman_with_counterfactual"): 0.9,
    (SUMMARY, "method=zero", RATIO.format("")): 0.4,
    (SUMMARY, "method=optimal", RATIO.format("")): 1.0,
    (SUMMARY, "method=zero", RATIO.format("_positional")): 0.3,
    (PARETO, "ablation=counterfactual, method=ugs, edges <= 35, smallest validation_kl_nats", "kl_nats"): 0.5,
    (PARETO, "ablation=counterfactual, method=ugs, edges <= 60, smallest validation_kl_nats", "kl_nats"): 0.1,
    (PARETO, "ablation=counterfactual, method=ugs, edges <= 100, smallest validation_kl_nats", "kl_nats"): 0.1,
    (PARETO, "ablation=counterfactual, method=random, edges <= 100, smallest validation_kl_nats", "kl_nats"): 4.0,
    (FRONTS, "ablation=counterfactual, method=ugs, other=random", "ratio"): 0.02,
    (FRONTS, "ablation=counterfactual, method=random, other=ugs", "ratio"): 50.0,
    (AIE, "corruption=oat, site=mlp, window == 1, largest aie", "aie"): 0.3,
    (AIE, "corruption=oat, site=mlp, window == 1, largest aie", "layer"): 1,
    (AIE, "corruption=mean, site=mlp, window == 1, largest aie", "aie"): -0.1,
    (AIE, "corruption=mean, site=mlp, window == 1, largest aie", "layer"): 0,
    (AIE, "corruption=oat, site=attention, window == 1, largest aie", "aie"): 0.2,
    (AIE, "corruption=oat, site=attention, window == 1, largest aie", "layer"): 2,
    (LOSS, "lens=oca, mean", "kl_nats"): 0.75,
    (LOSS, "lens=tuned, init=identity, mean", "kl_nats"): 3.0,
    (LOSS, "lens=tuned, init=random, mean", "kl_nats"): 4.0,
} | {
    ("training.json", "held out", name): value
    for name, value in json.loads((SHIPPED_DEMO / "training.json").read_text())["held_out"].items()
}


class Place:
    """A config with the folders of its runs."""

    def __init__(self, root):
        self.root, self.file = root, root / "fake.yaml"
        self.file.write_text(yaml.safe_dump(SETTINGS | {"results_dir": str(root / "results")}))
        self.config = load_config(self.file)

    def run(self, name="fake", changed=lambda file, table: table):
        """The folder of a run, its tables changed."""
        for file, table in TABLES.items():
            path = self.root / "results" / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            write_table(path, changed(file, table.copy()), Provenance())
        return self.root / "results" / name

    def record(self, *folders):
        assert main(["verify", str(self.file), "--record", *map(str, folders)]) == 0
        return pd.read_csv(expected_file(self.file)).set_index(["table", "selection", "column"])


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path)


def with_value(file, row, column, value):
    """Change one cell of one table."""

    def changed(name, table):
        if name == file:
            table[column] = table[column].astype(float)
            table.loc[row, column] = value
        return table

    return changed


def test_numbers_are_those_counted_by_hand(place):
    found = numbers(place.config, place.run()).set_index(["table", "selection", "column"])["value"]
    assert found.to_dict() == pytest.approx(BY_HAND) and found.index.is_unique


def test_the_expected_numbers_lie_beside_the_config():
    assert expected_file("config/demo.yaml") == Path("config/demo.expected.csv")


def test_a_run_agrees_with_itself(place, capsys):
    table = place.record(place.run())
    assert main(["verify", str(place.file)]) == 0
    *lines, counts = capsys.readouterr().out.splitlines()
    n = len(BY_HAND)
    assert counts.endswith(f"fake.expected.csv: {n} numbers, {n} same, 0 in range, 0 differs, 0 missing")
    header, *shown = lines[-n - 1 :]
    assert header.split() == ["number", "expected", "found", "verdict"] and len(shown) == n
    (line,) = (line for line in shown if line.startswith(f"{PARETO}: ") and "method=random" in line)
    assert line.split("kl_nats ")[1].split() == ["4", "(3.996", "to", "4.004)", "4", "same"]
    table.iloc[3:].to_csv(expected_file(place.file))  # of a config with fewer methods
    assert main(["verify", str(place.file)]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.endswith(f"{n - 3} same, 0 in range, 0 differs, 0 missing; 3 more are not expected")


@pytest.mark.parametrize(
    ("row", "column", "file", "value", "verdict"),
    [
        (0, "kl_nats", PARETO, 0.5004, "same"),  # within 1e-3
        (0, "kl_nats", PARETO, 0.502, "differs"),
        (3, "gap_nats", GAPS, 11.0, "same"),  # the median is another row's
        (1, "gap_nats", GAPS, 2.1, "differs"),
        (5, "gap_nats", GAPS, 1e-7, "same"),  # nearly 0: rounding
        (5, "gap_nats", GAPS, 1e-6, "differs"),
        (1, "layer", AIE, 2, "differs"),
        (1, "aie", AIE, float("nan"), "differs"),  # the next largest
        (0, "spearman_with_counterfactual", SUMMARY, float("nan"), "missing"),
    ],
)
def test_a_number_that_all_runs_agree_on_is_held_to_its_digits(place, capsys, row, column, file, value, verdict):
    place.record(place.run("a"), place.run("b"))
    place.run(changed=with_value(file, row, column, value))
    capsys.readouterr()
    assert main(["verify", str(place.file)]) == (0 if verdict == "same" else 1)
    *lines, counts = capsys.readouterr().out.splitlines()
    worst = {line.split()[-1] for line in lines[1:]} - {"same"}
    assert worst == {verdict} - {"same"} and "0 in range" in counts


def test_what_rounding_changes_is_held_to_a_range(place, capsys):
    """Three machines end in other circuits: .5, .6 and .45 nats. The range is widened by .15 on both sides."""
    runs = [
        place.run(name, with_value(PARETO, 0, "kl_nats", kl)) for name, kl in zip("abc", (0.5, 0.6, 0.45), strict=True)
    ]
    table = place.record(*runs)
    key = (PARETO, "ablation=counterfactual, method=ugs, edges <= 35, smallest validation_kl_nats", "kl_nats")
    assert table.loc[key].tolist() == pytest.approx([0.5, 0.3, 0.75])
    other = (PARETO, "ablation=counterfactual, method=random, edges <= 100, smallest validation_kl_nats", "kl_nats")
    assert table.loc[other].tolist() == pytest.approx([4, 4 * 0.999, 4 * 1.001], rel=1e-6)
    n = len(BY_HAND)
    for kl, status, counts in (
        (0.5002, 0, f"{n} same, 0 in range, 0 differs"),
        (0.31, 0, f"{n - 1} same, 1 in range, 0 differs"),
        (0.74, 0, f"{n - 1} same, 1 in range, 0 differs"),
        (0.76, 1, f"{n - 1} same, 0 in range, 1 differs"),
        (0.29, 1, f"{n - 1} same, 0 in range, 1 differs"),
    ):
        place.run(changed=with_value(PARETO, 0, "kl_nats", kl))
        assert main(["verify", str(place.file)]) == status, kl
        assert counts in capsys.readouterr().out.splitlines()[-1], kl


def test_machines_that_round_differently_agree(place):
    """All numbers of all tables change in their sixth digit: the tolerance holds them, none becomes a range."""
    rng = np.random.default_rng(0)

    def rounded(file, table):
        for column in table.select_dtypes(float):
            table[column] *= 1 + 1e-6 * rng.standard_normal(len(table))
        return table

    runs = [numbers(place.config, place.run(name, rounded)) for name in "abcd"]
    assert not runs[0]["value"].equals(runs[1]["value"])
    expected = recorded(runs[:3])
    assert len(expected) == len(BY_HAND)
    size = expected["expected"].abs()
    assert ((expected["high"] - expected["low"]) / 2 <= 1e-3 * size + 1e-4 + 1e-12).all()
    assert (compare(expected, runs[3])["verdict"] == "same").all()


def test_a_number_that_not_all_runs_have_is_left_out(place, capsys):
    """A machine without any circuit within 35 edges."""
    table = place.record(place.run("a"), place.run("b", with_value(PARETO, 0, "edges", 40)))
    assert not [key for key in table.index if "edges <= 35" in key[1]] and len(table) == len(BY_HAND) - 1
    assert "1 left out, which not all of them have" in capsys.readouterr().out


def refused(capsys, arguments):
    assert main(["verify", *map(str, arguments)]) == 2
    return capsys.readouterr().err


def test_what_is_not_there_is_named(place, capsys):
    folder = place.run()
    assert f"{expected_file(place.file)}: missing; allowed: a file that `verify --record" in refused(
        capsys, [place.file]
    )
    place.record(folder)
    (folder / AIE).unlink()
    message = refused(capsys, [place.file])
    assert f"{folder / AIE}: missing; allowed: the folder of a run of this config that has finished" in message
    assert message == refused(capsys, [place.file, "--record", folder])
    write_table(folder / AIE, TABLES[AIE].drop(columns="aie"), Provenance())
    assert f"{folder / AIE}: no column aie; found: corruption, site, position" in refused(capsys, [place.file])
    path = expected_file(place.file)
    path.write_text(path.read_text().replace("expected", "wanted", 1))
    write_table(folder / AIE, TABLES[AIE], Provenance())
    assert f"{path}: no column expected; allowed: table, selection" in refused(capsys, [place.file])
    path.write_text("")
    assert f"{path}: can't be read as CSV" in refused(capsys, [place.file])


def test_an_edited_table_is_refused(place, capsys):
    folder = place.run()
    place.record(folder)
    assert len(read_table(folder / GAPS)) == 8
    (folder / GAPS).write_text((folder / GAPS).read_text().replace("10.0", "9.0"))
    assert f"{folder / GAPS}: damaged or edited" in refused(capsys, [place.file])
