"""Which components are measured: those that the config names, and those whose ablation costs most.

The ranking is by total effects on validation prompts, so that no component is chosen by the luck that it has on the
test prompts, on which it is then measured.
"""

from collections.abc import Sequence

import pandas as pd
import torch

from oacore.circuits.judge import Judge
from oacore.config.interactions import Interactions
from oacore.errors import UserError
from oacore.fits.convergence import columns_in, typed
from oacore.interactions.edges import out_of
from oacore.models.graph import Graph


def check_names(graph: Graph, components: Sequence[str]) -> None:
    """Refuse names that the graph does not have.

    Raises:
        UserError: an unknown component; says which are allowed.
    """
    for name in components:
        try:
            graph.source_index(name)
        except UserError as error:
            raise UserError(f"interactions.components: {error}") from None


def ranking(judge: Judge) -> pd.DataFrame:
    """Every head and MLP, the one whose ablation costs most first: component, validation_nats, n_prompts, converged,
    steps, left_nats.
    """
    graph = judge.task.engine.graph
    names = graph.source_names[1:]  # the input is no component
    kept = torch.stack([torch.from_numpy(graph.valid & ~out_of(graph, name)) for name in names])
    judged = judge.judge(kept, names)
    kl = judged.losses["validation"].kl
    table = pd.DataFrame({"component": names, "validation_nats": kl.double().mean(1).numpy(), "n_prompts": kl.shape[1]})
    table[columns_in("nats")] = judged.fits
    return typed(table).sort_values("validation_nats", ascending=False, kind="stable", ignore_index=True)


def chosen(ranked: pd.DataFrame, graph: Graph, settings: Interactions) -> list[str]:
    """The components to measure, in the graph's order: the named ones, and the first of the ranking.

    Raises:
        UserError: an unknown component.
    """
    check_names(graph, settings.components)
    wanted = {*settings.components, *ranked["component"].head(settings.n_components)}
    return [name for name in graph.source_names if name in wanted]
