"""Circuits against brute force, their files against hand-written ones and one that another project published."""

import json
import math
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oacore.circuits import circuit, mib_file, stability
from oacore.circuits.circuit import Circuit
from oacore.errors import UserError
from oacore.models.graph import Graph

GROUPED = Graph(2, 4, 2, parallel=False)
FACTS = {"d_model": 32, "model_hash": "abc", "method": "ugs", "knob": 0.001, "seed": 3}


@st.composite
def graphs(draw) -> Graph:
    n_kv_heads = draw(st.integers(1, 2))
    return Graph(draw(st.integers(1, 3)), n_kv_heads * draw(st.integers(1, 2)), n_kv_heads, draw(st.booleans()))


@st.composite
def made(draw) -> Circuit:
    graph = draw(graphs())
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = graph.valid.shape
    node_scores = rng.normal(size=graph.n_sources) if draw(st.booleans()) else None
    mask = rng.random(shape) < draw(st.sampled_from([0.0, 0.2, 0.5, 1.0]))
    return Circuit.of(graph, rng.normal(size=shape), mask, FACTS, node_scores)


def path_of(graph: Graph, *names: str) -> np.ndarray:
    mask = np.zeros(graph.valid.shape, bool)
    for name in names:
        s, j = graph.edge(name)
        mask[j, s] = True
    return mask


def document_of(path) -> dict:
    """Strict: NaN and Infinity are no JSON."""

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    return json.loads(path.read_text(), parse_constant=refuse)


# From scores to edges.


@given(graphs(), st.integers(0, 2**32 - 1), st.data())
@settings(deadline=None, max_examples=60)
def test_both_rules_match_a_sorted_list_of_edges(graph, seed, data):
    scores = np.random.default_rng(seed).integers(0, 6, graph.valid.shape).astype(float)  # many ties
    edges = [(float(scores[j, s]), int(j), int(s)) for j, s in np.argwhere(graph.valid)]
    size = data.draw(st.integers(0, graph.n_edges))
    chosen = np.zeros(graph.valid.shape, bool)
    for _, j, s in sorted(edges, key=lambda edge: (-edge[0], edge[1:]))[:size]:
        chosen[j, s] = True
    assert (circuit.by_size(graph, scores, size) == graph.prune(chosen)).all()
    above = np.zeros(graph.valid.shape, bool)
    for score, j, s in edges:
        above[j, s] = score > 3
    assert (circuit.by_threshold(graph, scores, 3) == graph.prune(above)).all()


def test_many_circuits_at_once_are_those_one_by_one():
    scores = np.random.default_rng(0).normal(size=(3, *GROUPED.valid.shape))
    many = circuit.by_size(GROUPED, scores, 20)
    assert many.shape == scores.shape
    assert all((mask == circuit.by_size(GROUPED, row, 20)).all() for mask, row in zip(many, scores, strict=True))
    sizes = [0, 15, 40, GROUPED.n_edges]
    of_one = circuit.by_size(GROUPED, scores[0], np.array(sizes))
    assert all((mask == circuit.by_size(GROUPED, scores[0], n)).all() for mask, n in zip(of_one, sizes, strict=True))
    assert not of_one[0].any() and (of_one[-1] == GROUPED.valid).all() and 0 < of_one[2].sum() <= 40
    thresholds = np.array([-1.0, 0.5])[:, None, None]
    assert (
        circuit.by_threshold(GROUPED, scores[0], thresholds)[1] == circuit.by_threshold(GROUPED, scores[0], 0.5)
    ).all()


@pytest.mark.parametrize("size", [-1, GROUPED.n_edges + 1])
def test_a_size_that_the_graph_cannot_have_is_refused(size):
    with pytest.raises(ValueError, match=f"n_edges {size}; allowed: 0 to {GROUPED.n_edges}"):
        circuit.by_size(GROUPED, np.zeros(GROUPED.valid.shape), size)


def test_a_circuit_is_pruned_and_counts_what_is_left():
    mask = path_of(GROUPED, "input->m0", "m0->a1.h1<v>", "a1.h3->logits", "a0.h1->logits", "input->m1")
    made = Circuit.of(GROUPED, np.ones(GROUPED.valid.shape), mask, FACTS)
    assert (made.n_edges, made.n_nodes) == (3, 3)
    assert (made.scores == GROUPED.valid).all()


@pytest.mark.parametrize("names", [(), ("input->m0",), ("a0.h1->logits",)])
def test_an_empty_or_disconnected_circuit_has_no_edges_and_a_file(tmp_path, names):
    made = Circuit.of(GROUPED, np.zeros(GROUPED.valid.shape), path_of(GROUPED, *names), FACTS)
    mib_file.save_circuit(tmp_path / "c.json", made)
    loaded = mib_file.load_circuit(tmp_path / "c.json")
    assert (made.n_edges, made.n_nodes, loaded.n_edges, len(circuit.edge_table(loaded))) == (0, 0, 0, 0)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_score_of_a_fit_that_diverged_is_refused(bad):
    scores = np.zeros(GROUPED.valid.shape)
    s, j = GROUPED.edge("m0->a1.h1<k>")
    scores[j, s] = bad
    with pytest.raises(UserError, match=r"score of edge 'm0->a1.h1<k>' is (nan|-?inf); allowed: finite"):
        Circuit.of(GROUPED, scores, GROUPED.valid, FACTS)


# Files.


@given(made())
@settings(deadline=None, max_examples=60)
def test_a_circuit_comes_back_as_it_was(tmp_path_factory, circuit):
    path = tmp_path_factory.mktemp("circuit") / "c.json"
    mib_file.save_circuit(path, circuit)
    for loaded in (mib_file.load_circuit(path), mib_file.load_circuit(path, circuit.graph, "abc")):
        assert loaded.graph == circuit.graph and loaded.facts == circuit.facts
        assert (loaded.mask == circuit.mask).all() and (loaded.scores == circuit.scores).all()
        assert (
            np.array_equal(loaded.node_scores, circuit.node_scores)
            if circuit.node_scores is not None
            else loaded.node_scores is None
        )
    first = path.read_bytes()
    mib_file.save_circuit(path, loaded)
    assert path.read_bytes() == first


@given(made())
@settings(deadline=None, max_examples=30)
def test_a_file_is_what_eap_ig_reads(tmp_path_factory, circuit):
    """The rules of `Graph.from_json`: the three objects, names of MIB's graph, both keys of each edge, and in_graph
    without danglings.
    """
    path = tmp_path_factory.mktemp("circuit") / "c.json"
    mib_file.save_circuit(path, circuit)
    document, graph = document_of(path), circuit.graph
    sizes = {"n_layers": graph.n_layers, "n_heads": graph.n_heads, "parallel_attn_mlp": graph.parallel, "d_model": 32}
    assert document["cfg"] == sizes
    assert list(document["nodes"]) == [*graph.source_names, "logits"]
    assert set(document["edges"]) == {graph.mib.edge_name(int(s), int(n)) for n, s in np.argwhere(graph.mib.valid)}
    assert all(set(entry) == {"score", "in_graph"} for entry in document["edges"].values())
    kept = [name for name, entry in document["edges"].items() if entry["in_graph"]]
    assert {name.split("->")[0] for name in kept} | {"logits"} == {
        n for n, entry in document["nodes"].items() if entry["in_graph"]
    }
    for j, s in np.argwhere(graph.valid):
        entries = [document["edges"][name] for name in graph.mib_edge_names(int(s), int(j))]
        assert {entry["score"] for entry in entries} == {circuit.scores[j, s]}
        assert any(entry["in_graph"] for entry in entries) == circuit.mask[j, s]


def test_a_published_circuit_loads_and_comes_back(shared_data, tmp_path):
    source = shared_data / "mib" / "ioi-eap-ig.json"
    loaded = mib_file.load_circuit(source, Graph(12, 12, 12, parallel=False), model_hash="any")
    assert (loaded.n_edges, loaded.n_nodes) == (756, 80)
    assert loaded.facts == {"d_model": 768} and loaded.node_scores is None
    s, j = loaded.graph.edge("input->a0.h1<q>")
    assert loaded.scores[j, s] == -0.03757336363196373 and loaded.mask[j, s]
    mib_file.save_circuit(tmp_path / "c.json", loaded)
    document = json.loads((tmp_path / "c.json").read_text())
    document.pop("oacore")
    assert json.dumps(document) == source.read_text()


def hand_written(**changes: object) -> dict:
    """A file of another project, of a model with one layer and two heads."""
    document = {
        "cfg": {"n_layers": 1, "n_heads": 2, "parallel_attn_mlp": False, "d_model": 8},
        "nodes": {
            "input": {"in_graph": True},
            "a0.h1": {"in_graph": True, "score": -0.5},
            "logits": {"in_graph": True},
        },
        "edges": {
            "input->a0.h0<k>": {"score": -3.0, "in_graph": True},
            "input->a0.h1<k>": {"score": 2, "in_graph": True},
            "a0.h1->logits": {"score": 0.25, "in_graph": True},
        },
    }
    return document | changes


@pytest.fixture
def write(tmp_path):
    def write(document: object) -> object:
        path = tmp_path / "c.json"
        path.write_text(document if isinstance(document, str) else json.dumps(document))
        return path

    return write


def test_missing_edges_and_nodes_are_those_that_eap_ig_assumes(write):
    loaded = mib_file.load_circuit(write(hand_written()))
    assert circuit.edge_table(loaded).to_dict("list") == {
        "source": ["input", "a0.h1"],
        "destination": ["a0.h1<k>", "logits"],
        "score": [2.0, 0.25],
    }  # a0.h0 leads nowhere
    assert np.argwhere(~np.isnan(loaded.node_scores)).tolist() == [[2]] and loaded.node_scores[2] == -0.5


def test_keys_that_differ_within_a_group_are_joined(write):
    graph = Graph(1, 2, 1, parallel=False)
    loaded = mib_file.load_circuit(write(hand_written()), graph)
    assert {tuple(row) for row in circuit.edge_table(loaded).to_numpy()} == {
        ("input", "a0.h0<k>", -3.0),
        ("a0.h1", "logits", 0.25),
    }
    edges = {
        "input->a0.h0<v>": {"score": -2.0, "in_graph": False},
        "input->a0.h1<v>": {"score": 2.0, "in_graph": False},
    }
    s, j = graph.edge("input->a0.h0<v>")
    assert mib_file.load_circuit(write(hand_written(edges=edges)), graph).scores[j, s] == 2.0


def edge(**changes: object) -> dict:
    return hand_written(edges={"input->logits": {"score": 1.0, "in_graph": True} | changes})


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ("{", "can't be read as JSON"),
        ([], "not a MIB graph JSON; allowed: an object with the objects cfg, nodes, edges"),
        ({"cfg": {}, "nodes": {}}, "cfg, nodes, edges"),
        (hand_written(cfg={"n_layers": 1, "n_heads": 2, "parallel_attn_mlp": False}), "KeyError: 'd_model'"),
        (
            hand_written(cfg={"n_layers": 0, "n_heads": 2, "parallel_attn_mlp": False, "d_model": 8}),
            "sizes of at least 1",
        ),
        (
            hand_written(cfg={"n_layers": "x", "n_heads": 2, "parallel_attn_mlp": False, "d_model": 8}),
            "ValueError: invalid literal",
        ),
        (hand_written(nodes={"a0.h2": {"in_graph": True}}), "source 'a0.h2' is not in this graph"),
        (hand_written(nodes={"a0.h1": {}}), "node 'a0.h1' is {}"),
        (hand_written(nodes={"a0.h1": {"in_graph": 1}}), "in_graph of node 'a0.h1' is 1; allowed: true, false"),
        (hand_written(nodes={"a0.h1": {"in_graph": True, "neurons": [True, False]}}), "some of its neurons only"),
        (hand_written(nodes={"a0.h1": {"in_graph": True, "score": math.nan}}), "score of node 'a0.h1' is nan"),
        (
            hand_written(edges={"input->a0.h2<q>": {"score": 0, "in_graph": True}}),
            "destination 'a0.h2<q>' is not in this graph",
        ),
        (hand_written(edges={"m0->a0.h1<q>": {"score": 0, "in_graph": True}}), "reads before m0 writes"),
        (hand_written(edges={"input->logits": {"score": 0}}), "allowed: an object with score and in_graph"),
        (edge(score=math.nan), "score of edge 'input->logits' is nan; allowed: finite"),
        (edge(score=math.inf), "is inf"),
        (edge(score="1"), "is '1'"),
        (edge(score=True), "is True"),
        (edge(in_graph="yes"), "in_graph of edge 'input->logits' is 'yes'"),
        (hand_written(oacore={"schema_version": 2}), "schema_version is 2; allowed: 1"),
        (hand_written(oacore=[]), "not a MIB graph JSON"),
    ],
)
def test_bad_files_are_refused_with_path_and_cause(write, document, message):
    path = write(document)
    with pytest.raises(UserError) as error:
        mib_file.load_circuit(path)
    assert str(error.value).startswith(f"{path}: ") and message in str(error.value)
    assert "\n" not in str(error.value)


def test_an_absent_file_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"none\.json: can't be read"):
        mib_file.load_circuit(tmp_path / "none.json")


@pytest.mark.parametrize(
    "other", [Graph(3, 4, 2, False), Graph(2, 2, 2, False), Graph(2, 4, 2, True)], ids=["layers", "heads", "parallel"]
)
def test_a_circuit_of_another_model_is_refused(tmp_path, other):
    path = tmp_path / "c.json"
    mib_file.save_circuit(path, Circuit.of(GROUPED, np.zeros(GROUPED.valid.shape), GROUPED.valid, FACTS))
    with pytest.raises(UserError, match=r"c\.json: cfg is that of .*allowed: that of the model"):
        mib_file.load_circuit(path, other)
    with pytest.raises(UserError, match=r"c\.json: model_hash is 'abc', that of another model; allowed: 'abd'"):
        mib_file.load_circuit(path, GROUPED, model_hash="abd")


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "c.json"
    circuit = Circuit.of(GROUPED, np.zeros(GROUPED.valid.shape), GROUPED.valid, FACTS)
    mib_file.save_circuit(path, circuit)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="not JSON compliant"):
        mib_file.save_circuit(path, replace(circuit, facts=FACTS | {"fit_seconds": math.nan}))
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


# Tables and statistics.


def test_edge_frequency_is_a_share():
    masks = np.zeros((4, *GROUPED.valid.shape), bool)
    masks[:3, 0, 0] = True
    assert stability.edge_frequency(masks)[0, 0] == 0.75 and stability.edge_frequency(masks).sum() == 0.75


def test_stability_is_the_mean_jaccard_index_of_all_pairs():
    masks = np.random.default_rng(1).random((5, 6, 7)) < 0.4
    masks[3:] = False  # two empty circuits agree fully, and with no other

    def jaccard(a: set, b: set) -> float:
        return len(a & b) / len(a | b) if a | b else 1.0

    sets = [{tuple(edge) for edge in np.argwhere(mask).tolist()} for mask in masks]
    found = stability.stability(masks)
    assert found.jaccard == pytest.approx(np.mean([jaccard(a, b) for a, b in combinations(sets, 2)]))
    assert 0 <= found.low < found.jaccard < found.high <= 1


def test_the_interval_is_that_of_a_plain_bootstrap():
    """Resamples drawn and paired one by one; 95 % quantiles of two sets of 2 000 differ by their sampling error."""
    masks = np.random.default_rng(2).random((8, 10, 10)) < np.linspace(0.2, 0.8, 8)[:, None, None]
    rng, means = np.random.default_rng(3), []
    for _ in range(2000):
        drawn = rng.integers(0, 8, 8)
        pairs = [(masks[a], masks[b]) for a, b in combinations(drawn, 2) if a != b]
        means.append(np.mean([(a & b).sum() / (a | b).sum() for a, b in pairs]))
    found = stability.stability(masks)
    assert (found.low, found.high) == pytest.approx(np.quantile(means, (0.025, 0.975)), abs=0.01)
    assert stability.stability(masks) == found != stability.stability(masks, seed=1)


def test_stability_of_equal_circuits_of_two_and_of_one():
    masks = np.random.default_rng(1).random((2, 6, 7)) < 0.4
    assert stability.stability(np.stack([masks[0]] * 3)) == (1.0, 1.0, 1.0)
    assert len(set(stability.stability(masks))) == 1
    with pytest.raises(ValueError, match="stability of 1 circuits; allowed: at least 2"):
        stability.stability(masks[:1])
