"""What ablating sets of edges costs, and the effects and interactions that follow from it.

Every set of edges is judged as a circuit is (`oacore.circuits.judge`): under a fitted ablation type it has optimal
constants of its own. With kl(A) the KL(model || model with the edges A ablated) of a prompt, in nats,

    total(i) = kl(all edges out of i)            direct(i) = kl(i -> logits)
    indirect(i) = kl(all others out of i)        path(i, m) = kl(i -> what m reads)
    self-repair(i) = direct(i) - total(i)        interaction(i, j) = kl(out of i or j) - total(i) - total(j)

Differences are taken prompt by prompt, so that their standard errors are those of paired measurements. The clean
model's KL, which an interaction adds, is 0.

Symbols: N test prompts, S sources, J destinations.
"""

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from oacore.circuits.judge import Judge
from oacore.fits.convergence import UNFITTED, Convergence, columns_in, typed
from oacore.interactions.edges import direct, indirect, out_of, paths
from oacore.metrics import clustered_means_and_ses

Key = tuple[str, ...]  # names a set of edges, or a row of a table


class EffectTables(NamedTuple):
    """Under one ablation type, which the column `method` names; means and standard errors over test prompts, in nats.

    Each ends with n_prompts and how the fits behind a row came out: converged, steps, left_nats.
    """

    effects: pd.DataFrame  # component, method, then {total, direct, indirect, self_repair}_nats, each with its _se_nats
    paths: pd.DataFrame  # component, mediator, method, nats, se_nats
    interactions: pd.DataFrame  # first, second, method, interaction_nats, se_nats


class _Loss(NamedTuple):
    """What an ablation costs on each prompt, or the difference of several, and the fits behind it."""

    kl: Tensor  # [N] nats
    fits: tuple[Convergence, ...]

    def minus(self, *others: "_Loss") -> "_Loss":
        """The difference on each prompt."""
        fits = [fit for other in others for fit in other.fits]
        return _Loss(self.kl - torch.stack([other.kl for other in others]).sum(0), (*self.fits, *fits))


def measure(
    judge: Judge, components: Sequence[str], mediators: Literal["component", "layer"]
) -> tuple[EffectTables, dict[str, Tensor]]:
    """Effects of each component, and interactions of each pair, under the judge's ablation type.

    Returns:
        The tables, and what effects and interactions are means of: [R, N] nats of each row on each test prompt, by
        column.

    Raises:
        UserError: a component that the graph does not have, or a fit that diverges.
    """
    graph, pairs = judge.task.engine.graph, list(combinations(components, 2))
    sets: dict[Key, np.ndarray] = {("total", i): out_of(graph, i) for i in components}
    sets |= {("direct", i): direct(graph, i) for i in components}
    sets |= {("indirect", i): indirect(graph, i) for i in components}
    through = {(i, m): edges for i in components for m, edges in paths(graph, i, mediators).items()}
    sets |= {("path", *path): edges for path, edges in through.items()}
    sets |= {("pair", i, j): out_of(graph, i) | out_of(graph, j) for i, j in pairs}
    ablated = _losses(judge, sets)
    effects, interactions = dict[Key, list[_Loss]](), dict[Key, list[_Loss]]()
    for i in components:
        total, alone, rest = (ablated[kind, i] for kind in ("total", "direct", "indirect"))
        effects[i,] = [total, alone, rest, alone.minus(total)]
    for i, j in pairs:
        interactions[i, j] = [ablated["pair", i, j].minus(ablated["total", i], ablated["total", j])]
    by_quantity = {f"{name}_nats": f"{name}_se_nats" for name in ("total", "direct", "indirect", "self_repair")}
    by_prompt = {
        column: torch.stack([losses[number].kl for losses in effects.values()])
        for number, column in enumerate(by_quantity)
    }
    nothing = torch.zeros(0, by_prompt["total_nats"].shape[1])  # one component has no pairs
    by_prompt["interaction_nats"] = torch.stack([loss.kl for (loss,) in interactions.values()]) if pairs else nothing
    tables = EffectTables(
        _table(judge, ["component"], by_quantity, effects),
        _table(
            judge, ["component", "mediator"], {"nats": "se_nats"}, {key: [ablated["path", *key]] for key in through}
        ),
        _table(judge, ["first", "second"], {"interaction_nats": "se_nats"}, interactions),
    )
    return tables, by_prompt


def _losses(judge: Judge, sets: Mapping[Key, np.ndarray]) -> dict[Key, _Loss]:
    """What ablating each set of edges, bool [J, S], costs on the test prompts; an empty one costs nothing."""
    graph = judge.task.engine.graph
    some = [key for key, edges in sets.items() if edges.any()]
    kept = torch.stack([torch.from_numpy(graph.valid & ~sets[key]) for key in some])  # [C, J, S]
    judged = judge.judge(kept, [" ".join(key) for key in some])
    kl = judged.losses["test"].kl.double()  # for differences
    losses = {key: _Loss(kl[row], (judged.fits[row],)) for row, key in enumerate(some)}
    return {key: losses.get(key, _Loss(torch.zeros_like(kl[0]), ())) for key in sets}


def _table(
    judge: Judge, names: Sequence[str], quantities: Mapping[str, str], rows: Mapping[Key, Sequence[_Loss]]
) -> pd.DataFrame:
    """A row for each key: its names, then mean and standard error of each quantity.

    Args:
        quantities: the column of each mean, and that of its standard error.
    """
    columns = [*names, "method", *(column for both in quantities.items() for column in both)]
    columns += ["n_prompts", *columns_in("nats")]
    table = pd.DataFrame(list(rows), columns=list(names)).assign(method=judge.ablation)
    for number, (mean, error) in enumerate(quantities.items() if rows else ()):
        kl = torch.stack([losses[number].kl for losses in rows.values()])
        table[mean], table[error] = clustered_means_and_ses(kl, judge.task.clusters)
        table["n_prompts"] = kl.shape[1]
    fits = [_together([fit for loss in losses for fit in loss.fits]) for losses in rows.values()]
    for column, values in zip(columns_in("nats"), zip(*fits, strict=True), strict=False):
        table[column] = list(values)
    return typed(table.reindex(columns=columns))


def _together(fits: Sequence[Convergence]) -> Convergence:
    """Of the fits behind a row, each of them once."""
    fitted = [fit for fit in dict.fromkeys(fits) if fit.converged is not None]
    return Convergence.together(fitted) if fitted else UNFITTED
