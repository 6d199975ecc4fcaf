"""Moments of what every source of the residual graph computes, over the training prompts."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Statistics:
    """Moments of every component's value over the training prompts, BOS excluded.

    Pooled ones run over positions >= min(9, P - 1), where values have settled and every prompt still has a token.
    Positional tables have P + 1 rows: one per position that all prompts share, and the pool of all later ones
    (methods.md, section 2).
    """

    shortest: int  # P
    mean: dict[str, Tensor]  # head [L, H, k], mlp [L, d]
    std: dict[str, Tensor]
    mean_positional: dict[str, Tensor]  # head [L, H, P + 1, k], mlp [L, P + 1, d]
    cf_mean: dict[str, Tensor]  # the same over counterfactual prompts


def first_pooled(shortest: int) -> int:
    """The first position of pooled statistics: 9, or the last that every prompt has, never BOS."""
    return max(1, min(9, shortest - 1))


def spread(table: Tensor, n_tokens: int) -> Tensor:
    """A positional table [n, P + 1, w] as a replacement [n, 1, T, w]: later positions share its last row."""
    rows = torch.arange(n_tokens, device=table.device).clamp(max=table.shape[1] - 1)
    return table[:, rows][:, None]


class Moments:
    """Running sums, in float64, of what a batch of clean runs computes; position 0 (BOS) is in no pool."""

    def __init__(self, shortest: int):
        self.shortest = shortest
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, Tensor] = {}

    def add(self, name: str, values: Sequence[Tensor], lengths: Tensor) -> None:
        """Add values, one tensor [B, T, ...] per layer, on prompts of `lengths` [B].

        Layer by layer: float64 copies of all at once were 2.3 times the clean pass that they are taken from.
        """
        n_tokens = values[0].shape[1]
        position = torch.arange(n_tokens, device=values[0].device)
        real = position < lengths[:, None]  # [B, T]
        pool = (real & (position >= first_pooled(self.shortest))).flatten().double()  # [B T]
        table = torch.nn.functional.one_hot(position.clamp(max=self.shortest), self.shortest + 1)  # [T, P + 1]
        rows = (table * real[..., None]).flatten(0, 1).double()  # [B T, P + 1]
        sums = []
        for layer in values:
            wide = layer.double().flatten(0, 1).flatten(1)  # [B T, w]
            sums.append((rows.T @ wide, pool @ wide, pool @ wide.square()))
        counts = (rows.sum(0), pool.sum(), pool.sum())
        for kind, totals, count in zip(
            ("positional", "mean", "second_moment"), zip(*sums, strict=True), counts, strict=True
        ):
            self._sum(f"{name}/{kind}", torch.cat(totals, -1), count)

    def _sum(self, name: str, total: Tensor, count: Tensor) -> None:
        self.sums[name] = self.sums[name] + total if name in self.sums else total
        self.counts[name] = self.counts[name] + count if name in self.counts else count

    def mean(self, name: str, shape: Sequence[int] = (-1,)) -> Tensor:
        """A pooled mean, reshaped to `shape`."""
        return (self.sums[name] / self.counts[name]).float().reshape(*shape)

    def positional(self, name: str, shape: Sequence[int]) -> Tensor:
        """A positional table as [*shape[:-1], P + 1, shape[-1]]; its last row is the pooled mean where no prompt is
        longer than P.
        """
        counts = self.counts[f"{name}/positional"][:, None]
        table = torch.where(
            counts > 0, self.sums[f"{name}/positional"] / counts.clamp(min=1), self.mean(f"{name}/mean").double()
        )
        return table.float().reshape(-1, *shape).movedim(0, -2)

    def std(self, name: str, shape: Sequence[int]) -> Tensor:
        """The standard deviation of the pool, from float64 sums: the square of the mean cancels most digits of the
        second moment.
        """
        pool = self.counts[f"{name}/mean"]
        mean, second = self.sums[f"{name}/mean"] / pool, self.sums[f"{name}/second_moment"] / pool
        return (second - mean.square()).clamp(min=0).sqrt().float().reshape(*shape)
