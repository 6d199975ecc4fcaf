"""Figures of behaviour removal, from the table of all methods (`oacore.removal.measure.front` has its columns)."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from oacore.config.circuits import EDGE_ABLATIONS
from oacore.config.colors import PALE
from oacore.config.removal import REMOVAL_METHODS
from oacore.report.figures import HEIGHT, WIDTH, decades, legend_below, styled
from oacore.report.numbers import Z95
from oacore.report.series import in_order

# Of columns that some rows have no value in.
TYPES = {"relearned": "boolean", "relearn_steps": "Int64", "converged": "boolean", "steps": "Int64"}
LEAST = 1e-4  # nats; a smaller KL is drawn here


def removal_figures(front: pd.DataFrame) -> dict[str, Figure]:
    """The figures by name, in the order to show them: `front_{ablation}`, then `held_out` and `relearning` where these
    were measured.
    """
    ablations = in_order(front["ablation"], EDGE_ABLATIONS)[::-1]  # optimal first
    figures = {f"front_{ablation}": front_figure(front, ablation) for ablation in ablations}
    if front[["paraphrase_accuracy", "held_out_kl_nats"]].notna().any(axis=None):
        figures["held_out"] = held_out(front)
    if front["relearn_steps"].notna().any():
        figures["relearning"] = relearning(front)
    return figures


@styled()
def front_figure(front: pd.DataFrame, ablation: str) -> Figure:
    """Retained KL over forgotten accuracy under one ablation type, with 95 % intervals; beside each mark how many
    edges, components or directions are ablated.
    """
    rows = front[front["ablation"] == ablation]
    figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
    ax = figure.subplots()
    for method in _methods(rows):
        row, of_method = REMOVAL_METHODS[method], rows[rows["method"] == method].sort_values("forget_accuracy")
        x, y = of_method["forget_accuracy"], of_method["retain_kl_nats"].clip(lower=LEAST)
        below = np.minimum(Z95 * of_method["retain_se"].fillna(0), y - LEAST)
        errors = [below, Z95 * of_method["retain_se"].fillna(0)]
        ax.errorbar(
            x, y, xerr=Z95 * of_method["forget_se"].fillna(0), yerr=errors, fmt=row.look.marker, color=row.look.color,
            markersize=5, elinewidth=0.8, alpha=0.85, linestyle="none" if row.scattered else ":", linewidth=0.9,
        )  # fmt: skip
        for count, *xy in zip(of_method["ablations"], x, y, strict=True):
            ax.annotate(
                f"{count}",
                (xy[0], xy[1]),
                xytext=(5, 4),
                textcoords="offset points",
                fontsize=7.5,
                color=row.look.color,
            )
    ax.axvline(front["accuracy_before"].iloc[0], color=PALE, linewidth=0.9, zorder=1)
    ax.set(yscale="log", xlim=(-0.03, 1.03), xlabel="forgotten accuracy", ylabel="retained KL (nats)")
    ax.set_title(f"Removal: {ablation}")
    decades(ax.yaxis)
    legend_below(figure, _keys(_methods(rows)))
    return figure


@styled()
def held_out(front: pd.DataFrame) -> Figure:
    """What learning did not see against what it saw: accuracy on paraphrases, and KL on retained tasks that were held
    out; on the diagonal they are the same.
    """
    pairs = {
        ("forget_accuracy", "paraphrase_accuracy"): ("forgotten accuracy", "on paraphrases"),
        ("retain_kl_nats", "held_out_kl_nats"): ("retained KL (nats)", "on held-out tasks"),
    }
    drawn = {pair: names for pair, names in pairs.items() if front[pair[1]].notna().any()}
    figure = Figure(figsize=(3.2 * len(drawn) + 0.4, 3.6), layout="constrained")
    panels = figure.subplots(1, len(drawn), squeeze=False)[0]
    for ax, ((x, y), names) in zip(panels, drawn.items(), strict=True):
        is_kl = x.endswith("nats")
        values = front.assign(**{name: front[name].clip(lower=LEAST) for name in (x, y)}) if is_kl else front
        numbers = values[[x, y]].to_numpy(float)
        limits = (np.nanmin(numbers) / 2, np.nanmax(numbers) * 2) if is_kl else (-0.03, 1.03)
        ax.plot(limits, limits, color=PALE, linewidth=0.9, zorder=1)
        _scatter(ax, values, x, y)
        ax.set(xlim=limits, ylim=limits, aspect="equal", xlabel=names[0], ylabel=names[1])
        if is_kl:
            ax.set(xscale="log", yscale="log")
            for axis in (ax.xaxis, ax.yaxis):
                decades(axis)
    legend_below(figure, _keys(_methods(front)))
    return figure


@styled()
def relearning(front: pd.DataFrame) -> Figure:
    """The highest forgotten accuracy while fine-tuning over that before it; full marks, with the number of steps, were
    back where the ablation has not been.
    """
    rows = front[front["relearn_steps"].notna()]
    figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
    ax = figure.subplots()
    ax.plot([0, 1], [0, 1], color=PALE, linewidth=0.9, zorder=1)
    for method in _methods(rows):
        look = REMOVAL_METHODS[method].look
        of_method = rows[rows["method"] == method]
        for back, some in of_method.groupby("relearned"):
            ax.plot(
                some["forget_accuracy"], some["relearn_accuracy"], linestyle="none", marker=look.marker,
                color=look.color, markerfacecolor=look.color if back else "none", markersize=6, alpha=0.85,
            )  # fmt: skip
            for steps, x, y in zip(
                some["relearn_steps"], some["forget_accuracy"], some["relearn_accuracy"], strict=True
            ):
                if back and steps:
                    ax.annotate(f"{steps}", (x, y), xytext=(5, -9), textcoords="offset points", fontsize=7.5)
    limits = (-0.03, 1.05)
    ax.set(xlim=limits, ylim=limits, xlabel="forgotten accuracy", ylabel="highest while fine-tuning")
    legend_below(figure, _keys(_methods(rows)))
    return figure


def _scatter(ax: Axes, front: pd.DataFrame, x: str, y: str) -> None:
    for method in _methods(front):
        look, rows = REMOVAL_METHODS[method].look, front[front["method"] == method]
        ax.plot(rows[x], rows[y], linestyle="none", marker=look.marker, color=look.color, markersize=5, alpha=0.8)


def _methods(front: pd.DataFrame) -> list[str]:
    return in_order(front["method"], REMOVAL_METHODS)


def _keys(methods: list[str]) -> list[Line2D]:
    looks = {method: REMOVAL_METHODS[method].look for method in methods}
    return [
        Line2D([], [], linestyle="none", marker=look.marker, color=look.color, label=method)
        for method, look in looks.items()
    ]
