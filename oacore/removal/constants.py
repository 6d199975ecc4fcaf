"""The constants that take the place of what is ablated: those of the ablation type, or fitted to the removal loss, so
that every method is judged on equal terms.

Symbols: n ablations, D numbers of an ablation's constants, J destinations, S sources, L layers, H heads.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from oacore.circuits.constants import Constants
from oacore.circuits.evaluate import refit_constants
from oacore.draws import prompts_of_step, uploaded
from oacore.errors import UserError
from oacore.fits.convergence import UNFITTED, of_descent
from oacore.fits.descent import Running, descend
from oacore.models.graph import Graph
from oacore.removal.ablated import Ablated, Components, Edges
from oacore.removal.request import Chosen, RemovalRequest


def with_edges(request: RemovalRequest, kept: Tensor) -> list[Chosen]:
    """Ablations of the edges that masks bool [n, J, S] do not keep."""
    task = request.behaviours.learning
    device, n_edges = task.engine.model.device, task.engine.graph.n_edges
    start = task.start(request.ablation)
    if not request.fitted:
        return [Chosen(Edges(mask.to(device), start, n_edges), UNFITTED) for mask in kept]
    constants, descent = refit_constants(
        task.passes["train"],
        task.passes["validation"],
        start,
        task.constant_scales,
        kept.float().to(device),
        request.settings.refit,
        names=request.names,
        seed=task.seed,
        resumable=request.resumable.part("refit", *_masks(kept)),
        what=f"{request.what} constants",
    )
    own = [Constants(*(part[row : row + 1] for part in constants)) for row in range(len(kept))]
    return [
        Chosen(Edges(mask.to(device), values, n_edges), fit)
        for mask, values, fit in zip(kept, own, of_descent(descent), strict=True)
    ]


def with_components(request: RemovalRequest, ablated: Tensor) -> list[Chosen]:
    """Ablations of sets of components, bool [n, S] by source; the input is none.

    Raises:
        UserError: the model normalises what a layer's heads write together, so that none has a constant of its own.
    """
    task = request.behaviours.learning
    graph, statistics, start = task.engine.graph, task.statistics, task.start(request.ablation)
    device = task.engine.model.device
    if task.engine.model.post_norm:
        raise UserError(
            f"removal.methods: components of a {task.engine.model.family} model have no constants of their own, since "
            "its layers are normalised after W_O; allowed: ugs, linear_erasure"
        )
    heads, mlps = _by_kind(graph, ablated.to(device))
    head, mlp = start.head[0, :, :, 0], start.mlp[0, :, 0]
    shapes = head.shape, mlp.shape

    def make(row: int, values: Tensor) -> Components:
        of_heads, of_mlps = values.split([shapes[0].numel(), shapes[1].numel()])
        return Components(heads[row], mlps[row], of_heads.view(shapes[0]), of_mlps.view(shapes[1]))

    spread = [statistics.std[name].float().square().mean(-1, keepdim=True).sqrt() for name in ("head", "mlp")]
    scale = torch.cat([part.expand(shape).flatten() for part, shape in zip(spread, shapes, strict=True)])
    values = torch.cat((head.flatten(), mlp.flatten())).expand(len(ablated), -1)
    return with_values(request, make, values, scale.expand(len(ablated), -1), _masks(ablated))


def with_values(
    request: RemovalRequest,
    make: Callable[[int, Tensor], Ablated],
    start: Tensor,
    scale: Tensor,
    identity: Sequence[str] = (),
) -> list[Chosen]:
    """Ablations that differ in what they replace values by.

    Args:
        make: from the number of an ablation and its constants [D], in which its logits are differentiable.
        start: [n, D], and the unit `scale` [n, D] of the fit's learning rate.
        identity: what tells these ablations from others of the same method.
    """
    if not request.fitted:
        return [Chosen(make(row, values), UNFITTED) for row, values in enumerate(start)]
    behaviours, settings = request.behaviours, request.settings.refit
    engine, passes = behaviours.engine, behaviours.learning.passes

    def loss(ablated: Ablated, split: str, chosen: Tensor) -> Tensor:
        of = passes[split]
        logits = ablated.logits(engine, engine.model, of.examples.batch.take(chosen))
        on_device = uploaded(chosen, engine.model.device)
        return of.losses_of(engine, "kl", logits, of.examples, on_device)  # [n]

    def gradient(running: Running, values: Tensor, step: int) -> Tensor:
        chosen = prompts_of_step(len(passes["train"].examples), settings.batch_size, behaviours.learning.seed, step)
        slopes = []
        for row, own in zip(running.rows, values, strict=True):
            with torch.enable_grad():
                leaf = own.detach().clone().requires_grad_()
                (slope,) = torch.autograd.grad(loss(make(row, leaf), "train", chosen).mean(), leaf)
            slopes.append(slope)
        return torch.stack(slopes)

    def validate(running: Running, values: Tensor) -> Tensor:
        held_out = torch.arange(len(passes["validation"].examples))
        parts = held_out.split(
            max(1, behaviours.tokens_per_batch // passes["validation"].examples.batch.tokens.shape[1])
        )
        totals = []
        for row, own in zip(running.rows, values, strict=True):
            ablated = make(row, own)
            totals.append(torch.cat([loss(ablated, "validation", part) for part in parts]).double().mean())
        return torch.stack(totals).float()

    descent = descend(
        start.contiguous(),
        scale.contiguous(),
        gradient,
        validate,
        settings,
        names=request.names,
        key="removal.refit.learning_rate",
        resumable=request.resumable.part("refit", *identity),
        what=f"{request.what} constants",
    )
    fits = of_descent(descent)
    return [Chosen(make(row, values), fit) for row, (values, fit) in enumerate(zip(descent.best, fits, strict=True))]


def _by_kind(graph: Graph, ablated: Tensor) -> tuple[Tensor, Tensor]:
    """Sets of sources bool [n, S] as heads [n, L, H] and MLPs [n, L]."""
    heads = torch.stack([ablated[:, graph.heads(layer)] for layer in range(graph.n_layers)], 1)
    mlps = torch.stack([ablated[:, graph.mlp_source(layer)] for layer in range(graph.n_layers)], 1)
    return heads, mlps


def _masks(masks: Tensor) -> list[str]:
    """Each mask as text."""
    return ["".join(map(str, mask.flatten().int().tolist())) for mask in masks]
