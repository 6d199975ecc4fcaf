"""A residual network as a sequence of parts: a stem, residual branches around skips, a head.

A part can be run alone, so that what lies before the first ablated place is computed once. The network that is trained
here has no normalisation: its branches end in zeros when training begins, which makes it train all the same (Zhang et
al. 2019, De & Smith 2020). Of pretrained ones, normalisation is part of the convolutions (`oacore.vision.pretrained`).

Symbols: B images, C channels, h and w height and width, K classes.
"""

import torch
from torch import Tensor, nn

from oacore.config.vision import Network

EMPTY = 0.0  # a pixel of an empty picture: black, or the mean color where pixels are normalised
NUMBERS_OF_A_TOKEN = 32  # in the stream behind the stem: as much memory as a token of `limits.tokens_per_batch`


class Branch(nn.Module):
    """ReLU(skip(x) + branch(x)): [B, C, h, w] to as many or more channels, and to the same or half the size."""

    def __init__(self, branch: nn.Sequential, skip: nn.Module):
        super().__init__()
        self.branch, self.skip, self.activation = branch, skip, nn.ReLU()

    def forward(self, stream: Tensor) -> Tensor:
        """The next stream."""
        out: Tensor = self.activation(self.skip(stream) + self.branch(stream))
        return out


class Head(nn.Module):
    """The mean over places and a linear map to logits: [B, C, h, w] to [B, K]."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.linear = linear

    def forward(self, stream: Tensor) -> Tensor:
        """Logits."""
        logits: Tensor = self.linear(stream.mean((2, 3)))
        return logits


def residual_network(settings: Network, n_classes: int) -> nn.Sequential:
    """The untrained network: part 0 is the stem, the last one the head, and between them are all branches in order.

    Initial weights come from torch's own generator.
    """
    channels = settings.widths[0]
    parts: list[nn.Module] = [nn.Sequential(nn.Conv2d(1, channels, 3, 1, 1), nn.ReLU())]
    for block, width in enumerate(settings.widths):
        for number in range(settings.branches):
            part = _branch(channels, width, halves=block > 0 and number == 0)
            for parameter in part.branch[2].parameters():
                nn.init.zeros_(parameter)
            parts.append(part)
            channels = width
    return nn.Sequential(*parts, Head(nn.Linear(channels, n_classes)))


def _branch(channels: int, width: int, *, halves: bool) -> Branch:
    stride = 2 if halves else 1
    branch = nn.Sequential(nn.Conv2d(channels, width, 3, stride, 1), nn.ReLU(), nn.Conv2d(width, width, 3, 1, 1))
    return Branch(branch, nn.Conv2d(channels, width, 1, stride) if halves else nn.Identity())


@torch.no_grad()
def rows_at_once(network: nn.Sequential, pixels: Tensor, tokens: int) -> int:
    """How many images pixels [N, c, h, w] a pass may have that is as large as one of so many tokens."""
    return max(1, tokens * NUMBERS_OF_A_TOKEN // network[0](pixels[:1]).numel())
