"""ACDC (Conmy et al. 2023): walk the edges from the logits back to the input and drop each one that the loss hardly misses.

All thresholds are swept at once. Edges are judged several at a time on the guess that all of them go: the guess is checked in order, and
what follows the first edge that stays is judged again, so the result is that of one edge after the other.

Symbols: C thresholds, n chosen prompts, J destinations, S sources.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from oacore.circuits.patching import Passes, Replacements
from oacore.config import Objective
from oacore.graph import Graph
from oacore.progress import progress
from oacore.resume import Kept

STATE = ("masks", "rises", "current", "place")
GUESSES = 4  # edges judged at once: more waste passes where an edge stays, fewer leave a GPU idle


def sweep_order(graph: Graph) -> np.ndarray:
    """Every edge (j, s) [E, 2], from the last destination to the first, and for each from its latest source to its earliest."""
    order: np.ndarray = np.argwhere(graph.valid)[::-1]
    return order


def acdc(
    passes: Passes,
    replacements: Replacements,
    thresholds: Sequence[float],
    chosen: Tensor,
    objective: Objective,
    guesses: int = GUESSES,
    kept: Kept | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Circuits of all thresholds.

    Args:
        kept: what goes on from an earlier call; removed by the caller when its result is safe.

    Returns:
        masks bool [C, J, S] and the rise of the loss [C, J, S] by which each edge was judged; 0 where it dangled already.
    """
    graph = passes.engine.graph
    order, device = sweep_order(graph), chosen.device
    masks = np.repeat(graph.valid[None], len(thresholds), 0)
    rises = np.zeros(masks.shape)
    replacement, slots = replacements.of(chosen), torch.arange(len(chosen), device=device)

    def losses(candidates: np.ndarray) -> np.ndarray:
        own = torch.from_numpy(candidates).to(device).float()
        found = passes.losses(objective, chosen, slots.repeat(len(own)), own, replacement, owned=replacements.per_prompt)
        result: np.ndarray = found.view(len(own), -1).double().mean(1).cpu().numpy()
        return result

    kept = kept or Kept(None)
    if (state := kept.load()) is not None:
        masks, rises, current, place = (state[name].numpy() for name in STATE)
    else:
        current = np.repeat(losses(masks[:1]), len(thresholds))
        place = np.zeros(len(thresholds), int)  # in the order
    with progress(what="acdc", unit="edges", total=len(order) * len(thresholds), initial=int(place.sum())) as bar:
        while (running := np.flatnonzero(place < len(order))).size:
            chains: list[tuple[int, list[int]]] = []  # a threshold, and the places of the edges guessed to go
            candidates = []
            for c in running.tolist():
                mask = masks[c].copy()
                guessed: list[int] = []
                at = int(place[c])
                while at < len(order) and len(guessed) < guesses:
                    j, s = order[at]
                    if mask[j, s]:
                        mask = mask.copy()
                        mask[j, s] = False
                        mask = graph.prune(mask)
                        candidates.append(mask)
                        guessed.append(at)
                    at += 1
                chains.append((c, guessed))
                if not guessed:
                    bar.update(len(order) - place[c])
                    place[c] = len(order)
            found = losses(np.stack(candidates)) if candidates else np.zeros(0)
            first = 0
            for c, guessed in chains:
                for index, at in enumerate(guessed):
                    loss, (j, s) = found[first + index], order[at]
                    rises[c, j, s] = loss - current[c]
                    bar.update(at + 1 - place[c])
                    place[c] = at + 1
                    if rises[c, j, s] >= thresholds[c]:
                        break
                    masks[c], current[c] = candidates[first + index], loss
                first += len(guessed)
            kept.save({name: torch.from_numpy(value.copy()) for name, value in zip(STATE, (masks, rises, current, place), strict=True)})
    return masks, rises
