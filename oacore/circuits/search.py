"""A search for circuits: what it is asked, what it finds, and what searches share.

The row of a method in `oacore.config.circuits` names its function. One that searches is `search(request) -> Found`,
with a circuit for each knob and seed of the request. One that ranks is `rank(request, seed) -> scores [J, S]`: circuits
of all sizes are its best edges. What is found is an item of the store: a learned mask, a threshold's walk, a seed's
scores.

Symbols: C circuits, n knobs, J destinations, S sources.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from oacore.circuits.circuit import by_size
from oacore.circuits.replacements import Replacements
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
from oacore.store.artefacts import write_tensors
from oacore.store.items import Item, Items
from oacore.store.provenance import Provenance

LOSSES, SIZES = "step_losses", "step_sizes"  # of a learned mask, by step


@dataclass(frozen=True)
class Knob:
    """What one circuit is asked for with: the value of what its method sweeps, and a seed."""

    value: float
    seed: int

    @property
    def stream(self) -> int:
        """Seed of all its random numbers."""
        return int.from_bytes(hashlib.sha256(f"{self.value!r} {self.seed}".encode()).digest()[:4], "big")


@dataclass(frozen=True)
class SearchRequest:
    """Find circuits of one method under one ablation type: by default one for each knob and seed of the settings."""

    task: CircuitTask
    settings: Circuits
    method: CircuitMethod
    ablation: EdgeAblation
    knobs: Sequence[Knob] = ()
    resumable: Resumable = NOT_KEPT

    @classmethod
    def of_all(
        cls, task: CircuitTask, settings: Circuits, method: CircuitMethod, ablation: EdgeAblation
    ) -> "SearchRequest":
        """Every circuit that the settings ask for, by knob."""
        knobs = [Knob(value, seed) for value in settings.knobs(method) for seed in settings.seeds]
        return cls(task, settings, method, ablation, knobs)

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
    def masks(self) -> MaskFit:
        """How masks are learned."""
        return self.settings.masks_under(self.ablation)

    @property
    def seeds(self) -> list[int]:
        """Every seed once."""
        return list(dict.fromkeys(knob.seed for knob in self.knobs))

    @property
    def sizes(self) -> list[int]:
        """The knobs of a method that sweeps sizes, in edges. UserError for one beyond the graph."""
        return checked_sizes([knob.value for knob in self.knobs], self.graph.n_edges)

    @cached_property
    def replacements(self) -> Replacements:
        """What ablated edges carry on the training prompts, for a search that trains no constants."""
        return self.task.replacements(self.ablation, "train", self.task.component_constants(self.ablation))

    def prompts(self, seed: int) -> Tensor:
        """The training prompts that edges are judged on: the first of the seed's own order."""
        order = torch.randperm(len(self.task.passes["train"].examples), generator=torch.Generator().manual_seed(seed))
        return order[: self.settings.n_prompts].to(self.task.engine.model.device)


@dataclass(frozen=True)
class Found:
    """Circuits as a method found them."""

    masks: Tensor  # bool [C, J, S]
    scores: Tensor  # fp32 [C, J, S]
    curves: dict[str, Tensor] = field(default_factory=dict)  # [n_steps, C] each, of learned masks


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


def find(request: SearchRequest, items: Items) -> tuple[Search, list[dict[str, Any]]]:
    """Every circuit of a request, from the store or searched for now, and what each took: seconds, peak_mb.

    Args:
        items: of the kind, determined by all that the method reads but knobs and seeds.

    Raises:
        UserError: a score is not finite.
    """
    return _ranked(request, items) if request.row.ranks else _searched(request, items)


def _searched(request: SearchRequest, items: Items) -> tuple[Search, list[dict[str, Any]]]:
    wanted = [{"knob": knob.value, "seed": knob.seed} for knob in request.knobs]

    def compute(new: list[int]) -> list[Item]:
        resumable = request.resumable.part("search", items.identity([wanted[index] for index in new]))
        found: Found = request.row.load()(
            replace(request, knobs=[request.knobs[index] for index in new], resumable=resumable)
        )
        _check_finite(request, found.scores)
        return [
            Item(
                {"mask": found.masks[row], "scores": found.scores[row].float()}
                | {name: curve[:, row] for name, curve in found.curves.items()}
            )
            for row in range(len(new))
        ]

    of_circuits = items.get(wanted, compute, f"{request.task.name} {request.method} {request.ablation}")
    masks, scores = (torch.stack([item.tensors[name] for item in of_circuits]) for name in ("mask", "scores"))
    return _search(request, masks, scores, _curves(of_circuits, request.masks.record_every)), [
        dict(item.noted) for item in of_circuits
    ]


def _ranked(request: SearchRequest, items: Items) -> tuple[Search, list[dict[str, Any]]]:
    seeds, sizes = request.seeds, request.sizes

    def compute(new: list[int]) -> list[Item]:
        asked = replace(request, resumable=request.resumable.part("scores", items.identity([])))
        scores = [request.row.load()(asked, seeds[index]).cpu() for index in new]
        _check_finite(request, torch.stack(scores))
        return [Item({"scores": values.float()}) for values in scores]

    what = f"{request.task.name} {request.method} {request.ablation} scores"
    of_seed = dict(zip(seeds, items.get([{"seed": seed} for seed in seeds], compute, what), strict=True))
    scores = torch.stack([of_seed[knob.seed].tensors["scores"] for knob in request.knobs])
    masks = by_size(request.graph, scores.abs().numpy(), np.array(sizes))
    share = len(seeds) / len(request.knobs)  # of a seed's scores all its circuits are made
    noted = [of_seed[knob.seed].noted for knob in request.knobs]
    took = [{"seconds": note["seconds"] * share, "peak_mb": note["peak_mb"]} for note in noted]
    return _search(request, bool_masks(masks), scores, {}), took


def _search(request: SearchRequest, masks: Tensor, scores: Tensor, curves: dict[str, Tensor]) -> Search:
    values, seeds = [knob.value for knob in request.knobs], [knob.seed for knob in request.knobs]
    return Search(masks, scores, values, seeds, curves)


def _curves(of_circuits: Sequence[Item], every: int) -> dict[str, Tensor]:
    """Of learned masks, points [c] and means [c, C] of the losses since the last one; sizes [c, C] at them."""
    if LOSSES not in of_circuits[0].tensors:
        return {}
    losses, sizes = (torch.stack([item.tensors[name] for item in of_circuits], 1) for name in (LOSSES, SIZES))
    parts = losses.split(every)
    steps = torch.tensor([len(part) for part in parts]).cumsum(0)
    return {"steps": steps, "losses": torch.stack([part.mean(0) for part in parts]), "sizes": sizes[steps - 1]}


def _check_finite(request: SearchRequest, scores: Tensor) -> None:
    if not scores.isfinite().all():
        raise UserError(
            f"{request.task.name} {request.method} {request.ablation}: scores are not finite; allowed: a model with "
            "finite weights and activations"
        )


def seed_by_seed(
    request: SearchRequest, search: Callable[[int, Sequence[float]], tuple[np.ndarray, np.ndarray]]
) -> Found:
    """The circuits of a method that goes by seeds.

    Args:
        search: from a seed and its n knobs to their circuits, bool [n, J, S], and scores [n, J, S].
    """
    masks = np.zeros((len(request.knobs), *request.graph.valid.shape), bool)
    scores = np.zeros(masks.shape)
    for seed in request.seeds:
        rows = [row for row, knob in enumerate(request.knobs) if knob.seed == seed]
        masks[rows], scores[rows] = search(seed, [request.knobs[row].value for row in rows])
    return Found(bool_masks(masks), torch.from_numpy(scores.astype(np.float32)))


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
