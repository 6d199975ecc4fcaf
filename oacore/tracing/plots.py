"""Causal tracing in figures and one table: which layers, restored at which tokens, bring a corrupted fact back?

The tables are the ones that a run writes: `aie` has one row per corruption, site, position, window and layer, `picture`
one per corruption, site, layer and token of one fact; see `oacore.tracing.tables`. No
model: as in `oacore.ablation.plots`, figures depend on the tables alone.
"""

from collections.abc import Iterable, Sequence
from math import isnan
from textwrap import fill
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, LinearSegmentedColormap, Normalize, to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from oacore.config.colors import ACCENT, BLUE, INK, SLATE
from oacore.config.tracing import (
    CORRUPTIONS,
    POSITIONS,
    SITES,
    UNKNOWN,
    LineStyle,
    Stroke,
    corruptions_in_order,
    kind_and_scale,
    noises,
    usual_noise,
)
from oacore.report.figures import every_few, styled, tint
from oacore.report.numbers import Z95, three_digits
from oacore.report.series import in_order
from oacore.tracing.tables import PICTURE_COLUMNS, traced_rows

MARKED_LAYERS = 12  # up to so many layers each has a marker, beyond only some
# Noise of other scales than the usual one.
DASHES: tuple[LineStyle, ...] = (
    (0, (1, 1.4)),
    (0, (3, 1.6)),
    (0, (6, 2)),
    (0, (6, 1.6, 1, 1.6)),
    (0, (3, 1.4, 1, 1.4, 1, 1.4)),
)

USUAL_NOISE_STROKE = Stroke(BLUE, marker="s", width=1.6, band=0.2)


def tracing_figures(aie: pd.DataFrame, pictures: pd.DataFrame | None = None) -> dict[str, Figure]:
    """The figures by name, in the order to show them: `aie_{site}`, `noise_scales` if noise has two scales or kinds,
    `fact_0`, ...

    `pictures` holds the rows of several facts, drawn in the order of column `fact`. Raises ValueError as the figures
    do.
    """
    aie = traced_rows(aie)
    facts = (
        []
        if pictures is None or pictures.empty
        else sorted(set(traced_rows(pictures, "p_restored", "pictures", PICTURE_COLUMNS)["fact"]))
    )
    figures = {f"aie_{site}": aie_curves(aie, site) for site in in_order(aie["site"], SITES)}
    if len(noises(aie["corruption"])) > 1:
        figures["noise_scales"] = noise_scales(aie)
    for number, fact in enumerate(facts):
        assert pictures is not None
        figures[f"fact_{number}"] = heat_map(pictures[pictures["fact"] == fact])
    return figures


@styled()
def aie_curves(aie: pd.DataFrame, site: str) -> Figure:
    """AIE over the layers of one site with 95 % bands: a column of panels per position, a row per window, a line per
    corruption.

    Raises ValueError as `traced_rows`, or if the table lacks the site.
    """
    aie = traced_rows(aie)
    if site not in set(aie["site"]):
        raise ValueError(f"aie: no site {site}; found {', '.join(in_order(aie['site'], SITES))}")
    aie = aie[aie["site"] == site]
    positions, windows = in_order(aie["position"], POSITIONS), sorted(set(aie["window"]))
    strokes = _strokes(aie["corruption"])
    figure, panels = _panels(len(windows), len(positions))
    for row, window in enumerate(windows):
        for column, position in enumerate(positions):
            shown = aie[(aie["window"] == window) & (aie["position"] == position)]
            _curves(panels[row, column], shown, strokes)
        panels[row, 0].set_ylabel(f"AIE, window of {window}" if window > 1 else "AIE, one layer")
    _finish(figure, panels, aie["layer"], positions, f"AIE of restoring the {SITES.get(site, site)} (probability)")
    _legend(figure, strokes)
    return figure


@styled()
def noise_scales(aie: pd.DataFrame) -> Figure:
    """AIE over layers under noise of each scale, the darker the stronger: panels of site and position, at the narrowest
    window.

    Noise with one standard deviation for all coordinates is dashed. Raises ValueError as `traced_rows`, or if the table
    has no noise.
    """
    aie = traced_rows(aie)
    names = noises(aie["corruption"])
    if not names:
        raise ValueError(
            f"aie: corruptions {', '.join(corruptions_in_order(aie['corruption']))}; this figure needs gaussian-<scale>"
        )
    aie = aie[aie["corruption"].isin(names)]
    aie = aie[aie["window"] == aie["window"].min()]
    sites, positions = in_order(aie["site"], SITES), in_order(aie["position"], POSITIONS)
    scales = sorted({kind_and_scale(name)[1] for name in names})
    shades = LinearSegmentedColormap.from_list("scales", ["#9cc3e6", BLUE, "#06243d"])(np.linspace(0, 1, len(scales)))
    strokes = {}
    for name in names:
        kind, scale = kind_and_scale(name)
        color = to_hex(shades[scales.index(scale)]) if len(scales) > 1 else BLUE
        dashed = kind != kind_and_scale(names[0])[0]
        strokes[name] = Stroke(color, (0, (4, 1.6)) if dashed else "-", "s" if dashed else "o", 1.4, 0.1)
    figure, panels = _panels(len(sites), len(positions))
    for row, site in enumerate(sites):
        for column, position in enumerate(positions):
            _curves(panels[row, column], aie[(aie["site"] == site) & (aie["position"] == position)], strokes)
        panels[row, 0].set_ylabel(f"AIE, {SITES.get(site, site)}")
    window = int(aie["window"].min())
    _finish(
        figure,
        panels,
        aie["layer"],
        positions,
        f"AIE by scale of the noise, {'one layer' if window == 1 else f'window of {window}'} (probability)",
    )
    _legend(figure, strokes)
    return figure


@styled()
def heat_map(picture: pd.DataFrame) -> Figure:
    """One fact, token by token: the answer's probability with one token's output restored around one layer.

    A row of panels per corruption, a column per site; tokens down, the subject's with an asterisk, layers across.
    Colours run from the lowest probability of a corrupted run to the clean run's. Raises ValueError as `traced_rows`,
    or if there is more than one fact or window.
    """
    picture = traced_rows(picture, "p_restored", "picture", PICTURE_COLUMNS)
    for name in ("fact", "window"):
        if len(several := sorted(set(picture[name]))) > 1:
            raise ValueError(f"picture: {name} {', '.join(map(str, several))}; one picture shows one {name}")
    picture = picture.astype({"layer": int, "position": int})
    corruptions, sites = corruptions_in_order(picture["corruption"]), in_order(picture["site"], SITES)
    tokens = picture.drop_duplicates("position").sort_values("position")
    first, last = int(tokens["position"].iloc[0]), int(tokens["position"].iloc[-1])
    labels = {
        int(p): _token(t) + "*" * bool(s)
        for p, t, s in zip(tokens["position"], tokens["token"], tokens["in_subject"], strict=True)
    }
    n_layers, n_tokens = int(picture["layer"].max()) + 1, last - first + 1
    p_clean, low = float(picture["p_clean"].max()), float(picture["p_corrupted"].min())
    high = max(p_clean, low + 1e-6)  # less is rounding
    norm, shades = Normalize(low, high), tint(ACCENT)
    colors = shades.with_extremes(bad="#cfd5dc", under=shades(0.0), over=shades(1.0))
    size = 8.5 if n_tokens <= 16 else 7
    width = min(8.6, 2.9 + len(sites) * min(3.0, max(1.7, 0.16 * n_layers)))
    figure = Figure(figsize=(width, 1.2 + len(corruptions) * (0.45 + n_tokens * (0.0195 * size))), layout="constrained")
    panels = figure.subplots(len(corruptions), len(sites), sharex=True, sharey=True, squeeze=False)
    for row, corruption in enumerate(corruptions):
        of_row = picture[picture["corruption"] == corruption]
        for column, site in enumerate(sites):
            ax: Axes = panels[row, column]
            cells = of_row[of_row["site"] == site]
            grid = np.full((n_tokens, n_layers), np.nan)
            grid[cells["position"] - first, cells["layer"]] = cells["p_restored"]
            edges = np.arange(n_layers + 1) - 0.5, np.arange(first, last + 2) - 0.5
            line: dict[str, Any] = {"edgecolors": "white", "linewidth": 0.5 if n_layers <= 24 else 0}
            ax.pcolormesh(*edges, np.ma.masked_invalid(grid), cmap=colors, norm=norm, **line)
            ax.set(xlim=(-0.5, n_layers - 0.5), ylim=(last + 0.5, first - 0.5))
            ax.tick_params(length=0)
            ax.spines[["left", "bottom"]].set_visible(False)
            ax.set_title(SITES.get(site, site) if row == 0 else "", fontsize=10)
        ax = panels[row, 0]
        ax.set_yticks(list(labels), list(labels.values()), fontsize=size, parse_math=False)
        for label, inside in zip(ax.get_yticklabels(), tokens["in_subject"], strict=True):
            label.set_fontweight("bold" if inside else "normal")
        ax.set_ylabel(f"{corruption}\np = {three_digits(float(of_row['p_corrupted'].iloc[0]))}", fontsize=9.5)
        row_of = CORRUPTIONS.get(kind_and_scale(corruption)[0])
        ax.yaxis.label.set_color(ACCENT if row_of is not None and row_of.fitted else INK)
    panels[0, 0].set_xticks(every_few(n_layers, 9))
    answer, window = _token(picture["answer"].iloc[0]), int(picture["window"].iloc[0])
    _title(figure, f"What brings back “{answer}” (clean p = {three_digits(p_clean)})")
    figure.supxlabel(
        "restored layer" if window == 1 else f"layer in the middle of the {window} restored ones", fontsize=10
    )
    _probability_bar(figure, panels, picture["p_restored"], norm, colors)
    return figure


def _probability_bar(figure: Figure, panels: np.ndarray, values: pd.Series, norm: Normalize, colors: Colormap) -> None:
    """The scale of colours; pointed where values lie outside of it."""
    extend = {(False, False): "neither", (True, False): "min", (False, True): "max", (True, True): "both"}
    ends = extend[bool((values < norm.vmin).any()), bool((values > norm.vmax).any())]
    bar = figure.colorbar(
        ScalarMappable(norm, colors), ax=list(panels.flat), aspect=28, pad=0.02, extend=ends, extendfrac=0.03
    )
    bar.outline.set_visible(False)
    bar.locator = MaxNLocator(6)
    bar.set_label("p(answer), restored")


def _strokes(corruptions: Iterable[str]) -> dict[str, Stroke]:
    """How each corruption is drawn, in order: the usual noise as itself, noise of other scales by dashes."""
    names = corruptions_in_order(corruptions)
    usual = usual_noise(names)
    others: dict[str, int] = {}  # how many of each kind of noise there have been
    strokes = {}
    for name in names:
        kind, scale = kind_and_scale(name)
        stroke = CORRUPTIONS[kind].look if kind in CORRUPTIONS else UNKNOWN
        if name == usual:
            stroke = USUAL_NOISE_STROKE
        elif not isnan(scale):
            number = others[kind] = others.get(kind, -1) + 1
            stroke = stroke._replace(style=DASHES[number % len(DASHES)])
        strokes[name] = stroke
    return strokes


def _panels(rows: int, columns: int) -> tuple[Figure, np.ndarray]:
    """A grid of axes that share their layers, and their values within a row."""
    figure = Figure(
        figsize=(1.1 + 2.5 * max(columns, 1.9), 1.55 + (1.75 if rows > 1 else 2.4) * rows), layout="constrained"
    )
    return figure, figure.subplots(rows, columns, sharex=True, sharey="row", squeeze=False)


def _curves(ax: Axes, shown: pd.DataFrame, strokes: dict[str, Stroke]) -> None:
    """A line and a band for each corruption, the first of `strokes` on top."""
    ax.axhline(0, color=SLATE, linewidth=0.8, zorder=1)
    ax.grid(axis="y")
    for z, (name, stroke) in enumerate(list(strokes.items())[::-1], start=2):
        curve = shown[shown["corruption"] == name].sort_values("layer", kind="stable")
        if curve.empty:
            continue
        x, y, half = (curve[column].to_numpy(float) for column in ("layer", "aie", "se"))
        half = Z95 * np.nan_to_num(half)
        ax.fill_between(
            x, y - half, y + half, color=stroke.color, alpha=stroke.band, linewidth=0, zorder=1 + z / 100
        )  # below every line
        step = 1 if len(x) <= MARKED_LAYERS else -(-len(x) // 8)
        marks = slice(
            (z * step // len(strokes)) % step, None, step
        )  # lines that lie on one another show their markers in turn
        line = ax.plot(x, y, color=stroke.color, linestyle=stroke.style, linewidth=stroke.width, zorder=z, label=name)[
            0
        ]
        line.set(marker=stroke.marker, markersize=4.2, markevery=marks, markeredgecolor="white", markeredgewidth=0.4)


def _finish(figure: Figure, panels: np.ndarray, layers: pd.Series, positions: Sequence[str], title: str) -> None:
    """Titles of the figure and of its columns, and whole layers on the axis that all panels share."""
    low, high = int(layers.min()), int(layers.max())
    air = max(0.25, 0.02 * (high - low))
    panels[0, 0].set_xlim(low - air, high + air)
    panels[0, 0].set_xticks([low + i for i in every_few(high - low + 1, 9)])
    for ax, position in zip(panels[0], positions, strict=True):
        ax.set_title(POSITIONS.get(position, position), fontsize=10)
    for ax in panels[-1]:
        ax.set_xlabel("layer")
    for ax in panels[:, 0]:
        ax.yaxis.set_major_locator(MaxNLocator(5))
    figure.align_ylabels(panels[:, 0])
    _title(figure, title)


def _title(figure: Figure, title: str) -> None:
    """A title over all panels, broken where it would run out of the figure; what a model writes is not read as
    mathematics.
    """
    wide = int(figure.get_figwidth() / 0.1)  # characters in bold 11 pt
    figure.suptitle(fill(title, wide), x=0.01, ha="left", fontsize=11, fontweight="bold", parse_math=False)


def _legend(figure: Figure, strokes: dict[str, Stroke]) -> None:
    """All corruptions below the panels, in rows of equal length."""
    keys = [
        Line2D(
            [],
            [],
            color=stroke.color,
            linestyle=stroke.style,
            linewidth=stroke.width,
            marker=stroke.marker,
            markersize=4.5,
            label=name,
        )
        for name, stroke in strokes.items()
    ]
    for key in keys:
        key.set(markeredgecolor="white", markeredgewidth=0.4)
    most = max(2, int(figure.get_figwidth() / 1.75))
    columns = -(-len(keys) // -(-len(keys) // most))
    figure.legend(handles=keys, loc="outside lower center", ncols=columns, columnspacing=1.4, handlelength=2.9)


def _token(text: object) -> str:
    """A token as a label: no space around it, line breaks and the like as \\n."""
    shown = str(text).strip(" ")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in shown) or "␣"
