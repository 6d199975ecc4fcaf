"""What is ablated: units of a network, each some channels at one or several places.

A place is a module of the network whose output is a picture with channels, named as PyTorch names it (`2.branch`). A
block's units are its residual branches and not its output: whatever replaced that by constants would cut every path
from the image, and all blocks would lose the same.

Symbols: n units, C channels of a place.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from oacore.config.vision import FEWEST_RANKED, UnitKind, Vision
from oacore.errors import UserError


@dataclass(frozen=True)
class Units:
    """The units of one kind, in the order of the network.

    Args:
        names, layers: of each unit.
        owners: by place, in order, the number of the unit that each of its channels belongs to, int64 [C].
    """

    names: tuple[str, ...]
    layers: tuple[str, ...]
    owners: Mapping[str, Tensor]

    def __len__(self) -> int:
        return len(self.names)

    @property
    def first_part(self) -> int:
        """The part of the network that the first place lies in, or is."""
        return min(int(place.partition(".")[0]) for place in self.owners)


def units_of(network: nn.Sequential, kind: UnitKind, layer: int, branches: Sequence[int]) -> Units:
    """The units of a residual network.

    Args:
        layer: channels: after how many residual branches.
        branches: how many each block has.
    """
    if kind == "channels":
        n = _width(network, layer)
        place = "the stem" if layer == 0 else f"branch {layer}"
        names = tuple(f"channel {channel}" for channel in range(n))
        return Units(names, (f"after {place}",) * n, {str(layer): torch.arange(n)})
    numbers = range(1, len(network) - 1)
    block = dict(zip(numbers, (of for of, count in enumerate(branches) for _ in range(count)), strict=True))
    if kind == "branches":
        owner = {number: number - 1 for number in numbers}
        names = tuple(f"branch {number}" for number in numbers)
        layers = tuple(f"block {1 + block[number]}" for number in numbers)
    else:
        owner = block
        names = tuple(f"block {1 + of}" for of in dict.fromkeys(block.values()))
        members = [[str(number) for number in numbers if block[number] == of] for of in dict.fromkeys(block.values())]
        layers = tuple(f"branches {', '.join(of_block)}" for of_block in members)
    owners = {f"{number}.branch": torch.full((_width(network, number),), owner[number]) for number in numbers}
    return Units(names, layers, owners)


def check_units(network: nn.Sequential, settings: Vision, branches: Sequence[int]) -> None:
    """Refuse units that a network does not have, or too few where they are to be ranked.

    Raises:
        UserError: names the key and what is allowed.
    """
    if settings.layer > (most := sum(branches)):
        raise UserError(f"vision.layer: {settings.layer}; allowed: 0 to {most}, the network's residual branches")
    for kind in settings.units:
        n = len(units_of(network, kind, settings.layer, branches))
        if settings.ranked(kind) and n < FEWEST_RANKED:
            raise UserError(
                f"vision.units: {kind}, of which the network has {n}; allowed: those of which it has {FEWEST_RANKED}"
            )


def _width(network: nn.Sequential, part: int) -> int:
    """Channels of what a part puts out."""
    convolutions = [module for module in network[part].modules() if isinstance(module, nn.Conv2d)]
    return convolutions[-1].out_channels
