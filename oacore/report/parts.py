"""What a page is made of: sections of figures, tables, facts and details."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import pandas as pd


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
class Definitions:
    """Names and their values, such as an example or definitions. `verbatim` keeps white space, for prompts."""

    items: Mapping[str, object]
    caption: str = ""
    verbatim: bool = False
    kind: ClassVar[str] = "definitions"


@dataclass(frozen=True)
class Links:
    """Other pages by what is said of them; addresses are relative to this page."""

    items: Mapping[str, str]
    caption: str = ""
    kind: ClassVar[str] = "links"


@dataclass(frozen=True)
class Details:
    """A long text behind a line to click; printed in full."""

    summary: str
    text: str
    kind: ClassVar[str] = "details"


Part = Figure | Table | Definitions | Links | Details


@dataclass(frozen=True)
class Section:
    """A part of the page with a heading. An empty line in `intro` starts a new paragraph."""

    title: str
    intro: str
    parts: Sequence[Part]
