"""ACDC (Conmy et al. 2023): walk the edges from the logits back to the input and drop each one that the loss hardly
misses.

All thresholds are swept at once. Edges are judged several at a time on the guess that all of them go: the guess is
checked in order, and what follows the first edge that stays is judged again, so the result is that of one edge after
the other.

Symbols: C thresholds, n chosen prompts, J destinations, S sources.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from oacore.circuits.passes import Passes
from oacore.circuits.replacements import Replacements
from oacore.circuits.search import Found, SearchRequest, seed_by_seed
from oacore.config.circuits import CIRCUIT_METHODS, Objective
from oacore.fits.resume import NOT_KEPT, Resumable, State
from oacore.models.graph import Graph
from oacore.progress import progress
from oacore.store.artefacts import digest_of_tensors

GUESSES = CIRCUIT_METHODS["acdc"].masks_at_once  # edges judged at once


def sweep_order(graph: Graph) -> np.ndarray:
    """Every edge (j, s) [E, 2]: from the last destination to the first, for each from its latest source to its
    first.
    """
    order: np.ndarray = np.argwhere(graph.valid)[::-1]
    return order


@dataclass
class _Walk:
    """How far the walk of every threshold has come."""

    order: np.ndarray  # [E, 2]
    masks: np.ndarray  # bool [C, J, S]
    rises: np.ndarray  # [C, J, S] of the loss, by which each edge was judged
    current: np.ndarray  # [C] loss with the edges that are left
    place: np.ndarray  # [C] in the order

    def state(self) -> State:
        """What goes on from here."""
        parts = {"masks": self.masks, "rises": self.rises, "current": self.current, "place": self.place}
        return {name: torch.from_numpy(value.copy()) for name, value in parts.items()}

    def guess(self, graph: Graph, c: int, guesses: int) -> tuple[list[int], list[np.ndarray]]:
        """The places of the next edges of threshold c, on the guess that all of them go, and what is left after
        each.
        """
        mask, places, candidates = self.masks[c], list[int](), list[np.ndarray]()
        at = int(self.place[c])
        while at < len(self.order) and len(places) < guesses:
            j, s = self.order[at]
            if mask[j, s]:
                mask = mask.copy()
                mask[j, s] = False
                mask = graph.prune(mask)
                candidates.append(mask)
                places.append(at)
            at += 1
        return places, candidates

    def judge(
        self, c: int, threshold: float, places: list[int], candidates: list[np.ndarray], losses: np.ndarray
    ) -> None:
        """Take the guesses of threshold c in order, up to the first edge that stays."""
        if not places:
            self.place[c] = len(self.order)
        for at, mask, loss in zip(places, candidates, losses, strict=True):
            j, s = self.order[at]
            self.rises[c, j, s] = loss - self.current[c]
            self.place[c] = at + 1
            if self.rises[c, j, s] >= threshold:
                return
            self.masks[c], self.current[c] = mask, loss


def acdc(
    passes: Passes,
    replacements: Replacements,
    thresholds: Sequence[float],
    chosen: Tensor,
    objective: Objective,
    guesses: int = GUESSES,
    resumable: Resumable = NOT_KEPT,
) -> tuple[np.ndarray, np.ndarray]:
    """Circuits of all thresholds.

    Args:
        resumable: where the walk is kept.

    Returns:
        masks bool [C, J, S] and the rise of the loss [C, J, S] by which each edge was judged; 0 where it dangled
        already.
    """
    graph = passes.engine.graph
    losses = _mean_losses(passes, replacements, chosen, objective)
    order, C = sweep_order(graph), len(thresholds)
    if (state := resumable.load()) is not None:
        walk = _Walk(order, **{name: value.numpy() for name, value in state.items()})
    else:
        masks = np.repeat(graph.valid[None], C, 0)
        current = np.repeat(losses(masks[:1]), C)
        walk = _Walk(order, masks, np.zeros(masks.shape), current, np.zeros(C, int))
    done = int(walk.place.sum())
    with progress(what="acdc", unit="edges", total=len(order) * C, initial=done) as bar:
        while (running := np.flatnonzero(walk.place < len(order))).size:
            chains = {c: walk.guess(graph, c, guesses) for c in running.tolist()}
            candidates = [mask for _, masks_of_c in chains.values() for mask in masks_of_c]
            judged = losses(np.stack(candidates)) if candidates else np.zeros(0)
            first = 0
            for c, (places, masks_of_c) in chains.items():
                walk.judge(c, thresholds[c], places, masks_of_c, judged[first : first + len(places)])
                first += len(places)
            bar.update(int(walk.place.sum()) - done)
            done = int(walk.place.sum())
            resumable.save_sometimes(walk.state())
    return walk.masks, walk.rises


def _mean_losses(
    passes: Passes, replacements: Replacements, chosen: Tensor, objective: Objective
) -> Callable[[np.ndarray], np.ndarray]:
    """From masks bool [M, J, S] to the mean loss [M] over the chosen prompts."""
    replacement, slots = replacements.of(chosen), torch.arange(len(chosen), device=chosen.device)

    def mean_losses(masks: np.ndarray) -> np.ndarray:
        wide, owned = torch.from_numpy(masks).to(chosen.device).float(), replacements.per_prompt
        losses = passes.losses(objective, chosen, slots.repeat(len(wide)), wide, replacement, owned=owned)
        means: np.ndarray = losses.view(len(wide), -1).double().mean(1).cpu().numpy()
        return means

    return mean_losses


def search(request: SearchRequest) -> Found:
    """ACDC's circuits, one for each threshold and seed."""
    passes, replacements = request.task.passes["train"], request.replacements
    digest = digest_of_tensors(replacements.start._asdict())

    def walk(seed: int, thresholds: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
        chosen = request.prompts(seed)
        resumable = request.resumable.part(str(seed), chosen.tolist(), digest)
        return acdc(passes, replacements, thresholds, chosen, request.objective, resumable=resumable)

    return seed_by_seed(request, walk)
