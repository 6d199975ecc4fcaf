"""A circuit: edges of a graph with their scores, its MIB graph JSON file, and statistics over several circuits.

Files are those of the MIB benchmark (`Graph.to_json` of EAP-IG 7af394a), with the facts about a circuit in one more
key, "oacore", which EAP-IG does not read. They name keys and values per *query* head. A key/value head that several
query heads share is one destination to us:

* saved, each of its query heads gets the edge's score, and the edge where the query head itself lies on a path to
  logits;
* loaded, it is in where any of its query heads' edges is, with the score of largest magnitude among them.

Symbols: J destinations, S sources, E edges, n circuits; `...` any leading dimensions.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from oacore import __version__
from oacore.circuits.circuit import Circuit
from oacore.errors import UserError
from oacore.models.graph import Graph
from oacore.store.artefacts import KEY, digest_of_json
from oacore.store.atomic import atomic_path

SCHEMA_VERSION = 1


# Keys and values per query head, as in MIB's graph.
def ungroup(graph: Graph, values: np.ndarray) -> np.ndarray:
    """Masks or scores [..., J, S] -> [..., n_bwd, S] of `graph.mib`, the same for every query head of a group."""
    return values[..., graph.mib_destinations, :]


def group_masks(graph: Graph, masks: np.ndarray) -> np.ndarray:
    """bool [..., n_bwd, S] of `graph.mib` -> [..., J, S]: an edge is in where that of any query head of its group
    is.
    """
    grouped = np.zeros((*masks.shape[:-2], *graph.valid.shape), bool)
    for n, j in enumerate(graph.mib_destinations):
        grouped[..., j, :] |= masks[..., n, :]
    return grouped


def group_scores(graph: Graph, scores: np.ndarray) -> np.ndarray:
    """float [n_bwd, S] of `graph.mib` -> [J, S]: of a group's scores the one of largest magnitude, the positive one of
    a tie.
    """
    highest, lowest = np.full(graph.valid.shape, -np.inf), np.full(graph.valid.shape, np.inf)
    np.maximum.at(highest, graph.mib_destinations, scores)
    np.minimum.at(lowest, graph.mib_destinations, scores)
    return np.where(highest >= -lowest, highest, lowest)


# Files.
def save_circuit(path: str | Path, circuit: Circuit) -> None:
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
            f"{mib.source_names[s]}->{mib.destination_names[n]}": {
                "score": float(scores[n, s]),
                "in_graph": bool(mask[n, s]),
            }
            for s, n in _in_file_order(mib)
        },
        "oacore": {
            "schema_version": SCHEMA_VERSION,
            "package_version": __version__,
            "n_kv_heads": graph.n_kv_heads,
            "facts": {name: value for name, value in circuit.facts.items() if name != "d_model"},
        },
    }
    document["oacore"] |= {KEY: digest_of_json(document)}
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


def load_circuit(
    path: str | Path, graph: Graph | None = None, model_hash: str | None = None, *, signed: bool = False
) -> Circuit:
    """Read MIB graph JSON, ours or another project's; dangling edges are dropped.

    An edge that the file leaves out has score 0 and is not in the circuit, and nodes are in it by their edges, as
    EAP-IG reads it.

    Args:
        graph: that of the model. Without it keys and values are taken to be per query head, unless the file says
            otherwise (ours do).
        model_hash: of the model; checked where the file names one (ours do).
        signed: refuse a file that lacks our checksum, which is checked wherever there is one.

    Raises:
        UserError: the file can't be read, is no MIB graph JSON, names a node or edge that the graph lacks, is of
            another model, holds a score that is no finite number, or a circuit of single neurons.
    """
    path = Path(path)
    document = _read(path)
    _check_sum(path, document, signed)
    cfg, extra = document["cfg"], document.get("oacore", {})
    try:
        sizes = {name: int(cfg[name]) for name in ("n_layers", "n_heads", "d_model")}
        described = Graph(
            sizes["n_layers"],
            sizes["n_heads"],
            int(extra.get("n_kv_heads", sizes["n_heads"])),
            bool(cfg["parallel_attn_mlp"]),
        )
        facts = {"d_model": sizes["d_model"], **extra.get("facts", {})}
        if graph is not None and graph.mib != described.mib:
            raise UserError(f"cfg is that of {described.mib}; allowed: that of the model, {graph.mib}")
        if (version := extra.get("schema_version", SCHEMA_VERSION)) != SCHEMA_VERSION:
            raise UserError(f"oacore.schema_version is {version!r}; allowed: {SCHEMA_VERSION}")
        if model_hash is not None and (named := facts.get("model_hash", model_hash)) != model_hash:
            raise UserError(f"model_hash is {named!r}, that of another model; allowed: {model_hash!r}")
        graph = graph or described
        mask, scores = _edges(graph.mib, document["edges"])
        node_scores = _node_scores(graph, document["nodes"])
        return Circuit.of(graph, group_scores(graph, scores), group_masks(graph, mask), facts, node_scores)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise UserError(f"{path}: not a MIB graph JSON ({type(error).__name__}: {error}); see docs/mib.md") from None


def _check_sum(path: Path, document: dict[str, Any], signed: bool) -> None:
    extra = document.get("oacore", {})
    checksum = extra.pop(KEY, None) if isinstance(extra, dict) else None
    if (signed and checksum is None) or (checksum is not None and checksum != digest_of_json(document)):
        raise UserError(
            f"{path}: damaged or edited, its checksum does not fit; delete oacore.{KEY} from it if the change is meant"
        )


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
            raise UserError(
                f"node {name!r} is in the circuit with some of its neurons only; allowed: circuits of whole nodes"
            )
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
