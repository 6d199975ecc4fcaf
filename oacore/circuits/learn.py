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
from oacore.draws import prompts_of_step
from oacore.fits.descent import adam_step
from oacore.fits.replayed import Replayed
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

    def schedule(self, step_share: float, n_edges: int) -> Tensor:
        """What of the distribution depends on how far the fit is, a share in [0, 1]: [F], or [0] if nothing does."""

    def sample(self, parameters: State, noise: Tensor, second: State, schedule: Tensor) -> tuple[Tensor, Tensor]:
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
CONSTANTS_BETAS = (0.9, 0.999)


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
    since: list[tuple[Tensor, ...]] = []
    watch, every_fit = Watch(resumable.path, int(state["step"])), torch.arange(n_fits, device=device)
    fits = [f"{what} {knob.value:g} (seed {knob.seed})" for knob in knobs]

    def take(number: float | Tensor, *drawn: Tensor) -> tuple[Tensor, ...]:
        losses, gradients, sizes = sweep.gradients(state, *drawn)
        named = {"loss": losses} | {f"gradient of {name}": value for name, value in gradients.items()}
        for name, values in named.items():
            watch.see(name, values, number, every_fit)
        sweep.descend(state, gradients, number)
        return losses, sizes

    taken = Replayed(take, device)
    with progress(what=what, unit="steps", total=settings.steps, initial=int(state["step"])) as bar:
        while (step := int(state["step"])) < settings.steps:
            since.append(taken(step + 1, *sweep.draw(step)))
            state["step"] += 1
            bar.update()
            if len(since) == settings.record_every or step + 1 == settings.steps:
                watch.check(fits, ADVICE)  # the one place where the host waits for the device
                _record(state, since)
                since = []
                resumable.save(state)
                watch.saved = step + 1
    return sweep.masks(state)


class _Sweep:
    """The fits of all knobs side by side; what changes from step to step is the state, in place, and what is drawn."""

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

    def draw(self, step: int) -> tuple[Tensor, ...]:
        """What a step draws: noise [F, R, E], drawn on the device; its part of the schedule; the prompts of every fit
        [F P]; and what replacements draw.
        """
        n_edges, n_prompts = len(self.edges.index), len(self.passes.examples)
        shape = (self.n_rows, n_edges)
        noise = torch.stack([_uniform(self.generator, knob, step, shape) for knob in self.knobs])
        chosen = [prompts_of_step(n_prompts, self.n_prompts, knob.stream, step) for knob in self.knobs]
        schedule = self.sampler.schedule(step / self.settings.steps, n_edges)
        return noise, schedule, torch.cat(chosen), *(() if self.train_constants else self.replacements.drawn(step))

    def gradients(
        self, state: State, noise: Tensor, schedule: Tensor, chosen: Tensor, *drawn: Tensor
    ) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """Of one step: mean losses [F], gradients by the names of the state, and expected sizes [F]."""
        edges, passes = self.edges, self.passes
        parameters = {name: state[name].detach().requires_grad_() for name in self.parameters}
        alpha, theta, penalty = self._sampled(state, parameters, noise, schedule)
        masks = edges.full(alpha.flatten(0, 1))  # [F R, J, S]
        masks = masks * edges.prune(masks.detach() > 0)
        constants, written = self._written(state, chosen, drawn)
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
        outer = computed.masks / self.n_rows, torch.ones_like(penalty)
        slopes = torch.autograd.grad((masks, penalty), tuple(parameters.values()), outer, materialize_grads=True)
        with torch.no_grad():
            losses = computed.losses.view(len(self.knobs), -1).mean(1)
            gradients = {name: edges.clip(slope) for name, slope in zip(parameters, slopes, strict=True)}
            if constants is not None:
                assert computed.constants is not None
                outer_constants = computed.constants / self.n_rows
                slopes = torch.autograd.grad(written, tuple(constants), outer_constants, materialize_grads=True)
                gradients |= dict(zip(CONSTANTS, slopes, strict=True))
        return losses, gradients, theta.detach().sum(1)

    def _sampled(
        self, state: State, parameters: State, noise: Tensor, schedule: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Masks [F, R, E], expected sizes [F, E], and what they cost over all fits; differentiable."""
        alphas, thetas, penalty = [], [], torch.zeros((), device=self.device)
        for fits in self.runs:
            own = {name: values[fits] for name, values in parameters.items()}
            second = {name: state[f"{name}/second"][fits] for name in parameters}
            alpha, theta = self.sampler.take(fits).sample(own, noise[fits], second, schedule[fits])
            prices = self.lambdas[fits]
            of_nodes = (prices / 2).clamp(max=NODE_WEIGHT) * self.edges.node_term(theta)
            penalty = penalty + (prices * theta.sum(1) + of_nodes).sum()
            alphas.append(alpha)
            thetas.append(theta)
        return torch.cat(alphas), torch.cat(thetas), penalty

    def _written(self, state: State, chosen: Tensor, drawn: Sequence[Tensor]) -> tuple[Constants | None, Tensor]:
        """What ablated edges carry, and the constants that it is differentiable in, if these are trained."""
        if not self.train_constants:
            return None, self.replacements.given(chosen, *drawn)
        constants = Constants(*(state[name].detach().requires_grad_() for name in CONSTANTS))
        return constants, constants.writes(self.passes.engine, self.passes.examples.prompts.n_tokens)

    @torch.no_grad()
    def descend(self, state: State, gradients: dict[str, Tensor], number: float | Tensor) -> None:
        """Adam's step of this number, in place."""
        groups = [(self.parameters, [self.rates] * len(self.parameters), self.sampler.betas)]
        if self.train_constants:
            groups.append((CONSTANTS, [scale * self.settings.constants_rate for scale in self.scales], CONSTANTS_BETAS))
        for names, rates, betas in groups:
            values, firsts, seconds = ([state[name + part] for name in names] for part in ("", "/first", "/second"))
            adam_step(values, firsts, seconds, [gradients[name] for name in names], number, rates, betas)

    def masks(self, state: State) -> Masks:
        """What the sweep has learned."""
        constants = Constants(*(state[name] for name in CONSTANTS)) if self.train_constants else None
        scores = torch.cat(
            [self.sampler.take(fits).score({name: state[name][fits] for name in self.parameters}) for fits in self.runs]
        )
        return Masks(self.edges.full(scores), constants, state[LOSSES], state[SIZES])


def _uniform(generator: torch.Generator, knob: Knob, step: int, shape: tuple[int, int]) -> Tensor:
    """The noise of one fit's step, drawn on the device; seeded by both, so that any step can be drawn without those
    before it.
    """
    generator.manual_seed((knob.stream << 24) + step)
    return torch.rand(shape, generator=generator, device=generator.device)


def _record(state: State, since: Sequence[tuple[Tensor, ...]]) -> None:
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
