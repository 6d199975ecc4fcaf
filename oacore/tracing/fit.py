"""The fit of optimal ablation's constants for causal tracing (OAT; Li & Janson 2024, section 5).

A constant in place of the subject's token embeddings is best where the answer loses the least probability: for the
corrupted run, and for the run with each place restored, one of its own.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from oacore.config.tracing import TracingFit
from oacore.draws import prompts_of_step
from oacore.engine.clean import clean_pass
from oacore.fits.descent import ABSOLUTE_PROGRESS, Descent, Running, descend
from oacore.fits.record import read_fitted, recorded, write_fits
from oacore.fits.resume import NOT_KEPT, Resumable
from oacore.metrics import clustered_mean_and_se
from oacore.models.weights import Model
from oacore.store.provenance import Provenance
from oacore.tracing.places import NOWHERE, Place
from oacore.tracing.recall import Recall, answer_probability, embedded
from oacore.tracing.restore import restored_apart
from oacore.tracing.subjects import SubjectStatistics

CAUTIOUS = "cautious/"  # before a place's name


@dataclass(frozen=True)
class PlaceConstants:
    """The constants of n places, of which the last is the corrupted run where there is a choice."""

    own: Tensor  # [n, d] of each place's own fit
    cautious: (
        Tensor  # [n, d] its own where that is better beyond chance, else the one that is best for the corrupted run
    )

    def to(self, device: torch.device) -> "PlaceConstants":
        """On a device."""
        return PlaceConstants(self.own.to(device), self.cautious.to(device))

    def take(self, rows: Sequence[int]) -> "PlaceConstants":
        """Those of some of the places; of none where there are none."""
        return PlaceConstants(self.own[list(rows)], self.cautious[list(rows)]) if len(self.own) else self


NO_CONSTANTS = PlaceConstants(torch.empty(0), torch.empty(0))


def _lost(
    model: Model, recall: Recall, places: Sequence[Place], constants: Tensor, tokens_per_batch: int
) -> Iterator[tuple[slice, Tensor]]:
    """Some places at a time: (their rows, probability lost [n, B]); differentiable in the constants."""
    clean = clean_pass(model, recall.tokens, recall.lengths)
    p_clean = answer_probability(model, recall, clean.entering[-1])

    def entering(rows: slice) -> Tensor:
        return embedded(model, recall, constants[rows, None, None])

    for rows, p_restored in restored_apart(model, recall, clean, places, entering, tokens_per_batch):
        yield rows, (p_clean - p_restored).clamp(min=0)


@torch.no_grad()
def lost_probability(
    model: Model, recall: Recall, places: Sequence[Place], constants: Tensor, tokens_per_batch: int
) -> Tensor:
    """Probability lost, max(0, p_clean - p_restored) [n, B], with each place's constant [n, d]."""
    batches = []
    for part in recall.in_batches(tokens_per_batch):
        batches.append(torch.cat([lost for _, lost in _lost(model, part, places, constants, tokens_per_batch)]))
    return torch.cat(batches, 1)


def lost_probability_gradient(
    model: Model, recall: Recall, places: Sequence[Place], constants: Tensor, tokens_per_batch: int
) -> Tensor:
    """Gradient [n, d] of each place's mean probability lost in its own constant."""
    gradient, leaf = torch.zeros_like(constants), constants.detach().requires_grad_()
    for part in recall.in_batches(tokens_per_batch):
        with torch.enable_grad():
            for rows, lost in _lost(model, part, places, leaf, tokens_per_batch):
                gradient[rows] += torch.autograd.grad(lost.sum() / len(recall), leaf)[0][rows]
    return gradient


def fit_place_constants(
    model: Model,
    places: Sequence[Place],
    train: Recall,
    validation: Recall,
    statistics: SubjectStatistics,
    settings: TracingFit,
    *,
    seed: int = 0,
    tokens_per_batch: int = 16384,
    resumable: Resumable = NOT_KEPT,
    on_test: Callable[[], object] = lambda: None,
) -> Descent:
    """One constant per place [n, d], each from the mean subject embedding until its loss on the validation facts stops
    falling.

    The loss, max(0, p_clean - p_restored), is in probability; arguments as those of `oacore.fits.descent.descend`. Fits
    of places whose restoring does nothing differ by chance, which can pass for effects: see `place_constants`.
    """
    start = statistics.mean.repeat(len(places), 1)
    unit = statistics.std.square().mean().sqrt().reshape(1, 1)

    def gradient(running: Running, value: Tensor, step: int) -> Tensor:
        facts = prompts_of_step(len(train), settings.batch_size, seed, step)
        chosen = [places[i] for i in running.rows]
        return lost_probability_gradient(model, train.take(facts), chosen, value, tokens_per_batch)

    def validate(running: Running, value: Tensor) -> Tensor:
        chosen = [places[i] for i in running.rows]
        return lost_probability(model, validation, chosen, value, tokens_per_batch).mean(1)

    return descend(
        start,
        unit,
        gradient,
        validate,
        settings,
        names=[item.name for item in places],
        key="tracing.fit.learning_rate",
        resumable=resumable,
        what="OAT",
        on_test=on_test,
    )


@torch.no_grad()
def place_constants(
    model: Model, places: Sequence[Place], validation: Recall, own: Tensor, tokens_per_batch: int
) -> PlaceConstants:
    """The constants that were fitted for n places [n, d], and cautious ones: the corrupted run takes whichever constant
    is best for it, and every place that one, unless its own is better beyond chance.

    Beyond chance: by two standard errors of the difference on the validation facts. On a planted recall, with fits
    apart, the AIE of all other layers added up to 18 % of the peak's; so it is below 0.1 %
    (tests/bench/bench_recall.py).
    """
    corrupted = [NOWHERE] * len(places)
    best = lost_probability(model, validation, corrupted, own, tokens_per_batch).mean(1).argmin()
    shared = own[best].expand_as(own)
    lost_separately, lost_shared = (
        lost_probability(model, validation, places, constants, tokens_per_batch) for constants in (own, shared)
    )
    clusters = validation.cluster.cpu().numpy()
    better = []
    for item, lost, lost_with_shared in zip(places, lost_separately, lost_shared, strict=True):
        gain, se = clustered_mean_and_se(lost_with_shared - lost, clusters)
        better.append(item != NOWHERE and gain > max(2 * se, ABSOLUTE_PROGRESS))
    keep = torch.tensor(better, device=own.device)
    return PlaceConstants(own, torch.where(keep[:, None], own, shared))


def save_place_constants(
    path: str | Path, places: Sequence[Place], constants: PlaceConstants, descent: Descent, provenance: Provenance
) -> None:
    """Write each place's constants [d] under its name, and as `cautious/{name}`, with the record of its fit."""
    names = [item.name for item in places]
    values = dict(zip(names, constants.own, strict=True))
    values |= {f"{CAUTIOUS}{name}": value for name, value in zip(names, constants.cautious, strict=True)}
    write_fits(path, recorded(values, descent), names, provenance)


def load_place_constants(path: str | Path, places: Sequence[Place], provenance: Provenance) -> PlaceConstants:
    """The constants of the places.

    Raises:
        UserError: the file is damaged, of another model or other facts, or lacks a place.
    """
    names = [item.name for item in places]
    fitted = read_fitted(path, [*names, *(f"{CAUTIOUS}{name}" for name in names)], provenance)
    own, cautious = (torch.stack([fitted[f"{kind}{name}"] for name in names]) for kind in ("", CAUTIOUS))
    return PlaceConstants(own, cautious)
