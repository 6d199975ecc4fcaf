"""Which edges an effect ablates: sets of edges, bool [J, S], of one graph.

Symbols: S sources, J destinations.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from oacore.models.graph import Graph

LOGITS = "logits"  # the last destination, which is in no layer


def out_of(graph: Graph, component: str) -> np.ndarray:
    """Every edge out of a component, for its total effect: bool [J, S].

    Raises:
        UserError: the graph has no such component.
    """
    return _into(graph, component, range(graph.n_destinations))


def direct(graph: Graph, component: str) -> np.ndarray:
    """The edge from a component to the logits, for its direct effect: bool [J, S]."""
    return _into(graph, component, [graph.n_destinations - 1])


def indirect(graph: Graph, component: str) -> np.ndarray:
    """Every edge out of a component but the one to the logits: bool [J, S], all False where nothing else reads it."""
    return out_of(graph, component) & ~direct(graph, component)


def paths(graph: Graph, component: str, by: Literal["component", "layer"]) -> dict[str, np.ndarray]:
    """The edges from a component into each mediator that reads it, bool [J, S] by the mediator's name; logits last."""
    into = {name: _into(graph, component, reads) for name, reads in _reads(graph, by).items()}
    return {name: edges for name, edges in into.items() if edges.any()} | {LOGITS: direct(graph, component)}


def _into(graph: Graph, component: str, destinations: Sequence[int]) -> np.ndarray:
    """The edges from a component into some destinations."""
    edges = np.zeros_like(graph.valid)
    source = graph.source_index(component)
    edges[destinations, source] = graph.valid[destinations, source]
    return edges


def _reads(graph: Graph, by: Literal["component", "layer"]) -> dict[str, Sequence[int]]:
    """The destinations at which each mediator reads: a head's query and, shared by its group, its key and value; an
    MLP's input; or all of a layer's.
    """
    reads: dict[str, Sequence[int]] = {}
    for layer in range(graph.n_layers):
        if by == "layer":
            of_layer = graph.destinations(layer)
            reads[f"layer {layer}"] = range(of_layer.start, of_layer.stop)
            continue
        q, k, v = graph.qkv(layer)
        for head in range(graph.n_heads):
            group = head // graph.group_size
            reads[f"a{layer}.h{head}"] = [q.start + head, k.start + group, v.start + group]
        reads[f"m{layer}"] = [graph.mlp_destination(layer)]
    return reads
