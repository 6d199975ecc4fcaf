"""The published IOI circuit of GPT-2-small, which people found by hand."""

import numpy as np

from oacore.circuits.search import Found, SearchRequest, seed_by_seed
from oacore.errors import UserError
from oacore.models.graph import Graph

# Wang et al. 2022, figure 2 and section 3; the classes of heads as (layer, head).
IOI_HEADS = {
    "previous token": ((2, 2), (4, 11)),
    "duplicate token": ((0, 1), (0, 10), (3, 0)),
    "induction": ((5, 5), (5, 8), (5, 9), (6, 9)),
    "s2 inhibition": ((7, 3), (7, 9), (8, 6), (8, 10)),
    "negative": ((10, 7), (11, 10)),
    "name mover": ((9, 9), (9, 6), (10, 0)),
    "backup name mover": ((10, 10), (10, 6), (10, 2), (10, 1), (11, 2), (9, 7), (9, 0), (11, 9)),
}
# Which class feeds which, and as what, as ACDC's `get_ioi_true_edges` has it.
IOI_LINKS = (
    ("input", "previous token", "qkv"),
    ("input", "duplicate token", "qkv"),
    ("input", "s2 inhibition", "q"),
    ("input", "negative", "kv"),
    ("input", "name mover", "kv"),
    ("input", "backup name mover", "kv"),
    ("previous token", "induction", "kv"),
    ("induction", "s2 inhibition", "kv"),
    ("duplicate token", "s2 inhibition", "kv"),
    ("s2 inhibition", "negative", "q"),
    ("s2 inhibition", "name mover", "q"),
    ("s2 inhibition", "backup name mover", "q"),
    ("negative", "logits", ""),
    ("name mover", "logits", ""),
    ("backup name mover", "logits", ""),
)


def manual_ioi(graph: Graph) -> np.ndarray:
    """The published circuit as edges, bool [J, S]; all MLPs are in it, as in ACDC.

    963 edges; ACDC counts 1,041, because to it the way from each of the 26 heads' q, k and v into the head is an edge
    too.

    Raises:
        UserError: a graph that is not GPT-2-small's.
    """
    if (graph.n_layers, graph.n_heads, graph.n_kv_heads, graph.parallel) != (12, 12, 12, False):
        raise UserError(
            f"circuits.methods: 'manual' on {graph}; allowed: GPT-2-small, of 12 layers with 12 heads, whose circuit "
            "it is"
        )
    mask = np.zeros(graph.valid.shape, bool)

    def add(source: str, destination: str) -> None:
        s, j = graph.source_index(source), graph.destination_index(destination)
        mask[j, s] |= graph.valid[j, s]

    heads = [head for of_class in IOI_HEADS for head in _names(of_class)]
    mlps = [f"m{layer}" for layer in range(graph.n_layers)]
    for writer in ("input", *mlps, *heads):
        for reader in (*mlps, *([f"{head}<{x}>" for head in heads for x in "qkv"] if writer in mlps else ())):
            add(writer, reader)
    for mlp in mlps:
        add(mlp, "logits")
    add("input", "logits")
    for source, destination, reads in IOI_LINKS:
        for writer in ["input"] if source == "input" else _names(source):
            for reader in (
                ["logits"]
                if destination == "logits"
                else [f"{head}<{x}>" for head in _names(destination) for x in reads]
            ):
                add(writer, reader)
    return graph.prune(mask)


def _names(of_class: str) -> list[str]:
    return [f"a{layer}.h{head}" for layer, head in IOI_HEADS[of_class]]


def search(request: SearchRequest) -> Found:
    """The one circuit there is."""
    masks = manual_ioi(request.graph)[None]
    return seed_by_seed(request, lambda seed, _: (masks, masks.astype(float)))
