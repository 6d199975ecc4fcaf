"""Figures of causal tracing and the report's section on it, on fabricated tables with known peaks."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.collections import FillBetweenPolyCollection, QuadMesh
from matplotlib.colors import to_hex
from test_report import check

from oacore.config import tracing as config
from oacore.config.colors import BLUE
from oacore.config.tracing import Tracing, corruptions_in_order, usual_noise
from oacore.report import figures, numbers, parts
from oacore.report.page import render_page
from oacore.tracing import plots as tracing_plots
from oacore.tracing import report as tracing_report
from oacore.tracing.peaks import PEAK_COLUMNS, peak_table
from oacore.tracing.plots import tracing_figures
from oacore.tracing.tables import PICTURE_COLUMNS

NAMES = ("oat", "oat_shared", "gaussian-1", "gaussian-3", "gaussian_scalar-3", "mean", "token_replacement")
SITES, POSITIONS = ("attention", "mlp"), ("last", "last_subject", "all_subject")
PEAKS = {
    "attention": {"last": 3, "last_subject": 0, "all_subject": 1},
    "mlp": {"last": 2, "last_subject": 1, "all_subject": 1},
}
KEYS = ["corruption", "site", "position", "window"]


def fabricate(names=NAMES, sites=SITES, positions=POSITIONS, windows=(1, 5), layers=4, seed=0):
    """Curves that peak at `PEAKS` and fall off by half a layer (oat) or by two of them."""
    rng = np.random.default_rng(seed)
    rows = []
    for c, name in enumerate(names):
        for site in sites:
            for p, position in enumerate(positions):
                for window in windows:
                    for layer in range(layers):
                        far = abs(layer - PEAKS.get(site, PEAKS["mlp"])[position]) / (0.5 if name == "oat" else 2)
                        value = 0.01 * window**0.5 * (10 - c - p) * np.exp(-far) - 0.002 + 0.001 * rng.random()
                        rows.append(
                            (
                                name,
                                site,
                                position,
                                window,
                                layer,
                                value,
                                0.001 * (1 + c),
                                0.7,
                                0.01 * c,
                                0.01 * c + value,
                                1200,
                            )
                        )
    columns = [*KEYS, "layer", "aie", "se", "p_clean", "p_corrupted", "p_restored", "n"]
    table = pd.DataFrame(rows, columns=columns)
    return table.assign(
        aie_normalised=table["aie"] / (table["p_clean"] - table["p_corrupted"]), se_normalised=table["se"]
    )


def paint(
    fact=0,
    names=("oat_shared", "gaussian-3"),
    sites=SITES,
    layers=3,
    window=1,
    tokens=("<s>", " Big", " $ox", "en$", "\n", " is"),
):
    rng = np.random.default_rng(fact)
    corrupted = {name: 0.15 if name == "gaussian-3" else 0.1 for name in names}
    about = [(fact, f"prompt {fact}", " Wes$t", n, s, window, i, t, tokens[t], 1 <= t <= 2, 0.8, corrupted[n])
             for n in names for s in sites for i in range(layers) for t in range(len(tokens))]  # fmt: skip
    return pd.DataFrame(
        [(*row, p) for row, p in zip(about, rng.uniform(0.1, 0.8, len(about)), strict=True)],
        columns=PICTURE_COLUMNS,
    )


def curve(table, **where):
    for column, value in where.items():
        table = table[table[column] == value]
    return table.sort_values("layer")


def lines(ax):
    return {line.get_label(): line for line in ax.lines if not line.get_label().startswith("_")}


def bands(ax):
    """The lower and upper end at each whole layer, by colour."""
    found = {}
    for band in ax.collections:
        if isinstance(band, FillBetweenPolyCollection):
            x, y = band.get_paths()[0].vertices.T
            ends = [(y[x == layer].min(), y[x == layer].max()) for layer in np.unique(x)]
            found.setdefault(to_hex(band.get_facecolor()[0]), []).append(ends)
    return found


# ---- Names and tables ------------------------------------------------------------------------------------------------


def test_corruptions_stand_in_one_order():
    names = [
        "new",
        "mean",
        "gaussian-10",
        "gaussian_scalar-0.5",
        "oat_shared",
        "gaussian-3",
        "oat",
        "gaussian-3",
        "gaussian-1e-05",
    ]
    ordered = ["oat", "oat_shared", "gaussian-1e-05", "gaussian-3", "gaussian-10", "gaussian_scalar-0.5", "mean", "new"]
    assert corruptions_in_order(names) == ordered
    assert corruptions_in_order(Tracing().corruption_names())[:5] == list(Tracing().corruption_names())[:5]


@pytest.mark.parametrize(
    ("names", "usual"),
    [
        (("gaussian-1", "gaussian-3", "gaussian_scalar-3"), "gaussian-3"),
        (("gaussian-1", "gaussian-10", "gaussian_scalar-3"), "gaussian-1"),
        (("gaussian-2", "gaussian-4"), "gaussian-4"),
        (("oat", "gaussian_scalar-5"), "gaussian_scalar-5"),
        (("oat", "mean"), None),
    ],
)
def test_usual_noise_is_per_coordinate_and_nearest_to_three(names, usual):
    assert usual_noise(names) == usual


CURVE = st.lists(st.integers(-3, 9).map(lambda value: value / 10), min_size=1, max_size=8)


@settings(max_examples=40, deadline=None)
@given(CURVE, st.randoms(use_true_random=False))
def test_peak_is_the_first_maximum_and_its_share_of_what_is_positive(values, random):
    table = fabricate(("oat",), ("mlp",), ("last",), (3,), len(values)).assign(aie=values)
    order = list(range(len(values)))
    random.shuffle(order)
    (row,) = peak_table(table.iloc[order]).to_dict("records")
    assert (row["peak_layer"], row["aie"]) == (values.index(max(values)), max(values))
    positive = sum(value for value in values if value > 0)
    assert row["concentration"] == pytest.approx(max(values) / positive) if positive else np.isnan(row["concentration"])


def test_peak_table_has_a_row_for_each_curve_with_its_numbers():
    table = fabricate()
    peaks = peak_table(table.sample(frac=1, random_state=0))
    assert list(peaks) == list(PEAK_COLUMNS)
    assert len(peaks) == len(peaks.drop_duplicates(KEYS)) == len(NAMES) * 2 * 3 * 2
    for row in peaks.to_dict("records"):
        assert row["peak_layer"] == PEAKS[row["site"]][row["position"]]
        at = curve(table, **{key: row[key] for key in KEYS}, layer=row["peak_layer"]).iloc[0]
        assert [row[name] for name in ("aie", "se", "aie_normalised")] == [
            at[name] for name in ("aie", "se", "aie_normalised")
        ]
    share = peaks[peaks["window"] == 5].groupby("corruption")["concentration"].mean()
    assert share["oat"] > 1.5 * share.drop("oat").max(), "narrow against wide"


def test_bad_tables_are_refused_by_name():
    table, picture = fabricate(), paint()
    for function in (
        peak_table,
        tracing_figures,
        tracing_plots.noise_scales,
        lambda t: tracing_plots.aie_curves(t, "mlp"),
    ):
        with pytest.raises(ValueError, match="aie: no column window, se; found corruption, site"):
            function(table.drop(columns=["window", "se"]))
        with pytest.raises(ValueError, match="aie: no row with a value in aie"):
            function(table.assign(aie=np.nan))
        with pytest.raises(ValueError, match="aie: infinite aie for oat, attention, layer 0"):
            function(table.assign(aie=np.inf))
    with pytest.raises(ValueError, match="aie: no site block; found attention, mlp"):
        tracing_plots.aie_curves(table, "block")
    with pytest.raises(ValueError, match="aie: corruptions oat, mean; this figure needs gaussian-<scale>"):
        tracing_plots.noise_scales(fabricate(("mean", "oat")))
    with pytest.raises(ValueError, match="picture: no column token; found fact"):
        tracing_plots.heat_map(picture.drop(columns="token"))
    with pytest.raises(ValueError, match="picture: no row with a value in p_restored"):
        tracing_plots.heat_map(picture.assign(p_restored=np.nan))
    with pytest.raises(ValueError, match="picture: fact 0, 1; one picture shows one fact"):
        tracing_plots.heat_map(pd.concat([picture, paint(1)]))
    with pytest.raises(ValueError, match="picture: window 1, 5; one picture shows one window"):
        tracing_plots.heat_map(pd.concat([picture, paint(window=5)]))


# ---- Figures ---------------------------------------------------------------------------------------------------------


def test_curves_and_bands_are_the_table():
    table = fabricate()
    figure = tracing_plots.aie_curves(table.sample(frac=1, random_state=1), "mlp")
    panels = np.array(figure.axes).reshape(2, 3)
    assert [ax.get_title("left") for ax in panels[0]] == list(config.POSITIONS.values())
    assert [ax.get_ylabel() for ax in panels[:, 0]] == ["AIE, one layer", "AIE, window of 5"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(NAMES)
    for row, window in enumerate((1, 5)):
        for column, position in enumerate(POSITIONS):
            ax = panels[row, column]
            assert list(lines(ax)) == list(NAMES)[::-1], "optimal ablation last, on top"
            assert [line for line in ax.lines if list(line.get_ydata()) == [0, 0]], "a line at 0"
            for name, line in lines(ax).items():
                values = curve(table, corruption=name, site="mlp", position=position, window=window)
                np.testing.assert_array_equal(line.get_xydata(), values[["layer", "aie"]])
                wanted = values["aie"].to_numpy()[:, None] + 1.96 * values["se"].to_numpy()[:, None] * [-1, 1]
                assert any(np.allclose(ends, wanted) for ends in bands(ax)[to_hex(line.get_color())]), name
    top = max(lines(panels[0, 0]).values(), key=lambda line: line.get_zorder())
    assert (top.get_label(), top.get_color()) == ("oat", figures.ACCENT)


def test_corruptions_are_told_apart_in_either_figure():
    names = Tracing(noise_scales=(0.5, 1, 2, 3, 5)).corruption_names()
    table = fabricate(names, ("mlp",), ("last",), (1,))
    (ax,) = tracing_plots.aie_curves(table, "mlp").axes
    assert (
        len({(line.get_color(), str(line._unscaled_dash_pattern)) for line in lines(ax).values()}) == len(names) == 15
    )
    assert {name for name, line in lines(ax).items() if line.get_color() == figures.ACCENT} == {"oat"}
    assert {name for name, line in lines(ax).items() if line.get_color() == BLUE} == {"gaussian-3"}
    (ax,) = tracing_plots.noise_scales(table).axes
    assert len({(line.get_color(), line.get_linestyle()) for line in lines(ax).values()}) == len(lines(ax)) == 10
    assert len({line.get_color() for line in lines(ax).values()}) == 5, "a shade for each scale"


def test_noise_figure_has_each_scale_at_the_narrowest_window():
    table = fabricate(windows=(5, 3))
    figure = tracing_plots.noise_scales(table)
    panels = np.array(figure.axes).reshape(2, 3)
    assert "window of 3" in figure.get_suptitle()
    for row, site in enumerate(SITES):
        for column, position in enumerate(POSITIONS):
            drawn = lines(panels[row, column])
            assert set(drawn) == {"gaussian-1", "gaussian-3", "gaussian_scalar-3"}
            for name, line in drawn.items():
                values = curve(table, corruption=name, site=site, position=position, window=3)
                np.testing.assert_array_equal(line.get_ydata(), values["aie"])


@pytest.mark.parametrize("layers", [1, 12, 48])
def test_markers_are_few_whatever_the_depth(layers):
    (ax,) = tracing_plots.aie_curves(fabricate(("oat", "mean"), ("mlp",), ("last",), (1,), layers), "mlp").axes
    for line in lines(ax).values():
        assert 1 <= len(range(layers)[line.get_markevery()]) <= 12
    assert ax.get_xlim()[0] < 0 and ax.get_xlim()[1] > layers - 1 and 1 <= len(ax.get_xticks()) <= 9


def test_heat_map_is_the_table():
    picture = paint(3, ("gaussian-3", "oat_shared"), window=5)
    figure = tracing_plots.heat_map(picture.sample(frac=1, random_state=1))
    maps = [next(c for c in ax.collections if isinstance(c, QuadMesh)) for ax in figure.axes[:4]]
    keys = [(name, site) for name in ("oat_shared", "gaussian-3") for site in SITES]
    for (name, site), mesh in zip(keys, maps, strict=True):
        rows = curve(picture, corruption=name, site=site)
        wanted = rows.pivot(index="position", columns="layer", values="p_restored")
        np.testing.assert_array_equal(mesh.get_array().reshape(wanted.shape), wanted)
        assert mesh.get_clim() == (0.1, 0.8), "from the lowest corrupted run to the clean one"
    ax = figure.axes[0]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["<s>", "Big*", "$ox*", "en$", "\\n", "is"]
    assert "“Wes$t”" in figure.get_suptitle() and ax.get_ylabel() == "oat_shared\np = 0.100"
    assert len(figure.axes) == 5 and ax.yaxis_inverted(), "four maps and a colour bar; the first token on top"


def test_heat_map_of_a_weak_corruption_or_with_holes():
    picture = paint(names=("mean",), sites=("block",)).assign(p_corrupted=0.9)
    figure = tracing_plots.heat_map(picture.drop(index=4))
    mesh = figure.axes[0].collections[0]
    assert mesh.get_clim()[0] < mesh.get_clim()[1]
    assert mesh.get_array().mask.reshape(6, 3).nonzero() == (np.array([4]), np.array([0]))


@pytest.mark.parametrize(
    ("names", "sites", "n"),
    [
        (("oat", "oat_shared", "gaussian-1", "gaussian-3", "mean"), SITES, 2),
        (("oat", "gaussian-3"), ("block", "mlp"), 0),
        (("gaussian-1", "gaussian_scalar-1"), SITES, 1),
    ],
)
def test_names_that_settings_promise_are_those_drawn(names, sites, n):
    pictures = pd.concat([paint(7 * i) for i in range(n)]) if n else None
    drawn = tracing_figures(fabricate(names, sites, ("last",), (1,)), pictures)
    scales = tuple(dict.fromkeys(float(name.partition("-")[2]) for name in names if "-" in name))
    kinds = tuple(dict.fromkeys(name.partition("-")[0] for name in names))
    settings = Tracing(corruptions=kinds, noise_scales=scales, sites=sites, pictures=n)
    assert settings.corruption_names() == names and set(settings.figures()) == set(drawn)
    assert [name for name in drawn if name.startswith("aie_")] == [f"aie_{s}" for s in config.SITES if s in sites]
    for i in range(n):
        mesh = drawn[f"fact_{i}"].axes[0].collections[0]
        np.testing.assert_array_equal(mesh.get_array().T.ravel(), paint(7 * i)["p_restored"][:18])


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Small tables, their figures as SVG, and the same of the tables with rows in another order."""
    table, pictures = fabricate(NAMES[:4], ("mlp",), POSITIONS[:2], (1,)), paint(sites=("mlp",))
    folder = tmp_path_factory.mktemp("figures")
    texts = []
    for number, mixed in enumerate((table, table.sample(frac=1, random_state=2))):
        by_name = tracing_figures(mixed, pictures)
        texts.append(
            {name: figures.save(figure, folder / f"{number}{name}")[0].read_text() for name, figure in by_name.items()}
        )
    return table, pictures, texts


def test_same_table_same_bytes_in_any_order_of_rows(drawn):
    _, _, (first, second) = drawn
    assert first == second and list(first) == ["aie_mlp", "noise_scales", "fact_0"]


def texts_of(figure):
    """The boxes of all text that is drawn."""
    found = [figure._suptitle, figure._supxlabel, *figure.legends]
    for ax in figure.axes:
        found += [ax._left_title, ax.xaxis.label, ax.yaxis.label]
        for axis in (ax.xaxis, ax.yaxis):
            low, high = sorted(axis.get_view_interval())
            found += [tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
            found += [tick.label2 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
    drawn = [
        text
        for text in found
        if text is not None and text.get_visible() and getattr(text, "get_text", lambda: "legend")()
    ]
    return [text.get_window_extent() for text in drawn]


def test_nothing_runs_out_of_the_figure_or_into_other_text():
    table = fabricate(Tracing().corruption_names(), windows=(1,), layers=24)
    for name, figure in tracing_figures(table, paint(layers=24)).items():
        figure.draw_without_rendering()
        boxes = texts_of(figure)
        for i, box in enumerate(boxes):
            assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.width and box.y1 <= figure.bbox.height, name
            beside = [other for other in boxes[:i] if min(box.x1, other.x1) > max(box.x0, other.x0) + 1]
            assert all(min(box.y1, other.y1) <= max(box.y0, other.y0) + 1 for other in beside), name


# ---- The section -----------------------------------------------------------------------------------------------------


def test_intro_says_where_the_effects_peak():
    table = fabricate()
    section = tracing_report.tracing_section("facts", table, {})
    assert section.title == "facts: causal tracing"
    first, *sentences = section.intro.split("\n\n")
    assert first == (
        "1,200 held-out facts, 7 corruptions. The mean probability of the answer is 0.700 in the clean run, and 0 with "
        "oat and 0.0300 with gaussian-3 in the corrupted one."
    )
    starts = [f"The largest AIE of restoring the {config.SITES[site]} of one layer is, with oat" for site in SITES]
    assert [sentence.split(", at")[0] for sentence in sentences] == starts
    for site, sentence in zip(SITES, sentences, strict=True):
        for name in ("oat", "gaussian-3"):
            rows = curve(table, corruption=name, site=site, window=1)
            peak = rows.sort_values("aie").iloc[-1]
            along = curve(rows, position=peak["position"])["aie"]
            share = numbers.three_digits(100 * peak["aie"] / along[along > 0].sum())
            where = f"with {name}, at layer {peak['layer']}, {config.POSITIONS[peak['position']]}"
            assert f"{where} ({peak['aie']:.4f} ± {peak['se']:.4f}, {share}\u00a0% of the positive effect" in sentence


def test_intro_does_without_optimal_ablation_or_noise():
    text = tracing_report.tracing_section(
        "facts", fabricate(("mean", "oat_shared"), ("block",), windows=(9,)).assign(n=1), {}
    ).intro
    assert text.startswith("1 held-out fact, 2 corruptions.") and "0.0100 with oat_shared in the corrupted" in text
    assert (
        "The largest AIE of restoring the block output of a window of 9 layers is, with oat_shared, at layer 2, last "
        "token (" in text
    )
    none = fabricate(("gaussian-3",), ("mlp",), ("last",), (1,)).assign(aie=-0.1)
    assert tracing_report.tracing_section("facts", none, {}).intro.endswith(
        "with gaussian-3, at layer 0, last token (−0.100 ± 0.001)."
    )


def test_section_shows_probabilities_figures_and_peaks(drawn):
    table, pictures, (svgs, _) = drawn
    section = tracing_report.tracing_section("facts", table, svgs, {"in the file": 40, "completed": 30}, pictures)
    methods = tracing_report.tracing_methods_section(NAMES)
    page = check(render_page("t", {}, [section, methods]))
    assert page.count["figure"] == 3 and page.count["table"] == 2
    captions = [part.caption for part in section.parts if isinstance(part, parts.Figure)]
    assert (
        captions[0].startswith("Each line is the AIE of restoring the MLP output")
        and "“prompt 0” is to be completed by “Wes$t”." in captions[2]
    )
    left, peaks = (part.frame for part in section.parts if isinstance(part, parts.Table))
    assert left.values.tolist() == [
        [name, 1200, pytest.approx(0.7), pytest.approx(0.01 * i)] for i, name in enumerate(NAMES[:4])
    ]
    wanted = peak_table(table)
    assert (
        peaks["peak layer"].tolist() == [2] * 4 + [1] * 4
        and peaks["tokens"].tolist() == ["last token"] * 4 + ["last subject token"] * 4
    )
    assert peaks["AIE"].tolist() == [numbers.Estimate(*row) for row in wanted[["aie", "se"]].values.tolist()]
    assert peaks["share at peak"].tolist() == wanted["concentration"].tolist()
    assert isinstance(section.parts[0], parts.Definitions) and section.parts[0].items["completed"] == 30


def test_peaks_have_a_table_for_each_site_and_window():
    tables = [
        part for part in tracing_report.tracing_section("facts", fabricate(), {}).parts if isinstance(part, parts.Table)
    ]
    assert [part.caption.split(":")[0] for part in tables[1:]] == [
        *(
            "Attention output, one layer",
            "Attention output, windows of 5 layers",
            "MLP output, one layer",
            "MLP output, windows of 5 layers",
        ),
    ]
    assert sum(len(part.frame) for part in tables[1:]) == len(peak_table(fabricate()))


def test_every_corruption_has_a_note_with_its_own_scale():
    names = Tracing(noise_scales=(0.5, 3)).corruption_names()
    measures, notes = tracing_report.tracing_methods_section(names).parts
    assert (
        list(notes.items) == corruptions_in_order(names)
        and all(notes.items.values())
        and len(set(notes.items.values())) == len(names)
    )
    assert "of 0.5 times each coordinate's" in notes.items["gaussian-0.5"] and notes.items[
        "gaussian_scalar-3"
    ].startswith("Adds normal noise to the subject tokens' embeddings, of 3 times one")
    assert set(measures.items) == {"AIE", "restored place", "normalised AIE", "share at peak"}


def test_figure_without_a_caption_is_refused():
    with pytest.raises(ValueError, match="figures: aiemlp; captions exist for aie_"):
        tracing_report.tracing_section("facts", fabricate(), {"aiemlp": "<svg/>"})
    with pytest.raises(ValueError, match="figures: fact_1; pictures has 1 facts"):
        tracing_report.tracing_section("facts", fabricate(), {"fact_1": "<svg/>"}, pictures=paint())


def test_tables_read_back_from_csv_give_the_same_section(tmp_path):
    table = fabricate()
    table.to_csv(tmp_path / "aie.csv", index=False)
    sections = [
        tracing_report.tracing_section("facts", frame, {}) for frame in (table, pd.read_csv(tmp_path / "aie.csv"))
    ]
    assert render_page("t", {}, sections[:1]) == render_page("t", {}, sections[1:])
