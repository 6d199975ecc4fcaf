"""How a fitted number came out, as the tables have it beside the number."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from oacore.fits.descent import Descent
from oacore.store.artefacts import read_tensors
from oacore.store.provenance import Provenance


class Convergence(NamedTuple):
    """Of one fit, or of the fits behind one number; without a fit there is nothing to say."""

    converged: bool | None = None  # False: the cap on steps ended it
    steps: int | None = None
    left: float = math.nan  # about what further rounds would gain, in the unit of the loss

    @classmethod
    def together(cls, fits: Iterable["Convergence"]) -> "Convergence":
        """Of a number in which several fits take part."""
        fits = list(fits)
        steps = max(fit.steps or 0 for fit in fits)
        return cls(all(fit.converged for fit in fits), steps, sum(fit.left for fit in fits))


UNFITTED = Convergence()
COLUMNS = Convergence._fields
OfFits = Mapping[str, Convergence]  # by the fit's name


def of_descent(descent: Descent) -> list[Convergence]:
    """Of each of the n fits."""
    each = zip(descent.converged.tolist(), descent.n_steps.tolist(), descent.left.tolist(), strict=True)
    return [Convergence(*fit) for fit in each]


def read_convergence(path: str | Path, provenance: Provenance) -> OfFits:
    """Of each fit in a file that `record.write_fits` wrote.

    Raises:
        UserError: the file is damaged or belongs to something else.
    """
    facts, tensors = read_tensors(path, provenance)
    columns = (tensors[f"fit.{name}"].tolist() for name in ("converged", "n_steps", "left"))
    return {name: Convergence(*fit) for name, *fit in zip(facts["fits"], *columns, strict=True)}


def typed(table: pd.DataFrame) -> pd.DataFrame:
    """A table with the columns of `Convergence`: truth values and whole numbers where there is a fit, else empty."""
    return table.astype({"converged": "boolean", "steps": "Int64"})


def columns_in(unit: str = "") -> Sequence[str]:
    """The columns' names in a table whose losses carry their unit: `left_nats`."""
    return [*COLUMNS[:-1], f"{COLUMNS[-1]}_{unit}" if unit else COLUMNS[-1]]
