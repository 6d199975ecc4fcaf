"""Causal tracing: where in the model is a fact recalled? (Meng et al. 2022; with optimal ablation, Li & Janson 2024,
section 5)

Three runs of a prompt: clean; corrupted, with the subject's token embeddings replaced; and corrupted with one place
restored to what it was in the clean run. The average indirect effect (AIE) of a place is how much of the answer's
probability that brings back.

A place is what one site (attention output, MLP output, whole block) writes in a window of consecutive layers at some
positions. All places of a batch go through the model side by side: one clean pass serves them all, and where they share
their corruption one corrupted pass too, which each leaves at the first layer that it restores.

Symbols: n places, B facts, T tokens, M answer tokens, d model width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from oacore.config.tracing import Position, Site, Tracing


@dataclass(frozen=True, order=True)
class Place:
    """What `site` writes in layers `first` to `last`, both included, at a kind of position or at one token of every
    prompt.
    """

    site: Site
    position: Position | int
    first: int
    last: int

    @property
    def name(self) -> str:
        """As files of constants call it: mlp.last.0-4, or corrupted for `NOWHERE`."""
        return f"{self.site}.{self.position}.{self.first}-{self.last}" if self.first <= self.last else "corrupted"


NOWHERE = Place("block", "last", 0, -1)  # restores nothing: the corrupted run


def window(layer: int, width: int, n_layers: int) -> tuple[int, int]:
    """First and last layer of the window of `width` (odd) around a layer, clipped at both ends of the model."""
    reach = width // 2
    return max(0, layer - reach), min(n_layers - 1, layer + reach)


def place(site: Site, position: Position | int, layer: int, width: int, n_layers: int) -> Place:
    """The place around `layer`. Clipped windows of neighbouring layers can be the same place."""
    return Place(site, position, *window(layer, width, n_layers))


@dataclass(frozen=True)
class Curve:
    """Places along the layers: a site, a kind of position, and how many layers are restored around each."""

    site: Site
    position: Position
    window: int

    @property
    def name(self) -> str:
        """As the store calls it: mlp.last.5."""
        return f"{self.site}.{self.position}.{self.window}"

    def places(self, n_layers: int) -> list[Place]:
        """The place around each layer."""
        return [place(self.site, self.position, layer, self.window, n_layers) for layer in range(n_layers)]


def curves_of(tracing: Tracing) -> list[Curve]:
    """Every curve that is asked for."""
    return [
        Curve(site, position, width)
        for site in tracing.sites
        for position in tracing.positions
        for width in tracing.windows
    ]


def rows_of(places: Sequence[Place], wanted: Sequence[Place]) -> list[int]:
    """Where the wanted places stand among others, each once."""
    row_of = {item: row for row, item in enumerate(places)}
    return [row_of[item] for item in dict.fromkeys(wanted)]


def places_of(curves: Sequence[Curve], n_layers: int) -> list[Place]:
    """Every place of every curve once."""
    return list(dict.fromkeys(item for curve in curves for item in curve.places(n_layers)))
