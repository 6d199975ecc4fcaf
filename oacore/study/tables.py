"""The tables of a study's costs; their columns are in docs/study.md."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import pandas as pd

from oacore.fits.convergence import Convergence, columns_in, typed
from oacore.study.quality import Quality

OF_MODEL = ("model", "n_weights", "task")
ACCURACY = (
    *OF_MODEL, "method", "budget", "n_prompts", "forward_passes", "backward_passes", "seconds", "peak_mb",
    *Quality._fields, *columns_in("nats"),
)  # fmt: skip
COST = (
    *OF_MODEL, "method", "measure", "forward_passes", "backward_passes", "seconds", "peak_mb", "quality", "quality_se",
)  # fmt: skip
WHOLE = "optimal_converged"  # the reference: a fit to its end, on all test prompts
COUNTS = {"budget": "Int64", "forward_passes": "Int64", "backward_passes": "Int64"}


class Measured(NamedTuple):
    """One estimate: of which method and budget, None for the reference, what it took, and how good it is."""

    method: str
    budget: int | None
    n_prompts: int
    forward_passes: int
    backward_passes: int
    seconds: float
    peak_mb: float
    quality: Quality
    fit: Convergence


def accuracy_table(of_model: Mapping[str, Any], measured: Sequence[Measured]) -> pd.DataFrame:
    """A row for each method and budget on one task of one model; `of_model` has the first columns."""
    rows = [(*of_model.values(), *of[:7], *of.quality, *of.fit) for of in measured]
    return typed(pd.DataFrame(rows, columns=list(ACCURACY)).astype(COUNTS))


def cost_table(accuracy: pd.DataFrame, circuits: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """A row for each method at the largest budget, one for the reference, and one for each circuit method.

    Args:
        circuits: by task, as `oacore.study.comparison.circuit_costs` gives them.
    """
    whole = accuracy["budget"].isna()
    largest = accuracy["budget"] == accuracy["budget"].max()
    rows = accuracy[largest | whole].assign(measure="spearman", quality=accuracy["spearman"])
    rows["quality_se"] = accuracy["spearman_se"]
    rows["method"] = rows["method"].where(~whole, WHOLE)
    parts = [rows[list(COST)]]
    for task, of_circuits in circuits.items():
        facts = {name: accuracy[name].iloc[0] for name in ("model", "n_weights")}
        passes = {name: pd.array([pd.NA] * len(of_circuits), dtype="Int64") for name in COST[5:7]}
        parts.append(of_circuits.assign(**facts, task=task, measure="front_ratio_to_ugs", **passes)[list(COST)])
    return pd.concat(parts, ignore_index=True)
