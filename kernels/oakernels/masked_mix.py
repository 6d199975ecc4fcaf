"""The masked mix: what every destination reads from the residual stream when each edge is kept or ablated.

    x[j, b, t] = base[b, t] + sum_s masks[b, j, s] * delta[s, b, t]     delta = out - r, base = biases + sum_s r_s

`out` is what a source writes, r its replacement, and the biases are always on. Position 0 (BOS) is never ablated: its
keys and values are those of the clean run, so it is in none of these buffers, and T counts the ablatable positions
after it. Rows share masks and base in equal runs: row b uses mask b // (B / M) and base b // (B / F).

Symbols: as in operands.py.
"""

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from oakernels.operands import Operands, check_contiguous
from oakernels.rms import rms_scale
from oakernels.runtime import (
    INTERPRETED,
    Precision,
    factor,
    in_one_batch,
    matmul_precision,
    rounded,
    run,
)


def mix(base: Tensor, operands: Operands, *, out: Tensor | None = None) -> Tensor:
    """Mix the sources of every destination.

    Args:
        base: [F, Q, d]; B / F consecutive rows share one.
        out: [J, B, T, d], contiguous, to write to; not base's own memory.

    Returns:
        x [J, B, T, d]: out, or new.

    Raises:
        ValueError: shapes, strides or dtypes that don't fit together.
    """
    x = _checked_output(base, operands, out)
    candidates = {
        "eager": lambda x: _mix_eager(base, operands, x),
        "triton": lambda x: _mix_triton(base, operands, x),
    }
    return run(operands.backend, ("mix", base.shape, *operands.key), x, candidates)


def mix_and_scale(
    base: Tensor, operands: Operands, eps: float | None, *, out: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """`mix`, and the RMS scale of what it writes, for a norm of this eps; without one, None.

    Returns:
        x [J, B, T, d] and rstd = (mean_d x^2 + eps)^-1/2 [J, B, T] in fp32 (fp64 for fp64).
    """
    if eps is None:
        return mix(base, operands, out=out), None
    x = _checked_output(base, operands, out)

    def eager(x: Tensor) -> tuple[Tensor, Tensor]:
        return x, rms_scale(_mix_eager(base, operands, x), eps)

    def fused(x: Tensor) -> tuple[Tensor, Tensor]:
        rstd = x.new_empty(x.shape[:3], dtype=torch.float32)
        return _mix_triton(base, operands, x, rstd, eps), rstd

    key = ("mix_and_scale", base.shape, *operands.key)
    return run(operands.backend, key, x, {"eager": eager, "triton": fused})


def _checked_output(base: Tensor, operands: Operands, out: Tensor | None) -> Tensor:
    """out, or a new x [J, B, T, d], once all shapes fit."""
    operands.check_base(base)
    if out is None:
        return operands.delta.new_empty(operands.mixed_shape)
    check_contiguous("out", out, operands.mixed_shape, operands.delta.dtype)
    return out


def _mix_eager(base: Tensor, operands: Operands, x: Tensor) -> Tensor:
    """Straight into x, without copies: one batched GEMM over all masks, or one GEMM per mask (see `in_one_batch`)."""
    masks, delta = operands.masks.to(operands.delta.dtype), operands.delta
    B, F = x.shape[1], base.shape[0]
    if in_one_batch(x):
        x.unflatten(1, (F, -1)).copy_(base[:, None])  # [J, F, B / F, T, d]
        with matmul_precision(operands.precision):
            operands.by_mask(x).baddbmm_(masks, operands.by_mask(delta))
        return x
    by_row = base.repeat_interleave(B // F, 0)  # [B, Q, d]
    for mask, rows in zip(masks, operands.rows_of_masks(), strict=True):
        block = x[:, rows]
        block.copy_(by_row[rows].expand(block.shape))  # mask by mask: still in cache when the GEMM adds to it
        block.flatten(1).addmm_(mask, delta[:, rows].flatten(1))
    return x


# ---- Triton ----------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["J", "S", "R", "T", "rows_per_mask", "rows_per_base"])
def mix_kernel(  # type: ignore[no-untyped-def]
    x,  # [J, R, d], R = B * T tokens
    rstd,  # [J, R], or None
    base,  # [F, Q, d]
    masks,  # [M, J, S]
    delta,  # [S, R, d]
    J,
    S,
    R,
    T,
    d,
    rows_per_mask,
    rows_per_base,
    mask_stride,
    destination_stride,
    eps,
    BASE_PER_TOKEN: tl.constexpr,
    BJ: tl.constexpr,
    BS: tl.constexpr,
    BD: tl.constexpr,
    PRECISION: tl.constexpr,
    UP: tl.constexpr,
):
    """One program: one token of one row, BJ destinations, all of d, to sum the squares of what it writes."""
    n_blocks = tl.cdiv(J, BJ)  # blocks of destinations of one token run side by side and share its delta in L2
    token = (tl.program_id(0) // n_blocks).to(tl.int64)
    b, t = token // T, token % T
    j = (tl.program_id(0) % n_blocks) * BJ + tl.arange(0, BJ)
    mask_rows = masks + (b // rows_per_mask) * mask_stride + j[:, None].to(tl.int64) * destination_stride
    base += (b // rows_per_base) * (T * d if BASE_PER_TOKEN else d)
    if BASE_PER_TOKEN:
        base += t * d
    squares = tl.zeros([BJ], tl.float32)
    for d0 in range(0, d, BD):
        i = d0 + tl.arange(0, BD)
        acc = tl.zeros([BJ, BD], tl.float32) + tl.load(base + i, mask=i < d, other=0.0).to(tl.float32)[None, :]
        for s0 in range(0, S, BS):
            s = s0 + tl.arange(0, BS)
            out = tl.load(
                delta + (s[:, None].to(tl.int64) * R + token) * d + i[None, :],
                mask=(s[:, None] < S) & (i[None, :] < d),
                other=0.0,
            )
            weights = tl.load(mask_rows + s[None, :], mask=(j[:, None] < J) & (s[None, :] < S), other=0.0)
            weights = factor(weights.to(out.dtype), PRECISION, UP)
            acc = tl.dot(weights, factor(out, PRECISION, UP), acc, input_precision=PRECISION)
        squares += tl.sum(acc * acc, 1)
        at = x + (j[:, None].to(tl.int64) * R + token) * d + i[None, :]
        tl.store(at, rounded(acc, x.dtype.element_ty, UP), mask=(j[:, None] < J) & (i[None, :] < d))
    if rstd is not None:
        tl.store(rstd + j.to(tl.int64) * R + token, 1.0 / tl.sqrt(squares / d + eps), mask=j < J)


# What a program owns, by what fits without spilling on sm_80 and sm_90 (kernels/README.md). fp32 in ieee precision
# multiplies on the CUDA cores, where operands are held in registers: smaller tiles.

MAX_BJ = 64


def destinations_of_program(J: int) -> int:
    """The 16 rows of a tensor-core tile, or MAX_BJ (32 spilled on sm_80, and memory traffic is the same)."""
    return 16 if J <= 16 else MAX_BJ


def mix_tiles(J: int, dtype: torch.dtype, precision: Precision) -> dict[str, int]:
    """Tile sizes and launch options of `mix_kernel`."""
    on_cuda_cores = dtype == torch.float32 and precision == "ieee"
    BJ = destinations_of_program(J)
    return {
        "BJ": BJ,
        "BS": 32,
        "BD": 64 if on_cuda_cores else 128,
        "num_warps": 8 if BJ == MAX_BJ else 4,
        "num_stages": 3,
    }


def _mix_triton(base: Tensor, operands: Operands, x: Tensor, rstd: Tensor | None = None, eps: float = 0.0) -> Tensor:
    """x, with rstd [J, B, T] filled if given."""
    masks, delta, (J, B, T, d) = operands.masks, operands.delta, x.shape
    tiles = mix_tiles(J, delta.dtype, operands.precision)
    mix_kernel[(B * T * triton.cdiv(J, tiles["BJ"]),)](
        x,
        rstd,
        base.contiguous(),
        masks,
        delta,
        J=J,
        S=delta.shape[0],
        R=B * T,
        T=T,
        d=d,
        rows_per_mask=B // masks.shape[0],
        rows_per_base=B // base.shape[0],
        mask_stride=masks.stride(0),
        destination_stride=masks.stride(1),
        eps=eps,
        BASE_PER_TOKEN=base.shape[1] == T,
        PRECISION=operands.precision,
        UP=INTERPRETED,
        **tiles,
    )
    return x
