"""Where the effects peak along the layers."""

import pandas as pd

from oacore.config.tracing import POSITIONS, SITES, corruptions_in_order
from oacore.report.series import in_order
from oacore.tracing.tables import traced_rows

PEAK_COLUMNS = (
    *(
        "corruption",
        "site",
        "position",
        "window",
        "peak_layer",
        "aie",
        "se",
        "aie_normalised",
        "concentration",
        "converged",
    ),
)


def peak_table(aie: pd.DataFrame) -> pd.DataFrame:
    """The layer of the largest AIE of each curve, the first of equal ones: one row per corruption, site, position and
    window.

    `concentration` is the peak's share of the sum of the curve's positive values: 1 if all of the effect is at one
    layer, NaN if there is none. Neighbouring windows overlap, so that wider ones are less concentrated by themselves:
    compare it within a window. `converged` is empty without fits.

    Raises:
        ValueError: as `traced_rows`.
    """
    aie = traced_rows(aie)
    rows = []
    for site in in_order(aie["site"], SITES):
        of_site = aie[aie["site"] == site]
        for window in sorted(set(of_site["window"])):
            of_window = of_site[of_site["window"] == window]
            for position in in_order(of_window["position"], POSITIONS):
                here = of_window[of_window["position"] == position]
                for corruption in corruptions_in_order(here["corruption"]):
                    curve = here[here["corruption"] == corruption].sort_values("layer", kind="stable")
                    rows.append((corruption, site, position, window, *_peak(curve)))
    return pd.DataFrame(rows, columns=list(PEAK_COLUMNS)).astype({"window": int, "peak_layer": int})


def _peak(curve: pd.DataFrame) -> tuple[object, ...]:
    """Layer, AIE, its standard error and its normalised value at the peak of a curve, the concentration, and whether
    its fits had converged.
    """
    peak = curve.iloc[int(curve["aie"].to_numpy().argmax())]
    total = float(curve["aie"].clip(lower=0).sum())
    share = float(peak["aie"]) / total if total > 0 else float("nan")
    return (*peak[["layer", "aie", "se", "aie_normalised"]], share, peak.get("converged"))
