"""What lenses read at each layer and position of one prompt, the logit-lens picture: SVG text that answers to the mouse
without a script.

One grid per lens: a column per position with the prompt's token below, a row per layer, the last layer on top. A cell
holds the lens's most likely next token, the darker the more likely it is. Hovering a cell shows the most likely tokens
there with their probabilities.
"""

import hashlib
import textwrap
import unicodedata
from typing import NamedTuple
from xml.etree.ElementTree import Element, SubElement, indent, tostring

import numpy as np
import pandas as pd
from matplotlib.colors import LinearSegmentedColormap, to_hex, to_rgb

from oacore.config.colors import ACCENT, INK, SLATE
from oacore.config.lenses import HIGHLIGHTED
from oacore.errors import UserError

COLUMNS = ("prompt", "lens", "init", "layer", "position", "token", "rank", "predicted", "probability")
SHADES = LinearSegmentedColormap.from_list(
    "shades", [(0, "#f6f9fc"), (0.5, "#8fbbdd"), (0.75, "#2f7bb8"), (1, "#0a2540")]
)
DARK = "#0d1520"  # text on light cells
MONO = "ui-monospace, 'Cascadia Mono', 'Liberation Mono', 'DejaVu Sans Mono', monospace"  # as the report
MARGIN = 14.0
GAP = 30.0  # between grids
LABELS = 30.0  # width of the layers' numbers
PAGE = 1180.0  # width that the report has
SIZE = 10.5  # of letters in cells
ADVANCE = 0.61  # width of a letter in sizes, in the widest of the fonts
PAD = 4.0  # between a cell's edge and its text
NARROWEST, WIDEST = 34.0, 84.0  # cells
PANEL, PANEL_LINE = 212.0, 16.0  # width of what hovering shows, height of its lines
ELLIPSIS, EMPTY, UNPRINTABLE = "…", "∅", "\ufffd"
VISIBLE = {" ": "·", "\n": "↵", "\r": "␍", "\t": "⇥"}


class _Cell(NamedTuple):
    column: int
    row: int  # 0 on top
    layer: object
    position: int
    top: list[tuple[int, str, float]]  # rank, token, probability


class _Layout:
    """Sizes and places, the same for all grids of a picture."""

    def __init__(self, picture: pd.DataFrame, n_grids: int) -> None:
        positions, layers = picture["position"].nunique(), picture["layer"].nunique()
        shown = pd.concat([picture.loc[picture["rank"] == picture["rank"].min(), "predicted"], picture["token"]])
        longest = max(text_width(visible(token), SIZE) for token in shown)
        room = (PAGE - 2 * MARGIN - LABELS) / positions
        self.cell = min(max(min(longest + 2 * PAD, WIDEST, room), NARROWEST), WIDEST)
        self.row = 23.0 if layers <= 12 else 19.0
        self.grid_width = LABELS + positions * self.cell
        self.grid_height = 24 + layers * self.row + 26
        self.per_row = max(1, min(n_grids, int((PAGE - 2 * MARGIN + GAP) / (self.grid_width + GAP))))
        self.panel = (
            2 * PAD + PANEL_LINE * (int(picture.groupby(["lens", "init", "layer", "position"]).size().max()) + 1) + 2
        )
        natural = 2 * MARGIN + self.per_row * self.grid_width + (self.per_row - 1) * GAP
        self.width = max(
            natural, self.cell + 2 * PANEL + 2 * MARGIN + 12
        )  # so that a panel has room at the left or the right of any cell
        text = " ".join(f"Prompt {picture['prompt'].iloc[0]}".split())
        room = self.width - 2 * MARGIN
        lines = textwrap.wrap(_clean(text), int(room / (14 * ADVANCE)), max_lines=2, placeholder=ELLIPSIS)
        self.title = [fitted(line, room, 14) for line in lines]
        self.top = MARGIN + 18 * len(lines) + 34
        rows = -(-n_grids // self.per_row)
        self.height = max(self.top + rows * (self.grid_height + 12) + MARGIN - 12, self.panel + 2 * MARGIN)

    def corner(self, grid: int) -> tuple[float, float]:
        """Where the cells of a grid begin."""
        x = MARGIN + (grid % self.per_row) * (self.grid_width + GAP) + LABELS
        return x, self.top + (grid // self.per_row) * (self.grid_height + 12) + 24


def token_grid_svg(picture: pd.DataFrame) -> str:
    """The drawing as an SVG document, a grid per lens in the order of the table; the same table gives the same text.

    Args:
        picture: one row per lens, init, layer, position and rank (prompt, lens, init, layer, position, token, rank,
            predicted, probability), of one prompt: `token` is the prompt's at `position`, `predicted` the lens's of
            that `rank`, from 1. Read it from CSV with `keep_default_na=False`, or tokens such as "null" get lost; a
            missing token is drawn as an empty one.

    Raises:
        UserError: a missing column, no row or more than one prompt, two tokens of one rank or at one position, a cell
            without rank 1, or a probability that is not one.
    """
    table = _checked(picture)
    names = list(dict.fromkeys(zip(table["lens"], table["init"], strict=True)))
    layout = _Layout(table, len(names))
    width, height = _n(layout.width), _n(layout.height)
    svg = Element(
        "svg", xmlns="http://www.w3.org/2000/svg", width=width, height=height, viewBox=f"0 0 {width} {height}"
    )
    svg.set("font-family", "system-ui, sans-serif")  # as the report
    style = SubElement(svg, "style")
    _heading(svg, layout.title)
    tokens = table.drop_duplicates("position").set_index("position")["token"].sort_index()
    layers = sorted(set(table["layer"]), reverse=True)
    overlay = Element(
        "g", {"font-family": MONO, "font-size": _n(SIZE), "fill": INK}
    )  # above all cells: what hovering shows
    for number, (lens, init) in enumerate(names):
        rows = table[(table["lens"] == lens) & (table["init"] == init)]
        name = f"{lens} ({init})" if init else lens
        _draw_grid(
            svg, overlay, name, _cells(rows, layers, list(tokens.index)), layers, tokens, layout, layout.corner(number)
        )
    svg.append(overlay)
    name = "t" + hashlib.sha256(tostring(svg)).hexdigest()[:10]  # two drawings on one page keep their styles apart
    svg.set("class", name)
    style.text = _rules(name)
    indent(svg, "")
    return tostring(svg, encoding="unicode") + "\n"


def visible(token: object) -> str:
    """A token as one line of printable text: `·` for a blank, `↵` for a new line, `∅` for nothing."""
    text = "" if token is None or (isinstance(token, float) and np.isnan(token)) else str(token)
    return "".join(VISIBLE.get(c, c if c.isprintable() else "␣" if c.isspace() else UNPRINTABLE) for c in text) or EMPTY


def text_width(text: str, size: float) -> float:
    """How wide a text gets in a font of equal widths, at most: letters of other scripts come from other fonts, and are
    wider.
    """
    return size * sum(_advance(c) for c in text)


def fitted(text: str, width: float, size: float) -> str:
    """The text, cut with an ellipsis if it would be wider than `width`."""
    if text_width(text, size) <= width:
        return text
    while text and text_width(text + ELLIPSIS, size) > width:
        text = text[:-1]
    return text + ELLIPSIS


def _advance(character: str) -> float:
    if unicodedata.combining(character):
        return 0.0
    if ord(character) < 0x0590 or character in (ELLIPSIS, *VISIBLE.values(), "␣", EMPTY):  # Latin, Greek, Cyrillic
        return ADVANCE
    return 1.3 if ord(character) > 0xFFFF else 1.05


def _clean(text: str) -> str:
    return "".join(c if c.isprintable() else UNPRINTABLE for c in text)


def _checked(picture: pd.DataFrame) -> pd.DataFrame:
    """The table with plain texts and numbers."""
    if missing := [column for column in COLUMNS if column not in picture]:
        raise UserError(f"picture: no column {', '.join(missing)}; found {', '.join(map(str, picture.columns))}")
    if picture.empty or picture["prompt"].nunique(dropna=False) > 1:
        raise UserError(f"picture: {picture['prompt'].nunique(dropna=False)} prompts; a picture shows one")
    texts = {
        column: ["" if pd.isna(text) else str(text) for text in picture[column]]
        for column in ("lens", "init", "token", "predicted")
    }
    table = picture.assign(**texts, probability=picture["probability"].astype(float))
    if not (bad := table[~table["probability"].between(0, 1 + 1e-6)]).empty:
        raise UserError(
            f"picture: probability {bad['probability'].iloc[0]} of {_place(bad.iloc[0])}; allowed are numbers from 0 "
            "to 1"
        )
    cell = ["lens", "init", "layer", "position"]
    if not (twice := table[table.duplicated([*cell, "rank"])]).empty:
        raise UserError(f"picture: two tokens of rank {twice['rank'].iloc[0]} for {_place(twice.iloc[0])}")
    if not (headless := table[table.groupby(cell)["rank"].transform("min") != 1]).empty:
        raise UserError(f"picture: no token of rank 1 for {_place(headless.iloc[0])}")
    per_position = table.groupby("position")["token"].nunique()
    if (several := per_position > 1).any():
        raise UserError(
            f"picture: {per_position[several].iloc[0]} tokens at position {per_position.index[several][0]} of one "
            "prompt"
        )
    return table


def _place(row: pd.Series) -> str:
    return f"{row['lens']}, layer {row['layer']}, position {row['position']}"


def _cells(rows: pd.DataFrame, layers: list[object], positions: list[int]) -> list[_Cell]:
    cells = []
    rows = rows.sort_values(["layer", "position", "rank"], kind="stable")
    for _, group in rows.groupby(["layer", "position"]):
        layer, position = group["layer"].iloc[0], int(group["position"].iloc[0])
        top = list(zip(group["rank"].astype(int), group["predicted"], group["probability"], strict=True))
        cells.append(_Cell(positions.index(position), layers.index(layer), layer, position, top))
    return cells


def _draw_grid(
    svg: Element,
    overlay: Element,
    name: str,
    cells: list[_Cell],
    layers: list[object],
    tokens: pd.Series,
    layout: _Layout,
    corner: tuple[float, float],
) -> None:
    left, top = corner
    group = SubElement(svg, "g", {"class": "grid"})
    _text(group, left, top - 9, _clean(name), 13, fill=ACCENT if name == HIGHLIGHTED else INK).set(
        "font-weight", "bold"
    )
    for row, layer in enumerate(layers):
        _text(group, left - 7, top + (row + 0.5) * layout.row + 3.8, str(layer), 10.5, "end", SLATE)
    bottom = top + len(layers) * layout.row
    letters = {"font-family": MONO, "font-size": _n(SIZE), "text-anchor": "middle"}
    prompt = SubElement(group, "g", letters | {"font-weight": "bold", "fill": INK})
    for column, token in enumerate(tokens):
        middle = left + (column + 0.5) * layout.cell
        _text(prompt, middle, bottom + 15, fitted(visible(token), layout.cell - PAD, SIZE))
    inside = SubElement(group, "g", letters)
    following = [*tokens.iloc[1:], None]
    for cell in cells:
        _, token, probability = cell.top[0]
        x, y = left + cell.column * layout.cell, top + cell.row * layout.row
        fill = shade(probability)
        box = SubElement(inside, "g", {"class": "cell"})
        _rect(box, x + 0.5, y + 0.5, layout.cell - 1, layout.row - 1, fill)
        text = fitted(visible(token), layout.cell - 2 * PAD, SIZE)
        _text(box, x + layout.cell / 2, y + layout.row / 2 + 3.7, text, fill=ink_on(fill))
        _draw_hover(overlay, name, cell, visible(tokens.loc[cell.position]), (x, y), layout)
    for cell in cells:  # above the neighbours' boxes
        if cell.top[0][1] == following[cell.column]:
            x, y = left + cell.column * layout.cell, top + cell.row * layout.row
            _outline(group, x + 1, y + 1, layout.cell - 2, layout.row - 2)


def _draw_hover(overlay: Element, name: str, cell: _Cell, token: str, at: tuple[float, float], layout: _Layout) -> None:
    """An invisible box that feels the mouse, and the panel that it shows beside the cell."""
    x, y = at
    group = SubElement(overlay, "g", {"class": "spot"})
    header = f"{name}, layer {cell.layer}, position {cell.position} after {token}"
    listed = [f"{rank}. {visible(predicted)} {percent(probability)}" for rank, predicted, probability in cell.top]
    SubElement(group, "title").text = _clean(header) + "\n" + "\n".join(listed)
    _rect(group, x + 0.5, y + 0.5, layout.cell - 1, layout.row - 1, "none").set("class", "hit")
    right = x + layout.cell + 6
    panel_x = right if right + PANEL + 4 <= layout.width else max(4.0, x - 6 - PANEL)
    panel_y = min(max(y + layout.row / 2 - layout.panel / 2, 4.0), layout.height - layout.panel - 4)
    tip = SubElement(
        group, "g", {"class": "tip", "display": "none", "transform": f"translate({_n(panel_x)} {_n(panel_y)})"}
    )
    _rect(tip, 0, 0, PANEL, layout.panel, "white").attrib |= {"rx": "4", "stroke": SLATE}
    where = f"layer {cell.layer}, after "
    spare = PANEL - 2 * PAD - 8 - text_width(where, SIZE)
    _text(tip, PAD + 4, PAD + 12, where + fitted(token, spare, SIZE), fill=SLATE)
    numbers = Element("g", {"text-anchor": "end"})
    bars = []
    for line, (_, predicted, probability) in enumerate(cell.top, start=1):
        base = PAD + 12 + line * PANEL_LINE
        bars.append(f"M{_n(104)} {_n(base - 8)}h{_n(60 * probability)}v8H104z")
        _text(tip, PAD + 4, base, fitted(visible(predicted), 92, SIZE))
        _text(numbers, PANEL - PAD - 4, base, percent(probability))
    tip.append(numbers)
    SubElement(tip, "path", {"d": "".join(bars), "fill": "#2f7bb8"})


def shade(probability: float) -> str:
    """The colour of a cell."""
    return to_hex(SHADES(min(max(probability, 0.0), 1.0)))


def ink_on(fill: str) -> str:
    """White or dark, whichever stands out more."""
    return "#ffffff" if contrast("#ffffff", fill) > contrast(DARK, fill) else DARK


def contrast(first: str, second: str) -> float:
    """The contrast ratio of two colours, as WCAG defines it: from 1 to 21."""
    low, high = sorted(_luminance(color) for color in (first, second))
    return (high + 0.05) / (low + 0.05)


def _luminance(color: str) -> float:
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(color)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def percent(probability: float) -> str:
    """`56.3 %`; probabilities too small for that as `<0.1 %`."""
    return "<0.1\u00a0%" if 0 < probability < 0.0005 else f"{100 * min(probability, 1.0):.1f}\u00a0%"


def _heading(svg: Element, lines: list[str]) -> None:
    """Title, the scale of shades, what an outline means."""
    y = MARGIN + 12
    for line in lines:
        _text(svg, MARGIN, y, line, 14, fill=INK).set("font-weight", "bold")
        y += 18
    y += 2
    _text(svg, MARGIN, y, "probability 0", 11.5, fill=SLATE)
    for step in range(10):
        _rect(svg, MARGIN + 78 + 9 * step, y - 9, 9, 11, shade((step + 0.5) / 10))
    _text(svg, MARGIN + 173, y, "1", 11.5, fill=SLATE)
    _outline(svg, MARGIN + 196, y - 9.5, 18, 12)
    _text(svg, MARGIN + 220, y, "the prompt's own next token", 11.5, fill=SLATE)


def _rules(name: str) -> str:
    """Styles that follow the mouse. No commas inside a selector: the report splits selectors there."""
    rules = [
        f".{name} .hit{{pointer-events:all}}",
        f".{name} .tip{{display:none;pointer-events:none}}",
        f".{name} .spot:hover .tip{{display:inline}}",
        f".{name} .spot:hover .hit{{stroke:{INK};stroke-width:2}}",
    ]
    return "\n" + "\n".join(rules) + "\n"


def _outline(parent: Element, x: float, y: float, width: float, height: float) -> None:
    _rect(parent, x, y, width, height, "none").attrib |= {"class": "next", "stroke": ACCENT, "stroke-width": "1.8"}


def _rect(parent: Element, x: float, y: float, width: float, height: float, fill: str) -> Element:
    return SubElement(parent, "rect", x=_n(x), y=_n(y), width=_n(width), height=_n(height), fill=fill)


def _text(
    parent: Element, x: float, y: float, text: str, size: float = 0.0, anchor: str = "", fill: str = ""
) -> Element:
    """A text; size, anchor and colour are its parent's unless given."""
    element = SubElement(parent, "text", x=_n(x), y=_n(y))
    element.attrib |= {"font-size": _n(size)} if size else {}
    element.attrib |= {"text-anchor": anchor} if anchor else {}
    element.attrib |= {"fill": fill} if fill else {}
    element.text = text
    return element


def _n(value: float) -> str:
    """A coordinate with a tenth of a pixel."""
    return f"{value:.1f}".removesuffix(".0")
