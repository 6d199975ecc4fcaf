"""Corrupted runs with places restored, side by side."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from oacore.config.tracing import Site
from oacore.draws import uploaded
from oacore.engine.clean import Clean
from oacore.engine.forward import at, attention_write, combine_heads, heads, mlp, run_block
from oacore.models.weights import Model
from oacore.tracing.places import NOWHERE, Place
from oacore.tracing.recall import Recall, answer_probability


def restored(model: Model, recall: Recall, clean: Clean, places: Sequence[Place], entering: Sequence[Tensor]) -> Tensor:
    """Probability of the answers [n, B] with each place restored.

    Args:
        entering: the corrupted run. Either one residual [n, B, T, d] that enters block 0, of corruptions of the places'
            own; or one [B, T, d] for each block and one after the last, of a corruption that they share.
    """
    shared = len(entering) > 1
    start = [0 if not shared else model.n_layers if item == NOWHERE else item.first for item in places]
    order = sorted(range(len(places)), key=start.__getitem__)
    where = torch.stack([recall.at_positions(places[i].position) for i in order])  # [n, B, T]
    batch, single = len(recall), recall.answer.shape[1] == 1
    residual = torch.empty(
        0, *clean.entering[0].shape, dtype=model.dtype, device=model.device
    )  # [m, B, T, d] of those under way
    for layer in range(model.n_layers + 1):
        joining = [i for i in order if start[i] == layer]
        if joining:
            if shared:
                arriving = entering[layer].expand(len(joining), -1, -1, -1)
            else:
                arriving = entering[0].index_select(0, uploaded(torch.tensor(joining), model.device))
            if layer == model.n_layers and single:
                arriving = at(arriving.flatten(0, 1), recall.last.repeat(len(joining))).unflatten(0, (-1, batch))
            residual = torch.cat((residual, arriving)) if len(residual) else arriving
        if layer < model.n_layers and len(residual):
            active = [places[i] for i in order[: len(residual)]]
            residual = _restored_block(model, recall, clean, layer, active, where[: len(residual)], residual, single)
    as_asked = uploaded(torch.tensor(order).argsort(), model.device)
    return answer_probability(model, recall, residual).index_select(0, as_asked)


def _restored_block(
    model: Model,
    recall: Recall,
    clean: Clean,
    layer: int,
    places: Sequence[Place],
    where: Tensor,
    residual: Tensor,
    single: bool,
) -> Tensor:
    """One block for m places: residual [m, B, T, d], where [m, B, T]; where one position is read, the last block
    computes that alone.
    """
    m, batch = residual.shape[:2]
    rows = residual.flatten(0, 1)  # [m B, T, d]
    query = recall.last.repeat(m) if single and layer == model.n_layers - 1 else None

    def restore(site: Site, written: Tensor) -> Tensor:
        """written [m B, T or 1, d] with the clean run's in its place where the site is restored."""
        here = [item.site == site and item.first <= layer <= item.last for item in places]
        if not any(here):
            return written
        value = _clean_value(model, clean, site, layer)  # [B, T, d]
        mask = where & uploaded(torch.tensor(here), where.device)[:, None, None]  # [m, B, T]
        if query is not None:
            value, mask = at(value, recall.last), at(mask.flatten(0, 1), query).unflatten(0, (m, batch))
        return torch.where(mask[..., None], value, written.unflatten(0, (m, batch))).flatten(0, 1)

    combined = combine_heads(model, layer, heads(model, layer, rows, query))
    rows = rows if query is None else at(rows, query)
    middle = rows + restore("attention", attention_write(model, layer, combined))
    out = restore("mlp", mlp(model, layer, rows if model.parallel else middle))
    return restore("block", middle + out).unflatten(0, (m, batch))


def _clean_value(model: Model, clean: Clean, site: Site, layer: int) -> Tensor:
    """What a site wrote in the clean run: [B, T, d]; a block's is the residual after it."""
    match site:
        case "attention":
            return attention_write(model, layer, clean.combined[layer])
        case "mlp":
            return clean.mlp[layer]
        case "block":
            return clean.entering[layer + 1]


@torch.no_grad()
def corrupted_run(model: Model, entering: Tensor) -> list[Tensor]:
    """The residuals [B, T, d] entering every block, and after the last, of a run that starts from the first of them."""
    run = [entering]
    for layer in range(model.n_layers):
        run.append(run_block(model, layer, run[-1]))
    return run


@torch.no_grad()
def restored_together(
    model: Model, recall: Recall, clean: Clean, places: Sequence[Place], entering: Tensor, tokens_per_batch: int
) -> Tensor:
    """Probability of the answers [n, B] with each place restored in the one run that starts from `entering` [B, T, d],
    some at a time.
    """
    run = corrupted_run(model, entering)
    by_start = sorted(range(len(places)), key=lambda i: places[i].first)  # those of one part start together
    probability = torch.empty(len(places), len(recall), device=model.device)
    for part in _parts(len(places), recall, tokens_per_batch):
        rows = by_start[part]
        probability[rows] = restored(model, recall, clean, [places[i] for i in rows], run)
    return probability


def restored_apart(
    model: Model,
    recall: Recall,
    clean: Clean,
    places: Sequence[Place],
    entering: Callable[[slice], Tensor],
    tokens_per_batch: int,
) -> Iterator[tuple[slice, Tensor]]:
    """Places restored each in a corrupted run of its own, some at a time: (their rows, probability of the answers [n,
    B]).

    Each yield holds one graph; take its gradient before the next.

    Args:
        entering: (rows of some places) -> the residuals [n, B, T, d] that enter block 0 in their runs.
    """
    for rows in _parts(len(places), recall, tokens_per_batch):
        yield rows, restored(model, recall, clean, places[rows], [entering(rows)])


def _parts(n: int, recall: Recall, tokens_per_batch: int) -> Iterator[slice]:
    """Slices of n places whose rows have at most `tokens_per_batch` tokens."""
    size = max(1, tokens_per_batch // recall.tokens.numel())
    return (slice(start, start + size) for start in range(0, n, size))
