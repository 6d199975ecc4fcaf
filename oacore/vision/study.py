"""All measurements of one kind of units: which there are, and each of them from the store or computed.

A measure runs once with the settings' whole effort; at every budget with each seed; and once more on networks whose
weights mean nothing, where a method that looks at the network must come to another order (Adebayo et al. 2018).
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from oacore.config.vision import MEASURES, Vision
from oacore.errors import UserError
from oacore.fits.convergence import UNFITTED, Convergence, of_descent
from oacore.fits.descent import Descent
from oacore.fits.record import descent_of, items_of_fits
from oacore.fits.resume import Resumable
from oacore.store.artefacts import digest_of_tensors
from oacore.store.items import Item, Items
from oacore.vision.budgets import Effort, effort_within, fit_passes, full_effort, training_passes
from oacore.vision.fit import fit_alone, fit_together
from oacore.vision.measures import Bench, Measurement, measure
from oacore.vision.units import Units

RANDOMISED = ("head", "all")  # parts whose weights are shuffled
RANDOMISED_IMAGES = 100
SEEDS_APART = 97  # so that no seed at a budget is that of a whole run


class Request(NamedTuple):
    """One run of a measure."""

    measure: str
    effort: Effort
    seed: int
    randomised: str = ""
    budget: int | None = None  # None for the whole effort

    @property
    def determined(self) -> dict[str, Any]:
        """What it is beside its constants, JSON-able."""
        effort = self.effort._asdict()
        return {"measure": self.measure, "randomised": self.randomised, "seed": self.seed, **effort}


class Found(NamedTuple):
    """What came of a request."""

    measurement: Measurement
    n_passes: int  # everything counted
    fits: tuple[Convergence, ...]  # of each unit, or one of all; none of what is not fitted


def whole(settings: Vision, seed: int) -> list[Request]:
    """Every measure once, with the settings' whole effort."""
    return [Request(name, full_effort(MEASURES[name], settings), seed) for name in settings.measures()]


def at_budgets(settings: Vision, units: Units, seed: int) -> list[Request]:
    """Every measure that a budget is enough for, with every seed."""
    found = []
    for budget in settings.budgets:
        for name in settings.measures():
            effort = effort_within(budget, MEASURES[name], len(units), len(units.owners), settings)
            if effort is not None:
                seeds = [seed + SEEDS_APART * (1 + own) for own in settings.seeds]
                found += [Request(name, effort, of, budget=budget) for of in seeds]
    return found


def randomised(settings: Vision, seed: int) -> list[Request]:
    """Ablation and gradients, which take no sets of units, on networks with shuffled weights."""
    found = []
    for part in RANDOMISED:
        for request in whole(settings, seed):
            if MEASURES[request.measure].family != "shapley":
                few = min(RANDOMISED_IMAGES, settings.images.n_test)
                found.append(request._replace(randomised=part, effort=request.effort._replace(n_images=few)))
    return found


def shuffled(network: nn.Sequential, part: str, seed: int) -> nn.Sequential:
    """A copy whose weights are in random order within each tensor: those of the head, or all."""

    other, generator = copy.deepcopy(network), torch.Generator().manual_seed(seed)
    for tensor in (other[-1] if part == "head" else other).state_dict().values():
        tensor.copy_(tensor.flatten()[torch.randperm(tensor.numel(), generator=generator)].reshape(tensor.shape))
    return other


@dataclass
class Study:
    """The measurements of one kind of units.

    Args:
        bench_of: the network before the splits, by what of it is shuffled; empty for nothing.
        constants, measurements: where they are stored.
    """

    settings: Vision
    units: Units
    bench_of: Callable[[str], Bench]
    constants: Items
    measurements: Items
    resumable: Resumable

    def run(self, requests: Sequence[Request], what: str) -> dict[Request, Found]:
        """What comes of each request.

        Raises:
            UserError: a fit diverges.
        """
        fitted = self._fitted(requests, what)
        own = [
            request.determined | {"constants": digest_of_tensors({"constants": fit.best}) if fit else None}
            for request, fit in ((request, fitted.get(_fit_of(request))) for request in requests)
        ]

        def compute(new: list[int]) -> Iterator[Item]:
            for index in new:
                request = requests[index]
                fit, row = fitted.get(_fit_of(request)), MEASURES[request.measure]
                table = fit.best if fit else None
                found = measure(self.bench_of(request.randomised), row, request.effort, table, request.seed)
                if not found.values.isfinite().all():
                    raise UserError(f"{what}: {request.measure}: not finite; allowed: a network with finite weights")
                yield Item({"values": found.values, "images": found.images}, {"n_passes": found.n_passes})

        items = self.measurements.get(own, compute, f"{what} measurements")
        return {
            request: self._found(request, item, fitted.get(_fit_of(request)))
            for request, item in zip(requests, items, strict=True)
        }

    def _found(self, request: Request, item: Item, fit: Descent | None) -> Found:
        row, cap = MEASURES[request.measure], request.effort.max_steps
        n_passes = item.facts["n_passes"] + training_passes(row, self.settings)
        if fit is not None:
            n_passes += fit_passes(row, len(self.units), fit.n_steps.tolist(), self.settings, cap)
        measured = Measurement(item.tensors["values"], item.tensors["images"], item.facts["n_passes"])
        return Found(measured, n_passes, tuple(of_descent(fit)) if fit else ())

    def _fitted(self, requests: Iterable[Request], what: str) -> dict[tuple[Any, ...], Descent]:
        """The constants that requests need."""
        needed = {key: request for request in requests if (key := _fit_of(request))}
        own = [
            dict(zip(("replacement", "together", "max_steps", "seed", "randomised"), key, strict=True))
            for key in needed
        ]

        def compute(new: list[int]) -> Iterator[Item]:
            for index in new:
                (replacement, together, steps, seed, part), request = list(needed.items())[index]
                of, fit = self.bench_of(part), fit_together if together else fit_alone
                descent = fit(
                    of.train,
                    of.validation,
                    of.means[replacement],
                    of.spread[replacement],
                    self.settings.fit.model_copy(update={"max_steps": steps}),
                    seed=seed,
                    resumable=self.resumable.part(f"fit-{index}", own[index]),
                    what=f"{what} {request.measure}",
                )
                yield items_of_fits(descent, [range(len(descent.best))])[0]

        items = self.constants.get(own, compute, f"{what} constants")
        return {key: descent_of([item]) for key, item in zip(needed, items, strict=True)}

    def together(self, requests: Sequence[Request]) -> dict[str, Tensor]:
        """The constants [1, D] for sets of units, by replacement, of whole runs that have been made."""
        of_sets = [request for request in requests if MEASURES[request.measure].family == "shapley"]
        return {key[0]: fit.best for key, fit in self._fitted(of_sets, "").items()}


def convergence_of(found: Found, unit: int) -> Convergence:
    """How the fit behind a unit's number came out."""
    if not found.fits:
        return UNFITTED
    return found.fits[unit if len(found.fits) > 1 else 0]


def _fit_of(request: Request) -> tuple[Any, ...]:
    """Which constants a request needs: replacement, for sets or alone, steps, seed, shuffled part; empty for none."""
    row = MEASURES[request.measure]
    if not request.effort.max_steps:
        return ()
    return (row.replacement, row.family == "shapley", request.effort.max_steps, request.seed, request.randomised)
