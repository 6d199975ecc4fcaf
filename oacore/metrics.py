"""Losses and the statistics that tables report. Natural logarithms throughout: losses are in nats."""

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
