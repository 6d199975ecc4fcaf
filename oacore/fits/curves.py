"""How the fits of a file came to their ends, for figures."""

from pathlib import Path

import pandas as pd

from oacore.store.artefacts import read_arrays
from oacore.store.provenance import Provenance


def read_curves(path: str | Path, provenance: Provenance) -> pd.DataFrame:
    """The convergence tests of a file of `oacore.fits.record` in long form: step, fit, validation_loss; a curve ends
    where its fit did.
    """
    facts, arrays = read_arrays(path, provenance)
    names = facts["fits"]
    steps, losses, ends = (arrays[f"fit.{name}"] for name in ("curve_steps", "curve_losses", "n_steps"))
    table = pd.DataFrame(losses, columns=names, index=pd.Index(steps, name="step")).reset_index()
    long = table.melt("step", var_name="fit", value_name="validation_loss")
    end = dict(zip(names, ends.tolist(), strict=True))
    return long[long["step"] <= long["fit"].map(end)]
