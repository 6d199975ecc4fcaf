"""Figures of a study, from the tables that a run writes.

No model: a figure depends on its tables alone (docs/study.md has their columns).
"""

from collections.abc import Iterable
from typing import Any

import pandas as pd
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator

from oacore.config.circuits import CIRCUIT_METHODS
from oacore.config.colors import ACCENT
from oacore.config.rows import Look
from oacore.config.study import ESTIMATORS
from oacore.metrics import GRADIENT
from oacore.report.figures import WIDTH, decades, legend_below, styled
from oacore.report.numbers import Z95
from oacore.report.series import in_order
from oacore.study.exponents import arithmetic
from oacore.study.tables import WHOLE

QUANTITIES = ("seconds", "passes x weights")


def study_figures(
    cost: pd.DataFrame, accuracy: pd.DataFrame, exponents: pd.DataFrame, payoff: pd.DataFrame
) -> dict[str, Figure]:
    """The figures by name: `cost_{task}`, `accuracy_{task}`, `payoff_{task}`."""
    figures = {}
    for task in dict.fromkeys(cost["task"]):
        of = [table[table["task"] == task] for table in (cost, accuracy, exponents, payoff)]
        figures[f"cost_{task}"] = costs(of[0], of[2])
        figures[f"accuracy_{task}"] = accuracies(of[1])
        figures[f"payoff_{task}"] = payoffs(of[3], of[1])
    return figures


@styled()
def costs(cost: pd.DataFrame, exponents: pd.DataFrame) -> Figure:
    """Seconds, and passes times weights, by the number of weights; a line for each method, whose key has its slopes."""
    names = methods_in_order(cost["method"])
    figure = Figure(figsize=(WIDTH, 3.8), layout="constrained")
    values = {"seconds": cost["seconds"], "passes x weights": arithmetic(cost)}
    for ax, quantity in zip(figure.subplots(1, 2), QUANTITIES, strict=True):
        for name in names:
            of = cost.assign(value=values[quantity].astype(float))[cost["method"] == name].sort_values("n_weights")
            ax.plot(of["n_weights"], of["value"], color=look(name).color, marker=look(name).marker, **_line(name))
        ax.set(xscale="log", yscale="log", xlabel="weights")
        ax.set_title(quantity.replace(" x ", " × "), fontsize=10)
        decades(ax.xaxis)
        decades(ax.yaxis)
    slopes = exponents.set_index(["method", "quantity"])["exponent"]
    keys = []
    for name in names:
        its = [f"{slopes[name, quantity]:.2f}" for quantity in QUANTITIES if (name, quantity) in slopes.index]
        keys.append(_key(name, f"{name} ({', '.join(its)})"))
    legend_below(figure, keys)
    return figure


@styled()
def accuracies(accuracy: pd.DataFrame) -> Figure:
    """Rank correlation with the converged gap by passes through the model, a panel for each model."""
    of_budgets = accuracy[accuracy["budget"].notna()]
    models, names = list(dict.fromkeys(of_budgets["model"])), methods_in_order(of_budgets["method"])
    rows = -(-len(models) // 3)
    figure = Figure(figsize=(WIDTH, 0.9 + 2.2 * rows), layout="constrained")
    panels = figure.subplots(rows, min(3, len(models)), sharex=True, sharey=True, squeeze=False).flatten()
    for ax in panels[len(models) :]:
        ax.set_visible(False)
    for ax, model in zip(panels, models, strict=False):
        for name in names:
            of = of_budgets[(of_budgets["model"] == model) & (of_budgets["method"] == name)]
            passes = of["forward_passes"] + (GRADIENT - 1) * of["backward_passes"]
            of = of.assign(passes=passes.astype(float)).sort_values("passes").drop_duplicates("passes")
            ax.errorbar(
                of["passes"], of["spearman"], yerr=Z95 * of["spearman_se"].fillna(0), color=look(name).color,
                marker=look(name).marker, elinewidth=0.6, **_line(name),
            )  # fmt: skip
        ax.set(xscale="log", ylim=(None, 1.03), xlabel="passes")
        ax.set_title(f"{model}", fontsize=10)
        ax.label_outer()
        powers_of_ten(ax.xaxis)
    figure.supylabel("rank correlation", fontsize=10)
    legend_below(figure, [_key(name, name) for name in names])
    return figure


@styled()
def payoffs(payoff: pd.DataFrame, accuracy: pd.DataFrame) -> Figure:
    """The budget from which on OA's rank correlation is above that of each other method, by the number of weights;
    above the line where no budget was enough.
    """
    figure = Figure(figsize=(WIDTH, 3.2), layout="constrained")
    ax = figure.subplots()
    budgets = sorted(set(accuracy["budget"].dropna()))
    never, names = 3 * budgets[-1], methods_in_order(payoff["method"])
    for number, name in enumerate(names):
        of = payoff[payoff["method"] == name].sort_values("n_weights")
        height = of["budget"].astype(float).fillna(never) * 1.06 ** (number - (len(names) - 1) / 2)  # side by side
        ax.plot(of["n_weights"], height, color=look(name).color, marker=look(name).marker, **_line(name))
    ax.axhline(1.7 * budgets[-1], color="0.6", linewidth=0.8, linestyle=":")
    ax.set(xscale="log", yscale="log", xlabel="weights", ylabel="passes a component", ylim=(budgets[0] / 2, 2 * never))
    ax.set_yticks([*budgets, never], [*map(str, map(int, budgets)), "never"])
    ax.minorticks_off()
    decades(ax.xaxis)
    ax.set_title("OA is closer to its converged order than")
    if names:
        legend_below(figure, [_key(name, name) for name in names])
    return figure


def powers_of_ten(axis: Axis) -> None:
    """Tick labels of a narrow panel."""
    decades(axis)
    axis.set_major_locator(LogLocator(numticks=5))


def methods_in_order(names: Iterable[str]) -> list[str]:
    """Estimates as their registry has them, the reference, then circuit methods."""
    return in_order(names, (*ESTIMATORS, WHOLE, *CIRCUIT_METHODS))


def look(name: str) -> Look:
    """Colour and marker of a method."""
    if name == WHOLE:
        return Look(ACCENT, "*")
    return ESTIMATORS[name].look if name in ESTIMATORS else CIRCUIT_METHODS[name].look


def _line(name: str) -> dict[str, Any]:
    style = "--" if name == WHOLE else ":" if name in CIRCUIT_METHODS else "-"
    return {"linestyle": style, "markersize": 4, "linewidth": 1.1, "alpha": 0.9}


def _key(name: str, label: str) -> Line2D:
    return Line2D([], [], color=look(name).color, marker=look(name).marker, label=label, **_line(name))
