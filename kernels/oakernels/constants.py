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


def constant_gradient(masks: Tensor, dx: Tensor, n_fits: int) -> Tensor:
    """Gradient of the constants of a mix: (1 - m) dx summed over destinations and rows, where m < ABLATED.

    Args:
        masks: [M, J, S].
        dx: [J, B, T, d], or its token sums [J, B, d].
        n_fits: Fc, a divisor of B.

    Returns:
        [Fc, S, Q, d] with Q = T, or 1 for token sums.
    """
    B, (M, _, S) = dx.shape[1], masks.shape
    n_groups = B // math.gcd(B // M, B // n_fits)  # runs of rows with one mask and one fit
    ablated = torch.where(masks < ABLATED, 1 - masks, 0).to(dx.dtype)  # [M, J, S]
    ablated = ablated.repeat_interleave(n_groups // M, 0).view(n_fits, -1, S)  # [Fc, groups * J, S]
    summed = dx.flatten(2).unflatten(1, (n_groups, -1)).sum(2)  # [J, groups, Q * d]
    summed = summed.transpose(0, 1).reshape(n_fits, -1, summed.shape[-1])  # [Fc, groups * J, Q * d]
    return (ablated.mT @ summed).unflatten(2, (-1, dx.shape[-1]))
