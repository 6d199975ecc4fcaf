"""Learning edge masks: all lambdas and seeds of a sweep are one vectorised fit (Li & Janson 2024, section 3 and appendix).

Each fit has its own parameters, Adam state, constants, prompts and random numbers, all drawn from its own stream, so that a sweep equals
its fits made one by one. Loss = E[objective] + lambda sum(theta) + node regulariser; sampled masks lose their dangling edges; constants
are trained along, through edges that are fully ablated only. The state is one dictionary of tensors and every step's random numbers
follow from stream and step: a checkpoint resumes bit by bit.

Symbols: F fits, K samples, P prompts a step, R = K P, E edges, S sources, J destinations.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

from oacore.circuits.patching import Constants, Passes, Replacements
from oacore.circuits.ugs import State
from oacore.config import MaskFit, Objective
from oacore.descent import Watch, adam_step, prompts_of_step
from oacore.graph import Graph
from oacore.progress import progress
from oacore.resume import load_state, save_state

CLIP = 5.0  # gradient norm per edge group
NODE_WEIGHT = 2e-4  # largest weight of the node regulariser


class Sampler(Protocol):
    """A distribution over masks with learned parameters."""

    betas: ClassVar[tuple[float, float]]
    slower: ClassVar[dict[str, float]]  # ablation types that want smaller steps, and by what

    def start(self, n_fits: int, n_edges: int) -> State:
        """Initial parameters, [F, E] each."""

    def sample(self, parameters: State, noise: Tensor, second: State, step_share: float) -> tuple[Tensor, Tensor]:
        """Masks [F, R, E] and expected sizes [F, E]."""

    def score(self, parameters: State) -> Tensor:
        """[F, E] in (0, 1); the circuit is what lies above 1/2."""


@dataclass(frozen=True)
class Knob:
    """One fit of a sweep: its lambda (or size) and seed."""

    value: float
    seed: int

    @property
    def stream(self) -> int:
        """Seed of all its random numbers."""
        return int.from_bytes(hashlib.sha256(f"{self.value!r} {self.seed}".encode()).digest()[:4], "big")


@dataclass(frozen=True)
class Masks:
    """What a sweep learned."""

    scores: Tensor  # [F, J, S] in (0, 1), 0 where no edge
    constants: Constants | None
    curve_steps: Tensor  # [c]
    curve_losses: Tensor  # [c, F] mean objective of the steps since the last entry
    curve_sizes: Tensor  # [c, F] expected edges


def base_rate(weight: float) -> float:
    """Learning rate of the logits by lambda (reference-figures A.4)."""
    return 0.15 if weight <= 1e-4 else 0.1 if weight <= 5e-4 else 0.05


@dataclass(frozen=True)
class Edges:
    """The graph's E edges as flat indices, and what the regulariser and the clip group them by."""

    graph: Graph
    index: Tensor  # [E] into a flattened [J S]
    group: Tensor  # [E] layer, kind of destination (attention, MLP or logits), kind of source (head; MLP or input)
    n_groups: int
    writer: Tensor  # [L H] the source of each head
    readers: tuple[Tensor, Tensor, Tensor]  # its q, k and v destinations

    @classmethod
    def of(cls, graph: Graph, device: torch.device) -> "Edges":
        j, s = np.nonzero(graph.valid)
        layer = np.searchsorted([graph.first_destination(layer + 1) for layer in range(graph.n_layers)], j, side="right")
        is_mlp = np.isin(j, [graph.mlp_destination(layer) for layer in range(graph.n_layers)] + [graph.n_destinations - 1])
        from_head = ~np.isin(s, [0] + [graph.mlp_source(layer) for layer in range(graph.n_layers)])
        heads = np.arange(graph.n_heads)
        layers = range(graph.n_layers)
        readers = (
            np.concatenate([graph.qkv(layer)[0].start + heads for layer in layers]),
            *(np.concatenate([graph.qkv(layer)[part].start + heads // graph.group_size for layer in layers]) for part in (1, 2)),
        )

        def tensor(array: np.ndarray) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(array)).to(device)

        return cls(
            graph,
            tensor(j * graph.n_sources + s),
            tensor(layer * 4 + is_mlp * 2 + from_head),
            4 * (graph.n_layers + 1),
            tensor(np.concatenate([graph.first_source(layer) + heads for layer in layers])),
            tuple(map(tensor, readers)),  # type: ignore[arg-type]
        )

    def full(self, values: Tensor) -> Tensor:
        """Values [..., E] as [..., J, S], zeros where there is no edge; differentiable."""
        flat = values.new_zeros((*values.shape[:-1], self.graph.n_destinations * self.graph.n_sources))
        return flat.index_copy(-1, self.index, values).unflatten(-1, (self.graph.n_destinations, self.graph.n_sources))

    def node_term(self, theta: Tensor) -> Tensor:
        """tanh(2 in-and-out-degree / (L H)) L H / 2 summed over heads, [F]: it favours circuits with few heads."""
        full = self.full(theta)
        into, out = full.sum(2), full.sum(1)  # [F, J], [F, S]
        q, k, v = (into[:, reader] for reader in self.readers)
        n = len(self.writer)
        degree = out[:, self.writer] + q + (k + v) / self.graph.group_size
        return ((2 * degree / n).tanh() * n / 2).sum(1)

    def clip(self, gradient: Tensor) -> Tensor:
        """A gradient [F, E] with the norm of every group of edges of every fit at most CLIP."""
        squares = gradient.new_zeros((len(gradient), self.n_groups)).index_add(1, self.group, gradient.square())
        return gradient * (CLIP / squares.sqrt().clamp(min=CLIP))[:, self.group]


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
    checkpoint: Path | None = None,
    identity: str = "",
    what: str = "masks",
) -> Masks:
    """Fit the masks of all knobs.

    Args:
        weights: lambda of each fit; 0 for samplers that fix the size.
        scales: unit of the constants' learning rate.
        checkpoint: file to resume from and to save to; removed by the caller when its result is safe.

    Raises:
        UserError: a loss or gradient is not finite; names step, parameters, knobs, and the last good checkpoint.
    """
    engine, graph = passes.engine, passes.engine.graph
    device, n_fits = engine.model.device, len(knobs)
    edges = Edges.of(graph, device)
    lambdas = torch.tensor(weights, device=device)
    rates = torch.tensor([base_rate(weight) for weight in weights], device=device)[:, None] * settings.learning_rate
    rates = rates / sampler.slower.get(replacements.ablation, 1.0)
    names = tuple(sampler.start(1, 1))
    state = load_state(checkpoint, identity, device) or _initial_state(sampler, replacements.start, n_fits, len(edges.index), device)
    K, P = settings.n_samples, min(settings.n_prompts, len(passes.examples))
    slots = (torch.arange(n_fits)[:, None, None] * P + torch.arange(P)).expand(n_fits, K, P).flatten().to(device)
    generator = torch.Generator(device)
    loss_sum, since = torch.zeros(n_fits, device=device), 0
    watch, every_fit = Watch(checkpoint, int(state["step"])), torch.arange(n_fits, device=device)
    fits = [f"{what} {knob.value:g} (seed {knob.seed})" for knob in knobs]
    with progress(what=what, unit="steps", total=settings.n_steps, initial=int(state["step"])) as bar:
        while int(state["step"]) < settings.n_steps:
            step = int(state["step"])
            chosen = torch.cat([prompts_of_step(len(passes.examples), P, knob.stream, step) for knob in knobs]).to(device)
            noise = torch.stack([_uniform(generator, knob, step, (K * P, len(edges.index))) for knob in knobs])
            parameters = {name: state[name].requires_grad_() for name in names}
            second = {name: state[f"{name}/second"] for name in names}
            alpha, theta = sampler.sample(parameters, noise, second, step / settings.n_steps)
            masks = edges.full(alpha.flatten(0, 1))  # [F R, J, S]
            masks = masks * graph.prune(masks.detach() > 0)
            constants = Constants(*(state[name].requires_grad_() for name in CONSTANTS)) if train_constants else None
            written = replacements.of(chosen, step) if constants is None else constants.writes(engine, passes.examples.prompts.n_tokens)
            found = passes.gradients(
                objective,
                chosen,
                slots,
                masks.detach(),
                written.detach(),
                owned=replacements.per_prompt,
                constants=train_constants,
                skip_dead=device.type == "cpu",
            )
            penalty = (lambdas * theta.sum(1) + (lambdas / 2).clamp(max=NODE_WEIGHT) * edges.node_term(theta)).sum()
            torch.autograd.backward([masks, penalty], [found.masks / (K * P), None])
            if constants is not None:
                assert found.constants is not None
                written.backward(found.constants / (K * P))
            state["step"] += 1
            with torch.no_grad():
                losses = found.losses.view(n_fits, -1).mean(1)
                gradients = {name: edges.clip(_gradient(parameters[name])) for name in names}
                if constants is not None:
                    gradients |= {name: _gradient(state[name]) for name in CONSTANTS}
                for seen, values in {"loss": losses, **{f"gradient of {name}": value for name, value in gradients.items()}}.items():
                    watch.see(seen, values, step + 1, every_fit)
                for name in names:
                    _adam(state, name, gradients[name], rates, sampler.betas)
                if constants is not None:
                    for name, scale in zip(CONSTANTS, scales, strict=True):
                        _adam(state, name, gradients[name], scale * settings.constants_rate, (0.9, 0.999))
                loss_sum += losses
            since += 1
            bar.update()
            if since == settings.record_every or int(state["step"]) == settings.n_steps:
                watch.check(fits, ADVICE)  # the one place where the host waits for the device
                _record(state, loss_sum / since, theta.detach().sum(1))
                loss_sum, since = torch.zeros(n_fits, device=device), 0
                if checkpoint is not None:
                    save_state(checkpoint, state, identity)
                    watch.saved = int(state["step"])
    fitted = Constants(*(state[name].detach() for name in CONSTANTS)) if train_constants else None
    scores = edges.full(sampler.score({name: state[name].detach() for name in names}))
    return Masks(scores, fitted, state["curve_steps"], state["curve_losses"], state["curve_sizes"])


ADVICE = "allowed: a smaller circuits.masks.learning_rate or constants_rate, and a model with finite weights"
CONSTANTS = tuple(f"constants/{name}" for name in Constants._fields)


def _initial_state(sampler: Sampler, start: Constants, n_fits: int, n_edges: int, device: torch.device) -> State:
    state = {name: value.to(device) for name, value in sampler.start(n_fits, n_edges).items()}
    state |= dict(zip(CONSTANTS, (part.clone() for part in start.repeat(n_fits)), strict=True))
    state |= {f"{name}/{moment}": torch.zeros_like(value) for name, value in state.items() for moment in ("first", "second")}
    nothing = torch.zeros(0, n_fits)
    return state | {
        "step": torch.zeros((), dtype=torch.int64),
        "curve_steps": torch.zeros(0, dtype=torch.int64),
        "curve_losses": nothing,
        "curve_sizes": nothing.clone(),
    }


def _uniform(generator: torch.Generator, knob: Knob, step: int, shape: tuple[int, int]) -> Tensor:
    """The noise of one fit's step, drawn on the device; seeded by both, so that any step can be drawn without those before it."""
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


def _record(state: State, losses: Tensor, sizes: Tensor) -> None:
    """Add a point to the curves."""
    state["curve_steps"] = torch.cat((state["curve_steps"], state["step"][None]))
    state["curve_losses"] = torch.cat((state["curve_losses"], losses.cpu()[None]))
    state["curve_sizes"] = torch.cat((state["curve_sizes"], sizes.cpu()[None]))
