"""Lenses: from the residual entering a block to a prediction of the one after all blocks (Li & Janson 2024, section 6).

The model's own final norm and unembedding turn the prediction into a next-token distribution. Each row of
`oacore.config.lenses` names its class here below: one that is fitted says what its fit descends on (`problem`), any
other is made from cached rows (`of_rows`).

Symbols: L layers, m start layers, B rows (prompts or tokens), d model width, V vocabulary.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

from torch import Tensor

from oacore.config.lenses import Lenses
from oacore.engine.clean import Batch
from oacore.engine.forward import logits_of
from oacore.lenses.rows import LensRows, RowCache
from oacore.models.weights import Model


@dataclass(frozen=True)
class Lens(ABC):
    """One lens on all layers of one model.

    Args:
        name: of its row.
        init: where its fit started, of the row's; else empty.
        values: tensors by name; what they are, its class says.
    """

    name: str
    init: str
    model: Model
    values: Mapping[str, Tensor]

    @abstractmethod
    def final(self, residual: Tensor, layer: int) -> Tensor:
        """The residual after all blocks [..., B, d] predicted from the one entering block `layer` [..., B, d]."""

    def logits(self, residual: Tensor, layer: int) -> Tensor:
        """Predicted logits [..., B, V], fp32. At layer L, after all blocks, every lens is the model."""
        return logits_of(self.model, self.final(residual, layer) if layer < self.model.n_layers else residual)

    def moved_on(self, n_rows: int) -> Self:
        """The lens for rows that come after `n_rows` others, so that what a row gets does not depend on the batches."""
        return self


@dataclass(frozen=True)
class LensSources:
    """What the lenses of a task are made from."""

    model: Model
    cache: RowCache
    prompts: Batch  # of training, for a lens that runs the model
    settings: Lenses
    seed: int
    tokens_per_batch: int


@dataclass(frozen=True)
class LensProblem:
    """What the fit of a lens descends on: m fits side by side, one for each layer, or one that all layers share.

    Args:
        start: [m, ...] the values of each fit.
        unit: of the learning rate, broadcasting to `start`.
        final: (values of some fits, their layers, residuals [m, B, d] entering these) -> predictions [m, B, d].
        lens: the lens of fitted values.
        sgd: descend by the official recipe of tuned lenses, else by Adam; see `oacore.fits.descent`.
    """

    start: Tensor
    unit: Tensor
    final: Callable[[Tensor, Sequence[int], Tensor], Tensor]
    lens: Callable[[Tensor], Lens]
    sgd: bool = False


class FittedLens(Lens):
    """A lens whose values are fitted."""

    @classmethod
    @abstractmethod
    def problem(cls, name: str, init: str, sources: LensSources, validation: LensRows) -> LensProblem:
        """Where its fit starts, and what the values do."""


class LensOfRows(Lens):
    """A lens that nothing is fitted for."""

    @classmethod
    @abstractmethod
    def of_rows(cls, name: str, sources: LensSources) -> Self:
        """The lens made from cached rows."""
