"""Hard concrete masks, the relaxation of L0 regularisation (Louizos et al. 2018) that Edge Pruning uses: the baseline
of UGS.

alpha = clamp(1.2 sigmoid((log u - log(1 - u) + log_alpha) / beta) - 0.1, 0, 1) with a learned location and temperature
per edge (reference-figures A.5). The size that lambda weighs is P(alpha > 0).

Symbols: F fits, R samples of a fit's step, E edges.
"""

import math
from typing import ClassVar, Self

import torch
from torch import Tensor

from oacore.circuits.learn import search_lambdas
from oacore.circuits.search import Found, SearchRequest
from oacore.fits.resume import State

STRETCH = (-0.1, 1.1)
TEMPERATURE, COLDEST = 2 / 3, 1e-3


class HardConcreteSampler:
    """The mask distribution of HCGS."""

    betas: ClassVar[tuple[float, float]] = (0.9, 0.999)
    slower: ClassVar[dict[str, float]] = {"counterfactual": 3.0, "resample": 1.5, "resample_positional": 1.5}

    def take(self, fits: slice) -> Self:
        """The same: its fits have nothing of their own."""
        return self

    def start(self, n_fits: int, n_edges: int) -> State:
        """Locations at 0 and temperatures at `TEMPERATURE`, [F, E] each."""
        return {"location": torch.zeros(n_fits, n_edges), "temperature": torch.full((n_fits, n_edges), TEMPERATURE)}

    def schedule(self, step_share: float, n_edges: int) -> Tensor:
        """Nothing: the distribution follows from its parameters alone."""
        return torch.empty(0)

    def sample(self, parameters: State, noise: Tensor, second: State, schedule: Tensor) -> tuple[Tensor, Tensor]:
        """Masks alpha [F, R, E] from noise in [0, 1), and P(alpha > 0) [F, E]; both differentiable."""
        location, beta = parameters["location"], parameters["temperature"].relu() + COLDEST
        noise = noise.clamp(1e-6, 1 - 1e-6)
        soft = ((noise.logit() + location[:, None]) / beta[:, None]).sigmoid()
        low, high = STRETCH
        alpha = (soft * (high - low) + low).clamp(0, 1)
        return alpha, (location - beta * math.log(-low / high)).sigmoid()

    def score(self, parameters: State) -> Tensor:
        """What the threshold rule compares with 1/2: sigmoid(location) [F, E], above 1/2 where a mask's median is."""
        return parameters["location"].sigmoid()


def search(request: SearchRequest) -> Found:
    """Circuits by hard concrete masks, one for each lambda and seed."""
    return search_lambdas(request, HardConcreteSampler())
