"""The gradient of the constants that replace ablated sources, taken apart from delta and base, which hold them.

Symbols: as in operands.py, and Fc fits, each with constants of its own for B / Fc consecutive rows.
"""

import math

import torch
from torch import Tensor

ABLATED = 1e-3
"""Below this mask value an edge counts as ablated and trains its constant.

A partially kept edge would bias it (Li & Janson, appendix).
"""


def ablated_shares(masks: Tensor, n_rows: int, n_fits: int) -> Tensor:
    """How much of what each destination reads is a constant's, where it trains it: 1 - m where m < ABLATED, else 0.

    Args:
        masks: [M, J, S], each for n_rows / M consecutive rows.
        n_fits: Fc, a divisor of the rows.

    Returns:
        [Fc, g, J, S], for g runs of rows with one mask in each fit.
    """
    n_runs = n_rows // math.gcd(n_rows // len(masks), n_rows // n_fits)
    shares = torch.where(masks < ABLATED, 1 - masks, 0)
    if n_runs > len(masks):
        shares = shares.repeat_interleave(n_runs // len(masks), 0)
    return shares.unflatten(0, (n_fits, -1))


def summed_tokens(dx: Tensor, n_runs: int, out: Tensor) -> None:
    """What `gradient_of_sums` takes: dx [J, B, T, d] summed over the tokens and the B / n_runs rows of each run, into
    out [n_runs, J, d], in its dtype.
    """
    by_run = dx.flatten(1, 2).unflatten(1, (n_runs, -1))
    torch.sum(by_run, 2, dtype=out.dtype, out=out.transpose(0, 1))


def gradient_of_sums(shares: Tensor, sums: Tensor) -> Tensor:
    """`constant_gradient` of all destinations at once, for Q = 1, from what `summed_tokens` has summed of each.

    Args:
        shares: [Fc, g, J, S].
        sums: [Fc g, J, d].

    Returns:
        [Fc, S, 1, d].
    """
    return (shares.flatten(1, 2).mT @ sums.view(len(shares), -1, sums.shape[-1]))[:, :, None]


def constant_gradient(shares: Tensor, dx: Tensor) -> Tensor:
    """Gradient of the constants of a mix: shares times dx, summed over destinations and rows.

    Args:
        shares: [Fc, g, J, S], from `ablated_shares`.
        dx: [J, B, T, d], or its token sums [J, B, d].

    Returns:
        [Fc, S, Q, d] with Q = T, or 1 for token sums.
    """
    n_fits, n_runs = shares.shape[:2]
    summed = dx.flatten(2).unflatten(1, (n_fits * n_runs, -1)).sum(2)  # [J, Fc g, Q * d]
    summed = summed.transpose(0, 1).reshape(n_fits, -1, summed.shape[-1])  # [Fc, g * J, Q * d]
    return (shares.flatten(1, 2).to(dx.dtype).mT @ summed).unflatten(2, (-1, dx.shape[-1]))
