"""Two finished runs side by side: the tiny run, and a copy of it in which something is known to differ."""

import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from oacore.__main__ import main
from oacore.compare.circuits import circuits_of_both
from oacore.compare.page import compare
from oacore.compare.runs import Runs
from oacore.compare.settings import settings_that_differ
from oacore.errors import UserError
from oacore.store.artefacts import read_table, read_tensors, write_table, write_tensors
from oacore.store.layout import Layout
from oacore.store.provenance import Provenance

INTERACTIONS = ("effects", "interactions")
UNEVEN = 0.02  # nats by which the gap grows more on every second prompt than on the others


@pytest.fixture(scope="module")
def runs(tiny_run, tmp_path_factory):
    """The tiny run, and its copy with another setting, a gap that is 0.5 nats larger, and one circuit's file in
    another's place.
    """
    first, results = tiny_run[0], tmp_path_factory.mktemp("copy")
    ablation = first.ablation.model_copy(
        update={"optimal": first.ablation.optimal.model_copy(update={"max_steps": 59})}
    )
    second = first.model_copy(update={"results_dir": results, "ablation": ablation})
    layout = Layout(second)
    shutil.copytree(tiny_run[1].results_dir, layout.results_dir)
    path = layout.ablation("ioi", "gaps.csv")
    gaps = read_table(path)
    chosen = (gaps["component"] == "a1.h2") & (gaps["method"] == "mean")
    gaps.loc[chosen, "gap_nats"] += 0.5
    write_table(path, gaps, Provenance())
    facts, tensors = read_tensors(by_prompt := layout.ablation("ioi", "gaps-by-prompt.safetensors"))
    tensors["gap_nats"][int(np.flatnonzero(chosen)[0])] += 0.5 + UNEVEN * torch.arange(48).remainder(2).sub(0.5)
    write_tensors(by_prompt, tensors, Provenance({}, facts))
    shutil.copy(layout.circuits("ioi", "eap-optimal/40-s0.json"), layout.circuits("ioi", "eap-optimal/0.2-s0.json"))
    return first, second


@pytest.fixture(scope="module")
def page(runs):
    return compare(*runs)


def test_settings_that_differ(runs):
    found = settings_that_differ(*runs)
    assert found.to_dict("records") == [{"key": "ablation.optimal.max_steps", "first": "60", "second": "59"}]


def test_a_section_that_one_run_lacks_is_one_row(tiny_run):
    first = tiny_run[0]
    found = settings_that_differ(first, first.model_copy(update={"circuits": None}))
    assert found.to_dict("records") == [{"key": "circuits", "first": "given", "second": "–"}]


def test_numbers_are_joined_with_their_difference(runs, page):
    assert page.name == "compared-with-tiny.html" and page.parent == Path(Layout(runs[1]).results_dir)
    numbers = pd.read_csv(page.with_suffix(".csv"))
    gaps, pareto = (
        pd.read_csv(f"{Layout(runs[0]).results_dir}/{name}")
        for name in ("ioi/ablation/gaps.csv", "ioi/circuits/pareto.csv")
    )
    assert (numbers["table"] == "ioi/ablation/gaps.csv").sum() == len(gaps)
    assert (numbers["table"] == "ioi/circuits/pareto.csv").sum() == len(pareto)
    others = (
        "facts/tracing/aie.csv",
        "removal/front.csv",
        "vision/importance.csv",
        "text/lens/loss.csv",
        *(f"ioi/interactions/{name}.csv" for name in INTERACTIONS),
    )
    assert set(others) < set(numbers["table"])
    changed = numbers[numbers["difference"] != 0]
    assert changed["row"].tolist() == ["a1.h2 mean"]
    row, own = changed.iloc[0], gaps[(gaps["component"] == "a1.h2") & (gaps["method"] == "mean")].iloc[0]
    assert row["second"] - row["first"] == pytest.approx(0.5) and row["first"] == own["gap_nats"]
    assert row["se"] == pytest.approx(UNEVEN / 2 / np.sqrt(48 - 1), rel=1e-4)
    assert row["in_se"] == pytest.approx(0.5 / row["se"])
    assert (numbers["paired"] == (numbers["table"] != "removal/front.csv")).all(), "of removal there are means alone"
    assert (numbers.loc[numbers["paired"] & (numbers["difference"] == 0), ["se", "in_se"]] == 0).all(axis=None)
    assert set(numbers.loc[numbers["table"] == "ioi/circuits/pareto.csv", "row"]) >= {
        "ugs optimal 0.1 1",
        "acdc optimal 0.05 0",
    }


def test_circuits_edge_by_edge(runs):
    found = list(circuits_of_both(Runs(*map(Layout, runs))))
    other = [edges for edges in found if edges.first != edges.second]
    assert [edges.circuit for edges in other] == ["ioi/eap-optimal/0.2-s0"]
    (edges,) = other
    assert edges.second < edges.first, "the best 40 edges are among the best 96"
    assert edges.jaccard == pytest.approx(len(edges.second) / len(edges.first))
    assert all(same.jaccard == 1 for same in found if same is not edges)


def test_the_page_says_what_differs(page):
    page = page.read_text()
    text = re.sub(r"<[^>]+>", " ", re.sub(r"<svg.*?</svg>", "", page, flags=re.S))
    assert "1 key differs." in text and "ablation.optimal.max_steps" in text.replace("\u200b", "").replace("_ ", "_")
    assert page.count("Fronts of both runs under") == 2 and "Edges that one of them alone has" in text
    assert "only" in text and "a1.h2 mean" in text


def test_command(runs, page, tmp_path, capsys, monkeypatch):
    asked = []
    monkeypatch.setattr("oacore.compare.page.compare", lambda *configs: asked.extend(configs) or page)
    files = []
    for number, config in enumerate(runs):
        files.append(tmp_path / f"{number}.yaml")
        files[-1].write_text(yaml.safe_dump(config.model_dump(mode="json")))
    assert main(["compare", *map(str, files)]) == 0
    assert capsys.readouterr().out == f"page: {page}\n" and [config.run for config in asked] == ["tiny", "tiny"]
    assert [config.ablation.optimal.max_steps for config in asked] == [60, 59]
    with pytest.raises(SystemExit):
        main(["compare", str(files[0])])
    assert "the following arguments are required: FILE" in capsys.readouterr().err


def test_a_run_with_itself_and_one_that_is_not_finished(runs, tmp_path):
    with pytest.raises(UserError, match=r"both runs; allowed: two runs"):
        compare(runs[0], runs[0])
    unfinished = runs[0].model_copy(update={"results_dir": tmp_path / "nowhere"})
    with pytest.raises(UserError, match=r"report\.html: missing; allowed: configs of finished runs"):
        compare(runs[0], unfinished)
