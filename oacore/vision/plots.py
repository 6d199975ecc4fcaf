"""Figures of the importance of a network's units, from the tables that a run writes.

No model: a figure depends on its tables alone (`oacore.vision.tables` has their columns).
"""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from oacore.config.vision import MEASURES
from oacore.report.figures import WIDTH, decades, legend_below, styled
from oacore.report.numbers import FLOOR, Z95
from oacore.report.series import in_order

LINE = {"ablation": "-", "shapley": "--", "path": ":"}


def vision_figures(
    importance: pd.DataFrame, agreement: pd.DataFrame, curves: pd.DataFrame, reference: str
) -> dict[str, Figure]:
    """The figures by name: `importance_{units}`, and where units are ranked `agreement_{units}`, `curves_{units}`.

    Args:
        reference: the Shapley values that others are compared with.
    """
    figures = {}
    for kind, rows in importance.groupby("units", sort=False):
        figures[f"importance_{kind}"] = importances(rows, reference)
    for kind, rows in agreement.groupby("units", sort=False):
        figures[f"agreement_{kind}"] = agreements(rows, reference)
    for kind, rows in curves.groupby("units", sort=False):
        figures[f"curves_{kind}"] = curves_of(rows, reference)
    return figures


@styled()
def importances(importance: pd.DataFrame, reference: str) -> Figure:
    """A column for each unit, the most important by the reference first; a point with its 95 % interval for each
    method, in a panel for each family.
    """
    of_reference = importance[importance["method"] == reference].set_index("unit")["importance_nats"]
    units = list(of_reference.sort_values(ascending=False, kind="stable").index)
    families = in_order((MEASURES[name].family for name in importance["method"]), LINE)
    figure = Figure(figsize=(WIDTH, 1.2 + 1.75 * len(families)), layout="constrained")
    panels = figure.subplots(len(families), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    names = in_order(importance["method"], MEASURES)
    positive = importance["importance_nats"][importance["importance_nats"] > FLOOR]
    low, high = (positive.min() / 2, 2 * positive.max()) if len(positive) else (FLOOR, 1.0)
    for ax, family in zip(panels, families, strict=True):
        of_family = [name for name in names if MEASURES[name].family == family]
        for place, name in zip(_spread(len(of_family)), of_family, strict=True):
            rows, look = importance[importance["method"] == name].set_index("unit").loc[units], MEASURES[name].look
            value = rows["importance_nats"].clip(lower=1.2 * low).to_numpy()
            error = Z95 * rows["se_nats"].fillna(0).to_numpy()
            # A log axis has no place for an interval's end at or below 0.
            ax.errorbar(
                np.arange(len(units)) + place, value, yerr=[np.minimum(error, value - low), error],
                fmt=look.marker, color=look.color, markersize=3.5, elinewidth=0.8,
            )  # fmt: skip
        ax.set(yscale="log", ylim=(low, high), xlim=(-0.6, len(units) - 0.4))
        ax.set_title({"ablation": "each alone", "shapley": "Shapley values", "path": "gradients"}[family], fontsize=10)
        decades(ax.yaxis)
    panels[-1].set_xticks(range(len(units)), units, rotation=90 if len(units) > 8 else 0)
    figure.supylabel("importance (nats)", fontsize=10)
    legend_below(figure, _keys(names, lines=False))
    return figure


@styled()
def agreements(agreement: pd.DataFrame, reference: str) -> Figure:
    """Rank correlation with the reference by forward passes, a line for each method, with 95 % intervals; the last
    point is often that of a whole run.
    """
    rows = agreement[agreement["reference"] == reference]
    names = in_order(rows["method"], MEASURES)
    figure = Figure(figsize=(WIDTH, 4.2), layout="constrained")
    ax = figure.subplots()
    for number, name in enumerate(names):
        of_method, look = rows[rows["method"] == name], MEASURES[name].look
        of_method = of_method.sort_values("forward_passes", kind="stable").drop_duplicates("forward_passes")
        x = of_method["forward_passes"] * 1.02 ** (number - len(names) / 2)  # intervals beside one another
        y = of_method["spearman"].to_numpy()
        bounds = np.stack([of_method["low"], of_method["high"]])
        # Bootstrap draws add noise to that of the images: a value may lie outside.
        error = np.maximum([y - bounds[0], bounds[1] - y], 0)
        ax.errorbar(
            x, y, yerr=error, fmt=look.marker, linestyle=LINE[MEASURES[name].family], color=look.color, markersize=4,
            linewidth=1.1, elinewidth=0.6, alpha=0.85,
        )  # fmt: skip
    ax.set(xscale="log", xlabel="forward passes", ylabel="rank correlation", ylim=(None, 1.03))
    ax.set_title(f"Agreement with {reference}")
    decades(ax.xaxis)
    legend_below(figure, _keys(names))
    return figure


@styled()
def curves_of(curves: pd.DataFrame, reference: str) -> Figure:
    """Deletion and insertion in each method's order, under the reference's replacement if its curves are there."""
    wanted = MEASURES[reference].replacement
    replacement = wanted if wanted in set(curves["replacement"]) else curves["replacement"].iloc[0]
    rows = curves[curves["replacement"] == replacement]
    names = in_order(rows["method"], MEASURES)
    figure = Figure(figsize=(WIDTH, 3.9), layout="constrained")
    for ax, (direction, of_direction) in zip(
        figure.subplots(1, 2, sharey=True), rows.groupby("direction"), strict=False
    ):
        for name in names:
            of_method, row = of_direction[of_direction["method"] == name], MEASURES[name]
            x = (
                of_method["n_replaced"]
                if direction == "deletion"
                else of_method["n_replaced"].max() - of_method["n_replaced"]
            )
            ax.plot(
                x, of_method["nats"], LINE[row.family], marker=row.look.marker, color=row.look.color, markersize=2.5,
                linewidth=1, alpha=0.85,
            )  # fmt: skip
        ax.set_title(
            {"deletion": "deletion: high is good", "insertion": "insertion: low is good"}[str(direction)], fontsize=10
        )
        ax.set_xlabel({"deletion": "units replaced", "insertion": "units kept"}[str(direction)])
    figure.supylabel(f"KL (nats), {replacement}", fontsize=10)
    legend_below(figure, _keys(names))
    return figure


def _keys(names: list[str], *, lines: bool = True) -> list[Line2D]:
    """What the marks of methods mean."""
    return [
        Line2D(
            [], [], color=MEASURES[name].look.color, marker=MEASURES[name].look.marker, markersize=4,
            ls=LINE[MEASURES[name].family] if lines else "none", label=name,
        )
        for name in names
    ]  # fmt: skip


def _spread(count: int) -> np.ndarray:
    """Places beside a unit's middle for so many marks."""
    places: np.ndarray = np.linspace(-0.3, 0.3, count) if count > 1 else np.zeros(1)
    return places
