"""A circuit: edges of a graph with their scores."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from oacore.errors import UserError
from oacore.models.graph import Graph


@dataclass(frozen=True, eq=False)
class Circuit:
    """Make it with `Circuit.of`. A circuit whose edges lead nowhere has 0 edges, which is a circuit like any other.

    Args:
        mask: bool [J, S], without dangling edges.
        scores: float64 [J, S], finite; 0 where there is no edge.
        facts: what a JSON file can hold: `d_model`, which MIB files require, and what the circuit belongs to and came
            from (model, model_hash, task, method, ablation, objective, knob, seed, ...).
        node_scores: float64 [S], NaN for a node without a score; None where no node has one.
    """

    graph: Graph
    mask: np.ndarray
    scores: np.ndarray
    facts: dict[str, Any]
    node_scores: np.ndarray | None = None

    @classmethod
    def of(
        cls,
        graph: Graph,
        scores: np.ndarray,
        mask: np.ndarray,
        facts: dict[str, Any],
        node_scores: np.ndarray | None = None,
    ) -> "Circuit":
        """The circuit that is left of mask bool [J, S] once dangling edges are dropped.

        Raises:
            UserError: the score of an edge is NaN or infinite, as after a fit that diverged.
            ValueError: arrays of another shape or dtype.
        """
        scores = np.where(graph.valid, np.asarray(scores, np.float64), 0.0)
        for j, s in np.argwhere(~np.isfinite(scores))[:1]:
            raise UserError(
                f"score of edge {graph.edge_name(int(s), int(j))!r} is {scores[j, s]}; allowed: finite numbers"
            )
        return cls(graph, graph.prune(mask), scores, facts, node_scores)

    @property
    def n_edges(self) -> int:
        """The size of the circuit."""
        return int(self.mask.sum())

    @property
    def n_nodes(self) -> int:
        """Nodes with an edge out: input, heads and MLPs, but not logits, as MIB counts them."""
        return int(self.mask.any(0).sum())


# From scores to edges: one rule for all methods.
def by_threshold(graph: Graph, scores: np.ndarray, threshold: float | np.ndarray) -> np.ndarray:
    """The edges that score above the threshold, without dangling ones: scores [..., J, S] -> bool [..., J, S].

    Thresholds of shape [n, 1, 1] make n circuits of scores [J, S].
    """
    return graph.prune(scores > threshold)


def by_size(graph: Graph, scores: np.ndarray, n_edges: int | np.ndarray) -> np.ndarray:
    """The n highest-scoring edges, of which only those that don't dangle are left: scores [..., J, S] -> bool [..., J,
    S].

    Equal scores rank by edge order: destination, then source. Sizes of shape [n] make n circuits of scores [J, S].

    Raises:
        ValueError: a size below 0 or above the number of edges.
    """
    sizes = np.asarray(n_edges)
    if (sizes < 0).any() or (sizes > graph.n_edges).any():
        raise ValueError(f"n_edges {n_edges}; allowed: 0 to {graph.n_edges}")
    order = np.argsort(-scores[..., graph.valid], axis=-1, kind="stable")  # [..., E] best edge first
    rank = np.argsort(order, axis=-1)
    chosen = rank < sizes[..., None]
    mask = np.zeros((*chosen.shape[:-1], *graph.valid.shape), bool)
    mask[..., graph.valid] = chosen
    return graph.prune(mask)


# Tables and statistics.
def edge_table(circuit: Circuit) -> pd.DataFrame:
    """The circuit's edges, highest score first: source, destination, score."""
    j, s = np.nonzero(circuit.mask)
    table = pd.DataFrame(
        {
            "source": np.array(circuit.graph.source_names, object)[s],
            "destination": np.array(circuit.graph.destination_names, object)[j],
            "score": circuit.scores[j, s],
        }
    )
    return table.sort_values("score", ascending=False, kind="stable", ignore_index=True)
