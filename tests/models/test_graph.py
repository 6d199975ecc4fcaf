"""The graph against an enumeration written from its definition, pruning against networkx, names against a published MIB
file.
"""

import json
import re
from dataclasses import replace

import networkx as nx
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from oacore.errors import UserError
from oacore.models.graph import Graph

GPT2 = Graph(12, 12, 12, parallel=False)
SHAPES = [
    Graph(1, 1, 1, False),
    Graph(3, 2, 2, True),
    Graph(2, 4, 2, False),
    Graph(3, 6, 2, True),
    Graph(2, 3, 1, False),
]


@st.composite
def graphs(draw) -> Graph:
    n_kv_heads = draw(st.integers(1, 3))
    return Graph(draw(st.integers(1, 4)), n_kv_heads * draw(st.integers(1, 3)), n_kv_heads, draw(st.booleans()))


def random_masks(graph: Graph, *batch: int, density: float = 0.5, seed: int = 0) -> np.ndarray:
    """bool [*batch, J, S], with True also where there is no edge."""
    return np.random.default_rng(seed).random((*batch, graph.n_destinations, graph.n_sources)) < density


# Measured on 300 graphs: pruning empties 60 % of the masks of density 0.1, none of 0.7; it removes some edges but not
# all in 40-90 %.
densities = st.sampled_from([0.1, 0.2, 0.35, 0.7])
seeds = st.integers(0, 2**32 - 1)


def enumerated(graph: Graph) -> tuple[list[str], list[str], set[str]]:
    """Sources, destinations and edges from the definition alone: an edge exists when the source writes before the
    destination reads.
    """
    heads, kv_heads = range(graph.n_heads), range(graph.n_kv_heads)
    writes, reads = {"input": -1}, {}
    for layer in range(graph.n_layers):
        # Four moments a layer: attention reads, heads write, the MLP reads, the MLP writes.
        writes |= {f"a{layer}.h{h}": 4 * layer + 1 for h in heads} | {f"m{layer}": 4 * layer + 3}
        for letter, owners in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
            reads |= {f"a{layer}.h{h}<{letter}>": 4 * layer for h in owners}
        reads |= {f"m{layer}": 4 * layer + (0 if graph.parallel else 2)}
    reads["logits"] = 4 * graph.n_layers
    return list(writes), list(reads), {f"{s}->{j}" for s in writes for j in reads if writes[s] < reads[j]}


def fed_nodes(graph: Graph, destination: str) -> list[str]:
    """The nodes whose value depends on what this destination reads."""
    match = re.fullmatch(r"a(\d+)\.h(\d+)<([qkv])>", destination)
    if match is None:
        return [destination]
    layer, h, letter = int(match[1]), int(match[2]), match[3]
    group = graph.n_heads // graph.n_kv_heads
    return [f"a{layer}.h{h}"] if letter == "q" else [f"a{layer}.h{h * group + i}" for i in range(group)]


def pruned_by_networkx(graph: Graph, mask: np.ndarray) -> np.ndarray:
    """mask [J, S] -> [J, S]."""
    sources, destinations, edges = enumerated(graph)
    present = [(j, s) for j, s in np.argwhere(mask) if f"{sources[s]}->{destinations[j]}" in edges]
    digraph = nx.DiGraph((sources[s], node) for j, s in present for node in fed_nodes(graph, destinations[j]))
    digraph.add_nodes_from(["input", "logits"])
    from_input = nx.descendants(digraph, "input") | {"input"}
    to_logits = nx.ancestors(digraph, "logits") | {"logits"}
    kept = np.zeros_like(mask)
    for j, s in present:
        kept[j, s] = sources[s] in from_input and any(node in to_logits for node in fed_nodes(graph, destinations[j]))
    return kept


def mask_of(graph: Graph, *names: str) -> np.ndarray:
    mask = np.zeros(graph.valid.shape, bool)
    for name in names:
        s, j = graph.edge(name)
        mask[j, s] = True
    return mask


def names_of(graph: Graph, mask: np.ndarray) -> set[str]:
    return {graph.edge_name(int(s), int(j)) for j, s in np.argwhere(mask)}


# Numbering.


def test_gpt2_small_has_the_published_counts():
    assert (GPT2.n_sources, GPT2.n_destinations, GPT2.n_edges) == (157, 445, 32_491)


@given(graphs())
@example(GPT2)
@settings(deadline=None, max_examples=40)
def test_sources_destinations_and_edges_match_the_definition(graph):
    sources, destinations, edges = enumerated(graph)
    assert list(graph.source_names) == sources
    assert list(graph.destination_names) == destinations
    assert graph.valid.shape == (len(destinations), len(sources)) == (graph.n_destinations, graph.n_sources)
    assert graph.n_edges == len(edges)
    assert names_of(graph, graph.valid) == edges


@given(graphs())
@settings(deadline=None, max_examples=40)
def test_slices_of_a_layer_hold_its_names(graph):
    assert (graph.first_source(graph.n_layers), graph.first_destination(graph.n_layers)) == (
        graph.n_sources,
        graph.n_destinations - 1,
    )
    for layer in range(graph.n_layers):
        heads = tuple(f"a{layer}.h{h}" for h in range(graph.n_heads))
        kv_heads = heads[: graph.n_kv_heads]
        assert graph.source_names[graph.heads(layer)] == heads
        assert (
            graph.source_names[graph.mlp_source(layer)]
            == graph.destination_names[graph.mlp_destination(layer)]
            == f"m{layer}"
        )
        assert graph.source_names[graph.sources(layer)] == (*heads, f"m{layer}")
        parts = [graph.destination_names[part] for part in graph.qkv(layer)]
        assert parts == [
            tuple(f"{h}<{x}>" for h in owners) for x, owners in (("q", heads), ("k", kv_heads), ("v", kv_heads))
        ]
        assert graph.destination_names[graph.attention(layer)] == sum(parts, ())
        assert graph.destination_names[graph.destinations(layer)] == (*sum(parts, ()), f"m{layer}")
        assert graph.source_names[graph.first_source(layer)] == heads[0]
        assert graph.destination_names[graph.first_destination(layer)] == f"{heads[0]}<q>"


def test_cached_arrays_cannot_be_changed_by_accident():
    for array in (GPT2.valid, GPT2.mib_destinations):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0


@pytest.mark.parametrize("sizes", [(0, 4, 4), (2, 0, 0), (2, 4, 0), (2, 4, 3), (2, 2, 4)])
def test_impossible_sizes_are_refused(sizes):
    with pytest.raises(
        UserError, match=rf"n_layers={sizes[0]}, n_heads={sizes[1]}, n_kv_heads={sizes[2]}.*multiple of n_kv_heads"
    ):
        Graph(*sizes, parallel=False)


# Names.


@given(graphs(), st.data())
@settings(deadline=None)
def test_names_and_indices_are_inverse(graph, data):
    s, j = data.draw(st.integers(0, graph.n_sources - 1)), data.draw(st.integers(0, graph.n_destinations - 1))
    assert graph.source_index(graph.source_names[s]) == s
    assert graph.destination_index(graph.destination_names[j]) == j
    if graph.valid[j, s]:
        assert graph.edge(graph.edge_name(s, j)) == (s, j)
    else:
        with pytest.raises(ValueError, match=f"s={s}, j={j}"):
            graph.edge_name(s, j)


@pytest.mark.parametrize(("s", "j"), [(-1, 444), (157, 444), (0, -1), (0, 445)])
def test_indices_outside_the_graph_do_not_wrap(s, j):
    with pytest.raises(ValueError, match=f"s={s}, j={j}"):
        GPT2.edge_name(s, j)


@pytest.mark.parametrize(
    ("look_up", "name", "parts"),
    [
        ("source_index", "a1.h12", ["source 'a1.h12'", "nearest: 'a1.h", "a{l}.h{h}", "l < 12, h < 12"]),
        ("source_index", "logits", ["source 'logits'", "allowed: input"]),
        ("destination_index", "a3.h2", ["destination 'a3.h2'", "nearest: 'a3.h2<", "a{l}.h{g}<k>", "g < 12"]),
        ("destination_index", "input", ["destination 'input'", "logits with"]),
        ("edge", "a0.h1", ["edge 'a0.h1'", "source->destination"]),
        ("edge", "a0.h1->logit", ["destination 'logit'", "nearest: 'logits'"]),
        ("edge", "embed->logits", ["source 'embed'", "allowed: input"]),
        ("edge", "m3->a3.h0<q>", ["edge 'm3->a3.h0<q>'", "sources up to m2"]),
        ("edge", "a12.h0->logits", ["source 'a12.h0'", "l < 12"]),
    ],
)
def test_unknown_names_are_refused_with_what_is_allowed(look_up, name, parts):
    with pytest.raises(UserError) as error:
        getattr(GPT2, look_up)(name)
    assert all(part in str(error.value) for part in parts), error.value


def test_a_parallel_mlp_does_not_read_its_own_layer():
    assert GPT2.edge("a3.h0->m3") == (GPT2.source_index("a3.h0"), GPT2.destination_index("m3"))
    with pytest.raises(UserError, match=r"reads before a3\.h0 writes; allowed: sources up to m2"):
        replace(GPT2, parallel=True).edge("a3.h0->m3")


# MIB files.


def test_every_edge_of_a_published_circuit_parses(shared_data):
    circuit = json.loads((shared_data / "mib" / "ioi-eap-ig.json").read_text())
    cfg = circuit["cfg"]
    graph = Graph(cfg["n_layers"], cfg["n_heads"], cfg["n_heads"], cfg["parallel_attn_mlp"])
    pairs = {graph.mib_edge(name) for name in circuit["edges"]}
    assert len(circuit["edges"]) == len(pairs) == graph.n_edges == 32_491
    assert all(graph.mib_edge_names(*graph.mib_edge(name)) == (name,) for name in list(circuit["edges"])[::97])
    assert set(circuit["nodes"]) == {*graph.source_names, "logits"}


def test_grouped_keys_and_values_are_named_per_query_head_in_mib():
    graph = Graph(2, 6, 2, parallel=False)
    key = graph.destination_index("a1.h1<k>")
    assert [graph.mib_edge(f"m0->a1.h{h}<k>")[1] for h in range(6)] == [graph.destination_index("a1.h0<k>")] * 3 + [
        key
    ] * 3
    assert graph.mib_edge("m0->a1.h5<q>")[1] == graph.destination_index("a1.h5<q>")
    assert graph.mib_edge_names(0, key) == ("input->a1.h3<k>", "input->a1.h4<k>", "input->a1.h5<k>")
    with pytest.raises(UserError, match=r"'a1.h6<k>'.*g < 6"):
        graph.mib_edge("m0->a1.h6<k>")
    for s, j in ((graph.source_index("m1"), key), (0, graph.n_destinations), (0, -1)):
        with pytest.raises(ValueError, match="no edge"):
            graph.mib_edge_names(s, j)


@given(graphs())
@settings(deadline=None, max_examples=40)
def test_mib_numbering_is_that_of_eap_ig(graph):
    L, H = graph.n_layers, graph.n_heads
    assert (graph.mib.n_sources, graph.mib.n_destinations) == (1 + L * (H + 1), L * (3 * H + 1) + 1)
    assert graph.mib.source_names == graph.source_names
    for layer in range(L):
        for i, letter in enumerate("qkv"):
            for h in range(H):
                n = layer * (3 * H + 1) + i * H + h
                owner = h if letter == "q" else h * graph.n_kv_heads // H
                assert graph.mib.destination_index(f"a{layer}.h{h}<{letter}>") == n
                assert graph.mib_destinations[n] == graph.destination_index(f"a{layer}.h{owner}<{letter}>")
        n = layer * (3 * H + 1) + 3 * H
        assert graph.mib.destination_index(f"m{layer}") == n and graph.mib_destinations[n] == graph.destination_index(
            f"m{layer}"
        )
    assert graph.mib.destination_index("logits") == graph.mib.n_destinations - 1
    assert graph.mib_destinations[-1] == graph.n_destinations - 1


@given(graphs())
@settings(deadline=None, max_examples=20)
def test_mib_names_of_our_edges_are_a_partition_of_mib_edges(graph):
    names = [
        (name, (int(s), int(j))) for j, s in np.argwhere(graph.valid) for name in graph.mib_edge_names(int(s), int(j))
    ]
    assert len(names) == len(dict(names)) == graph.mib.n_edges
    assert all(graph.mib_edge(name) == pair for name, pair in names)


@given(graphs(), densities, seeds)
@settings(deadline=None, max_examples=60)
def test_pruning_commutes_with_grouping(graph, density, seed):
    """Our key edge is kept when any of its MIB edges is."""
    masks = random_masks(graph, 3, density=density, seed=seed)
    ungrouped = graph.mib.prune(masks[:, graph.mib_destinations])  # [3, n_bwd, S]
    grouped = np.zeros_like(masks)
    for n, j in enumerate(graph.mib_destinations):
        grouped[:, j] |= ungrouped[:, n]
    assert (grouped == graph.prune(masks)).all()


# Pruning.


@given(graphs(), densities, seeds)
@settings(deadline=None, max_examples=150)
def test_pruning_matches_networkx(graph, density, seed):
    mask = random_masks(graph, density=density, seed=seed)
    assert (graph.prune(mask) == pruned_by_networkx(graph, mask)).all()


def test_pruning_matches_networkx_at_the_size_of_gpt2():
    masks = random_masks(GPT2, 2, density=0.03, seed=2)
    for mask, pruned in zip(masks, GPT2.prune(masks), strict=True):
        assert (pruned == pruned_by_networkx(GPT2, mask)).all()
        assert 0 < pruned.sum() < (mask & GPT2.valid).sum()


@pytest.mark.parametrize(
    ("graph", "dangling"),
    [
        (GPT2, ["a0.h1->a3.h2<q>", "a3.h2->logits"]),  # a0.h1 has no edge in
        (GPT2, ["input->a0.h1<v>", "a0.h1->m4"]),  # m4 has no edge out
        (GPT2, ["input->a0.h1<v>", "a0.h2->logits"]),  # another head of the layer
        (replace(GPT2, parallel=True), ["input->a3.h0<q>", "m3->logits"]),
        (Graph(2, 4, 2, False), ["input->a0.h0<k>", "a0.h2->logits"]),  # head 2 uses the other key/value head
    ],
)
def test_dangling_edges_go_and_a_whole_path_stays(graph, dangling):
    path = ["input->m0", "m0->logits"]
    assert names_of(graph, graph.prune(mask_of(graph, *dangling, *path))) == set(path)


@pytest.mark.parametrize("letter", ["k", "v"])
def test_one_key_or_value_serves_every_query_head_of_its_group(letter):
    graph = Graph(2, 4, 2, parallel=False)
    path = [f"input->a0.h1<{letter}>", "a0.h2->a1.h3<q>", "a0.h3->a1.h3<q>", "a1.h3->logits"]
    assert names_of(graph, graph.prune(mask_of(graph, *path, "a0.h1->logits"))) == set(path)


@given(graphs(), densities, seeds)
@settings(deadline=None, max_examples=60)
def test_pruning_is_idempotent_monotone_and_only_removes(graph, density, seed):
    small, more = random_masks(graph, 2, 4, density=density, seed=seed)
    kept = graph.prune(small)
    assert (graph.prune(kept) == kept).all()
    assert not (kept & ~(small & graph.valid)).any()
    assert not (kept & ~graph.prune(small | more)).any()


@given(graphs(), st.sampled_from([(1,), (4,), (2, 3), (0,), (2, 0)]), densities, seeds)
@settings(deadline=None, max_examples=60)
def test_a_batch_is_pruned_row_by_row(graph, batch, density, seed):
    masks = random_masks(graph, *batch, density=density, seed=seed)
    pruned = graph.prune(masks)
    assert pruned.shape == masks.shape and pruned.dtype == bool
    for row in np.ndindex(*batch):
        assert (pruned[row] == graph.prune(masks[row])).all()


@given(graphs(), st.sampled_from([(), (3,), (2, 2), (0,)]), densities, seeds)
@settings(deadline=None, max_examples=60)
def test_torch_masks_are_pruned_as_numpy_masks(graph, batch, density, seed):
    masks = random_masks(graph, *batch, density=density, seed=seed)
    pruned = graph.prune(torch.tensor(masks))
    assert isinstance(pruned, torch.Tensor) and pruned.dtype == torch.bool
    assert (pruned.numpy() == graph.prune(masks)).all()
    assert all(
        (ours.numpy() == theirs).all()
        for ours, theirs in zip(graph.size(torch.tensor(masks)), graph.size(masks), strict=True)
    )


@pytest.mark.parametrize("make", [np.array, torch.tensor])
def test_pruning_leaves_its_input_alone(make):
    graph = Graph(2, 4, 2, parallel=True)
    original = random_masks(graph, 3, density=0.2)
    masks = make(original)
    graph.prune(masks)
    assert (np.asarray(masks) == original).all()


@pytest.mark.parametrize("graph", [GPT2, *SHAPES], ids=str)
def test_the_whole_graph_stays_and_the_empty_graph_stays_empty(graph):
    assert (graph.prune(np.ones_like(graph.valid)) == graph.valid).all()
    assert not graph.prune(np.zeros_like(graph.valid)).any()


@pytest.mark.parametrize(
    "bad", [np.ones((27, 11), bool), np.ones((11, 19), bool), np.ones((19, 11)), np.ones((19, 11), int)]
)
def test_masks_of_another_shape_or_dtype_are_refused(bad):
    with pytest.raises(ValueError, match=re.escape(f"{bad.dtype} {list(bad.shape)}; allowed: bool [..., 19, 11]")):
        Graph(2, 4, 2, parallel=False).prune(bad)


# Sizes.


@pytest.mark.parametrize("graph", [GPT2, *SHAPES], ids=str)
def test_size_of_the_whole_and_the_empty_graph(graph):
    edges, nodes = graph.size(np.stack((np.ones_like(graph.valid), np.zeros_like(graph.valid))))
    assert edges.tolist() == [graph.n_edges, 0]
    assert nodes.tolist() == [graph.n_sources, 0]


def test_size_counts_what_pruning_leaves():
    mask = mask_of(GPT2, "input->a0.h1<q>", "input->a0.h1<v>", "a0.h1->m4", "m4->logits", "a5.h0->logits")
    size = GPT2.size(mask[None, None])
    assert size.edges.tolist() == [[4]]
    assert size.nodes.tolist() == [[3]]  # input, a0.h1, m4
