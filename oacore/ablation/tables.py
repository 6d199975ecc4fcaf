"""The tables of single-component ablation: their rows, and what is read from a component's name."""

import re

import numpy as np
import pandas as pd

# Of components: the marker and the name in figures.
KINDS = {"head": ("o", "attention head"), "mlp": ("s", "MLP"), "attention_layer": ("D", "attention layer")}

GAP_COLUMNS = ("component", "kind", "layer", "head", "method", "se_nats")


def gap_rows(
    table: pd.DataFrame, value: str, name: str = "gaps", columns: tuple[str, ...] = GAP_COLUMNS
) -> pd.DataFrame:
    """The rows with a number in column `value`; NaN means not measured, infinity is an error."""
    if missing := [column for column in (*columns, value) if column not in table]:
        raise ValueError(f"{name}: no column {', '.join(missing)}; found {', '.join(map(str, table.columns))}")
    if "kind" in table and (unknown := set(table["kind"]) - set(KINDS)):
        raise ValueError(f"{name}: kind {', '.join(sorted(map(str, unknown)))}; allowed are {', '.join(KINDS)}")
    table = table[table[value].notna()]
    if table.empty:
        raise ValueError(f"{name}: no row with a value in {value}")
    if np.isinf(table[value]).any():
        raise ValueError(f"{name}: infinite {value} for {table[np.isinf(table[value])]['component'].iloc[0]}")
    return table


def layer_of(component: str) -> int:
    """The layer in a component's name: a3.h1, a3 and m3 are of layer 3."""
    if match := re.fullmatch(r"[am](\d+)(\.h\d+)?", component):
        return int(match[1])
    raise ValueError(f"component {component}: not a name like a3.h1, a3 or m3")
