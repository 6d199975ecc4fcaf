"""Optimal constants of units, by the descent that fits those of a transformer's components.

*Alone*, each unit has constants of its own, for when it is the only one that is replaced. *Together*, all units share
one set of constants for when any of them are, which Shapley values need: the constants that make the loss smallest on
average over the sets that a Shapley value averages over, a random number of units in random order. Constants that were
fitted alone would be wrong there, and constants for each of 2^n sets can't be had.

Symbols: n units, D numbers of all places together, m running fits, B images of a step.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from oacore.config.vision import ConstantsFit
from oacore.draws import prompts_of_step
from oacore.fits.descent import Descent, Running, descend
from oacore.fits.resume import NOT_KEPT, Resumable
from oacore.metrics import GRADIENT
from oacore.vision.passes import Passes, Values
from oacore.vision.replacements import by_place, flat

KEY = "vision.fit.learning_rate"
VALIDATION_SETS = 4  # random sets of units for each validation image
CHECKED = 77  # seed of these


def fit_alone(
    train: Passes,
    validation: Passes,
    start: Values,
    unit: Tensor,
    settings: ConstantsFit,
    *,
    seed: int,
    resumable: Resumable = NOT_KEPT,
    what: str = "constants",
) -> Descent:
    """Constants [n, D] of each unit alone; in its row, the numbers of other units stay where they started.

    Args:
        start: values that have the shape, [1, C, h or 1, w or 1] by place.
        unit: of the learning rate, [1, D].

    Raises:
        UserError: a fit diverges.
    """
    units = train.units
    alone = 1 - torch.eye(len(units))  # [n, n]

    def losses(passes: Passes, images: Tensor, running: Running, table: Tensor) -> Tensor:
        """[m, B]"""
        fit = torch.arange(len(running.rows)).repeat_interleave(len(images))
        rows, gates = images.repeat(len(running.rows)), alone[running.rows][fit]
        found = passes.losses_of(rows, gates, lambda part: by_place(table[fit[part]], start))
        return found.reshape(len(running.rows), len(images))

    def gradient(running: Running, value: Tensor, step: int) -> Tensor:
        images = prompts_of_step(len(train), settings.batch_size, seed, step)
        return _gradient(value, lambda leaf: losses(train, images, running, leaf).mean(1).sum())

    def validate(running: Running, value: Tensor) -> Tensor:
        return losses(validation, torch.arange(len(validation)), running, value).mean(1)

    return descend(
        flat(start).repeat(len(units), 1), unit, gradient, validate, settings, names=units.names, key=KEY,
        resumable=resumable, what=what,
    )  # fmt: skip


def fit_together(
    train: Passes,
    validation: Passes,
    start: Values,
    unit: Tensor,
    settings: ConstantsFit,
    *,
    seed: int,
    resumable: Resumable = NOT_KEPT,
    what: str = "constants",
) -> Descent:
    """One set of constants [1, D] for random sets of units; a step takes as many passes as one of `fit_alone`.

    Args and errors as there.
    """
    n = len(train.units)
    checked = torch.arange(len(validation)).repeat(VALIDATION_SETS)
    checked_gates = random_sets(n, len(checked), CHECKED)

    def losses(passes: Passes, rows: Tensor, gates: Tensor, table: Tensor) -> Tensor:
        own = torch.zeros_like(rows)  # every row has the one set of constants
        return passes.losses_of(rows, gates, lambda part: by_place(table[own[part]], start))

    def gradient(running: Running, value: Tensor, step: int) -> Tensor:
        rows = prompts_of_step(len(train), settings.batch_size, seed, step).repeat(n)
        gates = random_sets(n, len(rows), seed * 1_000_003 + step)
        return _gradient(value, lambda leaf: losses(train, rows, gates, leaf).mean())

    def validate(running: Running, value: Tensor) -> Tensor:
        return losses(validation, checked, checked_gates, value).mean()[None]

    names: Sequence[str] = ["all units"]
    return descend(
        flat(start), unit, gradient, validate, settings, names=names, key=KEY, resumable=resumable, what=what
    )


def random_sets(n: int, count: int, seed: int) -> Tensor:
    """Gates [count, n] as a Shapley value draws them: 1 to n units of a random order are replaced."""
    generator = torch.Generator().manual_seed(seed)
    place = torch.rand(count, n, generator=generator).argsort(1).argsort(1)  # of each unit in the order
    return (place >= torch.randint(1, n + 1, (count, 1), generator=generator)).float()


def passes_alone(steps: Sequence[int], settings: ConstantsFit, n_validation: int) -> int:
    """Forward passes of fits of units that took these steps: a gradient counts as three, clean passes are shared."""
    batch = settings.batch_size
    return (
        GRADIENT * batch * sum(steps)
        + batch * max(steps)
        + n_validation * sum(_stops(taken, settings) for taken in steps)
    )


def passes_together(n: int, steps: int, settings: ConstantsFit, n_validation: int) -> int:
    """The same of one fit for sets of n units."""
    return (GRADIENT * n + 1) * settings.batch_size * steps + VALIDATION_SETS * n_validation * _stops(steps, settings)


def _stops(steps: int, settings: ConstantsFit) -> int:
    """How often a fit of so many steps was validated."""
    return 1 + sum(end <= steps for end in settings.round_ends)


def _gradient(value: Tensor, loss_of: Callable[[Tensor], Tensor]) -> Tensor:
    """Of a loss in the constants [m, D]."""
    with torch.enable_grad():
        leaf = value.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(loss_of(leaf), leaf)
    return gradient
