"""Attribution: the first-order estimate of what mean ablation of a component changes (Nanda 2022; Syed et al. 2023).

KL has no gradient at the clean run, so it is that of the logit difference. One backward pass serves all components.

Symbols: C components, B prompts, T tokens, w component width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from oacore.ablation.components import Component, group_components, rows_in, value_of
from oacore.circuits.passes import logit_difference
from oacore.engine.clean import Batch, Clean
from oacore.engine.forward import at, attention_write, combine_heads, embed, heads, logits_of, mlp
from oacore.engine.statistics import Statistics
from oacore.models.weights import Model


def attributions(
    model: Model,
    components: Sequence[Component],
    statistics: Statistics,
    batch: Batch,
    answers: Tensor,
    wrong: Tensor,
) -> Tensor:
    """(mean - value) . d(fall of the logit difference)/d(value), summed over positions after BOS: [C, B] in nats.

    Args:
        components: heads, MLPs and whole attention layers.
        answers, wrong: ids [B, A] and [B, W], padded with -1.
    """
    z, written = list[Tensor](), list[Tensor]()  # per layer [B, T, H, k] and [B, T, d]
    with torch.enable_grad():
        residual = embed(model, batch.tokens)
        for layer in range(model.n_layers):
            z.append(_seen(heads(model, layer, residual)))
            middle = residual + attention_write(model, layer, combine_heads(model, layer, z[-1]))
            written.append(_seen(mlp(model, layer, residual if model.parallel else middle)))
            residual = middle + written[-1]
        last = batch.lengths - 1
        logits = logits_of(model, at(residual, last)[:, 0])
        slopes = torch.autograd.grad(-logit_difference(logits, answers, wrong).sum(), [*z, *written])
    values = Clean(last, (), tuple(z), (), tuple(written))
    gradients = Clean(last, (), slopes[: model.n_layers], (), slopes[model.n_layers :])
    found = []
    for group in group_components(components):
        mean = rows_in(statistics.mean, group)[:, None, None]  # [n, 1, 1, w]
        change = (mean - value_of(values, group).detach()) * value_of(gradients, group)  # [n, B, T, w]
        found.append(change[:, :, 1:].sum((2, 3)))
    return torch.cat(found)


def _seen(value: Tensor) -> Tensor:
    """The value as one whose gradient can be asked for: the first head's begins the graph, all later ones are in it."""
    return value if value.requires_grad else value.requires_grad_()
