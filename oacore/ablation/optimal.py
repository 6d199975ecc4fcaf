"""Optimal constants: the vector per component that minimises the expected ablation loss (Li & Janson 2024, section
2.3).

All components are fitted at once. They share each step's prompts and their clean pass; each has its own Adam state,
learning rate and convergence test, so that a component leaves the batch as soon as it has converged. The whole state is
one dictionary of tensors, and each step's prompts follow from the seed and the step alone: a checkpoint resumes bit by
bit.

Constants of components of different width are rows of one tensor [C, Q, W], padded with zeros to the widest; Q = 1, or
P + 1 for positional constants (one row per position that all prompts share, and one for all later ones).
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from oacore.ablation.ablate import ablated_logits
from oacore.ablation.components import Component, Group, group_components, rows_in, width
from oacore.config.base import OptimalFit
from oacore.draws import prompts_of_step
from oacore.engine.clean import Batch, Clean, clean_log_probs, clean_pass
from oacore.engine.statistics import Statistics, spread
from oacore.fits.descent import Descent, Running, descend
from oacore.fits.record import read_fitted, recorded, write_fits
from oacore.fits.resume import NOT_KEPT, Resumable
from oacore.metrics import kl_divergence
from oacore.models.weights import Model
from oacore.store.provenance import Provenance


def starting_means(
    model: Model, components: Sequence[Component], statistics: Statistics, *, positional: bool
) -> Tensor:
    """The means [C, Q, W] that fits start from: pooled over positions, or per position."""
    table = statistics.mean_positional if positional else statistics.mean
    shape = (
        len(components),
        statistics.shortest + 1 if positional else 1,
        max(width(model, item.kind) for item in components),
    )
    start, row = torch.zeros(shape, device=model.device), 0
    for group in group_components(components):
        means = rows_in(table, group).float()  # [n, (P + 1,) w]
        start[row : row + len(group), :, : means.shape[-1]] = means if positional else means[:, None]
        row += len(group)
    return start


def better_start(
    model: Model,
    prompts: Batch,
    components: Sequence[Component],
    positional: Tensor,
    constant: Tensor,
    tokens_per_batch: int,
) -> Tensor:
    """Per component, the better of a positional table [C, P + 1, W] and one constant [C, 1, W] at all positions: [C, P
    + 1, W].
    """
    same = constant.expand_as(positional).contiguous()
    gaps = [mean_losses(model, prompts, components, start, tokens_per_batch) for start in (positional, same)]
    return torch.where((gaps[0] < gaps[1])[:, None, None], positional, same)


def scales(components: Sequence[Component], statistics: Statistics) -> Tensor:
    """Root mean square standard deviation [C] of each component's value: the unit of the learning rate."""
    rows = [rows_in(statistics.std, group).float().square().mean(-1).sqrt() for group in group_components(components)]
    return torch.cat(rows)


def losses_of(
    model: Model, part: Batch, components: Sequence[Component], constants: Tensor, tokens_per_batch: int
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Ablation losses of a batch, some components at a time: (their rows, their constants as a leaf [n, Q, w], losses
    [n, B] in nats).

    One clean pass serves them all. Each yield holds one graph; take its gradient before the next.
    """
    clean = clean_pass(model, part.tokens, part.lengths)
    target = clean_log_probs(model, clean)
    side_by_side, row = max(1, tokens_per_batch // part.tokens.numel()), 0
    for group in group_components(components):
        for chunk in group.chunks(side_by_side):
            rows = slice(row, row + len(chunk))
            leaf = constants[rows, :, : width(model, chunk.kind)].detach().requires_grad_(torch.is_grad_enabled())
            yield rows, leaf, _losses(model, clean, target, chunk, leaf)
            row += len(chunk)


def _losses(model: Model, clean: Clean, target: Tensor, group: Group, constants: Tensor) -> Tensor:
    replacement = constants[:, None] if constants.shape[1] == 1 else spread(constants, clean.entering[0].shape[1])
    return kl_divergence(target, ablated_logits(model, clean, group, replacement))


@torch.no_grad()
def mean_losses(
    model: Model, prompts: Batch, components: Sequence[Component], constants: Tensor, tokens_per_batch: int
) -> Tensor:
    """Mean ablation loss [C] (nats) of each component with its constant [C, Q, W], over all prompts."""
    total = torch.zeros(len(components), dtype=torch.float64, device=model.device)
    for part in prompts.split(tokens_per_batch):
        for rows, _, losses in losses_of(model, part, components, constants, tokens_per_batch):
            total[rows] += losses.double().sum(1)
    return (total / len(prompts)).float()


def gradients(
    model: Model, prompts: Batch, components: Sequence[Component], constants: Tensor, tokens_per_batch: int
) -> Tensor:
    """Gradient [C, Q, W] of each component's mean loss over the prompts in its own constant."""
    gradient = torch.zeros_like(constants)
    for part in prompts.split(tokens_per_batch):
        with torch.enable_grad():
            for rows, leaf, losses in losses_of(model, part, components, constants, tokens_per_batch):
                (found,) = torch.autograd.grad(losses.sum() / len(prompts), leaf)
                gradient[rows, :, : found.shape[-1]] += found
    return gradient


@torch.no_grad()
def fit_constants(
    model: Model,
    components: Sequence[Component],
    statistics: Statistics,
    train: Batch,
    validation: Batch,
    settings: OptimalFit,
    *,
    start: Tensor,
    seed: int = 0,
    tokens_per_batch: int = 16384,
    resumable: Resumable = NOT_KEPT,
    what: str = "constants",
    on_test: Callable[[], object] = lambda: None,
) -> Descent:
    """Fit every component's constant.

    Each component runs rounds of Adam, each twice as long as the last, until a round lowers its gap on the validation
    prompts by less than `tolerance`; the constant of the lowest gap is kept.

    Args:
        start: [C, Q, W], e.g. `starting_means`.
        seed: of the order in which training prompts are drawn.
        resumable: where the state is kept, at every test.
        what: named in the progress lines.
        on_test: called after every round.
    """
    components = tuple(components)

    def gradient(running: Running, value: Tensor, step: int) -> Tensor:
        chosen = prompts_of_step(len(train), settings.batch_size, seed, step)
        return gradients(model, train.take(chosen), [components[row] for row in running.rows], value, tokens_per_batch)

    def validate(running: Running, value: Tensor) -> Tensor:
        return mean_losses(model, validation, [components[row] for row in running.rows], value, tokens_per_batch)

    return descend(
        start,
        scales(components, statistics)[:, None, None],
        gradient,
        validate,
        settings,
        names=[item.name for item in components],
        key="ablation.optimal.learning_rate",
        resumable=resumable,
        what=what,
        on_test=on_test,
    )


def save_constants(
    path: str | Path,
    model: Model,
    components: Sequence[Component],
    descent: Descent,
    provenance: Provenance,
) -> None:
    """Write each component's constant [1, w] or [P + 1, w] under its name, with the record of its fit."""
    names = [item.name for item in components]
    widths = [width(model, item.kind) for item in components]
    values = {name: descent.best[row, :, :w] for row, (name, w) in enumerate(zip(names, widths, strict=True))}
    write_fits(path, recorded(values, descent), names, provenance)


def load_constants(path: str | Path, components: Sequence[Component], provenance: Provenance) -> Tensor:
    """The constants [C, Q, W] of the components, padded with zeros to the widest.

    Raises:
        UserError: the file is damaged, of another model, task or prompts, or lacks a component.
    """
    rows = list(read_fitted(path, [item.name for item in components], provenance).values())
    widest = max(row.shape[1] for row in rows)
    return torch.stack([torch.nn.functional.pad(row, (0, widest - row.shape[1])) for row in rows])
