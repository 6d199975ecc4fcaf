"""What a report says of numbers whose fit a cap on steps ended."""

import pandas as pd

from oacore.report.numbers import DAGGER, FLOOR, human, three_digits


def unfinished(table: pd.DataFrame) -> pd.Series:
    """The rows whose fit had not converged; none in a table without fits."""
    if "converged" not in table:
        return pd.Series(False, index=table.index)
    return table["converged"].eq(False).fillna(False).astype(bool)


def convergence_sentence(table: pd.DataFrame, value: str, left: str, change: str) -> str:
    """How many fits the cap ended, and what further steps would change; empty if nothing was fitted.

    Args:
        left: the column with about what further steps would gain.
        value: the column that this is a share of; empty says it as it is, for numbers that may be near zero.
        change: what happens to the numbers: `lower their KL`.
    """
    fitted = table[table["converged"].notna()] if "converged" in table else table.iloc[:0]
    if fitted.empty:
        return ""
    rows = fitted[unfinished(fitted)]
    if rows.empty:
        return f"All {human(len(fitted))} fits converged."
    gains, unit = rows[left].astype(float), ""
    if value:
        gains, unit = 100 * gains / rows[value].astype(float).clip(lower=FLOOR), "\u00a0%"
    return (
        f"{DAGGER} The cap on steps ended {human(len(rows))} of {human(len(fitted))} fits before they had converged: "
        f"further steps would {change} by about {three_digits(gains.median())}{unit} (the median; at most "
        f"{three_digits(gains.max())}{unit}), and smaller differences decide nothing."
    )
