"""What a replaced unit carries: values of every place, flat in one vector or from another image.

Symbols: N images, D numbers of all places together, R rows; by place: C channels, h and w height and width.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from oacore.draws import derangement
from oacore.vision.passes import Values
from oacore.vision.units import Units

Activations = Mapping[str, Tensor]  # by place, [N, C, h, w]


def zero(activations: Activations) -> dict[str, Tensor]:
    """Zeros, [1, C, 1, 1] by place."""
    return {place: torch.zeros(1, value.shape[1], 1, 1) for place, value in activations.items()}


def mean(activations: Activations) -> dict[str, Tensor]:
    """Each channel's mean over images and places of the picture, [1, C, 1, 1] by place."""
    return {place: value.mean((0, 2, 3), keepdim=True) for place, value in activations.items()}


def mean_per_place(activations: Activations) -> dict[str, Tensor]:
    """Each channel's mean over images at every place of the picture, [1, C, h, w] by place."""
    return {place: value.mean(0, keepdim=True) for place, value in activations.items()}


def resample(activations: Activations, seed: int) -> Callable[[Tensor, Tensor], Values]:
    """(rows [R], draws [R]) -> what other images of the same set put out: every draw is a derangement of its own."""
    n, partners = len(next(iter(activations.values()))), dict[int, Tensor]()

    def of_partners(rows: Tensor, draws: Tensor) -> Values:
        for draw in draws.unique().tolist():
            if draw not in partners:
                partners[draw] = derangement(n, torch.Generator().manual_seed(seed * 1_000_003 + draw))
        found = rows.clone()
        for draw in draws.unique().tolist():
            chosen = draws == draw
            found[chosen] = partners[draw][rows[chosen]]
        return {place: value[found] for place, value in activations.items()}

    return of_partners


def flat(values: Values) -> Tensor:
    """All places' values [1, C, h, w] in one row, [1, D]."""
    return torch.cat([value.flatten(1) for value in values.values()], 1)


def by_place(table: Tensor, like: Values) -> dict[str, Tensor]:
    """Rows [R, D] as `flat` orders them, as values [R, C, h, w] by place.

    Args:
        like: has the shapes.
    """
    sizes = [value[0].numel() for value in like.values()]
    parts = table.split(sizes, 1)
    return {place: part.reshape(-1, *like[place].shape[1:]) for place, part in zip(like, parts, strict=True)}


def owners_of(units: Units, like: Values) -> Tensor:
    """The unit that each of the D numbers belongs to, [D]."""
    return torch.cat(
        [units.owners[place][:, None].expand(-1, value[0, 0].numel()).flatten() for place, value in like.items()]
    )


def spreads(activations: Activations, like: Values) -> Tensor:
    """The standard deviation of each of the D numbers' channel, [1, D]: the unit of the learning rate."""
    return flat(
        {place: value.std((0, 2, 3), keepdim=True).expand_as(like[place]) for place, value in activations.items()}
    )
