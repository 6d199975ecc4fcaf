"""All places of all facts under one corruption."""

from collections.abc import Sequence

import torch
from torch import Tensor

from oacore.engine.clean import Clean, clean_pass
from oacore.models.weights import Model
from oacore.progress import progress
from oacore.tracing.corruptions import Corruptor
from oacore.tracing.effects import Traced
from oacore.tracing.places import NOWHERE, Place
from oacore.tracing.recall import Recall, answer_probability
from oacore.tracing.restore import restored_apart, restored_together


@torch.no_grad()
def trace(
    model: Model, recall: Recall, places: Sequence[Place], corruptor: Corruptor, tokens_per_batch: int, what: str
) -> Traced:
    """The answers' probabilities of N facts: clean, corrupted, and with each of the places restored, averaged over
    draws.

    Args:
        corruptor: if it has constants for each place, they are those of `places` in their order, the corrupted run's
            last.
        what: named in the progress lines; none if it is empty.
    """
    every = [*places, NOWHERE]
    p_clean, p_restored = [], []
    with progress(what=what, unit="facts", total=len(recall)) as bar:
        for part in recall.in_batches(tokens_per_batch):
            clean = clean_pass(model, part.tokens, part.lengths)
            p_clean.append(answer_probability(model, part, clean.entering[-1]))
            mean = torch.zeros(len(every), len(part), device=model.device)
            for draw in range(corruptor.n_draws):
                mean += _restored(model, part, clean, every, corruptor, draw, tokens_per_batch) / corruptor.n_draws
            p_restored.append(mean)
            bar.update(len(part))
    restored = torch.cat(p_restored, 1).cpu()
    return Traced(torch.cat(p_clean).cpu(), restored[-1], restored[:-1])


def _restored(
    model: Model,
    recall: Recall,
    clean: Clean,
    places: Sequence[Place],
    corruptor: Corruptor,
    draw: int,
    tokens_per_batch: int,
) -> Tensor:
    """Probability of the answers [n, B] with each place restored, in one draw of the corruption."""
    if not corruptor.per_place:
        return restored_together(model, recall, clean, places, corruptor(recall, draw), tokens_per_batch)

    def entering(rows: slice) -> Tensor:
        return corruptor.of_places(rows, recall, draw)

    apart = restored_apart(model, recall, clean, places, entering, tokens_per_batch)
    return torch.cat([probability for _, probability in apart])
