"""Scores of edges without training: edge attribution patching, its integrated-gradients form, and exact single-edge ablation.

Symbols: n chosen prompts, J destinations, S sources.
"""

import torch
from torch import Tensor

from oacore.circuits.patching import Passes, Replacements
from oacore.config import Objective
from oacore.errors import UserError
from oacore.progress import progress

MOST_ROWS = 500_000  # of exact scores: beyond it a model is not small


def eap_scores(passes: Passes, replacements: Replacements, objective: Objective, chosen: Tensor) -> Tensor:
    """Edge attribution patching (Syed et al. 2023): (r - out) . dloss/dx_j at the clean run, summed over positions, mean over prompts.

    The engine's gradient of a mask of 1 is (out - r) . dloss/dx_j. KL has none at the clean run: use the logit difference.

    Returns:
        [J, S]: the first-order rise of the loss when the edge is ablated.
    """
    if objective == "kl":
        raise ValueError("KL has no gradient at the clean run")
    slots = torch.arange(len(chosen), device=chosen.device)
    found = passes.gradients(objective, chosen, slots, _clean(passes), replacements.of(chosen), owned=replacements.per_prompt)
    return -found.masks[0] / len(chosen)


def eap_ig_scores(passes: Passes, replacements: Replacements, objective: Objective, chosen: Tensor, steps: int) -> Tensor:
    """EAP-IG, inputs (Hanna et al. 2024): the gradient averaged over `steps` runs whose input lies between its replacement and itself.

    Only the edges out of `input` are masked, all alike; the clean run's out - r stays the other factor.
    """
    engine, slots = passes.engine, torch.arange(len(chosen), device=chosen.device)
    replacement = replacements.of(chosen)
    batch = passes.examples.batch
    contrast = engine.sources(type(batch)(batch.tokens[chosen], batch.lengths[chosen])) - engine.weights.centre(replacement)  # [n, S, t, d]
    total = torch.zeros_like(_clean(passes)[0])
    for step in range(1, steps + 1):
        masks = _clean(passes)
        masks[:, :, 0] *= step / steps
        found = passes.gradients(objective, chosen, slots, masks, replacement, owned=replacements.per_prompt, contrast=contrast)
        total -= found.masks[0] / (steps * len(chosen))
    return total * ~engine.no_edge


def exact_scores(passes: Passes, replacements: Replacements, objective: Objective, chosen: Tensor, edges_at_once: int = 32) -> Tensor:
    """The rise of the mean loss [J, S] when each edge alone is ablated.

    Raises:
        UserError: the model has too many edges for it.
    """
    graph = passes.engine.graph
    if graph.n_edges * len(chosen) > MOST_ROWS:
        raise UserError(
            f"circuits.methods: 'exact' takes {graph.n_edges * len(chosen)} passes ({graph.n_edges} edges, {len(chosen)} prompts); "
            f"allowed: {MOST_ROWS}: a smaller model or circuits.n_prompts"
        )
    replacement, clean = replacements.of(chosen), _clean(passes)
    slots = torch.arange(len(chosen), device=chosen.device)
    before = passes.losses(objective, chosen, slots, clean, replacement, owned=replacements.per_prompt).mean()
    edges = torch.from_numpy(graph.valid.copy()).to(chosen.device).nonzero()  # [E, 2]
    scores = torch.zeros_like(clean[0])
    for part in progress(edges.split(edges_at_once), what="exact", unit="edge groups"):
        masks = clean.repeat(len(part), 1, 1)
        masks[torch.arange(len(part), device=chosen.device), part[:, 0], part[:, 1]] = 0
        losses = passes.losses(objective, chosen, slots.repeat(len(part)), masks, replacement, owned=replacements.per_prompt)
        scores[part[:, 0], part[:, 1]] = losses.view(len(part), -1).mean(1) - before
    return scores


def _clean(passes: Passes) -> Tensor:
    """Every edge kept: [1, J, S]."""
    return (~passes.engine.no_edge).float()[None]
