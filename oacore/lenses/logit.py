"""The logit lens (nostalgebraist 2020): the residual as it is."""

from typing import Self

from torch import Tensor

from oacore.lenses.lens import LensOfRows, LensSources


class LogitLens(LensOfRows):
    """No values."""

    def final(self, residual: Tensor, layer: int) -> Tensor:
        """The residual itself."""
        return residual

    @classmethod
    def of_rows(cls, name: str, sources: LensSources) -> Self:
        """No row is read."""
        return cls(name, "", sources.model, {})
