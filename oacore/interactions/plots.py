"""Figures of effects and interactions, from the tables of all ablation types that a run writes.

No model: a figure depends on its tables alone (`oacore.interactions.effects.EffectTables` has their columns).
"""

import re
from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import FancyArrowPatch

from oacore.config.circuits import EDGE_ABLATIONS
from oacore.config.colors import ACCENT, BLUE, INK, PALE, SLATE
from oacore.report.figures import HEIGHT, WIDTH, decades, legend_below, styled
from oacore.report.numbers import FLOOR, SIGNIFICANT, Z95, three_digits
from oacore.report.series import in_order

LOGITS = "logits"
DRAWN_PATHS = 24  # more cross too often to be followed
ANNOTATED = 10  # components; in a larger matrix numbers would be too small to read
# Redundancy is warm, cooperation cold.
COLORS = LinearSegmentedColormap.from_list("interaction", [BLUE, "#f4f6f8", ACCENT])


def interaction_figures(effects: pd.DataFrame, paths: pd.DataFrame, interactions: pd.DataFrame) -> dict[str, Figure]:
    """The figures of one task by name, in the order to show them: `direct_against_total`, then for each ablation type
    `interactions_{ablation}` and `paths_{ablation}`.
    """
    components = list(dict.fromkeys(effects["component"]))
    figures = {"direct_against_total": direct_against_total(effects)}
    for ablation in dict.fromkeys(effects["method"]):
        figures[f"interactions_{ablation}"] = matrix(interactions, ablation, components)
    for ablation in dict.fromkeys(effects["method"]):
        figures[f"paths_{ablation}"] = path_diagram(paths, ablation)
    return figures


@styled()
def direct_against_total(effects: pd.DataFrame) -> Figure:
    """A panel for each ablation type, a point with 95 % intervals for each component: above the diagonal later
    components repair, below it the component acts through them.
    """
    methods = in_order(effects["method"], EDGE_ABLATIONS)[::-1]  # optimal first
    columns = min(3, len(methods))
    rows = -(-len(methods) // columns)
    figure = Figure(figsize=(max(3.6, 2.4 * columns), 0.6 + 2.3 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    drawn = effects.assign(**{name: effects[name].clip(lower=FLOOR) for name in ("total_nats", "direct_nats")})
    numbers = drawn[["total_nats", "direct_nats"]].to_numpy()
    limits = numbers.min() / 2, numbers.max() * 2
    for ax, method in zip(panels, methods, strict=False):
        of_method = drawn[drawn["method"] == method]
        look = EDGE_ABLATIONS[method].look
        ax.plot(limits, limits, color=PALE, linewidth=0.9, zorder=1)
        errors = Z95 * of_method[["total_se_nats", "direct_se_nats"]].fillna(0).to_numpy().T
        # A log axis has no place for an interval's end at or below 0.
        xy = of_method[["total_nats", "direct_nats"]].to_numpy().T
        low = np.minimum(errors, xy - limits[0])
        ax.errorbar(
            *xy, xerr=[low[0], errors[0]], yerr=[low[1], errors[1]], fmt=look.marker, color=look.color, markersize=4,
            elinewidth=1, alpha=0.85, zorder=3,
        )  # fmt: skip
        for name, x, y in zip(of_method["component"], *xy, strict=True):
            ax.annotate(name, (x, y), xytext=(4, 3), textcoords="offset points", fontsize=7, color=SLATE)
        ax.set(xscale="log", yscale="log", xlim=limits, ylim=limits, aspect="equal")
        ax.set_title(method, fontsize=10, color=look.color)
        for axis in (ax.xaxis, ax.yaxis):
            decades(axis)
    for below, ax in enumerate(panels[len(methods) :], len(methods) - columns):
        ax.set_axis_off()
        panels[below].tick_params(labelbottom=True)
    figure.supxlabel("total effect (nats)", fontsize=10)
    figure.supylabel("direct effect (nats)", fontsize=10)
    return figure


@styled()
def matrix(interactions: pd.DataFrame, ablation: str, components: list[str]) -> Figure:
    """The interaction of each pair under one ablation type: positive for redundancy, negative for cooperation; faint
    numbers are not apart from 0.
    """
    of_type = interactions[interactions["method"] == ablation]
    n, place = len(components), {name: index for index, name in enumerate(components)}
    grid, apart = np.full((n, n), np.nan), np.zeros((n, n), bool)
    for row in of_type.to_dict("records"):
        i, j = place[row["first"]], place[row["second"]]
        grid[i, j] = grid[j, i] = row["interaction_nats"]
        apart[i, j] = apart[j, i] = abs(row["interaction_nats"]) > SIGNIFICANT * row["se_nats"]
    largest = max(float(np.nanmax(np.abs(grid), initial=0.0)), FLOOR)
    norm = TwoSlopeNorm(0, -largest, largest)
    side = min(8.0, 1.8 + 0.52 * n)
    figure = Figure(figsize=(max(4.2, side + 1.1), max(2.8, side)), layout="constrained")
    ax = figure.subplots()
    cells = np.ma.masked_invalid(grid)
    ax.pcolormesh(cells, cmap=COLORS, norm=norm, edgecolors="white", linewidth=0.8)
    if n <= ANNOTATED:
        for i, j in np.argwhere(~np.isnan(grid)):
            dark = abs(norm(grid[i, j]) - 0.5) > 0.35
            color = ("white" if dark else INK) if apart[i, j] else SLATE
            ax.text(j + 0.5, i + 0.5, three_digits(grid[i, j]), ha="center", va="center", fontsize=6.5, color=color)
    ax.set_xticks(np.arange(n) + 0.5, components, rotation=90)
    ax.set_yticks(np.arange(n) + 0.5, components)
    ax.set(xlim=(0, n), ylim=(n, 0), aspect="equal")
    ax.tick_params(length=0)
    ax.spines[["left", "bottom"]].set_visible(False)
    ax.set_title(f"Interactions: {ablation}")
    bar = figure.colorbar(ScalarMappable(norm, COLORS), ax=ax, aspect=28, pad=0.02)
    bar.outline.set_visible(False)
    bar.set_label("cooperation  ←  nats  →  redundancy")
    return figure


class _Place(NamedTuple):
    """Of a node: heads side by side, the MLP at their right and above, since it reads what they write."""

    x: float
    y: float


@styled()
def path_diagram(paths: pd.DataFrame, ablation: str) -> Figure:
    """The strongest paths under one ablation type, from components to what reads them, from `input` below to `logits`
    above; the wider an arrow, the more its ablation alone costs.
    """
    of_type = paths[paths["method"] == ablation]
    apart = of_type[of_type["nats"] > SIGNIFICANT * of_type["se_nats"].fillna(0)]
    shown = apart[apart["nats"] > FLOOR].nlargest(DRAWN_PATHS, "nats")
    components = dict.fromkeys(of_type["component"])
    nodes = [*components, *dict.fromkeys(shown["mediator"]), LOGITS]
    places = _places(list(dict.fromkeys(nodes)))
    figure = Figure(figsize=(WIDTH, HEIGHT + 0.5), layout="constrained")
    ax = figure.subplots()
    strongest = max(float(shown["nats"].max()), FLOOR) if len(shown) else FLOOR
    look = EDGE_ABLATIONS[ablation].look
    for row in shown[::-1].to_dict("records"):  # the strongest on top
        color = INK if row["mediator"] == LOGITS else look.color
        _arrow(ax, places[row["component"]], places[row["mediator"]], color, (row["nats"] / strongest) ** 0.5)
    for name, (x, y) in places.items():
        box = {"boxstyle": "round,pad=0.25", "facecolor": "white", "edgecolor": INK if name in components else PALE}
        ax.text(x, y, name, ha="center", va="center", fontsize=8, bbox=box, zorder=5)
    xs, ys = zip(*places.values(), strict=True)
    ax.set(xlim=(min(xs) - 0.8, max(xs) + 0.8), ylim=(min(ys) - 0.4, max(ys) + 0.4))
    ax.set_axis_off()
    widest = f"the widest {three_digits(strongest)} nats" if len(shown) else "none is apart from 0"
    ax.set_title(f"Strongest paths: {ablation}, {widest}")
    keys = [
        Line2D([], [], color=INK, linewidth=2.5, label="direct"),
        Line2D([], [], color=look.color, linewidth=2.5, label="through a mediator"),
    ]
    legend_below(figure, keys)
    return figure


def _arrow(ax: Axes, start: _Place, end: _Place, color: str, share: float) -> None:
    """From a component to what reads it, bent aside if others may lie on the straight line."""
    bend = 0.0 if abs(start.x - end.x) > 0.5 else 0.25
    arrow = FancyArrowPatch(
        start, end, connectionstyle=f"arc3,rad={bend}", arrowstyle="-|>", mutation_scale=9, shrinkA=9, shrinkB=9,
        color=color, linewidth=0.6 + 3 * share, alpha=0.35 + 0.5 * share, zorder=2 + share,
    )  # fmt: skip
    ax.add_patch(arrow)


def _places(names: list[str]) -> dict[str, _Place]:
    """A place for each node: layers from below, heads by number."""
    parts = {name: re.fullmatch(r"a(\d+)\.h(\d+)|m(\d+)|layer (\d+)", name) for name in names}
    widest = max([int(part[2]) for part in parts.values() if part and part[2]], default=0)
    top = max([int(next(filter(None, (part[1], part[3], part[4])))) for part in parts.values() if part], default=0)
    places = {}
    for name, part in parts.items():
        if part is None:  # input and logits
            places[name] = _Place((widest + 1) / 2, top + 1.2 if name == LOGITS else -0.6)
        elif part[1]:
            places[name] = _Place(float(part[2]), float(part[1]))
        elif part[3]:
            places[name] = _Place(widest + 1.2, int(part[3]) + 0.5)
        else:
            places[name] = _Place((widest + 1) / 2, int(part[4]) + 0.5)
    return places
