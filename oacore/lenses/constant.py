"""Lenses that run the model's own MLPs and put constants in attention's place: OCA, and what it is compared with."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Self

import torch
from torch import Tensor

from oacore.engine.forward import mlp
from oacore.lenses.lens import FittedLens, Lens, LensOfRows, LensProblem, LensSources
from oacore.lenses.numbers import BANK
from oacore.lenses.rows import LensRows
from oacore.models.weights import Model


class ConstantAttention(Lens):
    """A lens that runs blocks with `constant` in attention's place."""

    def final(self, residual: Tensor, layer: int) -> Tensor:
        """The remaining blocks without attention, [..., B, d]."""
        return without_attention(self.model, residual, layer, lambda i: self.constant(residual, layer, i))

    @abstractmethod
    def constant(self, residual: Tensor, start: int, layer: int) -> Tensor:
        """What stands for attention's output in `layer`, [d] or [B, d], of the lens that starts at layer `start`."""


class OptimalConstants(ConstantAttention, FittedLens):
    """OCA; values: `constants` [L, L, d], from start layer, at layer."""

    def constant(self, residual: Tensor, start: int, layer: int) -> Tensor:
        """The start layer's own."""
        return self.values["constants"][start, layer]

    @classmethod
    def problem(cls, name: str, init: str, sources: LensSources, validation: LensRows) -> LensProblem:
        """From the means, in units of each layer's standard deviation."""
        model = sources.model
        mean, unit = _start(sources)
        return LensProblem(
            start=mean.repeat(model.n_layers, 1, 1),
            unit=unit,
            final=lambda values, layers, residual: from_all_starts(model, residual, layers, values),
            lens=lambda values: cls(name, init, model, {"constants": values}),
        )


class SharedConstants(ConstantAttention, FittedLens):
    """OCA with the same constants whatever layer it starts at; values: `constants` [L, d]."""

    def constant(self, residual: Tensor, start: int, layer: int) -> Tensor:
        """The layer's."""
        return self.values["constants"][layer]

    @classmethod
    def problem(cls, name: str, init: str, sources: LensSources, validation: LensRows) -> LensProblem:
        """From the means; one fit, for the mean loss of all layers."""
        model = sources.model
        mean, unit = _start(sources)
        return LensProblem(
            start=mean[None].clone(),
            unit=unit,
            final=lambda values, layers, residual: from_all_starts(model, residual, layers, values[0]),
            lens=lambda values: cls(name, init, model, {"constants": values[0]}),
        )


class MeanAttention(ConstantAttention, LensOfRows):
    """Attention's mean over the training rows; values: `constants` [L, d]."""

    def constant(self, residual: Tensor, start: int, layer: int) -> Tensor:
        """The layer's."""
        return self.values["constants"][layer]

    @classmethod
    def of_rows(cls, name: str, sources: LensSources) -> Self:
        """One pass over the training rows."""
        return cls(name, "", sources.model, {"constants": sources.cache.attention_moments()[0]})


class ResampledAttention(ConstantAttention, LensOfRows):
    """Another prompt's attention for each row, the same prompt's at every layer; values: `constants` [n, L, d], the
    bank that rows draw from in turn.
    """

    def constant(self, residual: Tensor, start: int, layer: int) -> Tensor:
        """The bank's, [B, d]."""
        bank = self.values["constants"]
        return bank[torch.arange(residual.shape[-2], device=residual.device) % len(bank), layer]

    def moved_on(self, n_rows: int) -> Self:
        """The same bank further on."""
        return replace(self, values={"constants": self.values["constants"].roll(-n_rows, 0)})

    @classmethod
    def of_rows(cls, name: str, sources: LensSources) -> Self:
        """Some of the training rows, in random order."""
        bank = sources.cache.attention_of_some(BANK, sources.seed)
        order = torch.randperm(len(bank), generator=torch.Generator().manual_seed(sources.seed))
        return cls(name, "", sources.model, {"constants": bank[order].to(sources.model.device)})


def _start(sources: LensSources) -> tuple[Tensor, Tensor]:
    """The means [L, d] of what attention wrote, and the unit [1, L, 1] of each layer's constant."""
    mean, std = sources.cache.attention_moments()
    return mean, std.square().mean(-1).sqrt()[None, :, None]


def without_attention(model: Model, residual: Tensor, layer: int, constant: Callable[[int], Tensor]) -> Tensor:
    """Blocks `layer` to the last, with attention's output replaced by `constant(i)` [d] or [B, d]."""
    for i in range(layer, model.n_layers):
        residual = _block(model, i, residual, constant(i))
    return residual


def _block(model: Model, layer: int, residual: Tensor, constant: Tensor) -> Tensor:
    middle = residual + constant.to(residual.dtype)
    return middle + mlp(model, layer, residual if model.parallel else middle)


def from_all_starts(model: Model, residual: Tensor, starts: Sequence[int], constants: Tensor) -> Tensor:
    """OCA from several start layers side by side: each row joins at its own layer, and all go on together.

    Args:
        residual: [m, B, d], entering block `starts[r]`; starts ascend.
        constants: [m, L, d], or [L, d] that all starts share.
    """
    under_way, joined = residual[:0], 0
    for layer in range(model.n_layers):
        n = joined
        while n < len(starts) and starts[n] <= layer:
            n += 1
        if n > joined:
            under_way, joined = torch.cat((under_way, residual[joined:n])), n
        if joined:
            constant = constants[layer] if constants.dim() == 2 else constants[:joined, layer, None]
            under_way = _block(model, layer, under_way, constant)
    return under_way
