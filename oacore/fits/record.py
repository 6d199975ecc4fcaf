"""Fits on disk, written one way: what was fitted, by name, and how each fit came to it."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd
from torch import Tensor

from oacore.errors import UserError
from oacore.fits.descent import Descent
from oacore.store.artefacts import read_tensors, write_tensors
from oacore.store.provenance import Provenance

RECORD = ("best_loss", "left", "n_steps", "converged", "curve_steps", "curve_losses")


def write_fits(
    path: str | Path, values: Mapping[str, Tensor], names: Sequence[str], descent: Descent, provenance: Provenance
) -> None:
    """Write what was fitted, and as `fit.*` the record of the n fits.

    Args:
        values: tensors by the names that readers ask for; their shapes are the caller's.
        names: of the n fits, in the order of the record.
    """
    record = {f"fit.{name}": getattr(descent, name) for name in RECORD}
    write_tensors(path, {**values, **record}, provenance.noting(fits=list(names)))


def read_fitted(path: str | Path, wanted: Sequence[str] | None, provenance: Provenance) -> dict[str, Tensor]:
    """The fitted tensors by name; all of them if none are named.

    Raises:
        UserError: the file is damaged, belongs to something else, or lacks a name.
    """
    _, tensors = read_tensors(path, provenance)
    fitted = {name: value for name, value in tensors.items() if not name.startswith("fit.")}
    if missing := [name for name in wanted or () if name not in fitted]:
        raise UserError(
            f"{path}: nothing fitted for {', '.join(missing[:5])}; delete it and run the same command again"
        )
    return {name: fitted[name] for name in (fitted if wanted is None else wanted)}


def read_curves(path: str | Path, provenance: Provenance) -> pd.DataFrame:
    """The convergence tests in long form: step, fit, validation_loss; a curve ends where its fit did."""
    facts, tensors = read_tensors(path, provenance)
    names = facts["fits"]
    steps, losses, ends = (tensors[f"fit.{name}"] for name in ("curve_steps", "curve_losses", "n_steps"))
    table = pd.DataFrame(losses.numpy(), columns=names, index=pd.Index(steps.numpy(), name="step")).reset_index()
    long = table.melt("step", var_name="fit", value_name="validation_loss")
    end = dict(zip(names, ends.tolist(), strict=True))
    return long[long["step"] <= long["fit"].map(end)]
