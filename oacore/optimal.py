"""Optimal constants: the vector per component that minimises the expected ablation loss (Li & Janson 2024, section 2.3).

All components are fitted at once. They share each step's prompts and their clean pass; each has its own Adam state, learning rate and
convergence test, so that a component leaves the batch as soon as it has converged. The whole state is one dictionary of tensors, and
each step's prompts follow from the seed and the step alone: a checkpoint resumes bit by bit.

Constants of components of different width are rows of one tensor [C, Q, W], padded with zeros to the widest; Q = 1, or P + 1 for
positional constants (one row per position that all prompts share, and one for all later ones).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from oacore.ablation import (
    Batch,
    Clean,
    Component,
    Group,
    Statistics,
    ablated_logits,
    clean_log_probs,
    clean_pass,
    group_components,
    spread,
    width,
)
from oacore.checkpoint import atomic_path
from oacore.config import OptimalFit
from oacore.errors import UserError
from oacore.metrics import kl_divergence
from oacore.model import Model
from oacore.progress import progress

BETAS, EPSILON = (0.9, 0.999), 1e-10
DECAY = 0.25  # of the learning rate, each time a component stops improving
ABSOLUTE_PROGRESS = 1e-6  # nats: smaller improvements are fp32 rounding of the loss


@dataclass(frozen=True)
class Fit:
    """Fitted constants and how they were reached; rows in the order of `components`."""

    components: tuple[Component, ...]
    constants: Tensor  # [C, Q, W]
    validation_gap: Tensor  # [C] nats, of the constants kept
    n_steps: Tensor  # [C] steps taken
    converged: Tensor  # [C] bool; False: stopped by the cap
    curve_steps: Tensor  # [n] steps at which convergence was tested
    curve_gaps: Tensor  # [n, C] validation gap in nats at those steps


def starting_means(model: Model, components: Sequence[Component], statistics: Statistics, *, positional: bool) -> Tensor:
    """The means [C, Q, W] that fits start from: pooled over positions, or per position."""
    table = statistics.mean_positional if positional else statistics.mean
    shape = (len(components), statistics.shortest + 1 if positional else 1, max(width(model, item.kind) for item in components))
    start, row = torch.zeros(shape, device=model.device), 0
    for group in group_components(components):
        means = statistics.of(table, group).float()  # [n, (P + 1,) w]
        start[row : row + len(group), :, : means.shape[-1]] = means if positional else means[:, None]
        row += len(group)
    return start


def better_start(
    model: Model, prompts: Batch, components: Sequence[Component], positional: Tensor, constant: Tensor, tokens_per_batch: int
) -> Tensor:
    """Per component, the better of a positional table [C, P + 1, W] and one constant [C, 1, W] at all positions: [C, P + 1, W]."""
    same = constant.expand_as(positional).contiguous()
    gaps = [mean_losses(model, prompts, components, start, tokens_per_batch) for start in (positional, same)]
    return torch.where((gaps[0] < gaps[1])[:, None, None], positional, same)


def scales(components: Sequence[Component], statistics: Statistics) -> Tensor:
    """Root mean square standard deviation [C] of each component's value: the unit of the learning rate."""
    rows = [statistics.of(statistics.std, group).float().square().mean(-1).sqrt() for group in group_components(components)]
    return torch.cat(rows)


def losses_of(
    model: Model, part: Batch, components: Sequence[Component], constants: Tensor, tokens_per_batch: int
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Ablation losses of a batch, some components at a time: (their rows, their constants as a leaf [n, Q, w], losses [n, B] in nats).

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
def mean_losses(model: Model, prompts: Batch, components: Sequence[Component], constants: Tensor, tokens_per_batch: int) -> Tensor:
    """Mean ablation loss [C] (nats) of each component with its constant [C, Q, W], over all prompts."""
    total = torch.zeros(len(components), dtype=torch.float64, device=model.device)
    for part in prompts.split(tokens_per_batch):
        for rows, _, losses in losses_of(model, part, components, constants, tokens_per_batch):
            total[rows] += losses.double().sum(1)
    return (total / len(prompts)).float()


def gradients(model: Model, prompts: Batch, components: Sequence[Component], constants: Tensor, tokens_per_batch: int) -> Tensor:
    """Gradient [C, Q, W] of each component's mean loss over the prompts in its own constant."""
    gradient = torch.zeros_like(constants)
    for part in prompts.split(tokens_per_batch):
        with torch.enable_grad():
            for rows, leaf, losses in losses_of(model, part, components, constants, tokens_per_batch):
                (found,) = torch.autograd.grad(losses.sum() / len(prompts), leaf)
                gradient[rows, :, : found.shape[-1]] += found
    return gradient


def prompts_of_step(n_prompts: int, size: int, seed: int, step: int) -> Tensor:
    """The prompts of a step. Each epoch is a permutation of its own seed, so any step can be drawn without those before it."""
    size = min(size, n_prompts)
    epoch, index = divmod(step, n_prompts // size)
    order = torch.randperm(n_prompts, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
    return order[index * size : (index + 1) * size]


@torch.no_grad()
def fit(
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
    checkpoint: Path | None = None,
    identity: str = "",
    what: str = "constants",
    on_test: Callable[[], object] = lambda: None,
) -> Fit:
    """Fit every component's constant.

    Each component runs Adam until its gap on the validation prompts stops improving by `tolerance`; its learning rate then drops,
    and after `n_decays` drops it counts as converged. The constant that is tested, and kept if it is the best so far, is the
    average of the iterates since the last test: it is closer to the minimum than any of them.

    Args:
        start: [C, Q, W], e.g. `starting_means`.
        seed: of the order in which training prompts are drawn.
        checkpoint: file to resume from and to save to at every test; removed by the caller when its result is safe.
        identity: what the checkpoint belongs to; one with another identity is ignored.
        what: named in the progress lines.
        on_test: called after every convergence test.
    """
    components = tuple(components)
    state = _resume(checkpoint, identity, model.device) or _initial_state(model, components, validation, start, settings, tokens_per_batch)
    scale = scales(components, statistics)  # [C]
    with progress(what=what, unit="steps", total=settings.max_steps, initial=int(state["step"])) as bar:
        while int(state["step"]) < settings.max_steps and not bool(state["done"].all()):
            running = (~state["done"]).nonzero()[:, 0]
            active = [components[index] for index in running.tolist()]
            for _ in range(min(settings.check_every, settings.max_steps - int(state["step"]))):
                batch = train.take(prompts_of_step(len(train), settings.batch_size, seed, int(state["step"])).to(model.device))
                gradient = gradients(model, batch, active, state["value"][running], tokens_per_batch)
                state["step"] += 1
                _adam(state, running, gradient, state["rate"][running] * scale[running])
                bar.update()
            _test_convergence(model, state, active, running, validation, settings, tokens_per_batch)
            bar.set_postfix_str(f"{int(state['done'].sum())}/{len(components)} converged", refresh=False)
            on_test()
            if checkpoint is not None:
                _save(checkpoint, state, identity)
    return Fit(components, state["best"], state["best_gap"], state["n_steps"], state["done"], state["curve_steps"], state["curve_gaps"])


State = dict[str, Tensor]


def _initial_state(
    model: Model, components: Sequence[Component], validation: Batch, start: Tensor, settings: OptimalFit, tokens_per_batch: int
) -> State:
    n, device = len(components), model.device
    gap = mean_losses(model, validation, components, start, tokens_per_batch)
    counter = torch.zeros(n, dtype=torch.int64, device=device)
    return {
        "step": torch.zeros((), dtype=torch.int64),
        "value": start.clone(),
        "first": torch.zeros_like(start),
        "second": torch.zeros_like(start),
        "sum": torch.zeros_like(start),
        "best": start.clone(),
        "best_gap": gap,
        "rate": torch.full((n,), settings.learning_rate, device=device),
        "stale": counter.clone(),
        "decays": counter.clone(),
        "n_steps": counter.clone(),
        "done": torch.zeros(n, dtype=torch.bool, device=device),
        "curve_steps": torch.zeros(1, dtype=torch.int64),
        "curve_gaps": gap[None].to("cpu", copy=True),  # best_gap is updated in place
    }


def _adam(state: State, rows: Tensor, gradient: Tensor, rate: Tensor) -> None:
    """One Adam step of the running rows [m], each with its own rate [m]; torch.optim has one rate per tensor, not per row."""
    step = int(state["step"])
    first = state["first"][rows].lerp(gradient, 1 - BETAS[0])
    second = state["second"][rows].lerp(gradient.square(), 1 - BETAS[1])
    direction = first / (1 - BETAS[0] ** step) / ((second / (1 - BETAS[1] ** step)).sqrt() + EPSILON)
    value = state["value"][rows] - rate[:, None, None] * direction
    state["first"][rows], state["second"][rows], state["value"][rows] = first, second, value
    state["sum"][rows] += value


def _test_convergence(
    model: Model,
    state: State,
    active: Sequence[Component],
    running: Tensor,
    validation: Batch,
    settings: OptimalFit,
    tokens_per_batch: int,
) -> None:
    """Keep what improved on the validation prompts; slow down, and at last stop, what did not."""
    since = int(state["step"]) - int(state["curve_steps"][-1])
    average = state["sum"][running] / since
    state["sum"].zero_()
    gap = mean_losses(model, validation, active, average, tokens_per_batch)
    best = state["best_gap"][running]
    if not bool(gap.isfinite().all()):
        bad = [item.name for item, finite in zip(active, gap.isfinite().tolist(), strict=True) if not finite]
        raise UserError(
            f"ablation.optimal.learning_rate: {settings.learning_rate:g}; after {int(state['step'])} steps the ablation loss of "
            f"{', '.join(bad)} is not finite; allowed: a smaller one"
        )
    progress = best - gap > settings.tolerance * best + ABSOLUTE_PROGRESS
    better = running[gap < best]
    state["best"][better], state["best_gap"][better] = average[gap < best], gap[gap < best]
    state["stale"][running] = torch.where(progress, 0, state["stale"][running] + 1)
    slow = running[state["stale"][running] >= settings.patience]
    state["decays"][slow] += 1
    state["rate"][slow] *= DECAY
    state["stale"][slow] = 0
    state["value"][slow] = state["best"][slow]
    state["done"] = state["decays"] > settings.n_decays
    state["n_steps"][running] = state["step"].to(running.device)
    state["curve_steps"] = torch.cat((state["curve_steps"], state["step"][None]))
    latest = state["curve_gaps"][-1].clone()
    latest[running.cpu()] = gap.cpu()
    state["curve_gaps"] = torch.cat((state["curve_gaps"], latest[None]))


def _save(path: Path, state: State, identity: str) -> None:
    with atomic_path(path) as temporary:
        save_file({name: value.contiguous() for name, value in state.items()}, temporary, metadata={"identity": identity})


def _resume(path: Path | None, identity: str, device: torch.device) -> State | None:
    if path is None or not path.is_file():
        return None
    with safe_open(path, "pt") as file:
        if file.metadata().get("identity") != identity:
            return None
        on_host = ("step", "curve_steps", "curve_gaps")
        return {name: file.get_tensor(name).to("cpu" if name in on_host else device) for name in file.keys()}  # noqa: SIM118
