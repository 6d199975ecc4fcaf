"""What all figures share: one style, colours, axes, and saving to the same bytes."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import StringIO
from pathlib import Path

from matplotlib import style
from matplotlib.axis import Axis
from matplotlib.colors import Colormap, LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from oacore.config.colors import ACCENT, GRID, INK, SLATE
from oacore.report.numbers import plain
from oacore.store.artefacts import ANY, write_svg
from oacore.store.atomic import atomic_path
from oacore.store.provenance import Provenance

WIDTH = 5.9  # inches: two side by side on a laptop, one across an A4 page
HEIGHT = 4.5  # two under one another with their captions
STYLE = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same everywhere
    "font.size": 9.5,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 9,
    "axes.titlecolor": INK,
    "axes.labelsize": 10,
    "axes.labelcolor": INK,
    "axes.edgecolor": SLATE,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "text.color": INK,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "xtick.color": SLATE,
    "ytick.color": SLATE,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "svg.fonttype": "path",  # outlines need no font on the reader's machine
    "svg.hashsalt": "oacore",  # element ids from content, not from a random number
    "savefig.dpi": 160,
}


@contextmanager
def styled() -> Iterator[None]:
    """The one style, on top of matplotlib's defaults: a user's matplotlibrc changes nothing."""
    with style.context(["default", STYLE]):
        yield


def save(figure: Figure, path_stem: str | Path, provenance: Provenance = ANY) -> tuple[Path, Path]:
    """Write `path_stem`.svg, signed with what it belongs to, and .png; no date or version inside: the same figure gives
    the same bytes.
    """
    svg, png = Path(f"{path_stem}.svg"), Path(f"{path_stem}.png")
    write_svg(svg, svg_of(figure), provenance)
    with styled(), atomic_path(png) as temporary:
        figure.savefig(temporary, metadata={"Software": None})
    return svg, png


def svg_of(figure: Figure) -> str:
    """The figure as an SVG document."""
    with styled():
        figure.draw_without_rendering()
        # Laid out once: a second pass would move the axes by a hair, and with an engine each format is drawn twice.
        figure.set_layout_engine(None)
        drawn = StringIO()
        figure.savefig(drawn, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return drawn.getvalue()


def legend_below(figure: Figure, keys: Sequence[Line2D]) -> None:
    """All keys below the panels, in columns of about the same length, and no more of them than there is room for."""
    longest = max(len(str(key.get_label())) for key in keys)
    room = 13 * figure.get_figwidth()  # letters in a row; a key's line and the space beside it take 6
    most = max(1, min(5, int(room / (longest + 6))))
    rows = -(-len(keys) // most)
    columns = -(-len(keys) // rows)
    figure.set_figheight(figure.get_figheight() + 0.22 * max(0, rows - 3))  # or the panels would pay for them
    figure.legend(handles=keys, loc="outside lower center", ncols=columns, columnspacing=1.4, handlelength=2.4)


def every_few(count: int, most: int) -> list[int]:
    """0 .. count - 1 in even steps, at most `most` of them."""
    return list(range(0, count, -(-count // most)))


def tint(color: str) -> Colormap:
    """From near white through the method's own colour to near black: one hue, lightness alone carries the value."""
    colors = LinearSegmentedColormap.from_list(
        color,
        [
            (0, "#fbeee4" if color == ACCENT else "#e9eff5"),
            (0.65, color),
            (1, "#2a1206" if color == ACCENT else "#0d1520"),
        ],
    )
    return colors.with_extremes(bad="#cfd5dc", under="white")


def decades(axis: Axis) -> None:
    """Tick labels as plain numbers: at the powers of ten, on a short axis also at 2 and 5 times them."""
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 200 * low else (1,), numticks=9))
    axis.set_major_formatter(FuncFormatter(lambda value, _: plain(value)))
    axis.set_minor_formatter(NullFormatter())
