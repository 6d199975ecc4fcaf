"""What is drawn at random, each from a seed of its own, and its way to the device."""

import torch
from torch import Tensor


def derangement(n: int, generator: torch.Generator) -> Tensor:
    """A random permutation of n >= 2 without fixed points (Sattolo: one random cycle)."""
    order = torch.randperm(n, generator=generator)
    partner = torch.empty_like(order)
    partner[order] = order.roll(1)
    return partner


def prompts_of_step(n_prompts: int, size: int, seed: int, step: int) -> Tensor:
    """The prompts of a step. Each epoch is a permutation of its own seed, so any step can be drawn without those before
    it.
    """
    size = min(size, n_prompts)
    epoch, index = divmod(step, n_prompts // size)
    order = torch.randperm(n_prompts, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
    return order[index * size : (index + 1) * size]


def uploaded(drawn: Tensor, device: torch.device | str) -> Tensor:
    """The same on a device, without waiting for it. What is drawn there stays as it is."""
    return sendable(drawn, device).to(device, non_blocking=True)


def sendable(drawn: Tensor, device: torch.device | str) -> Tensor:
    """The same in memory that a device can copy while it computes: pinned, where a GPU is to copy from the host."""
    return drawn.pin_memory() if drawn.device.type == "cpu" and torch.device(device).type == "cuda" else drawn
