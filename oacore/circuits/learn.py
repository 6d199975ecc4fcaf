"""Learning edge masks: all lambdas and seeds of a sweep are one vectorised fit (Li & Janson 2024, section 3 and
appendix).

Each fit has its own parameters, Adam state, constants, prompts and random numbers, all drawn from its own stream, so
that a sweep equals its fits made one by one. Loss = E[objective] + lambda sum(theta) + node regulariser; sampled masks
lose their dangling edges; constants are trained along, through edges that are fully ablated only. The state is one
dictionary of tensors and every step's random numbers follow from stream and step: a checkpoint resumes bit by bit.

Symbols: F fits, K samples, P prompts a step, R = K P, E edges, S sources, J destinations.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

from oacore.circuits.circuit import by_threshold
from oacore.circuits.constants import Constants
from oacore.circuits.edges import Edges
from oacore.circuits.passes import Passes
from oacore.circuits.replacements import Replacements
from oacore.circuits.search import LOSSES, SIZES, Found, Knob, SearchRequest, bool_masks
from oacore.config.circuits import EDGE_ABLATIONS, MaskFit, Objective
from oacore.draws import prompts_of_step, uploaded
from oacore.fits.descent import adam_step
from oacore.fits.resume import NOT_KEPT, Resumable, State
from oacore.fits.watch import Watch
from oacore.progress import progress

KEPT = 0.5  # the one threshold for learned scores
NODE_WEIGHT = 2e-4  # largest weight of the node regulariser


class Sampler(Protocol):
    """A distribution over masks with learned parameters."""

    betas: ClassVar[tuple[float, float]]
    slower: ClassVar[dict[str, float]]  # ablation types that want smaller steps, and by what

    def take(self, fits: slice) -> "Sampler":
        """That of some of the fits."""

    def start(self, n_fits: int, n_edges: int) -> State:
        """Initial parameters, [F, E] each."""

    def sample(self, parameters: State, noise: Tensor, second: State, step_share: float) -> tuple[Tensor, Tensor]:
        """Masks [F, R, E] and expected sizes [F, E]."""

    def score(self, parameters: State) -> Tensor:
        """[F, E] in (0, 1); the circuit is what lies above 1/2."""


@dataclass(frozen=True)
class Masks:
    """What a sweep learned."""

    scores: Tensor  # [F, J, S] in (0, 1), 0 where no edge
    constants: Constants | None
    step_losses: Tensor  # [n_steps, F] mean objective of each step
    step_sizes: Tensor  # [n_steps, F] expected edges


def base_rate(weight: float) -> float:
    """Learning rate of the logits by lambda (reference-figures A.4)."""
    return 0.15 if weight <= 1e-4 else 0.1 if weight <= 5e-4 else 0.05


ADVICE = "allowed: a smaller circuits.masks.learning_rate or constants_rate, and a model with finite weights"
CONSTANTS = tuple(f"constants/{name}" for name in Constants._fields)


def learn(
    sampler: Sampler,
    knobs: Sequence[Knob],
    weights: Sequence[float],
    passes: Passes,
    replacements: Replacements,
    scales: Constants,
    objective: Objective,
    settings: MaskFit,
    *,
    train_constants: bool,
    resumable: Resumable = NOT_KEPT,
    what: str = "masks",
) -> Masks:
    """Fit the masks of all knobs.

    Args:
        weights: lambda of each fit; 0 for samplers that fix the size.
        scales: unit of the constants' learning rate.
        resumable: where the state is kept, every `settings.record_every` steps.
        what: named in the progress lines and in errors.

    Raises:
        UserError: a loss or gradient is not finite; names step, parameters, knobs, and the last good checkpoint.
    """
    sweep = _Sweep(sampler, knobs, weights, passes, replacements, scales, objective, settings, train_constants)
    device, n_fits = passes.engine.model.device, len(knobs)
    state = resumable.load(device) or sweep.initial_state()
    since: list[tuple[Tensor, Tensor]] = []
    watch, every_fit = Watch(resumable.path, int(state["step"])), torch.arange(n_fits, device=device)
    fits = [f"{what} {knob.value:g} (seed {knob.seed})" for knob in knobs]
    with progress(what=what, unit="steps", total=settings.steps, initial=int(state["step"])) as bar:
        while int(state["step"]) < settings.steps:
            losses, gradients, sizes = sweep.gradients(state)
            state["step"] += 1
            named = {"loss": losses} | {f"gradient of {name}": value for name, value in gradients.items()}
            for name, values in named.items():
                watch.see(name, values, int(state["step"]), every_fit)
            sweep.descend(state, gradients)
            since.append((losses, sizes))
            bar.update()
            if len(since) == settings.record_every or int(state["step"]) == settings.steps:
                watch.check(fits, ADVICE)  # the one place where the host waits for the device
                _record(state, since)
                since = []
                resumable.save(state)
                watch.saved = int(state["step"])
    return sweep.masks(state)


class _Sweep:
    """The fits of all knobs side by side; what changes from step to step is the state."""

    def __init__(
        self,
        sampler: Sampler,
        knobs: Sequence[Knob],
        weights: Sequence[float],
        passes: Passes,
        replacements: Replacements,
        scales: Constants,
        objective: Objective,
        settings: MaskFit,
        train_constants: bool,
    ):
        device, F = passes.engine.model.device, len(knobs)
        self.sampler, self.knobs, self.passes, self.replacements = sampler, knobs, passes, replacements
        self.scales, self.objective, self.settings, self.train_constants = scales, objective, settings, train_constants
        self.device, self.edges = device, Edges.of(passes.engine.graph, device)
        self.parameters = tuple(sampler.start(1, 1))  # their names
        self.lambdas = torch.tensor(weights, device=device)
        rates = torch.tensor([base_rate(weight) for weight in weights], device=device)[:, None]
        self.rates = rates * settings.learning_rate / sampler.slower.get(replacements.ablation, 1.0)
        self.n_prompts = min(settings.n_prompts, len(passes.examples))
        self.n_rows = settings.n_samples * self.n_prompts  # R of a fit
        K, P = settings.n_samples, self.n_prompts
        slots = torch.arange(F)[:, None, None] * P + torch.arange(P)
        self.slots = slots.expand(F, K, P).flatten().to(device)
        self.generator = torch.Generator(device)
        # A CPU computes exponentials of the last numbers of a tensor in another way than those before: fits drawn
        # together would differ in the last bit from the same ones drawn alone.
        self.runs = [slice(fit, fit + 1) for fit in range(F)] if device.type == "cpu" else [slice(0, F)]

    def initial_state(self) -> State:
        """Parameters, constants, their moments, and no steps."""
        F = len(self.knobs)
        start = self.sampler.start(F, len(self.edges.index))
        state = {name: value.to(self.device) for name, value in start.items()}
        constants = self.replacements.start.repeat(F)
        state |= dict(zip(CONSTANTS, (part.clone() for part in constants), strict=True))
        moments = {
            f"{name}/{moment}": torch.zeros_like(value)
            for name, value in state.items()
            for moment in ("first", "second")
        }
        steps = {"step": torch.zeros((), dtype=torch.int64), LOSSES: torch.zeros(0, F), SIZES: torch.zeros(0, F)}
        return state | moments | steps

    def gradients(self, state: State) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """Of one step: mean losses [F], gradients by the names of the state, and expected sizes [F]."""
        step, edges, passes = int(state["step"]), self.edges, self.passes
        drawn = [prompts_of_step(len(passes.examples), self.n_prompts, knob.stream, step) for knob in self.knobs]
        chosen = uploaded(torch.cat(drawn), self.device)
        shape = (self.n_rows, len(edges.index))
        noise = torch.stack([_uniform(self.generator, knob, step, shape) for knob in self.knobs])
        parameters = {name: state[name].requires_grad_() for name in self.parameters}
        alpha, theta, penalty = self._sampled(state, noise, step / self.settings.steps)
        masks = edges.full(alpha.flatten(0, 1))  # [F R, J, S]
        masks = masks * edges.prune(masks.detach() > 0)
        constants, written = self._written(state, chosen, step)
        computed = passes.gradients(
            self.objective,
            chosen,
            self.slots,
            masks.detach(),
            written.detach(),
            owned=self.replacements.per_prompt,
            constants=self.train_constants,
            skip_dead=self.device.type == "cpu",
            apart=len(self.knobs),
        )
        torch.autograd.backward([masks, penalty], [computed.masks / self.n_rows, None])
        if constants is not None:
            assert computed.constants is not None
            written.backward(computed.constants / self.n_rows)
        with torch.no_grad():
            losses = computed.losses.view(len(self.knobs), -1).mean(1)
            gradients = {name: edges.clip(_gradient(parameters[name])) for name in self.parameters}
            if constants is not None:
                gradients |= {name: _gradient(state[name]) for name in CONSTANTS}
        return losses, gradients, theta.detach().sum(1)

    def _sampled(self, state: State, noise: Tensor, step_share: float) -> tuple[Tensor, Tensor, Tensor]:
        """Masks [F, R, E], expected sizes [F, E], and what they cost over all fits; differentiable."""
        alphas, thetas, penalty = [], [], torch.zeros((), device=self.device)
        for fits in self.runs:
            parameters = {name: state[name][fits] for name in self.parameters}
            second = {name: state[f"{name}/second"][fits] for name in self.parameters}
            alpha, theta = self.sampler.take(fits).sample(parameters, noise[fits], second, step_share)
            prices = self.lambdas[fits]
            of_nodes = (prices / 2).clamp(max=NODE_WEIGHT) * self.edges.node_term(theta)
            penalty = penalty + (prices * theta.sum(1) + of_nodes).sum()
            alphas.append(alpha)
            thetas.append(theta)
        return torch.cat(alphas), torch.cat(thetas), penalty

    def _written(self, state: State, chosen: Tensor, step: int) -> tuple[Constants | None, Tensor]:
        """What ablated edges carry, and the constants that it is differentiable in, if these are trained."""
        if not self.train_constants:
            return None, self.replacements.of(chosen, step)
        constants = Constants(*(state[name].requires_grad_() for name in CONSTANTS))
        return constants, constants.writes(self.passes.engine, self.passes.examples.prompts.n_tokens)

    @torch.no_grad()
    def descend(self, state: State, gradients: dict[str, Tensor]) -> None:
        """Adam's step number `state["step"]`, in place."""
        for name in self.parameters:
            _adam(state, name, gradients[name], self.rates, self.sampler.betas)
        if self.train_constants:
            for name, scale in zip(CONSTANTS, self.scales, strict=True):
                _adam(state, name, gradients[name], scale * self.settings.constants_rate, (0.9, 0.999))

    def masks(self, state: State) -> Masks:
        """What the sweep has learned."""
        constants = Constants(*(state[name].detach() for name in CONSTANTS)) if self.train_constants else None
        scores = torch.cat(
            [
                self.sampler.take(fits).score({name: state[name][fits].detach() for name in self.parameters})
                for fits in self.runs
            ]
        )
        return Masks(self.edges.full(scores), constants, state[LOSSES], state[SIZES])


def _uniform(generator: torch.Generator, knob: Knob, step: int, shape: tuple[int, int]) -> Tensor:
    """The noise of one fit's step, drawn on the device; seeded by both, so that any step can be drawn without those
    before it.
    """
    generator.manual_seed((knob.stream << 24) + step)
    return torch.rand(shape, generator=generator, device=generator.device)


def _gradient(parameter: Tensor) -> Tensor:
    """A parameter's gradient, taken off it; zeros if no loss reached it."""
    gradient, parameter.grad = parameter.grad, None
    return torch.zeros_like(parameter) if gradient is None else gradient


def _adam(state: State, name: str, gradient: Tensor, rate: Tensor, betas: tuple[float, float]) -> None:
    first, second = f"{name}/first", f"{name}/second"
    value, state[first], state[second] = adam_step(
        state[name].detach(), state[first], state[second], gradient, int(state["step"]), rate, betas
    )
    state[name] = value


def _record(state: State, since: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Add what the steps since the last time had: losses and expected sizes [F]."""
    for name, values in zip((LOSSES, SIZES), zip(*since, strict=True), strict=True):
        state[name] = torch.cat((state[name], torch.stack(values).cpu()))


def search_masks(
    request: SearchRequest,
    sampler: Sampler,
    weights: Sequence[float],
    kept: Callable[[np.ndarray], np.ndarray],
) -> Found:
    """The circuits of all knobs and seeds from learned masks, all fitted at once.

    Args:
        weights: lambda of each fit.
        kept: from scores float64 [F, J, S] in (0, 1) to the edges of each circuit, bool [F, J, S].
    """
    start = request.task.start(request.ablation)
    learned = learn(
        sampler,
        request.knobs,
        weights,
        request.task.passes["train"],
        request.task.replacements(request.ablation, "train", start),
        request.task.constant_scales,
        request.objective,
        request.masks,
        train_constants=EDGE_ABLATIONS[request.ablation].fitted,
        resumable=request.resumable,
        what=f"{request.task.name} {request.method} {request.ablation}",
    )
    circuits = kept(learned.scores.double().cpu().numpy())
    return Found(bool_masks(circuits), learned.scores.cpu(), {LOSSES: learned.step_losses, SIZES: learned.step_sizes})


def search_lambdas(request: SearchRequest, sampler: Sampler) -> Found:
    """The circuits of a sampler whose sizes lambda decides: of each fit the edges that are rather kept than not."""
    weights = [knob.value for knob in request.knobs]
    return search_masks(request, sampler, weights, lambda scores: by_threshold(request.graph, scores, KEPT))
