"""Which edges an effect ablates: they are all edges out of a component, told apart by what reads them."""

import numpy as np
import pandas as pd
import pytest

from oacore.config.interactions import Interactions
from oacore.errors import UserError
from oacore.interactions.edges import LOGITS, direct, indirect, out_of, paths
from oacore.interactions.ranking import chosen
from oacore.models.graph import Graph

GRAPHS = [Graph(3, 4, 4, False), Graph(2, 4, 2, False), Graph(3, 2, 1, True), Graph(1, 1, 1, False)]


@pytest.mark.parametrize("graph", GRAPHS, ids=str)
def test_paths_are_the_edges_out_of_a_component(graph):
    for s, name in enumerate(graph.source_names):
        every = np.zeros_like(graph.valid)
        every[:, s] = graph.valid[:, s]
        assert np.array_equal(out_of(graph, name), every)
        assert np.array_equal(direct(graph, name) | indirect(graph, name), every)
        assert not (direct(graph, name) & indirect(graph, name)).any() and direct(graph, name).sum() == 1
        for by in ("component", "layer"):
            parts = paths(graph, name, by)
            assert list(parts)[-1] == LOGITS and all(edges.any() for edges in parts.values())
            assert np.array_equal(np.logical_or.reduce(list(parts.values())), every)
            if by == "layer" or graph.group_size == 1:
                assert sum(edges.sum() for edges in parts.values()) == every.sum(), "no edge is in two paths"


def test_mediators_of_a_component_are_those_that_read_it():
    serial, parallel = Graph(2, 2, 1, False), Graph(2, 2, 1, True)
    assert list(paths(serial, "a0.h1", "component")) == ["m0", "a1.h0", "a1.h1", "m1", LOGITS]
    assert list(paths(parallel, "a0.h1", "component")) == ["a1.h0", "a1.h1", "m1", LOGITS]
    assert list(paths(serial, "a0.h1", "layer")) == ["layer 0", "layer 1", LOGITS]
    assert list(paths(serial, "m1", "layer")) == [LOGITS] and not indirect(serial, "m1").any()
    into = paths(serial, "m0", "component")["a1.h1"]
    assert {serial.edge_name(int(s), int(j)) for j, s in np.argwhere(into)} == {
        "m0->a1.h1<q>", "m0->a1.h0<k>", "m0->a1.h0<v>",
    }  # fmt: skip


def test_named_components_come_beside_the_first_of_the_ranking():
    graph = Graph(2, 2, 2, False)
    ranked = pd.DataFrame({"component": ["m1", "a0.h0", "m0", "a0.h1", "a1.h0", "a1.h1"]})
    settings = Interactions(n_components=2, components=("a1.h1", "m1"))
    assert chosen(ranked, graph, settings) == ["a0.h0", "a1.h1", "m1"]
    assert len(chosen(ranked, graph, Interactions(n_components=50))) == 6
    with pytest.raises(UserError, match=r"interactions\.components: source 'a5.h0' is not in this graph.*allowed: "):
        chosen(ranked, graph, Interactions(components=("a5.h0",)))
