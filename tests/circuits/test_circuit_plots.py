"""Fronts, their figures, drawn circuits and the report's section on them, on fabricated tables with a known
structure.
"""

import re
import warnings
from collections import Counter
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.collections import LineCollection, PathCollection
from test_report import check

from oacore.circuits import drawing as circuit_drawing
from oacore.circuits import plots as circuit_plots
from oacore.circuits import report as circuit_report
from oacore.circuits.plots import compare_fronts, front, front_kl_at, front_table
from oacore.circuits.report import front_sentence
from oacore.config.circuits import CIRCUIT_METHODS, EDGE_ABLATIONS
from oacore.errors import UserError
from oacore.models.graph import Graph
from oacore.report import figures, numbers, parts
from oacore.report.page import render_page

SVG = "{http://www.w3.org/2000/svg}"
COLUMNS = ["method", "ablation", "objective", "knob", "seed", "edges", "nodes", "kl_nats", "se_nats", "logit_diff"]
WORSE = {"ugs": 1.0, "hcgs": 1.4, "eap": 4.0, "acdc": 2.0, "random": 30.0}  # times the loss of UGS at the same size


def circuits(rows):
    """A table from (method, ablation, edges, kl, se)."""
    full = [(m, a, "kl", 0.001 * i, 0, e, e // 3 + 1, kl, se, 1.5) for i, (m, a, e, kl, se) in enumerate(rows)]
    return pd.DataFrame(full, columns=COLUMNS).assign(fit_seconds=1.0, peak_mb=10.0)


def fabricate(methods=tuple(WORSE), ablations=("counterfactual", "optimal")):
    sizes = (10, 20, 50, 90, 200, 400)
    harm = dict.fromkeys(ablations, 8.0) | {"optimal": 1.0}
    rows = [
        (m, a, e, WORSE.get(m, 3.0) * harm[a] / e, 0.02 * WORSE.get(m, 3.0) * harm[a] / e)
        for m in methods
        for a in ablations
        for e in sizes
    ]
    return circuits(rows)


def stairs(ax):
    """The lines that have steps, by colour."""
    return {line.get_color(): line for line in ax.lines if line.get_drawstyle().startswith("steps")}


def markers(ax):
    return [c for c in ax.collections if isinstance(c, PathCollection)]


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def save_all(drawn, folder):
    return {name: figures.save(figure, folder / name)[0].read_text() for name, figure in drawn.items()}


# ---- Fronts ----------------------------------------------------------------------------------------------------------

POINTS = st.lists(st.tuples(st.integers(0, 6), st.integers(-2, 6).map(lambda kl: kl / 4)), min_size=1, max_size=14)


@settings(max_examples=150, deadline=None)
@given(POINTS, st.integers(-1, 7))
def test_front_is_what_no_other_circuit_dominates(points, size):
    table = circuits([("ugs", "optimal", edges, kl, 0.1) for edges, kl in points])
    best = front(table)
    undominated = {p for p in points if not any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in points)}
    found = list(zip(best["edges"], best["kl_nats"], strict=True))
    assert set(found) == undominated and len(found) == len(undominated)
    assert found == sorted(found)
    small = [kl for edges, kl in points if edges <= size]
    row = front_kl_at(table, size)
    assert (row is None) == (not small)
    if small:
        assert row["kl_nats"] == min(small) and row["edges"] == min(edges for edges, kl in points if kl == min(small))
    shuffled = table.sample(frac=1, random_state=1)
    pd.testing.assert_frame_equal(front(shuffled), best)


def test_front_leaves_out_what_was_not_measured():
    table = circuits([("ugs", "optimal", 5, np.nan, 0.1), ("ugs", "optimal", 9, 0.5, 0.1)])
    assert front(table)["edges"].tolist() == [9]
    assert front_kl_at(table, 5) is None


def test_front_table_has_the_best_of_each_size_and_its_ratio():
    table = front_table(fabricate(("ugs", "hcgs", "eap")), [20, 100])
    assert table["ablation"].drop_duplicates().tolist() == ["counterfactual", "optimal"]
    rows = table[(table["ablation"] == "optimal") & (table["max_edges"] == 100)].set_index("method")
    assert rows["edges"].tolist() == [90, 90, 90]
    np.testing.assert_allclose(rows["kl_nats"], [1 / 90, 1.4 / 90, 4 / 90])
    np.testing.assert_allclose(rows["ratio_to_best"], [1, 1.4, 4])


@pytest.mark.parametrize("kl", [0.0, 1e-8])
def test_front_table_without_a_small_circuit_or_a_best_above_the_floor(kl):
    table = front_table(circuits([("ugs", "optimal", 5, kl, 0.1), ("eap", "optimal", 40, 0.5, 0.1)]), [4, 10, 40])
    assert list(zip(table["max_edges"], table["method"], strict=True)) == [(10, "ugs"), (40, "ugs"), (40, "eap")]
    assert table["ratio_to_best"].isna().all()


def test_losses_below_the_floor_are_equal_whatever_their_errors():
    rows = compare_fronts(
        circuits([("ugs", "optimal", 470, 2e-8, 2e-9), ("eap", "optimal", 470, 0.0, 0.0)]), "optimal", "ugs"
    )
    assert rows["verdict"].tolist() == ["equal"]


@pytest.mark.parametrize(
    ("points", "chosen"),
    [
        ([(40, 0.30), (60, 0.19), (90, 0.11), (300, 0.10)], 60),  # within twice the lowest
        ([(40, 0.30), (90, 2e-8), (479, 0.0)], 90),  # below the floor, losses are alike
        ([(40, 0.30), (470, -1.45e-8), (479, -1.4e-8)], 470),  # as a table of an older version may have them
        ([(1200, 0.1), (1100, 0.2)], 1100),  # all too large to draw
        ([(60, 0.2), (60, 0.1), (1100, 0.0)], 60),
    ],
)
def test_the_circuit_that_is_drawn(points, chosen):
    row = circuit_plots.smallest_good(circuits([("ugs", "optimal", edges, kl, 0.1) for edges, kl in points]), 1000)
    assert row["edges"] == chosen and row["kl_nats"] == min(kl for edges, kl in points if edges == chosen)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 40_000), min_size=1, max_size=8), st.lists(st.integers(0, 40_000), min_size=1, max_size=8)
)
def test_sizes_of_the_table_are_reached_and_few(first, second):
    rows = [(m, "optimal", e, 1 / (1 + e), 0.1) for m, sizes in (("ugs", first), ("eap", second)) for e in sizes]
    sizes = circuit_plots.front_sizes(circuits(rows))
    assert 1 <= len(sizes) <= 5 and sizes == sorted(set(sizes))
    assert max(min(first), min(second)) <= sizes[0] and sizes[-1] <= max(1, *first, *second)


POSITIVE = st.lists(st.tuples(st.integers(1, 8), st.integers(1, 9)), min_size=1, max_size=6)


@settings(max_examples=150, deadline=None)
@given(POSITIVE, POSITIVE)
def test_comparison_at_the_others_steps_finds_every_place_where_a_front_is_above(own, other):
    rows = [("ugs", "optimal", e, kl, 0.0) for e, kl in own] + [("eap", "optimal", e, kl, 0.0) for e, kl in other]
    verdicts = compare_fronts(circuits(rows), "optimal", "ugs")["verdict"]

    def lowest(points, size):
        return min((kl for e, kl in points if e <= size), default=np.inf)

    everywhere = [(lowest(own, size), lowest(other, size)) for size in range(10)]
    assert verdicts.isin(["above", "none"]).any() == any(ours > theirs for ours, theirs in everywhere)


@pytest.mark.parametrize(
    ("own", "other", "verdict"),
    [
        ((0.5, 0.03), (0.6, 0.03), "below"),
        ((0.5, 0.03), (0.58, 0.03), "equal"),
        ((0.6, 0.03), (0.5, 0.03), "above"),
        ((0.5, np.nan), (0.9, 0.1), "undecided"),
        ((0.5, 0.0), (0.5, 0.0), "equal"),
    ],
)
def test_verdicts_need_two_standard_errors_of_the_difference(own, other, verdict):
    table = circuits([("ugs", "optimal", 10, *own), ("eap", "optimal", 12, *other), ("eap", "optimal", 8, 2.0, 0.1)])
    rows = compare_fronts(table, "optimal", "ugs")
    assert rows["verdict"].tolist() == ["none", verdict]
    assert rows[["method", "edges", "own_edges"]].iloc[1].tolist() == ["eap", 12, 10]


def test_other_objectives_are_methods_of_their_own():
    table = fabricate(("ugs",), ("optimal",))
    table.loc[table["edges"] > 60, "objective"] = "logit_diff"
    named = circuit_plots.with_loss(table)
    assert sorted(set(named["method"])) == ["ugs", "ugs (logit_diff)"]
    pd.testing.assert_frame_equal(circuit_plots.with_loss(named), named)
    figure = circuit_plots.circuit_figures(table, 500)["pareto_optimal"]
    assert legend(figure) == ["ugs", "ugs (logit_diff)"]
    assert {line.get_linestyle() for line in figure.axes[0].lines if line.get_drawstyle().startswith("steps")} == {
        "-",
        "--",
    }


def test_bad_tables_are_refused_by_name():
    table = fabricate()
    with pytest.raises(ValueError, match="no column se_nats; found method"):
        circuit_plots.circuit_figures(table.drop(columns="se_nats"), 500)
    with pytest.raises(ValueError, match="no row with a value in kl_nats"):
        circuit_plots.circuit_figures(table.assign(kl_nats=np.nan), 500)
    with pytest.raises(ValueError, match="infinite kl_nats for a circuit of ugs"):
        circuit_plots.circuit_figures(table.assign(kl_nats=np.inf), 500)


# ---- Figures ---------------------------------------------------------------------------------------------------------


def test_figures_are_one_per_ablation_type_and_their_comparison():
    assert list(circuit_plots.circuit_figures(fabricate(), 500)) == [
        "pareto_optimal",
        "pareto_counterfactual",
        "ablation_types_ugs",
    ]
    assert list(circuit_plots.circuit_figures(fabricate(ablations=("optimal",)), 500)) == ["pareto_optimal"]
    assert "ablation_types_hcgs" in circuit_plots.circuit_figures(fabricate(("acdc", "hcgs")), 500)


def test_pareto_figure_draws_each_front_as_stairs_and_every_circuit():
    table = fabricate()
    table.loc[(table["method"] == "ugs") & (table["edges"] == 90), "kl_nats"] = 3.0  # dominated
    figure = circuit_plots.circuit_figures(table, 12_345)["pareto_optimal"]
    (ax,) = figure.axes
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")
    assert ax.get_xlabel() == "edges in the circuit, of 12,345" and "nats" in ax.get_ylabel()
    assert legend(figure) == ["ugs", "hcgs", "eap", "acdc", "random"]
    drawn = stairs(ax)
    assert len(drawn) == 4, "a line per method, none for random circuits"
    mine = drawn[CIRCUIT_METHODS["ugs"].look.color]
    assert mine.get_drawstyle() == "steps-post"
    best = front(table[(table["method"] == "ugs") & (table["ablation"] == "optimal")])
    assert len(best) == 5
    np.testing.assert_allclose(mine.get_xydata()[:-1], best[["edges", "kl_nats"]])
    assert sum(len(c.get_offsets()) for c in markers(ax)) == (table["ablation"] == "optimal").sum()
    faint = [c for c in markers(ax) if c.get_alpha() is not None and len(c.get_offsets())]
    assert [c.get_offsets().tolist() for c in faint] == [[[90, 3.0]]]


def test_bars_are_95_percent_intervals():
    (ax,) = circuit_plots.circuit_figures(circuits([("ugs", "optimal", 10, 0.5, 0.1)]), 20)["pareto_optimal"].axes
    (bar,) = (c for c in ax.collections if isinstance(c, LineCollection))
    np.testing.assert_allclose(bar.get_segments()[0], [[10, 0.5 - 0.196], [10, 0.5 + 0.196]])


def test_methods_differ_in_colour_and_in_shape():
    for looks in ({name: row.look for name, row in rows.items()} for rows in (CIRCUIT_METHODS, EDGE_ABLATIONS)):
        assert len({look.marker for look in looks.values()}) == len(looks)
    assert len({row.look.color for row in CIRCUIT_METHODS.values()}) == len(CIRCUIT_METHODS)


EDGE_CASES = {
    "one point": [("ugs", "optimal", 10, 0.5, 0.1)],
    "one method": [("eap", "zero", 10, 0.5, 0.1), ("eap", "zero", 20, 0.1, 0.1)],
    "empty circuit": [("ugs", "optimal", 0, 5.0, 0.1), ("ugs", "optimal", 20, 0.1, 0.01)],
    "only empty circuits": [("ugs", "optimal", 0, 5.0, 0.1), ("eap", "optimal", 0, 5.0, 0.1)],
    "KL 0": [("ugs", "optimal", 400, 0.0, 0.0), ("ugs", "optimal", 20, 0.1, 0.01)],
    "only KL 0": [("ugs", "optimal", 400, 0.0, 0.0)],
    "KL below 0": [("ugs", "optimal", 400, -1e-9, 1e-9), ("eap", "optimal", 30, 2.0, 0.1)],
    "no standard error": [("ugs", "optimal", 10, 0.5, np.nan), ("ugs", "optimal", 30, 0.1, np.nan)],
    "wide interval": [("ugs", "optimal", 10, 0.5, 5.0), ("ugs", "optimal", 30, 0.1, 0.01)],
    "random only": [("random", "optimal", 10, 0.5, 0.1)],
    "unknown method": [("new", "strange", 10, 0.5, 0.1)],
    "not measured": [("ugs", "optimal", 10, np.nan, np.nan), ("ugs", "mean", 10, 0.5, 0.1)],
}


@pytest.mark.parametrize("rows", EDGE_CASES.values(), ids=EDGE_CASES)
def test_any_table_gives_figures_and_a_section(rows, tmp_path):
    table = circuits(rows)
    figures = circuit_plots.circuit_figures(table, 479)
    for figure in figures.values():
        (ax,) = figure.axes
        x, y = np.concatenate([c.get_offsets() for c in markers(ax)]).T
        assert (
            (x >= ax.get_xlim()[0]) & (x <= ax.get_xlim()[1]) & (y >= ax.get_ylim()[0]) & (y <= ax.get_ylim()[1])
        ).all()
        assert ax.get_ylim()[0] > 0 and ax.get_ylim()[1] < 1e5 * ax.get_ylim()[0]
    svgs = save_all(figures, tmp_path)
    page = check(render_page("t", {}, [circuit_report.circuit_section("task", table, svgs)]))
    assert page.count["figure"] == len(figures) and "nan" not in page.text


def test_empty_circuits_stand_over_a_zero_and_vanishing_losses_at_the_bottom():
    table = circuits(
        [("ugs", "optimal", 0, 5.0, 0.1), ("ugs", "optimal", 20, 0.1, 0.01), ("ugs", "optimal", 90, 0.0, 0.0)]
    )
    figure = circuit_plots.circuit_figures(table, 479)["pareto_optimal"]
    (ax,) = figure.axes
    assert stairs(ax)[figures.ACCENT].get_xydata()[:-1].tolist() == [[10, 5.0], [20, 0.1], [90, 0.05]]
    labels = dict(zip(ax.get_xticks(), (label.get_text() for label in ax.get_xticklabels()), strict=True))
    assert labels[10] == "0" and labels[20] == "20"
    assert legend(figure)[-1] == "1 ≤ 0.000500 nats, drawn at the bottom"
    open_points = [c for c in markers(ax) if c.get_facecolor().tolist() == [[1, 1, 1, 1]]]
    assert [c.get_offsets().tolist() for c in open_points] == [[[90, 0.05]]]


def test_same_table_same_bytes_in_any_order_of_rows(tmp_path):
    table = fabricate()
    first = save_all(circuit_plots.circuit_figures(table, 500), tmp_path / "a")
    assert first == save_all(circuit_plots.circuit_figures(table.sample(frac=1, random_state=2), 500), tmp_path / "b")


# ---- Drawings --------------------------------------------------------------------------------------------------------

SMALL = Graph(4, 4, 4, parallel=False)
GROUPED = Graph(3, 4, 2, parallel=False)


def random_edges(graph, density=0.1, seed=0):
    rng = np.random.default_rng(seed)
    j, s = np.nonzero(graph.prune(graph.valid & (rng.random(graph.valid.shape) < density)))
    names = {"source": np.array(graph.source_names)[s], "destination": np.array(graph.destination_names)[j]}
    return pd.DataFrame(names | {"score": rng.normal(size=len(s))})


def groups(root, kind):
    return [g for g in root.iter(f"{SVG}g") if kind in g.get("class", "").split()]


def titles(root, kind):
    return [[title.text for title in g.iter(f"{SVG}title")] for g in groups(root, kind)]


@pytest.mark.parametrize("graph", [SMALL, GROUPED, Graph(1, 1, 1, parallel=True), Graph(12, 12, 12, parallel=False)])
def test_drawing_has_one_title_per_edge_and_degrees_of_nodes(graph):
    edges = random_edges(graph, 0.3 if graph.n_layers < 12 else 0.02)
    root = ElementTree.fromstring(circuit_drawing.circuit_svg(edges, graph, "t"))
    wanted = [f"{e.source}->{e.destination} score {numbers.three_digits(e.score)}" for e in edges.itertuples()]
    assert sorted(titles(root, "edge")) == sorted([text] for text in wanted)
    nodes = dict(text.split(": ") for (text,) in titles(root, "node"))
    out = Counter(edges["source"])
    assert {name for name in nodes if name != "logits"} == {"input", *out}
    for name, degrees in nodes.items():
        if name != "logits":
            assert degrees.endswith(f"{out[name]} out")
        if name != "input" and graph is not GROUPED:
            into = edges["destination"].str.partition("<")[0] == name
            assert degrees.startswith(f"{into.sum()} in")
    assert not [element for element in root.iter() if element.get("id")], "nothing that could clash on a page"


def test_colours_tell_what_an_edge_leads_into_and_widths_how_much_it_matters():
    names = ["a1.h2<q>", "a1.h2<k>", "a1.h2<v>", "m1", "logits"]
    edges = pd.DataFrame({"source": "a0.h1", "destination": names, "score": [0.1, -4.0, 1.0, 0.0, np.nan]})
    root = ElementTree.fromstring(circuit_drawing.circuit_svg(edges, SMALL, "t"))
    found = {}
    for group in groups(root, "edge"):
        line = next(path for path in group.iter(f"{SVG}path") if path.get("class") == "line")
        found[group.find(f"{SVG}title").text] = (line.get("stroke"), float(line.get("stroke-width")))
    (q, k, v, m, logits) = (
        found[f"a0.h1->{name}"]
        for name in [f"{n} score {s}" for n, s in zip(names[:4], ("0.100", "−4.00", "1.00", "0"), strict=True)]
        + ["logits"]
    )
    assert [c for c, _ in (q, k, v, m, logits)] == [color for _, color in circuit_drawing.READS.values()]
    assert len({c for c, _ in (q, k, v, m, logits)}) == 5
    assert k[1] > v[1] > q[1] > m[1] == logits[1] > 0


def test_shared_keys_branch_to_the_heads_that_are_in_the_circuit():
    rows = [
        ("input", "a1.h1<k>", 1.0),
        ("a1.h2", "logits", 1.0),
        ("a1.h3", "logits", 1.0),
        ("input", "a0.h0<v>", 1.0),
        ("a0.h1", "m2", 1.0),
    ]
    root = ElementTree.fromstring(
        circuit_drawing.circuit_svg(pd.DataFrame(rows, columns=["source", "destination", "score"]), GROUPED, "t")
    )
    lines = {g.find(f"{SVG}title").text: g.find(f"{SVG}path").get("d").count("M") for g in groups(root, "edge")}
    assert lines["input->a1.h1<k> score 1.00"] == 2 and lines["input->a0.h0<v> score 1.00"] == 1
    assert ["a1.h2: 1 in (1 key), 1 out"] in titles(root, "node") and ["a0.h1: 1 in (1 value), 1 out"] in titles(
        root, "node"
    )


def test_every_node_has_a_place_of_its_own_inside_the_picture():
    for graph in (SMALL, Graph(12, 12, 12, parallel=False), Graph(48, 25, 25, parallel=False)):
        edges = pd.DataFrame({"source": graph.source_names, "destination": "logits", "score": 1.0})
        root = ElementTree.fromstring(circuit_drawing.circuit_svg(edges, graph, "t"))
        boxes = np.array(
            [
                [float(g.find(f"{SVG}rect").get(key)) for key in ("x", "y", "width", "height")]
                for g in groups(root, "node")
            ]
        )
        left, top, right, bottom = boxes[:, 0], boxes[:, 1], boxes[:, 0] + boxes[:, 2], boxes[:, 1] + boxes[:, 3]
        assert len(boxes) == graph.n_sources + 1
        apart = (left[:, None] >= right) | (top[:, None] >= bottom)
        assert (apart | apart.T | np.eye(len(boxes), dtype=bool)).all()
        assert (
            min(left.min(), top.min()) > 0
            and right.max() < float(root.get("width")) <= 1200
            and bottom.max() < float(root.get("height"))
        )
        assert top[-1] == top.min() and top[0] == top.max(), "logits on top, input at the bottom"
        sources = dict(zip([*graph.source_names, "logits"], top, strict=True))
        assert sources["a0.h0"] > sources["m0"] > sources[f"a{graph.n_layers - 1}.h0"]


def test_drawing_does_not_depend_on_the_order_of_edges():
    edges = random_edges(SMALL).assign(score=1.0)
    first = circuit_drawing.circuit_svg(edges, SMALL, "t")
    assert first == circuit_drawing.circuit_svg(edges.sample(frac=1, random_state=3), SMALL, "t")
    assert first != circuit_drawing.circuit_svg(edges.iloc[1:], SMALL, "t")


def test_empty_circuit_says_so():
    text = circuit_drawing.circuit_svg(random_edges(SMALL).iloc[:0], SMALL, "t")
    words = [element.text for element in ElementTree.fromstring(text).iter(f"{SVG}text")]
    assert circuit_drawing.EMPTY in words and "0 edges out of 0 nodes" in words
    assert circuit_drawing.EMPTY not in circuit_drawing.circuit_svg(random_edges(SMALL), SMALL, "t")


def test_several_drawings_share_a_page_and_all_text_is_escaped():
    title = "<b>ugs & co</b>"
    drawings = {f"<i>{n}": circuit_drawing.circuit_svg(random_edges(SMALL, seed=n), SMALL, title) for n in range(2)}
    drawings["empty"] = circuit_drawing.circuit_svg(random_edges(SMALL).iloc[:0], SMALL, "")
    text = render_page("t", {}, [circuit_report.circuit_section("task", fabricate(), {}, drawings)])
    page = check(text)
    assert (
        page.count["svg"] == 3
        and page.count["b"] == len(re.findall("<b>(?:Figure|Table) ", text))
        and page.count["i"] == 0
    )
    assert title in page.text and "<i>0" in page.text
    drawn = re.findall(r'<svg[^>]* class="(c[0-9a-f]{10})"(.*?)</svg>', text, re.S)
    assert len({name for name, _ in drawn}) == 3
    for number, (name, inside) in enumerate(drawn):
        rules = re.search("<style>(.*?)</style>", inside, re.S)[1].split("}")[:-1]
        assert rules and all(re.match(rf"\s*#part-1-\d+ \.{name}[ :]", rule) for rule in rules), number


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (("a9.h0", "logits", 1.0), "source 'a9.h0' is not in this graph"),
        (("a0.h0", "a1.h0<z>", 1.0), "destination 'a1.h0<z>' is not in this graph"),
        (("m3", "a1.h0<q>", 1.0), "a1.h0<q> reads before m3 writes"),
        (("m3", "logits", np.inf), "edge m3->logits: score inf; allowed are finite numbers"),
        (("input", "m0", 1.0), "edge input->m0: twice"),
    ],
)
def test_bad_edges_are_user_errors(row, message):
    edges = pd.DataFrame([("input", "m0", 1.0), row], columns=["source", "destination", "score"])
    with pytest.raises(UserError, match=message):
        circuit_drawing.circuit_svg(edges, SMALL, "t")
    with pytest.raises(UserError, match="edges: no column score; found source, destination"):
        circuit_drawing.circuit_svg(edges.drop(columns="score"), SMALL, "t")


# ---- The section -----------------------------------------------------------------------------------------------------


def test_sentence_follows_the_data():
    table = fabricate()
    good = front_sentence(table, "optimal")
    assert good.startswith(
        "The front of ugs with optimal ablation is at or below every other method's (hcgs, eap, acdc, random): of the "
        "24"
    )
    assert "24 have a higher one." in good
    better = table["method"].isin(["eap"]) & (table["edges"] == 50)
    table.loc[better, "kl_nats"] = 0.001
    bad = front_sentence(table, "optimal")
    assert (
        "is not at or below every other method's: it is above, by more than two standard errors, at 1 of 3 front "
        "circuits of eap" in bad
    )
    assert "at 50 edges (0.0200 ± 0.0004 against 0.0010 ± 0.0016 nats)" in bad
    assert bad.endswith("it is at or below the front of hcgs, acdc, random.")
    table.loc[better, "se_nats"] = 0.01
    assert "is at or below every other method's" in front_sentence(table, "optimal"), "less than two standard errors"
    assert "is not at or below" in front_sentence(table, "optimal", "hcgs")


def test_sentence_names_what_it_leaves_out():
    one = circuits([("ugs", "optimal", 10, 0.5, 0.1)])
    assert front_sentence(one, "optimal") == "There is no front to compare that of ugs with optimal ablation with."
    other = ("acdc", "optimal", 5, 0.9, 0.1)
    text = front_sentence(circuits([("ugs", "optimal", 10, 0.5, 0.1), other]), "optimal")
    assert "cannot be compared with another; not compared: 1 front circuit of acdc, smaller than any of ugs." in text
    text = front_sentence(circuits([("ugs", "optimal", 4, 0.5, np.nan), other]), "optimal")
    assert "left open for want of a standard error: 1 front circuit of acdc." in text


def test_section_shows_figures_tables_drawings_and_stability(tmp_path):
    table = fabricate()
    svgs = save_all(circuit_plots.circuit_figures(table, 500), tmp_path)
    stability = pd.DataFrame([("ugs", "optimal", 1e-3, 5, 0.7, 0.6, 0.8)], columns=STABILITY)
    section = circuit_report.circuit_section(
        "ioi", table, svgs, {"A circuit.": circuit_drawing.circuit_svg(random_edges(SMALL), SMALL, "t")}, stability
    )
    page = check(
        render_page(
            "t", {}, [section, circuit_report.circuit_methods_section(tuple(WORSE), ("optimal", "counterfactual"))]
        )
    )
    assert page.count["figure"] == 4 and page.count["table"] == 4
    assert "60 circuits of 5 methods and 2 ablation types. The front of ugs with optimal" in section.intro
    assert "\n\nThe front of ugs with counterfactual" in section.intro
    for method in WORSE:
        assert CIRCUIT_METHODS[method].note in page.text
    fronts, _, chosen, jaccard = (part.frame for part in section.parts if isinstance(part, parts.Table))
    assert fronts["≤ 50 edges"].tolist()[0] == numbers.Estimate(1 / 50, 0.02 / 50)
    np.testing.assert_allclose(fronts["÷ best (median)"], list(WORSE.values()))
    row = chosen[(chosen["method"] == "hcgs") & (chosen["ablation"] == "counterfactual")].iloc[0]
    best = front_kl_at(table[(table["method"] == "hcgs") & (table["ablation"] == "counterfactual")], 50)
    assert row["KL (nats)"] == numbers.Estimate(best["kl_nats"], best["se_nats"])
    assert (row["edges"], row["nodes"], row["logit difference"]) == (best["edges"], best["nodes"], 1.5)
    assert jaccard["Jaccard index"].tolist() == [0.7] and jaccard["circuits"].tolist() == [5]


STABILITY = ["method", "ablation", "knob", "n_circuits", "jaccard", "jaccard_low", "jaccard_high"]


def test_every_method_and_ablation_type_has_a_note():
    assert all(row.note.endswith(".") for rows in (CIRCUIT_METHODS, EDGE_ABLATIONS) for row in rows.values())


def test_figure_without_a_caption_is_refused():
    with pytest.raises(ValueError, match="figures: paretooptimal; captions exist for pareto_"):
        circuit_report.circuit_section("t", fabricate(), {"paretooptimal": "<svg/>"})


def test_tables_read_back_from_csv_give_the_same_section(tmp_path):
    table = fabricate()
    table.to_csv(tmp_path / "pareto.csv", index=False)
    read = pd.read_csv(tmp_path / "pareto.csv")
    sections = [circuit_report.circuit_section("t", frame, {}) for frame in (table, read)]
    assert render_page("t", {}, sections[:1]) == render_page("t", {}, sections[1:])


def test_no_legend_runs_out_of_its_figure():
    """All methods, two objectives, losses at the bottom: with five columns of such names it did, at both sides."""
    table = fabricate(tuple(CIRCUIT_METHODS), tuple(EDGE_ABLATIONS))
    twice = pd.concat([table, table.assign(objective="logit_diff", edges=table["edges"] + 1)])
    twice.loc[twice["edges"] > 300, "kl_nats"] = 0.0
    for name, figure in circuit_plots.circuit_figures(twice, 479).items():
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            figure.draw_without_rendering()
        assert figure.axes[0].bbox.height > 0.4 * figure.bbox.height, name
        box = figure.legends[0].get_window_extent()
        assert box.x0 >= 0 and box.x1 <= figure.bbox.width and box.y0 >= 0, name
