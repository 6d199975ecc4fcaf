"""The graph's edges as a list, grouped for the regulariser and the clip."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from oacore.models.graph import Graph

CLIP = 5.0  # gradient norm per edge group
N_GROUPS = 4  # kinds of edges, each over all layers, as in the authors' code


@dataclass(frozen=True)
class Edges:
    """The graph's E edges as flat indices, and what the regulariser and the clip group them by."""

    graph: Graph
    index: Tensor  # [E] into a flattened [J S]
    group: Tensor  # [E] kind of destination (attention; MLP or logits) and of source (head; MLP or input)
    writer: Tensor  # [L H] the source of each head
    readers: tuple[Tensor, Tensor, Tensor]  # its q, k and v destinations
    read_by: Tensor  # [3, S] the destinations through which each source's node reads: a head's q, k and v
    feeds: Tensor  # [J - 1, H / KV] the sources of the nodes that each destination but the logits belongs to

    @classmethod
    def of(cls, graph: Graph, device: torch.device) -> "Edges":
        """The edges of a graph, as tensors on the engine's device."""
        j, s = np.nonzero(graph.valid)
        is_mlp = np.isin(
            j, [graph.mlp_destination(layer) for layer in range(graph.n_layers)] + [graph.n_destinations - 1]
        )
        from_head = ~np.isin(s, [0] + [graph.mlp_source(layer) for layer in range(graph.n_layers)])
        heads = np.arange(graph.n_heads)
        layers = range(graph.n_layers)
        readers = (
            np.concatenate([graph.qkv(layer)[0].start + heads for layer in layers]),
            *(
                np.concatenate([graph.qkv(layer)[part].start + heads // graph.group_size for layer in layers])
                for part in (1, 2)
            ),
        )

        read_by, feeds = _nodes(graph)

        def tensor(array: np.ndarray) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(array)).to(device)

        return cls(
            graph,
            tensor(j * graph.n_sources + s),
            tensor(is_mlp * 2 + from_head),
            tensor(np.concatenate([graph.first_source(layer) + heads for layer in layers])),
            tuple(map(tensor, readers)),  # type: ignore[arg-type]
            tensor(read_by),
            tensor(feeds),
        )

    def prune(self, masks: Tensor) -> Tensor:
        """`Graph.prune` of masks [B, J, S] that are False where there is no edge; on a GPU in about 25 operations,
        however many layers there are.
        """
        return self.graph.prune(masks) if masks.device.type == "cpu" else self.on_paths(masks)

    def on_paths(self, masks: Tensor) -> Tensor:
        """`prune` by squaring: whether one node reaches another in 1, 2, 4, ... edges, as products of 0 and 1."""
        q, k, v = self.read_by
        step = masks[:, q] | masks[:, k] | masks[:, v]  # [B, S, S] from the second node to the first
        reaches = step.float()
        reaches.diagonal(dim1=1, dim2=2).fill_(1)
        for _ in range((2 * self.graph.n_layers).bit_length()):  # a path has at most a head and an MLP of each layer
            reaches = (reaches @ reaches).clamp_(max=1)
        from_input = reaches[:, :, 0] > 0  # [B, S]
        to_logits = (masks[:, -1:].float() @ reaches)[:, 0] > 0  # [B, S]
        useful = F.pad(to_logits[:, self.feeds].any(-1), (0, 1), value=True)  # [B, J]
        return masks & from_input[:, None] & useful[:, :, None]

    def full(self, values: Tensor) -> Tensor:
        """Values [..., E] as [..., J, S], zeros where there is no edge; differentiable."""
        flat = values.new_zeros((*values.shape[:-1], self.graph.n_destinations * self.graph.n_sources))
        return flat.index_copy(-1, self.index, values).unflatten(-1, (self.graph.n_destinations, self.graph.n_sources))

    def node_term(self, theta: Tensor) -> Tensor:
        """tanh(2 in-and-out-degree / (L H)) L H / 2 summed over heads, [F]: it favours circuits with few heads."""
        full = self.full(theta)
        into, out = full.sum(2), full.sum(1)  # [F, J], [F, S]
        q, k, v = (into[:, reader] for reader in self.readers)
        n = len(self.writer)
        degree = out[:, self.writer] + q + (k + v) / self.graph.group_size
        return ((2 * degree / n).tanh() * n / 2).sum(1)

    def clip(self, gradient: Tensor) -> Tensor:
        """A gradient [F, E] with the norm of every group of edges of every fit at most CLIP."""
        squares = gradient.new_zeros((len(gradient), N_GROUPS)).index_add(1, self.group, gradient.square())
        return gradient * (CLIP / squares.sqrt().clamp(min=CLIP))[:, self.group]


def _nodes(graph: Graph) -> tuple[np.ndarray, np.ndarray]:
    """`Edges.read_by` and `Edges.feeds`. The input, which reads nothing, is given what reads the input alone."""
    H, group = graph.n_heads, graph.group_size
    read_by = np.zeros((3, graph.n_sources), int)
    feeds = np.zeros((graph.n_destinations - 1, group), int)
    for layer in range(graph.n_layers):
        first, mlp = graph.first_source(layer), graph.mlp_destination(layer)
        q, k, v = (np.arange(graph.n_destinations)[part] for part in graph.qkv(layer))
        read_by[:, graph.heads(layer)] = q, k.repeat(group), v.repeat(group)
        read_by[:, graph.mlp_source(layer)] = mlp
        heads = first + np.arange(H)
        feeds[q], feeds[k], feeds[v] = heads[:, None], heads.reshape(-1, group), heads.reshape(-1, group)
        feeds[mlp] = graph.mlp_source(layer)
    return read_by, feeds
