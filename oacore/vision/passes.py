"""Passes through a network in which some units are replaced, and what each costs: KL(clean || replaced) in nats.

Every row of a pass is an image and a gate for each unit: 1 keeps it, 0 replaces it. A unit that is kept is computed
from what the replaced ones before it carry.

Symbols: R rows, N images, n units, K classes; by place: C channels, h and w height and width (1 where all places of
the picture have the same).
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from oacore.metrics import kl_divergence
from oacore.vision.units import Units

Values = Mapping[str, Tensor]  # by place, [R or 1, C, h or 1, w or 1]


@dataclass
class Passes:
    """A network before some images.

    Args:
        rows_at_once: of one pass.
    """

    network: nn.Sequential
    units: Units
    pixels: Tensor  # [N, c, h, w]
    rows_at_once: int = 1024

    def __post_init__(self) -> None:
        start = self.units.first_part
        self.clean = self._through(self.network, self.pixels).log_softmax(-1)  # [N, K]
        self._entering, self._tail = self._through(self.network[:start], self.pixels), self.network[start:]

    def __len__(self) -> int:
        return len(self.pixels)

    @torch.no_grad()
    def activations(self) -> dict[str, Tensor]:
        """What the clean network puts out at every place, [N, C, h, w]."""
        seen: dict[str, list[Tensor]] = {place: [] for place in self.units.owners}

        def keep(place: str, value: Tensor) -> Tensor:
            seen[place].append(value)
            return value

        with self._edited(keep):
            self._through(self._tail, self._entering)
        return {place: torch.cat(values) for place, values in seen.items()}

    def losses(self, rows: Tensor, gates: Tensor, values: Values) -> Tensor:
        """KL [R] of rows in one pass, with gradients if they are enabled.

        Args:
            rows: of the images, int64 [R].
            gates: [R, n].
            values: what replaced units carry.
        """

        def edit(place: str, value: Tensor) -> Tensor:
            gate = gates[:, self.units.owners[place]][..., None, None]  # [R, C, 1, 1]
            return gate * value + (1 - gate) * values[place]

        with self._edited(edit):
            logits = self._tail(self._entering[rows])
        return kl_divergence(self.clean[rows], logits)

    def losses_of(self, rows: Tensor, gates: Tensor, values_of: Callable[[slice], Values]) -> Tensor:
        """`losses` of any number of rows, some at a time; `values_of` gives what those of a slice carry."""
        found = []
        for begin in range(0, len(rows), self.rows_at_once):
            part = slice(begin, begin + self.rows_at_once)
            found.append(self.losses(rows[part], gates[part], values_of(part)))
        return torch.cat(found) if found else torch.zeros(0)

    @torch.no_grad()
    def _through(self, parts: nn.Module, entering: Tensor) -> Tensor:
        """What parts make of all images, some at a time."""
        return torch.cat([parts(some) for some in entering.split(self.rows_at_once)])

    @contextmanager
    def _edited(self, edit: Callable[[str, Tensor], Tensor]) -> Iterator[None]:
        """Within, the outputs of all places are what `edit` makes of them."""
        handles = []
        try:
            for place in self.units.owners:
                hook = lambda module, given, value, place=place: edit(place, value)  # noqa: E731
                handles.append(self.network.get_submodule(place).register_forward_hook(hook))
            yield
        finally:
            for handle in handles:
                handle.remove()
