"""Losses and the statistics that tables report. Natural logarithms throughout: losses are in nats."""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

RESOLUTION = 1e-9
"""Nats. A KL below this is 0: the next computation of the same would give another. Two forward passes of one fp32 model
that round differently leave logits apart, and with them a KL of second order: 1e-6 and 2e-13 nats for the demo model
and random ones of its size, 1e-5 and 2e-12 for a random GPT-2-small, 2e-5 and 2e-11 for stories260k, whose logits reach
20. Others' reach 100, 5 times the size: 5e-10.
"""

PROBABILITY_RESOLUTION = 1e-6
"""A difference of probabilities that is smaller is 0: these are the exponentials of log-probabilities that are rounded
like the logits.
"""

GRADIENT = 3  # forward passes that a gradient costs: one forward, and a backward of twice the arithmetic


def zero_below(values: Tensor, resolution: float) -> Tensor:
    """The values [...] with zeros in place of those whose size is below `resolution`; what is not finite stays."""
    return values.masked_fill(values.abs() < resolution, 0)


def kl_divergence(target_log_probs: Tensor, logits: Tensor) -> Tensor:
    """KL(target || softmax(logits)) over the last axis, in nats: never negative, and 0 below `RESOLUTION`.

    Args:
        target_log_probs: [..., V], normalised, fp32, a constant; broadcasts against `logits`.
        logits: [..., V]; differentiable, once.
    """
    loss: Tensor = _KlDivergence.apply(target_log_probs, logits)
    return loss


class _KlDivergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, target_log_probs: Tensor, logits: Tensor) -> Tensor:
        log_probs = logits.log_softmax(-1)
        ctx.save_for_backward(target_log_probs, log_probs)
        return kl_of_log_probs(target_log_probs, log_probs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        target_log_probs, log_probs = ctx.saved_tensors
        slope = log_probs.exp().sub(target_log_probs.exp())  # broadcast: target rows may be shared
        return None, slope.mul_(gradient[..., None]).sum_to_size(log_probs.shape)


def kl_of_log_probs(target: Tensor, log_probs: Tensor) -> Tensor:
    """`kl_divergence` of normalised log-probabilities [..., V], without a gradient.

    Sums p d + (q - p), with d = log p - log q, in place of p d: the same, as p and q both sum to 1, but no term is
    negative, and rounding is an error of second order instead of first. Where the sum of p d came out anywhere in
    +-5e-7, this has 2e-12.
    """
    d = target - log_probs
    terms = (
        d.abs().neg_().expm1_()
    )  # q - p without cancellation and without overflow: the larger of the two times e^-|d| - 1
    terms.mul_(torch.maximum(target, log_probs).exp_()).mul_(d.sign())
    return zero_below(terms.addcmul_(target.exp(), d).sum(-1), RESOLUTION)


def clustered_mean_and_se(values: Tensor, clusters: np.ndarray) -> tuple[float, float]:
    """Mean over N values and its standard error over clusters: values [N] of the same cluster number [N] may depend on
    each other.

    With one value per cluster it is the plain standard error. NaN with a single cluster.
    """
    means, errors = clustered_means_and_ses(values[None], clusters)
    return float(means[0]), float(errors[0])


def clustered_means_and_ses(values: Tensor, clusters: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same of many rows [m, N]: means and standard errors [m], in float64."""
    wide = values.double().cpu().numpy()
    means = wide.mean(1)
    number = np.unique(clusters, return_inverse=True)[1]
    n_clusters = int(number.max()) + 1
    if n_clusters < 2:
        return means, np.full(len(means), np.nan)
    sums = np.stack([np.bincount(number, row - mean) for row, mean in zip(wide, means, strict=True)])
    return means, np.sqrt((sums**2).sum(1) * n_clusters / (n_clusters - 1)) / wide.shape[1]


def spearman(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Rank correlations [...] of rows [..., n], ties at their mean rank; NaN where a row has one value alone."""
    x, y = (rank - rank.mean(-1, keepdims=True) for rank in (_ranks(first), _ranks(second)))
    with np.errstate(invalid="ignore", divide="ignore"):
        found: np.ndarray = (x * y).sum(-1) / np.sqrt((x**2).sum(-1) * (y**2).sum(-1))
    return found


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks of rows [..., n]; what is equal shares the mean of its ranks."""
    import pandas as pd  # scipy.stats takes 0.6 s to import; most that need metrics rank nothing

    rows = pd.DataFrame(values.reshape(-1, values.shape[-1]))
    ranks: np.ndarray = rows.rank(axis=1).to_numpy().reshape(values.shape)
    return ranks
