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
from matplotlib.collections import LineCollection, PathCollection
from test_fronts import WORSE, circuits, compared, fabricate
from test_report import check

from oacore.circuits import drawing as circuit_drawing
from oacore.circuits import plots as circuit_plots
from oacore.circuits import report as circuit_report
from oacore.circuits.fronts import best_within, front, with_loss
from oacore.circuits.report import front_sentence
from oacore.config.circuits import CIRCUIT_METHODS, EDGE_ABLATIONS
from oacore.errors import UserError
from oacore.models.graph import Graph
from oacore.report import figures, numbers, parts
from oacore.report.page import render_page

SVG = "{http://www.w3.org/2000/svg}"


def stairs(ax):
    """The lines that have steps, by colour."""
    return {line.get_color(): line for line in ax.lines if line.get_drawstyle().startswith("steps")}


def markers(ax):
    return [c for c in ax.collections if isinstance(c, PathCollection)]


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def save_all(drawn, folder):
    return {name: figures.save(figure, folder / name)[0].read_text() for name, figure in drawn.items()}


def test_other_objectives_are_methods_of_their_own():
    table = fabricate(("ugs",), ("optimal",))
    table.loc[table["edges"] > 60, "objective"] = "logit_diff"
    named = with_loss(table)
    assert sorted(set(named["method"])) == ["ugs", "ugs (logit_diff)"]
    pd.testing.assert_frame_equal(with_loss(named), named)
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
    other = fabricate(("ugs",)).assign(objective="logit_diff")
    assert "ablation_types_ugs" in circuit_plots.circuit_figures(other, 500), "the file's name is the method's"


def test_pareto_figure_draws_each_front_as_stairs_and_every_circuit():
    table = fabricate()
    table.loc[(table["method"] == "ugs") & (table["edges"] == 90), ["kl_nats", "validation_kl_nats"]] = 3.0  # dominated
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
    page = check(render_page("t", {}, [circuit_report.circuit_section("task", table, compared(table), svgs)]))
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
    text = render_page(
        "t", {}, [circuit_report.circuit_section("task", fabricate(), compared(fabricate()), {}, drawings)]
    )
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
    good = front_sentence(compared(table), "optimal")
    assert good.startswith(
        "The front of ugs with optimal ablation (its KL over another's, the geometric mean over log size)"
    )
    assert "is below hcgs (0.714, 95\u00a0% interval " in good and "from 10 to 400 edges" in good
    assert "it is above" not in good and "not apart" not in good
    better = (table["method"] == "eap") & (table["ablation"] == "optimal")
    table.loc[better, ["kl_nats", "validation_kl_nats"]] *= 0.1
    bad = front_sentence(compared(table), "optimal")
    assert "it is above eap (2.50, 95\u00a0% interval" in bad and "is below hcgs (0.714" in bad
    assert "from 10 to 400 edges, most at " in bad


def test_sentence_names_what_it_leaves_out():
    one = circuits([("ugs", "optimal", 10, 0.5, 0.1)])
    assert front_sentence(compared(one), "optimal") == (
        "There is no front to compare that of ugs with optimal ablation with."
    )
    text = front_sentence(
        compared(circuits([("ugs", "optimal", 10, 0.5, 0.1), ("acdc", "optimal", 5, 0.9, 0.1)])), "optimal"
    )
    assert text.endswith(" has no size in common with that of acdc.")


def test_circuits_whose_fits_the_cap_ended_are_marked_and_counted():
    table = fabricate(("ugs", "eap"), ("optimal",)).assign(converged=True, steps=50, left_nats=0.0)
    assert "All 12 fits converged." in circuit_report.circuit_section("t", table, compared(table), {}).intro
    late = (table["method"] == "ugs") & (table["edges"] <= 20)
    table.loc[late, "converged"], table.loc[late, "left_nats"] = False, 0.1 * table["kl_nats"][late]
    section = circuit_report.circuit_section("t", table, compared(table), {})
    assert "† The cap on steps ended 2 of 12 fits before they had converged" in section.intro
    assert "lower their KL by about 10.0\u00a0% (the median; at most 10.0\u00a0%)" in section.intro
    fronts = next(part.frame for part in section.parts if isinstance(part, parts.Table)).set_index("method")
    finished = {
        (method, size): cell.finished for method, row in fronts.iloc[:, :-1].iterrows() for size, cell in row.items()
    }
    assert {key for key, value in finished.items() if not value} == {("ugs", "≤ 10 edges"), ("ugs", "≤ 20 edges")}
    assert render_page("t", {}, [section]).count("†") == 1 + 2


def test_section_shows_figures_tables_drawings_and_stability(tmp_path):
    table = fabricate()
    svgs = save_all(circuit_plots.circuit_figures(table, 500), tmp_path)
    stability = pd.DataFrame([("ugs", "optimal", 1e-3, 5, 0.7, 0.6, 0.8)], columns=STABILITY)
    section = circuit_report.circuit_section(
        "ioi",
        table,
        compared(table),
        svgs,
        {"A circuit.": circuit_drawing.circuit_svg(random_edges(SMALL), SMALL, "t")},
        stability,
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
    best = best_within(table[(table["method"] == "hcgs") & (table["ablation"] == "counterfactual")], 50)
    assert row["KL (nats)"] == numbers.Estimate(best["kl_nats"], best["se_nats"])
    assert (row["edges"], row["nodes"], row["logit difference"]) == (best["edges"], best["nodes"], 1.5)
    assert jaccard["Jaccard index"].tolist() == [0.7] and jaccard["circuits"].tolist() == [5]


STABILITY = ["method", "ablation", "knob", "n_circuits", "jaccard", "jaccard_low", "jaccard_high"]


def test_every_method_and_ablation_type_has_a_note():
    assert all(row.note.endswith(".") for rows in (CIRCUIT_METHODS, EDGE_ABLATIONS) for row in rows.values())


def test_figure_without_a_caption_is_refused():
    with pytest.raises(ValueError, match="figures: paretooptimal; captions exist for pareto_"):
        circuit_report.circuit_section("t", fabricate(), compared(fabricate()), {"paretooptimal": "<svg/>"})


def test_tables_read_back_from_csv_give_the_same_section(tmp_path):
    table = fabricate()
    table.to_csv(tmp_path / "pareto.csv", index=False)
    read = pd.read_csv(tmp_path / "pareto.csv")
    sections = [circuit_report.circuit_section("t", frame, compared(table), {}) for frame in (table, read)]
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
