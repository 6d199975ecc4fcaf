"""Random circuits of given sizes: what no method may fall short of."""

from collections.abc import Sequence

import numpy as np

from oacore.circuits.search import Found, SearchRequest, checked_sizes, seed_by_seed
from oacore.errors import UserError
from oacore.models.graph import Graph


def random_circuits(graph: Graph, sizes: Sequence[int], seed: int) -> np.ndarray:
    """Random circuits bool [n, J, S]: of a random order of edges the shortest start that has `size` edges once dangling
    ones are dropped. Each size has an order of its own.

    Raises:
        UserError: a size beyond the graph.
    """
    circuits = []
    for size in sizes:
        if size > graph.n_edges:
            raise UserError(f"circuits.sizes: {size}; allowed: up to the graph's {graph.n_edges} edges")
        rank = np.full(graph.valid.shape, graph.n_edges)
        rank[graph.valid] = np.random.default_rng((seed, size)).permutation(graph.n_edges)
        low, high = 0, graph.n_edges  # more edges leave no fewer after pruning, so bisection finds the shortest
        while low < high:
            middle = (low + high) // 2
            if graph.size(rank < middle).edges >= size:
                high = middle
            else:
                low = middle + 1
        circuits.append(graph.prune(rank < low))
    return np.stack(circuits)


def search(request: SearchRequest) -> Found:
    """Random circuits, one for each size and seed."""

    def draw(seed: int, sizes: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
        masks = random_circuits(request.graph, checked_sizes(sizes, request.graph.n_edges), seed)
        return masks, masks.astype(float)

    return seed_by_seed(request, draw)
