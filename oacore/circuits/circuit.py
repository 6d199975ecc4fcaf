"""A circuit: edges of a graph with their scores, its MIB graph JSON file, and statistics over several circuits.

Files are those of the MIB benchmark (`Graph.to_json` of EAP-IG 7af394a), with the facts about a circuit in one more key, "oacore", which
EAP-IG does not read. They name keys and values per *query* head. A key/value head that several query heads share is one destination to us:

* saved, each of its query heads gets the edge's score, and the edge where the query head itself lies on a path to logits;
* loaded, it is in where any of its query heads' edges is, with the score of largest magnitude among them.

Symbols: J destinations, S sources, E edges, n circuits; `...` any leading dimensions.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from oacore import __version__
from oacore.artefacts import KEY, digest
from oacore.checkpoint import atomic_path
from oacore.errors import UserError
from oacore.graph import Graph

SCHEMA_VERSION = 1


@dataclass(frozen=True, eq=False)
class Circuit:
    """Make it with `Circuit.of`. A circuit whose edges lead nowhere has 0 edges, which is a circuit like any other.

    Args:
        mask: bool [J, S], without dangling edges.
        scores: float64 [J, S], finite; 0 where there is no edge.
        facts: what a JSON file can hold: `d_model`, which MIB files require, and what the circuit belongs to and came from (model,
            model_hash, task, method, ablation, objective, knob, seed, ...).
        node_scores: float64 [S], NaN for a node without a score; None where no node has one.
    """

    graph: Graph
    mask: np.ndarray
    scores: np.ndarray
    facts: dict[str, Any]
    node_scores: np.ndarray | None = None

    @classmethod
    def of(
        cls, graph: Graph, scores: np.ndarray, mask: np.ndarray, facts: dict[str, Any], node_scores: np.ndarray | None = None
    ) -> "Circuit":
        """The circuit that is left of mask bool [J, S] once dangling edges are dropped.

        Raises:
            UserError: the score of an edge is NaN or infinite, as after a fit that diverged.
            ValueError: arrays of another shape or dtype.
        """
        scores = np.where(graph.valid, np.asarray(scores, np.float64), 0.0)
        for j, s in np.argwhere(~np.isfinite(scores))[:1]:
            raise UserError(f"score of edge {graph.edge_name(int(s), int(j))!r} is {scores[j, s]}; allowed: finite numbers")
        return cls(graph, graph.prune(mask), scores, facts, node_scores)

    @property
    def n_edges(self) -> int:
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
    """The n highest-scoring edges, of which only those that don't dangle are left: scores [..., J, S] -> bool [..., J, S].

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


# Keys and values per query head, as in MIB's graph.


def ungroup(graph: Graph, values: np.ndarray) -> np.ndarray:
    """Masks or scores [..., J, S] -> [..., n_bwd, S] of `graph.mib`, the same for every query head of a group."""
    return values[..., graph.mib_destinations, :]


def group_masks(graph: Graph, masks: np.ndarray) -> np.ndarray:
    """bool [..., n_bwd, S] of `graph.mib` -> [..., J, S]: an edge is in where that of any query head of its group is."""
    grouped = np.zeros((*masks.shape[:-2], *graph.valid.shape), bool)
    for n, j in enumerate(graph.mib_destinations):
        grouped[..., j, :] |= masks[..., n, :]
    return grouped


def group_scores(graph: Graph, scores: np.ndarray) -> np.ndarray:
    """float [n_bwd, S] of `graph.mib` -> [J, S]: of a group's scores the one of largest magnitude, the positive one of a tie."""
    highest, lowest = np.full(graph.valid.shape, -np.inf), np.full(graph.valid.shape, np.inf)
    np.maximum.at(highest, graph.mib_destinations, scores)
    np.minimum.at(lowest, graph.mib_destinations, scores)
    return np.where(highest >= -lowest, highest, lowest)


# Files.


def save(path: str | Path, circuit: Circuit) -> None:
    """Write MIB graph JSON, atomically; the same circuit gives the same bytes."""
    graph, mib = circuit.graph, circuit.graph.mib
    mask, scores = mib.prune(ungroup(graph, circuit.mask)), ungroup(graph, circuit.scores)
    nodes = {name: {"in_graph": bool(mask[:, s].any())} for s, name in enumerate(graph.source_names)}
    if circuit.node_scores is not None:
        for entry, score in zip(nodes.values(), circuit.node_scores.tolist(), strict=True):
            entry |= {} if math.isnan(score) else {"score": score}
    document: dict[str, Any] = {
        "cfg": {
            "n_layers": graph.n_layers,
            "n_heads": graph.n_heads,
            "parallel_attn_mlp": graph.parallel,
            "d_model": circuit.facts["d_model"],
        },
        "nodes": nodes | {"logits": {"in_graph": True}},
        "edges": {
            f"{mib.source_names[s]}->{mib.destination_names[n]}": {"score": float(scores[n, s]), "in_graph": bool(mask[n, s])}
            for s, n in _in_file_order(mib)
        },
        "oacore": {
            "schema_version": SCHEMA_VERSION,
            "package_version": __version__,
            "n_kv_heads": graph.n_kv_heads,
            "facts": {name: value for name, value in circuit.facts.items() if name != "d_model"},
        },
    }
    document["oacore"] |= {KEY: digest(document)}
    text = json.dumps(document, allow_nan=False)
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _in_file_order(mib: Graph) -> Iterator[tuple[int, int]]:
    """(s, n) of every edge, in the order of EAP-IG's files: by layer, then by source, then by head and q, k, v."""
    for layer in range(mib.n_layers):
        attention, mlp = mib.attention(layer), mib.mlp_destination(layer)
        heads = np.arange(attention.start, attention.stop).reshape(3, mib.n_heads).T.ravel().tolist()
        for s in range(mib.first_source(layer)):
            yield from ((s, n) for n in heads)
            if mib.parallel:
                yield s, mlp
        if not mib.parallel:
            yield from ((s, mlp) for s in range(mib.mlp_source(layer)))
    yield from ((s, mib.n_destinations - 1) for s in range(mib.n_sources))


def load(path: str | Path, graph: Graph | None = None, model_hash: str | None = None, *, signed: bool = False) -> Circuit:
    """Read MIB graph JSON, ours or another project's; dangling edges are dropped.

    An edge that the file leaves out has score 0 and is not in the circuit, and nodes are in it by their edges, as EAP-IG reads it.

    Args:
        graph: that of the model. Without it keys and values are taken to be per query head, unless the file says otherwise (ours do).
        model_hash: of the model; checked where the file names one (ours do).
        signed: refuse a file that lacks our checksum, which is checked wherever there is one.

    Raises:
        UserError: the file can't be read, is no MIB graph JSON, names a node or edge that the graph lacks, is of another model, holds
            a score that is no finite number, or a circuit of single neurons.
    """
    path = Path(path)
    document = _read(path)
    _check_sum(path, document, signed)
    cfg, ours = document["cfg"], document.get("oacore", {})
    try:
        sizes = {name: int(cfg[name]) for name in ("n_layers", "n_heads", "d_model")}
        own = Graph(sizes["n_layers"], sizes["n_heads"], int(ours.get("n_kv_heads", sizes["n_heads"])), bool(cfg["parallel_attn_mlp"]))
        facts = {"d_model": sizes["d_model"], **ours.get("facts", {})}
        if graph is not None and graph.mib != own.mib:
            raise UserError(f"cfg is that of {own.mib}; allowed: that of the model, {graph.mib}")
        if (version := ours.get("schema_version", SCHEMA_VERSION)) != SCHEMA_VERSION:
            raise UserError(f"oacore.schema_version is {version!r}; allowed: {SCHEMA_VERSION}")
        if model_hash is not None and (found := facts.get("model_hash", model_hash)) != model_hash:
            raise UserError(f"model_hash is {found!r}, that of another model; allowed: {model_hash!r}")
        graph = graph or own
        mask, scores = _edges(graph.mib, document["edges"])
        node_scores = _node_scores(graph, document["nodes"])
        return Circuit.of(graph, group_scores(graph, scores), group_masks(graph, mask), facts, node_scores)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise UserError(f"{path}: not a MIB graph JSON ({type(error).__name__}: {error}); see docs/mib.md") from None


def _check_sum(path: Path, document: dict[str, Any], signed: bool) -> None:
    about = document.get("oacore", {})
    found = about.pop(KEY, None) if isinstance(about, dict) else None
    if (signed and found is None) or (found is not None and found != digest(document)):
        raise UserError(f"{path}: damaged or edited, its checksum does not fit; delete oacore.{KEY} from it if the change is meant")


def _read(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: can't be read as JSON: {error}") from None
    keys = ("cfg", "nodes", "edges")
    if not isinstance(document, dict) or not all(isinstance(document.get(key), dict) for key in keys):
        raise UserError(f"{path}: not a MIB graph JSON; allowed: an object with the objects {', '.join(keys)}")
    return document


def _edges(mib: Graph, entries: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """The file's mask bool and scores float64, both [n_bwd, S]."""
    mask, scores = np.zeros(mib.valid.shape, bool), np.zeros(mib.valid.shape)
    for name, entry in entries.items():
        s, n = mib.edge(name)
        if not isinstance(entry, dict) or not {"score", "in_graph"} <= set(entry):
            raise UserError(f"edge {name!r} is {entry!r}; allowed: an object with score and in_graph")
        scores[n, s] = _score(f"edge {name!r}", entry["score"])
        mask[n, s] = _in_graph(f"edge {name!r}", entry["in_graph"])
    return mask, scores


def _node_scores(graph: Graph, entries: dict[str, Any]) -> np.ndarray | None:
    """float64 [S], NaN where the file has none, or None."""
    scores = np.full(graph.n_sources, np.nan)
    for name, entry in entries.items():
        if name == "logits":
            continue
        s = graph.source_index(name)
        if not isinstance(entry, dict) or "in_graph" not in entry:
            raise UserError(f"node {name!r} is {entry!r}; allowed: an object with in_graph")
        if _in_graph(f"node {name!r}", entry["in_graph"]) and not all(entry.get("neurons", ())):
            raise UserError(f"node {name!r} is in the circuit with some of its neurons only; allowed: circuits of whole nodes")
        if "score" in entry:
            scores[s] = _score(f"node {name!r}", entry["score"])
    return None if np.isnan(scores).all() else scores


def _score(what: str, value: object) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise UserError(f"score of {what} is {value!r}; allowed: finite numbers")
    return float(value)


def _in_graph(what: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise UserError(f"in_graph of {what} is {value!r}; allowed: true, false")
    return value


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


def edge_frequency(masks: np.ndarray) -> np.ndarray:
    """In which share of the circuits an edge is: bool [n, J, S] -> float64 [J, S]."""
    return masks.mean(0)


class Stability(NamedTuple):
    """Mean Jaccard index of all pairs of circuits, with its 95 % interval."""

    jaccard: float
    low: float
    high: float


def stability(masks: np.ndarray, *, seed: int = 0, n_resamples: int = 2000) -> Stability:
    """How alike are circuits that should be one, such as those of several seeds?

    The interval is a percentile bootstrap over circuits. Pairs of a resample that are one circuit drawn twice are left out, since their
    agreement says nothing. Two empty circuits agree fully.

    Args:
        masks: bool [n, J, S], n >= 2; with n = 2 there is one pair, and the interval is that point.

    Raises:
        ValueError: fewer than two circuits.
    """
    n = len(masks)
    if n < 2:
        raise ValueError(f"stability of {n} circuits; allowed: at least 2")
    flat = masks.reshape(n, -1).astype(np.float64)
    shared = flat @ flat.T
    either = flat.sum(1)[:, None] + flat.sum(1) - shared
    jaccard = np.divide(shared, either, out=np.ones((n, n)), where=either > 0)
    others = 1 - np.eye(n)
    drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), n_resamples).astype(np.float64)  # [n_resamples, n]
    pairs = ((drawn @ others) * drawn).sum(1)
    sums = ((drawn @ (jaccard * others)) * drawn).sum(1)
    low, high = np.quantile(sums[pairs > 0] / pairs[pairs > 0], (0.025, 0.975))
    return Stability(float(jaccard[np.triu_indices(n, 1)].mean()), float(low), float(high))
