"""The importance of every unit on every image, by each of the measures in `oacore.config.vision.MEASURES`.

Symbols: N images, n units, R rows, D numbers of all places together.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from oacore.config.vision import REPLACEMENTS, Measure, Vision
from oacore.vision.attributions import gate_gradients, layer_conductance
from oacore.vision.budgets import Effort, image_passes, shapley_draws
from oacore.vision.data import Pictures
from oacore.vision.passes import Passes, Values
from oacore.vision.replacements import Activations, by_place, resample, spreads
from oacore.vision.shapley import exact, goes_through_all, sampled
from oacore.vision.units import Units

# (images [R], draws [R], units [R] or none) -> what replaced units carry
Carried = Callable[[Tensor, Tensor, Tensor | None], Values]


@dataclass(frozen=True)
class Bench:
    """A network before the splits, and what replaced units may carry there.

    Args:
        means: by replacement that is or starts from a mean or zero, the values.
        test_activations: empty where no replacement is of another image.
    """

    train: Passes
    validation: Passes
    test: Passes
    means: Mapping[str, Values]
    spread: Mapping[str, Tensor]  # by replacement, the unit of the learning rate [1, D]
    test_activations: Activations
    settings: Vision

    @property
    def n(self) -> int:
        """Units."""
        return len(self.test.units)


class Measurement(NamedTuple):
    """What a measure says."""

    values: Tensor  # [N, n] nats, of each image and unit, float64
    images: Tensor  # [N] rows of the test images
    n_passes: int  # but for the means and fits


def bench(
    network: nn.Sequential, units: Units, splits: Mapping[str, Pictures], settings: Vision, rows_at_once: int
) -> Bench:
    """Run the clean network on all splits."""
    train, validation, test = (
        Passes(network, units, splits[name].pixels, rows_at_once) for name in ("train", "validation", "test")
    )
    activations = train.activations()
    rows = [row for row in REPLACEMENTS.values() if row.name in settings.replacements and not row.of_partner]
    means = {row.name: row.load()(activations) for row in rows}
    spread = {row.name: spreads(activations, means[row.name]) for row in rows if row.fitted}
    of_others = any(REPLACEMENTS[name].of_partner for name in settings.replacements)
    return Bench(train, validation, test, means, spread, test.activations() if of_others else {}, settings)


def ablation(of: Bench, row: Measure, effort: Effort, constants: Tensor | None, images: Tensor, seed: int) -> Tensor:
    """KL [N, n] with each unit alone replaced."""
    carried, n = carried_by(of, row, constants, seed), of.n
    rows, units = images.repeat_interleave(n), torch.arange(n).repeat(len(images))
    gates, total = 1 - torch.eye(n), torch.zeros(len(rows), dtype=torch.float64)
    for draw in range(effort.n_draws):
        draws = torch.full_like(rows, draw)

        def values_of(part: slice, draws: Tensor = draws) -> Values:
            return carried(rows[part], draws[part], units[part])

        total += of.test.losses_of(rows, gates[units], values_of).double()
    return (total / effort.n_draws).reshape(-1, n)


def shapley(of: Bench, row: Measure, effort: Effort, constants: Tensor | None, images: Tensor, seed: int) -> Tensor:
    """Shapley values [N, n] of the KL with sets of units replaced."""
    carried = carried_by(of, row, constants, seed)

    def loss(rows: Tensor, gates: Tensor, draws: Tensor) -> Tensor:
        return of.test.losses_of(rows, gates, lambda part: carried(rows[part], draws[part], None))

    if goes_through_all(of.n, effort.n_pairs):
        return exact(loss, images, of.n, shapley_draws(row, of.n, effort.n_pairs))
    return sampled(loss, images, of.n, effort.n_pairs, seed)


def integrated_gradients(
    of: Bench, row: Measure, effort: Effort, constants: Tensor | None, images: Tensor, seed: int
) -> Tensor:
    """Integrated gradients [N, n] of the KL, from all units replaced to none."""
    return gate_gradients(of.test, images, of.means[row.replacement], of.settings.ig_steps)


def conductance(of: Bench, row: Measure, effort: Effort, constants: Tensor | None, images: Tensor, seed: int) -> Tensor:
    """Layer conductance [N, n] of the KL, from an empty picture."""
    return layer_conductance(of.test, images, of.settings.ig_steps)


@torch.no_grad()
def measure(of: Bench, row: Measure, effort: Effort, constants: Tensor | None, seed: int) -> Measurement:
    """One measure on some test images, drawn by the seed where they are not all.

    Args:
        constants: fitted ones [n, D], or [1, D] for Shapley values.
    """
    order = torch.randperm(len(of.test), generator=torch.Generator().manual_seed(seed))
    images = order[: effort.n_images].sort().values
    values = row.load()(of, row, effort, constants, images, seed)
    each = image_passes(row, of.n, len(of.test.units.owners), effort, of.settings)
    return Measurement(values, images, len(images) * each)


def carried_by(of: Bench, row: Measure, constants: Tensor | None, seed: int) -> Carried:
    """What replaced units carry under a measure's replacement."""
    name = row.replacement
    if REPLACEMENTS[name].of_partner:
        partners = resample(of.test_activations, seed)
        return lambda rows, draws, units: partners(rows, draws)
    values = of.means[name]
    if constants is None:
        return lambda rows, draws, units: values
    if len(constants) == 1:
        together = by_place(constants, values)
        return lambda rows, draws, units: together
    return lambda rows, draws, units: by_place(constants[units], values)
