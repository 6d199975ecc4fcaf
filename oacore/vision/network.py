"""A residual network without normalisation, as a sequence of parts: a stem, residual branches around skips, a head.

A part can be run alone, so that what lies before the first ablated place is computed once. Branches end in zeros when
training begins, which makes the network train without normalisation (Zhang et al. 2019, De & Smith 2020).

Symbols: B images, C channels, h and w height and width, K classes.
"""

from torch import Tensor, nn

from oacore.config.vision import Network

EMPTY = 0.0  # a pixel of an empty picture


class Branch(nn.Module):
    """ReLU(skip(x) + branch(x)): [B, C, h, w] to as many or more channels, and to half the size if so asked."""

    def __init__(self, channels: int, width: int, *, halves: bool):
        super().__init__()
        stride = 2 if halves else 1
        self.branch = nn.Sequential(
            nn.Conv2d(channels, width, 3, stride, 1), nn.ReLU(), nn.Conv2d(width, width, 3, 1, 1)
        )
        self.skip = nn.Conv2d(channels, width, 1, stride) if halves else nn.Identity()
        self.activation = nn.ReLU()

    def forward(self, stream: Tensor) -> Tensor:
        """The next stream."""
        out: Tensor = self.activation(self.skip(stream) + self.branch(stream))
        return out


class Head(nn.Module):
    """The mean over places and a linear map to logits: [B, C, h, w] to [B, K]."""

    def __init__(self, channels: int, n_classes: int):
        super().__init__()
        self.linear = nn.Linear(channels, n_classes)

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
            part = Branch(channels, width, halves=block > 0 and number == 0)
            for parameter in part.branch[2].parameters():
                nn.init.zeros_(parameter)
            parts.append(part)
            channels = width
    return nn.Sequential(*parts, Head(channels, n_classes))
