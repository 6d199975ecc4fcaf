"""The removal loss on validation prompts, by which ablations are chosen."""

import torch

from oacore.removal.ablated import Ablated
from oacore.removal.behaviours import Behaviours


@torch.no_grad()
def validation_loss(behaviours: Behaviours, ablated: Ablated) -> float:
    """Its mean over the validation prompts of all that learning sees, in nats."""
    passes = behaviours.learning.passes["validation"]
    parts = passes.examples.batch.split(behaviours.tokens_per_batch)
    logits = torch.cat([ablated.logits(behaviours.engine, behaviours.model, part) for part in parts])
    everything = torch.arange(len(passes.examples), device=logits.device)
    loss = passes.losses_of(behaviours.engine, "kl", logits, passes.examples, everything)
    return float(loss.double().mean())
