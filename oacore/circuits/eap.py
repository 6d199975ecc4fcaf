"""Edge attribution patching, plain and with integrated gradients: scores of edges without training.

Symbols: n chosen prompts, J destinations, S sources.
"""

import torch
from torch import Tensor

from oacore.circuits.passes import Passes, every_edge
from oacore.circuits.replacements import Replacements
from oacore.circuits.search import SearchRequest
from oacore.config.circuits import Objective
from oacore.fits.resume import NOT_KEPT, Resumable


def eap_scores(passes: Passes, replacements: Replacements, objective: Objective, chosen: Tensor) -> Tensor:
    """Edge attribution patching (Syed et al. 2023): (r - out) . dloss/dx_j at the clean run, summed over positions,
    mean over prompts.

    The engine's gradient of a mask of 1 is (out - r) . dloss/dx_j. KL has none at the clean run: use the logit
    difference.

    Returns:
        [J, S]: the first-order rise of the loss when the edge is ablated.
    """
    if objective == "kl":
        raise ValueError("KL has no gradient at the clean run")
    slots = torch.arange(len(chosen), device=chosen.device)
    computed = passes.gradients(
        objective, chosen, slots, every_edge(passes), replacements.of(chosen), owned=replacements.per_prompt
    )
    return -computed.masks[0] / len(chosen)


def eap_ig_scores(
    passes: Passes,
    replacements: Replacements,
    objective: Objective,
    chosen: Tensor,
    steps: int,
    resumable: Resumable = NOT_KEPT,
) -> Tensor:
    """EAP-IG, inputs (Hanna et al. 2024): the gradient averaged over `steps` runs whose input lies between its
    replacement and itself.

    Only the edges out of `input` are masked, all alike; the clean run's out - r stays the other factor.
    """
    engine, slots = passes.engine, torch.arange(len(chosen), device=chosen.device)
    replacement = replacements.of(chosen)
    batch = passes.examples.batch
    contrast = engine.sources(type(batch)(batch.tokens[chosen], batch.lengths[chosen])) - engine.weights.centre(
        replacement
    )  # [n, S, t, d]
    state = resumable.load(chosen.device) or {"step": torch.tensor(0), "total": torch.zeros_like(every_edge(passes)[0])}
    total = state["total"]
    for step in range(int(state["step"]) + 1, steps + 1):
        masks = every_edge(passes)
        masks[:, :, 0] *= step / steps
        computed = passes.gradients(
            objective, chosen, slots, masks, replacement, owned=replacements.per_prompt, contrast=contrast
        )
        total -= computed.masks[0] / (steps * len(chosen))
        resumable.save_sometimes({"step": torch.tensor(step), "total": total})
    return total * ~engine.no_edge


def rank(request: SearchRequest, seed: int) -> Tensor:
    """EAP scores [J, S] of all edges."""
    passes, chosen = request.task.passes["train"], request.prompts(seed)
    return eap_scores(passes, request.replacements, request.objective, chosen)


def rank_integrated(request: SearchRequest, seed: int) -> Tensor:
    """EAP-IG scores [J, S] of all edges."""
    passes, chosen = request.task.passes["train"], request.prompts(seed)
    steps, kept = request.settings.ig_steps, request.resumable.part(str(seed), seed)
    return eap_ig_scores(passes, request.replacements, request.objective, chosen, steps, kept)
