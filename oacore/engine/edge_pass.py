"""A pass whose edges are cut, in plain PyTorch and differentiable in the weights, for models that are fine-tuned with
an ablation in place. The engine (`masked`) is many times faster, and knows gradients of masks and constants alone.

Symbols: B prompts, T tokens, S sources, J destinations, n of either, H heads, k head width, d model width, V
vocabulary; Q = 1 or T - 1 positions of what cut edges carry.
"""

import torch
from torch import Tensor

from oacore.engine.clean import Batch
from oacore.engine.forward import (
    at,
    attend,
    embed,
    logits_of,
    mlp,
    normalise,
    rotary_of,
    rotary_tables,
    rotate,
)
from oacore.models.weights import Block, Model


def logits_without_edges(model: Model, batch: Batch, kept: Tensor, carried: Tensor) -> Tensor:
    """Logits [B, V] at each prompt's last position.

    Args:
        kept: edges of the model's graph [J, S], 1 or 0; none is cut at position 0 (BOS).
        carried: what cut edges carry, by source [S, Q, d].
    """
    graph = model.graph
    outs = [embed(model, batch.tokens)]
    biases = torch.zeros_like(outs[0][0, 0])

    def read(destinations: slice, n_sources: int) -> Tensor:
        """What destinations read of the first sources, [n, B, T, d]."""
        written, mask = torch.stack(outs[:n_sources]), kept[destinations, :n_sources].to(carried.dtype)
        whole = written.sum(0)[:, :1].expand(len(mask), -1, -1, -1)
        replaced = torch.einsum("js,sqd->jqd", 1 - mask, carried[:n_sources])
        mixed = torch.einsum("js,sbtd->jbtd", mask, written[:, :, 1:]) + replaced[:, None]
        return torch.cat((whole, mixed), 2) + biases

    for layer, block in enumerate(model.blocks):
        n = graph.first_source(layer)
        q, k, v = (read(destinations, n) for destinations in graph.qkv(layer))
        of_mlp = _one(graph.mlp_destination(layer))
        beside = read(of_mlp, n) if model.parallel else None  # what the MLP reads there, before the heads have written
        outs += _written_by_heads(model, block, q, k, v)
        biases = biases if block.b_O is None else biases + block.b_O
        entering = read(of_mlp, n + graph.n_heads) if beside is None else beside
        outs.append(mlp(model, layer, entering[0]))
    final = read(_one(graph.n_destinations - 1), graph.n_sources)[0]
    return logits_of(model, at(final, batch.lengths - 1)[:, 0])


def _written_by_heads(model: Model, block: Block, q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    """What each head writes [B, T, d], whose query, key and value read [n, B, T, d]."""
    q = normalise(block.query_norm, _projected(block, q, block.W_Q, block.b_Q))
    k = normalise(block.key_norm, _projected(block, k, block.W_K, block.b_K))
    v = _projected(block, v, block.W_V, block.b_V)
    if rotary_of(model, block) is not None:
        cos, sin = (table[:, None] for table in rotary_tables(model, block, v.flatten(2)))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    written = torch.einsum("bthk,hkd->hbtd", attend(block, q, k, v, None), block.W_O)
    norm = block.attention_post_norm
    if norm is not None:  # of all heads together, whose scale they share
        written = written * torch.rsqrt(written.sum(0).square().mean(-1, keepdim=True) + norm.eps) * norm.weight
    return list(written)


def _projected(block: Block, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [n, B, T, d], weight [d, n, k] -> [B, T, n, k]."""
    out = torch.einsum("nbtd,dnk->btnk", normalise(block.attention_norm, x), weight)
    return out if bias is None else out + bias


def _one(destination: int) -> slice:
    return slice(destination, destination + 1)
