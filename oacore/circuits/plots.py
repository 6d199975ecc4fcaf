"""Circuits in figures and tables: loss over size, front against front.

The table is the one that a run writes: `pareto` has one row per circuit (method, ablation, objective, knob, seed,
edges, nodes, kl_nats, se_nats, logit_diff). A circuit is *dominated* if another has at most as many edges and at most
its KL, and less of one of them; the circuits that are not are the *front* of their method. No model: as in
`oacore.ablation.plots`, figures and tables depend on the table alone.

The KL of a front is the lowest of several estimates, so it is a little too low, the more so the more circuits a method
was given.
"""

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from oacore.config.circuits import CIRCUIT_METHODS, EDGE_ABLATIONS, EdgeAblationType, SearchMethod
from oacore.config.colors import SLATE
from oacore.config.rows import Look
from oacore.report.figures import HEIGHT, WIDTH, legend_below, styled
from oacore.report.numbers import FLOOR, Z95, plain, three_digits, verdict
from oacore.report.series import in_order

# a KL smaller than the figure's largest by more than this has no place on its axis; nor has one at or below FLOOR
DECADES = 1e4
LineStyle = Literal["-", "--"]


UNKNOWN = Look(SLATE, "<")
COLUMNS = ("method", "ablation", "objective", "knob", "seed", "edges", "nodes", "kl_nats", "se_nats", "logit_diff")


def with_loss(pareto: pd.DataFrame) -> pd.DataFrame:
    """The circuits with a KL, those found with another objective than KL under a name of their own: `ugs (logit_diff)`.

    Raises ValueError if a column is missing, if no circuit has a KL or if one is infinite.
    """
    if missing := [column for column in COLUMNS if column not in pareto]:
        raise ValueError(f"pareto: no column {', '.join(missing)}; found {', '.join(map(str, pareto.columns))}")
    pareto = pareto[pareto["kl_nats"].notna()].reset_index(drop=True)
    if pareto.empty:
        raise ValueError("pareto: no row with a value in kl_nats")
    if (infinite := np.isinf(pareto["kl_nats"])).any():
        raise ValueError(f"pareto: infinite kl_nats for a circuit of {pareto[infinite]['method'].iloc[0]}")
    plain = pareto["objective"].isna() | (pareto["objective"] == "kl")
    method = pareto["method"].map(_base)  # so that doing this twice changes nothing
    return pareto.assign(method=method.where(plain, method + " (" + pareto["objective"].astype(str) + ")"))


def front(circuits: pd.DataFrame) -> pd.DataFrame:
    """The rows that no other row dominates, by edges: their KL falls strictly. Of equal circuits, the one of the lowest
    knob and seed.
    """
    ties = [column for column in ("method", "knob", "seed") if column in circuits]
    ordered = circuits[circuits["kl_nats"].notna()].sort_values(["edges", "kl_nats", *ties], kind="stable")
    before = ordered["kl_nats"].cummin().shift(fill_value=np.inf)
    return ordered[ordered["kl_nats"] < before]


def smallest_good(circuits: pd.DataFrame, most: int) -> pd.Series:
    """The row to draw: of circuits with at most `most` edges the smallest one whose KL is at most twice the lowest, or
    at most `FLOOR`.

    If all have more edges, one of the smallest.
    """
    few = circuits[circuits["edges"] <= most]
    few = few if len(few) else circuits[circuits["edges"] == circuits["edges"].min()]
    good = few[few["kl_nats"] <= max(2 * few["kl_nats"].min(), FLOOR)]
    return good.sort_values(["edges", "kl_nats"], kind="stable").iloc[0]


def front_kl_at(circuits: pd.DataFrame, edges: float) -> pd.Series | None:
    """The row of the lowest KL among circuits with at most `edges` edges; None if there is none."""
    small = front(circuits[circuits["edges"] <= edges])
    return None if small.empty else small.iloc[-1]


def methods_in_order(pareto: pd.DataFrame) -> list[str]:
    """The methods present, in the order of the registry, each followed by its other objectives; unknown ones last."""
    names, order = sorted(set(pareto["method"])), list(CIRCUIT_METHODS)
    return sorted(names, key=lambda name: order.index(_base(name)) if _base(name) in order else len(order))


def front_sizes(pareto: pd.DataFrame, most: int = 5) -> list[int]:
    """Sizes at which to compare fronts: of 1, 2, 5, 10, 20, ... edges those that at least two methods reach, `most` of
    them.
    """
    smallest = np.sort(pareto.groupby("method")["edges"].min())
    largest = max(1, *(int(front(circuits)["edges"].max()) for _, circuits in pareto.groupby("method")))
    low = smallest[min(1, len(smallest) - 1)]
    sizes = [
        step * 10**power
        for power in range(len(str(largest)))
        for step in (1, 2, 5)
        if low <= step * 10**power <= largest
    ]
    sizes = sizes or [largest]
    chosen = np.unique(np.linspace(0, len(sizes) - 1, min(most, len(sizes))).round().astype(int))
    return [sizes[i] for i in chosen]


def front_table(pareto: pd.DataFrame, sizes: Sequence[int] | None = None) -> pd.DataFrame:
    """The lowest KL within each size, one row per ablation type, size and method (ablation, max_edges, method, edges,
    kl_nats, se_nats, ratio_to_best). A method without so small a circuit has no row; `ratio_to_best` is NaN if the best
    KL is at or below `FLOOR`.

    `sizes`: the largest numbers of edges allowed; by default `front_sizes` of each ablation type.
    """
    pareto = with_loss(pareto)
    rows = []
    for ablation in in_order(pareto["ablation"], EDGE_ABLATIONS):
        circuits = pareto[pareto["ablation"] == ablation]
        for size in sizes or front_sizes(circuits):
            on_front = {m: front_kl_at(circuits[circuits["method"] == m], size) for m in methods_in_order(circuits)}
            present = {method: row for method, row in on_front.items() if row is not None}
            best = min((row["kl_nats"] for row in present.values()), default=np.nan)
            for method, row in present.items():
                ratio = row["kl_nats"] / best if best > FLOOR else np.nan
                rows.append((ablation, size, method, row["edges"], row["kl_nats"], row["se_nats"], ratio))
    return pd.DataFrame(
        rows, columns=["ablation", "max_edges", "method", "edges", "kl_nats", "se_nats", "ratio_to_best"]
    )


def compare_fronts(pareto: pd.DataFrame, ablation: str, method: str) -> pd.DataFrame:
    """`method` against every circuit on the front of every other method, under one ablation type: one row each.

    Columns: method (the other one), edges, kl_nats, se_nats; own_edges, own_kl_nats and own_se_nats of the lowest KL of
    `method` with at most as many edges; verdict. Two falling step functions differ most where the second one steps:
    these circuits are all that matters.

    Verdicts: those of `plots.verdict`; `none` if `method` has no circuit so small.
    """
    pareto = with_loss(pareto)
    circuits = pareto[pareto["ablation"] == ablation]
    of_method = circuits[circuits["method"] == method]
    rows = []
    for other in methods_in_order(circuits[circuits["method"] != method]):
        for point in front(circuits[circuits["method"] == other]).to_dict("records"):
            best = front_kl_at(of_method, point["edges"])
            point_of_other = (other, point["edges"], point["kl_nats"], point["se_nats"])
            if best is None:
                rows.append((*point_of_other, np.nan, np.nan, np.nan, "none"))
                continue
            decided = verdict(best["kl_nats"], best["se_nats"], point["kl_nats"], point["se_nats"])
            rows.append((*point_of_other, best["edges"], best["kl_nats"], best["se_nats"], decided))
    columns = ["method", "edges", "kl_nats", "se_nats", "own_edges", "own_kl_nats", "own_se_nats", "verdict"]
    return pd.DataFrame(rows, columns=columns)


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
        figures[f"ablation_types_{several[0]}"] = ablation_types(pareto, several[0], n_edges_total)
    return figures


def pareto_front(pareto: pd.DataFrame, ablation: str, n_edges_total: int) -> Figure:
    """KL over edges under one ablation type, both logarithmic: each method's front a staircase with 95 % intervals.

    The stairs are the lowest KL that a method reaches within a number of edges. Dominated circuits are faint, random
    ones are points.
    """
    pareto = with_loss(pareto)
    circuits = pareto[pareto["ablation"] == ablation]
    looks = {method: _look(CIRCUIT_METHODS, _base(method)) for method in methods_in_order(circuits)}
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


def _base(method: str) -> str:
    """The method without its objective."""
    return method.partition(" (")[0]


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
