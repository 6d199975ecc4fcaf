"""The graph's edges as a list, grouped for the regulariser and the clip."""

from dataclasses import dataclass

import numpy as np
import torch
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

        def tensor(array: np.ndarray) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(array)).to(device)

        return cls(
            graph,
            tensor(j * graph.n_sources + s),
            tensor(is_mlp * 2 + from_head),
            tensor(np.concatenate([graph.first_source(layer) + heads for layer in layers])),
            tuple(map(tensor, readers)),  # type: ignore[arg-type]
        )

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
