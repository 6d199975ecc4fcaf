"""How cost grows with a model: the slope of its logarithm over that of the number of weights; and from how many passes
on fitting constants pays.
"""

import numpy as np
import pandas as pd

from oacore.config.study import ESTIMATORS
from oacore.metrics import GRADIENT
from oacore.report.series import in_order

EXPONENTS = ("task", "method", "quantity", "exponent", "se", "n_models")
PAYOFF = ("model", "n_weights", "task", "method", "budget", "difference")


def slope(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Least-squares slope of y [n] over x [n] and its standard error; NaN where there are too few different x."""
    spread = ((x - x.mean()) ** 2).sum() if len(x) else 0.0
    if spread == 0:
        return float("nan"), float("nan")
    found = float(((x - x.mean()) * (y - y.mean())).sum() / spread)
    left = y - y.mean() - found * (x - x.mean())
    return found, float(np.sqrt((left**2).sum() / (len(x) - 2) / spread)) if len(x) > 2 else float("nan")


def arithmetic(table: pd.DataFrame) -> pd.Series:
    """Passes times weights, a backward pass as the rest of a gradient: about the multiplications for each token."""
    passes = table["forward_passes"] + (GRADIENT - 1) * table["backward_passes"]
    return passes * table["n_weights"]


def exponents(cost: pd.DataFrame) -> pd.DataFrame:
    """For each task and method, of seconds and, where passes were counted, of passes times weights."""
    quantities = {"seconds": cost["seconds"], "passes x weights": arithmetic(cost)}
    rows = []
    for (task, method), of in cost.groupby(["task", "method"], sort=False):
        for name, values in quantities.items():
            y = values[of.index].astype(float)
            known = y.notna() & (y > 0)
            if known.any():
                x = of["n_weights"][known].astype(float)
                rows.append((task, method, name, *slope(np.log(x.to_numpy()), np.log(y[known].to_numpy())), len(x)))
    return pd.DataFrame(rows, columns=list(EXPONENTS))


def payoff(accuracy: pd.DataFrame) -> pd.DataFrame:
    """For each model, task and method without fits: the smallest budget from which on OA's rank correlation with the
    converged gap is the larger one at every budget, empty where there is none; and by how much at the largest.
    """
    at_budgets = accuracy[accuracy["budget"].notna()]
    rows = []
    for (model, n_weights, task), of in at_budgets.groupby(["model", "n_weights", "task"], sort=False):
        wide = of.pivot(index="budget", columns="method", values="spearman").sort_index()
        for name in in_order(wide.columns, ESTIMATORS):
            if ESTIMATORS[name].fitted or "optimal" not in wide:
                continue
            difference = wide["optimal"] - wide[name]  # NaN where the budget is too small for a fit
            pays = (difference > 0)[::-1].cummin()[::-1].astype(bool)
            budget = int(wide.index[pays].min()) if pays.any() else None
            rows.append((model, n_weights, task, name, budget, difference.iloc[-1]))
    return pd.DataFrame(rows, columns=list(PAYOFF)).astype({"budget": "Int64"})
