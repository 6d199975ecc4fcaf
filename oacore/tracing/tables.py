"""The tables of causal tracing: their columns, and their rows."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

AIE_COLUMNS = (
    *("corruption", "site", "position", "window", "layer", "aie", "se", "p_clean", "p_corrupted", "n"),
    "aie_normalised",
)
PICTURE_COLUMNS = (
    *("fact", "prompt", "answer", "corruption", "site", "window", "layer", "position", "token", "in_subject"),
    *("p_clean", "p_corrupted", "p_restored"),
)


def traced_rows(
    table: pd.DataFrame, value: str = "aie", name: str = "aie", columns: Sequence[str] = AIE_COLUMNS
) -> pd.DataFrame:
    """The rows with a number in column `value`; NaN means not measured.

    Raises:
        ValueError: a column is missing, no row has a value or one is infinite.
    """
    if missing := [column for column in columns if column not in table]:
        raise ValueError(f"{name}: no column {', '.join(missing)}; found {', '.join(map(str, table.columns))}")
    table = table[table[value].notna()].reset_index(drop=True)
    if table.empty:
        raise ValueError(f"{name}: no row with a value in {value}")
    if (infinite := np.isinf(table[value])).any():
        row = table[infinite].iloc[0]
        raise ValueError(f"{name}: infinite {value} for {row['corruption']}, {row['site']}, layer {row['layer']}")
    return table
