"""Numbers that two runs have of the same name, their difference, and its standard error.

Losses of the same prompts go up and down together. So where both runs measured the same prompts, and both know every
row's value on each of them (`oacore.store.samples`), the error is that of the differences, prompt by prompt and over
clusters as the runs' own errors are: `paired`. Where prompts differ, or a run has means alone, the two errors are added
as those of independent samples are, which of the same prompts is too large.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from oacore.compare.differences import COLUMNS
from oacore.compare.runs import Runs
from oacore.errors import UserError
from oacore.jobs import Files
from oacore.metrics import clustered_means_and_ses
from oacore.store.artefacts import read_table
from oacore.store.samples import read_samples


@dataclass(frozen=True)
class Measured:
    """A number in each row of a table.

    Args:
        table: what it is called: the whole one in the run's folder.
        stage: whose jobs write it, or a part of it each.
        output: its name among these jobs' files.
        keys: what names a row.
        samples: what holds its values by prompt, among the same files; empty where nothing does.
        column: of these values, where it is not that of the number.
    """

    table: str
    stage: str
    output: str
    keys: tuple[str, ...]
    value: str
    se: str
    samples: str = ""
    column: str = ""


MEASURED = (
    Measured(
        "{task}/ablation/gaps.csv", "gaps", "gaps", ("component", "method"), "gap_nats", "se_nats", "by_prompt"
    ),
    Measured(
        "{task}/circuits/pareto.csv", "circuits", "pareto", ("method", "ablation", "knob", "seed"),
        "kl_nats", "se_nats", "losses", "kl",
    ),
    Measured(
        "{task}/interactions/effects.csv", "interactions", "effects", ("component", "method"),
        "total_nats", "total_se_nats", "by_prompt",
    ),
    Measured(
        "{task}/interactions/interactions.csv", "interactions", "interactions", ("first", "second", "method"),
        "interaction_nats", "se_nats", "by_prompt",
    ),
    Measured(
        "removal/front.csv", "removal", "front", ("method", "ablation", "knob", "seed"), "retain_kl_nats", "retain_se"
    ),
    Measured(
        "{task}/tracing/aie.csv", "tracing", "aie", ("corruption", "site", "position", "window", "layer"),
        "aie", "se", "by_prompt",
    ),
    Measured(
        "{task}/lens/loss.csv", "lens_evaluation", "loss", ("lens", "init", "layer"), "kl_nats", "se_nats", "by_prompt"
    ),
    Measured(
        "vision/importance.csv", "vision", "importance", ("units", "unit", "method"),
        "importance_nats", "se_nats", "by_image",
    ),
)  # fmt: skip


def numbers_of_both(runs: Runs) -> pd.DataFrame:
    """Rows that both runs have, table by table; columns as `COLUMNS`.

    Raises:
        UserError: they have no number in common, or a file is missing, damaged or edited.
    """
    parts = [
        joined(measured, wildcards, first, second)
        for measured in MEASURED
        for wildcards, first, second in runs.of_both(measured.stage)
    ]
    numbers = pd.concat([part for part in parts if len(part)] or [pd.DataFrame()], ignore_index=True)
    if numbers.empty:
        raise UserError(f"{runs.names[0]} and {runs.names[1]}: no number in common; allowed: runs that share a task")
    return numbers


def joined(measured: Measured, wildcards: dict[str, str], first: Files, second: Files) -> pd.DataFrame:
    """Rows that one job of both runs has measured; columns as `COLUMNS`."""
    columns = [*measured.keys, measured.value, measured.se]
    tables = [read_table(files[measured.output])[columns] for files in (first, second)]
    tables = [table.assign(number=np.arange(len(table))) for table in tables]
    both = tables[0].merge(tables[1], on=list(measured.keys), suffixes=("", "_2"))
    value, other = both[measured.value], both[f"{measured.value}_2"]
    se, other_se = both[measured.se], both[f"{measured.se}_2"]
    errors = _paired_errors(measured, (first, second), tables, both)
    paired = errors is not None
    error = np.hypot(se, other_se) if errors is None else pd.Series(errors, both.index)
    difference = other - value
    names = [" ".join(_words(row)) for row in both[list(measured.keys)].itertuples(index=False)]
    in_se = (difference / error).mask(difference == 0, 0.0)  # without any spread, too
    values = (measured.table.format(**wildcards), names, value, se, other, other_se, difference, error, paired, in_se)
    return pd.DataFrame(dict(zip(COLUMNS, values, strict=True)))


def _paired_errors(
    measured: Measured, files: tuple[Files, Files], tables: list[pd.DataFrame], both: pd.DataFrame
) -> np.ndarray | None:
    """The errors of the rows' differences over the prompts of both runs; None where these are not the same ones, or not
    known.
    """
    if not measured.samples:
        return None
    paths = [of[measured.samples] for of in files]
    if not all(path.is_file() for path in paths):
        return None
    samples, column = [read_samples(path) for path in paths], measured.column or measured.value
    if samples[0].measured_on != samples[1].measured_on:
        return None
    for path, of, table in zip(paths, samples, tables, strict=True):
        _check_rows(path, len(of.values[column]), len(table))
    first, second = (
        of.values[column][rows.tolist()].double()
        for of, rows in zip(samples, (both["number"], both["number_2"]), strict=True)
    )
    return clustered_means_and_ses(second - first, samples[0].cluster)[1]


def _check_rows(path: Path, found: int, expected: int) -> None:
    if found != expected:
        raise UserError(f"{path}: {found} rows, and its table has {expected}; delete it and run the same command again")


def _words(row: tuple[Any, ...]) -> Iterator[str]:
    """A row's keys, without those that it lacks."""
    for value in row:
        if not pd.isna(value):
            yield f"{value:g}" if isinstance(value, float) else str(value)
