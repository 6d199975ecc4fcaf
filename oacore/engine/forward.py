"""The clean forward pass over canonical weights, in pieces that ablations recombine.

Padding is on the right, so the causal mask alone keeps it away from real tokens. Where only the last position matters,
the last block computes that position alone.

Symbols: B rows, T tokens, H heads, KV key/value heads, k head width, d model width, V vocabulary.
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from oacore.models.weights import ACTIVATIONS, Block, Model, Norm, Rotary


def normalise(norm: Norm | None, x: Tensor) -> Tensor:
    """LayerNorm or RMSNorm of x [..., d], the latter computed in fp32 at least, as Hugging Face does; x itself where
    there is no norm.
    """
    if norm is None:
        return x
    if not norm.rms:
        return F.layer_norm(x, norm.weight.shape, norm.weight, norm.bias, norm.eps)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    mean = wide.square().mean(tuple(range(-norm.weight.dim(), 0)), keepdim=True)
    return (wide * torch.rsqrt(mean + norm.eps) * norm.weight.to(wide.dtype)).to(x.dtype)


def embed(model: Model, tokens: Tensor) -> Tensor:
    """Token plus position embedding: tokens [B, T] -> the residual entering block 0 [B, T, d]."""
    return add_positions(model, embed_tokens(model, tokens))


def embed_tokens(model: Model, tokens: Tensor) -> Tensor:
    """Token embedding [..., d] as it enters the residual, without positions."""
    embedded = model.W_E[tokens]
    if model.embed_scale != 1.0:
        embedded = embedded * _rounded(model.embed_scale, embedded.dtype)
    return embedded


@cache
def _rounded(number: float, dtype: torch.dtype) -> float:
    """The number as this dtype has it, on the host: a step that a GPU replays uploads nothing."""
    return float(torch.tensor(number, dtype=dtype))


def add_positions(model: Model, embedded: Tensor) -> Tensor:
    """The residual entering block 0, of token embeddings [..., T, d]."""
    return embedded if model.W_pos is None else embedded + model.W_pos[: embedded.shape[-2]]


def heads(model: Model, layer: int, residual: Tensor, last: Tensor | None = None) -> Tensor:
    """Every head's output before W_O.

    Args:
        residual: [B, T, d], entering the block.
        last: [B]; if given, only these query positions are computed.

    Returns:
        z [B, T, H, k], or [B, 1, H, k] with `last`.
    """
    block = model.blocks[layer]
    x = normalise(block.attention_norm, residual)
    k, v = _key_value(model, block, x)
    q = _query(block, x if last is None else at(x, last))  # [B, T or 1, H, k]
    if rotary_of(model, block) is not None:
        cos, sin = rotary_tables(model, block, x)
        if last is None:
            q = rotate(q, cos[:, None], sin[:, None])
        else:
            q = rotate(q, cos[last][:, None, None], sin[last][:, None, None])
    return attend(block, q, k, v, last)


def rotary_of(model: Model, block: Block) -> Rotary | None:
    """A block's own rotary positions, or the model's; None if it has others."""
    return model.rotary if block.rotary is None else block.rotary


def rotary_tables(model: Model, block: Block, residual: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin [T, r] of a block of a rotary model at the positions of residual [B, T, d]."""
    rotary = rotary_of(model, block)
    assert rotary is not None
    cos, sin = rotary(residual, torch.arange(residual.shape[1], device=residual.device)[None])  # [1, T, r]
    return cos[0], sin[0]


def key_value(model: Model, layer: int, residual: Tensor) -> tuple[Tensor, Tensor]:
    """Keys, rotated, and values [B, T, KV, k] of the residual [B, T, d] entering the block."""
    block = model.blocks[layer]
    return _key_value(model, block, normalise(block.attention_norm, residual))


def _query(block: Block, x: Tensor) -> Tensor:
    return normalise(block.query_norm, _project(x, block.W_Q, block.b_Q))


def _key_value(model: Model, block: Block, x: Tensor) -> tuple[Tensor, Tensor]:
    k, v = normalise(block.key_norm, _project(x, block.W_K, block.b_K)), _project(x, block.W_V, block.b_V)
    if rotary_of(model, block) is not None:
        cos, sin = rotary_tables(model, block, x)
        k = rotate(k, cos[:, None], sin[:, None])
    return k, v


def _project(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [B, T, d], weight [d, n, k] -> [B, T, n, k]."""
    out = (x @ weight.flatten(1)).unflatten(-1, weight.shape[1:])
    return out if bias is None else out + bias


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of the first r coordinates of x [..., k] by cos and sin [..., r].

    It pairs halves, as all supported families do.
    """
    r = cos.shape[-1]
    turned, rest = x[..., :r], x[..., r:]
    half = torch.cat((-turned[..., r // 2 :], turned[..., : r // 2]), -1)
    return torch.cat((turned * cos + half * sin, rest), -1)


def attend(block: Block, q: Tensor, k: Tensor, v: Tensor, last: Tensor | None) -> Tensor:
    """Causal attention: q [B, Q, H, k], k and v [B, T, KV, k] -> [B, Q, H, k]; Q = 1 with `last` [B], else T."""
    n_tokens = k.shape[1]
    position = torch.arange(n_tokens, device=q.device)
    query = position[:, None] if last is None else last[:, None, None, None]  # [T, 1] or [B, 1, 1, 1]
    seen = position <= query  # [T, T] or [B, 1, 1, T]
    if block.window is not None:
        seen = seen & (position > query - block.window)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, n, ., k]
    if block.attention_softcap is None:
        plain_causal = last is None and (block.window is None or block.window >= n_tokens)
        z = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=None if plain_causal else seen,
            is_causal=plain_causal,
            scale=block.attention_scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )
    else:
        groups = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
        scores = q @ k.transpose(2, 3) * block.attention_scale
        scores = torch.tanh(scores / block.attention_softcap) * block.attention_softcap
        z = scores.masked_fill(~seen, float("-inf")).softmax(-1, dtype=torch.float32).to(v.dtype) @ v
    return z.transpose(1, 2)


def combine_heads(model: Model, layer: int, z: Tensor) -> Tensor:
    """z [..., H, k] -> their sum after W_O with b_O [..., d], before any post-norm."""
    block = model.blocks[layer]
    out = z.flatten(-2) @ block.W_O.flatten(0, 1)
    return out if block.b_O is None else out + block.b_O


def attention_write(model: Model, layer: int, combined: Tensor) -> Tensor:
    """What attention adds to the residual, given `combine_heads`: the same, or its post-norm."""
    return normalise(model.blocks[layer].attention_post_norm, combined)


def mlp(model: Model, layer: int, residual: Tensor) -> Tensor:
    """What the MLP adds to the residual [..., d] that it reads."""
    block = model.blocks[layer]
    x = normalise(block.mlp_norm, residual)
    if block.b_in is None:
        hidden = x @ block.W_in
    else:
        hidden = torch.addmm(block.b_in, x.flatten(0, -2), block.W_in).unflatten(0, x.shape[:-1])
    activation = ACTIVATIONS[model.activation]
    hidden = activation(hidden) if block.W_gate is None else activation(x @ block.W_gate) * hidden
    out = hidden @ block.W_out
    return normalise(block.mlp_post_norm, out if block.b_out is None else out + block.b_out)


def add_attention(model: Model, layer: int, residual: Tensor, combined: Tensor) -> Tensor:
    """Finish a block from its residual [..., d] and `combine_heads` [..., d]: add attention, then the MLP."""
    middle = residual + attention_write(model, layer, combined)
    return middle + mlp(model, layer, residual if model.parallel else middle)


def run_block(model: Model, layer: int, residual: Tensor, last: Tensor | None = None) -> Tensor:
    """One block: residual [B, T, d] -> [B, T, d], or [B, 1, d] at the positions `last` [B] alone."""
    combined = combine_heads(model, layer, heads(model, layer, residual, last))
    return add_attention(model, layer, residual if last is None else at(residual, last), combined)


def run_block_at(model: Model, layer: int, residual: Tensor, keys: Tensor, values: Tensor, last: Tensor) -> Tensor:
    """One block for one position of each row, whose earlier positions are known by their keys and values.

    Args:
        residual: [B, 1, d], entering the block at positions `last` [B].
        keys, values: [B, T, KV, k] as `key_value` gives them; their rows at `last` are replaced in place by those of
            this residual.
    """
    block = model.blocks[layer]
    x = normalise(block.attention_norm, residual)
    q, k = _query(block, x), normalise(block.key_norm, _project(x, block.W_K, block.b_K))
    v = _project(x, block.W_V, block.b_V)
    if rotary_of(model, block) is not None:
        cos, sin = (table[last][:, None, None] for table in rotary_tables(model, block, keys.flatten(2)))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    rows = torch.arange(len(last), device=last.device)
    keys[rows, last], values[rows, last] = k[:, 0], v[:, 0]
    return add_attention(model, layer, residual, combine_heads(model, layer, attend(block, q, keys, values, last)))


def residual_after(model: Model, tokens: Tensor, n_layers: int | None = None) -> Tensor:
    """The residual [B, T, d] after the first `n_layers` blocks (default: all), before the final norm."""
    residual = embed(model, tokens)
    for layer in range(model.n_layers if n_layers is None else n_layers):
        residual = run_block(model, layer, residual)
    return residual


def last_residual_from(model: Model, layer: int, residual: Tensor, last: Tensor) -> Tensor:
    """From the residual [B, T, d] entering block `layer` to that after all blocks at positions `last` [B]: [B, d]."""
    for index in range(layer, model.n_layers - 1):
        residual = run_block(model, index, residual)
    if layer < model.n_layers:
        return run_block(model, model.n_layers - 1, residual, last)[:, 0]
    return at(residual, last)[:, 0]


def final_norm(model: Model, residual: Tensor) -> Tensor:
    """What the unembedding reads: the final norm of the residual [..., d]."""
    return normalise(model.final_norm, residual)


def unembed(model: Model, normed: Tensor) -> Tensor:
    """Logits [..., V] in fp32 (fp64 of an fp64 model) of what `final_norm` returns [..., d]."""
    logits = normed @ model.W_U.T
    logits = logits if model.b_U is None else logits + model.b_U
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits if model.logit_softcap is None else torch.tanh(logits / model.logit_softcap) * model.logit_softcap


def logits_of(model: Model, residual: Tensor) -> Tensor:
    """Logits [..., V] in fp32 of the residual [..., d] after all blocks."""
    return unembed(model, final_norm(model, residual))


def at(x: Tensor, positions: Tensor) -> Tensor:
    """x [B, T, ...] at one position per row [B] -> [B, 1, ...]."""
    return x[torch.arange(len(x), device=x.device), positions][:, None]
