"""What is learned: retained KL, and forgotten log odds as far as they are above chance.

Symbols: B rows, N prompts, V vocabulary, A right and W wrong answers.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from oacore.circuits.passes import Examples, logit_difference
from oacore.config.circuits import Objective
from oacore.engine.forward import unembed
from oacore.engine.masked import Engine
from oacore.metrics import kl_divergence


def excess(logits: Tensor, answers: Tensor, wrong: Tensor) -> Tensor:
    """Log odds [B] of right answers [B, A] against wrong ones [B, W] (padded with -1) above chance, in nats.

    Chance is log(A / W): every answer as likely as any other. Below it there is nothing left to forget, and the excess
    is 0.
    """
    chance = ((answers >= 0).sum(1) / (wrong >= 0).sum(1)).log()
    return (logit_difference(logits, answers, wrong) - chance).relu()


def correct(logits: Tensor, answers: Tensor, wrong: Tensor) -> Tensor:
    """Whether a right answer is more likely than every wrong one, 1.0 or 0.0: [B]."""

    def best(ids: Tensor) -> Tensor:
        return logits.gather(1, ids.clamp(min=0)).masked_fill(ids < 0, float("-inf")).amax(1)

    return (best(answers) > best(wrong)).float()


@dataclass(frozen=True)
class RemovalLoss:
    """The loss of rows, as `oacore.circuits.passes.Passes` takes it, in nats; over all prompts its mean is retained
    KL, the mean over tasks, plus the weight times the forgotten excess.

    Args:
        forgotten: [N] which prompts are to be forgotten.
        weights: [N] of each prompt's term.
    """

    forgotten: Tensor
    weights: Tensor

    def __call__(
        self, engine: Engine, objective: Objective, logits: Tensor, examples: Examples, prompts: Tensor
    ) -> Tensor:
        """Losses [B] of rows with logits [B, V] on the prompts [B]."""
        clean = unembed(engine.model, examples.final[prompts]).log_softmax(-1)
        above = excess(logits, examples.answers[prompts], examples.wrong[prompts])
        terms = torch.where(self.forgotten[prompts], above, kl_divergence(clean, logits))
        return self.weights[prompts] * terms
