"""Average indirect effects with standard errors over subjects."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import pandas as pd
from torch import Tensor

from oacore.config.tracing import CORRUPTIONS, kind_and_scale
from oacore.fits.convergence import UNFITTED, Convergence, OfFits, typed
from oacore.metrics import PROBABILITY_RESOLUTION, clustered_mean_and_se, zero_below
from oacore.store.items import Item
from oacore.tracing.places import NOWHERE, Curve, Place


@dataclass(frozen=True)
class Traced:
    """Probabilities of the answers of N facts under one corruption, averaged over its draws."""

    clean: Tensor  # [N]
    corrupted: Tensor  # [N]
    restored: Tensor  # [n, N] of each place

    @property
    def brought_back(self) -> Tensor:
        """[n, N] of the answer's probability, what restoring each place adds to it; its mean is the AIE."""
        return zero_below(self.restored.double() - self.corrupted.double(), PROBABILITY_RESOLUTION)

    def item(self, rows: Sequence[int] | None = None) -> Item:
        """As the store has it, or some of the places of it."""
        restored = self.restored if rows is None else self.restored[list(rows)]
        return Item({"clean": self.clean, "corrupted": self.corrupted, "restored": restored})

    @classmethod
    def of_item(cls, item: Item) -> "Traced":
        """From the store."""
        return cls(**item.tensors)


def effects(traced: Traced, row: int, clusters: np.ndarray) -> dict[str, float]:
    """AIE of place `row`, its parts, and its share of what the corruption destroyed.

    aie: mean of p_restored - p_corrupted. aie_normalised: 1 - E max(0, p_clean - p_restored) / E (p_clean -
    p_corrupted), the paper's figure. Differences below `PROBABILITY_RESOLUTION` count as 0, and the share of nothing is
    NaN. Standard errors are over clusters [N] of facts that are not independent, such as those about one subject.
    """
    clean, corrupted, restored = (x.double() for x in (traced.clean, traced.corrupted, traced.restored[row]))
    lost, destroyed = (
        zero_below(change, PROBABILITY_RESOLUTION) for change in ((clean - restored).clamp(min=0), clean - corrupted)
    )
    aie, se = clustered_mean_and_se(traced.brought_back[row], clusters)
    share = float(lost.mean() / destroyed.mean()) if float(destroyed.mean()) > PROBABILITY_RESOLUTION else float("nan")
    # The delta method for a ratio of means.
    _, share_se = clustered_mean_and_se((lost - share * destroyed) / destroyed.mean(), clusters)
    means = {"p_clean": clean, "p_corrupted": corrupted, "p_restored": restored}
    parts = {name: float(values.mean()) for name, values in means.items()}
    return {"aie": aie, "se": se, **parts, "n": len(clean), "aie_normalised": 1 - share, "se_normalised": share_se}


def fits_behind(corruption: str, fits: OfFits) -> OfFits:
    """Those of the places' fits that a corruption's constants come from; none if it takes no fitted ones."""
    constants = CORRUPTIONS[kind_and_scale(corruption)[0]].constants
    if constants in ("own", "cautious"):
        return fits
    return {NOWHERE.name: fits[NOWHERE.name]} if constants == "shared" else {}


def aie_table(
    corruption: str,
    traced: Traced,
    places: Sequence[Place],
    clusters: np.ndarray,
    curves: Sequence[Curve],
    n_layers: int,
    fits: OfFits | None = None,
) -> pd.DataFrame:
    """One row per curve and layer, from the probabilities of the places that they mean; columns as `tables.AIE_COLUMNS`
    and, where constants were fitted, how: converged, steps, left (of probability).

    Args:
        places: in the order of `traced.restored`.
        clusters: [N], the same number for facts that are not independent.
        fits: by the places' names, of which `NOWHERE` is the corrupted run; a place without one shares that one's.
    """
    row_of = {item: row for row, item in enumerate(places)}
    rows = []
    for curve in curves:
        for layer, item in enumerate(curve.places(n_layers)):
            point = {"corruption": corruption, **asdict(curve), "layer": layer}
            fit = UNFITTED
            if fits:
                fit = Convergence.together([fits[place.name] for place in (item, NOWHERE) if place.name in fits])
            rows.append(point | effects(traced, row_of[item], clusters) | fit._asdict())
    return typed(pd.DataFrame(rows))
