"""The tables of lenses: their names and rows, in the order in which figures and reports show them."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from oacore.config import lenses as config

LENSES = tuple(config.LENSES)
INITS = ("", *config.INITS)
PERTURBATIONS = ("project_random", "project_singular", "steer_random", "steer_singular")
DEMONSTRATIONS = ("true", "permuted")


def lens_name(lens: str, init: str = "") -> str:
    """The name of a lens in figures and tables: `oca`, `tuned (random)`."""
    return f"{lens} ({init})" if init else lens


def lenses_in_order(table: pd.DataFrame) -> list[str]:
    """The names (see `lens_name`) of the lenses present, in the order of `LENSES` and `INITS`; unknown ones last."""
    present = sorted(set(zip(table["lens"].astype(str), _inits(table), strict=True)))
    rank = [(_rank(lens, LENSES), lens, _rank(init, INITS), init) for lens, init in present]
    return [lens_name(lens, init) for _, lens, _, init in sorted(rank)]


def perturbations_in_order(table: pd.DataFrame) -> list[str]:
    """The perturbations present: directions, then subspaces of growing size, then unknown ones."""

    def rank(name: str) -> tuple[int, int, str]:
        start, _, size = name.rpartition("_")
        if start == "resample" and size.isdecimal():
            return len(PERTURBATIONS), int(size), name
        return _rank(name, PERTURBATIONS) + (name not in PERTURBATIONS), 0, name

    return sorted(set(table["perturbation"].astype(str)), key=rank)


def lens_rows(table: pd.DataFrame, value: str, name: str, columns: Sequence[str] = ()) -> pd.DataFrame:
    """The rows with a number in `value`, sorted, with a column `name` as of `lens_name`; NaN means not measured,
    infinity is an error.

    `name` is what the table is called in errors, `columns` are those that it must have beside lens, init, layer and
    `value`.
    """
    if missing := [column for column in ("lens", "init", "layer", *columns, value) if column not in table]:
        raise ValueError(f"{name}: no column {', '.join(missing)}; found {', '.join(map(str, table.columns))}")
    table = table[table[value].notna()]
    if table.empty:
        raise ValueError(f"{name}: no row with a value in {value}")
    inits = _inits(table)
    table = table.assign(
        init=inits, name=[lens_name(lens, init) for lens, init in zip(table["lens"].astype(str), inits, strict=True)]
    )
    if (infinite := np.isinf(table[value])).any():
        row = table[infinite].iloc[0]
        raise ValueError(f"{name}: infinite {value} for {row['name']} at layer {row['layer']}")
    keys = ["name", *(c for c in ("dataset", "demonstrations", "perturbation", "n_tokens") if c in table), "layer"]
    if (twice := table.duplicated(keys)).any():
        row = table[twice].iloc[0]
        raise ValueError(f"{name}: two rows for " + ", ".join(f"{key} {row[key]}" for key in keys))
    return table.sort_values(keys, kind="stable").reset_index(drop=True)


def demonstrations_in_order(table: pd.DataFrame) -> list[str]:
    """The kinds of demonstrations present, true ones first."""
    return sorted(set(table["demonstrations"].astype(str)), key=lambda kind: (_rank(kind, DEMONSTRATIONS), kind))


def mean_over_datasets(truthfulness: pd.DataFrame) -> pd.DataFrame:
    """Means over those data sets that were measured with every lens, at every layer of it and with all demonstrations.

    Columns: demonstrations, lens, init, name, layer, accuracy, se (of the mean, the data sets given), datasets (how
    many).
    """
    table = lens_rows(truthfulness, "accuracy", "truthfulness", ("dataset", "demonstrations", "se"))
    keys = ["demonstrations", "lens", "init", "name", "layer"]
    common = table.groupby("dataset").size() == table.groupby(keys).ngroups
    if not common.any():
        raise ValueError("truthfulness: no data set was measured with every lens at every layer")
    table = table[table["dataset"].map(common)].assign(variance=lambda rows: rows["se"] ** 2)
    groups = table.groupby(keys, sort=False)
    means = groups["accuracy"].mean().to_frame().assign(datasets=groups.size())
    means["se"] = groups["variance"].agg(lambda values: values.sum(skipna=False)) ** 0.5 / means["datasets"]
    return means.reset_index()


def _inits(table: pd.DataFrame) -> list[str]:
    """The column `init` as text: a CSV file gives NaN back for an empty one."""
    return ["" if pd.isna(init) else str(init) for init in table["init"]]


def _rank(name: str, order: Sequence[str]) -> int:
    return order.index(name) if name in order else len(order)
