"""Linear erasure: the stream loses the directions in which the means of the right answers' prompts differ most (the
class-mean subspace of Ravfogel et al. 2022 and Belrose et al. 2023), at the layer where that costs least.

Symbols: L layers, d model width, c right answers, r directions, N prompts.
"""

import torch
from torch import Tensor

from oacore.engine.clean import clean_pass
from oacore.engine.forward import at
from oacore.errors import UserError
from oacore.removal.ablated import Directions
from oacore.removal.behaviours import Behaviours
from oacore.removal.constants import with_values
from oacore.removal.request import Chosen, RemovalRequest
from oacore.removal.validation import validation_loss


def directions(request: RemovalRequest) -> list[Chosen]:
    """An erasure for each number of directions: the layer is that of the lowest removal loss on validation prompts,
    before any fit.
    """
    behaviours = request.behaviours
    stream, means, answers = _streams(behaviours)
    chosen = [_best_layer(request, stream, means, answers, int(knob.value)) for knob in request.knobs]
    widest = max(part.size for part in chosen)
    start = torch.stack([_wide(part.along, widest) for part in chosen])
    spread = torch.stack(
        [_wide(((stream[part.layer] - means[part.layer]) @ part.basis).std(0), widest) for part in chosen]
    )

    def make(row: int, values: Tensor) -> Directions:
        return Directions(chosen[row].layer, chosen[row].basis, values[: chosen[row].size])

    return with_values(request, make, start, spread, [f"{part.layer} {part.size}" for part in chosen])


def _streams(behaviours: Behaviours) -> tuple[Tensor, Tensor, Tensor]:
    """Of the forgotten training prompts: what enters each layer, and the final norm, at the last position, [L + 1, N,
    d]; its means [L + 1, d]; and the number of each prompt's right answer [N].
    """
    (group,) = behaviours.groups["forget"]["train"]
    parts = []
    for batch in group.batch.split(behaviours.tokens_per_batch):
        clean = clean_pass(behaviours.model, batch.tokens, batch.lengths)
        parts.append(torch.stack([at(entering, clean.last)[:, 0] for entering in clean.entering]))
    stream = torch.cat(parts, 1).float()
    return stream, stream.mean(1), group.answers[:, 0].unique(return_inverse=True)[1]


def _best_layer(request: RemovalRequest, stream: Tensor, means: Tensor, answers: Tensor, rank: int) -> Directions:
    behaviours, n_answers = request.behaviours, int(answers.max()) + 1
    most = min(n_answers - 1, stream.shape[-1])
    if rank > most:
        raise UserError(
            f"removal.ranks: {rank}; allowed: up to {most}, since the forgotten prompts have {n_answers} right answers"
        )
    losses, found = [], []
    for layer in range(len(stream)):
        basis = _basis(stream[layer], means[layer], answers, rank)
        along = torch.zeros_like(basis[0]) if request.ablation == "zero" else means[layer] @ basis
        found.append(Directions(layer, basis, along))
        losses.append(validation_loss(behaviours, found[-1]))
    return found[losses.index(min(losses))]


def _basis(stream: Tensor, mean: Tensor, answers: Tensor, rank: int) -> Tensor:
    """The leading directions [d, r] of the means of each answer's prompts, weighted by how many these are."""
    n_answers = int(answers.max()) + 1
    counts = torch.bincount(answers, minlength=n_answers).float()
    totals = stream.new_zeros(n_answers, stream.shape[-1]).index_add(0, answers, stream - mean)
    return torch.linalg.svd(totals / counts.sqrt()[:, None], full_matrices=False).Vh[:rank].T.contiguous()


def _wide(values: Tensor, width: int) -> Tensor:
    """values [r] as [width], ones behind them."""
    return torch.cat((values, values.new_ones(width - len(values))))
