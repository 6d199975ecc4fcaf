"""How good an estimate of importance is, beside the converged optimal gap: the order of components, and what a short
fit leaves.

Symbols: C components, n prompts of an estimate, N of the reference, W bootstrap draws.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from oacore.metrics import spearman
from oacore.report.numbers import FLOOR

DRAWS = 200  # of prompts, for standard errors
Numbers = NDArray[np.float64]


class Quality(NamedTuple):
    """Of one estimate.

    Args:
        spearman: rank correlation over components with the reference.
        excess: median over components of the gap as a share of the reference's on the same prompts, less 1.
    """

    spearman: float
    spearman_se: float
    excess: float
    excess_se: float


def quality(
    values: Numbers, reference: Numbers, clusters: NDArray[np.int32], seed: int, *, are_gaps: bool = True
) -> Quality:
    """Of values [C, n] on the first n of the reference's prompts [C, N]; standard errors are over draws of clusters
    [N] of prompts, the same for both.

    Args:
        are_gaps: else they are no losses, and have no excess.
    """
    weights = _weights(clusters, seed)
    ranks = spearman(_importance(values, weights), _importance(reference, weights))  # [1 + W]
    excess = _excess(values, reference, weights) if are_gaps else np.full(len(weights), np.nan)
    return Quality(float(ranks[0]), _spread(ranks[1:]), float(excess[0]), _spread(excess[1:]))


def _weights(clusters: NDArray[np.int32], seed: int) -> Numbers:
    """How often each prompt counts [1 + W, N]: as measured, then with clusters drawn with replacement."""
    number = np.unique(clusters, return_inverse=True)[1]
    n = int(number.max()) + 1
    drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), DRAWS)
    return np.concatenate((np.ones((1, len(number))), drawn[:, number]))


def _means(values: Numbers, weights: Numbers) -> Numbers:
    """[1 + W, C] of values [C, n] under the first n weights; a draw that misses all of them counts each once."""
    of_these = weights[:, : values.shape[1]].copy()
    of_these[of_these.sum(1) == 0] = 1
    means: Numbers = of_these @ values.T / of_these.sum(1, keepdims=True)
    return means


def _importance(values: Numbers, weights: Numbers) -> Numbers:
    return np.abs(_means(values, weights))


def _excess(values: Numbers, reference: Numbers, weights: Numbers) -> Numbers:
    """[1 + W]; components whose reference gap is as good as none have no share."""
    gap, least = (_means(part, weights) for part in (values, reference[:, : values.shape[1]]))
    share = np.where(least > FLOOR, gap / np.maximum(least, FLOOR) - 1, np.nan)
    known = np.isfinite(share).any(1)
    found = np.full(len(share), np.nan)
    found[known] = np.nanmedian(share[known], axis=1)
    return found


def _spread(draws: Numbers) -> float:
    """The standard deviation of the draws that have a value."""
    finite = draws[np.isfinite(draws)]
    return float(finite.std(ddof=1)) if len(finite) > 1 else float("nan")
