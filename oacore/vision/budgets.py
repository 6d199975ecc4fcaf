"""What a measure does with a number of forward passes: how many images, orders, draws and steps.

A forward pass is one image through the network once; a gradient counts as three passes, one forward and a backward of
twice the arithmetic. Everything is counted from nothing: the training images that give a mean, steps and stops of
fits, clean passes. All methods run faster than that here, as what lies before the first replaced unit is computed once.
"""

from collections.abc import Sequence
from typing import NamedTuple

from oacore.config.vision import REPLACEMENTS, Measure, Vision
from oacore.metrics import GRADIENT
from oacore.vision.fit import passes_alone, passes_together
from oacore.vision.shapley import goes_through_all

MOST_DRAWS = 8  # of other images, for each image and unit
FEWEST_IMAGES, FEWEST_STEPS = 2, 4  # below them there is nothing to compare


class Effort(NamedTuple):
    """What a measure is to do."""

    n_images: int
    n_pairs: int = 0  # of orders, for each image
    n_draws: int = 1  # of other images, for each image
    max_steps: int = 0  # of the fit of constants


def full_effort(row: Measure, settings: Vision) -> Effort:
    """On all test images, as the settings say."""
    replacement = REPLACEMENTS.get(row.replacement)
    fitted, of_partner = (replacement.fitted, replacement.of_partner) if replacement else (False, False)
    return Effort(
        settings.images.n_test,
        settings.n_pairs if row.family == "shapley" else 0,
        MOST_DRAWS if of_partner and row.family == "ablation" else 1,
        settings.fit.max_steps if fitted else 0,
    )


def effort_within(budget: int, row: Measure, n: int, n_places: int, settings: Vision) -> Effort | None:
    """The most that a measure can do with so many passes; None if that is too little.

    Fitted constants take up to half of the budget. Then come images, up to all of them, then pairs of orders or draws.

    Args:
        n: units; n_places: where they lie.
    """
    full, left, steps = full_effort(row, settings), budget - training_passes(row, settings), 0
    if full.max_steps:
        costs = {s: fit_passes(row, n, [s] * n, settings, s) for s in range(FEWEST_STEPS, full.max_steps + 1)}
        affordable = [s for s, passes in costs.items() if passes <= left - budget // 2]
        if not affordable:
            return None
        steps = affordable[-1]
        left -= costs[steps]
    each = image_passes(row, n, n_places, full._replace(n_pairs=1, n_draws=1), settings)
    n_images = min(full.n_images, left // each)
    if n_images < FEWEST_IMAGES:
        return None
    more = max(1, (left // n_images - 1) // (each - 1))
    if row.family == "shapley":
        return Effort(n_images, n_pairs=more, max_steps=steps)
    return Effort(n_images, n_draws=min(more, full.n_draws), max_steps=steps)


def image_passes(row: Measure, n: int, n_places: int, effort: Effort, settings: Vision) -> int:
    """Passes of one image."""
    if row.family == "ablation":
        return 1 + n * effort.n_draws
    if row.family == "shapley":
        if goes_through_all(n, effort.n_pairs):
            return 1 + (2**n - 1) * shapley_draws(row, n, effort.n_pairs)
        return 1 + 2 * n * effort.n_pairs
    if row.replacement:
        return 1 + GRADIENT * settings.ig_steps
    return 1 + GRADIENT * (settings.ig_steps + 1) * n_places


def shapley_draws(row: Measure, n: int, n_pairs: int) -> int:
    """How often all sets are gone through: with as many draws of other images as the pairs would pay for."""
    return 2 * n * n_pairs // (2**n - 1) if REPLACEMENTS[row.replacement].of_partner else 1


def fit_passes(row: Measure, n: int, steps: Sequence[int], settings: Vision, cap: int) -> int:
    """Passes of the fits of n units' constants, or of all together, that took these steps of at most `cap`."""
    fit, n_validation = settings.fit.model_copy(update={"max_steps": cap}), settings.images.n_validation
    if row.family == "shapley":
        return passes_together(n, steps[0], fit, n_validation)
    return passes_alone(steps, fit, n_validation)


def training_passes(row: Measure, settings: Vision) -> int:
    """Clean passes of training images, for what is or starts from a mean."""
    replacement = REPLACEMENTS.get(row.replacement)
    takes_none = replacement is None or replacement.of_partner or replacement.name == "zero"
    return 0 if takes_none else settings.images.n_train
