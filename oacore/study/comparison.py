"""What a member's own tables conclude, in one form for all experiments: a number for each task and method."""

from collections.abc import Iterator
from typing import NamedTuple

import pandas as pd

from oacore.circuits.fronts import base_name
from oacore.config.run import Config
from oacore.report.numbers import Z95
from oacore.store.artefacts import read_table
from oacore.store.layout import Layout
from oacore.store.provenance import Provenance

UGS = "ugs"  # whose front all others are held against


class Row(NamedTuple):
    """One number; a standard error where the table has one."""

    task: str
    experiment: str
    measure: str
    method: str
    value: float
    se: float = float("nan")


def comparison(member: Config, provenance: dict[str, Provenance]) -> pd.DataFrame:
    """Columns as `Row`: rank correlations with counterfactual patching and median shares of OA's gap from
    `summary.csv`, and ratios of fronts to that of UGS from `fronts.csv`.

    Args:
        provenance: of each task's files.
    """
    layout, rows = Layout(member), list[Row]()
    for task in member.ablation_tasks():
        summary = read_table(layout.ablation(task, "summary.csv"), provenance[task])
        for measure in summary.columns.drop("method"):
            rows += [
                Row(task, "ablation", measure, of["method"], float(of[measure])) for of in summary.to_dict("records")
            ]
    for task in member.circuit_tasks():
        rows += _fronts(task, read_table(layout.circuits(task, "fronts.csv"), provenance[task]))
    return pd.DataFrame(rows, columns=list(Row._fields))


def circuit_costs(member: Config, task: str, provenance: Provenance) -> pd.DataFrame:
    """What each circuit method took for all of its circuits under the first ablation type, and its front's ratio to
    that of UGS: method, seconds, peak_mb, quality, quality_se. Passes are not counted there.
    """
    layout, circuits = Layout(member), member.circuits
    assert circuits is not None
    pareto = read_table(layout.circuits(task, "pareto.csv"), provenance)
    pareto = pareto[pareto["ablation"] == circuits.ablations[0]]
    fronts = read_table(layout.circuits(task, "fronts.csv"), provenance)
    ratios = {base_name(row.method): row for row in _fronts(task, fronts[fronts["ablation"] == circuits.ablations[0]])}
    rows = []
    for method, of in pareto.groupby("method", sort=False):
        ratio = ratios.get(str(method))
        quality = (1.0, 0.0) if method == UGS else (ratio.value, ratio.se) if ratio else (float("nan"), float("nan"))
        rows.append((method, of["fit_seconds"].sum(), of["peak_mb"].max(), *quality))
    return pd.DataFrame(rows, columns=["method", "seconds", "peak_mb", "quality", "quality_se"])


def _fronts(task: str, fronts: pd.DataFrame) -> Iterator[Row]:
    """Ratios of KLs, with half a 95 % interval's width in standard errors."""
    for of in fronts[fronts["other"] == UGS].to_dict("records"):
        se = (of["high"] - of["low"]) / (2 * Z95)
        yield Row(
            task, "circuits", f"front_ratio_to_{UGS}_{of['ablation']}", of["method"], float(of["ratio"]), float(se)
        )
