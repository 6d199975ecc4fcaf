"""A circuit as a layered graph: SVG text that answers to the mouse without a script.

From `input` at the bottom to `logits` at the top, one band per layer: its heads side by side, its MLP at their right
and a little above, since it reads what they write. An edge leaves the top of its source and enters the bottom of its
destination, for heads at the left (query), the middle (key) or the right (value). Hovering an edge or a node shows its
numbers, and dims all edges but its own.
"""

import hashlib
import textwrap
from typing import NamedTuple
from xml.etree.ElementTree import Element, SubElement, indent, tostring

import numpy as np
import pandas as pd

from oacore.circuits.circuit import Circuit, edge_table
from oacore.config.colors import ACCENT, INK, PALE, SLATE
from oacore.errors import UserError
from oacore.models.graph import Graph
from oacore.report.numbers import three_digits

READS = {  # what an edge leads into: name, colour
    "q": ("query", "#0b62a4"),
    "k": ("key", ACCENT),
    "v": ("value", "#0d9488"),
    "mlp": ("MLP", "#7b4bb3"),
    "logits": ("logits", INK),
}
PORTS = {"q": -0.32, "v": 0.32}  # where an edge enters a head, in widths of the box right of its middle
MARGIN = 16.0
LABELS = 58.0  # width of the layers' names
BOX = 20.0  # height of a node
LINE = 18.0  # height of a line of text
EMPTY = "The circuit is empty: every edge is ablated."
SMALLEST = 8.0  # size of letters that can be read
TINT = "#f7f9fb"


class _Box(NamedTuple):
    """A node's place: its middle, and its width."""

    x: float
    y: float
    width: float


class _Edge(NamedTuple):
    source: int  # number of the node, see _Layout
    destinations: tuple[int, ...]  # the heads that use a key or value, otherwise one node
    into: str  # key of READS
    name: str
    score: float


class _Layout:
    """Places of all nodes; nodes are numbered as the graph's sources, logits last."""

    def __init__(self, graph: Graph, top: float) -> None:
        L, H = graph.n_layers, graph.n_heads
        pitch = min(96.0, max(26.0, 1100 / (H + 1.5)))  # across the page, if readable so
        self.band = min(92.0, max(64.0, 900 / L))
        self.left = LABELS + MARGIN
        self.width = max(self.left + (H + 1.5) * pitch + MARGIN, 470.0)
        self.pitch = pitch
        middle, width = self.left + H * pitch / 2, min(0.78 * pitch, 62.0)
        self.names = [*graph.source_names, "logits"]
        self.labels = self.names
        if width < 0.62 * SMALLEST * len(f"a{L - 1}.h{H - 1}"):  # heads alone: their layer stands at the left
            self.labels = [name.partition(".")[2] or name for name in self.names]
        self.top = top + BOX + 22  # of the uppermost band
        self.height = self.top + L * self.band + 22 + BOX + MARGIN
        self.boxes = [_Box(middle, self.top + L * self.band + 22 + BOX / 2, 62.0)]
        for layer in range(L):
            base = self.top + (L - layer) * self.band
            self.boxes += [_Box(self.left + (h + 0.5) * pitch, base - self.band / 4, width) for h in range(H)]
            self.boxes.append(_Box(self.left + (H + 0.5) * pitch, base - 3 * self.band / 4, width))
        self.boxes.append(_Box(middle, top + BOX / 2, 62.0))


def circuit_svg(edges: pd.DataFrame, graph: Graph, title: str) -> str:
    """The drawing as an SVG document; the same edges, in any order, give the same text.

    An edge into a key or value that several query heads share branches to those of them that are in the circuit.

    Args:
        edges: the circuit's edges (source, destination, score), named as in `graph`. The width of a line goes with
            |score|; an edge without a score (NaN) is thin.

    Raises:
        UserError: an edge that `graph` doesn't have, an edge twice, or an infinite score.
    """
    drawn = _edges(edges, graph)
    lines = textwrap.wrap(title, 54 if graph.n_heads < 8 else 100)
    layout = _Layout(graph, MARGIN + LINE * (len(lines) + 2) + 10)
    within = {0, graph.n_sources} | {node for edge in drawn for node in (edge.source, *edge.destinations)}
    strongest = max((abs(edge.score) for edge in drawn if not np.isnan(edge.score)), default=0.0)

    width, height = _n(layout.width), _n(layout.height)
    svg = Element(
        "svg", xmlns="http://www.w3.org/2000/svg", width=width, height=height, viewBox=f"0 0 {width} {height}"
    )
    svg.set("font-family", "system-ui, sans-serif")  # as the report
    style = SubElement(svg, "style")
    _bands(svg, layout, graph, within)
    lines_group = SubElement(svg, "g", fill="none")
    for edge in drawn:
        _draw_edge(lines_group, edge, layout, strongest)
    for node in sorted(within):
        _draw_node(svg, node, layout, drawn)
    _heading(svg, lines, drawn, strongest)
    if not drawn:
        _text(
            svg,
            layout.width / 2,
            layout.top + graph.n_layers * layout.band / 2,
            "The circuit is empty: every edge is ablated.",
            15,
            "middle",
        )
    name = "c" + hashlib.sha256(tostring(svg)).hexdigest()[:10]  # two drawings on one page keep their styles apart
    svg.set("class", name)
    style.text = _rules(name, within)
    indent(svg, "")
    return tostring(svg, encoding="unicode") + "\n"


def drawing_of(circuit: Circuit, row: pd.Series) -> str:
    """The drawing of a circuit, under a title from its row of pareto.csv."""
    title = f"{row['method']} {row['ablation']}, knob {row['knob']:g}, seed {row['seed']}: {row['edges']} edges, "
    return circuit_svg(edge_table(circuit), circuit.graph, f"{title}{row['kl_nats']:.3g} nats")


def _edges(table: pd.DataFrame, graph: Graph) -> list[_Edge]:
    """The edges to draw, the strongest last and so on top."""
    if missing := [column for column in ("source", "destination", "score") if column not in table]:
        raise UserError(f"edges: no column {', '.join(missing)}; found {', '.join(map(str, table.columns))}")
    edges: dict[str, _Edge] = {}
    writing = {graph.source_index(source) for source in table["source"]}
    for source, destination, score in zip(
        table["source"], table["destination"], table["score"].astype(float), strict=True
    ):
        name = f"{source}->{destination}"
        s, _ = graph.edge(name)
        if name in edges or np.isinf(score):
            raise UserError(
                f"edge {name}: "
                + ("twice in one circuit" if name in edges else f"score {score}; allowed are finite numbers")
            )
        node, _, letter = destination.rstrip(">").partition("<")
        if node == "logits":
            edges[name] = _Edge(s, (graph.n_sources,), "logits", name, score)
        elif letter in ("k", "v"):
            layer, group = (int(number) for number in node[1:].split(".h"))
            first = graph.first_source(layer) + group * graph.group_size
            heads = tuple(range(first, first + graph.group_size))
            edges[name] = _Edge(s, tuple(head for head in heads if head in writing) or heads, letter, name, score)
        else:
            edges[name] = _Edge(s, (graph.source_index(node),), letter or "mlp", name, score)
    return sorted(edges.values(), key=lambda edge: (0.0 if np.isnan(edge.score) else abs(edge.score), edge.name))


def _draw_edge(parent: Element, edge: _Edge, layout: _Layout, strongest: float) -> None:
    """A line as wide as its score, and an invisible wide one that is easy to hit."""
    share = 0.0 if np.isnan(edge.score) or not strongest else (abs(edge.score) / strongest) ** 0.5
    group = SubElement(
        parent, "g", {"class": " ".join(["edge", *(f"e{node}" for node in (edge.source, *edge.destinations))])}
    )
    SubElement(group, "title").text = edge.name + ("" if np.isnan(edge.score) else f" score {three_digits(edge.score)}")
    path = "".join(_curve(edge, layout.boxes[node], layout) for node in edge.destinations)
    SubElement(group, "path", {"d": path, "class": "hit"})
    line = SubElement(group, "path", {"d": path, "class": "line", "stroke": READS[edge.into][1]})
    line.set("stroke-width", _n(0.7 + 2.8 * share))
    line.set("stroke-opacity", f"{0.35 + 0.5 * share:.2f}")


def _curve(edge: _Edge, end: _Box, layout: _Layout) -> str:
    """A curve that starts and ends upright; one that would run through the boxes above its source bows out to the
    side.
    """
    start = layout.boxes[edge.source]
    x0, y0 = start.x, start.y - BOX / 2
    x1, y1 = end.x + PORTS.get(edge.into, 0.0) * end.width, end.y + BOX / 2
    rise = y0 - y1
    bow = 0.0
    if abs(end.x - start.x) < layout.pitch / 2 and rise > layout.band:
        bow = layout.pitch * min(0.45 + 0.07 * rise / layout.band, 1.0) * (-1 if edge.into == "q" else 1)
    reach = rise * (0.35 if bow else 0.5)
    return f"M{_n(x0)} {_n(y0)}C{_n(x0 + bow)} {_n(y0 - reach)} {_n(x1 + bow)} {_n(y1 + reach)} {_n(x1)} {_n(y1)}"


def _draw_node(parent: Element, node: int, layout: _Layout, edges: list[_Edge]) -> None:
    box, name = layout.boxes[node], layout.names[node]
    into = [edge.into for edge in edges if node in edge.destinations]
    out = sum(edge.source == node for edge in edges)
    letters = ", ".join(f"{into.count(letter)} {READS[letter][0]}" for letter in "qkv" if letter in into)
    degrees = [f"{len(into)} in" + (f" ({letters})" if letters else "")] * (name != "input") + [f"{out} out"] * (
        name != "logits"
    )
    group = SubElement(parent, "g", {"class": f"node n{node}"})
    SubElement(group, "title").text = f"{name}: {', '.join(degrees)}"
    rect = _rect(group, box.x - box.width / 2, box.y - BOX / 2, box.width, BOX, "white")
    rect.attrib |= {"rx": "4", "stroke": INK if name in ("input", "logits") or name[0] == "m" else SLATE}
    size = min(11.0, box.width / (0.62 * len(layout.labels[node])))
    _text(group, box.x, box.y + 0.36 * size, layout.labels[node], size, "middle")


def _bands(svg: Element, layout: _Layout, graph: Graph, within: set[int]) -> None:
    """The layers as bands with their numbers, and a dot for each node that is not in the circuit."""
    group = SubElement(svg, "g")
    for layer in range(graph.n_layers):
        y = layout.top + (graph.n_layers - layer - 1) * layout.band
        _rect(group, 0, y, layout.width, layout.band, TINT if layer % 2 == 0 else "white")
        _text(group, MARGIN, y + 0.75 * layout.band + 4, f"layer {layer}", 11, "start", SLATE)
    for node, box in enumerate(layout.boxes):
        if node not in within:
            SubElement(group, "circle", cx=_n(box.x), cy=_n(box.y), r="2.5", fill=PALE)


def _heading(svg: Element, title: list[str], edges: list[_Edge], strongest: float) -> None:
    """Title, colours, sizes."""
    y = MARGIN + 12
    for line in title:
        _text(svg, MARGIN, y, line, 14, "start").set("font-weight", "bold")
        y += LINE
    x = MARGIN
    for name, color in READS.values():
        SubElement(svg, "path", {"d": f"M{_n(x)} {_n(y - 4)}h18", "stroke": color, "stroke-width": "3"})
        _text(svg, x + 23, y, name, 12, "start")
        x += 42 + 7.2 * len(name)
    nodes = len({edge.source for edge in edges})  # as MIB counts them: those with an edge out
    size = f"{len(edges):,} edge{'s' * (len(edges) != 1)} out of {nodes:,} node{'s' * (nodes != 1)}"
    note = f"; the wider, the larger |score|, up to {three_digits(strongest)}" if strongest else ""
    _text(svg, MARGIN, y + LINE, size + note, 12, "start", SLATE)


def _rules(name: str, within: set[int]) -> str:
    """Styles that follow the mouse. No commas inside a selector: the report splits selectors there."""
    rules = [
        f".{name} .hit{{stroke:transparent;stroke-width:9;pointer-events:stroke}}",
        f".{name} text{{pointer-events:none}}",
        f".{name}:has(.edge:hover) .line{{stroke-opacity:.12}}",
        f".{name}:has(.node:hover) .line{{stroke-opacity:.08}}",
        f".{name} .edge:hover .line.line{{stroke-opacity:1;stroke-width:5}}",
        f".{name} .node:hover rect{{fill:#fdf3ec;stroke-width:2}}",
    ]
    for node in sorted(within):
        rules.append(f".{name}:has(.n{node}:hover) .e{node} .line{{stroke-opacity:1}}")
        rules.append(f".{name}:has(.e{node}:hover) .n{node} rect{{fill:#fdf3ec;stroke-width:2}}")
    return "\n" + "\n".join(rules) + "\n"


def _rect(parent: Element, x: float, y: float, width: float, height: float, fill: str) -> Element:
    return SubElement(parent, "rect", x=_n(x), y=_n(y), width=_n(width), height=_n(height), fill=fill)


def _text(parent: Element, x: float, y: float, text: str, size: float, anchor: str, fill: str = INK) -> Element:
    element = SubElement(
        parent, "text", {"x": _n(x), "y": _n(y), "font-size": _n(size), "text-anchor": anchor, "fill": fill}
    )
    element.text = text
    return element


def _n(value: float) -> str:
    """A coordinate with a tenth of a pixel."""
    return f"{value:.1f}".removesuffix(".0")
