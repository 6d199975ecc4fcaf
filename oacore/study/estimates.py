"""Every method's estimate of how much each component matters, with the passes that it took.

Passes are of one prompt, counted where they are driven: a forward pass of the model, clean or with one component
replaced, and a backward pass through it. Means over training prompts are the activation cache's, and not counted.

Symbols: C components, n prompts, W width of the widest component.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from oacore.ablation.components import Component
from oacore.ablation.gaps import evaluate
from oacore.ablation.optimal import gradients, mean_losses, scales, starting_means
from oacore.config.ablation import ABLATION_TYPES
from oacore.config.base import OptimalFit
from oacore.config.study import Estimator
from oacore.draws import prompts_of_step
from oacore.engine.clean import Batch
from oacore.engine.statistics import Statistics
from oacore.fits.convergence import Convergence, of_descent
from oacore.fits.descent import Descent, Running, descend
from oacore.models.weights import Model
from oacore.study.attribution import attributions
from oacore.study.effort import Effort, Sizes


@dataclass(frozen=True)
class Bench:
    """A model before the prompts of a task.

    Args:
        answers, wrong: of the test prompts, ids [N, A] and [N, W], padded with -1.
        fit: of the reference.
    """

    model: Model
    components: list[Component]
    statistics: Statistics
    train: Batch
    validation: Batch
    test: Batch
    counterfactual: Batch
    answers: Tensor
    wrong: Tensor
    fit: OptimalFit
    tokens_per_batch: int

    @property
    def sizes(self) -> Sizes:
        """What a budget is shared among."""
        return Sizes(len(self.components), len(self.validation), len(self.test))


@dataclass
class Passes:
    """How many of one prompt have run."""

    forward: int = 0
    backward: int = 0


@dataclass(frozen=True)
class Estimate:
    """What came of one estimate.

    Args:
        values: of each component on each prompt, nats [C, n]; the importance is the size of their mean.
        fit: of all constants together.
    """

    values: Tensor
    passes: Passes
    fit: Convergence = field(default_factory=Convergence)


def ablate(bench: Bench, row: Estimator, effort: Effort, seed: int) -> Estimate:
    """The gap under an ablation type that has no constants to fit."""
    passes = Passes()
    return Estimate(_gaps(bench, row.name, {}, effort.n_prompts, seed, passes), passes)


def fit_and_ablate(bench: Bench, row: Estimator, effort: Effort, seed: int) -> Estimate:
    """Constants of all components fitted at once from the means, and the gap with them."""
    passes = Passes()
    descent = fit(bench, effort, seed, passes)
    values = _gaps(bench, row.name, {row.name: descent.best}, effort.n_prompts, seed, passes)
    return Estimate(values, passes, Convergence.together(of_descent(descent)))


def attribute(bench: Bench, row: Estimator, effort: Effort, seed: int) -> Estimate:
    """First-order changes of the logit difference under mean ablation."""
    passes, found, begin = Passes(), [], 0
    chosen = bench.test.take(slice(0, effort.n_prompts))
    for part in chosen.split(bench.tokens_per_batch):
        rows = slice(begin, begin + len(part))
        answers, wrong = bench.answers[rows], bench.wrong[rows]
        found.append(attributions(bench.model, bench.components, bench.statistics, part, answers, wrong))
        passes.forward += len(part)
        passes.backward += len(part)
        begin += len(part)
    return Estimate(torch.cat(found, 1), passes)


@torch.no_grad()
def fit(bench: Bench, effort: Effort, seed: int, passes: Passes) -> Descent:
    """`oacore.ablation.optimal.fit_constants` with its passes counted, and nothing kept for a resumption: time that a
    kill has cut in two could not be told.

    Raises:
        UserError: the fit diverges.
    """
    components, validation = bench.components, bench.validation.take(slice(0, effort.n_validation))

    def gradient(running: Running, value: Tensor, step: int) -> Tensor:
        chosen = prompts_of_step(len(bench.train), effort.batch_size, seed, step)
        fitted = [components[row] for row in running.rows]
        passes.forward += len(chosen) * (1 + len(fitted))
        passes.backward += len(chosen) * len(fitted)
        return gradients(bench.model, bench.train.take(chosen), fitted, value, bench.tokens_per_batch)

    def validate(running: Running, value: Tensor) -> Tensor:
        fitted = [components[row] for row in running.rows]
        passes.forward += len(validation) * (1 + len(fitted))
        return mean_losses(bench.model, validation, fitted, value, bench.tokens_per_batch)

    return descend(
        starting_means(bench.model, components, bench.statistics, positional=False),
        scales(components, bench.statistics)[:, None, None],
        gradient,
        validate,
        effort.settings(bench.fit),
        names=[item.name for item in components],
        key="study.fit.learning_rate",
        what=f"constants, {effort.max_steps} steps",
    )


def _gaps(
    bench: Bench, method: str, constants: Mapping[str, Tensor], n_prompts: int, seed: int, passes: Passes
) -> Tensor:
    row, first = ABLATION_TYPES[method], slice(0, n_prompts)
    # Its own clean pass, and that of the prompt whose values it takes.
    passes.forward += n_prompts * (1 + row.of_partner + row.of_counterfactual + len(bench.components))
    given: dict[str, Any] = {"seed": seed, "tokens_per_batch": bench.tokens_per_batch, "what": f"{method} gaps"}
    found = evaluate(
        bench.model, bench.components, [method], bench.statistics, dict(constants), bench.test.take(first),
        bench.counterfactual.take(first), **given,
    )  # fmt: skip
    return found[method]
