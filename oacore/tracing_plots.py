"""Causal tracing in figures and one table: which layers, restored at which tokens, bring a corrupted fact back?

The tables are the ones that a run writes: `aie` has one row per corruption, site, position, window and layer, `picture` one per corruption,
site, layer and token of one fact; `AIE_COLUMNS` and `PICTURE_COLUMNS` name what is read here. No model: as in `oacore.plots`, figures
depend on the tables alone.
"""

from collections.abc import Iterable, Sequence
from textwrap import fill
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize, to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from oacore.config import Corruption, Position, Site
from oacore.plots import ACCENT, INK, METHOD_COLORS, SLATE, _every, _styled, _tint, three_digits

Z95 = 1.96  # half the width of a 95 % interval in standard errors
USUAL_NOISE = 3.0  # standard deviations, of ROME and the paper: the scale to compare with, or the nearest there is
MARKED_LAYERS = 12  # up to so many layers each has a marker, beyond only some

SITES = {"attention": "attention output", "mlp": "MLP output", "block": "block output"}
POSITIONS = {"last": "last token", "last_subject": "last subject token", "all_subject": "all subject tokens"}
NOISES = ("gaussian", "gaussian_scalar")
AIE_COLUMNS = ("corruption", "site", "position", "window", "layer", "aie", "se", "p_clean", "p_corrupted", "n", "aie_normalised")
PICTURE_COLUMNS = (
    *("fact", "prompt", "answer", "corruption", "site", "window", "layer", "position", "token"),
    *("in_subject", "p_clean", "p_corrupted", "p_restored"),
)
PEAK_COLUMNS = ("corruption", "site", "position", "window", "peak_layer", "aie", "se", "aie_normalised", "concentration")

BLUE, BLUE_GREY, LIGHT = METHOD_COLORS["counterfactual"], "#7d9cbc", "#98a4b3"
LineStyle = Literal["-"] | tuple[float, tuple[float, ...]]
DASHES: tuple[LineStyle, ...] = ((0, (1, 1.4)), (0, (3, 1.6)), (0, (6, 2)), (0, (6, 1.6, 1, 1.6)), (0, (3, 1.4, 1, 1.4, 1, 1.4)))


class Look(NamedTuple):
    color: str
    style: LineStyle = "-"
    marker: str = "o"
    width: float = 1.1
    band: float = 0.07  # opacity


LOOKS = {  # told apart by stroke and shape where the colours are not
    "oat": Look(ACCENT, width=2.1, band=0.2),
    "oat_shared": Look(SLATE, (0, (5, 1.8)), "D"),
    "mean": Look(INK, (0, (1, 1.4)), "^"),
    "token_replacement": Look(INK, (0, (6, 1.6, 1, 1.6)), "v"),
}
NOISE_LOOK = Look(BLUE, "-", "s", 1.6, 0.2)
UNKNOWN = Look(SLATE, "-", "<")


# ---- Names and tables ----------------------------------------------------------------------------------------------------------


def kind_and_scale(corruption: str) -> tuple[str, float]:
    """`gaussian-3` is of kind gaussian and scale 3; the scale of what is no noise is NaN."""
    kind, _, scale = corruption.partition("-")
    return (kind, float(scale)) if kind in NOISES and scale else (corruption, float("nan"))


def corruptions_in_order(corruptions: Iterable[str]) -> list[str]:
    """Each corruption once, in the order of the configuration's kinds, noise by its scale; unknown ones last, as they come."""
    kinds = list(get_args(Corruption))

    def key(name: str) -> tuple[int, float]:
        kind, scale = kind_and_scale(name)
        return (kinds.index(kind) if kind in kinds else len(kinds), 0.0 if np.isnan(scale) else scale)

    return sorted(dict.fromkeys(corruptions), key=key)


def noises(corruptions: Iterable[str]) -> list[str]:
    """The corruptions that are noise of some scale, in order."""
    return [name for name in corruptions_in_order(corruptions) if not np.isnan(kind_and_scale(name)[1])]


def usual_noise(corruptions: Iterable[str]) -> str | None:
    """The noise to compare with: per coordinate if there is such, of the scale nearest to `USUAL_NOISE`."""
    found = [(kind_and_scale(name), name) for name in noises(corruptions)]
    return min(found, key=lambda item: (NOISES.index(item[0][0]), abs(item[0][1] - USUAL_NOISE), -item[0][1]))[1] if found else None


def measured(table: pd.DataFrame, value: str = "aie", name: str = "aie", columns: Sequence[str] = AIE_COLUMNS) -> pd.DataFrame:
    """The rows with a number in column `value`; NaN means not measured.

    Raises ValueError if a column is missing, if no row has a value or if one is infinite.
    """
    if missing := [column for column in columns if column not in table]:
        raise ValueError(f"{name}: no column {', '.join(missing)}; found {', '.join(map(str, table.columns))}")
    table = table[table[value].notna()].reset_index(drop=True)
    if table.empty:
        raise ValueError(f"{name}: no row with a value in {value}")
    if (infinite := np.isinf(table[value])).any():
        row = table[infinite].iloc[0]
        raise ValueError(f"{name}: infinite {value} for {row['corruption']}, {row['site']}, layer {row['layer']}")
    return table


def present(values: pd.Series, known: Iterable[str]) -> list[str]:
    """The values present, in the order of `known`; unknown ones last, by name."""
    found, known = set(values), list(known)
    return [value for value in known if value in found] + sorted(found - set(known))


def peak_table(aie: pd.DataFrame) -> pd.DataFrame:
    """The layer of the largest AIE of each curve, the first of equal ones: one row per corruption, site, position and window.

    `concentration` is the peak's share of the sum of the curve's positive values: 1 if all of the effect is at one layer, NaN if there is
    none. Neighbouring windows overlap, so that wider ones are less concentrated by themselves: compare it within a window.
    Raises ValueError as `measured`.
    """
    aie = measured(aie)
    rows = []
    for site in present(aie["site"], get_args(Site)):
        of_site = aie[aie["site"] == site]
        for window in sorted(set(of_site["window"])):
            of_window = of_site[of_site["window"] == window]
            for position in present(of_window["position"], get_args(Position)):
                at = of_window[of_window["position"] == position]
                for corruption in corruptions_in_order(at["corruption"]):
                    curve = at[at["corruption"] == corruption].sort_values("layer", kind="stable")
                    peak, total = curve.iloc[int(curve["aie"].to_numpy().argmax())], float(curve["aie"].clip(lower=0).sum())
                    share = float(peak["aie"]) / total if total > 0 else float("nan")
                    rows.append((corruption, site, position, window, *peak[["layer", "aie", "se", "aie_normalised"]], share))
    return pd.DataFrame(rows, columns=list(PEAK_COLUMNS)).astype({"window": int, "peak_layer": int})


# ---- Figures -------------------------------------------------------------------------------------------------------------------


def tracing_figure_names(sites: Iterable[str], corruptions: Iterable[str], n_pictures: int) -> tuple[str, ...]:
    """The names that `tracing_figures` gives, in its order, for a table of these sites and corruptions and so many facts."""
    names = [f"aie_{site}" for site in present(pd.Series(list(sites)), get_args(Site))]
    names += ["noise_scales"] if len(noises(corruptions)) > 1 else []
    return (*names, *(f"fact_{i}" for i in range(n_pictures)))


def tracing_figures(aie: pd.DataFrame, pictures: pd.DataFrame | None = None) -> dict[str, Figure]:
    """The figures by name, in the order to show them: `aie_{site}`, `noise_scales` if noise has two scales or kinds, `fact_0`, ...

    `pictures` holds the rows of several facts, drawn in the order of column `fact`. Raises ValueError as the figures do.
    """
    aie = measured(aie)
    facts = [] if pictures is None or pictures.empty else sorted(set(measured(pictures, "p_restored", "pictures", PICTURE_COLUMNS)["fact"]))
    figures = {}
    for name in tracing_figure_names(aie["site"], aie["corruption"], len(facts)):
        if name == "noise_scales":
            figures[name] = noise_scales(aie)
        elif name.startswith("aie_"):
            figures[name] = aie_curves(aie, name.removeprefix("aie_"))
        else:
            assert pictures is not None
            figures[name] = heat_map(pictures[pictures["fact"] == facts[int(name.removeprefix("fact_"))]])
    return figures


@_styled()
def aie_curves(aie: pd.DataFrame, site: str) -> Figure:
    """AIE over the layers of one site with 95 % bands: a column of panels per position, a row per window, a line per corruption.

    Raises ValueError as `measured`, or if the table lacks the site.
    """
    aie = measured(aie)
    if site not in set(aie["site"]):
        raise ValueError(f"aie: no site {site}; found {', '.join(present(aie['site'], get_args(Site)))}")
    aie = aie[aie["site"] == site]
    positions, windows = present(aie["position"], get_args(Position)), sorted(set(aie["window"]))
    looks = _looks(aie["corruption"])
    figure, panels = _panels(len(windows), len(positions))
    for row, window in enumerate(windows):
        for column, position in enumerate(positions):
            shown = aie[(aie["window"] == window) & (aie["position"] == position)]
            _curves(panels[row, column], shown, looks)
        panels[row, 0].set_ylabel(f"AIE, window of {window}" if window > 1 else "AIE, one layer")
    _finish(figure, panels, aie["layer"], positions, f"AIE of restoring the {SITES.get(site, site)} (probability)")
    _legend(figure, looks)
    return figure


@_styled()
def noise_scales(aie: pd.DataFrame) -> Figure:
    """AIE over layers under noise of each scale, the darker the stronger: panels of site and position, at the narrowest window.

    Noise with one standard deviation for all coordinates is dashed. Raises ValueError as `measured`, or if the table has no noise.
    """
    aie = measured(aie)
    names = noises(aie["corruption"])
    if not names:
        raise ValueError(f"aie: corruptions {', '.join(corruptions_in_order(aie['corruption']))}; this figure needs gaussian-<scale>")
    aie = aie[aie["corruption"].isin(names)]
    aie = aie[aie["window"] == aie["window"].min()]
    sites, positions = present(aie["site"], get_args(Site)), present(aie["position"], get_args(Position))
    scales = sorted({kind_and_scale(name)[1] for name in names})
    shades = LinearSegmentedColormap.from_list("scales", ["#9cc3e6", BLUE, "#06243d"])(np.linspace(0, 1, len(scales)))
    looks = {}
    for name in names:
        kind, scale = kind_and_scale(name)
        color = to_hex(shades[scales.index(scale)]) if len(scales) > 1 else BLUE
        looks[name] = Look(color, "-", "o", 1.4, 0.1) if kind == NOISES[0] else Look(color, (0, (4, 1.6)), "s", 1.4, 0.1)
    figure, panels = _panels(len(sites), len(positions))
    for row, site in enumerate(sites):
        for column, position in enumerate(positions):
            _curves(panels[row, column], aie[(aie["site"] == site) & (aie["position"] == position)], looks)
        panels[row, 0].set_ylabel(f"AIE, {SITES.get(site, site)}")
    window = int(aie["window"].min())
    _finish(
        figure,
        panels,
        aie["layer"],
        positions,
        f"AIE by scale of the noise, {'one layer' if window == 1 else f'window of {window}'} (probability)",
    )
    _legend(figure, looks)
    return figure


@_styled()
def heat_map(picture: pd.DataFrame) -> Figure:
    """One fact, token by token: the answer's probability with one token's output restored around one layer.

    A row of panels per corruption, a column per site; tokens down, the subject's with an asterisk, layers across. Colours run from the
    lowest probability of a corrupted run to the clean run's. Raises ValueError as `measured`, or if there is more than one fact or window.
    """
    picture = measured(picture, "p_restored", "picture", PICTURE_COLUMNS)
    for name in ("fact", "window"):
        if len(several := sorted(set(picture[name]))) > 1:
            raise ValueError(f"picture: {name} {', '.join(map(str, several))}; one picture shows one {name}")
    picture = picture.astype({"layer": int, "position": int})
    corruptions, sites = corruptions_in_order(picture["corruption"]), present(picture["site"], get_args(Site))
    tokens = picture.drop_duplicates("position").sort_values("position")
    first, last = int(tokens["position"].iloc[0]), int(tokens["position"].iloc[-1])
    labels = {int(p): _token(t) + "*" * bool(s) for p, t, s in zip(tokens["position"], tokens["token"], tokens["in_subject"], strict=True)}
    n_layers, n_tokens = int(picture["layer"].max()) + 1, last - first + 1
    p_clean, low = float(picture["p_clean"].max()), float(picture["p_corrupted"].min())
    high = max(p_clean, low + 1e-6)  # less is rounding
    norm, tint = Normalize(low, high), _tint(ACCENT)
    colors = tint.with_extremes(bad="#cfd5dc", under=tint(0.0), over=tint(1.0))
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
        ax.yaxis.label.set_color(ACCENT if corruption.startswith("oat") else INK)
    panels[0, 0].set_xticks(_every(n_layers, 9))
    answer, window = _token(picture["answer"].iloc[0]), int(picture["window"].iloc[0])
    _title(figure, f"What brings back “{answer}” (clean p = {three_digits(p_clean)})")
    figure.supxlabel("restored layer" if window == 1 else f"layer in the middle of the {window} restored ones", fontsize=10)
    values = picture["p_restored"]
    extend = {(False, False): "neither", (True, False): "min", (False, True): "max", (True, True): "both"}
    ends = extend[bool((values < low).any()), bool((values > high).any())]
    bar = figure.colorbar(ScalarMappable(norm, colors), ax=list(panels.flat), aspect=28, pad=0.02, extend=ends, extendfrac=0.03)
    bar.outline.set_visible(False)
    bar.locator = MaxNLocator(6)
    bar.set_label("p(answer), restored")
    return figure


# ---- Parts ---------------------------------------------------------------------------------------------------------------------


def _look(corruption: str) -> Look:
    return LOOKS.get(corruption, UNKNOWN)


def _looks(corruptions: Iterable[str]) -> dict[str, Look]:
    """How each corruption is drawn, in order: optimal ablation and the usual noise in colours of their own."""
    names = corruptions_in_order(corruptions)
    usual, others = usual_noise(names), [name for name in noises(names) if name != usual_noise(names)]
    looks = {name: _look(name) for name in names}
    for kind, color, marker in zip(NOISES, (BLUE_GREY, LIGHT), ("P", "X"), strict=True):
        for i, name in enumerate(name for name in others if kind_and_scale(name)[0] == kind):
            looks[name] = Look(color, DASHES[i % len(DASHES)], marker)
    return looks | ({usual: NOISE_LOOK} if usual else {})


def _panels(rows: int, columns: int) -> tuple[Figure, np.ndarray]:
    """A grid of axes that share their layers, and their values within a row."""
    figure = Figure(figsize=(1.1 + 2.5 * max(columns, 1.9), 1.55 + (1.75 if rows > 1 else 2.4) * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, sharex=True, sharey="row", squeeze=False)


def _curves(ax: Axes, shown: pd.DataFrame, looks: dict[str, Look]) -> None:
    """A line and a band for each corruption, the first of `looks` on top."""
    ax.axhline(0, color=SLATE, linewidth=0.8, zorder=1)
    ax.grid(axis="y")
    for z, (name, look) in enumerate(list(looks.items())[::-1], start=2):
        curve = shown[shown["corruption"] == name].sort_values("layer", kind="stable")
        if curve.empty:
            continue
        x, y, half = (curve[column].to_numpy(float) for column in ("layer", "aie", "se"))
        half = Z95 * np.nan_to_num(half)
        ax.fill_between(x, y - half, y + half, color=look.color, alpha=look.band, linewidth=0, zorder=1 + z / 100)  # below every line
        step = 1 if len(x) <= MARKED_LAYERS else -(-len(x) // 8)
        marks = slice((z * step // len(looks)) % step, None, step)  # lines that lie on one another show their markers in turn
        line = ax.plot(x, y, color=look.color, linestyle=look.style, linewidth=look.width, zorder=z, label=name)[0]
        line.set(marker=look.marker, markersize=4.2, markevery=marks, markeredgecolor="white", markeredgewidth=0.4)


def _finish(figure: Figure, panels: np.ndarray, layers: pd.Series, positions: Sequence[str], title: str) -> None:
    """Titles of the figure and of its columns, and whole layers on the axis that all panels share."""
    low, high = int(layers.min()), int(layers.max())
    air = max(0.25, 0.02 * (high - low))
    panels[0, 0].set_xlim(low - air, high + air)
    panels[0, 0].set_xticks([low + i for i in _every(high - low + 1, 9)])
    for ax, position in zip(panels[0], positions, strict=True):
        ax.set_title(POSITIONS.get(position, position), fontsize=10)
    for ax in panels[-1]:
        ax.set_xlabel("layer")
    for ax in panels[:, 0]:
        ax.yaxis.set_major_locator(MaxNLocator(5))
    figure.align_ylabels(panels[:, 0])
    _title(figure, title)


def _title(figure: Figure, title: str) -> None:
    """A title over all panels, broken where it would run out of the figure; what a model writes is not read as mathematics."""
    wide = int(figure.get_figwidth() / 0.1)  # characters in bold 11 pt
    figure.suptitle(fill(title, wide), x=0.01, ha="left", fontsize=11, fontweight="bold", parse_math=False)


def _legend(figure: Figure, looks: dict[str, Look]) -> None:
    """All corruptions below the panels, in rows of equal length."""
    keys = [
        Line2D([], [], color=look.color, linestyle=look.style, linewidth=look.width, marker=look.marker, markersize=4.5, label=name)
        for name, look in looks.items()
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
