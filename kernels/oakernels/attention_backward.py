"""Backward of attention, from dz:

    dv[g, b, n] = sum_hi p * dz     dp = <dz[h, b, i], value[g, b, n]>     ds = slope * p * (dp - sum_n p * dp)
    dq[h, b, i] = sum_n ds * key[g, b, n]     dk[g, b, n] = sum_hi ds * q[h, b, i]

with h over the heads that read g, and slope = scale * (1 - tanh^2) of a score. Key and value 0 are the clean run's and
get none. Symbols: as in attention.py.
"""

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from oakernels.attention import (
    Attention,
    Kept,
    kept_by_eager,
    key_tiles,
    launch_options,
    probabilities,
    with_clean,
)
from oakernels.runtime import Precision, factor, matmul_precision, rounded, run

Gradients = tuple[Tensor, Tensor, Tensor]


def attend_backward(dz: Tensor, q: Tensor, k: Tensor, v: Tensor, attention: Attention, kept: Kept) -> Gradients:
    """Backward of `attend`.

    Args:
        dz: [H, B, q, k].
        q, k, v, attention: as there.
        kept: what it kept. Either backend can run after either.

    Returns:
        dq [H, B, q, k], dk and dv [KV, B, t, k]; of the kernel contiguous.

    Raises:
        ValueError: shapes that don't fit together.
    """
    attention.check(q, k, v)
    if dz.shape != q.shape:
        raise ValueError(f"dz {list(dz.shape)}; allowed: {list(q.shape)}")
    candidates = {
        "eager": lambda dq: _backward_eager(dz, q, k, v, attention, kept, dq),
        "triton": lambda dq: _backward_triton(dz, q, k, v, attention, dq),
    }
    key = ("attend_backward", q.shape, k.shape, attention.softcap is None, bool(kept), attention.precision)
    return run(attention.backend, key, q.new_empty(q.shape), candidates)


def _backward_eager(
    dz: Tensor, q: Tensor, k: Tensor, v: Tensor, attention: Attention, kept: Kept, dq: Tensor
) -> Gradients:
    keys, values, p, *capped = kept or kept_by_eager(q, k, v, attention)
    with matmul_precision(attention.precision):
        d_values = p.mT.to(dz.dtype) @ dz
        dp = (dz @ values.mT).to(p.dtype)
        d_scores = dp.sub_((p * dp).sum(-1, keepdim=True)).mul_(p).mul_(attention.scale)
        for tanh in capped:
            d_scores.mul_(1 - tanh.to(p.dtype).square())
        d_scores = d_scores.to(q.dtype)
        torch.bmm(d_scores.flatten(0, 1), keys.flatten(0, 1), out=dq.flatten(0, 1))
        d_keys = d_scores.mT @ q
    if len(k) < len(q):
        d_keys, d_values = (x.unflatten(0, (len(k), -1)).sum(1) for x in (d_keys, d_values))
    return dq, d_keys[:, :, 1:], d_values[:, :, 1:]


# ---- Triton ----------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["B", "n_queries", "T", "hidden_stride"])
def attend_backward_kernel(  # type: ignore[no-untyped-def]
    dq,  # [H, B, q, k]
    dk,  # [KV, B, t, k]
    dv,  # [KV, B, t, k]
    dz,  # [H, B, q, k]
    q,  # [H, B, q, k]
    key,  # [KV, B, t, k]
    value,  # [KV, B, t, k]
    clean_keys,  # [U, KV, k]
    clean_values,  # [U, KV, k]
    first,  # [B]
    hidden,  # [q, T], or [B, 1, T]
    B,
    n_queries,
    T,
    H,
    KV,
    k,
    hidden_stride,
    scale,
    softcap,  # or None
    BQ: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
    UP: tl.constexpr,
):
    """One program: one key/value head of one row, all queries that read it, BQ of a head at a time."""
    g = (tl.program_id(0) % KV).to(tl.int64)
    b = (tl.program_id(0) // KV).to(tl.int64)
    clean = tl.load(first + b) * KV + g
    keys = factor(with_clean(key, clean_keys, g * B + b, clean, T - 1, k, BT, BK), PRECISION, UP)
    values = factor(with_clean(value, clean_values, g * B + b, clean, T - 1, k, BT, BK), PRECISION, UP)
    d_keys, d_values = tl.zeros([BT, BK], tl.float32), tl.zeros([BT, BK], tl.float32)
    n_blocks, column = tl.cdiv(n_queries, BQ), tl.arange(0, BK)
    for step in range(0, H // KV * n_blocks):
        h = g * (H // KV) + step // n_blocks
        i = step % n_blocks * BQ + tl.arange(0, BQ)
        inside = (i[:, None] < n_queries) & (column[None, :] < k)
        at = ((h * B + b) * n_queries + i[:, None]) * k + column[None, :]
        queries = factor(tl.load(q + at, mask=inside, other=0.0), PRECISION, UP)
        gradient = factor(tl.load(dz + at, mask=inside, other=0.0), PRECISION, UP)
        row = hidden + b * hidden_stride
        p, slope = probabilities(queries, keys, row, i, n_queries, T, scale, softcap, BT, PRECISION)
        dp = tl.dot(gradient, tl.trans(values), input_precision=PRECISION)
        ds = slope * p * (dp - tl.sum(p * dp, 1)[:, None])
        p = factor(rounded(p, dq.dtype.element_ty, UP), PRECISION, UP)
        ds = factor(rounded(ds, dq.dtype.element_ty, UP), PRECISION, UP)
        d_values = tl.dot(tl.trans(p), gradient, d_values, input_precision=PRECISION)
        d_keys = tl.dot(tl.trans(ds), queries, d_keys, input_precision=PRECISION)
        new = tl.dot(ds, keys, input_precision=PRECISION)
        tl.store(dq + at, rounded(new, dq.dtype.element_ty, UP), mask=inside)
    n = tl.arange(0, BT)
    inside = (n[:, None] > 0) & (n[:, None] < T) & (column[None, :] < k)
    at = ((g * B + b) * (T - 1) + n[:, None] - 1) * k + column[None, :]
    tl.store(dk + at, rounded(d_keys, dk.dtype.element_ty, UP), mask=inside)
    tl.store(dv + at, rounded(d_values, dv.dtype.element_ty, UP), mask=inside)


def attend_backward_tiles(n_keys: int, width: int, dtype: torch.dtype, precision: Precision) -> dict[str, int]:
    """Tile sizes and launch options of `attend_backward_kernel`, by what fits without spilling (kernels/README.md).

    fp32 in ieee precision takes 16 warps for 64 keys. With 4 or 8, Triton 3.7.1 has Blackwell's tensor cores make the
    sums over queries, which begin at 64 rows, in TF32, whatever the precision.
    """
    keys = key_tiles(n_keys, width)
    on_cuda_cores, size = dtype == torch.float32 and precision == "ieee", keys["BT"] * keys["BK"]
    many = 16 if on_cuda_cores or size > 8192 else 8
    return {"BQ": 16, **keys, "num_warps": 4 if size <= 2048 and keys["BT"] < 64 else many, "num_stages": 1}


def _backward_triton(dz: Tensor, q: Tensor, k: Tensor, v: Tensor, attention: Attention, dq: Tensor) -> Gradients:
    dk, dv = k.new_empty(k.shape), v.new_empty(v.shape)
    attend_backward_kernel[(k.shape[1] * len(k),)](
        dq,
        dk,
        dv,
        dz.contiguous(),
        q.contiguous(),
        k.contiguous(),
        v.contiguous(),
        attention.clean_keys,
        attention.clean_values,
        attention.first,
        attention.hidden,
        **launch_options(q, k, attention),
        **attend_backward_tiles(k.shape[2] + 1, q.shape[3], q.dtype, attention.precision),
    )
    return dq, dk, dv
