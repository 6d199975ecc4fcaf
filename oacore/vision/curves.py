"""Deletion and insertion: what is lost as units are replaced in the order of their importance, or all but the first.

Symbols: N images, n units.
"""

from typing import Literal

import torch
from torch import Tensor

from oacore.vision.passes import Passes, Values

Direction = Literal["deletion", "insertion"]


@torch.no_grad()
def curve(passes: Passes, order: Tensor, values: Values, direction: Direction) -> Tensor:
    """KL [N, n + 1] with the first 0 to n units of an order [n] replaced, or with all but these."""
    n, images = len(order), torch.arange(len(passes))
    place = order.argsort()
    first = place[None] < torch.arange(n + 1)[:, None]  # [n + 1, n]
    gates = (~first if direction == "deletion" else first).float()
    rows, sets = images.repeat_interleave(n + 1), torch.arange(n + 1).repeat(len(images))
    return passes.losses_of(rows, gates[sets], lambda part: values).reshape(-1, n + 1)


def area(losses: Tensor) -> Tensor:
    """The mean height [N] of curves [N, n + 1] over the share of units, by trapezia: high for a deletion, and low for
    an insertion, that begins with what matters most.
    """
    return torch.trapezoid(losses.double(), dim=1) / (losses.shape[1] - 1)
