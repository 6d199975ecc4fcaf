"""The report: one HTML page that needs nothing but itself, in a browser or on paper.

A page is a title, the facts of the run, and sections; a section is a title, an introduction and parts (`Figure`, `Table`, `Facts`,
`Details`). `report.html.j2` knows these and nothing of any experiment: a new experiment adds a function that returns a `Section`.
All text is escaped, no part is fetched, no script runs, and no date is written: the same results give the same bytes.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import ClassVar, NamedTuple
from xml.etree import ElementTree

import jinja2
import numpy as np
import pandas as pd
import yaml
from markupsafe import Markup, escape

from oacore.checkpoint import atomic_path
from oacore.plots import in_order, three_digits


@dataclass(frozen=True)
class Estimate:
    """A table cell with its standard error."""

    value: float
    se: float


@dataclass(frozen=True)
class Figure:
    """An SVG document, inlined, and one sentence on what to see in it."""

    svg: str
    caption: str
    kind: ClassVar[str] = "figure"


@dataclass(frozen=True)
class Table:
    """A data frame without its index. Numbers and `Estimate`s are rounded and aligned.

    `highlight` names a column, or a row by its first cell.
    """

    frame: pd.DataFrame
    caption: str
    highlight: str = ""
    kind: ClassVar[str] = "table"


@dataclass(frozen=True)
class Facts:
    """Names and their values, such as an example or definitions. `verbatim` keeps white space, for prompts."""

    items: Mapping[str, object]
    caption: str = ""
    verbatim: bool = False
    kind: ClassVar[str] = "facts"


@dataclass(frozen=True)
class Details:
    """A long text behind a line to click; printed in full."""

    summary: str
    text: str
    kind: ClassVar[str] = "details"


Part = Figure | Table | Facts | Details


@dataclass(frozen=True)
class Section:
    """A part of the page with a heading. An empty line in `intro` starts a new paragraph."""

    title: str
    intro: str
    parts: Sequence[Part]


def render(title: str, run: Mapping[str, Mapping[str, object]], sections: Sequence[Section], appendix: Sequence[Section] = ()) -> str:
    """The page as HTML. `run` says what was run, in groups of facts; `appendix` follows the sections, set smaller.

    With more than one section the page has a table of contents. Numbers are rounded to three digits and whole numbers grouped: pass as
    a string what is not a quantity (a seed, a year).
    Raises ValueError if an SVG holds a script or refers to anything outside itself.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"human": human, "inlined": _inlined, "rows": _rows, "breakable": _breakable}
    return environment.get_template("report.html.j2").render(title=title, run=run, sections=list(sections), appendix=list(appendix))


def write(
    path: str | Path,
    title: str,
    run: Mapping[str, Mapping[str, object]],
    sections: Sequence[Section],
    appendix: Sequence[Section] = (),
) -> None:
    """Write the page of `render` to `path`, atomically."""
    page = render(title, run, sections, appendix)
    with atomic_path(path) as temporary:
        temporary.write_text(page, encoding="utf-8", newline="\n")


# ---- Sections of the ablation experiment ---------------------------------------------------------------------------------------

CAPTIONS = {
    "gap_distributions": "The further left a strip, the less harm the replacement itself does: each point is the gap of one component, "
    "each bar the median of a method.",
    "optimal_against_counterfactual": "Below the diagonal one fitted constant does less harm than the component's activation on the "
    "counterfactual prompt, and the closer ρ is to 1, the more the two methods agree on which components matter.",
    "layer_head_heatmap": "The darker a cell, the more of what its component does on this task no constant can stand in for.",
    "convergence_curves": "Lines that have become flat before their dot show that the fits were finished, so that a gap above is not a "
    "matter of too few steps.",
}
METHOD_NOTES = {
    "zero": "The component's output becomes the zero vector.",
    "mean": "Its mean output over prompts and positions.",
    "mean_positional": "Its mean output over prompts, position by position.",
    "resample": "Its output on another prompt, at shuffled positions.",
    "resample_positional": "Its output on another prompt, at the same positions.",
    "cf_mean": "Its mean output over the counterfactual prompts, position by position.",
    "counterfactual": "Its output on the prompt's own counterfactual.",
    "gaussian": "Its own output plus Gaussian noise of three standard deviations per coordinate.",
    "optimal": "The one constant vector that makes the gap smallest, fitted on training prompts.",
    "optimal_positional": "The constant vectors, one per position, that make the gap smallest, fitted on training prompts.",
}


def ablation_section(
    task: str,
    gaps: pd.DataFrame,
    summary: pd.DataFrame,
    figures: Mapping[str, str],
    example: Mapping[str, object] | None = None,
) -> Section:
    """The section of one task: headline, example, summary, figures and the components with the largest gaps.

    `gaps` and `summary` are the tables of the run, with any subset of the methods; `figures` maps names of `plots.ablation_figures` to
    SVG text; `example` is one prompt with its counterfactual and answer, by name.
    Raises ValueError for a figure without a caption.
    """
    if unknown := set(figures) - set(CAPTIONS):
        raise ValueError(f"figures: {', '.join(sorted(unknown))}; captions exist for {', '.join(CAPTIONS)}")
    parts: list[Part] = [Facts(example, "An example prompt", verbatim=True)] if example else []
    parts.append(_summary_table(gaps, summary))
    parts += [Figure(figures[name], caption) for name, caption in CAPTIONS.items() if name in figures]
    parts.append(_top_table(gaps))
    return Section(task, _headline(gaps, summary), parts)


def methods_section(methods: Sequence[str]) -> Section:
    """What the gap is and what each of `methods` puts in a component's place, in one line each."""
    intro = (
        "The ablation loss gap of a component is the mean over prompts x of KL( M(x) ‖ M_ablated(x) ), in nats, between the next-token "
        "distributions at the last position: of the model as it is, and of the model with the component's output replaced. The first "
        "position (BOS) is never replaced. SE is the standard error over prompts. The methods differ in the replacement only:"
    )
    return Section("Methods", intro, [Facts({m: METHOD_NOTES.get(m, "") for m in in_order(pd.Series(list(methods)))})])


def provenance_section(config: Mapping[str, object], facts: Mapping[str, object] | None = None) -> Section:
    """Where the results come from: hashes and versions as facts, and the whole configuration as YAML."""
    text = yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True, width=100)
    parts: list[Part] = [Facts(facts)] if facts else []
    return Section("Provenance", "", [*parts, Details("The whole configuration (YAML)", text)])


def _headline(gaps: pd.DataFrame, summary: pd.DataFrame) -> str:
    """What was measured, and what optimal ablation gained over the plain methods."""
    prompts = sorted(set(gaps["n_prompts"]))
    span = human(prompts[0]) if len(prompts) == 1 else f"{human(prompts[0])} to {human(prompts[-1])}"
    text = f"{gaps['component'].nunique()} components, {span} prompts each."
    ratios = summary.set_index("method")["median_ratio_optimal_to_method"].astype(float).dropna()
    shares = [f"{three_digits(100 * ratios[m])}\u00a0% of {m}'s" for m in ("zero", "mean", "resample", "counterfactual") if m in ratios]
    if shares:
        text += f" In the median component, the gap of the optimal constant is {', '.join(shares)}."
    return text


def _summary_table(gaps: pd.DataFrame, summary: pd.DataFrame) -> Table:
    by_method = gaps.groupby("method")["gap_nats"]
    table = pd.DataFrame({"components": by_method.count(), "median gap (nats)": by_method.median()})
    known = summary.set_index("method").astype(float)  # an empty column may hold None
    table["optimal ÷ method (median, %)"] = 100 * known["median_ratio_optimal_to_method"]
    table["Spearman ρ with counterfactual"] = known["spearman_with_counterfactual"]
    table = table.reindex(in_order(gaps["method"])).dropna(axis="columns", how="all").rename_axis("method").reset_index()
    return Table(table, "The methods, each over all components.", "optimal")


def _top_table(gaps: pd.DataFrame, count: int = 10) -> Table:
    methods = in_order(gaps["method"])
    by = next((m for m in ("optimal", "optimal_positional", "counterfactual") if m in methods), methods[0])
    ranked = gaps[gaps["method"] == by].sort_values("gap_nats", ascending=False, kind="stable")["component"].head(count)
    columns: dict[str, list[object]] = {"component": list(ranked)}
    for method in [by, *(m for m in methods if m != by)]:
        rows = gaps[gaps["method"] == method].set_index("component").reindex(list(ranked))
        columns[method] = [Estimate(gap, se) for gap, se in zip(rows["gap_nats"], rows["se_nats"], strict=True)]
    return Table(pd.DataFrame(columns), f"The {len(ranked)} components with the largest {by} gap: gap ± SE in nats.", by)


# ---- Numbers and cells ---------------------------------------------------------------------------------------------------------


def human(value: object) -> str:
    """A value as people write it: numbers with three digits, lists with commas, mappings as name and value."""
    match value:
        case None:
            return "–"
        case bool():
            return "yes" if value else "no"
        case Estimate():
            return " ± ".join(_estimate(value))
        case Integral():
            return f"{int(value):,}".replace("-", "−")
        case Real():
            return three_digits(float(value))
        case Mapping():
            return ", ".join(f"{name} {human(inner)}" for name, inner in value.items())
        case list() | tuple():
            return ", ".join(map(human, value))
    return str(value)


def _estimate(estimate: Estimate) -> list[str]:
    """Value and standard error with the same decimals: three digits of the value, but not more than two of the error."""
    value, se = estimate.value, estimate.se
    if not np.isfinite(value) or not np.isfinite(se) or se <= 0:
        return [three_digits(value)]
    if 0 < abs(value) < 1e-4:
        return [three_digits(value), f"{se:.1e}".replace("e-0", "e-")]
    decimals = max(0, 1 - _exponent(se))
    if value:
        decimals = min(decimals, max(0, 2 - _exponent(value)))
    rounded = f"{se:.{decimals}f}"
    return [f"{value:,.{decimals}f}".replace("-", "−"), rounded if float(rounded) else f"{se:.0e}".replace("e-0", "e-")]


def _exponent(value: float) -> int:
    return int(f"{value:.2e}".split("e")[1])


class _Cell(NamedTuple):
    text: str
    error: str = ""
    pad: str = ""  # invisible digits that put the decimal points of a column below one another
    numeric: bool = False
    highlighted: bool = False


def _rows(table: Table) -> Iterator[list[_Cell]]:
    """The cells of a table, row by row."""
    columns = [_column(table.frame[name].tolist(), name == table.highlight) for name in table.frame]
    for row in zip(*columns, strict=True):
        marked = bool(table.highlight) and row[0].text == table.highlight
        yield [cell._replace(highlighted=cell.highlighted or marked) for cell in row]


def _column(values: list[object], highlighted: bool) -> list[_Cell]:
    numeric = all(value is None or isinstance(value, Real | Estimate) for value in values)
    texts = [_estimate(value) if isinstance(value, Estimate) else [human(value)] for value in values]
    tails = [text[0].partition(".")[2] for text in texts]
    longest = max(map(len, tails), default=0)
    cells = []
    for text, tail in zip(texts, tails, strict=True):
        point = "\u2008" if longest and not tail else ""  # as wide as a full stop
        pad = point + "\u2007" * (longest - len(tail))  # as wide as a digit
        cells.append(_Cell(text[0], text[1] if len(text) > 1 else "", pad if numeric else "", numeric, highlighted))
    return cells


def _breakable(text: object) -> Markup:
    """Text whose long names may wrap after an underscore."""
    return Markup(str(escape(text)).replace("_", "_<wbr>"))


# ---- SVG -----------------------------------------------------------------------------------------------------------------------


def _inlined(svg: str, name: str) -> Markup:
    """An SVG document as an HTML element: ids and styles become the page's own under the prefix `name`, the id of what encloses it."""
    root = ElementTree.fromstring(svg)
    for element in root.iter():
        element.tag = _local(element.tag)
        if element.tag in ("script", "foreignObject"):
            raise ValueError(f"figure {name}: SVG holds a <{element.tag}>")
        if element.tag == "style":
            element.text = re.sub(r"([^{}]+){", lambda rule: _scoped(rule[1], name) + "{", element.text or "")
        attributes = {_local(key): value for key, value in element.attrib.items()}
        for text in (element.text or "", *attributes.values()):
            if re.search(r"@import|url\((?!#)", text):
                raise ValueError(f"figure {name}: SVG refers to {text}")
        element.attrib.clear()
        for key, value in attributes.items():
            if key.startswith("on") or (key == "href" and not value.startswith(("#", "data:image/"))):
                raise ValueError(f"figure {name}: SVG holds {key}={value}")
            if key == "id":
                value = f"{name}-{value}"
            elif key == "href" and value.startswith("#"):
                value = f"#{name}-{value[1:]}"
            element.set(key, value.replace("url(#", f"url(#{name}-"))
    root.set("role", "img")
    root.set("aria-labelledby", f"{name}-caption")
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def _scoped(selectors: str, name: str) -> str:
    """CSS selectors that hold inside element `name` alone."""
    return ",".join(f"#{name} {selector.strip()}" for selector in selectors.split(","))


def _local(name: str) -> str:
    """A tag or attribute without its namespace: HTML knows the parts of SVG by their plain names."""
    return name.rpartition("}")[2]
