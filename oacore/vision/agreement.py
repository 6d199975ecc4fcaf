"""How far two measures order the units alike.

Symbols: N images, n units, W bootstrap draws.
"""

from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np

from oacore.metrics import spearman
from oacore.vision.measures import Measurement

DRAWS = 200  # of images, for intervals
PERCENTILES = (2.5, 97.5)


class Agreement(NamedTuple):
    """Spearman's rank correlation of two measures over units, and the 95 % interval of one run of the first."""

    spearman: float
    low: float
    high: float


def importances(measured: Measurement) -> np.ndarray:
    """The mean over images, [n]."""
    mean: np.ndarray = measured.values.mean(0).numpy()
    return mean


def agreement(runs: Sequence[Measurement], reference: Measurement, seed: int) -> Agreement:
    """Of one measure's runs with a reference on all test images: the mean over runs, and the percentiles over
    bootstrap draws of images, the same for both measures, and over runs.

    A draw's noise adds to that of the images, so that an interval may lie below the value.
    """
    n_images = len(reference.images)
    weights = np.random.default_rng(seed).multinomial(n_images, np.full(n_images, 1 / n_images), size=DRAWS)  # [W, N]
    theirs, drawn = _means(reference, weights), []
    for run in runs:
        drawn.append(spearman(_means(run, weights), theirs))
    value = np.mean([spearman(importances(run), importances(reference)) for run in runs])
    low, high = np.nanpercentile(np.concatenate(drawn), PERCENTILES) if np.isfinite(drawn).any() else (np.nan, np.nan)
    return Agreement(float(value), float(low), float(high))


def between(runs: Sequence[Measurement]) -> float:
    """The mean rank correlation of pairs of runs; NaN of a single one."""
    pairs = [spearman(importances(one), importances(other)) for one, other in combinations(runs, 2)]
    return float(np.mean(pairs)) if pairs else float("nan")


def _means(measured: Measurement, weights: np.ndarray) -> np.ndarray:
    """Means [W, n] over images that were drawn so often [W, N]; a run on few images may miss all of them."""
    chosen = weights[:, measured.images.numpy()].astype(float)  # [W, m]
    chosen[chosen.sum(1) == 0] = 1
    means: np.ndarray = chosen @ measured.values.numpy() / chosen.sum(1, keepdims=True)
    return means
