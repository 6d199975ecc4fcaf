"""Lenses in figures, drawn prompts and the report's section on them, on fabricated tables with a known structure."""

import functools
import re
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import same_color
from test_report import check

from oacore.config import lenses as config
from oacore.errors import UserError
from oacore.lenses import drawing as lens_drawing
from oacore.lenses import plots as lens_plots
from oacore.lenses import report as lens_report
from oacore.lenses import tables
from oacore.lenses.drawing import token_grid_svg, visible
from oacore.lenses.report import compare_losses, loss_sentence
from oacore.report import figures as plots
from oacore.report import numbers, parts
from oacore.report.page import render_page

SVG = "{http://www.w3.org/2000/svg}"
WORSE = {  # times the loss of OCA
    ("oca", ""): 1.0,
    ("tuned", "identity"): 1.6,
    ("tuned", "random"): 2.0,
    ("logit", ""): 4.0,
    ("mean", ""): 1.5,
}
NAMES = ["oca", "tuned (identity)", "tuned (random)", "logit", "mean"]


def frame(rows, columns):
    return pd.DataFrame(rows, columns=["lens", "init", "layer", *columns.split()])


def loss_table(layers=5, worse=WORSE):
    rows = [
        (*key, layer, w * 3 * 0.5**layer, 0.02 * w * 3 * 0.5**layer, 0.9 ** (w + 1), 2000)
        for key, w in worse.items()
        for layer in range(layers)
    ]
    return frame(rows, "kl_nats se_nats top1_agreement n")


def lengths_table(layers=7):
    rows = [
        (*key, layer, n, w * 3 * 0.5**layer * (1 + abs(n - 25) / 50), 0.01, 500)
        for key, w in WORSE.items()
        for layer in range(layers)
        for n in (5, 10, 25, 50, 100)
    ]
    return frame(rows, "n_tokens kl_nats se_nats n")


def faithfulness_table(layers=3, perturbations=("resample_20", "project_random", "resample_5", "steer_singular")):
    rows = []
    for key, w in WORSE.items():
        for layer in range(layers):
            for i, perturbation in enumerate(perturbations):
                similarity, correlation = (layer + 1) / layers / w - 0.02 * i, (layer + 1) / layers / w**0.5 - 0.03 * i
                rows.append(
                    (
                        *key,
                        layer,
                        perturbation,
                        similarity,
                        similarity - 0.03,
                        similarity + 0.04,
                        correlation,
                        correlation - 0.01,
                        correlation + 0.02,
                        90,
                    )
                )
    columns = "perturbation similarity similarity_low similarity_high correlation correlation_low correlation_high n"
    return frame(rows, columns).assign(direction_correlation=lambda table: table["correlation"] ** 2)


def truthfulness_table(layers=4, datasets=("sst2", "trec")):
    rows = []
    for d, dataset in enumerate(datasets):
        for demonstrations in ("permuted", "true"):
            for key, w in WORSE.items():
                for layer in range(layers):
                    accuracy = (
                        0.4 + 0.1 * d + 0.02 * layer / w - 0.05 * (demonstrations == "permuted" and layer == layers - 1)
                    )
                    rows.append((*key, layer, dataset, demonstrations, accuracy, 0.01 * (d + 1), 300))
    return frame(rows, "dataset demonstrations accuracy se n")


@functools.cache
def all_figures():
    return lens_plots.lens_figures(
        loss_table(), lengths_table(), faithfulness_table(), truthfulness_table(), fitted_at=25
    )


def lines(ax):
    return {line.get_label(): line for line in ax.lines if not line.get_label().startswith("_")}


def bands(ax):
    """The bands by colour of their lens: {colour: [(x, low, high), ...]} sorted by x."""
    found = []
    for band in ax.collections:
        if band.get_paths() and band.get_alpha():
            points = band.get_paths()[0].vertices
            x = np.unique(points[:, 0])
            found.append(
                (
                    band.get_facecolor()[0, :3],
                    x,
                    [points[points[:, 0] == v, 1].min() for v in x],
                    [points[points[:, 0] == v, 1].max() for v in x],
                )
            )
    return found


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def of(table, name):
    keys = {tables.lens_name(*key): key for key in WORSE}
    return table[(table["lens"] == keys[name][0]) & (table["init"] == keys[name][1])]


# ---- Figures ---------------------------------------------------------------------------------------------------------


def test_names_and_order_of_figures():
    assert list(all_figures()) == ["loss", "agreement", "lengths", "similarity", "correlation", "truthfulness"]
    assert list(lens_plots.lens_figures(loss_table())) == ["loss", "agreement"]
    assert list(
        lens_plots.lens_figures(loss_table(), lengths_table().iloc[:0], faithfulness_table().assign(correlation=np.nan))
    )[2:] == ["similarity"]


def test_loss_figure_draws_the_table_with_95_percent_bands():
    table = loss_table().sample(frac=1, random_state=0)
    figure = lens_plots.loss_curves(table)
    (ax,) = figure.axes
    assert ax.get_yscale() == "log" and "nats" in ax.get_ylabel() and legend(figure) == NAMES
    drawn = lines(ax)
    assert set(drawn) == set(NAMES)
    for name, line in drawn.items():
        rows = of(table, name).sort_values("layer")
        np.testing.assert_allclose(line.get_xydata(), rows[["layer", "kl_nats"]])
        band = [
            b
            for b in bands(ax)
            if same_color(b[0], line.get_color()) and np.isclose(b[3][0], rows["kl_nats"].iloc[0] * 1.0392)
        ]
        assert len(band) == 1
        np.testing.assert_allclose(band[0][2], rows["kl_nats"] - 1.96 * rows["se_nats"])
        np.testing.assert_allclose(band[0][3], rows["kl_nats"] + 1.96 * rows["se_nats"])


def test_oca_is_orange_and_on_top_and_the_fits_of_the_tuned_lens_are_blue_and_differ():
    for figure in all_figures().values():
        for ax in figure.axes:
            drawn = lines(ax)
            assert drawn["oca"].get_color() == plots.ACCENT
            assert drawn["oca"].get_zorder() > max(line.get_zorder() for name, line in drawn.items() if name != "oca")
            identity, random = drawn["tuned (identity)"], drawn["tuned (random)"]
            assert identity.get_color() == random.get_color() == config.LENSES["tuned"].look.color
            assert identity.get_linestyle() == "-" != random.get_linestyle()
    looks = [row.look for row in config.LENSES.values()]
    assert len({look.color for look in looks}) == len({look.marker for look in looks}) == len(looks)


def test_agreement_in_percent():
    table = loss_table()
    (ax,) = lens_plots.agreement_curves(table).axes
    for name, line in lines(ax).items():
        np.testing.assert_allclose(line.get_ydata(), 100 * of(table, name)["top1_agreement"])


def test_lengths_at_four_layers_with_the_fitted_one_marked():
    table = lengths_table(7)
    figure = lens_plots.length_curves(table, fitted_at=25)
    assert [ax.get_title(loc="left") for ax in figure.axes] == ["layer 0", "layer 2", "layer 4", "layer 6"]
    assert legend(figure) == [*NAMES, "length of the fits"]
    for ax, layer in zip(figure.axes, (0, 2, 4, 6), strict=True):
        for name, line in lines(ax).items():
            rows = of(table, name)
            np.testing.assert_allclose(line.get_xydata(), rows.loc[rows["layer"] == layer, ["n_tokens", "kl_nats"]])
        assert [line.get_xdata() for line in ax.lines if line.get_label().startswith("_")] == [[25, 25]]
    plain = lens_plots.length_curves(table)
    assert legend(plain) == NAMES and not [line for line in plain.axes[0].lines if line.get_label().startswith("_")]
    assert len(lens_plots.length_curves(lengths_table(2)).axes) == 2


@pytest.mark.parametrize("measure", ["similarity", "correlation"])
def test_faithfulness_has_a_panel_per_perturbation_with_its_intervals(measure):
    table = faithfulness_table()
    figure = lens_plots.faithfulness_curves(table, measure)
    order = ["project_random", "steer_singular", "resample_5", "resample_20"]
    assert [ax.get_title(loc="left") for ax in figure.axes] == [name.replace("_", " ") for name in order]
    for ax, perturbation in zip(figure.axes, order, strict=True):
        for name, line in lines(ax).items():
            rows = of(table, name)
            rows = rows[rows["perturbation"] == perturbation]
            np.testing.assert_allclose(line.get_xydata(), rows[["layer", measure]])
            assert any(
                np.allclose(b[2], rows[f"{measure}_low"]) and np.allclose(b[3], rows[f"{measure}_high"])
                for b in bands(ax)
            )
            assert ax.get_ylim()[0] <= rows[f"{measure}_low"].min() and rows[measure].max() <= ax.get_ylim()[1]


def test_truthfulness_is_the_mean_of_data_sets():
    table = truthfulness_table()
    figure = lens_plots.truthfulness_curves(table)
    assert [ax.get_title(loc="left") for ax in figure.axes] == ["true demonstrations", "permuted demonstrations"]
    for ax, kind in zip(figure.axes, ("true", "permuted"), strict=True):
        for name, line in lines(ax).items():
            rows = of(table, name)
            rows = rows[rows["demonstrations"] == kind]
            mean = np.mean([rows.loc[rows["dataset"] == d, "accuracy"] for d in ("sst2", "trec")], axis=0)
            np.testing.assert_allclose(line.get_ydata(), 100 * mean)
            half = 1.96 * np.hypot(0.01, 0.02) / 2
            assert any(
                np.allclose(b[2], 100 * (mean - half)) and np.allclose(b[3], 100 * (mean + half)) for b in bands(ax)
            )


def test_data_sets_that_some_lens_lacks_do_not_enter_the_mean():
    table = truthfulness_table()
    partly = table[~((table["dataset"] == "trec") & (table["lens"] == "logit") & (table["layer"] == 2))]
    means = tables.mean_over_datasets(partly)
    pd.testing.assert_frame_equal(means, tables.mean_over_datasets(table[table["dataset"] == "sst2"]))
    assert set(means["datasets"]) == {1}
    neither = partly[~((partly["dataset"] == "sst2") & (partly["lens"] == "oca") & (partly["layer"] == 0))]
    with pytest.raises(ValueError, match="truthfulness: no data set was measured with every lens"):
        lens_plots.truthfulness_curves(neither)


def test_same_bytes_in_any_order_of_rows_and_read_back_from_csv(tmp_path):
    tables = (loss_table(), lengths_table(1), faithfulness_table(2, ("steer_random",)), truthfulness_table(2))
    tables = tuple(table[table["lens"].isin(["oca", "tuned"])] for table in tables)

    def save(folder, change):
        figures = lens_plots.lens_figures(*map(change, tables))
        figures = {
            name: figure for name, figure in figures.items() if name not in ("agreement", "correlation", "truthfulness")
        }  # drawn as others are
        return {
            name: plots.save(figure, tmp_path / f"{folder}_{name}")[0].read_text() for name, figure in figures.items()
        }

    def read_back(table):
        table.sample(frac=1, random_state=4).to_csv(tmp_path / "table.csv", index=False)
        return pd.read_csv(tmp_path / "table.csv")

    assert save("first", lambda table: table) == save("second", read_back)


EDGE_CASES = {
    "one layer": [("oca", "", 0, 1.0, 0.1, 0.5, 9)],
    "no standard error": [("oca", "", 0, 1.0, np.nan, 0.5, 9), ("logit", "", 0, 3.0, np.nan, 0.1, 9)],
    "equal": [("oca", "", 0, 1.0, 0.0, 0.5, 9), ("oca", "", 1, 1.0, 0.0, 0.5, 9)],
    "KL 0": [("oca", "", 0, 1.0, 0.1, 0.5, 9), ("oca", "", 1, 0.0, 0.0, 1.0, 9)],
    "only KL 0": [("oca", "", 0, 0.0, 0.0, 1.0, 9), ("tuned", "identity", 0, 0.0, 0.0, 1.0, 9)],
    "KL below 0": [("oca", "", 0, -1e-9, 1e-8, 1.0, 9), ("tuned", "identity", 0, 2.0, 0.1, 1.0, 9)],
    "wide band": [("oca", "", 0, 1.0, 3.0, 0.5, 9), ("oca", "", 1, 0.1, 0.5, 0.5, 9)],
    "not at every layer": [
        ("oca", "", 0, 1.0, 0.1, 0.5, 9),
        ("oca", "", 4, 0.1, 0.1, 0.5, 9),
        ("grad", "", 2, 0.5, 0.1, 0.4, 9),
    ],
    "without oca": [("logit", "", 0, 1.0, 0.1, 0.5, 9)],
    "unknown": [("new", "strange", 3, 1.0, 0.1, 0.5, 9)],
    "not measured": [("oca", "", 0, np.nan, np.nan, 0.5, 9), ("oca", "", 1, 1.0, 0.1, 0.5, 9)],
}


@pytest.mark.parametrize("rows", EDGE_CASES.values(), ids=EDGE_CASES)
def test_any_table_gives_figures_and_a_section(rows, tmp_path):
    table = frame(rows, "kl_nats se_nats top1_agreement n")
    figures = lens_plots.lens_figures(table)
    (ax,) = figures["loss"].axes
    low, high = ax.get_ylim()
    assert 0 < low < high < 1e5 * low
    drawn = lines(ax)
    assert len(drawn) == table.loc[table["kl_nats"].notna(), "lens"].nunique()
    for line in drawn.values():
        assert ((line.get_ydata() >= low) & (line.get_ydata() <= high)).all()
    assert sum(low <= tick <= high for tick in ax.get_yticks()) >= 2
    floored = int((table["kl_nats"] <= 0).sum())
    assert floored == sum(len(c.get_offsets()) for c in ax.collections if c.get_alpha() is None)
    assert (f"{floored} ≤ " in legend(figures["loss"])[-1]) == bool(floored)
    svgs = {"loss": plots.save(figures["loss"], tmp_path / "loss")[0].read_text()}
    check(render_page("t", {}, [lens_report.lens_section("task", table, svgs, {})]))


def test_bad_tables_are_refused_by_name():
    table = loss_table()
    with pytest.raises(ValueError, match="loss: no column se_nats; found lens, init, layer"):
        lens_plots.lens_figures(table.drop(columns="se_nats"))
    with pytest.raises(ValueError, match="loss: no row with a value in kl_nats"):
        lens_plots.lens_figures(table.assign(kl_nats=np.nan))
    with pytest.raises(ValueError, match=r"loss: infinite kl_nats for tuned \(random\) at layer 2"):
        lens_plots.loss_curves(
            table.assign(kl_nats=table["kl_nats"].where((table["init"] != "random") | (table["layer"] != 2), np.inf))
        )
    with pytest.raises(ValueError, match="loss: two rows for name oca, layer 0"):
        lens_plots.loss_curves(pd.concat([table, table.iloc[:1]]))
    with pytest.raises(ValueError, match="loss: no column top1_agreement"):
        lens_plots.agreement_curves(table.drop(columns="top1_agreement"))
    with pytest.raises(ValueError, match="lengths: no column n_tokens"):
        lens_plots.length_curves(lengths_table().drop(columns="n_tokens"))
    with pytest.raises(ValueError, match="faithfulness: no column similarity_low"):
        lens_plots.lens_figures(table, faithfulness=faithfulness_table().drop(columns="similarity_low"))
    with pytest.raises(ValueError, match="faithfulness: no row with a value in similarity"):
        lens_plots.lens_figures(table, faithfulness=faithfulness_table().assign(similarity=np.nan, correlation=np.nan))
    with pytest.raises(ValueError, match="truthfulness: no column dataset, se"):
        lens_plots.truthfulness_curves(truthfulness_table().drop(columns=["dataset", "se"]))


# ---- Drawn prompts ---------------------------------------------------------------------------------------------------

NASTY = ["<script>", " a & b", "\"quoted'", "\n", "x" * 60, "", "日本語の長い言葉", "\x00\x1b\ufffe", "]]>", "\u202e\t"]


def picture(
    tokens=("<s>", " Mary", " went"),
    layers=4,
    lenses=(("oca", ""), ("logit", ""), ("tuned", "identity")),
    k=3,
    words=NASTY,
    prompt="p",
):
    rng = np.random.default_rng(0)
    rows = []
    for lens, init in lenses:
        for layer in range(layers):
            for position, token in enumerate(tokens):
                share = np.sort(rng.dirichlet(np.full(k + 1, 0.3)))[::-1]
                chosen = rng.permutation(len(words))[:k]
                rows += [
                    (prompt, lens, init, layer, position, token, j + 1, words[chosen[j]], share[j]) for j in range(k)
                ]
    return pd.DataFrame(rows, columns=list(lens_drawing.COLUMNS))


def groups(root, kind):
    return [group for group in root.iter(f"{SVG}g") if group.get("class") == kind]


def texts(element):
    return [text.text for text in element.iter(f"{SVG}text")]


def box(group):
    return [float(group.find(f"{SVG}rect").get(key)) for key in ("x", "y", "width", "height")]


def test_every_cell_shows_its_top_token_and_its_panel_every_probability():
    table = picture()
    root = ElementTree.fromstring(token_grid_svg(table))
    cells, spots = groups(root, "cell"), groups(root, "spot")
    assert len(groups(root, "grid")) == 3 and len(cells) == len(spots) == 3 * 4 * 3
    by_place = {tuple(box(spot)[:2]): spot for spot in spots}
    places = iter(cells)
    for (lens, init), mine in table.groupby(["lens", "init"], sort=False):
        for (layer, position), rows in mine.groupby(["layer", "position"]):
            cell = next(places)
            (shown,) = texts(cell)
            first = visible(rows["predicted"].iloc[0])
            assert shown == first or (shown.endswith("…") and first.startswith(shown[:-1]))
            assert cell.find(f"{SVG}rect").get("fill") == lens_drawing.shade(rows["probability"].iloc[0])
            spot = by_place[tuple(box(cell)[:2])]
            panel = texts(groups(spot, "tip")[0])
            assert [t for t in panel if t.endswith("%")] == [lens_drawing.percent(p) for p in rows["probability"]]
            assert panel[0].startswith(f"layer {layer}, after ")
            header, *listed = spot.find(f"{SVG}title").text.split("\n")
            name = tables.lens_name(lens, init)
            assert header == f"{name}, layer {layer}, position {position} after {visible(rows['token'].iloc[0])}"
            assert listed == [
                f"{r.rank}. {visible(r.predicted)} {lens_drawing.percent(r.probability)}" for r in rows.itertuples()
            ]


def test_last_layer_is_on_top_and_positions_go_to_the_right():
    root = ElementTree.fromstring(token_grid_svg(picture(lenses=(("oca", ""),))))
    cells = np.array([box(cell) for cell in groups(root, "cell")]).reshape(4, 3, 4)  # layer, position
    assert (np.diff(cells[:, :, 1], axis=0) < 0).all() and (np.diff(cells[:, :, 0], axis=1) > 0).all()
    words = texts(groups(root, "grid")[0])
    assert words[:5] == ["oca", "3", "2", "1", "0"] and words[5:8] == ["<s>", "·Mary", "·went"]


@pytest.mark.parametrize(
    ("tokens", "layers"), [(("a",), 1), (NASTY, 5), ([f" token{i}" for i in range(60)], 2), ((" a", " b"), 24)]
)
def test_nothing_overlaps_or_leaves_its_cell_or_the_picture(tokens, layers):
    root = ElementTree.fromstring(
        token_grid_svg(picture(tokens, layers, prompt="A long prompt, longer than its picture is wide. " * 9))
    )
    width, height = float(root.get("width")), float(root.get("height"))
    cells = groups(root, "cell")
    boxes = np.array([box(cell) for cell in cells])
    left, top, right, bottom = boxes[:, 0], boxes[:, 1], boxes[:, 0] + boxes[:, 2], boxes[:, 1] + boxes[:, 3]
    apart = (left[:, None] >= right) | (top[:, None] >= bottom)
    assert (apart | apart.T | np.eye(len(boxes), dtype=bool)).all()
    assert left.min() > 0 and top.min() > 40 and right.max() < width and bottom.max() < height - 20
    for cell, size in zip(cells, boxes, strict=True):
        assert lens_drawing.text_width(texts(cell)[0], lens_drawing.SIZE) <= size[2]
    for spot in groups(root, "spot"):
        (tip,) = groups(spot, "tip")
        x, y = map(float, re.findall(r"[\d.]+", tip.get("transform")))
        _, _, w, h = box(tip)
        assert x >= 0 and y >= 0 and x + w <= width and y + h <= height
        cell_x, _, cell_w, _ = box(spot)
        assert x >= cell_x + cell_w or x + w <= cell_x, "a panel beside its cell"
        for line, text in enumerate(texts(tip)[1 : 1 + 3]):
            assert lens_drawing.text_width(text, lens_drawing.SIZE) <= 96, line
    assert max(lens_drawing.text_width(text, 14) for text in texts(root)[:1]) < width


def test_text_stands_out_from_every_shade():
    for probability in np.linspace(0, 1, 101):
        fill = lens_drawing.shade(probability)
        assert lens_drawing.contrast(lens_drawing.ink_on(fill), fill) > 4
    assert (
        lens_drawing.ink_on(lens_drawing.shade(0.02)) == lens_drawing.DARK
        and lens_drawing.ink_on(lens_drawing.shade(0.98)) == "#ffffff"
    )


@pytest.mark.parametrize(
    ("token", "shown"),
    [
        (" the", "·the"),
        ("\n", "↵"),
        ("a\tb\r", "a⇥b␍"),
        ("", "∅"),
        (np.nan, "∅"),
        ("\x00", "\ufffd"),
        ("\ud800", "\ufffd"),
        ("\xa0", "␣"),
        (12, "12"),
        ("<", "<"),
    ],
)
def test_tokens_are_made_visible(token, shown):
    assert visible(token) == shown


def test_the_prompts_own_next_token_is_outlined():
    table = picture(("a", "b", "c"), 2, (("oca", ""),), k=1, words=["z"])
    table.loc[(table["layer"] == 1) & (table["position"] == 0), "predicted"] = "b"
    table.loc[(table["layer"] == 0) & (table["position"] == 2), "predicted"] = "c"  # nothing follows
    root = ElementTree.fromstring(token_grid_svg(table))
    key, outline = [rect for rect in root.iter(f"{SVG}rect") if rect.get("class") == "next"]
    cell = next(cell for cell in groups(root, "cell") if texts(cell) == ["b"])
    assert (
        box(cell)[0] < float(outline.get("x")) < box(cell)[0] + 2
        and box(cell)[1] < float(outline.get("y")) < box(cell)[1] + 2
    )
    assert float(key.get("y")) < box(cell)[1]


def test_drawing_does_not_depend_on_the_order_of_cells_and_keeps_that_of_lenses():
    table = picture()
    first = token_grid_svg(table)
    assert (
        first
        == token_grid_svg(table)
        == token_grid_svg(table.sort_values(["position", "rank", "layer"], kind="stable"))
    )
    names = [texts(grid)[0] for grid in groups(ElementTree.fromstring(first), "grid")]
    assert names == ["oca", "logit", "tuned (identity)"]
    assert first.encode("utf-8").decode("utf-8") == first


def test_several_drawings_share_a_page_and_nasty_tokens_are_text():
    drawings = {
        f"<i>{n}": token_grid_svg(picture(NASTY, 2, words=[*NASTY, f"word{n}"], prompt="<b>p & q</b>\n\x00"))
        for n in range(2)
    }
    text = render_page("t", {}, [lens_report.lens_section("task", loss_table(), {}, drawings)])
    page = check(text)
    assert (
        page.count["svg"] == 2
        and page.count["i"] == 0
        and page.count["b"] == len(re.findall("<b>(?:Figure|Table) ", text))
    )
    assert "<script>" in page.text and "Prompt <b>p & q</b>" in page.text
    drawn = re.findall(r'<svg[^>]* class="(t[0-9a-f]{10})"(.*?)</svg>', text, re.S)
    assert len({name for name, _ in drawn}) == 2
    for name, inside in drawn:
        rules = re.search("<style>(.*?)</style>", inside, re.S)[1].split("}")[:-1]
        assert rules and all(re.match(rf"\s*#part-1-\d+ \.{name} \.", rule) for rule in rules)
        assert any(".spot:hover .tip{display:inline" in rule for rule in rules)


def changed(column, value, row=0):
    table = picture()
    table[column] = table[column].astype(object)
    table.loc[row, column] = value
    return table


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (picture().drop(columns="rank"), "picture: no column rank; found prompt, lens"),
        (picture().iloc[:0], "picture: 0 prompts; a picture shows one"),
        (changed("prompt", "other"), "picture: 2 prompts; a picture shows one"),
        (
            changed("probability", 1.5),
            "picture: probability 1.5 of oca, layer 0, position 0; allowed are numbers from 0 to 1",
        ),
        (changed("probability", np.nan), "picture: probability nan of oca, layer 0"),
        (changed("rank", 2), "picture: two tokens of rank 2 for oca, layer 0, position 0"),
        (changed("rank", 4), "picture: no token of rank 1 for oca, layer 0, position 0"),
        (changed("token", "other"), "picture: 2 tokens at position 0"),
    ],
)
def test_bad_pictures_are_user_errors(table, message):
    with pytest.raises(UserError, match=message):
        token_grid_svg(table)


# ---- The section -----------------------------------------------------------------------------------------------------


def with_loss(changes):
    table = loss_table(6)
    for lens, init, layer, kl, se in changes:
        chosen = (table["lens"] == lens) & (table["init"] == init) & (table["layer"] == layer)
        table.loc[chosen, ["kl_nats", "se_nats"]] = kl, se
    return table


def test_sentence_follows_the_data():
    assert (
        loss_sentence(loss_table(), "logit")
        == "OCA's KL is below the logit lens's by more than two standard errors at all 5 layers."
    )
    changes = [
        ("tuned", "random", 0, 2.0, 0.03),
        ("tuned", "identity", 1, 1.51, 0.03),
        ("tuned", "identity", 5, 0.1, np.nan),
    ]
    text = loss_sentence(with_loss(changes), "tuned")
    assert text == (
        "OCA's KL is below the tuned lens's (the best of its 2 fits at each layer) by more than two standard errors at "
        "3 of 6 layers; above it by more than that at layer 0; within two standard errors of it at layer 1; left open "
        "at layer 5 for want of a standard error; the most above at layer 0, 3.00 ± 0.06 against 2.00 ± 0.03 nats."
    )
    assert loss_sentence(loss_table().query("lens != 'oca'"), "tuned") == loss_sentence(loss_table(), "grad") == ""


@pytest.mark.parametrize("seed", range(5))
def test_intro_recomputed(seed):
    rng = np.random.default_rng(seed)
    table = loss_table(12)
    table["kl_nats"] *= np.exp(0.5 * rng.normal(size=len(table)))
    table["se_nats"] = 0.2 * table["kl_nats"]
    intro = lens_report.lens_section("t", table.sample(frac=1, random_state=seed), {}, {}).intro
    assert intro.startswith("4 lenses at 12 layers, each on 2,000 held-out prompts. ")
    for other in ("tuned", "logit"):
        verdicts = []
        for layer in range(12):
            rows = table[table["layer"] == layer]
            own = rows[rows["lens"] == "oca"].iloc[0]
            best = min((row for _, row in rows[rows["lens"] == other].iterrows()), key=lambda row: row["kl_nats"])
            z = (own["kl_nats"] - best["kl_nats"]) / (own["se_nats"] ** 2 + best["se_nats"] ** 2) ** 0.5
            verdicts.append("below" if z < -2 else "above" if z > 2 else "equal")
        assert compare_losses(table, other)["verdict"].tolist() == verdicts
        below = verdicts.count("below")
        share = "all 12" if below == 12 else f"{below or 'none'} of 12"
        assert re.search(rf"the {other} lens's .*?by more than two standard errors at {share} layers", intro)


def test_section_shows_figures_tables_and_drawings(tmp_path):
    svgs = dict.fromkeys(all_figures(), '<svg xmlns="http://www.w3.org/2000/svg"><text>stub</text></svg>')
    svgs["truthfulness"] = plots.save(lens_plots.truthfulness_curves(truthfulness_table()), tmp_path / "figure")[
        0
    ].read_text()
    tables = (loss_table(), faithfulness_table(), truthfulness_table())
    section = lens_report.lens_section("ioi", tables[0], svgs, {"One prompt.": token_grid_svg(picture())}, *tables[1:])
    assert section.title == "ioi: lenses"
    page = check(render_page("t", {}, [section, lens_report.lens_methods_section(["tuned", "oca", "new"])]))
    assert page.count["figure"] == 7 and page.count["table"] == 5
    for caption in lens_report.CAPTIONS.values():
        assert caption in page.text
    assert config.LENSES["oca"].note in page.text and config.LENSES["mean"].note not in page.text
    losses, similarity, correlation, directions, truthfulness = (
        part.frame for part in section.parts if isinstance(part, parts.Table)
    )
    assert list(losses) == ["layer", *NAMES] and losses["layer"].tolist() == list(range(5))
    for name in NAMES:
        rows = of(tables[0], name)
        assert losses[name].tolist() == [
            numbers.Estimate(kl, se) for kl, se in zip(rows["kl_nats"], rows["se_nats"], strict=True)
        ]
        measures = ("similarity", "correlation", "direction_correlation")
        for measure, shown in zip(measures, (similarity, correlation, directions), strict=True):
            means = of(tables[1], name).groupby("perturbation")[measure].mean()
            np.testing.assert_allclose(shown.set_index("perturbation")[name], means.loc[shown["perturbation"]])
    row = truthfulness.set_index("lens").loc["oca"]
    assert (row["true: at layer"], row["permuted: at layer"]) == (3, 2)
    assert row["permuted: best (%)"].value == pytest.approx(49) and row[
        "permuted: last layer (%)"
    ].value == pytest.approx(46)
    assert (
        "With permuted demonstrations, OCA answers best at layer 2 (49.0 ± 1.1\u00a0% calibrated accuracy; 46.0 ± "
        "1.1\u00a0% at its last)." in section.intro
    )


def test_faithfulness_sentence_counts_intervals_that_are_apart():
    table = faithfulness_table(3, ("steer_random",))
    first, second = lens_report.faithfulness_sentences(table)
    oca, tuned = of(table, "oca"), of(table, "tuned (identity)")  # the better of the two everywhere
    above = int((oca["similarity_low"].to_numpy() > tuned["similarity_high"].to_numpy()).sum())
    assert (
        above == 3
        and "at all 3 pairs of a perturbation and a layer, and less at 0." in first
        and "(correlation," in second
    )
    worse = table.assign(similarity_low=-1.0)
    assert "at none of 3 pairs" in lens_report.faithfulness_sentences(worse)[0]
    assert lens_report.faithfulness_sentences(table[table["lens"] != "tuned"]) == []


def test_missing_cells_and_csv_give_the_same_section(tmp_path):
    table = loss_table().drop(index=3)
    table.to_csv(tmp_path / "loss.csv", index=False)
    sections = [lens_report.lens_section("t", data, {}, {}) for data in (table, pd.read_csv(tmp_path / "loss.csv"))]
    assert sections[0].parts[0].frame["oca"].isna().tolist() == [False, False, False, True, False]
    assert render_page("t", {}, sections[:1]) == render_page("t", {}, sections[1:])


def test_every_lens_has_a_note_and_a_figure_without_a_caption_is_refused():
    (notes,) = lens_report.lens_methods_section([*config.LENSES, "new"]).parts
    assert list(notes.items) == [*config.LENSES, "new"] and notes.items["new"] == ""
    assert all(notes.items[name] for name in config.LENSES)
    with pytest.raises(ValueError, match="figures: los; captions exist for loss, agreement"):
        lens_report.lens_section("t", loss_table(), {"los": "<svg/>"}, {})
