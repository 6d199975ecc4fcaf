"""A table's cells for the page: rounded, aligned, highlighted."""

from collections.abc import Iterator
from numbers import Real
from typing import NamedTuple

from markupsafe import Markup, escape

from oacore.report.numbers import DAGGER, Estimate, estimate_texts, human
from oacore.report.parts import Table


class _Cell(NamedTuple):
    text: str
    error: str = ""
    pad: str = ""  # invisible digits that put the decimal points of a column below one another
    numeric: bool = False
    highlighted: bool = False


def cell_rows(table: Table) -> Iterator[list[_Cell]]:
    """The cells of a table, row by row."""
    columns = [_column(table.frame[name].tolist(), name == table.highlight) for name in table.frame]
    for row in zip(*columns, strict=True):
        marked = bool(table.highlight) and row[0].text == table.highlight
        yield [cell._replace(highlighted=cell.highlighted or marked) for cell in row]


def _column(values: list[object], highlighted: bool) -> list[_Cell]:
    numeric = all(value is None or isinstance(value, Real | Estimate) for value in values)
    texts = [estimate_texts(value) if isinstance(value, Estimate) else [human(value)] for value in values]
    tails = [text[0].partition(".")[2] for text in texts]
    longest = max(map(len, tails), default=0)
    cells = []
    for value, text, tail in zip(values, texts, tails, strict=True):
        point = "\u2008" if longest and not tail else ""  # as wide as a full stop
        pad = point + "\u2007" * (longest - len(tail))  # as wide as a digit
        mark = DAGGER if isinstance(value, Estimate) and not value.finished else ""
        first, error = text[0] + mark * (len(text) == 1), text[1] + mark if len(text) > 1 else ""
        cells.append(_Cell(first, error, pad if numeric else "", numeric, highlighted))
    return cells


def breakable(text: object) -> Markup:
    """Text whose long names may wrap after an underscore."""
    return Markup(str(escape(text)).replace("_", "_<wbr>"))
