"""Losses and the statistics that tables report. Natural logarithms throughout: losses are in nats."""

import numpy as np
from torch import Tensor


def kl_divergence(target_log_probs: Tensor, logits: Tensor) -> Tensor:
    """KL(target || softmax(logits)) over the last axis, in nats.

    Args:
        target_log_probs: [..., V], normalised, fp32; broadcasts against `logits`.
        logits: [..., V].
    """
    return (target_log_probs.exp() * (target_log_probs - logits.log_softmax(-1))).sum(-1)


def mean_and_se(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard error over the last axis (prompts), in float64."""
    wide = values.double()
    return wide.mean(-1), wide.std(-1) / wide.shape[-1] ** 0.5


def clustered_mean_and_se(values: Tensor, clusters: np.ndarray) -> tuple[float, float]:
    """Mean over N values and its standard error over clusters: values [N] of the same cluster number [N] may depend on each other.

    With one value per cluster it is the plain standard error. NaN with a single cluster.
    """
    wide = values.double().cpu().numpy()
    mean = float(wide.mean())
    sums = np.bincount(np.unique(clusters, return_inverse=True)[1], wide - mean)
    n_clusters = len(sums)
    if n_clusters < 2:
        return mean, float("nan")
    return mean, float(np.sqrt((sums**2).sum() * n_clusters / (n_clusters - 1)) / len(wide))
