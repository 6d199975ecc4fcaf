"""A task's prompts on the device."""

import torch

from oacore.engine.clean import Batch
from oacore.tasks.prompts import Prompts


def batch_of(prompts: Prompts, device: torch.device | str = "cpu", *, counterfactual: bool = False) -> Batch:
    """The prompts, or their counterfactuals, as tensors."""
    tokens = torch.from_numpy(prompts.counterfactual if counterfactual else prompts.tokens).long()
    return Batch(tokens.to(device), torch.from_numpy(prompts.lengths).long().to(device))
