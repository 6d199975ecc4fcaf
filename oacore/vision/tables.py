"""The tables of one kind of units; their columns are in docs/vision.md."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch

from oacore.config.vision import MEASURES, REPLACEMENTS
from oacore.fits.convergence import columns_in, typed
from oacore.metrics import clustered_means_and_ses, spearman
from oacore.vision.agreement import agreement, between, importances
from oacore.vision.curves import area, curve
from oacore.vision.measures import Bench, Measurement
from oacore.vision.replacements import by_place
from oacore.vision.study import Found, Request, convergence_of
from oacore.vision.units import Units

IMPORTANCE = ("units", "unit", "layer", "method", "importance_nats", "se_nats", "n_images", "forward_passes")
AGREEMENT = (
    "units", "method", "reference", "budget", "forward_passes", "spearman", "low", "high", "between_seeds", "n_runs",
)  # fmt: skip
CURVES = ("units", "method", "replacement", "direction", "n_replaced", "nats", "se_nats", "area_nats", "area_se_nats")
SANITY = ("units", "method", "randomised", "spearman")


class VisionTables(NamedTuple):
    """What `vision` writes."""

    importance: pd.DataFrame
    agreement: pd.DataFrame
    curves: pd.DataFrame
    sanity: pd.DataFrame


def importance_table(kind: str, units: Units, found: Mapping[Request, Found]) -> pd.DataFrame:
    """A row for each unit and measure, of whole runs."""
    rows = []
    for request, of in found.items():
        values = of.measurement.values
        means, errors = clustered_means_and_ses(values.T, np.arange(len(values)))
        for unit, (name, layer) in enumerate(zip(units.names, units.layers, strict=True)):
            numbers = (means[unit], errors[unit], len(values), of.n_passes)
            rows.append((kind, name, layer, request.measure, *numbers, *convergence_of(of, unit)))
    return typed(pd.DataFrame(rows, columns=[*IMPORTANCE, *columns_in("nats")]))


def agreement_table(
    kind: str, whole: Mapping[Request, Found], at_budgets: Mapping[Request, Found], seed: int
) -> pd.DataFrame:
    """A row for each measure, budget and reference; a whole run, whose budget is empty, is no row of itself."""
    references = {request.measure: of for request, of in whole.items() if MEASURES[request.measure].family == "shapley"}
    runs: dict[tuple[str, int | None], list[Found]] = {}
    for request, of in [*whole.items(), *at_budgets.items()]:
        runs.setdefault((request.measure, request.budget), []).append(of)
    rows = []
    for (method, budget), of_runs in runs.items():
        measured: Sequence[Measurement] = [of.measurement for of in of_runs]
        passes, apart = max(of.n_passes for of in of_runs), between(measured)
        for reference, its in references.items():
            if budget is not None or method != reference:
                numbers = agreement(measured, its.measurement, seed)
                rows.append((kind, method, reference, budget, passes, *numbers, apart, len(of_runs)))
    return pd.DataFrame(rows, columns=list(AGREEMENT)).astype({"budget": "Int64"})


def curve_table(
    kind: str, of: Bench, whole: Mapping[Request, Found], together: Mapping[str, torch.Tensor]
) -> pd.DataFrame:
    """Deletion and insertion in the order of each measure, under every replacement by a constant for each channel."""
    rows = []
    for name, values in of.means.items():
        if REPLACEMENTS[name].per_place:
            continue
        carried = by_place(together[name], values) if name in together else values
        for request, found in whole.items():
            order = torch.from_numpy(np.argsort(-importances(found.measurement), kind="stable").copy())
            for direction in ("deletion", "insertion"):
                losses = curve(of.test, order, carried, direction)
                numbers = torch.cat((losses.double().T, area(losses)[None]))
                means, errors = clustered_means_and_ses(numbers, np.arange(len(losses)))
                for k in range(len(order) + 1):
                    n_replaced = k if direction == "deletion" else len(order) - k
                    rows.append(
                        (kind, request.measure, name, direction, n_replaced, means[k], errors[k], means[-1], errors[-1])
                    )
    return pd.DataFrame(rows, columns=list(CURVES))


def sanity_table(kind: str, whole: Mapping[Request, Found], randomised: Mapping[Request, Found]) -> pd.DataFrame:
    """How far each measure orders the units of a network with shuffled weights as those of the trained one."""
    trained = {request.measure: importances(of.measurement) for request, of in whole.items()}
    rows = [
        (
            kind,
            request.measure,
            request.randomised,
            float(spearman(importances(of.measurement), trained[request.measure])),
        )
        for request, of in randomised.items()
    ]
    return pd.DataFrame(rows, columns=list(SANITY))
