"""What the table of two runs' numbers says."""

import pandas as pd

from oacore.report.numbers import SIGNIFICANT

COLUMNS = ("table", "row", "first", "first_se", "second", "second_se", "difference", "se", "paired", "in_se")


def differ(numbers: pd.DataFrame) -> pd.Series:
    """Which rows differ by more than `SIGNIFICANT` standard errors of the difference."""
    return numbers["in_se"].abs() > SIGNIFICANT


def most_different(numbers: pd.DataFrame, most: int) -> pd.DataFrame:
    """The rows that differ most, in standard errors, the largest first."""
    return numbers.loc[numbers["in_se"].abs().sort_values(ascending=False, kind="stable").index].head(most)


def how_errors_were_added(numbers: pd.DataFrame) -> str:
    """A sentence on the errors of these differences."""
    n_paired = int(numbers["paired"].sum())
    paired = "are of the differences prompt by prompt, as both runs measured the same prompts"
    added = "are added as if the prompts were independent, since these differ, or only their means are there"
    if n_paired in (0, len(numbers)):
        return f"Standard errors {paired if n_paired else added}."
    return f"Standard errors of {n_paired} of them {paired}; those of the others {added}."
