"""What ablated edges carry: one function for each edge ablation type that `oacore.config.circuits` lists.

A type of constants gives them from the training prompts: `(TrainingPrompts) -> Constants`; fits start from them. A type
that differs from prompt to prompt gives the values on chosen prompts: `(Replacements, chosen [n]) -> [n, S, t, d]`, and
one of another prompt's values takes after these what was drawn: `partner` [N] and `place` [N, t] in [0, 1).

Symbols: N prompts of a split, n chosen ones, S sources, t tokens after BOS, d model width, L layers, H heads, Q = 1 or
P + 1 positions of constants (P: the shortest prompt).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from oacore.circuits.constants import Constants
from oacore.circuits.passes import Examples
from oacore.config.circuits import EDGE_ABLATIONS, EdgeAblation
from oacore.draws import derangement, uploaded
from oacore.engine.clean import Batch
from oacore.engine.masked import Engine
from oacore.engine.statistics import Statistics, first_pooled


@dataclass(frozen=True)
class TrainingPrompts:
    """What constants are made of: the training prompts, their counterfactuals, and the statistics of both."""

    engine: Engine
    statistics: Statistics
    batch: Batch
    counterfactual: Batch


class Replacements:
    """Replacement values of one ablation type for the prompts of one split.

    Args:
        start: the constants of a type of constants, or those that fits start from; see `starting_constants`.
        seed: of what is drawn.
    """

    def __init__(self, engine: Engine, ablation: EdgeAblation, examples: Examples, start: Constants, seed: int = 0):
        row = EDGE_ABLATIONS[ablation]
        self.engine, self.ablation, self.examples, self.seed = engine, ablation, examples, seed
        self.start, self.per_prompt = start, row.per_prompt
        self._values, self._is_drawn = (row.load() if row.per_prompt else None), row.drawn
        self._constants = None if row.per_prompt else start.writes(engine, examples.prompts.n_tokens)

    def drawn(self, number: int) -> tuple[Tensor, ...]:
        """What is drawn at random, on the CPU: each prompt's partner [N] and, for every place, one in [0, 1) [N, t];
        nothing for a type that is not drawn.
        """
        if not self._is_drawn:
            return ()
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
        shape = len(self.examples), self.examples.prompts.n_tokens
        return derangement(len(self.examples), generator), torch.rand(shape, generator=generator)

    def of(self, chosen: Tensor, number: int = 0) -> Tensor:
        """[1, S, Q or t, d] constants, or [n, S, t, d] for the chosen prompts [n]; `number` is that of the draw."""
        return self.given(chosen, *(uploaded(values, chosen.device) for values in self.drawn(number)))

    def given(self, chosen: Tensor, *drawn: Tensor) -> Tensor:
        """The same, given what was drawn, on the device."""
        if self._constants is not None:
            return self._constants
        assert self._values is not None
        values: Tensor = self._values(self, chosen, *drawn)
        return values


def starting_constants(ablation: EdgeAblation, prompts: TrainingPrompts) -> Constants:
    """The constants of an ablation type, or those that its fits start from: the means, where it has no constants."""
    row = EDGE_ABLATIONS[ablation]
    constants: Constants = mean(prompts) if row.per_prompt else row.load()(prompts)
    return constants


def zero(prompts: TrainingPrompts) -> Constants:
    """Zeros."""
    return Constants(*map(torch.zeros_like, mean(prompts)))


def mean(prompts: TrainingPrompts) -> Constants:
    """Means over training prompts and positions, Q = 1."""
    table = {name: part.unsqueeze(-2) for name, part in prompts.statistics.mean.items()}
    return _constants(prompts, table, prompts.batch, positional=False)


def mean_positional(prompts: TrainingPrompts) -> Constants:
    """Means over training prompts, position by position."""
    return _constants(prompts, prompts.statistics.mean_positional, prompts.batch, positional=True)


def counterfactual_mean(prompts: TrainingPrompts) -> Constants:
    """Means over the training prompts' counterfactuals, position by position."""
    return _constants(prompts, prompts.statistics.cf_mean, prompts.counterfactual, positional=True)


def counterfactual(replacements: Replacements, chosen: Tensor) -> Tensor:
    """What every source writes on the prompt's own counterfactual."""
    batch = replacements.examples.counterfactual
    return replacements.engine.sources(Batch(batch.tokens[chosen], batch.lengths[chosen]))


def resample(replacements: Replacements, chosen: Tensor, partner: Tensor, place: Tensor) -> Tensor:
    """What every source writes on another prompt, at positions drawn from that one's real tokens."""
    partner = partner[chosen]
    positions = (place[chosen] * (replacements.examples.prompts.last[partner] + 1)[:, None]).long()  # [n, t]
    return _partners_values(replacements, partner, positions)


def resample_positional(replacements: Replacements, chosen: Tensor, partner: Tensor, place: Tensor) -> Tensor:
    """What every source writes on another prompt, at the same positions; past its end, at its last one."""
    partner, prompts = partner[chosen], replacements.examples.prompts
    positions = torch.arange(prompts.n_tokens, device=chosen.device).minimum(prompts.last[partner][:, None])
    return _partners_values(replacements, partner, positions)


def _partners_values(replacements: Replacements, partner: Tensor, positions: Tensor) -> Tensor:
    """What every source writes on the prompts `partner` [n] at positions [n, t] after BOS: [n, S, t, d]."""
    batch = replacements.examples.batch
    values = replacements.engine.sources(Batch(batch.tokens[partner], batch.lengths[partner]))
    return torch.gather(values, 2, positions[:, None, :, None].expand_as(values))


def _constants(prompts: TrainingPrompts, table: dict[str, Tensor], batch: Batch, *, positional: bool) -> Constants:
    """A table of statistics, with Q positions as its last axis but one, as constants."""
    values = {name: part.float()[None] for name, part in table.items()}
    if prompts.engine.model.post_norm:
        # The cache has z alone, and a post-normed head's share depends on all heads of its layer.
        values["head"] = _written_means(prompts.engine, batch, prompts.statistics.shortest, positional)
    return Constants(values["input"], values["head"], values["mlp"])


def _written_means(engine: Engine, batch: Batch, shortest: int, positional: bool) -> Tensor:
    """Means of what each head writes: [1, L, H, 1 or P + 1, d]."""
    model, graph = engine.model, engine.graph
    heads = [s for layer in range(graph.n_layers) for s in range(graph.heads(layer).start, graph.heads(layer).stop)]
    total: Tensor | None = None
    count = torch.zeros(shortest + 1 if positional else 1, dtype=torch.float64, device=model.device)
    for part in batch.split(4096):
        written = engine.sources(part)[:, heads].double()  # [B, L H, t, d]
        position = torch.arange(1, written.shape[2] + 1, device=model.device)
        real = position < part.lengths[:, None]
        if positional:
            row = (
                torch.nn.functional.one_hot(position.clamp(max=shortest), shortest + 1).double()[None] * real[..., None]
            )  # [B, t, P + 1]
        else:
            row = (real & (position >= first_pooled(shortest))).double()[..., None]
        sums = torch.einsum("bntd,btq->nqd", written, row)
        total = sums if total is None else total + sums
        count += row.sum((0, 1))
    assert total is not None
    mean = (total / count.clamp(min=1)[:, None]).float()
    return mean.unflatten(0, (graph.n_layers, graph.n_heads))[None]
