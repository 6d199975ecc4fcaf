"""Components by what they seem to matter to the forgotten task: by their own ablation, by attribution, or by chance.

Symbols: n ablations, J destinations, S sources.
"""

import torch
from torch import Tensor

from oacore.circuits.eap import eap_ig_scores
from oacore.circuits.evaluate import circuit_losses, refit_constants
from oacore.errors import UserError
from oacore.removal.constants import with_components
from oacore.removal.request import Chosen, RemovalRequest


def by_gap(request: RemovalRequest) -> list[Chosen]:
    """Those whose ablation alone has the largest KL on the forgotten validation prompts; its constants are fitted to
    that KL for one round, where the ablation type fits any.
    """
    task = request.behaviours.forgotten
    graph, start, device = task.engine.graph, task.start(request.ablation), task.engine.model.device
    masks = torch.from_numpy(graph.valid.copy()).float().repeat(graph.n_sources - 1, 1, 1)
    for row in range(len(masks)):
        masks[row, :, row + 1] = 0
    masks, constants = masks.to(device), None
    if request.fitted:
        refit = request.settings.refit
        one_round = refit.model_copy(update={"max_steps": refit.first_round})  # an order needs no more
        constants, _ = refit_constants(
            task.passes["train"],
            task.passes["validation"],
            start,
            task.constant_scales,
            masks,
            one_round,
            names=list(graph.source_names[1:]),
            seed=task.seed,
            resumable=request.resumable.part("gaps"),
            what=f"{request.what} gaps",
        )
    replacements = task.replacements(request.ablation, "validation", start)
    gaps = circuit_losses(task.passes["validation"], masks, replacements, constants).kl.double().mean(1)  # [S - 1]
    return _most(request, gaps.cpu())


def by_attribution(request: RemovalRequest) -> list[Chosen]:
    """Those whose edges' EAP-IG scores for the forgotten log odds add up to most."""
    task, settings = request.behaviours.forgotten, request.settings
    replacements = task.replacements(request.ablation, "train", task.start(request.ablation))
    passes = task.passes["train"]
    order = torch.randperm(len(passes.examples), generator=torch.Generator().manual_seed(task.seed))
    chosen = order[: settings.n_prompts].to(task.engine.model.device)
    resumable = request.resumable.part("scores")
    scores = eap_ig_scores(passes, replacements, "logit_diff", chosen, settings.ig_steps, resumable)  # [J, S]
    return _most(request, scores.sum(0)[1:].cpu())


def at_random(request: RemovalRequest) -> list[Chosen]:
    """Any, in an order of the seed's own."""
    n = request.behaviours.engine.graph.n_sources - 1
    sets = [
        _first(torch.randperm(n, generator=torch.Generator().manual_seed(knob.seed)), _size(request, knob.value))
        for knob in request.knobs
    ]
    return with_components(request, torch.stack(sets))


def _most(request: RemovalRequest, scores: Tensor) -> list[Chosen]:
    """The components of the highest scores [S - 1], as many as each knob says."""
    order = scores.argsort(descending=True, stable=True)
    return with_components(request, torch.stack([_first(order, _size(request, knob.value)) for knob in request.knobs]))


def _first(order: Tensor, n: int) -> Tensor:
    """The first n components of an order [S - 1], as sources bool [S]."""
    ablated = torch.zeros(len(order) + 1, dtype=torch.bool)
    ablated[order[:n] + 1] = True
    return ablated


def _size(request: RemovalRequest, value: float) -> int:
    n = request.behaviours.engine.graph.n_sources - 1
    if value > n:
        raise UserError(f"removal.sizes: {value:g}; allowed: up to the model's {n} heads and MLPs")
    return int(value)
