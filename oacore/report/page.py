"""The report: one HTML page that needs nothing but itself, in a browser or on paper.

A page is a title, the facts of the run, and sections; a section is a title, an introduction and parts (`Figure`,
`Table`, `Definitions`, `Links`, `Details`). `page.html.j2` knows these and nothing of any experiment: a new one adds a
function that returns a `Section`. All text is escaped, no part is fetched, no script runs, and no date is written: the
same results give the same bytes.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import jinja2
import yaml

from oacore.report.cells import breakable, cell_rows
from oacore.report.numbers import human
from oacore.report.parts import Definitions, Details, Part, Section
from oacore.report.svg import inlined
from oacore.store.atomic import atomic_path


def render_page(
    title: str, run: Mapping[str, Mapping[str, object]], sections: Sequence[Section], appendix: Sequence[Section] = ()
) -> str:
    """The page as HTML. `run` says what was run, in groups of facts; `appendix` follows the sections, set smaller.

    With more than one section the page has a table of contents. Numbers are rounded to three digits and whole numbers
    grouped: pass as a string what is not a quantity (a seed, a year).
    Raises ValueError if an SVG holds a script or refers to anything outside itself.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"human": human, "inlined": inlined, "rows": cell_rows, "breakable": breakable}
    return environment.get_template("page.html.j2").render(
        title=title, run=run, sections=list(sections), appendix=list(appendix)
    )


def write(
    path: str | Path,
    title: str,
    run: Mapping[str, Mapping[str, object]],
    sections: Sequence[Section],
    appendix: Sequence[Section] = (),
) -> None:
    """Write the page of `render` to `path`, atomically."""
    page = render_page(title, run, sections, appendix)
    with atomic_path(path) as temporary:
        temporary.write_text(page, encoding="utf-8", newline="\n")


def provenance_section(config: Mapping[str, object], facts: Mapping[str, object] | None = None) -> Section:
    """Where the results come from: hashes and versions as facts, and the whole configuration as YAML."""
    text = yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True, width=100)
    parts: list[Part] = [Definitions(facts)] if facts else []
    return Section("Provenance", "", [*parts, Details("The whole configuration (YAML)", text)])
