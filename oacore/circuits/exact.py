"""Exact single-edge ablation: scores of edges without an approximation, for small models.

Symbols: n chosen prompts, E edges, J destinations, S sources.
"""

import torch
from torch import Tensor

from oacore.circuits.passes import Passes, every_edge
from oacore.circuits.replacements import Replacements
from oacore.circuits.search import SearchRequest
from oacore.config.circuits import Objective
from oacore.errors import UserError
from oacore.progress import progress


def exact_scores(
    passes: Passes,
    replacements: Replacements,
    objective: Objective,
    chosen: Tensor,
    edges_at_once: int,
    most_passes: int,
) -> Tensor:
    """The rise of the mean loss [J, S] when each edge alone is ablated.

    Args:
        edges_at_once: how many are ablated side by side, each in rows of its own.
        most_passes: of one edge and prompt; beyond it a model is not small.

    Raises:
        UserError: the model has too many edges for it.
    """
    graph = passes.engine.graph
    if graph.n_edges * len(chosen) > most_passes:
        raise UserError(
            f"circuits.methods: 'exact' takes {graph.n_edges * len(chosen)} passes ({graph.n_edges} edges, "
            f"{len(chosen)} prompts); allowed: {most_passes}: a smaller model or circuits.n_prompts"
        )
    replacement, clean = replacements.of(chosen), every_edge(passes)
    slots = torch.arange(len(chosen), device=chosen.device)
    before = passes.losses(objective, chosen, slots, clean, replacement, owned=replacements.per_prompt).mean()
    edges = torch.from_numpy(graph.valid.copy()).to(chosen.device).nonzero()  # [E, 2]
    scores = torch.zeros_like(clean[0])
    for part in progress(edges.split(edges_at_once), what="exact", unit="edge groups"):
        masks = clean.repeat(len(part), 1, 1)
        masks[torch.arange(len(part), device=chosen.device), part[:, 0], part[:, 1]] = 0
        losses = passes.losses(
            objective, chosen, slots.repeat(len(part)), masks, replacement, owned=replacements.per_prompt
        )
        scores[part[:, 0], part[:, 1]] = losses.view(len(part), -1).mean(1) - before
    return scores


def rank(request: SearchRequest, seed: int) -> Tensor:
    """The effect [J, S] of every edge alone."""
    passes, chosen, row = request.task.passes["train"], request.prompts(seed), request.row
    return exact_scores(passes, request.replacements, request.objective, chosen, row.masks_at_once, row.most_passes)
