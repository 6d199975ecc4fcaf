"""What replaces a subject's token embeddings in causal tracing, and the fit of optimal ablation's constants.

Noise and means spoof: they tell the model something wrong about the subject. Optimal ablation (OAT) takes the constant with which the
answer loses the least probability: for the corrupted run, and for the run with each place restored, one of its own.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from oacore.ablation import clean_pass
from oacore.artefacts import read_tensors, write_tensors
from oacore.config import TracingFit
from oacore.descent import ABSOLUTE_PROGRESS, Descent, descend, prompts_of_step
from oacore.errors import UserError
from oacore.forward import add_positions, embed_tokens
from oacore.metrics import clustered_mean_and_se
from oacore.model import Model
from oacore.progress import progress
from oacore.tracing import (
    NOWHERE,
    Place,
    Recall,
    Traced,
    answer_probability,
    embedded,
    in_parts,
    restored,
    restored_all,
)


@dataclass(frozen=True)
class SubjectStatistics:
    """Moments of the token embeddings of subjects, over every subject token of the training facts."""

    mean: Tensor  # [d]
    std: Tensor  # [d] per coordinate
    scalar_std: float  # of all coordinates together, about their common mean: ROME's sigma


def subject_statistics(model: Model, train: Recall) -> SubjectStatistics:
    values = embed_tokens(model, train.tokens[train.in_subject]).double()  # [n, d]
    return SubjectStatistics(values.mean(0).float(), values.std(0).float(), float(values.std()))


def noise(seed: int, facts: Sequence[int], draw: int, recall: Recall, d: int) -> Tensor:
    """Standard normal noise [B, T, d] at the subjects' tokens, from a stream of its own per fact (its number in the split) and draw.

    It depends on neither the batch nor where in the prompt the subject is, and is the same at every noise scale.
    """
    found = torch.zeros(*recall.tokens.shape, d)
    for row, fact in enumerate(facts):
        first, end = recall.subject[row].tolist()
        values = np.random.default_rng((seed, fact, draw)).standard_normal((end - first, d), dtype=np.float32)
        found[row, first:end] = torch.from_numpy(values)
    return found.to(recall.tokens.device)


# (facts by their numbers in the split, these facts, draw) -> residuals [B, T, d] entering block 0
Corrupt = Callable[[Sequence[int], Recall, int], Tensor]


def corruption(
    model: Model, name: str, statistics: SubjectStatistics, constant: Tensor | None, seed: int, n_draws: int
) -> tuple[Corrupt, int]:
    """A corruption that all places share, by its name in the tables, and how many draws it takes.

    Args:
        name: `mean`, `token_replacement`, `oat_shared`, or `gaussian-k` and `gaussian_scalar-k` with k standard deviations.
        constant: [d] of `oat_shared`.
    """
    kind, _, scale = name.partition("-")
    if kind in ("gaussian", "gaussian_scalar"):
        sigma = float(scale) * (statistics.std if kind == "gaussian" else statistics.scalar_std)

        def noisy(facts: Sequence[int], recall: Recall, draw: int) -> Tensor:
            return embedded(model, recall, embed_tokens(model, recall.tokens) + sigma * noise(seed, facts, draw, recall, model.d_model))

        return noisy, n_draws
    if kind == "token_replacement":
        return lambda facts, recall, draw: add_positions(model, embed_tokens(model, recall.other)), 1
    value = statistics.mean if kind == "mean" else constant
    assert value is not None
    return lambda facts, recall, draw: embedded(model, recall, value), 1


@torch.no_grad()
def trace_shared(
    model: Model, recall: Recall, places: Sequence[Place], corrupt: Corrupt, n_draws: int, tokens_per_batch: int, what: str
) -> Traced:
    """All places under a corruption that they share."""
    every, clean_probability = [*places, NOWHERE], []
    found = torch.zeros(len(every), len(recall), device=model.device)
    batch = max(1, tokens_per_batch // (4 * recall.tokens.shape[1]))  # a few places side by side: those of one layer start together
    with progress(what=what, unit="facts", total=len(recall)) as bar:
        for start in range(0, len(recall), batch):
            facts = range(start, min(start + batch, len(recall)))
            part = recall.take(slice(facts.start, facts.stop))
            clean = clean_pass(model, part.tokens, part.lengths)
            clean_probability.append(answer_probability(model, part, clean.entering[-1]))
            for draw in range(n_draws):
                found[:, start : facts.stop] += (
                    restored_all(model, part, clean, every, corrupt(facts, part, draw), tokens_per_batch) / n_draws
                )
            bar.update(len(part))
    return Traced(torch.cat(clean_probability).cpu(), found[-1].cpu(), found[:-1].cpu())


@torch.no_grad()
def trace_own(model: Model, recall: Recall, places: Sequence[Place], constants: Tensor, tokens_per_batch: int, what: str) -> Traced:
    """Each place under the constant fitted to it: constants [n + 1, d], the corrupted run's last."""
    p_clean, p_restored = [], []
    with progress(what=what, unit="facts", total=len(recall)) as bar:
        for part in _batches(recall, tokens_per_batch):
            sides = [(clean, found) for _, _, clean, found in _side_by_side(model, part, [*places, NOWHERE], constants, tokens_per_batch)]
            p_clean.append(sides[0][0])
            p_restored.append(torch.cat([found for _, found in sides]))
            bar.update(len(part))
    every = torch.cat(p_restored, 1).cpu()
    return Traced(torch.cat(p_clean).cpu(), every[-1], every[:-1])


def _batches(recall: Recall, tokens_per_batch: int) -> Iterator[Recall]:
    return recall.split(max(recall.tokens.shape[1], tokens_per_batch // 4))


def _side_by_side(
    model: Model, recall: Recall, places: Sequence[Place], constants: Tensor, tokens_per_batch: int
) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """Some places at a time, each with its constant: (their rows, constants as a leaf [n, d], p_clean [B], p_restored [n, B])."""
    clean = clean_pass(model, recall.tokens, recall.lengths)
    p_clean = answer_probability(model, recall, clean.entering[-1])
    for rows in in_parts(len(places), recall, tokens_per_batch):
        leaf = constants[rows].detach().requires_grad_(torch.is_grad_enabled())
        start = embedded(model, recall, leaf[:, None, None])  # [n, B, T, d]
        yield rows, leaf, p_clean, restored(model, recall, clean, places[rows], [start])


@torch.no_grad()
def losses(model: Model, recall: Recall, places: Sequence[Place], constants: Tensor, tokens_per_batch: int) -> Tensor:
    """Probability lost, max(0, p_clean - p_restored) [n, B], with each place's constant [n, d]."""
    found = []
    for part in _batches(recall, tokens_per_batch):
        sides = _side_by_side(model, part, places, constants, tokens_per_batch)
        found.append(torch.cat([(p_clean - p_restored).clamp(min=0) for _, _, p_clean, p_restored in sides]))
    return torch.cat(found, 1)


def gradients(model: Model, recall: Recall, places: Sequence[Place], constants: Tensor, tokens_per_batch: int) -> Tensor:
    """Gradient [n, d] of each place's loss in its own constant."""
    found = torch.zeros_like(constants)
    for part in _batches(recall, tokens_per_batch):
        with torch.enable_grad():
            for rows, leaf, p_clean, p_restored in _side_by_side(model, part, places, constants, tokens_per_batch):
                loss = (p_clean - p_restored).clamp(min=0).sum() / len(recall)
                found[rows] += torch.autograd.grad(loss, leaf)[0]
    return found


def fit(
    model: Model,
    places: Sequence[Place],
    train: Recall,
    validation: Recall,
    statistics: SubjectStatistics,
    settings: TracingFit,
    *,
    seed: int = 0,
    tokens_per_batch: int = 16384,
    checkpoint: Path | None = None,
    identity: str = "",
    on_test: Callable[[], object] = lambda: None,
) -> Descent:
    """One constant per place [n, d], each from the mean subject embedding until its loss on the validation facts stops falling.

    The loss, max(0, p_clean - p_restored), is in probability; arguments as those of `oacore.descent.descend`. Fits of places whose
    restoring does nothing differ by chance, which would pass for effects: see `_without_chance`.
    """
    start = statistics.mean.repeat(len(places), 1)
    unit = statistics.std.square().mean().sqrt().reshape(1, 1)

    def gradient(running: Tensor, value: Tensor, step: int) -> Tensor:
        rows = prompts_of_step(len(train), settings.batch_size, seed, step).to(model.device)
        return gradients(model, train.take(rows), [places[i] for i in running.tolist()], value, tokens_per_batch)

    def validate(running: Tensor, value: Tensor) -> Tensor:
        return losses(model, validation, [places[i] for i in running.tolist()], value, tokens_per_batch).mean(1)

    names = [item.name for item in places]
    key = "tracing.fit.learning_rate"
    found = descend(
        start,
        unit,
        gradient,
        validate,
        settings,
        names=names,
        key=key,
        checkpoint=checkpoint,
        identity=identity,
        what="OAT",
        on_test=on_test,
    )
    return _without_chance(model, places, validation, found, tokens_per_batch)


def _without_chance(model: Model, places: Sequence[Place], validation: Recall, found: Descent, tokens_per_batch: int) -> Descent:
    """The corrupted run takes whichever constant is best for it, and every place that one, unless its own is better beyond chance.

    Beyond chance: by two standard errors of the difference on the validation facts. On a planted recall, with fits apart, the AIE of all
    other layers added up to 18 % of the peak's; so it is below 0.1 % (kernels/bench/bench_recall.py).
    """
    constants = found.best
    corrupted = [NOWHERE] * len(places)
    best = losses(model, validation, corrupted, constants, tokens_per_batch).mean(1).argmin()
    shared = constants[best].expand_as(constants)
    own, common = (losses(model, validation, places, values, tokens_per_batch) for values in (constants, shared))
    subjects = validation.subject_numbers
    better = []
    for item, mine, others in zip(places, own, common, strict=True):
        gain, se = clustered_mean_and_se(others - mine, subjects)
        better.append(item != NOWHERE and gain > max(2 * se, ABSOLUTE_PROGRESS))
    keep = torch.tensor(better, device=constants.device)
    loss = torch.where(keep, own.mean(1), common.mean(1))
    return replace(found, best=torch.where(keep[:, None], constants, shared), best_loss=loss)


def save(path: str | Path, places: Sequence[Place], found: Descent, metadata: dict[str, Any]) -> None:
    """Write constants [n, d] and the fit's record as safetensors; `metadata` and the places' names as JSON."""
    record = {name: getattr(found, name) for name in ("best_loss", "n_steps", "converged", "curve_steps", "curve_losses")}
    tensors = {"constants": found.best, **{f"fit.{name}": value for name, value in record.items()}}
    write_tensors(path, tensors, {**metadata, "places": [item.name for item in places]})


def load(path: str | Path, places: Sequence[Place], expect: dict[str, Any]) -> Tensor:
    """The constants [n, d] of the places.

    Raises:
        UserError: the file is damaged, of another model or other facts, or lacks a place.
    """
    facts, tensors = read_tensors(path, expect)
    row_of = {name: row for row, name in enumerate(facts.get("places", ()))}
    if missing := [item.name for item in places if item.name not in row_of]:
        raise UserError(f"{path}: no constants for {', '.join(missing[:5])}; delete it and run the same command again")
    return tensors["constants"][[row_of[item.name] for item in places]]
