"""Figures and the report page, on fabricated tables with a known structure."""

import os
import re
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib import colors as mpl_colors
from matplotlib.collections import LineCollection, PathCollection, QuadMesh
from matplotlib.colors import LogNorm

from oacore.ablation import plots
from oacore.ablation import report as report_module
from oacore.config.ablation import ABLATION_TYPES
from oacore.config.colors import ACCENT
from oacore.report import cells, numbers, parts
from oacore.report.figures import save
from oacore.report.page import provenance_section, render_page
from oacore.report.page import write as write_page

METHODS = tuple(ABLATION_TYPES)
HARM = dict(zip(METHODS, (9, 3, 2.2, 5.6, 4.1, 2.6, 3.4, 12, 1, 0.8), strict=True))  # times the optimal gap


def fabricate(layers=4, heads=4, methods=METHODS, kinds=("head", "mlp"), seed=0):
    rng = np.random.default_rng(seed)
    names = [(f"a{i}.h{h}", "head", i, h) for i in range(layers) for h in range(heads)]
    names += [(f"m{i}", "mlp", i, np.nan) for i in range(layers)] + [
        (f"a{i}", "attention_layer", i, np.nan) for i in range(layers)
    ]
    rows = []
    for component, kind, layer, head in (name for name in names if name[1] in kinds):
        base = np.exp(rng.normal(-5, 1.5))
        for method in methods:
            gap = base * HARM[method] * np.exp(rng.normal(0, 0.3))
            rows.append((component, kind, layer, head, method, gap, 0.05 * gap, 200))
    return pd.DataFrame(
        rows, columns=["component", "kind", "layer", "head", "method", "gap_nats", "se_nats", "n_prompts"]
    )


def fabricate_curves(gaps, methods=("optimal",)):
    rows = []
    for row in gaps[gaps["method"].isin(methods)].itertuples():
        steps = np.arange(0, 400 + 20 * row.layer, 20)
        rows += [(step, row.component, row.method, row.gap_nats * (1 + 3 * np.exp(-step / 50))) for step in steps]
    return pd.DataFrame(rows, columns=["step", "component", "method", "validation_gap_nats"])


def summarise(gaps):
    wide = gaps.pivot(index="component", columns="method", values="gap_nats")
    none = pd.Series(np.nan, wide.index)
    counterfactual = wide.get("counterfactual", none)
    ratios = {
        f"median_ratio_{optimal}_to_method": [(wide.get(optimal, none) / wide[m]).median() for m in wide]
        for optimal in ("optimal", "optimal_positional")
    }
    return pd.DataFrame(
        {
            "method": wide.columns,
            "spearman_with_counterfactual": [wide[m].rank().corr(counterfactual.rank()) for m in wide],
            **ratios,
        }
    )


def with_gap(gaps, component, method, value):
    gaps = gaps.copy()
    gaps.loc[(gaps["component"] == component) & (gaps["method"] == method), "gap_nats"] = value
    return gaps


def points(ax):
    """Centres of all markers [n, 2]; error bars and lines are other artists."""
    return np.concatenate([c.get_offsets() for c in ax.collections if isinstance(c, PathCollection)])


def legend_texts(legend):
    return [text.get_text() for text in legend.get_texts()]


# ---- Figures ---------------------------------------------------------------------------------------------------------


def test_distributions_show_every_component_of_every_method_and_order_by_median():
    gaps = fabricate()
    (ax,) = (figure := plots.gap_distributions(gaps)).axes
    assert ax.get_xscale() == "log"
    assert ax.get_xlabel() == "ablation loss gap (nats)"
    np.testing.assert_allclose(np.sort(points(ax)[:, 0]), np.sort(gaps["gap_nats"]))
    medians = gaps.groupby("method")["gap_nats"].median().sort_values(ascending=False)
    assert [label.get_text() for label in ax.get_yticklabels()] == list(medians.index)
    assert ax.yaxis_inverted()  # row 0, the largest, on top
    for row, line in enumerate(ax.lines):
        assert line.get_xdata()[0] == pytest.approx(medians.iloc[row])
        strip = points(ax)[np.abs(points(ax)[:, 1] - row) < 0.5]
        np.testing.assert_allclose(
            np.sort(strip[:, 0]), np.sort(gaps[gaps["method"] == medians.index[row]]["gap_nats"])
        )
    assert legend_texts(figure.legends[0]) == ["attention head", "MLP"]


def test_values_at_or_below_the_floor_are_drawn_at_it_open_and_counted():
    gaps = with_gap(with_gap(with_gap(fabricate(), "m0", "optimal", -3e-5), "a1.h2", "zero", 0.0), "m1", "mean", 2e-6)
    gaps = with_gap(gaps, "m2", "mean", numbers.FLOOR)
    (ax,) = (figure := plots.gap_distributions(gaps)).axes
    assert (points(ax)[:, 0] == numbers.FLOOR).sum() == 3
    assert len(points(ax)) == len(gaps)
    open_points = sum(len(c.get_offsets()) for c in ax.collections if not len(c.get_facecolor()))
    assert open_points == 3
    assert legend_texts(figure.legends[0])[-1] == "3 ≤ 1e-6, drawn there"


def test_median_is_of_the_values_not_of_what_is_drawn():
    gaps = fabricate(methods=("optimal",), kinds=("mlp",), layers=3)
    for component, value in (("m0", -0.02), ("m1", -0.01), ("m2", 0.5)):
        gaps = with_gap(gaps, component, "optimal", value)
    (ax,) = plots.gap_distributions(gaps).axes
    assert "−0.0100" in [text.get_text() for text in ax.texts]
    assert ax.lines[0].get_xdata()[0] == numbers.FLOOR


def test_scatter_has_one_point_per_component_a_diagonal_and_spearman():
    gaps = with_gap(fabricate(layers=5, heads=3), "a2.h1", "optimal", -1.0)
    (ax,) = plots.optimal_against_counterfactual(gaps).axes
    wide = gaps.pivot(index="component", columns="method", values="gap_nats")
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("counterfactual gap (nats)", "optimal gap (nats)")
    assert ax.get_xlim() == ax.get_ylim()
    drawn = sorted(map(tuple, points(ax)))
    np.testing.assert_allclose(
        drawn, sorted(zip(wide["counterfactual"], wide["optimal"].clip(lower=numbers.FLOOR), strict=True))
    )
    diagonal = ax.lines[0]
    np.testing.assert_array_equal(diagonal.get_xdata(), diagonal.get_ydata())
    rho = wide["optimal"].rank().corr(wide["counterfactual"].rank())
    assert ax.get_legend().get_title().get_text() == f"Spearman ρ = {rho:.2f}"
    assert legend_texts(ax.get_legend()) == ["attention head", "MLP", "1 ≤ 1e-6, drawn there", "equal gaps"]
    markers = {c.get_paths()[0].vertices.shape for c in ax.collections if isinstance(c, PathCollection)}
    assert len(markers) == 2  # heads and MLPs differ in shape, not in colour alone


def test_scatter_error_bars_are_one_standard_error_and_stay_on_the_axis():
    gaps = fabricate(layers=1, heads=2, methods=("optimal", "counterfactual"))
    gaps.loc[gaps["component"] == "a0.h0", "se_nats"] = 10.0
    (ax,) = plots.optimal_against_counterfactual(gaps).axes
    vertical = ax.containers[0][2][1].get_segments()
    rows = gaps[gaps["method"] == "optimal"].sort_values("component")
    for segment, row in zip(vertical, rows.itertuples(), strict=True):
        assert segment[0][1] == pytest.approx(max(row.gap_nats - row.se_nats, numbers.FLOOR))
        assert segment[1][1] == pytest.approx(row.gap_nats + row.se_nats)


def test_scatter_leaves_out_components_without_either_gap():
    gaps = with_gap(fabricate(), "m1", "counterfactual", np.nan)
    (ax,) = plots.optimal_against_counterfactual(gaps).axes
    assert len(points(ax)) == gaps["component"].nunique() - 1


@pytest.mark.parametrize(("layers", "heads"), [(4, 4), (12, 12), (48, 25), (1, 1), (3, 64)])
def test_heatmap_places_every_gap_on_a_log_scale(layers, heads):
    gaps = fabricate(layers, heads, methods=("mean", "optimal"))
    figure = plots.layer_head_heatmap(gaps)
    ax, bar = figure.axes
    heads_mesh, mlp_mesh = (c for c in ax.collections if isinstance(c, QuadMesh))
    of = gaps[gaps["method"] == "optimal"].set_index("component")["gap_nats"]
    low = heads_mesh.norm.vmin
    for i in range(layers):
        for h in range(heads):
            drawn = heads_mesh.get_array()[i, h]
            assert drawn == pytest.approx(of[f"a{i}.h{h}"]) if of[f"a{i}.h{h}"] >= low else drawn < low
        assert mlp_mesh.get_array()[i, 0] == pytest.approx(of[f"m{i}"]) or of[f"m{i}"] < low
    assert isinstance(heads_mesh.norm, LogNorm) and heads_mesh.norm is mlp_mesh.norm
    assert bar.get_ylabel() == "ablation loss gap (nats)"
    assert ax.get_ylabel() == "layer" and ax.get_xlabel().startswith("head")
    assert ax.yaxis_inverted()
    assert bool(ax.texts) == (layers * (heads + 1) <= 48)
    assert max(figure.get_size_inches()) <= 9.3  # fits an A4 page
    assert "MLP" in [label.get_text() for label in ax.get_xticklabels()]


def test_heatmap_counts_what_is_below_its_scale_and_marks_what_is_missing():
    gaps = with_gap(
        with_gap(fabricate(12, 12, methods=("optimal",)), "a3.h1", "optimal", -1e-7), "a4.h0", "optimal", np.nan
    )
    gaps = with_gap(gaps, "m0", "optimal", 2.0)
    ax, _ = plots.layer_head_heatmap(gaps).axes
    mesh = ax.collections[0]
    assert mesh.get_array()[3, 1] < mesh.norm.vmin
    assert mesh.norm.vmin >= 2.0 / 1e4
    below = int((gaps["gap_nats"] < mesh.norm.vmin).sum())
    assert f"white: {below} below" in ax.get_xlabel() and below >= 1
    assert mesh.get_array().mask[4, 0] and mesh.get_array().mask.sum() == 1
    assert "grey: not measured" in ax.get_xlabel()
    assert mesh.cmap(mesh.norm(mesh.get_array()))[3, 1].tolist() == [1, 1, 1, 1]


def test_heatmap_of_optimal_carries_its_accent_colour():
    ax, _ = plots.layer_head_heatmap(fabricate()).axes
    accent = np.array(mpl_colors.to_rgb(ACCENT))
    assert np.abs(ax.collections[0].cmap(np.linspace(0, 1, 256))[:, :3] - accent).sum(axis=1).min() < 0.02
    lightness = ax.collections[0].cmap(np.linspace(0, 1, 256))[:, :3] @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(lightness) < 0).all()  # readable without colour


def test_convergence_draws_one_line_and_one_end_per_fit():
    gaps = fabricate()
    curves = fabricate_curves(gaps, ("optimal", "optimal_positional"))
    *panels, bar = plots.convergence_curves(curves).axes
    assert [panel.get_title() for panel in panels] == [""] * 2
    assert [panel.get_title(loc="left") for panel in panels] == ["optimal", "optimal_positional"]
    for panel, method in zip(panels, ("optimal", "optimal_positional"), strict=True):
        (lines,) = (c for c in panel.collections if isinstance(c, LineCollection))
        expected = curves[curves["method"] == method]
        assert len(lines.get_segments()) == len(points(panel)) == gaps["component"].nunique()
        np.testing.assert_allclose(points(panel)[:, 1], 1)
        assert sorted(points(panel)[:, 0]) == sorted(expected.groupby("component")["step"].max())
        assert panel.get_xlabel() == "step" and panel.get_yscale() == "log"
        assert "half settled\nby step 220" in [
            text.get_text() for text in panel.texts
        ]  # 3 exp(-220 / 50) < 5 % < 3 exp(-200 / 50)
    assert panels[0].get_ylabel() == "held-out gap ÷ its last value"
    assert bar.get_ylabel() == "layer"


def test_convergence_in_nats_keeps_the_curves_that_the_relative_figure_counts_out():
    curves = fabricate_curves(fabricate())
    curves.loc[curves["component"] == "m2", "validation_gap_nats"] = -1e-8
    relative, nats = plots.convergence_curves(curves), plots.convergence_curves(curves, relative=False)
    assert len(points(relative.axes[0])) == 19 and len(points(nats.axes[0])) == 20
    assert "1 left out" in relative.get_supxlabel() and "left out" not in nats.get_supxlabel()
    assert nats.axes[0].get_ylabel() == "held-out ablation loss gap (nats)"
    assert points(nats.axes[0])[:, 1].min() == numbers.FLOOR
    none_left = plots.convergence_curves(curves[curves["component"] == "m2"])
    assert none_left.axes[0].get_ylabel() == "held-out ablation loss gap (nats)" and len(points(none_left.axes[0])) == 1


def test_convergence_of_fits_that_stopped_at_once(tmp_path):
    curves = fabricate_curves(fabricate())
    figure = plots.convergence_curves(curves[curves["step"] == 0])
    save(figure, tmp_path / "start")
    assert len(points(figure.axes[0])) == 20


def test_convergence_does_not_depend_on_the_order_of_rows(tmp_path):
    curves = fabricate_curves(fabricate())
    shuffled = curves.sample(frac=1, random_state=1)
    first = save(plots.convergence_curves(curves), tmp_path / "a")[0].read_bytes()
    assert first == save(plots.convergence_curves(shuffled), tmp_path / "b")[0].read_bytes()


SUBSETS = [
    ("optimal",),
    ("zero", "mean"),
    ("optimal", "counterfactual"),
    ("optimal_positional", "zero"),
    ("counterfactual",),
    METHODS,
]


KINDS = [("head",), ("mlp",), ("attention_layer", "mlp"), ("head", "mlp", "attention_layer")]


@pytest.mark.parametrize(
    ("methods", "kinds"),
    [(methods, ("head", "mlp")) for methods in SUBSETS]
    + [(("zero", "counterfactual", "optimal"), kinds) for kinds in KINDS],
    ids=lambda names: "+".join(names),
)
def test_any_subset_of_methods_and_kinds_can_be_drawn(methods, kinds, tmp_path):
    gaps = fabricate(2, 3, methods, kinds)
    curves = fabricate_curves(gaps, ("optimal", "optimal_positional"))
    figures = plots.ablation_figures(gaps, curves)
    assert ("optimal_against_counterfactual" in figures) == ({"optimal", "counterfactual"} <= set(methods))
    assert ("layer_head_heatmap" in figures) == ("optimal" in methods)
    assert ("convergence_curves" in figures) == (len(curves) > 0)
    svgs = {name: save(figure, tmp_path / name)[0].read_text() for name, figure in figures.items()}
    page = check(render_page("t", {}, [report_module.ablation_section("task", gaps, summarise(gaps), svgs)]))
    assert page.count["figure"] == len(figures) and page.count["table"] == 2


def test_one_component_without_spread_or_error_can_be_drawn():
    gaps = fabricate(1, 1, ("optimal", "counterfactual"), ("head",))
    gaps["se_nats"] = np.nan
    figures = plots.ablation_figures(gaps)
    assert figures["optimal_against_counterfactual"].axes[0].get_legend().get_title().get_text() == "Spearman ρ: –"
    assert len(figures) == 3


def test_bad_tables_are_refused_by_name():
    gaps = fabricate(methods=("zero", "optimal"))
    with pytest.raises(ValueError, match="no column gap_nats; found component"):
        plots.gap_distributions(gaps.drop(columns="gap_nats"))
    with pytest.raises(ValueError, match="kind neuron; allowed are head, mlp, attention_layer"):
        plots.gap_distributions(gaps.assign(kind="neuron"))
    with pytest.raises(ValueError, match="infinite gap_nats for m1"):
        plots.gap_distributions(with_gap(gaps, "m1", "zero", np.inf))
    with pytest.raises(ValueError, match="no row with a value"):
        plots.gap_distributions(gaps.assign(gap_nats=np.nan))
    with pytest.raises(ValueError, match="needs optimal and counterfactual"):
        plots.optimal_against_counterfactual(gaps)
    with pytest.raises(ValueError, match="gaps of method mean: no row"):
        plots.layer_head_heatmap(gaps, "mean")
    with pytest.raises(ValueError, match="component x3: not a name"):
        plots.convergence_curves(fabricate_curves(gaps).assign(component="x3"))


FRESH = """
import sys
import oacore.ablation.plots as plots
from oacore.report.figures import save
assert not {"torch", "transformers", "matplotlib.pyplot"} & set(sys.modules)
sys.path.insert(0, sys.argv[2])
import test_report as t
gaps = t.fabricate()
for name, figure in plots.ablation_figures(gaps, t.fabricate_curves(gaps)).items():
    save(figure, f"{sys.argv[1]}/{name}")
"""


def test_same_figures_same_bytes_in_any_process_and_whatever_the_users_settings(tmp_path):
    (tmp_path / "matplotlibrc").write_text(
        "font.size: 30\nsvg.fonttype: none\naxes.facecolor: black\nxtick.major.size: 20\n"
    )
    plain = {**os.environ, "PYTHONHASHSEED": "1"}
    other = {**os.environ, "PYTHONHASHSEED": "2", "MATPLOTLIBRC": str(tmp_path / "matplotlibrc")}
    for run, environment in (("first", plain), ("second", other)):
        subprocess.run(
            [sys.executable, "-c", FRESH, tmp_path / run, Path(__file__).parent], check=True, env=environment
        )
    files = sorted(path.name for path in (tmp_path / "first").iterdir())
    assert len(files) == 8
    for name in files:
        first = (tmp_path / "first" / name).read_bytes()
        assert first == (tmp_path / "second" / name).read_bytes(), name
        assert not re.search(rb"20\d\d-\d\d-\d\d|<dc:date>|Matplotlib v", first), name


def test_saving_twice_changes_nothing(tmp_path):
    figure = plots.gap_distributions(fabricate(methods=("zero", "optimal")))
    first = [path.read_bytes() for path in save(figure, tmp_path / "deep" / "a.b")]
    assert [path.read_bytes() for path in save(figure, tmp_path / "deep" / "a.b")] == first
    assert sorted(path.name for path in (tmp_path / "deep").iterdir()) == ["a.b.png", "a.b.svg"]


# ---- Numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.012345, "0.0123"),
        (4.5678, "4.57"),
        (0.99996, "1.00"),
        (99.96, "100"),
        (12345.6, "12,346"),
        (0.00012345, "0.000123"),
        (1.2345e-5, "1.23e-5"),
        (-0.5, "−0.500"),
        (0.0, "0"),
        (float("nan"), "–"),
        (1000, "1,000"),
        (np.int64(50257), "50,257"),
        (np.float32(0.25), "0.250"),
        (True, "yes"),
        (None, "–"),
        ("20240917", "20240917"),
        ({"layers": 12, "d_model": 768}, "layers 12, d_model 768"),
        (["ioi", 3], "ioi, 3"),
        (numbers.Estimate(0.12345, 0.0021), "0.123 ± 0.002"),
        (numbers.Estimate(1.2345, 0.56), "1.23 ± 0.56"),
        (numbers.Estimate(0.00012, 0.034), "0.000 ± 0.034"),
        (numbers.Estimate(1.5, 1e-5), "1.50 ± 1e-5"),
        (numbers.Estimate(1.5e-5, 2.2e-6), "1.50e-5 ± 2.2e-6"),
        (numbers.Estimate(0.5, float("nan")), "0.500"),
        (numbers.Estimate(float("nan"), float("nan")), "–"),
    ],
)
def test_numbers_for_people(value, text):
    assert numbers.human(value) == text


def test_decimal_points_of_a_column_are_below_one_another():
    frame = pd.DataFrame({"name": ["a", "b", "c", "d"], "value": [12.34, 0.00123, 5000, np.nan]})
    shown = [row[1] for row in cells.cell_rows(parts.Table(frame, ""))]
    after_point = [len(cell.text.partition(".")[2]) + cell.pad.count("\u2007") for cell in shown]
    assert after_point == [5, 5, 5, 5]
    assert [cell.pad.startswith("\u2008") for cell in shown] == [False, False, True, True]
    assert not any(row[0].numeric for row in cells.cell_rows(parts.Table(frame, "")))


# ---- The page --------------------------------------------------------------------------------------------------------

VOID = {"meta", "link", "br", "wbr", "img", "hr", "input"}


class Page(HTMLParser):
    """Collects what the checks need and follows the nesting of tags."""

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.targets, self.count, self.words = [], [], [], Counter(), []
        self.feed(text)
        self.close()
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        if tag not in VOID:
            self.open.append(tag)
        self.see(tag, attributes)

    def handle_startendtag(self, tag, attributes):
        assert "svg" in self.open or tag in VOID, f"<{tag}/> means nothing in HTML"
        self.see(tag, attributes)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data)

    def see(self, tag, attributes):
        self.count[tag] += 1
        for name, value in attributes:
            assert not name.startswith("on"), f"{name} on <{tag}>"
            if name == "id":
                self.ids.append(value)
            if name in ("href", "src", "srcset", "data", "action"):
                self.targets.append(value)
            self.targets += [f"#{target}" for target in re.findall(r"url\(#([^)]*)\)", value or "")]
            if name == "aria-labelledby":
                self.targets.append(f"#{value}")

    @property
    def text(self):
        return "".join(self.words)


def check(text):
    """A page that is well nested, alone, without script, with unique ids and without dangling references."""
    page = Page(text)
    assert page.count["script"] == page.count["iframe"] == 0
    assert [i for i, n in Counter(page.ids).items() if n > 1] == []
    for target in page.targets:
        assert target.startswith(("#", "data:")), target
        if target.startswith("#"):
            assert target[1:] in page.ids, target
    assert "http://" not in text.replace("http://www.w3.org/", "") and "https://" not in text
    assert not re.search(r"url\((?!#)|@import", text)
    assert "Content-Security-Policy" in text
    return page


@pytest.fixture(scope="module")
def svgs(tmp_path_factory):
    gaps = fabricate()
    folder = tmp_path_factory.mktemp("figures")
    figures = plots.ablation_figures(gaps, fabricate_curves(gaps))
    return {name: save(figure, folder / name)[0].read_text() for name, figure in figures.items()}


def whole_report(svgs, tasks=("ioi", "greater_than")):
    gaps = fabricate()
    example = {
        "prompt": "If a < b & c > d,\n  then <script>alert(1)</script>",
        "counterfactual": "plain",
        "answer": ' "Amber"',
    }
    run = {
        "Model": {
            "name": "demo & co",
            "sizes": {"layers": 4, "heads": 4},
            "weights": "a3f1" * 16,
            "parity difference": 3.8e-6,
        },
        "Tasks": dict.fromkeys(tasks, "200 prompts"),
        "Settings": {"seed": "20240917", "dtype": "float32"},
    }
    sections = [report_module.ablation_section(task, gaps, summarise(gaps), svgs, example) for task in tasks]
    config = {"run": "demo", "ablation": {"methods": list(METHODS)}, "note": "</pre><b>&"}
    return (
        "Optimal ablation of <demo>",
        run,
        sections,
        [report_module.methods_section(METHODS), provenance_section(config)],
    )


def test_page_stands_alone_and_shows_everything(svgs):
    page = check(render_page(*whole_report(svgs)))
    assert page.count["figure"] == page.count["svg"] == 8 and page.count["table"] == 4
    assert page.count["nav"] == 1 and page.count["section"] == 4 and page.count["details"] == 1
    for words in (
        "demo & co",
        "layers 4, heads 4",
        "3.80e-6",
        "20240917",
        "20 components, 200 prompts each",
        "Figure 8.",
        "Table 4.",
    ):
        assert words in page.text
    for method, note in {name: row.note for name, row in ABLATION_TYPES.items()}.items():
        assert method in page.text and note in page.text
    assert all(caption in page.text for caption in report_module.CAPTIONS.values())


def test_text_is_escaped(svgs):
    text = render_page(*whole_report(svgs))
    page = check(text)
    assert "If a < b & c > d,\n  then <script>alert(1)</script>" in page.text
    assert "<script" not in text and "</pre><b>" not in text
    assert "</pre><b>&" in page.text and "Optimal ablation of <demo>" in page.text
    frame = pd.DataFrame({"<i>column": ["<i>cell"], "x_y": ["&amp;"]})
    part = parts.Table(frame, "<i>caption")
    page = check(render_page("t", {"<i>group": {"<i>name": "<i>"}}, [parts.Section("<i>", "<i>intro", [part])]))
    assert page.count["i"] == 0 and page.count["wbr"] == 1
    assert "<i>column" in page.text and "x_y" in page.text and "&amp;" in page.text


def test_contents_only_with_more_than_one_section(svgs):
    assert check(render_page(*whole_report(svgs, ("ioi",)))).count["nav"] == 0


def test_top_components_are_the_largest_with_their_errors():
    gaps = fabricate(12, 12)
    table = report_module.ablation_section("t", gaps, summarise(gaps), {}).parts[-1]
    optimal = gaps[gaps["method"] == "optimal"].nlargest(10, "gap_nats")
    assert table.frame["component"].tolist() == optimal["component"].tolist()
    assert table.frame.columns.tolist() == ["component", "optimal", *(m for m in METHODS if m != "optimal")]
    row = gaps[(gaps["component"] == optimal["component"].iloc[3]) & (gaps["method"] == "zero")].iloc[0]
    assert table.frame["zero"][3] == numbers.Estimate(row["gap_nats"], row["se_nats"])


def test_summary_and_headline_agree_with_the_tables():
    gaps = fabricate()
    section = report_module.ablation_section("t", gaps, summarise(gaps), {})
    summary = summarise(gaps).set_index("method")
    frame = section.parts[0].frame.set_index("method")
    assert frame.index.tolist() == list(METHODS)
    assert frame["median gap (nats)"]["mean"] == pytest.approx(gaps[gaps["method"] == "mean"]["gap_nats"].median())
    assert frame["optimal ÷ method (median, %)"]["zero"] == pytest.approx(
        100 * summary["median_ratio_optimal_to_method"]["zero"]
    )
    share = numbers.human(100 * summary["median_ratio_optimal_to_method"]["zero"])
    assert f"{share}\u00a0% of zero's" in section.intro
    kinds = [part.split(" is ")[1] for part in section.intro.split("In the median component") if " is " in part]
    positional = {name for name in METHODS if name.endswith("_positional")} - {"optimal_positional"}
    assert all("positional" not in kinds[0] and f"of {name}'s" in kinds[1] for name in positional), "like for like"
    assert "of mean's" not in kinds[1] and "of resample's" not in kinds[1]
    without = fabricate(methods=("zero", "optimal"))
    empty = summarise(without).assign(spearman_with_counterfactual=None)
    section = report_module.ablation_section("t", without, empty, {})
    assert "Spearman ρ with counterfactual" not in section.parts[0].frame
    assert "counterfactual" not in section.intro and "mean's" not in section.intro


def test_unequal_prompt_counts_are_said():
    gaps = fabricate()
    gaps.loc[gaps["method"] == "zero", "n_prompts"] = 1000
    assert "200 to 1,000 prompts each" in report_module.ablation_section("t", gaps, summarise(gaps), {}).intro


def test_new_experiments_need_no_new_template():
    inside = '<style>.a, .b{fill:red} .c{x:1}</style><g id="p"/><use href="#p" clip-path="url(#p)"/>'
    svg = f'<svg xmlns="http://www.w3.org/2000/svg">{inside}</svg>'
    figure = parts.Figure(svg, "see this")
    table = parts.Table(pd.DataFrame({"edges": [10, 2000], "KL (nats)": [numbers.Estimate(0.5, 0.01), None]}), "pareto")
    section = parts.Section(
        "Circuits", "one\n\ntwo", [figure, figure, table, parts.Definitions({"k": 1}), parts.Details("more", "x\ny")]
    )
    text = render_page("t", {}, [section])
    page = check(text)
    assert page.count["p"] == 2
    assert "#part-1-1 .a,#part-1-1 .b{fill:red}#part-1-1 .c{x:1}" in text
    assert 'href="#part-1-2-p"' in text and 'clip-path="url(#part-1-2-p)"' in text


@pytest.mark.parametrize(
    "inside",
    [
        "<script>1</script>",
        '<image href="http://example.org/x.png"/>',
        '<rect onclick="x()"/>',
        '<rect style="fill:url(http://example.org)"/>',
        "<style>@import 'x.css';</style>",
        "<foreignObject/>",
    ],
)
def test_svg_that_reaches_out_is_refused(inside):
    svg = f'<svg xmlns="http://www.w3.org/2000/svg">{inside}</svg>'
    with pytest.raises(ValueError, match="figure part-1-1: SVG"):
        render_page("t", {}, [parts.Section("s", "", [parts.Figure(svg, "")])])


def test_figure_without_a_caption_is_refused():
    gaps = fabricate()
    with pytest.raises(ValueError, match="figures: gap_distribution; captions exist for gap_distributions"):
        report_module.ablation_section("t", gaps, summarise(gaps), {"gap_distribution": "<svg/>"})


def test_written_page_is_the_rendered_one_and_the_same_each_time(svgs, tmp_path):
    write_page(tmp_path / "a" / "report.html", *whole_report(svgs))
    written = (tmp_path / "a" / "report.html").read_bytes()
    assert written == render_page(*whole_report(svgs)).encode()
    assert list((tmp_path / "a").iterdir()) == [tmp_path / "a" / "report.html"]


def test_tables_read_back_from_csv_give_the_same_page(svgs, tmp_path):
    gaps = fabricate()
    gaps.to_csv(tmp_path / "gaps.csv", index=False)
    summarise(gaps).to_csv(tmp_path / "summary.csv", index=False)
    read = pd.read_csv(tmp_path / "gaps.csv", dtype={"head": "Int64"})
    back = report_module.ablation_section("t", read, pd.read_csv(tmp_path / "summary.csv"), svgs)
    direct = report_module.ablation_section("t", gaps, summarise(gaps), svgs)
    assert render_page("t", {}, [back]) == render_page("t", {}, [direct])
    for name, figure in plots.ablation_figures(read, fabricate_curves(read)).items():
        assert save(figure, tmp_path / name)[0].read_text() == svgs[name]
