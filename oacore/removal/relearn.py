"""How soon fine-tuning brings a removed behaviour back, with the ablation in place: what is only suppressed comes back
at once, also where the fine-tuning did not look (Lynch et al. 2024, Eight methods to evaluate robust unlearning).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from oacore.config.removal import Relearn
from oacore.models.weights import Model, _map_tensors, named_tensors
from oacore.removal.ablated import Ablated
from oacore.removal.behaviours import Behaviours, Group
from oacore.removal.loss import correct

BACK = 0.9  # of the accuracy before the ablation


class Relearned(NamedTuple):
    """What fine-tuning came to."""

    steps: int  # taken until the accuracy was back, or the cap
    back: bool
    accuracy: float  # the highest on the way


def accuracy(behaviours: Behaviours, ablated: Ablated, model: Model, group: Group) -> Tensor:
    """Whether each prompt [N] of a group is answered rightly, 1.0 or 0.0."""
    parts = group.batch.split(behaviours.tokens_per_batch // ablated.streams(model))
    with torch.no_grad():
        logits = torch.cat([ablated.logits(behaviours.engine, model, part) for part in parts])
    return correct(logits, group.answers, group.wrong)


def relearn(behaviours: Behaviours, ablated: Ablated, before: float, settings: Relearn) -> Relearned:
    """Steps of Adam on the log-probability of the right answers of a few forgotten training prompts, until the accuracy
    on the forgotten test prompts is `BACK` times the one before the ablation.

    Args:
        before: accuracy on the test prompts without the ablation.
    """
    (train,), (test,) = (behaviours.groups["forget"][split] for split in ("train", "test"))
    order = torch.randperm(len(train.batch), generator=torch.Generator().manual_seed(behaviours.learning.seed))
    chosen = order[: settings.n_prompts]
    batch, answers = train.batch.take(chosen), train.answers[chosen.to(train.answers.device), :1]
    model = _trainable(behaviours.model)
    tokens_at_once = behaviours.tokens_per_batch // ablated.streams(model)
    weights = list(dict.fromkeys(weight for weight in named_tensors(model).values() if weight.requires_grad))
    adam = torch.optim.Adam(weights, lr=settings.learning_rate)
    best = 0.0
    for step in range(settings.max_steps + 1):
        best = max(best, float(accuracy(behaviours, ablated, model, test).double().mean()))
        if best >= BACK * before or step == settings.max_steps:
            break
        adam.zero_grad()
        begin = 0
        for part in batch.split(tokens_at_once):
            log_probs = ablated.logits(behaviours.engine, model, part).log_softmax(-1)
            right = log_probs.gather(1, answers[begin : begin + len(part)])
            (-right.sum() / len(batch)).backward()
            begin += len(part)
        adam.step()
    return Relearned(step, best >= BACK * before, best)


def _trainable(model: Model) -> Model:
    """A copy whose weights take gradients; tied ones stay tied."""
    copies: dict[object, Tensor] = {}

    def copy(tensor: Tensor) -> Tensor:
        same = tensor.data_ptr(), tensor.shape, tensor.stride()
        return copies.setdefault(same, tensor.detach().clone().requires_grad_(tensor.is_floating_point()))

    trainable: Model = _map_tensors(model, copy)
    return trainable
