"""Every figure: a table goes in, a `matplotlib.figure.Figure` comes out.

The tables are the ones a run writes: `gaps` has one row per component and method (component, kind, layer, head, method,
gap_nats, se_nats, n_prompts), `curves` one row per step, component and method (step, component, method,
validation_gap_nats).
No model, no pyplot: a figure depends on its table alone, and `save` gives the same bytes for the same figure every
time.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection
from matplotlib.colors import LinearSegmentedColormap, LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from oacore.ablation.tables import KINDS, gap_rows, layer_of
from oacore.config.ablation import ABLATION_TYPES
from oacore.config.colors import ACCENT, INK, PALE, SLATE
from oacore.report.figures import HEIGHT, WIDTH, decades, every_few, styled, tint
from oacore.report.numbers import FLOOR, plain, three_digits
from oacore.report.series import in_order

KIND_COLORS = {"head": ACCENT, "mlp": INK, "attention_layer": SLATE}  # where the marker alone would be hard to see


def method_color(method: str) -> str:
    """The colour of a method, the same in every figure."""
    return (ABLATION_TYPES[method].color if method in ABLATION_TYPES else "") or SLATE


@styled()
def gap_distributions(gaps: pd.DataFrame) -> Figure:
    """One strip per method, the largest median on top: every component a point, the median a bar with its value.

    Raises ValueError if the table lacks a column or holds no finite gap.
    """
    gaps = gap_rows(gaps, "gap_nats")
    medians = gaps.groupby("method")["gap_nats"].median().reindex(in_order(gaps["method"], ABLATION_TYPES))
    medians = medians.sort_values(ascending=False, kind="stable")
    figure, ax = _figure(1.15 + 0.335 * len(medians))
    size = 16 if len(gaps) < 300 * len(medians) else 7
    for row, (method, median) in enumerate(medians.items()):
        strip = gaps[gaps["method"] == method].sort_values("gap_nats", kind="stable")
        drawn = strip["gap_nats"].clip(lower=FLOOR)
        _points(
            ax,
            drawn,
            row + 0.7 * _spread(np.log10(drawn.to_numpy())),
            strip["kind"],
            drawn <= FLOOR,
            method_color(str(method)),
            size,
        )
        ax.plot(
            [max(median, FLOOR)] * 2, [row - 0.4, row + 0.4], color=INK, linewidth=2.2, solid_capstyle="butt", zorder=4
        )
        ax.annotate(three_digits(median), (1.02, row), xycoords=ax.get_yaxis_transform(), va="center", fontsize=9)
    ax.annotate("median", (1.02, -0.75), xycoords=ax.get_yaxis_transform(), va="center", fontsize=9, color=SLATE)
    ax.set_yticks(range(len(medians)), [str(method) for method in medians.index])
    for label in ax.get_yticklabels():
        if method_color(label.get_text()) != SLATE:
            label.set(color=method_color(label.get_text()), fontweight="bold")
    ax.set_ylim(len(medians) - 0.45, -0.55)
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
    ax.set_xscale("log")
    ax.set_xlim(*_log_limits(gaps["gap_nats"]))
    decades(ax.xaxis)
    ax.set_xlabel("ablation loss gap (nats)")
    ax.set_title("Ablation loss gap by method")
    handles = _kind_keys(gaps["kind"], dict.fromkeys(KINDS, SLATE)) + _floor_key(gaps["gap_nats"])
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), handletextpad=0.2, columnspacing=1.4)
    return figure


@styled()
def optimal_against_counterfactual(gaps: pd.DataFrame) -> Figure:
    """Each component's optimal gap over its counterfactual gap, log-log, with standard errors and Spearman's rho.

    Raises ValueError if the table lacks a column or if no component has a finite gap by both methods.
    """
    gaps = gap_rows(gaps, "gap_nats")
    table = gaps.pivot(index=["component", "kind"], columns="method", values=["gap_nats", "se_nats"])
    if not {"optimal", "counterfactual"} <= set(gaps["method"]):
        raise ValueError(
            f"gaps: methods {in_order(gaps['method'], ABLATION_TYPES)}; this figure needs optimal and counterfactual"
        )
    table = table.dropna(subset=[("gap_nats", "counterfactual"), ("gap_nats", "optimal")])
    if table.empty:
        raise ValueError("gaps: no component has a gap by both optimal and counterfactual")
    x, y = table["gap_nats", "counterfactual"], table["gap_nats", "optimal"]
    kinds = table.index.get_level_values("kind").to_series(index=table.index)
    smaller = x.where(x < y, y)
    limits = _log_limits(pd.concat([x, y]))

    figure, ax = _figure(HEIGHT, 5.0)
    ax.set_aspect("equal")
    ax.set(xscale="log", yscale="log", xlim=limits, ylim=limits)
    ax.plot(limits, limits, color=SLATE, linewidth=0.9, linestyle=(0, (4, 3)), zorder=0)
    x_bars, y_bars = _error_bars(x, table["se_nats", "counterfactual"]), _error_bars(y, table["se_nats", "optimal"])
    ax.errorbar(
        x.clip(lower=FLOOR), y.clip(lower=FLOOR), y_bars, x_bars, fmt="none", ecolor=PALE, elinewidth=0.9, zorder=1
    )
    for kind in KINDS:
        of_kind = kinds == kind
        drawn_x, drawn_y = x[of_kind].clip(lower=FLOOR), y[of_kind].clip(lower=FLOOR)
        _points(ax, drawn_x, drawn_y.to_numpy(), kinds[of_kind], smaller[of_kind] <= FLOOR, KIND_COLORS[kind], 20)
    _label_largest(ax, table.index.get_level_values("component"), x.to_numpy(), y.to_numpy())
    decades(ax.xaxis)
    decades(ax.yaxis)
    ax.set_xlabel("counterfactual gap (nats)")
    ax.set_ylabel("optimal gap (nats)")
    ax.set_title("Optimal against counterfactual ablation")
    rho = x.rank().corr(y.rank()) if len(x) > 2 and x.nunique() > 1 and y.nunique() > 1 else float("nan")
    handles = [*_kind_keys(kinds, KIND_COLORS), *_floor_key(smaller)]
    handles.append(Line2D([], [], color=SLATE, linewidth=0.9, linestyle=(0, (4, 3)), label="equal gaps"))
    legend = ax.legend(
        handles=handles, title=f"Spearman ρ = {rho:.2f}" if np.isfinite(rho) else "Spearman ρ: –", loc="upper left"
    )
    legend.set_alignment("left")
    legend.get_title().set(fontsize=10, fontweight="bold")
    return figure


@styled()
def layer_head_heatmap(gaps: pd.DataFrame, method: str = "optimal") -> Figure:
    """The gaps of one method as a map, layers down and heads across, MLPs (and whole attention layers) in columns of
    their own.

    Raises ValueError if the table lacks a column or the method.
    """
    gaps = gap_rows(gaps[gaps["method"] == method], "gap_nats", f"gaps of method {method}")
    layers = int(gaps["layer"].max()) + 1
    heads = gaps[gaps["kind"] == "head"]
    blocks = {"": _grid(heads["layer"], heads["head"], heads["gap_nats"], layers)} if len(heads) else {}
    for kind, name in (("attention_layer", "attn"), ("mlp", "MLP")):
        rows = gaps[gaps["kind"] == kind]
        if len(rows):
            blocks[name] = _grid(rows["layer"], rows["layer"] * 0, rows["gap_nats"], layers)

    columns = sum(block.shape[1] for block in blocks.values())
    annotated = layers * columns <= 48
    cell = (0.62, 0.42) if annotated else (0.34, 0.275)
    figure, ax = _figure(
        min(9.3, max(2.6, 1.2 + cell[1] * layers)), min(WIDTH, max(3.9, 2.0 + cell[0] * (columns + 1)))
    )
    colors = tint(method_color(method))
    high = max(gaps["gap_nats"].max(), 10 * FLOOR)
    # Four decades at most: beyond, all would look alike.
    low = min(max(gaps["gap_nats"].min(), FLOOR, high / 1e4), high / 10)
    norm = LogNorm(low, high)
    space = max(0.25, columns / 36)
    left, ticks = 0.0, dict[float, str]()
    for name, block in blocks.items():
        edges = left + np.arange(block.shape[1] + 1)
        drawn = np.where(block < low, low / 2, block)  # the colour of "under"; NaN stays NaN
        cells = np.ma.masked_invalid(drawn)
        ax.pcolormesh(edges, np.arange(layers + 1), cells, cmap=colors, norm=norm, edgecolors="white", linewidth=0.6)
        names = {edges[0] + 0.5: name} if name else {edges[h] + 0.5: str(h) for h in every_few(block.shape[1], 13)}
        ticks |= names
        if annotated:
            _annotate(ax, block, left, norm)
        left = edges[-1] + space
    ax.set_xticks(list(ticks), list(ticks.values()))
    ax.set_yticks(np.array(every_few(layers, 16)) + 0.5, [str(layer) for layer in every_few(layers, 16)])
    ax.set(xlim=(0, left - space), ylim=(layers, 0))
    ax.tick_params(length=0)
    for side in ("left", "bottom"):
        ax.spines[side].set_visible(False)
    under = int((gaps["gap_nats"] < low).sum())
    notes = [f"white: {under} below {three_digits(low)} nats"] if under else []
    notes += ["grey: not measured"] if any(np.isnan(block).any() for block in blocks.values()) else []
    ax.set_xlabel("\n".join((["head"] if len(heads) else []) + [", ".join(notes)] * bool(notes)))
    ax.set_ylabel("layer")
    ax.set_title(f"Where the gaps are: {method}")
    bar = figure.colorbar(ScalarMappable(norm, colors), ax=ax, aspect=28, pad=0.02)
    bar.outline.set_visible(False)
    decades(bar.ax.yaxis)
    bar.set_label("ablation loss gap (nats)")
    return figure


def _annotate(ax: Axes, block: np.ndarray, left: float, norm: LogNorm) -> None:
    """The values of a block of cells that begins at x = left."""
    for (row, column), value in np.ndenumerate(block):
        dark = np.isfinite(value) and value > norm.vmin and norm(value) > 0.55
        color = "white" if dark else INK
        ax.text(left + column + 0.5, row + 0.5, three_digits(value), ha="center", va="center", color=color)


@styled()
def convergence_curves(curves: pd.DataFrame, relative: bool = True) -> Figure:
    """Held-out gap of each fitted component over the steps, a panel per method, coloured by layer; a dot where its fit
    stopped.

    `relative` divides every curve by its own last value, so that all end at 1; otherwise the axis is in nats. A curve
    that ends at or below `FLOOR` has no such ratio: it is left out of the relative figure, and counted there. If none
    has one, the axis is in nats. Raises ValueError if the table lacks a column or has no curve to draw.
    """
    curves = gap_rows(curves, "validation_gap_nats", "curves", ("step", "component", "method")).sort_values(
        "step", kind="stable"
    )
    lines = []
    for (method, component), curve in curves.groupby(["method", "component"]):
        steps, values = curve["step"].to_numpy(), curve["validation_gap_nats"].to_numpy()
        if relative and values[-1] <= FLOOR:
            continue
        drawn = np.maximum(values / values[-1] if relative else values, FLOOR)
        far = np.flatnonzero(np.abs(values - values[-1]) > 0.05 * abs(values[-1]))
        settled = steps[far[-1] + 1 if len(far) else 0]
        lines.append(_Line(str(method), layer_of(str(component)), np.column_stack([steps, drawn]), float(settled)))
    if not lines:
        return convergence_curves(curves, relative=False)

    methods = in_order(pd.Series([line.method for line in lines]), ABLATION_TYPES)
    figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
    panels = figure.subplots(1, len(methods), sharey=True, squeeze=False)[0]
    colors = LinearSegmentedColormap.from_list("layers", mpl.colormaps["viridis"](np.linspace(0, 0.88, 64)))
    norm = Normalize(0, max(1, max(line.layer for line in lines)))
    for ax, method in zip(panels, methods, strict=True):
        _convergence_panel(ax, [line for line in lines if line.method == method], colors, norm)
        ax.xaxis.set_major_locator(MaxNLocator(max(3, 7 - len(methods)), integer=True, steps=[1, 2, 5, 10]))
        ax.set_title(method, color=method_color(method), fontsize=10)
    panels[0].set_ylabel("held-out gap ÷ its last value" if relative else "held-out ablation loss gap (nats)")
    figure.suptitle("Convergence of the fits", x=0.01, ha="left", fontsize=11, fontweight="bold")
    bar = figure.colorbar(
        ScalarMappable(norm, colors), ax=list(panels), aspect=30, pad=0.02, ticks=MaxNLocator(8, integer=True)
    )
    bar.outline.set_visible(False)
    bar.set_label("layer")
    left_out = curves.groupby(["method", "component"]).ngroups - len(lines)
    note = "settled: from there on within 5 % of its last value; dots: where the fits stopped"
    note += f"\n{left_out} left out, as their last value is at or below {plain(FLOOR)} nats" if left_out else ""
    figure.supxlabel(note, fontsize=9, color=SLATE)
    return figure


def _convergence_panel(ax: Axes, panel: "Sequence[_Line]", colors: LinearSegmentedColormap, norm: Normalize) -> None:
    """The curves of one method, and the step by which half of them are settled."""
    layers = [line.layer for line in panel]
    ends = np.array([line.points[-1] for line in panel])
    curve_lines = LineCollection(
        [line.points for line in panel], array=layers, cmap=colors, norm=norm, linewidths=0.8, alpha=0.7
    )
    ax.add_collection(curve_lines)
    ax.scatter(ends[:, 0], ends[:, 1], c=layers, cmap=colors, norm=norm, s=15, linewidths=0, zorder=3)
    ax.set_yscale("log")
    ax.autoscale_view()
    decades(ax.yaxis)
    ax.grid(axis="y")
    ax.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))
    ax.set_xlabel("step")
    half = float(np.median([line.settled for line in panel]))
    ax.axvline(half, color=INK, linewidth=0.9, linestyle=(0, (4, 3)), zorder=2)
    text = f"half settled\nby step {half:,.0f}"
    ax.annotate(
        text, (half, 0.98), (6, 0), ax.get_xaxis_transform(), "offset points", va="top", fontsize=9
    ).set_in_layout(False)


def ablation_figures(gaps: pd.DataFrame, curves: pd.DataFrame | None = None) -> dict[str, Figure]:
    """The figures of one task by name, in the order to show them; only those which its methods allow."""
    methods = set(gaps["method"])
    figures = {"gap_distributions": gap_distributions(gaps)}
    if {"optimal", "counterfactual"} <= methods:
        figures["optimal_against_counterfactual"] = optimal_against_counterfactual(gaps)
    if "optimal" in methods:
        figures["layer_head_heatmap"] = layer_head_heatmap(gaps)
    if curves is not None and len(curves):
        figures["convergence_curves"] = convergence_curves(curves)
    return figures


class _Line(NamedTuple):
    """One curve of `convergence_curves`."""

    method: str
    layer: int
    points: np.ndarray  # [steps, 2]: step, value as drawn
    settled: float  # first step from which every value is within 5 % of the last one


def _figure(height: float, width: float = WIDTH) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _spread(values: np.ndarray) -> np.ndarray:
    """Vertical offsets in [-0.5, 0.5] for sorted values: the denser the neighbourhood, the wider; no randomness."""
    bandwidth = max(0.08 * np.ptp(values), 1e-3)
    density = np.exp(-0.5 * ((values[:, None] - values) / bandwidth) ** 2).sum(axis=1)
    golden = (np.arange(len(values)) * 0.6180339887498949 + 0.5) % 1  # consecutive points land far apart
    return (golden - 0.5) * density / max(density.max(), 8)


def _points(
    ax: Axes, x: pd.Series, y: np.ndarray, kinds: pd.Series, on_floor: pd.Series, color: str, size: float
) -> None:
    """Markers by kind; open ones for the values drawn at the floor."""
    for kind, (marker, _) in KINDS.items():
        for open_marker in (False, True):
            chosen = ((kinds == kind) & (on_floor == open_marker)).to_numpy()
            if chosen.any():
                points = ax.scatter(x[chosen], y[chosen], s=size, marker=marker, color=color, zorder=3, clip_on=False)
                points.set(edgecolor=color if open_marker else "white", linewidth=0.9 if open_marker else 0.4)
                if open_marker:
                    points.set_facecolor("none")


def _kind_keys(kinds: pd.Series, colors: Mapping[str, str]) -> list[Line2D]:
    """Legend entries of the kinds present."""
    present = [kind for kind in KINDS if (kinds == kind).any()]
    return [
        Line2D([], [], linestyle="none", marker=KINDS[k][0], color=colors[k], markersize=5, label=KINDS[k][1])
        for k in present
    ]


def _floor_key(values: pd.Series) -> list[Line2D]:
    """A legend entry that says how many values are drawn at the floor; none if none is."""
    count = int((values <= FLOOR).sum())
    text = f"{count} ≤ {plain(FLOOR)}, drawn there"
    return (
        [Line2D([], [], linestyle="none", marker="o", color=SLATE, fillstyle="none", markersize=5, label=text)]
        if count
        else []
    )


def _error_bars(values: pd.Series, errors: pd.Series) -> np.ndarray:
    """Lengths below and above each drawn value [2, n]; a bar that would leave the log axis ends at the floor."""
    drawn = values.clip(lower=FLOOR)
    low, high = ((values + sign * errors.fillna(0)).clip(lower=FLOOR) for sign in (-1, 1))
    return np.stack([drawn - low, high - drawn])


def _label_largest(ax: Axes, names: pd.Index, x: np.ndarray, y: np.ndarray, count: int = 10) -> None:
    """Names beside the largest points, each on the first side with room for it; a point without room stays unnamed."""
    across, up = (
        np.log(v.clip(FLOOR) / ax.get_xlim()[0]) / np.log(ax.get_xlim()[1] / ax.get_xlim()[0]) for v in (x, y)
    )
    taken = [(a - 0.01, a + 0.01, u - 0.01, u + 0.01) for a, u in zip(across, up, strict=True)]
    taken.append((0, 0.62, 0.7, 1))  # the legend
    for i in np.argsort(-y, kind="stable")[:count]:
        width, height, gap = 0.023 * len(names[i]), 0.042, 0.016  # of the axes, at 9 pt
        for side, left, bottom in (
            ("left", across[i] + gap, up[i] - height / 2),
            ("center", across[i] - width / 2, up[i] - gap - height),
            ("right", across[i] - gap - width, up[i] - height / 2),
            ("center", across[i] - width / 2, up[i] + gap),
        ):
            box = (left, left + width, bottom, bottom + height)
            free = all(box[1] < t[0] or box[0] > t[1] or box[3] < t[2] or box[2] > t[3] for t in taken)
            if free and box[0] > 0 and box[1] < 1 and box[2] > 0 and box[3] < 1:
                anchor = {"left": left, "right": left + width, "center": left + width / 2}[side]
                ax.text(anchor, bottom + height / 2, names[i], ha=side, va="center", fontsize=9, transform=ax.transAxes)
                taken.append(box)
                break


def _grid(rows: pd.Series, columns: pd.Series, values: pd.Series, height: int) -> np.ndarray:
    """Values placed by row and column; NaN where there is none."""
    grid = np.full((height, int(columns.max()) + 1), np.nan)
    grid[rows.astype(int), columns.astype(int)] = values
    return grid


def _log_limits(values: pd.Series) -> tuple[float, float]:
    """Ends of a log axis with some air around the values."""
    low, high = np.log10(np.clip([values.min(), values.max()], FLOOR, None))
    air = max(0.04 * (high - low), 0.1)
    return 10 ** (low - air), 10 ** (high + air)
