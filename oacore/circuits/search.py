"""A search for circuits: what it is asked, what it finds, and what searches share.

Each method is a function `search(request) -> Search` that its row in `oacore.config.circuits` names.

Symbols: C circuits, n knobs, J destinations, S sources.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from oacore.circuits.circuit import by_size
from oacore.circuits.task import CircuitTask
from oacore.config.circuits import (
    CIRCUIT_METHODS,
    CircuitMethod,
    Circuits,
    EdgeAblation,
    MaskFit,
    Objective,
    SearchMethod,
)
from oacore.errors import UserError
from oacore.fits.resume import NOT_KEPT, Resumable
from oacore.models.graph import Graph
from oacore.store.artefacts import read_tensors, write_tensors
from oacore.store.provenance import Provenance


@dataclass(frozen=True)
class SearchRequest:
    """Find the circuits of one method under one ablation type, one for each knob and seed."""

    task: CircuitTask
    settings: Circuits
    method: CircuitMethod
    ablation: EdgeAblation
    resumable: Resumable = NOT_KEPT

    @property
    def row(self) -> SearchMethod:
        """The method's row."""
        return CIRCUIT_METHODS[self.method]

    @property
    def graph(self) -> Graph:
        """The model's residual-stream graph."""
        return self.task.engine.graph

    @property
    def objective(self) -> Objective:
        """The loss that the method looks at."""
        return self.settings.objective_of(self.method)

    @property
    def knobs(self) -> tuple[float, ...]:
        """What the method sweeps."""
        return self.settings.knobs(self.method)

    @property
    def masks(self) -> MaskFit:
        """How masks are learned."""
        return self.settings.masks_under(self.ablation)

    @property
    def sizes(self) -> list[int]:
        """The knobs of a method that sweeps sizes, in edges. UserError for one beyond the graph."""
        return checked_sizes(self.knobs, self.graph.n_edges)

    def prompts(self, seed: int) -> Tensor:
        """The training prompts that edges are judged on: the first of the seed's own order."""
        order = torch.randperm(len(self.task.passes["train"].examples), generator=torch.Generator().manual_seed(seed))
        return order[: self.settings.n_prompts].to(self.task.engine.model.device)


@dataclass(frozen=True)
class Search:
    """Circuits of one method and ablation type, before they are judged."""

    masks: Tensor  # bool [C, J, S]
    scores: Tensor  # fp32 [C, J, S]
    knobs: list[float]
    seeds: list[int]
    curves: dict[str, Tensor]

    def save(self, path: str | Path, provenance: Provenance) -> None:
        """Write search.safetensors."""
        tensors = {"masks": self.masks, "scores": self.scores.float()}
        tensors |= {f"curves/{name}": value for name, value in self.curves.items()}
        write_tensors(path, tensors, provenance.noting(knobs=self.knobs, seeds=self.seeds))

    @classmethod
    def load(cls, path: str | Path, provenance: Provenance) -> "Search":
        """Read search.safetensors.

        Raises:
            UserError: the file is damaged, or of another model or other prompts.
        """
        facts, tensors = read_tensors(path, provenance)
        curves = {name.removeprefix("curves/"): value for name, value in tensors.items() if name.startswith("curves/")}
        return cls(tensors["masks"], tensors["scores"], facts["knobs"], facts["seeds"], curves)


def seed_by_seed(request: SearchRequest, find: Callable[[int], tuple[np.ndarray, np.ndarray]]) -> Search:
    """The circuits of all knobs and seeds, by knob.

    Args:
        find: from a seed to the circuits of all knobs, bool [n, J, S], and their scores [n, J, S].

    Raises:
        UserError: a score is not finite.
    """
    seeds = request.settings.seeds
    masks, scores = zip(*(find(seed) for seed in seeds), strict=True)
    if not all(np.isfinite(values).all() for values in scores):
        raise UserError(
            f"{request.task.name} {request.method} {request.ablation}: scores are not finite; allowed: a model with "
            "finite weights and activations"
        )
    each = [(knob, seed) for knob in range(len(request.knobs)) for seed in range(len(seeds))]
    return Search(
        bool_masks(np.stack([masks[seed][knob] for knob, seed in each])),
        torch.from_numpy(np.stack([scores[seed][knob] for knob, seed in each]).astype(np.float32)),
        [request.knobs[knob] for knob, _ in each],
        [seeds[seed] for _, seed in each],
        {},
    )


def by_ranking(request: SearchRequest, rank: Callable[[int], Tensor]) -> Search:
    """The circuits of the edges with the largest scores, whatever their sign, for every size.

    Args:
        rank: from a seed to the scores of all edges [J, S].
    """
    sizes = np.array(request.sizes)

    def find(seed: int) -> tuple[np.ndarray, np.ndarray]:
        scores = rank(seed).cpu().numpy()
        masks = by_size(request.graph, np.abs(scores), sizes)
        return masks, np.broadcast_to(scores, masks.shape)

    return seed_by_seed(request, find)


def edges_of(size: float, n_edges: int) -> int:
    """A size of the config in edges: those below 1 are shares."""
    return max(1, round(size * n_edges)) if size < 1 else int(size)


def checked_sizes(sizes: Sequence[float], n_edges: int) -> list[int]:
    """All sizes in edges.

    Raises:
        UserError: a size is beyond the graph.
    """
    edges = [edges_of(size, n_edges) for size in sizes]
    if too_large := [f"{size:g}" for size, count in zip(sizes, edges, strict=True) if count > n_edges]:
        raise UserError(
            f"circuits.sizes: {', '.join(too_large)}; allowed: up to the graph's {n_edges} edges, or shares below 1"
        )
    return edges


def bool_masks(masks: np.ndarray) -> Tensor:
    """Masks [C, J, S] as a tensor of their own memory."""
    return torch.from_numpy(np.ascontiguousarray(masks, bool))
