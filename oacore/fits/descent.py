"""Stochastic descent of many independent fits at once, in rounds of annealed Adam, each twice as long as the last.

Each row of one tensor is a fit with its own Adam state, learning rate and convergence test. Within a round the learning
rate falls linearly to zero, which takes the noise of small batches out of the result; the next round goes on from the
best so far. What rounds gain falls by about the same factor from each to the next, so that the last two say how much
all further ones would gain: what is left. A fit has converged, and leaves the batch, when two rounds in a row put that
below the tolerance; circuits of the demo that one round had called converged were 1 to 10 % above 20 times the steps.

Four of the demo's circuits (IOI, 1,152 coordinates each): after 80 steps of 8 prompts their validation KL was 23 to 44
% above that of a fit of 96,000 prompts, after two more rounds 3 to 17 %; one round as long as all three ended within 4
% of those (a fifth circuit has several minima). Gauss-Newton steps (the Fisher metric of 1,024 sampled gradients,
damped adaptively) were behind at any number of prompts, L-BFGS on all training prompts from where the third round ended
was no faster than more rounds, and Adam in the eigenbasis of each source's gradients was unstable. What does help where
coordinates are coupled is to whiten them (`whitening`): four other circuits, which 1,050 steps of Adam leave 3.8 to 7.8
% above 10,575, came within 4.7 %. Adam comes first. It chooses the basin: whitened after 75 gradients of 16 prompts, 33
edges that lose much on any constants ended at 1.58 nats instead of 0.93. And it ends fits that have nothing to gain:
whitened after 60 of 8 prompts, steps along directions that hardly any gradient had shown yet, flat as far as these saw,
threw 12 of 55 fits out of their basins.

The whole state is one dictionary of tensors, and each step's prompts follow from the seed and the step alone: a
checkpoint resumes bit by bit.
"""

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from oacore.config.base import OptimalFit
from oacore.fits.replayed import Replayed, Tensors
from oacore.fits.resume import NOT_KEPT, Resumable, State
from oacore.fits.watch import Watch
from oacore.fits.whitening import Whitening
from oacore.progress import progress

BETAS, EPSILON = (0.9, 0.99), 1e-10
MOMENTUM, WEIGHT_DECAY, LARGEST_NORM = 0.9, 1e-3, 1.0  # of `sgd_step`: the tuned lens's official recipe
SLOWER, FASTER = 1 / 4, 8.0  # times the rate, after a round that made things worse or never left the start
RETRIES = 2  # rounds that either may be tried again
LOOK_EVERY = 20  # steps between looks for numbers that are not finite, and chances to save
QUIET_ROUNDS = 2  # in a row, with too little left, before a fit has converged
GRADIENTS_OF_ADAM = 200  # before gradients are whitened: twice as many as their moments remember
SHRINKS = (0.5, 0.8)  # bounds of the factor between two rounds' gains: 0.5 is an error of one over the steps
ABSOLUTE_PROGRESS = 1e-6  # nats, or probability where that is the loss: smaller improvements do not count


@dataclass(frozen=True)
class Running:
    """The m fits that have not ended."""

    index: Tensor  # [m] int64, on the device
    rows: list[int]  # the same on the host, which need not wait for the device to know them


@dataclass(frozen=True)
class Descent:
    """What n fits came to."""

    best: Tensor  # [n, ...]
    best_loss: Tensor  # [n] nats, on the validation prompts
    left: Tensor  # [n] nats that further rounds would gain, about
    n_steps: Tensor  # [n] steps taken
    converged: Tensor  # [n] bool; False: stopped by the cap
    curve_steps: Tensor  # [c] steps at which rounds ended
    curve_losses: Tensor  # [c, n] validation loss in nats at those steps

    def take(self, rows: Sequence[int]) -> "Descent":
        """Some of the fits."""
        each = {name: getattr(self, name)[list(rows)] for name in EACH}
        return replace(self, **each, curve_losses=self.curve_losses[:, list(rows)])


EACH = ("best", "best_loss", "left", "n_steps", "converged")  # of every fit of a descent


def adam_step(
    values: list[Tensor],
    firsts: list[Tensor],
    seconds: list[Tensor],
    gradients: list[Tensor],
    step: float | Tensor,
    rates: list[Tensor],
    betas: tuple[float, float] = BETAS,
) -> None:
    """Adam's step number `step` >= 1, which changes values, first and second moments, of several tensors in one launch
    for each operation.

    Args:
        rates: each broadcasts against its values: torch.optim has one number per tensor.
    """
    torch._foreach_lerp_(firsts, gradients, 1 - betas[0])
    torch._foreach_lerp_(seconds, torch._foreach_mul(gradients, gradients), 1 - betas[1])
    sizes = torch._foreach_div(seconds, 1 - betas[1] ** step)
    torch._foreach_sqrt_(sizes)
    torch._foreach_add_(sizes, EPSILON)
    directions = torch._foreach_div(firsts, 1 - betas[0] ** step)
    torch._foreach_div_(directions, sizes)
    torch._foreach_sub_(values, torch._foreach_mul(rates, directions))


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
    gradient: Callable[..., Tensor],
    validate: Callable[[Running, Tensor], Tensor],
    settings: OptimalFit,
    *,
    names: Sequence[str],
    key: str,
    draw: Callable[[int], Tensors] | None = None,
    resumable: Resumable = NOT_KEPT,
    what: str = "constants",
    on_test: Callable[[], object] = lambda: None,
    sgd: bool = False,
    blocks: Sequence[int] = (),
) -> Descent:
    """Fit every row of `start` [n, ...].

    After a round that ends worse than it began a row goes on with a lower rate; one that never left its start is tried
    with a higher one before it counts as converged, and is warned of.

    Args:
        scale: broadcasts against start; the unit of `settings.learning_rate`.
        gradient: (running, their values [m, ...], step) -> gradient [m, ...] of each row's loss; with `draw`, what that
            returned in place of the step.
        validate: (running, their values [m, ...]) -> validation losses [m] in nats.
        names: of the rows, and `key`: of the learning rate in the config, for errors.
        draw: what differs from step to step, by its number. All else that the gradient reads stays in a round, so that
            a GPU may replay its steps (`replayed`).
        resumable: where the state is kept, after every round and every minute.
        on_test: called after every round.
        sgd: take `sgd_step`s instead of Adam's; the rate is then absolute but for `scale`.
        blocks: widths of consecutive blocks of coupled coordinates of a row [n, coordinates], which are whitened
            together in rounds that begin after `GRADIENTS_OF_ADAM`.

    Raises:
        UserError: a gradient or loss is not finite; names step, rows, and the last good checkpoint.
    """
    everything = Running(torch.arange(len(start), device=start.device), list(range(len(start))))
    scale, step_of = scale.expand(len(start), *scale.shape[1:]), _sgd if sgd else _adam
    ends = settings.round_ends
    whitened_from = next((end for end in ends[:-1] if end >= GRADIENTS_OF_ADAM), None) if blocks else None
    whitening = None if whitened_from is None else Whitening(blocks, scale)
    state = resumable.load(start.device)
    if state is None:
        state = _initial_state(start, validate(everything, start), settings)
        state |= {} if whitening is None else whitening.initial_state()
    watch = Watch(resumable.path, int(state["step"]))
    advice = f"allowed: a smaller {key}, now {settings.learning_rate:g}, and a model with finite weights"
    watch.see("validation loss", state["best_loss"], int(state["step"]), everything.index)
    watch.check(names, advice)

    def steps_of_round(running: Running, begin: int, end: int) -> Iterator[None]:
        index, whitens = running.index, whitened_from is not None and begin >= whitened_from
        update = partial(_whitened, whitening) if whitening is not None and whitens else step_of

        def take(number: float | Tensor, *drawn: Any) -> Tensors:
            slope = gradient(running, state["value"][index], *drawn)
            rate = _like(state["rate"][index], start) * scale[index] * ((end + 1 - number) / (end - begin))
            update(state, index, slope, rate, number - begin)
            if whitening is not None:
                whitening.see(state, index, slope)
            watch.see("gradient", slope, number, index)
            return ()

        taken = Replayed(take, start.device) if draw is not None else take
        while (step := int(state["step"])) < end:
            if whitening is not None and whitens and (step - begin) % LOOK_EVERY == 0:
                whitening.refresh(state, index, step)  # and not oftener: whoever resumes must find the same
            taken(step + 1, *((step,) if draw is None else draw(step)))
            state["step"] += 1
            yield
            if (step + 1 - begin) % LOOK_EVERY == 0:
                watch.check(names, advice)
                resumable.save_sometimes(state)

    with progress(what=what, unit="steps", total=settings.max_steps, initial=int(state["step"])) as bar:
        for begin, end in zip([0, *ends], ends, strict=False):
            index = (~state["done"]).nonzero()[:, 0]
            if int(state["step"]) >= end or not len(index):
                continue
            running = Running(index, index.tolist())
            if begin == whitened_from:
                state["gain"][index] = torch.inf  # what Adam's rounds gained says nothing of further ones
            for _ in steps_of_round(running, begin, end):
                bar.update()
            loss = validate(running, state["value"][index])
            watch.see("validation loss", loss, end, index)
            watch.check(names, advice)
            _judge_round(state, index, loss, settings, _usual_rounds(begin, end, settings.first_round))
            bar.set_postfix_str(f"{int(state['done'].sum())}/{len(start)} converged", refresh=False)
            on_test()
            resumable.save(state)
            watch.saved = end
    _warn_of_idle(state, names, what, settings)
    return Descent(
        *(state[name] for name in ("best", "best_loss", "left", "n_steps", "done", "curve_steps", "curve_losses"))
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
        "best": start.clone(),
        "best_loss": loss,
        "gain": torch.full_like(loss, torch.inf),
        "left": torch.full_like(loss, torch.nan),
        "rate": torch.full((n,), settings.learning_rate, device=device),
        "quiet": counter.clone(),
        "slower": counter.clone(),
        "faster": counter.clone(),
        "n_steps": counter.clone(),
        "done": torch.zeros(n, dtype=torch.bool, device=device),
        "curve_steps": torch.zeros(1, dtype=torch.int64),
        "curve_losses": loss[None].to("cpu", copy=True),  # best_loss is updated in place
    }


def _adam(state: State, rows: Tensor, gradient: Tensor, rate: Tensor, step: float | Tensor) -> None:
    value, first, second = (state[name][rows] for name in ("value", "first", "second"))
    adam_step([value], [first], [second], [gradient], step, [rate])
    state["first"][rows], state["second"][rows], state["value"][rows] = first, second, value


def _sgd(state: State, rows: Tensor, gradient: Tensor, rate: Tensor, step: float | Tensor) -> None:
    state["value"][rows], state["first"][rows] = sgd_step(state["value"][rows], state["first"][rows], gradient, rate)


def _whitened(
    whitening: Whitening, state: State, rows: Tensor, gradient: Tensor, rate: Tensor, step: float | Tensor
) -> None:
    state["first"][rows] = state["first"][rows].lerp(gradient, 1 - BETAS[0])
    momentum = state["first"][rows] / (1 - BETAS[0] ** step)
    state["value"][rows] -= rate * whitening.direction(rows, momentum)


def _usual_rounds(begin: int, end: int, first_round: int) -> float:
    """How many rounds of twice the last one's steps make a fit longer by as much as this one, which may be the last and
    take what is left of the cap: else its gain would say that far more is left.
    """
    return math.log(end / begin) / math.log((2 * begin + first_round) / begin) if begin else 1.0


def _small(state: State, settings: OptimalFit) -> Tensor:
    """What may be left, or is no progress [n], in nats."""
    return settings.tolerance * state["best_loss"] + ABSOLUTE_PROGRESS


def _idle(state: State, settings: OptimalFit) -> Tensor:
    """Which fits [n] are no better than their start, where better was possible."""
    start = state["curve_losses"][0].to(state["best_loss"].device)
    return (start - state["best_loss"] <= settings.tolerance * start) & (start > ABSOLUTE_PROGRESS)


def _judge_round(state: State, running: Tensor, loss: Tensor, settings: OptimalFit, rounds: float) -> None:
    """Keep what improved on the validation prompts, set the next round's rates, and end what has converged.

    Args:
        rounds: as many usual ones this round is worth.
    """
    gain, small = state["best_loss"][running] - loss, _small(state, settings)[running]
    better = gain > 0
    state["best"][running[better]], state["best_loss"][running[better]] = state["value"][running[better]], loss[better]
    worse = gain < -small
    idle = (gain <= small) & ~worse & _idle(state, settings)[running]
    for chosen, counter, factor in ((worse, "slower", SLOWER), (idle, "faster", FASTER)):
        state[counter][running[chosen]] += 1
        state["rate"][running[chosen]] *= factor
    gain = gain / rounds
    shrink = (gain / state["gain"][running]).nan_to_num(0.0).clamp(*SHRINKS)  # no gain after none is no gain
    left = (gain * shrink / (1 - shrink)).clamp(min=0).minimum(state["best_loss"][running])
    again = (worse & (state["slower"][running] <= RETRIES)) | (idle & (state["faster"][running] <= RETRIES))
    state["gain"][running], state["left"][running] = gain, left
    state["quiet"][running] = torch.where((left <= small) & ~again, state["quiet"][running] + 1, 0)
    nothing_to_gain = state["best_loss"][running] <= ABSOLUTE_PROGRESS
    state["done"][running] = (state["quiet"][running] >= QUIET_ROUNDS) | nothing_to_gain
    state["value"][running] = state["best"][running]
    state["first"].zero_()
    state["second"].zero_()
    state["n_steps"][running] = state["step"].to(running.device)
    state["curve_steps"] = torch.cat((state["curve_steps"], state["step"][None]))
    latest = state["curve_losses"][-1].clone()
    latest[running.cpu()] = loss.cpu()
    state["curve_losses"] = torch.cat((state["curve_losses"], latest[None]))


def _warn_of_idle(state: State, names: Sequence[str], what: str, settings: OptimalFit) -> None:
    idle = [names[row] for row in _idle(state, settings).nonzero()[:, 0].tolist()]
    if idle:
        shown = ", ".join(idle[:5]) + (f" and {len(idle) - 5} more" if len(idle) > 5 else "")
        print(
            f"warning: {what}: no better than its start, at any rate that was tried: {shown} ({len(idle)} of "
            f"{len(names)} fits)",
            file=sys.stderr,
        )
