"""How alike several circuits are."""

from typing import NamedTuple

import numpy as np


def edge_frequency(masks: np.ndarray) -> np.ndarray:
    """In which share of the circuits an edge is: bool [n, J, S] -> float64 [J, S]."""
    return masks.mean(0)


class Stability(NamedTuple):
    """Mean Jaccard index of all pairs of circuits, with its 95 % interval."""

    jaccard: float
    low: float
    high: float


def stability(masks: np.ndarray, *, seed: int = 0, n_resamples: int = 2000) -> Stability:
    """How alike are circuits that should be one, such as those of several seeds?

    The interval is a percentile bootstrap over circuits. Pairs of a resample that are one circuit drawn twice are left
    out, since their agreement says nothing. Two empty circuits agree fully.

    Args:
        masks: bool [n, J, S], n >= 2; with n = 2 there is one pair, and the interval is that point.

    Raises:
        ValueError: fewer than two circuits.
    """
    n = len(masks)
    if n < 2:
        raise ValueError(f"stability of {n} circuits; allowed: at least 2")
    flat = masks.reshape(n, -1).astype(np.float64)
    shared = flat @ flat.T
    either = flat.sum(1)[:, None] + flat.sum(1) - shared
    jaccard = np.divide(shared, either, out=np.ones((n, n)), where=either > 0)
    others = 1 - np.eye(n)
    drawn = (
        np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), n_resamples).astype(np.float64)
    )  # [n_resamples, n]
    pairs = ((drawn @ others) * drawn).sum(1)
    sums = ((drawn @ (jaccard * others)) * drawn).sum(1)
    low, high = np.quantile(sums[pairs > 0] / pairs[pairs > 0], (0.025, 0.975))
    return Stability(float(jaccard[np.triu_indices(n, 1)].mean()), float(low), float(high))
