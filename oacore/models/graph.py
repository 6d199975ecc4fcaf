"""The residual-stream graph of a pre-norm decoder: sources, destinations, edges, their names, and dangling-edge
pruning.

A *source* writes to the residual stream, a *destination* reads it, and an *edge* joins a source to a destination that
reads after the source has written. A *node* is `input`, a head, an MLP or `logits`: a head's q, k and v destinations
together feed its source. Key and value destinations exist once per key/value head and feed every query head of its
group.

Masks are bool [..., J, S]. Functions of masks use only what numpy arrays and torch tensors share, so both work, on any
device. Names and numbering are those of the MIB benchmark (EAP-IG 7af394a), which has key and value destinations per
*query* head: see `Graph.mib`.

Symbols: L layers, H heads, KV key/value heads, S sources, J destinations; s and j index them.
"""

from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import numpy as np

from oacore.errors import UserError

Array = TypeVar("Array", bound=Any)  # numpy array or torch tensor; naming torch here would need it installed


class Size(NamedTuple):
    """How much of the graph a mask keeps once dangling edges are dropped; integer arrays of the mask's leading shape
    [...].
    """

    edges: Any
    nodes: Any  # those with an edge out: input, heads and MLPs, but not logits, as MIB counts them


@dataclass(frozen=True)
class Graph:
    """Numbering of sources and destinations.

    Sources: `input`, then per layer all heads `a{l}.h{h}` and `m{l}`. Destinations: per layer all `a{l}.h{h}<q>`, all
    `a{l}.h{g}<k>`, all `a{l}.h{g}<v>` (g counts key/value heads) and `m{l}`; last `logits`.

    Args:
        parallel: attention and MLP of a block read the same residual (GPT-NeoX), so heads don't reach the MLP of their
            own layer.

    Raises:
        UserError: a size below 1, or heads that key/value heads don't divide.
    """

    n_layers: int
    n_heads: int
    n_kv_heads: int
    parallel: bool

    def __post_init__(self) -> None:
        if min(self.n_layers, self.n_heads, self.n_kv_heads) < 1 or self.n_heads % self.n_kv_heads:
            raise UserError(f"{self}: allowed are sizes of at least 1, with n_heads a multiple of n_kv_heads")

    # Numbering. `layer` may be n_layers in first_source and first_destination: one past the last source, and logits.

    @property
    def n_sources(self) -> int:
        """S: the input, all heads and all MLPs."""
        return self.first_source(self.n_layers)

    @property
    def n_destinations(self) -> int:
        """J: what heads read as q, k and v, what MLPs read, and the logits."""
        return self.first_destination(self.n_layers) + 1

    @property
    def group_size(self) -> int:
        """Query heads per key/value head."""
        return self.n_heads // self.n_kv_heads

    def first_source(self, layer: int) -> int:
        """Also the number of sources that the layer's attention reads: input and all earlier layers."""
        return 1 + layer * (self.n_heads + 1)

    def first_destination(self, layer: int) -> int:
        """The layer's first destination; of layer L that is the logits."""
        return layer * (self.n_heads + 2 * self.n_kv_heads + 1)

    def sources(self, layer: int) -> slice:
        """The layer's heads and its MLP."""
        return slice(self.first_source(layer), self.first_source(layer + 1))

    def heads(self, layer: int) -> slice:
        """The layer's heads among the sources."""
        return slice(self.first_source(layer), self.mlp_source(layer))

    def mlp_source(self, layer: int) -> int:
        """What the MLP of the layer writes."""
        return self.first_source(layer + 1) - 1

    def destinations(self, layer: int) -> slice:
        """All that the layer's heads and MLP read."""
        return slice(self.first_destination(layer), self.first_destination(layer + 1))

    def attention(self, layer: int) -> slice:
        """All q, then all k, then all v destinations: H + 2 KV of them."""
        return slice(self.first_destination(layer), self.mlp_destination(layer))

    def qkv(self, layer: int) -> tuple[slice, slice, slice]:
        """The q [H], k [KV] and v [KV] parts of `attention`."""
        q = self.first_destination(layer)
        k = q + self.n_heads
        v = k + self.n_kv_heads
        return slice(q, k), slice(k, v), slice(v, v + self.n_kv_heads)

    def mlp_destination(self, layer: int) -> int:
        """What the MLP of the layer reads."""
        return self.first_destination(layer + 1) - 1

    # Edges.

    def _causal(self, masks: Array) -> Array:
        """A copy of masks [..., J, S] without the entries that are no edges."""
        masks = masks & True
        for layer in range(self.n_layers):
            masks[..., self.attention(layer), self.first_source(layer) :] = False
            masks[
                ...,
                self.mlp_destination(layer),
                self.first_source(layer) if self.parallel else self.mlp_source(layer) :,
            ] = False
        return masks

    @cached_property
    def valid(self) -> np.ndarray:
        """bool [J, S], read-only: where (s, j) is an edge. Each row is a run of True: a destination reads a prefix of
        the sources.
        """
        valid = self._causal(np.ones((self.n_destinations, self.n_sources), bool))
        valid.flags.writeable = False
        return valid

    @cached_property
    def n_edges(self) -> int:
        """How many edges there are."""
        return int(self.valid.sum())

    # Names.

    @cached_property
    def source_names(self) -> tuple[str, ...]:
        """Names [S] as MIB's: input, a0.h0, m0."""
        layers = ([*(f"a{layer}.h{h}" for h in range(self.n_heads)), f"m{layer}"] for layer in range(self.n_layers))
        return ("input", *(name for layer in layers for name in layer))

    @cached_property
    def destination_names(self) -> tuple[str, ...]:
        """Names [J] as MIB's: a0.h0<q>, m0, logits."""
        reads = [
            (h, x) for x, n in (("q", self.n_heads), ("k", self.n_kv_heads), ("v", self.n_kv_heads)) for h in range(n)
        ]
        layers = ([*(f"a{layer}.h{h}<{x}>" for h, x in reads), f"m{layer}"] for layer in range(self.n_layers))
        return (*(name for layer in layers for name in layer), "logits")

    @cached_property
    def _source_indices(self) -> dict[str, int]:
        return {name: s for s, name in enumerate(self.source_names)}

    @cached_property
    def _destination_indices(self) -> dict[str, int]:
        return {name: j for j, name in enumerate(self.destination_names)}

    def source_index(self, name: str) -> int:
        """UserError for an unknown name."""
        allowed = f"input, a{{l}}.h{{h}}, m{{l}} with l < {self.n_layers}, h < {self.n_heads}"
        return _look_up("source", name, self._source_indices, allowed)

    def destination_index(self, name: str) -> int:
        """UserError for an unknown name."""
        allowed = (
            f"a{{l}}.h{{h}}<q>, a{{l}}.h{{g}}<k>, a{{l}}.h{{g}}<v>, m{{l}}, logits "
            f"with l < {self.n_layers}, h < {self.n_heads}, g < {self.n_kv_heads}"
        )
        return _look_up("destination", name, self._destination_indices, allowed)

    def edge(self, name: str) -> tuple[int, int]:
        """`a0.h1->m3` -> (s, j). UserError for an unknown name, or if the destination reads before the source
        writes.
        """
        source, arrow, destination = name.partition("->")
        if not arrow:
            raise UserError(
                f"edge {name!r}: allowed is source->destination, such as 'input->{self.destination_names[0]}'"
            )
        s, j = self.source_index(source), self.destination_index(destination)
        if not self.valid[j, s]:
            last = self.source_names[self.valid[j].sum() - 1]
            raise UserError(f"edge {name!r}: {destination} reads before {source} writes; allowed: sources up to {last}")
        return s, j

    def edge_name(self, s: int, j: int) -> str:
        """ValueError if (s, j) is no edge."""
        if not (0 <= s < self.n_sources and 0 <= j < self.n_destinations and self.valid[j, s]):
            raise ValueError(f"(s={s}, j={j}) is no edge of {self}")
        return f"{self.source_names[s]}->{self.destination_names[j]}"

    # The MIB benchmark's graph: the same sources (n_fwd), but keys and values per query head (n_bwd). Its matrices are
    # [n_fwd, n_bwd].

    @cached_property
    def mib(self) -> "Graph":
        """This graph with keys and values ungrouped: its destination names and numbers are those of MIB files."""
        return replace(self, n_kv_heads=self.n_heads)

    @cached_property
    def mib_destinations(self) -> np.ndarray:
        """int [n_bwd], read-only: our j for each of MIB's destinations, so that `masks[..., mib_destinations, :]`
        ungroups masks.
        """
        h = np.arange(self.n_heads)
        k = self.n_heads + h // self.group_size
        block = np.concatenate((h, k, k + self.n_kv_heads, [self.first_destination(1) - 1]))  # [3 H + 1]
        starts = [[self.first_destination(layer)] for layer in range(self.n_layers)]
        ours = np.append(starts + block, self.n_destinations - 1)
        ours.flags.writeable = False
        return ours

    def mib_edge(self, name: str) -> tuple[int, int]:
        """An edge by its MIB name -> our (s, j): `a0.h5->a3.h5<k>` leads to the key that query head 5 uses. UserError
        as `edge`.
        """
        s, n = self.mib.edge(name)
        return s, int(self.mib_destinations[n])

    def mib_edge_names(self, s: int, j: int) -> tuple[str, ...]:
        """All MIB names of our edge: one per query head of the group for keys and values. ValueError if (s, j) is no
        edge.
        """
        self.edge_name(s, j)
        return tuple(self.mib.edge_name(s, int(n)) for n in np.flatnonzero(self.mib_destinations == j))

    # Circuits.

    def prune(self, masks: Array) -> Array:
        """Drop dangling edges: those into a node with no path to logits, and those out of a node with no path from
        input.

        Args:
            masks: bool [..., J, S], numpy or torch; entries that are no edges count as absent.

        Returns:
            A new bool array [..., J, S]: exactly the edges that lie on some path from input to logits.

        Raises:
            ValueError: masks of another shape or dtype.
        """
        if tuple(masks.shape[-2:]) != (self.n_destinations, self.n_sources) or not str(masks.dtype).endswith("bool"):
            raise ValueError(
                f"masks {masks.dtype} {list(masks.shape)}; allowed: bool [..., {self.n_destinations}, {self.n_sources}]"
            )
        H, KV, batch = self.n_heads, self.n_kv_heads, tuple(masks.shape[:-2])
        kept = self._causal(masks)
        reached = kept[..., -1, :] & False  # [..., S] the source has a path from input
        reached[..., 0] = True
        for layer in range(self.n_layers):
            into = (kept[..., self.attention(layer), :] & reached[..., None, :]).any(-1)  # [..., H + 2 KV]
            q, k, v = into[..., :H], into[..., H : H + KV], into[..., H + KV :]
            by_group = q.reshape((*batch, KV, self.group_size)) | (k | v)[..., None]  # [..., KV, H / KV]
            reached[..., self.heads(layer)] = by_group.reshape((*batch, H))
            reached[..., self.mlp_source(layer)] = (kept[..., self.mlp_destination(layer), :] & reached).any(-1)
        useful = kept[..., 0] & False  # [..., J] the destination has a path to logits
        useful[..., -1] = True
        for layer in reversed(range(self.n_layers)):
            useful[..., self.mlp_destination(layer)] = (kept[..., self.mlp_source(layer)] & useful).any(-1)
            head = (kept[..., self.heads(layer)] & useful[..., None]).any(-2)  # [..., H] the head's source has one
            group = head.reshape((*batch, KV, self.group_size)).any(-1)  # [..., KV]
            for destinations, of in zip(self.qkv(layer), (head, group, group), strict=True):
                useful[..., destinations] = of
        return kept & reached[..., None, :] & useful[..., None]

    def size(self, masks: Any) -> Size:
        """Edges and nodes left after pruning masks [..., J, S]; circuit size is `.edges`. ValueError as `prune`."""
        kept = self.prune(masks)
        return Size(edges=kept.sum((-2, -1)), nodes=kept.any(-2).sum(-1))


def _look_up(kind: str, name: str, indices: dict[str, int], allowed: str) -> int:
    if name in indices:
        return indices[name]
    nearest = "".join(f"; nearest: {match!r}" for match in get_close_matches(name, indices, 1))
    raise UserError(f"{kind} {name!r} is not in this graph{nearest}; allowed: {allowed}")
