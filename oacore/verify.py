"""Hold the headline numbers of a finished run against those that are expected of it.

The expected ones lie beside the config, `demo.expected.csv` for `demo.yaml`, and come from several finished runs under
several CPU capabilities and numbers of threads (`record`): what all of these agree on is expected to the digit, what
rounding changes, such as which circuit a learned mask ends in, within a range.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from oacore.config.model import SHIPPED_DEMO
from oacore.config.run import Config
from oacore.errors import UserError
from oacore.store.artefacts import read_json, read_table
from oacore.store.atomic import atomic_path
from oacore.store.layout import Layout

RELATIVE = 1e-3  # of a number's size: rounding alone, which no fit or choice amplifies, is far below
# What rounding leaves of a number that is nearly 0: a layer is a whole number, the others are shares or correlations.
ABSOLUTE = {"gap_nats": 1e-7, "kl_nats": 1e-7, "aie": 1e-5, "layer": 0.0}
ABSOLUTE_OF_OTHERS = 1e-4
SIZES = (35, 60, 100)  # edges; those of README.md

KEYS = ["table", "selection", "column"]
COLUMNS = [*KEYS, "expected", "low", "high"]


@dataclass(frozen=True)
class Headline:
    """One number, in each of the columns, of every group of a table's rows.

    Args:
        table: its file in the run's folder.
        by: columns whose values tell the groups apart.
        where: the rows that count, as `column comparison value`; all if empty.
        largest: of each group the one row where this column is largest; all if empty.
        smallest: or smallest.
        pick: what is taken of a group's rows: median, mean, or the first where there is one alone.
    """

    table: str
    columns: tuple[str, ...]
    by: tuple[str, ...]
    where: str = ""
    largest: str = ""
    smallest: str = ""
    pick: str = "first"


def headlines(config: Config) -> Iterator[Headline]:
    """The headline numbers of a config's README table and report."""
    shares = tuple(f"median_ratio_{name}_to_method" for name in ("optimal", "optimal_positional"))
    for task in config.ablation_tasks():
        yield Headline(f"{task}/ablation/gaps.csv", ("gap_nats",), ("method",), pick="median")
        yield Headline(f"{task}/ablation/summary.csv", ("spearman_with_counterfactual", *shares), ("method",))
    for task in config.circuit_tasks():
        for size in SIZES:
            yield Headline(
                f"{task}/circuits/pareto.csv",
                ("kl_nats",),
                ("ablation", "method"),
                f"edges <= {size}",
                smallest="validation_kl_nats",
            )
        yield Headline(f"{task}/circuits/fronts.csv", ("ratio",), ("ablation", "method", "other"))
    for task in config.tracing_tasks():
        assert config.tracing is not None
        narrowest = f"window == {min(config.tracing.windows)}"
        yield Headline(f"{task}/tracing/aie.csv", ("aie", "layer"), ("corruption", "site"), narrowest, "aie")
    for task in config.lens_tasks():
        yield Headline(f"{task}/lens/loss.csv", ("kl_nats",), ("lens", "init"), pick="mean")


def numbers(config: Config, folder: Path) -> pd.DataFrame:
    """The headline numbers of the run in a folder: table, selection, column, value; those that a run lacks are absent.

    Raises:
        UserError: a table is missing, since the run has not finished, it is damaged, or it has not the columns.
    """
    parts = [_numbers_of(folder, headline) for headline in headlines(config)]
    if config.is_demo:
        demo = Path(Layout(config).demo_model) if config.trains_demo else SHIPPED_DEMO
        held_out = pd.Series(read_json(demo / "training.json")["held_out"]).rename_axis("column")
        parts.append(held_out.reset_index(name="value").assign(table="training.json", selection="held out"))
    return pd.concat(parts).dropna(subset="value")[[*KEYS, "value"]].reset_index(drop=True)


def _numbers_of(folder: Path, headline: Headline) -> pd.DataFrame:
    path = folder / headline.table
    if not path.exists():
        raise UserError(f"{path}: missing; allowed: the folder of a run of this config that has finished")
    rows = read_table(path)
    needed = (*headline.by, *headline.columns, *headline.where.split()[:1])
    if missing := [column for column in needed if column not in rows]:
        raise UserError(f"{path}: no column {', '.join(missing)}; found: {', '.join(rows.columns)}")
    if headline.where:
        rows = rows.query(headline.where)
    by = list(headline.by)
    if extreme := headline.largest or headline.smallest:
        ranked = rows.sort_values(extreme, ascending=not headline.largest, kind="stable")
        rows = ranked.drop_duplicates(by).sort_index()
    values = rows.groupby(by, sort=False, dropna=False)[list(headline.columns)].agg(headline.pick).reset_index()
    long = values.melt(by, list(headline.columns), "column", "value")
    how = [headline.where, f"largest {headline.largest}" * bool(headline.largest)]
    how.append(f"smallest {headline.smallest}" * bool(headline.smallest))
    how.append(headline.pick if headline.pick != "first" else "")
    named = [
        ", ".join([*(f"{name}={row[name]}" for name in by if pd.notna(row[name])), *filter(None, how)])
        for _, row in long.iterrows()
    ]
    return long.assign(table=headline.table, selection=named)[[*KEYS, "value"]]


def _tolerance(table: pd.DataFrame) -> pd.Series:
    """What rounding alone may change of each expected number."""
    return RELATIVE * table["expected"].abs() + table["column"].map(ABSOLUTE).fillna(ABSOLUTE_OF_OTHERS)


def compare(expected: pd.DataFrame, found: pd.DataFrame) -> pd.DataFrame:
    """The expected numbers with those found and a verdict: `same` (but for rounding), `in range`, `differs` or
    `missing`.
    """
    table = expected.merge(found, how="left", on=KEYS, validate="one_to_one")
    value = table["value"]
    same = (value - table["expected"]).abs() <= _tolerance(table)
    verdicts = ["missing", "same", "in range"]
    chosen = np.select([value.isna(), same, value.between(table["low"], table["high"])], verdicts, "differs")
    return table.assign(verdict=chosen)


def recorded(runs: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """What to expect after these runs' numbers: the first run's, and how far others may be from it.

    A number on which all runs agree but for rounding is held to that tolerance. Any other has the range of the runs,
    widened on both sides by as much again: three or four runs tell little about the extremes. A number that some run
    lacks, such as the KL of a circuit smaller than any that was found there, is left out.
    """
    table = runs[0].rename(columns={"value": 0})
    for number, run in enumerate(runs[1:], 1):
        table = table.merge(run.rename(columns={"value": number}), on=KEYS, validate="one_to_one")
    values = table[list(range(len(runs)))]
    table = table[KEYS].assign(expected=values[0])
    tolerance, least, most = _tolerance(table), values.min(axis=1), values.max(axis=1)
    agree = values.sub(values[0], axis=0).abs().le(tolerance, axis=0).all(axis=1)
    low = (table["expected"] - tolerance).where(agree, least - (most - least))
    high = (table["expected"] + tolerance).where(agree, most + (most - least))
    return table.assign(low=low, high=high)[COLUMNS]


def expected_file(config_file: str | Path) -> Path:
    """Where a config's expected numbers lie: beside it, under its name."""
    return Path(config_file).with_suffix(".expected.csv")


def record(config: Config, config_file: str | Path, folders: Sequence[Path]) -> None:
    """Write the expected numbers of a config from the folders of its finished runs, the reference first.

    Raises:
        UserError: as `numbers`.
    """
    runs = [numbers(config, folder) for folder in folders]
    table, path = recorded(runs), expected_file(config_file)
    with atomic_path(path) as temporary:
        table.to_csv(temporary, index=False, float_format="%.6g")
    left_out = max(map(len, runs)) - len(table)
    print(f"{path}: {len(table)} numbers of {len(runs)} runs; {left_out} left out, which not all of them have")


def verify(config: Config, config_file: str | Path) -> bool:
    """Print the expected numbers beside those of the config's finished run; whether none differs or is missing.

    Raises:
        UserError: there are no expected numbers, or as `numbers`.
    """
    path, folder = expected_file(config_file), Path(Layout(config).results_dir)
    try:
        expected = pd.read_csv(path)
    except FileNotFoundError:
        raise UserError(f"{path}: missing; allowed: a file that `verify --record RESULTS_DIR` wrote") from None
    except ValueError as error:
        raise UserError(f"{path}: can't be read as CSV: {error}") from None
    if missing := [column for column in COLUMNS if column not in expected]:
        raise UserError(f"{path}: no column {', '.join(missing)}; allowed: {', '.join(COLUMNS)}")
    found = numbers(config, folder)
    table = compare(expected, found)
    print(_text(table))
    counts = table["verdict"].value_counts()
    verdicts = ", ".join(f"{counts.get(name, 0)} {name}" for name in ("same", "in range", "differs", "missing"))
    more = len(found) - int(table["value"].notna().sum())
    print(f"{folder} against {path}: {len(table)} numbers, {verdicts}" + f"; {more} more are not expected" * (more > 0))
    return bool(table["verdict"].isin(["same", "in range"]).all())


def _text(table: pd.DataFrame) -> str:
    """The table for people."""
    shown = pd.DataFrame(
        {
            "number": table["table"] + ": " + table["selection"] + ": " + table["column"],
            "expected": [f"{row.expected:.4g} ({row.low:.4g} to {row.high:.4g})" for row in table.itertuples()],
            "found": ["" if np.isnan(value) else f"{value:.4g}" for value in table["value"]],
            "verdict": table["verdict"],
        }
    )
    lines = [[*shown.columns], *shown.to_numpy().tolist()]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )
