"""The masked read: mix, RMS scale, and each destination's own projection, in one op.

    x = masked mix     rstd = (mean_d x^2 + eps)^-1/2     y[j, b, t] = rstd * (x[j, b, t] @ weight[j]) + bias[j]

The scale commutes with the projection, so x need never be written. A model with LayerNorm has all its writers centred
over d, and its readers too, and then an RMS scale is its norm. The backward pass is `mix` again where x was not stored,
`project_backward`, then `mix_backward`.

Symbols: as in operands.py.
"""

from dataclasses import replace

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from oakernels.masked_mix import mix_and_scale
from oakernels.operands import Operands, Projection
from oakernels.projection import project
from oakernels.runtime import INTERPRETED, Backend, rounded, run


def read(
    base: Tensor, operands: Operands, projection: Projection, *, store_inputs: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Mix the sources of every destination and project them.

    Args:
        base: [F, Q, d], as `mix` takes it.
        store_inputs: return x, too, for the backward pass.

    Returns:
        y [J, B, T, k], rstd [J, B, T] in fp32 (fp64 for fp64), and x [J, B, T, d] with store_inputs, else None.

    Raises:
        ValueError: shapes, strides or dtypes that don't fit together.
    """
    operands.check_base(base)

    def composed(y: Tensor, backend: Backend) -> tuple[Tensor, Tensor, Tensor | None]:
        x, rstd = mix_and_scale(base, replace(operands, backend=backend), projection.eps)
        project(x, rstd, projection, out=y, precision=operands.precision)
        return y, rstd, x if store_inputs else None

    def fused(y: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        return y, _read_triton(base, operands, projection, y), None

    candidates = {"eager": lambda y: composed(y, "eager"), "triton": lambda y: composed(y, "triton")}
    if not store_inputs:
        # Both are candidates: writing x costs bandwidth, keeping it in registers reads the weights once per row.
        candidates |= {"triton": fused, "triton, x written": lambda y: composed(y, "triton")}
    y = operands.delta.new_empty(*operands.mixed_shape[:3], projection.weight.shape[2])
    key = ("read", base.shape, projection.weight.shape, projection.bias is None, store_inputs, *operands.key)
    return run(operands.backend, key, y, candidates)


# ---- Triton ----------------------------------------------------------------------------------------------------------


# Longer than 60 lines: x of a block of d lives in registers between its mix and its projection, in one loop over d.
@triton.jit
def read_kernel(  # type: ignore[no-untyped-def]
    y,  # [J, R, k], R = B * T tokens
    rstd,  # [J, R]
    base,  # [F, Q, d]
    masks,  # [M, J, S]
    delta,  # [S, R, d]
    weight,  # [J, d, k]
    bias,  # [J, k], or None
    J,
    S,
    R,
    T,
    d,
    k,
    rows_per_mask,
    rows_per_base,
    mask_stride,
    destination_stride,
    eps,
    BASE_PER_TOKEN: tl.constexpr,
    BJ: tl.constexpr,
    BT: tl.constexpr,
    BS: tl.constexpr,
    BD: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
    UP: tl.constexpr,
):
    """One program: BJ destinations, BT tokens of one row, BK of the projection."""
    n_j = tl.cdiv(J, BJ)
    n_t = tl.cdiv(T, BT)
    n_k = tl.cdiv(k, BK)
    block = tl.program_id(0)
    k0 = (block % n_k) * BK
    j = (block // n_k % n_j) * BJ + tl.arange(0, BJ)
    t0 = (block // n_k // n_j % n_t) * BT
    b = (block // n_k // n_j // n_t).to(tl.int64)
    t = t0 + tl.arange(0, BT)
    flat = tl.arange(0, BT * BD)  # token-major
    flat_t, flat_i = t0 + flat // BD, flat % BD
    column = tl.arange(0, BK) + k0
    mask_rows = masks + (b // rows_per_mask) * mask_stride + j[:, None].to(tl.int64) * destination_stride
    base += (b // rows_per_base) * (T * d if BASE_PER_TOKEN else d)
    squares = tl.zeros([BJ, BT], tl.float32)
    acc = tl.zeros([BJ, BT, BK], tl.float32)
    for d0 in range(0, d, BD):
        live = (flat_t < T) & (d0 + flat_i < d)
        at_base = base + d0 + flat_i
        if BASE_PER_TOKEN:
            at_base += flat_t * d
        x = tl.zeros([BJ, BT * BD], tl.float32) + tl.load(at_base, mask=live, other=0.0).to(tl.float32)[None, :]
        for s0 in range(0, S, BS):
            s = s0 + tl.arange(0, BS)
            at = delta + (s[:, None].to(tl.int64) * R + b * T) * d + (flat_t * d + d0 + flat_i)[None, :]
            out = tl.load(at, mask=(s[:, None] < S) & live[None, :], other=0.0)
            weights = tl.load(mask_rows + s[None, :], mask=(j[:, None] < J) & (s[None, :] < S), other=0.0)
            if UP:
                out = out.to(tl.float32)
            x = tl.dot(weights.to(out.dtype), out, x, input_precision=PRECISION)
        x = tl.reshape(x, [BJ, BT, BD])
        squares += tl.sum(x * x, 2)
        i = d0 + tl.arange(0, BD)
        at_weight = weight + (j[:, None, None].to(tl.int64) * d + i[None, :, None]) * k + column[None, None, :]
        w = tl.load(
            at_weight, mask=(j[:, None, None] < J) & (i[None, :, None] < d) & (column[None, None, :] < k), other=0.0
        )
        if UP:
            w = w.to(tl.float32)
        acc = tl.dot(x.to(w.dtype), w, acc, input_precision=PRECISION)
    scale = 1.0 / tl.sqrt(squares / d + eps)  # [BJ, BT]
    acc *= scale[:, :, None]
    if bias is not None:
        acc += tl.load(
            bias + j[:, None] * k + column[None, :], mask=(j[:, None] < J) & (column[None, :] < k), other=0.0
        ).to(tl.float32)[:, None, :]
    token = j[:, None].to(tl.int64) * R + b * T + t[None, :]  # [BJ, BT]
    inside = (j[:, None] < J) & (t[None, :] < T)
    tl.store(rstd + token, scale, mask=inside)
    at_y = y + token[:, :, None] * k + column[None, None, :]
    tl.store(at_y, rounded(acc, y.dtype.element_ty, UP), mask=inside[:, :, None] & (column[None, None, :] < k))


READ_TILES = {"BJ": 16, "BT": 16, "BS": 16, "BD": 16, "BK": 64, "num_warps": 8, "num_stages": 2}
"""16 x 16 x 64 sums of y and 16 x 16 x 16 of x fill the registers of 8 warps.

BS = 32 spilled 44 bytes on sm_80, BK = 128 over 300.
"""


def _read_triton(base: Tensor, operands: Operands, projection: Projection, y: Tensor) -> Tensor:
    """Write y, and return rstd [J, B, T]."""
    masks, delta, tiles = operands.masks, operands.delta, READ_TILES
    (J, B, T, k), (S, _, _, d) = y.shape, delta.shape
    rstd = y.new_empty(J, B, T, dtype=torch.float32)
    grid = B * triton.cdiv(T, tiles["BT"]) * triton.cdiv(J, tiles["BJ"]) * triton.cdiv(k, tiles["BK"])
    read_kernel[(grid,)](
        y,
        rstd,
        base.contiguous(),
        masks,
        delta,
        projection.weight,
        projection.bias,
        J=J,
        S=S,
        R=B * T,
        T=T,
        d=d,
        k=k,
        rows_per_mask=B // masks.shape[0],
        rows_per_base=B // base.shape[0],
        mask_stride=masks.stride(0),
        destination_stride=masks.stride(1),
        eps=projection.eps,
        BASE_PER_TOKEN=base.shape[1] == T,
        PRECISION=operands.precision,
        UP=INTERPRETED,
        **tiles,
    )
    return rstd
