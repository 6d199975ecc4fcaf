"""KL of what the unembedding gives, without a tensor of all logits."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from oacore.engine.forward import unembed
from oacore.lenses.numbers import CHUNK_ELEMENTS
from oacore.metrics import kl_of_log_probs
from oacore.models.weights import Model


class _UnembeddedKl(torch.autograd.Function):
    """KL(target || unembedding of rows), chunk by chunk: no tensor of all logits, forward or backward."""

    @staticmethod
    def forward(ctx: Any, normed: Tensor, target: Tensor, model: Model) -> Tensor:
        loss = torch.empty(
            normed.shape[:2], dtype=torch.promote_types(normed.dtype, torch.float32), device=normed.device
        )
        gradient = torch.empty_like(normed) if ctx.needs_input_grad[0] else None
        with torch.no_grad():
            for rows, layers, log_target, logits in _logit_chunks(model, normed, target):
                log_probs = logits.log_softmax(-1)
                loss[layers, rows] = kl_of_log_probs(log_target, log_probs)
                if gradient is not None:
                    slope = log_probs.exp_() - log_target.exp()  # of the logits
                    if model.logit_softcap is not None:
                        slope *= 1 - (logits / model.logit_softcap).square()
                    gradient[layers, rows] = slope.to(normed.dtype) @ model.W_U
        ctx.gradient = gradient
        return loss

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        return grad_outputs[0][..., None].to(ctx.gradient.dtype) * ctx.gradient, None, None


def _logit_chunks(model: Model, normed: Tensor, target: Tensor) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
    """(rows, layers, log-probabilities of the target, logits) for parts of `normed` [m, B, d]; target [B, d] or [m, B,
    d] is normed too.
    """
    m, batch = normed.shape[:2]
    some_rows = max(1, min(batch, CHUNK_ELEMENTS // model.d_vocab))
    some_layers = max(1, CHUNK_ELEMENTS // (model.d_vocab * some_rows))
    for start in range(0, batch, some_rows):
        rows = slice(start, start + some_rows)
        shared = unembed(model, target[rows]).log_softmax(-1) if target.dim() == 2 else None
        for first in range(0, m, some_layers):
            layers = slice(first, first + some_layers)
            log_target = unembed(model, target[layers, rows]).log_softmax(-1) if shared is None else shared
            yield rows, layers, log_target, unembed(model, normed[layers, rows])


def unembedded_kl(model: Model, normed: Tensor, target: Tensor) -> Tensor:
    """KL [m, B] in nats of the distributions that the unembedding gives.

    Args:
        normed: predictions after the final norm [m, B, d]; differentiable.
        target: what the model itself unembeds [B, d], or another prediction for each [m, B, d].
    """
    loss: Tensor = _UnembeddedKl.apply(normed, target, model)
    return loss
