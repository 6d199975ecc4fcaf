"""Uniform gradient sampling: edge masks that are 0, 1, or uniform in a window, so that their gradient is unbiased (Li &
Janson 2024, 3).

theta = sigmoid(logit) is the probability that an edge is kept. With u ~ U(0, 1) and a window w = theta (1 - theta),
alpha = 1 - clamp((u - theta) / w + 1/2, 0, 1) is 1 with probability theta - w/2, uniform on (0, 1) with probability w,
else 0. The mean of the loss's derivative in alpha over U(0, 1) is L(1) - L(0), so the mean over the samples in the
window estimates dE[L]/dtheta.

Symbols: F fits, R samples of a fit's step, E edges.
"""

import math
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from oacore.circuits.learn import search_lambdas
from oacore.circuits.search import Found, SearchRequest
from oacore.fits.resume import State

USUAL = 0.99  # of the edges; the mean spread is not that of a few


class _Window(torch.autograd.Function):
    """alpha [F, R, E] of theta [F, E] and noise, with d alpha / d theta = 1 in the window, averaged over the samples in
    it.
    """

    @staticmethod
    def forward(ctx: Any, theta: Tensor, window: Tensor, noise: Tensor) -> Tensor:
        alpha = 1 - ((noise - theta[:, None]) / window[:, None] + 0.5).clamp(0, 1)
        inside = (alpha > 0) & (alpha < 1)
        ctx.save_for_backward(inside)
        return alpha

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (inside,) = ctx.saved_tensors
        # The loss is a mean over all R samples; what counts is the mean over those inside.
        share = inside.sum(1).clamp(min=1) / inside.shape[1]
        return (gradients[0] * inside).sum(1) / share, None, None


class UniformSampler:
    """The mask distribution of UGS.

    Args:
        dynamic_window: widen the window of edges whose gradient is noisy: times the Adam estimate of its standard
            deviation over the fit's mean, between 0.5 and 2; the largest 1 % of them do not raise the mean.
    """

    betas: ClassVar[tuple[float, float]] = (0.9, 0.995)
    # Noisier replacements want smaller steps. The authors' resample keeps positions (reference-figures A.4).
    slower: ClassVar[dict[str, float]] = {"counterfactual": 5.0, "resample": 2.0, "resample_positional": 2.0}

    def __init__(self, dynamic_window: bool = False):
        self.dynamic_window = dynamic_window

    def take(self, fits: slice) -> Self:
        """The same: its fits have nothing of their own."""
        return self

    def start(self, n_fits: int, n_edges: int) -> State:
        """Logits at 1, [F, E]."""
        return {"logit": torch.ones(n_fits, n_edges)}

    def schedule(self, step_share: float, n_edges: int) -> Tensor:
        """Nothing: the distribution follows from its parameters alone."""
        return torch.empty(0)

    def probability(self, parameters: State, schedule: Tensor) -> Tensor:
        """theta [F, E]."""
        return parameters["logit"].sigmoid()

    def sample(self, parameters: State, noise: Tensor, second: State, schedule: Tensor) -> tuple[Tensor, Tensor]:
        """Masks alpha [F, R, E] from noise in [0, 1), and theta [F, E], the size that lambda weighs; both
        differentiable.

        `second` holds Adam's running mean square of each parameter's gradient.
        """
        theta = self.probability(parameters, schedule)
        window = (theta * (1 - theta)).detach().clamp(min=1e-6)
        if self.dynamic_window:
            spread = second["logit"].sqrt()
            most = spread.kthvalue(math.ceil(USUAL * spread.shape[1]), 1, keepdim=True).values
            mean = spread.clamp(max=most).mean(1, keepdim=True)
            window = window * torch.where(mean > 0, spread / mean, 1.0).clamp(0.5, 2.0)
        return _Window.apply(theta, window, noise), theta

    def score(self, parameters: State) -> Tensor:
        """What the threshold rule compares with 1/2: theta [F, E]."""
        logit = parameters["logit"]
        return self.probability(parameters, self.schedule(1.0, logit.shape[1]).to(logit))


def search(request: SearchRequest) -> Found:
    """Circuits by uniform gradient sampling, one for each lambda and seed."""
    return search_lambdas(request, UniformSampler(request.masks.dynamic_window))
