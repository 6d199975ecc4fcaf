"""Mask learning under a budget: UGS whose probabilities always add up to k edges, so that circuits come at a chosen
size without lambda.

theta = sigmoid(logit + shift) with the one shift per fit that makes sum theta = k; gradients flow through the shift. k
falls geometrically from three quarters of the edges to its target over the first half of the fit, because a circuit cut
out at once can't be found again.

Symbols: F fits, E edges.
"""

from typing import Self

import numpy as np
import torch
from torch import Tensor

from oacore.circuits.circuit import by_size
from oacore.circuits.learn import search_masks
from oacore.circuits.search import Found, SearchRequest
from oacore.circuits.ugs import UniformSampler
from oacore.fits.resume import State

START = 0.73  # share of edges at first: sigmoid(1), as UGS starts
ANNEALED = 0.5  # share of the fit until k is reached
BISECTIONS, REACH = 40, 40.0


class TopKSampler(UniformSampler):
    """The mask distribution of UGS with a fixed expected size; sizes [F] are the fits' budgets in edges."""

    def __init__(self, sizes: Tensor, dynamic_window: bool = False):
        super().__init__(dynamic_window)
        self.sizes = sizes

    def take(self, fits: slice) -> Self:
        """That of some of the budgets."""
        return type(self)(self.sizes[fits], self.dynamic_window)

    def start(self, n_fits: int, n_edges: int) -> State:
        """Logits at 0, [F, E]."""
        return {"logit": torch.zeros(n_fits, n_edges)}

    def schedule(self, step_share: float, n_edges: int) -> Tensor:
        """The expected size [F] that is left at this part of the fit: it shrinks to the budget."""
        full, share, sizes = START * n_edges, min(1.0, step_share / ANNEALED), self.sizes
        shrinking = full ** (1 - share) * sizes.clamp(min=1e-3) ** share
        return torch.where(sizes < full, shrinking, sizes.clamp(max=n_edges - 1e-3))

    def probability(self, parameters: State, schedule: Tensor) -> Tensor:
        """theta [F, E], whose sums are the scheduled sizes [F]."""
        return budgeted(parameters["logit"], schedule)


def budgeted(logit: Tensor, budget: Tensor) -> Tensor:
    """sigmoid(logit + shift) [F, E] with sums `budget` [F] in (0, E); the gradient holds the sum fixed."""
    with torch.no_grad():
        low, high = -logit.amax(1) - REACH, -logit.amin(1) + REACH
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            over = (logit + middle[:, None]).sigmoid().sum(1) > budget
            low, high = torch.where(over, low, middle), torch.where(over, middle, high)
        shift = ((low + high) / 2)[:, None]
        slope = (logit + shift).sigmoid()
        slope = slope * (1 - slope)
        weight = slope / slope.sum(1, keepdim=True)
    return (logit + shift - (weight * (logit - logit.detach())).sum(1, keepdim=True)).sigmoid()


def search(request: SearchRequest) -> Found:
    """Circuits of the highest scores, one for each size and seed; the size is fixed, so that no edge has a price."""
    sizes = request.sizes
    sampler = TopKSampler(torch.tensor(sizes, dtype=torch.float32), request.masks.dynamic_window)
    weights = [0.0] * len(sizes)
    return search_masks(request, sampler, weights, lambda scores: by_size(request.graph, scores, np.array(sizes)))
