"""Stochastic descent of many independent fits at once: Adam with a rate per fit, a convergence test, checkpoints that
resume bit by bit.

Each row of one tensor is a fit with its own Adam state, learning rate and convergence test, and leaves the batch as
soon as it has converged. The whole state is one dictionary of tensors, and each step's prompts follow from the seed and
the step alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from oacore.config.base import OptimalFit
from oacore.fits.resume import NOT_KEPT, Resumable, State
from oacore.fits.watch import Watch
from oacore.progress import progress

BETAS, EPSILON = (0.9, 0.999), 1e-10
MOMENTUM, WEIGHT_DECAY, LARGEST_NORM = 0.9, 1e-3, 1.0  # of `sgd_step`: the tuned lens's official recipe
DECAY = 0.25  # of the learning rate, each time a fit stops improving
ABSOLUTE_PROGRESS = 1e-6  # nats, or probability where that is the loss: smaller improvements do not count


@dataclass(frozen=True)
class Descent:
    """What n fits came to."""

    best: Tensor  # [n, ...]
    best_loss: Tensor  # [n] nats, on the validation prompts
    n_steps: Tensor  # [n] steps taken
    converged: Tensor  # [n] bool; False: stopped by the cap
    curve_steps: Tensor  # [c] steps at which convergence was tested
    curve_losses: Tensor  # [c, n] validation loss in nats at those steps


def adam_step(
    value: Tensor,
    first: Tensor,
    second: Tensor,
    gradient: Tensor,
    step: int,
    rate: Tensor,
    betas: tuple[float, float] = BETAS,
) -> tuple[Tensor, Tensor, Tensor]:
    """New (value, first, second moment) after Adam's step number `step` >= 1; `rate` broadcasts: torch.optim has one
    per tensor.
    """
    first = first.lerp(gradient, 1 - betas[0])
    second = second.lerp(gradient.square(), 1 - betas[1])
    direction = first / (1 - betas[0] ** step) / ((second / (1 - betas[1] ** step)).sqrt() + EPSILON)
    return value - rate * direction, first, second


def sgd_step(value: Tensor, momentum: Tensor, gradient: Tensor, rate: Tensor) -> tuple[Tensor, Tensor]:
    """New (value, momentum) after a step of SGD with Nesterov momentum, weight decay, and each row's gradient clipped
    by its norm.
    """
    norm = gradient.flatten(1).norm(dim=1).reshape(-1, *(1 for _ in gradient.shape[1:]))
    gradient = gradient * (LARGEST_NORM / norm.clamp(min=LARGEST_NORM)) + WEIGHT_DECAY * value
    momentum = MOMENTUM * momentum + gradient
    return value - rate * (gradient + MOMENTUM * momentum), momentum


@torch.no_grad()
def descend(
    start: Tensor,
    scale: Tensor,
    gradient: Callable[[Tensor, Tensor, int], Tensor],
    validate: Callable[[Tensor, Tensor], Tensor],
    settings: OptimalFit,
    *,
    names: Sequence[str],
    key: str,
    resumable: Resumable = NOT_KEPT,
    what: str = "constants",
    on_test: Callable[[], object] = lambda: None,
    sgd: bool = False,
) -> Descent:
    """Fit every row of `start` [n, ...].

    A row runs Adam until its validation loss stops improving by `tolerance`; its learning rate then drops, and after
    `n_decays` drops it counts as converged. What is tested, and kept if it is the best so far, is the average of the
    iterates since the last test: it is closer to the minimum than any of them.

    Args:
        scale: broadcasts against start; the unit of `settings.learning_rate`.
        gradient: (rows [m], their values [m, ...], step) -> gradient [m, ...] of each row's loss.
        validate: (rows [m], their values [m, ...]) -> validation losses [m] in nats.
        names: of the rows, and `key`: of the learning rate in the config, for errors.
        resumable: where the state is kept, at every test.
        on_test: called after every convergence test.
        sgd: take `sgd_step`s instead of Adam's; the rate is then absolute but for `scale`.

    Raises:
        UserError: a gradient or loss is not finite; names step, rows, and the last good checkpoint.
    """
    everything = torch.arange(len(start), device=start.device)
    state = resumable.load(start.device) or _initial_state(start, validate(everything, start), settings)
    scale = scale.expand(len(start), *scale.shape[1:])
    watch = Watch(resumable.path, int(state["step"]))
    advice = f"allowed: a smaller {key}, now {settings.learning_rate:g}, and a model with finite weights"
    watch.see("validation loss", state["best_loss"], int(state["step"]), everything)
    watch.check(names, advice)
    with progress(what=what, unit="steps", total=settings.max_steps, initial=int(state["step"])) as bar:
        while int(state["step"]) < settings.max_steps and not bool(state["done"].all()):
            running = (~state["done"]).nonzero()[:, 0]
            for _ in range(min(settings.check_every, settings.max_steps - int(state["step"]))):
                slope = gradient(running, state["value"][running], int(state["step"]))
                state["step"] += 1
                watch.see("gradient", slope, int(state["step"]), running)
                rate = _like(state["rate"][running], start) * scale[running]
                (_sgd if sgd else _adam)(state, running, slope, rate)
                bar.update()
            loss = _test_convergence(state, running, validate, settings)
            watch.see("validation loss", loss, int(state["step"]), running)
            watch.check(names, advice)
            bar.set_postfix_str(f"{int(state['done'].sum())}/{len(start)} converged", refresh=False)
            on_test()
            resumable.save(state)
            watch.saved = int(state["step"])
    return Descent(
        state["best"], state["best_loss"], state["n_steps"], state["done"], state["curve_steps"], state["curve_losses"]
    )


def _like(values: Tensor, target: Tensor) -> Tensor:
    """values [m] shaped to broadcast over rows of target [n, ...]."""
    return values.reshape(-1, *(1 for _ in target.shape[1:]))


def _initial_state(start: Tensor, loss: Tensor, settings: OptimalFit) -> State:
    n, device = len(start), start.device
    counter = torch.zeros(n, dtype=torch.int64, device=device)
    return {
        "step": torch.zeros((), dtype=torch.int64),
        "value": start.clone(),
        "first": torch.zeros_like(start),
        "second": torch.zeros_like(start),
        "sum": torch.zeros_like(start),
        "best": start.clone(),
        "best_loss": loss,
        "rate": torch.full((n,), settings.learning_rate, device=device),
        "stale": counter.clone(),
        "decays": counter.clone(),
        "n_steps": counter.clone(),
        "done": torch.zeros(n, dtype=torch.bool, device=device),
        "curve_steps": torch.zeros(1, dtype=torch.int64),
        "curve_losses": loss[None].to("cpu", copy=True),  # best_loss is updated in place
    }


def _adam(state: State, rows: Tensor, gradient: Tensor, rate: Tensor) -> None:
    value, first, second = (state[name][rows] for name in ("value", "first", "second"))
    value, first, second = adam_step(value, first, second, gradient, int(state["step"]), rate)
    state["first"][rows], state["second"][rows], state["value"][rows] = first, second, value
    state["sum"][rows] += value


def _sgd(state: State, rows: Tensor, gradient: Tensor, rate: Tensor) -> None:
    value, momentum = sgd_step(state["value"][rows], state["first"][rows], gradient, rate)
    state["first"][rows], state["value"][rows] = momentum, value
    state["sum"][rows] += value


def _test_convergence(
    state: State,
    running: Tensor,
    validate: Callable[[Tensor, Tensor], Tensor],
    settings: OptimalFit,
) -> Tensor:
    """Keep what improved on the validation prompts; slow down, and at last stop, what did not. Returns the losses
    tested.
    """
    since = int(state["step"]) - int(state["curve_steps"][-1])
    average = state["sum"][running] / since
    state["sum"].zero_()
    loss = validate(running, average)
    best = state["best_loss"][running]
    progress = best - loss > settings.tolerance * best + ABSOLUTE_PROGRESS
    better = running[loss < best]
    state["best"][better], state["best_loss"][better] = average[loss < best], loss[loss < best]
    state["stale"][running] = torch.where(progress, 0, state["stale"][running] + 1)
    slow = running[state["stale"][running] >= settings.patience]
    state["decays"][slow] += 1
    state["rate"][slow] *= DECAY
    state["stale"][slow] = 0
    state["value"][slow] = state["best"][slow]
    state["done"] = state["decays"] > settings.n_decays
    state["n_steps"][running] = state["step"].to(running.device)
    state["curve_steps"] = torch.cat((state["curve_steps"], state["step"][None]))
    latest = state["curve_losses"][-1].clone()
    latest[running.cpu()] = loss.cpu()
    state["curve_losses"] = torch.cat((state["curve_losses"], latest[None]))
    return loss
