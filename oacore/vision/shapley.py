"""Shapley values of units, image by image.

The game: the loss of a set is the KL with the units of that set replaced, so that all values of an image sum to its KL
with everything replaced. A unit's value is its mean marginal loss over all orders in which units may be replaced. Every
image draws orders of its own, each beside its reverse (antithetic sampling): the mean over images is unbiased, and its
standard error over images holds the noise of both. Where all sets are as cheap, they are gone through instead.

Symbols: R rows, N images, n units, P orders.
"""

from collections.abc import Callable
from math import factorial

import torch
from torch import Tensor

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # (images [R], gates [R, n], draws [R]) -> KL [R]


def sampled(loss: Loss, images: Tensor, n: int, n_pairs: int, seed: int) -> Tensor:
    """Estimates [N, n] from pairs of a random order and its reverse.

    Args:
        loss: of rows; a draw is the number of an order, whose rows all carry the same.
        images: rows of the images, int64 [N].
    """
    generator, total = torch.Generator().manual_seed(seed), torch.zeros(len(images), n, dtype=torch.float64)
    for pair in range(n_pairs):
        order = torch.rand(len(images), n, generator=generator).argsort(1)
        for draw, way in ((2 * pair, order), (2 * pair + 1, order.flip(1))):
            total += _marginals(loss, images, way, draw)
    return total / (2 * n_pairs)


def _marginals(loss: Loss, images: Tensor, order: Tensor, draw: int) -> Tensor:
    """What replacing each unit adds [N, n], along one order [N, n] for each image."""
    n = order.shape[1]
    place = order.argsort(1)
    gates = (place[:, None] > torch.arange(n)[:, None]).float()  # [N, n, n]: after 1, 2, ... n are replaced
    rows = images[:, None].expand(-1, n).reshape(-1)
    found = loss(rows, gates.reshape(-1, n), torch.full_like(rows, draw)).double().reshape(-1, n)
    return found.diff(dim=1, prepend=torch.zeros(len(images), 1, dtype=torch.float64)).gather(1, place)


def exact(loss: Loss, images: Tensor, n: int, n_draws: int = 1) -> Tensor:
    """The values [N, n] from all 2^n sets; the mean over draws of what replaced units carry."""
    sets = torch.arange(1, 2**n)
    replaced = (sets[:, None] >> torch.arange(n)) & 1  # [2^n - 1, n]
    rows = images[:, None].expand(-1, len(sets)).reshape(-1)
    gates = (1 - replaced).float().expand(len(images), -1, -1).reshape(-1, n)
    total = torch.zeros(len(images), n, dtype=torch.float64)
    weights = _weights(replaced)  # [2^n - 1, n]
    for draw in range(n_draws):
        total += loss(rows, gates, torch.full_like(rows, draw)).double().reshape(len(images), -1) @ weights
    return total / n_draws


def _weights(replaced: Tensor) -> Tensor:
    """How the loss of each set enters each unit's value: for it where it is in the set, against it where it is not."""
    n = replaced.shape[1]
    size = replaced.sum(1)
    joined = torch.tensor(
        [0.0] + [factorial(k - 1) * factorial(n - k) / factorial(n) for k in range(1, n + 1)]
    ).double()
    left = torch.tensor([factorial(k) * factorial(n - k - 1) / factorial(n) for k in range(n)] + [0.0]).double()
    return torch.where(replaced.bool(), joined[size][:, None], -left[size][:, None])


def goes_through_all(n: int, n_pairs: int) -> bool:
    """Whether all sets take no more passes than the pairs."""
    return 2**n - 1 <= 2 * n * n_pairs
