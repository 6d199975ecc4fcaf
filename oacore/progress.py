"""Progress of long work as plain lines, readable in a terminal, a log file and a cluster's output alike.

A redrawn bar is none of these once two jobs share a terminal.
"""

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 5.0


class _Lines:
    """A stream that turns tqdm's redrawn bar into lines."""

    def write(self, text: str) -> None:
        line = text.replace("\r", "").strip()
        if line:
            print(line, file=sys.stderr, flush=True)

    def flush(self) -> None:
        """Every line is flushed as it is written."""


def progress(
    items: Iterable[Any] | None = None, *, what: str, unit: str, total: int | None = None, initial: int = 0
) -> Any:
    """tqdm over `items` (or by hand up to `total`) that prints a line every few seconds and one at the end, or none for
    `what=""`.
    """
    return tqdm(
        items,
        desc=what,
        unit=unit,
        total=total,
        initial=initial,
        disable=not what,
        file=_Lines(),
        mininterval=SECONDS_BETWEEN_LINES,
        maxinterval=2 * SECONDS_BETWEEN_LINES,
        bar_format="{desc}: {n_fmt}/{total_fmt} {unit}, {elapsed} elapsed, {remaining} left{postfix}",
    )
