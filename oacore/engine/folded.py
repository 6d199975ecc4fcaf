"""Weights as the masked-edge engine reads them: norms folded into the projections after them, dead heads left out.

LayerNorm models have every writer centred over the stream's coordinates: LayerNorm removes that mean anyway, and
without it a norm is an RMS scale for every family, or nothing. Folding is done in float64 and stored in the model's
dtype; for other models the writers are the model's own tensors, not copies.

Symbols: H heads, KV key/value heads, k head width, d model width, f MLP width, S sources, J destinations.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from oacore.models.weights import Block, Model, Norm


@dataclass(frozen=True)
class Folded:
    """One block."""

    block: Block
    read: Tensor  # [H + 2 KV, d, k] projections to q, k and v
    read_bias: Tensor | None  # [H + 2 KV, k]
    write: Tensor  # [H, k, d] W_O
    b_O: Tensor | None
    W_in: Tensor  # [d, f]
    W_gate: Tensor | None
    b_in: Tensor | None
    W_out: Tensor  # [f, d]
    b_out: Tensor | None


class Layer(NamedTuple):
    """One block with the heads that a plan keeps, in the plan's numbering.

    Its q, k and v destinations and the MLP's are consecutive.
    """

    number: int  # of the block in the model
    folded: Folded
    read: Tensor
    read_bias: Tensor | None
    write: Tensor
    key_of_head: Tensor | None  # [H] which of the kept keys a head uses; None: one each
    heads: Tensor | slice  # which of the model's heads
    groups: Tensor | slice  # which of the model's key/value heads
    n_heads: int
    n_kv_heads: int
    has_mlp: bool
    first_source: int
    first_destination: int

    @property
    def q(self) -> slice:
        """The destinations of its queries, one a head."""
        return slice(self.first_destination, self.first_destination + self.n_heads)

    @property
    def kv(self) -> slice:
        """The destinations of its keys, then of its values."""
        return slice(self.q.stop, self.q.stop + 2 * self.n_kv_heads)

    @property
    def mlp(self) -> slice:
        """The MLP's destination, or none."""
        return slice(self.kv.stop, self.kv.stop + self.has_mlp)

    @property
    def mlp_source(self) -> int:
        """The MLP's source, after the heads'."""
        return self.first_source + self.n_heads


class Plan(NamedTuple):
    """What a pass computes. Sources and destinations are renumbered without the heads and MLPs left out."""

    layers: tuple[Layer, ...]
    n_sources: int
    sources: Tensor | None  # the graph's s of each source kept; None: all
    destinations: Tensor | None  # the graph's j of each destination kept


class Weights:
    """A model's folded weights."""

    def __init__(self, model: Model):
        self.model = model
        self.centred = model.centred
        self.blocks = tuple(self._fold(block) for block in model.blocks)
        self.all = self._plan(None)

    def centre(self, written: Tensor) -> Tensor:
        """What is written to the stream [..., d] without its mean over d, for LayerNorm models; differentiable."""
        if not self.centred:
            return written
        return (written.double() - written.double().mean(-1, keepdim=True)).to(written.dtype)

    def _fold(self, block: Block) -> Folded:
        k, biases, reads = self.model.d_head, [], []
        for weight, bias in ((block.W_Q, block.b_Q), (block.W_K, block.b_K), (block.W_V, block.b_V)):
            flat_bias = None if bias is None else bias.flatten()
            folded, shift = _fold_norm(block.attention_norm, weight.flatten(1), flat_bias)
            reads.append(folded.unflatten(1, (-1, k)).transpose(0, 1))
            biases += [] if shift is None else [shift.unflatten(0, (-1, k))]
        W_in, b_in = _fold_norm(block.mlp_norm, block.W_in, block.b_in)
        return Folded(
            block,
            torch.cat(reads),
            torch.cat(biases) if biases else None,
            self.centre(block.W_O),
            None if block.b_O is None else self.centre(block.b_O),
            W_in,
            None if block.W_gate is None else _fold_norm(block.mlp_norm, block.W_gate, None)[0],
            b_in,
            self.centre(block.W_out),
            None if block.b_out is None else self.centre(block.b_out),
        )

    def plan(self, masks: Tensor) -> Plan:
        """The plan without heads and MLPs that none of the pruned masks [M, J, S] uses.

        Gradients of masks are then exact where a mask is above 0, and 0 elsewhere. Models whose heads meet in a norm
        (Gemma-2 and 3, OLMo-2) keep all: its scale depends on each of them. This waits for the device, so it is not for
        CUDA graphs.
        """
        live = masks.detach().ne(0).any(0).any(0).cpu()
        if live.all() or not self.model.heads_apart:
            return self.all
        return self._plan(live)

    def _plan(self, live: Tensor | None) -> Plan:
        """The plan of the sources in `live`, bool [S] on the CPU; None keeps all."""
        graph, device = self.model.graph, self.model.device
        layers: list[Layer] = []
        sources: list[int] = [0]
        destinations: list[int] = []
        for number, folded in enumerate(self.blocks):
            heads = list(range(graph.n_heads))
            if live is not None:
                heads = live[graph.heads(number)].nonzero().flatten().tolist()
            has_mlp = live is None or bool(live[graph.mlp_source(number)])
            groups = sorted({head // graph.group_size for head in heads})
            keys = [graph.n_heads + group for group in groups]
            rows = [*heads, *keys, *(key + graph.n_kv_heads for key in keys)]
            used = slice(None) if len(heads) == graph.n_heads else torch.tensor(rows, dtype=torch.long, device=device)
            of_heads = used if isinstance(used, slice) else used[: len(heads)]
            shared = [groups.index(head // graph.group_size) for head in heads]
            layers.append(
                Layer(
                    number,
                    folded,
                    folded.read[used],
                    None if folded.read_bias is None else folded.read_bias[used],
                    folded.write[of_heads],
                    None if len(groups) == len(heads) else torch.tensor(shared, device=device),
                    of_heads,
                    used if isinstance(used, slice) else torch.tensor(groups, dtype=torch.long, device=device),
                    len(heads),
                    len(groups),
                    has_mlp,
                    first_source=len(sources),
                    first_destination=len(destinations),
                )
            )
            sources += [graph.first_source(number) + head for head in heads] + [graph.mlp_source(number)] * has_mlp
            destinations += [graph.first_destination(number) + row for row in rows]
            destinations += [graph.mlp_destination(number)] * has_mlp
        destinations.append(graph.n_destinations - 1)
        if live is None:
            return Plan(tuple(layers), len(sources), None, None)
        kept = (torch.tensor(numbers, device=device) for numbers in (sources, destinations))
        return Plan(tuple(layers), len(sources), *kept)


def _fold_norm(norm: Norm | None, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Weight [d, n] and bias [n] of a projection that reads a centred x times its RMS scale instead of norm(x)."""
    if norm is None:
        return weight, bias
    wide = weight.double()
    folded = (norm.weight.double()[:, None] * wide).to(weight.dtype)
    if norm.bias is None:
        return folded, bias
    shift = norm.bias.double() @ wide
    return folded, (shift if bias is None else shift + bias.double()).to(weight.dtype)
