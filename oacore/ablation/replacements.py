"""What replaces a component's output: one function for each ablation type that `oacore.config.ablation` lists.

Each takes what a batch's values come from, a group of n components, and the row of the first of them in tables of
constants, and returns [n, B or 1, T or 1, w]. Whatever is random is drawn per prompt, so no value depends on the size
of the batches.

Symbols: n components of one group, B prompts, T tokens, w component width, P shortest prompt.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import get_args

import numpy as np
import torch
from torch import Tensor

from oacore.ablation.components import Group, rows_in, value_of
from oacore.config.ablation import ComponentKind
from oacore.engine.clean import Clean
from oacore.engine.statistics import Statistics, spread

NOISE_SCALE = 3.0  # standard deviations of gaussian ablation, as in causal tracing


@dataclass(frozen=True)
class Sources:
    """Where one batch's replacement values come from."""

    statistics: Statistics
    constants: Mapping[str, Tensor]  # by fitted type: [C, 1, W], or [C, P + 1, W] of a positional one
    clean: Clean
    counterfactual: Clean | None
    partner: Clean | None  # of another prompt for each
    draws: Tensor  # [B, T] in [0, 1): which of the partner's positions a shuffled resample takes
    streams: list[tuple[int, int]]  # [B] seeds of the prompts' own random numbers

    @property
    def n_tokens(self) -> int:
        """T."""
        return self.draws.shape[1]

    def fitted(self, method: str, group: Group, first: int) -> Tensor:
        """The group's fitted constants [n, 1 or P + 1, w]."""
        w = rows_in(self.statistics.mean, group).shape[-1]
        return self.constants[method][first : first + len(group), :, :w]

    def of_partner(self, group: Group, positions: Tensor) -> Tensor:
        """The partner's value at positions [B, T]: [n, B, T, w]."""
        assert self.partner is not None
        each = torch.arange(len(positions), device=positions.device)[:, None]
        return value_of(self.partner, group)[:, each, positions]

    @property
    def partner_ends(self) -> Tensor:
        """Last position of each prompt's partner [B, 1]."""
        assert self.partner is not None
        return self.partner.last[:, None]


def zero(sources: Sources, group: Group, first: int) -> Tensor:
    """The zero vector."""
    return torch.zeros((), device=sources.draws.device).expand(len(group), 1, 1, 1)


def mean(sources: Sources, group: Group, first: int) -> Tensor:
    """The mean over training prompts and positions."""
    return rows_in(sources.statistics.mean, group)[:, None, None]


def mean_positional(sources: Sources, group: Group, first: int) -> Tensor:
    """The mean over training prompts, position by position."""
    return spread(rows_in(sources.statistics.mean_positional, group), sources.n_tokens)


def counterfactual_mean(sources: Sources, group: Group, first: int) -> Tensor:
    """The mean over the training prompts' counterfactuals, position by position."""
    return spread(rows_in(sources.statistics.cf_mean, group), sources.n_tokens)


def counterfactual(sources: Sources, group: Group, first: int) -> Tensor:
    """The value on the prompt's own counterfactual."""
    assert sources.counterfactual is not None
    return value_of(sources.counterfactual, group)


def resample(sources: Sources, group: Group, first: int) -> Tensor:
    """The value on another prompt, at positions drawn from that one's real tokens."""
    ends = sources.partner_ends
    return sources.of_partner(group, 1 + (sources.draws * ends).long().minimum(ends - 1))


def resample_positional(sources: Sources, group: Group, first: int) -> Tensor:
    """The value on another prompt, at the same positions as far as it goes."""
    positions = torch.arange(sources.n_tokens, device=sources.draws.device)
    return sources.of_partner(group, positions.minimum(sources.partner_ends))


def gaussian(sources: Sources, group: Group, first: int) -> Tensor:
    """The prompt's own value plus noise, from a stream of its own per prompt and component, whichever others there
    are.
    """
    value = value_of(sources.clean, group)
    sigma = rows_in(sources.statistics.std, group)[:, None, None]  # [n, 1, 1, w]
    noise = torch.empty(value.shape, dtype=torch.float32)
    kind = get_args(ComponentKind).index(group.kind)
    for i, j in np.ndindex(*value.shape[:2]):
        stream = np.random.default_rng((*sources.streams[j], group.layer, kind, group.components[i].head + 1))
        noise[i, j] = torch.from_numpy(stream.standard_normal(value.shape[2:], dtype=np.float32))
    return value + NOISE_SCALE * sigma * noise.to(value.device)


def optimal(sources: Sources, group: Group, first: int) -> Tensor:
    """One fitted constant."""
    return sources.fitted("optimal", group, first)[:, None]


def optimal_positional(sources: Sources, group: Group, first: int) -> Tensor:
    """A fitted constant per position."""
    return spread(sources.fitted("optimal_positional", group, first), sources.n_tokens)
