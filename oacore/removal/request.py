"""What a method is asked for, and what it gives."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from oacore.circuits.search import Knob
from oacore.config.circuits import EDGE_ABLATIONS, EdgeAblation
from oacore.config.removal import Removal
from oacore.fits.convergence import Convergence
from oacore.fits.resume import NOT_KEPT, Resumable
from oacore.removal.ablated import Ablated
from oacore.removal.behaviours import Behaviours


class Chosen(NamedTuple):
    """An ablation with its constants, and how their fit came out."""

    ablated: Ablated
    fit: Convergence


@dataclass(frozen=True)
class RemovalRequest:
    """An ablation for each knob; none may depend on which others are asked for.

    Args:
        what: named in progress and messages.
    """

    behaviours: Behaviours
    settings: Removal
    ablation: EdgeAblation
    knobs: Sequence[Knob]
    what: str
    resumable: Resumable = NOT_KEPT

    @property
    def fitted(self) -> bool:
        """Whether constants are fitted to each ablation."""
        return EDGE_ABLATIONS[self.ablation].fitted

    @property
    def names(self) -> list[str]:
        """Of the ablations, in messages."""
        return [f"{self.what} {knob.value:g} (seed {knob.seed})" for knob in self.knobs]
