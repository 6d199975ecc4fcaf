"""Attention and MLP of a masked pass, on folded weights: ordinary autograd, between mixes whose backward is by hand. On
a GPU attention and the RMS scale are operations of their own (`fused`).

Symbols: B rows, T tokens, t = T - 1 after BOS, q = t or 1 query positions, H heads, KV key/value heads, k head width,
d model width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from oacore.engine.buffers import Buffer
from oacore.engine.folded import Folded, Layer
from oacore.engine.forward import normalise, rotate
from oacore.engine.fused import fused_attention, fused_rms_scale, fuses, fuses_attention
from oacore.models.weights import ACTIVATIONS, Block, Norm

MATH_ATTENTION = 64
"""Tokens up to which plain GEMMs are faster on the CPU than scaled_dot_product_attention with a mask."""


def attend(layer: Layer, buffer: Buffer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention over BOS, whose keys and values are those of the clean run, and the positions after it.

    Args:
        buffer: has the queries' positions.
        q: [H, B, q, k].
        k, v: [KV, B, t, k].

    Returns:
        Each head's z [H, B, q, k]; for post-norm models what the heads write [H, B, q, d].
    """
    block, prompts = layer.folded.block, buffer.rows.prompts
    q, k = _head_norm(block.query_norm, q), _head_norm(block.key_norm, k)
    if (of_keys := prompts.rotary[layer.number]) is not None:
        q, k = rotate(q, *buffer.at_queries(of_keys)), rotate(k, *of_keys)
    over_bos = fused_attention if fuses_attention(layer, q, k) else _over_bos
    z = over_bos(layer, buffer, q, k, v)
    norm = block.attention_post_norm
    if norm is None:
        return z
    out = (z.flatten(1, 2) @ layer.write).unflatten(1, z.shape[1:3])  # [H, B, q, d]
    return post_norm(norm, out, out.sum(0))


def _over_bos(layer: Layer, buffer: Buffer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """z [H, B, q, k]; arguments as `attend`, normed and rotated."""
    block, prompts = layer.folded.block, buffer.rows.prompts
    bos = (clean[buffer.rows.first].transpose(0, 1)[layer.groups][:, :, None] for clean in prompts.bos[layer.number])
    k, v = (torch.cat(pair, 2) for pair in zip(bos, (k, v), strict=True))  # [KV, B, T, k]
    if layer.key_of_head is not None:
        k, v = k[layer.key_of_head], v[layer.key_of_head]
    return _attention(block, q, k, v, buffer.hidden(block.window))


def _head_norm(norm: Norm | None, x: Tensor) -> Tensor:
    """Queries or keys [n, B, q, k] as attention takes them, before any rotation: each head's, or all n together."""
    if norm is None or norm.weight.dim() == 1:
        return normalise(norm, x)
    return normalise(norm, x.movedim(0, -2)).movedim(-2, 0)


def masked_mlp(activation: str, folded: Folded, x: Tensor) -> Tensor:
    """What the MLP writes [B, q, d], given its input [B, q, d]."""
    act, before, norm = ACTIVATIONS[activation], folded.block.mlp_norm, folded.block.mlp_post_norm
    flat = _rms_scaled(before, x).flatten(0, 1)
    hidden = flat @ folded.W_in if folded.b_in is None else torch.addmm(folded.b_in, flat, folded.W_in)
    hidden = act(hidden) if folded.W_gate is None else act(flat @ folded.W_gate) * hidden
    out = hidden @ folded.W_out if folded.b_out is None else torch.addmm(folded.b_out, hidden, folded.W_out)
    return (out if norm is None else post_norm(norm, out, out)).unflatten(0, x.shape[:2])


def _rms_scaled(norm: Norm | None, x: Tensor) -> Tensor:
    """x [..., d] times its RMS scale; x itself where there is no norm."""
    if norm is None:
        return x
    return fused_rms_scale(x, norm.eps) if fuses(x) else x * _rms_scale(x, norm.eps)


def post_norm(norm: Norm, x: Tensor, scaled_by: Tensor) -> Tensor:
    """x [..., d] times the scale that the RMSNorm of `scaled_by` [..., d] has.

    So a head has its share of a post-normed sum of heads.
    """
    return (x * (_rms_scale(scaled_by, norm.eps) * norm.weight)).to(x.dtype)


def _rms_scale(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean x^2 + eps) of x [..., d]: [..., 1], computed in fp32 or wider."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
    return torch.rsqrt(norm.square() / x.shape[-1] + eps).to(x.dtype)


def _attention(block: Block, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor) -> Tensor:
    """q [H, B, q, k], k and v [H, B, T, k], hidden bool [., q, T] -> z [H, B, q, k]."""
    if block.attention_softcap is None and k.shape[2] > MATH_ATTENTION:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=~hidden, scale=block.attention_scale)
    scores = (q * block.attention_scale) @ k.transpose(2, 3)
    if block.attention_softcap is not None:
        scores = torch.tanh(scores / block.attention_softcap) * block.attention_softcap
    wide = torch.promote_types(scores.dtype, torch.float32)
    return scores.masked_fill(hidden, float("-inf")).softmax(-1, dtype=wide).to(v.dtype) @ v
