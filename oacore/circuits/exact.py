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
from oacore.fits.resume import NOT_KEPT, Resumable
from oacore.progress import progress


def exact_scores(
    passes: Passes,
    replacements: Replacements,
    objective: Objective,
    chosen: Tensor,
    edges_at_once: int,
    most_passes: int,
    resumable: Resumable = NOT_KEPT,
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
    state = resumable.load(chosen.device) or {"step": torch.tensor(0), "scores": torch.zeros_like(clean[0])}
    scores, done = state["scores"], int(state["step"])
    parts = edges.split(edges_at_once)
    for part in progress(parts[done:], what="exact", unit="edge groups", total=len(parts), initial=done):
        masks = clean.repeat(len(part), 1, 1)
        masks[torch.arange(len(part), device=chosen.device), part[:, 0], part[:, 1]] = 0
        losses = passes.losses(
            objective, chosen, slots.repeat(len(part)), masks, replacement, owned=replacements.per_prompt
        )
        scores[part[:, 0], part[:, 1]] = losses.view(len(part), -1).mean(1) - before
        done += 1
        resumable.save_sometimes({"step": torch.tensor(done), "scores": scores})
    return scores


def rank(request: SearchRequest, seed: int) -> Tensor:
    """The effect [J, S] of every edge alone."""
    passes, chosen, row = request.task.passes["train"], request.prompts(seed), request.row
    bounds, kept = (row.masks_at_once, row.most_passes), request.resumable.part(str(seed), seed)
    return exact_scores(passes, request.replacements, request.objective, chosen, *bounds, kept)
