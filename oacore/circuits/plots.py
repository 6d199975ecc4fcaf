"""Circuits in figures and tables: loss over size, front against front.

The table is the one that a run writes: `pareto` has one row per circuit (method, ablation, objective, knob, seed,
edges, nodes, kl_nats, se_nats, logit_diff). A circuit is *dominated* if another has at most as many edges and at most
its KL, and less of one of them; the circuits that are not are the *front* of their method. No model: as in
`oacore.ablation.plots`, figures and tables depend on the table alone.

The KL of a front is the lowest of several estimates, so it is a little too low, the more so the more circuits a method
was given.
"""

from collections.abc import Mapping
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from oacore.circuits.fronts import base_name, front, methods_in_order, with_loss
from oacore.config.circuits import CIRCUIT_METHODS, EDGE_ABLATIONS, EdgeAblationType, SearchMethod
from oacore.config.colors import SLATE
from oacore.config.rows import Look
from oacore.report.figures import HEIGHT, WIDTH, legend_below, styled
from oacore.report.numbers import FLOOR, Z95, plain, three_digits
from oacore.report.series import in_order

# a KL smaller than the figure's largest by more than this has no place on its axis; nor has one at or below FLOOR
DECADES = 1e4
LineStyle = Literal["-", "--"]


UNKNOWN = Look(SLATE, "<")


def circuit_figures(pareto: pd.DataFrame, n_edges_total: int) -> dict[str, Figure]:
    """The figures of one task by name, in the order to show them: `pareto_{ablation}` for each ablation type, and
    `ablation_types_{method}` for the first method that has circuits under two or more of them (UGS, if it was run).

    Raises ValueError as `with_loss`.
    """
    pareto = with_loss(pareto)
    ablations = in_order(pareto["ablation"], EDGE_ABLATIONS)
    figures = {
        f"pareto_{ablation}": pareto_front(pareto, ablation, n_edges_total) for ablation in reversed(ablations)
    }  # optimal first
    by_ablation = pareto.groupby("method")["ablation"].nunique()
    several = [method for method in methods_in_order(pareto) if by_ablation[method] > 1]
    if several:
        figures[f"ablation_types_{base_name(several[0])}"] = ablation_types(pareto, several[0], n_edges_total)
    return figures


def pareto_front(pareto: pd.DataFrame, ablation: str, n_edges_total: int) -> Figure:
    """KL over edges under one ablation type, both logarithmic: each method's front a staircase with 95 % intervals.

    The stairs are `fronts.front`: chosen on validation prompts, drawn at the KL on test prompts. Dominated circuits are
    faint, random ones are points.
    """
    pareto = with_loss(pareto)
    circuits = pareto[pareto["ablation"] == ablation]
    looks = {method: _look(CIRCUIT_METHODS, base_name(method)) for method in methods_in_order(circuits)}
    return _fronts(circuits, "method", looks, f"Circuits under {ablation} ablation", n_edges_total)


def ablation_types(pareto: pd.DataFrame, method: str, n_edges_total: int) -> Figure:
    """The fronts of one method under each ablation type, drawn as in `pareto_front`."""
    pareto = with_loss(pareto)
    circuits = pareto[pareto["method"] == method]
    looks = {
        ablation: _look(EDGE_ABLATIONS, ablation)
        for ablation in reversed(in_order(circuits["ablation"], EDGE_ABLATIONS))
    }
    return _fronts(circuits, "ablation", looks, f"Ablation types: {method}", n_edges_total)


def _look(rows: Mapping[str, SearchMethod | EdgeAblationType], name: str) -> Look:
    """How a method or an ablation type is drawn; a name without a row as none of these."""
    return rows[name].look if name in rows else UNKNOWN


class _Scale(NamedTuple):
    """Where values that a log axis has no place for are drawn: beside all the others."""

    limit: float  # values at or below it are drawn ...
    floor: float  # ... here

    def drawn(self, values: pd.Series) -> pd.Series:
        return values.astype(float).where(values > self.limit, self.floor)


def _scale(values: pd.Series, limit: float) -> _Scale:
    above = values[values > limit]
    return _Scale(limit, float(above.min()) / 2 if len(above) else max(limit, FLOOR))


@styled()
def _fronts(circuits: pd.DataFrame, column: str, looks: Mapping[str, Look], title: str, n_edges_total: int) -> Figure:
    """One front for each value of `column`, the first of `looks` on top."""
    x_scale = _scale(circuits["edges"], 0)
    y_scale = _scale(circuits["kl_nats"], max(FLOOR, circuits["kl_nats"].max() / DECADES))
    circuits = circuits.assign(x=x_scale.drawn(circuits["edges"]), y=y_scale.drawn(circuits["kl_nats"]))
    figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
    ax = figure.subplots()
    ax.set(xscale="log", yscale="log", xlim=_limits(circuits["x"]), ylim=_limits(_ends(circuits, y_scale)))
    ax.grid(axis="both")
    keys = []
    for z, (name, look) in enumerate(list(looks.items())[::-1], start=2):
        of_name = circuits[circuits[column] == name]
        if name in CIRCUIT_METHODS and CIRCUIT_METHODS[name].scattered:
            of_name = of_name.sort_values(["edges", "kl_nats"], kind="stable")
            ax.scatter(of_name["x"], of_name["y"], s=26, marker=look.marker, color=look.color, linewidths=0, zorder=1.5)
            keys.append(
                Line2D([], [], linestyle="none", marker=look.marker, color=look.color, markersize=7, label=name)
            )
            continue
        line_style: LineStyle = "--" if "(" in name else "-"  # another objective than KL
        _front(ax, of_name, look, line_style, y_scale, z)
        keys.append(
            Line2D(
                [],
                [],
                color=look.color,
                linestyle=line_style,
                marker=look.marker,
                markersize=5,
                linewidth=1.2,
                label=name,
            )
        )
    _edge_axis(ax, circuits, x_scale)
    ax.yaxis.set_major_locator(_locator(ax.get_ylim()))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: plain(value)))
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.set_xlabel(f"edges in the circuit, of {n_edges_total:,}")
    ax.set_ylabel("KL( model ‖ circuit ), nats")
    ax.set_title(title)
    keys.reverse()
    if low := int((circuits["kl_nats"] <= y_scale.limit).sum()):
        text = f"{low} ≤ {three_digits(y_scale.limit)} nats, drawn at the bottom"
        keys.append(
            Line2D([], [], linestyle="none", marker="o", color=SLATE, fillstyle="none", markersize=5, label=text)
        )
    legend_below(figure, keys)
    return figure


def _front(ax: Axes, circuits: pd.DataFrame, look: Look, line_style: LineStyle, y_scale: _Scale, z: float) -> None:
    """Stairs, intervals and markers of one front, and its dominated circuits; open markers for those drawn at the
    bottom.
    """
    best = front(circuits)
    others = circuits[~circuits.index.isin(best.index)].sort_values(["edges", "kl_nats"], kind="stable")
    size = 46 if look.marker == "*" else 24
    ax.scatter(
        others["x"],
        others["y"],
        s=0.6 * size,
        marker=look.marker,
        color=look.color,
        alpha=0.22,
        linewidths=0,
        zorder=1.8,
    )
    right = max(ax.get_xlim()[1], best["x"].iloc[-1])
    ax.step(
        [*best["x"], right],
        [*best["y"], best["y"].iloc[-1]],
        where="post",
        color=look.color,
        linewidth=1.2,
        linestyle=line_style,
        zorder=z,
    )
    half = Z95 * best["se_nats"].fillna(0)
    low, high = (y_scale.drawn(best["kl_nats"] + sign * half) for sign in (-1, 1))
    bars = np.stack([(best["y"] - low).clip(lower=0), (high - best["y"]).clip(lower=0)])
    ax.errorbar(
        best["x"], best["y"], bars, fmt="none", ecolor=look.color, elinewidth=3.2, alpha=0.4, zorder=z
    )  # wider than the stairs
    for at_bottom in (False, True):
        chosen = best[(best["kl_nats"] <= y_scale.limit) == at_bottom]
        if len(chosen):
            points = ax.scatter(
                chosen["x"],
                chosen["y"],
                s=size,
                marker=look.marker,
                zorder=z + 0.5,
                linewidths=0.9 if at_bottom else 0.5,
            )
            points.set(facecolor="white" if at_bottom else look.color, edgecolor=look.color if at_bottom else "white")


def _ends(circuits: pd.DataFrame, scale: _Scale) -> pd.Series:
    """The drawn KLs and the ends of their intervals, down to half the lowest KL: a wider interval runs out of the
    figure.
    """
    half = Z95 * circuits["se_nats"].fillna(0)
    low = scale.drawn(circuits["kl_nats"] - half).clip(lower=circuits["y"].min() / 2)
    return pd.concat([circuits["y"], low, scale.drawn(circuits["kl_nats"] + half)])


def _limits(values: pd.Series) -> tuple[float, float]:
    """Ends of a log axis with some air around the values."""
    low, high = np.log10([values.min(), values.max()])
    air = max(0.04 * (high - low), 0.05)
    return 10 ** (low - air), 10 ** (high + air)


def _locator(limits: tuple[float, float]) -> LogLocator:
    """Labels at 1, 2, 5, 10, ... on up to three decades, at the powers of ten on more."""
    return LogLocator(subs=(1, 2, 5) if limits[1] < 2000 * limits[0] else (1,), numticks=12)


def _edge_axis(ax: Axes, circuits: pd.DataFrame, scale: _Scale) -> None:
    """Whole numbers below the axis; empty circuits left of a dotted line, over a 0."""
    low, high = ax.get_xlim()
    ax.xaxis.set_major_locator(_locator((low, high)))
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 1 else ""))
    if (circuits["edges"] <= scale.limit).any():
        ticks = [
            tick
            for tick in _locator((low, high)).tick_values(low, high)
            if 1.2 * scale.floor < tick <= high and tick >= 1
        ]
        ax.xaxis.set_minor_locator(NullLocator())
        ax.set_xticks([scale.floor, *ticks], ["0", *(f"{tick:,.0f}" for tick in ticks)])
        ax.axvline(scale.floor * 2**0.5, color=SLATE, linewidth=0.9, linestyle=(0, (1, 2)), zorder=1)
