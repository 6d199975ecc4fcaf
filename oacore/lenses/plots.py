"""Lenses in figures: how well they predict the model's output from each layer, and how faithfully they answer to
changes of it.

The tables are the ones a run writes, one row per lens, init and layer: `loss` (lens, init, layer, kl_nats, se_nats,
top1_agreement, n), `lengths` (... n_tokens, kl_nats, se_nats, n), `faithfulness` (... perturbation, similarity,
similarity_low, similarity_high, correlation, correlation_low, correlation_high, n) and `truthfulness` (... dataset,
demonstrations, accuracy, se, n). `init` tells fits of the same lens apart that started elsewhere; it is empty for all
others. A lens of layer l reads the residual stream that enters block l.

No model: as in `oacore.ablation.plots`, a figure depends on its table alone. All functions raise ValueError if the
table lacks a column, has no row with a value, an infinite value, or two rows for the same thing.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from oacore.config.colors import SLATE
from oacore.config.lenses import HIGHLIGHTED, LENSES, UNKNOWN
from oacore.config.rows import Look
from oacore.lenses.tables import (
    demonstrations_in_order,
    lens_rows,
    lenses_in_order,
    mean_over_datasets,
    perturbations_in_order,
)
from oacore.report.figures import HEIGHT, WIDTH, legend_below, styled
from oacore.report.numbers import FLOOR, Z95, plain, three_digits

# a KL smaller than the figure's largest by more than this has no place on its axis; nor has one at or below FLOOR
DECADES = 1e4
Measure = Literal["similarity", "correlation"]


def lens_figures(
    loss: pd.DataFrame,
    lengths: pd.DataFrame | None = None,
    faithfulness: pd.DataFrame | None = None,
    truthfulness: pd.DataFrame | None = None,
    fitted_at: int | None = None,
) -> dict[str, Figure]:
    """The figures by name, in the order to show them: loss, agreement, lengths, similarity, correlation, truthfulness.

    Those without a table, or with an empty one, are left out; so is one of similarity and correlation if only the other
    was measured. `fitted_at` is the context length, in tokens, that the lenses were fitted at.
    """
    figures = {"loss": loss_curves(loss), "agreement": agreement_curves(loss)}
    if lengths is not None and len(lengths):
        figures["lengths"] = length_curves(lengths, fitted_at)
    if faithfulness is not None and len(faithfulness):
        measures: tuple[Measure, Measure] = ("similarity", "correlation")
        present = [
            measure for measure in measures if measure not in faithfulness or faithfulness[measure].notna().any()
        ]
        figures |= {measure: faithfulness_curves(faithfulness, measure) for measure in present or measures}
    if truthfulness is not None and len(truthfulness):
        figures["truthfulness"] = truthfulness_curves(truthfulness)
    return figures


@styled()
def loss_curves(loss: pd.DataFrame) -> Figure:
    """KL over layers on a log axis, one line per lens with its 95 % band.

    A KL too small for the axis is drawn at its bottom as an open marker, and counted in the legend.
    """
    table = _log_bands(lens_rows(loss, "kl_nats", "loss", ("se_nats",)))
    figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
    ax = figure.subplots()
    _draw(ax, table, "layer", lenses_in_order(table))
    _log_axis(ax, table)
    _layer_axis(ax, table["layer"])
    ax.set_xlabel("layer that the lens reads")
    ax.set_ylabel("KL( model ‖ lens ), nats")
    ax.set_title("How far each lens is from the model's output")
    _legend(figure, table, _floor_key(table))
    return figure


@styled()
def agreement_curves(loss: pd.DataFrame) -> Figure:
    """Share of prompts at which the lens's most likely token is the model's, over layers."""
    table = lens_rows(loss, "top1_agreement", "loss")
    table = table.assign(y=100 * table["top1_agreement"], low=np.nan, high=np.nan, floored=False)
    figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
    ax = figure.subplots()
    _draw(ax, table, "layer", lenses_in_order(table))
    _layer_axis(ax, table["layer"])
    ax.set_ylim(0, 102)
    ax.grid(axis="y")
    ax.set_xlabel("layer that the lens reads")
    ax.set_ylabel("same most likely token as the model, %")
    ax.set_title("How often lens and model agree on the next token")
    _legend(figure, table)
    return figure


@styled()
def length_curves(lengths: pd.DataFrame, fitted_at: int | None = None) -> Figure:
    """KL over the length of the context on log axes, a panel for the first layer, those at a third and two thirds, and
    the last.

    `fitted_at`, the length that the lenses were fitted at, is marked by a dashed line.
    """
    table = lens_rows(lengths, "kl_nats", "lengths", ("n_tokens", "se_nats"))
    layers = np.unique(table["layer"])
    chosen = layers[np.unique(np.linspace(0, len(layers) - 1, min(4, len(layers))).round().astype(int))]
    table = _log_bands(table[table["layer"].isin(chosen)])
    columns = min(2, len(chosen))
    figure, panels = _panels(len(chosen), columns, 0.55 + 2.05 * -(-len(chosen) // columns), sharey=False)
    names = lenses_in_order(table)
    tokens = np.unique(table["n_tokens"].astype(float))
    for ax, layer in zip(panels, chosen, strict=True):
        panel = table[table["layer"] == layer]
        ax.set_xscale("log")
        _draw(ax, panel, "n_tokens", names)
        _log_axis(ax, panel)
        marks = tokens if fitted_at is None else np.append(tokens, fitted_at)
        ax.set_xlim(marks.min() / 1.15, marks.max() * 1.15)
        ax.xaxis.set_major_locator(FixedLocator(_apart(tokens)))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        if fitted_at is not None:
            ax.axvline(fitted_at, color=SLATE, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
        ax.set_title(f"layer {layer:.0f}", fontsize=10)
    _outer_labels(panels, columns, "tokens of context", "KL( model ‖ lens ), nats")
    figure.suptitle("Contexts of other lengths", x=0.01, ha="left", fontsize=11, fontweight="bold")
    keys = (
        []
        if fitted_at is None
        else [Line2D([], [], color=SLATE, linewidth=0.9, linestyle=(0, (4, 3)), label="length of the fits")]
    )
    _legend(figure, table, [*keys, *_floor_key(table)])
    return figure


@styled()
def faithfulness_curves(faithfulness: pd.DataFrame, measure: Measure) -> Figure:
    """Similarity or correlation of the lens's response and the model's over layers, a panel per perturbation, lines
    with intervals.
    """
    bounds = (f"{measure}_low", f"{measure}_high")
    table = lens_rows(faithfulness, measure, "faithfulness", ("perturbation", *bounds))
    table = table.assign(y=table[measure], low=table[bounds[0]], high=table[bounds[1]], floored=False)
    perturbations, names = perturbations_in_order(table), lenses_in_order(table)
    columns = len(perturbations) if len(perturbations) < 4 else 2 if len(perturbations) == 4 else 3
    figure, panels = _panels(len(perturbations), columns, 0.8 + 1.65 * -(-len(perturbations) // columns), sharey=True)
    low = min(0.0, float(table["y"].min()), float(table["low"].min(skipna=True)) if table["low"].notna().any() else 0.0)
    for ax, perturbation in zip(panels, perturbations, strict=True):
        _draw(ax, table[table["perturbation"] == perturbation], "layer", names, 0.75)
        _layer_axis(ax, table["layer"], 12 // columns)
        ax.set_ylim(low - 0.03 * (low < 0), 1.03)
        ax.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        ax.grid(axis="y")
        if low < 0:
            ax.axhline(0, color=SLATE, linewidth=0.7, zorder=1)
        ax.set_title(perturbation.replace("_", " "), fontsize=9.5, pad=5)
    label, title = {
        "similarity": ("Aitchison similarity", "Do lens and model change in the same direction?"),
        "correlation": ("correlation of log KLs", "Do lens and model change by as much?"),
    }[measure]
    _outer_labels(panels, columns, "layer", label)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    _legend(figure, table)
    return figure


@styled()
def truthfulness_curves(table: pd.DataFrame) -> Figure:
    """Calibrated accuracy over layers, the mean of all data sets (see `mean_over_datasets`), a panel for true and one
    for permuted labels.

    Bands are 95 % intervals for these data sets: over their prompts, not over data sets that might have been chosen.
    """
    means = mean_over_datasets(table)
    means = means.assign(
        y=100 * means["accuracy"],
        low=100 * (means["accuracy"] - Z95 * means["se"]),
        high=100 * (means["accuracy"] + Z95 * means["se"]),
        floored=False,
    )
    kinds, names = demonstrations_in_order(means), lenses_in_order(means)
    figure, panels = _panels(len(kinds), len(kinds), 3.6, sharey=True)
    for ax, kind in zip(panels, kinds, strict=True):
        _draw(ax, means[means["demonstrations"] == kind], "layer", names)
        _layer_axis(ax, means["layer"], 14 // len(kinds))
        ax.grid(axis="y")
        ax.set_title(f"{kind} demonstrations", fontsize=10)
    count = int(means["datasets"].iloc[0])
    _outer_labels(
        panels,
        len(kinds),
        "layer that the lens reads",
        f"calibrated accuracy, %\n(mean of {count} data set{'s' * (count != 1)})",
    )
    figure.suptitle("Answers read at each layer", x=0.01, ha="left", fontsize=11, fontweight="bold")
    _legend(figure, means)
    return figure


def _look(name: str) -> Look:
    lens = name.partition(" (")[0]
    return LENSES[lens].look if lens in LENSES else UNKNOWN


def _dashed(name: str) -> bool:
    """Fits from elsewhere than the first init are dashed and have open markers."""
    lens, _, init = name.removesuffix(")").partition(" (")
    return bool(init) and lens in LENSES and init != LENSES[lens].inits[0]


def _log_bands(table: pd.DataFrame) -> pd.DataFrame:
    """`table` with y, low and high as drawn on a log axis, and whether y is `floored`: too small, and drawn at the
    bottom.
    """
    kl = table["kl_nats"].astype(float)
    limit = max(FLOOR, float(kl.max()) / DECADES)
    floored = kl <= limit
    floor = max(limit, FLOOR) if floored.all() else float(kl[~floored].min()) / 2
    half = Z95 * table["se_nats"].astype(float)
    low, high = ((kl + sign * half).clip(lower=floor if floored.any() else limit) for sign in (-1, 1))
    return table.assign(
        y=kl.where(~floored, floor), low=low, high=high.where(high.isna() | (high > floor), floor), floored=floored
    )


def _floor_key(table: pd.DataFrame) -> list[Line2D]:
    """A legend entry that says how many values are drawn at the bottom; none if none is."""
    count = int(table["floored"].sum())
    limit = max(FLOOR, float(table["kl_nats"].max()) / DECADES)
    text = f"{count} ≤ {three_digits(limit)} nats, drawn at the bottom"
    return (
        [Line2D([], [], linestyle="none", marker="o", color=SLATE, fillstyle="none", markersize=5, label=text)]
        if count
        else []
    )


def _draw(ax: Axes, table: pd.DataFrame, x: str, names: Sequence[str], scale: float = 1.0) -> None:
    """A line and a band per name, the first one on top; on long lines only every few points have a marker, of each line
    other ones.
    """
    for number, name in enumerate(names):
        rows = table[table["name"] == name].sort_values(x, kind="stable")
        if rows.empty:
            continue
        look, z = _look(name), 2 + 0.1 * (len(names) - number)
        every = -(-len(rows) // 16)
        ax.fill_between(rows[x], rows["low"], rows["high"], color=look.color, alpha=0.16, linewidth=0, zorder=z)
        (line,) = ax.plot(
            rows[x],
            rows["y"],
            color=look.color,
            linewidth=1.9 if name == HIGHLIGHTED else 1.3,
            label=name,
            zorder=z + 0.05,
        )
        line.set(
            marker=look.marker,
            markersize=5 * scale,
            markeredgewidth=0.5,
            markeredgecolor="white",
            markevery=(number % every, every),
        )
        if _dashed(name):
            line.set(
                linestyle=(0, (3.5, 1.8)), markerfacecolor="white", markeredgecolor=look.color, markeredgewidth=0.9
            )
        low = rows[rows["floored"]]
        if len(low):
            points = ax.scatter(low[x], low["y"], s=(5.5 * scale) ** 2, marker=look.marker, zorder=z + 0.07)
            points.set(facecolor="white", edgecolor=look.color, linewidth=0.9)


def _panels(count: int, columns: int, height: float, sharey: bool) -> tuple[Figure, list[Axes]]:
    """`count` axes in rows of `columns`; the legend goes below."""
    figure = Figure(figsize=(WIDTH, min(9.3, height + 0.55)), layout="constrained")
    grid = figure.subplots(-(-count // columns), columns, sharey=sharey, squeeze=False).ravel()
    for surplus in grid[count:]:
        surplus.remove()
    return figure, list(grid[:count])


def _outer_labels(panels: Sequence[Axes], columns: int, x: str, y: str) -> None:
    """Labels at the left and the bottom of the grid only."""
    for i, ax in enumerate(panels):
        if i + columns >= len(panels):
            ax.set_xlabel(x)
        if i % columns == 0:
            ax.set_ylabel(y)


def _layer_axis(ax: Axes, layers: pd.Series, most: int = 12) -> None:
    low, high = float(layers.min()), float(layers.max())
    air = max(0.03 * (high - low), 0.15)
    ax.set_xlim(low - air, high + air)
    ax.xaxis.set_major_locator(MaxNLocator(max(2, most), integer=True, steps=[1, 2, 4, 5, 10]))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}"))


def _log_axis(ax: Axes, table: pd.DataFrame) -> None:
    """A log axis for y with some air, over a factor of three at least; a wide band may run out at the bottom."""
    lows, highs = table["low"].fillna(table["y"]).clip(lower=table["y"].min() / 2), table["high"].fillna(table["y"])
    low, high = np.log10([min(lows.min(), table["y"].min()), max(highs.max(), table["y"].max())])
    air = max(0.04 * (high - low), 0.03, (np.log10(3) - (high - low)) / 2)
    ax.set_yscale("log")
    ax.set_ylim(10 ** (low - air), 10 ** (high + air))
    low, high = ax.get_ylim()
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 2000 * low else (1,), numticks=12))
    if sum(low <= tick <= high for tick in ax.yaxis.get_major_locator().tick_values(low, high)) < 2:
        ticks = [tick for tick in MaxNLocator(4).tick_values(low, high) if tick > 0]
        ax.yaxis.set_major_locator(FixedLocator(ticks))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: plain(value)))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.grid(axis="y")


def _apart(values: np.ndarray) -> list[float]:
    """Those of the sorted values that have room for a label on a log axis."""
    step = 0.11 * np.log(max(values[-1] / values[0], 1.01))
    chosen = [float(values[0])]
    for value in values[1:]:
        if np.log(value / chosen[-1]) > step:
            chosen.append(float(value))
    return chosen


def _legend(figure: Figure, table: pd.DataFrame, more: Sequence[Line2D] = ()) -> None:
    """All lenses below the figure, then what else there is to explain; columns of about the same length."""
    keys = []
    for name in lenses_in_order(table):
        look = _look(name)
        key = Line2D([], [], color=look.color, marker=look.marker, markersize=5, linewidth=1.5, label=name)
        if _dashed(name):
            key.set(linestyle=(0, (3.5, 1.8)), markerfacecolor="white", markeredgecolor=look.color)
        keys.append(key)
    legend_below(figure, [*keys, *more])
