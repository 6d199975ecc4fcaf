"""A network whose units' importance is known in closed form: four channels of bright and dark pictures.

A picture is all 1 or all 0. Channel 0 tells them apart and nobody listens; channel 1 is a constant that the head counts
on; channels 2 and 3 tell them apart and say the same twice. The margin of the first class is
48 c1 + 24 (c2 + c3) - 60: 36 for a bright picture and -12 for a dark one, 12 for a bright one that either of the two
still tells of.
"""

import itertools

import numpy as np
import torch
from torch import nn

from oacore.config.vision import Network
from oacore.vision.data import Pictures
from oacore.vision.network import residual_network

N = 24
CHANNELS = 4
UNUSED, CONSTANT, ONE, OTHER = range(CHANNELS)


def planted() -> nn.Sequential:
    """The network: a stem of four channels, a branch that adds nothing, and the head."""
    network = residual_network(Network(widths=(CHANNELS,), branches=1), 2)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
        stem, head = network[0][0], network[-1].linear
        stem.weight[[UNUSED, ONE, OTHER], 0, 1, 1] = 1
        stem.bias[CONSTANT] = 1
        head.weight[0] = torch.tensor([0.0, 48.0, 24.0, 24.0])
        head.bias[0] = -60
    return network.eval().requires_grad_(False)


def pictures() -> dict[str, Pictures]:
    """Every split has as many bright pictures as dark ones."""
    bright = torch.arange(N) % 2
    split = Pictures(bright.float()[:, None, None, None].expand(-1, 1, 8, 8).contiguous(), 1 - bright)
    return dict.fromkeys(("network", "train", "validation", "test"), split)


def loss(replaced: set[int], values: dict[int, float]) -> float:
    """Mean KL in nats with some channels at these values."""
    losses = []
    for bright in (0.0, 1.0):
        clean = {UNUSED: bright, CONSTANT: 1.0, ONE: bright, OTHER: bright}
        carried = clean | {channel: values[channel] for channel in replaced}
        target, found = (_log_probs(48 * c[CONSTANT] + 24 * (c[ONE] + c[OTHER]) - 60) for c in (clean, carried))
        losses.append((np.exp(target) * (target - found)).sum())
    return float(np.mean(losses))


def shapley_by_orders(values: dict[int, float]) -> list[float]:
    """The mean marginal loss over all 24 orders."""
    total = np.zeros(CHANNELS)
    orders = list(itertools.permutations(range(CHANNELS)))
    for order in orders:
        for place, channel in enumerate(order):
            total[channel] += loss({*order[: place + 1]}, values) - loss({*order[:place]}, values)
    return list(total / len(orders))


def _log_probs(margin: float) -> np.ndarray:
    logits = np.array([margin, 0.0])
    return logits - np.logaddexp(*logits)
