"""Backward of the masked mix, from dx:

    d_delta[s, b, t] += sum_j masks[b, j, s] * dx[j, b, t]     d_masks[m, j, s] = sum_bt <dx[j, b, t], delta[s, b, t]>

with b over the rows of mask m. Symbols: as in operands.py.
"""

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from oakernels.masked_mix import MAX_BJ, destinations_of_program
from oakernels.operands import Operands, check_contiguous
from oakernels.runtime import (
    INTERPRETED,
    Precision,
    accumulator_dtype,
    factor,
    in_one_batch,
    matmul_precision,
    rounded,
    run,
)

PROGRAMS = 1024
"""Programs that a call is split into, where d allows: a few for each of an H100's 132 multiprocessors."""


def mix_backward(
    dx: Tensor, operands: Operands, *, d_delta: Tensor, token_sums: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Backward of `mix` in one pass over delta.

    Args:
        dx: [J, B, T, d], contiguous.
        d_delta: [S, B, T, d], contiguous, of delta's dtype or fp32; what this mix adds to it is accumulated in place.
        token_sums: also return dx summed over tokens, as `constant_gradient` takes it.

    Returns:
        d_masks [M, J, S] and token sums [J, B, d] or None, both fp32 (fp64 for fp64).

    Raises:
        ValueError: shapes, strides or dtypes that don't fit together.
    """
    delta = operands.delta
    check_contiguous("dx", dx, operands.mixed_shape, delta.dtype)
    check_contiguous("d_delta", d_delta, delta.shape, delta.dtype, accumulator_dtype(delta.dtype))
    candidates = {
        "eager": lambda d_delta: _mix_backward_eager(dx, operands, d_delta, token_sums),
        "triton": lambda d_delta: _mix_backward_triton(dx, operands, d_delta, token_sums),
    }
    return run(operands.backend, ("mix_backward", token_sums, *operands.key), d_delta, candidates)


def _mix_backward_eager(
    dx: Tensor, operands: Operands, d_delta: Tensor, token_sums: bool
) -> tuple[Tensor, Tensor | None]:
    delta, by_mask = operands.delta, operands.by_mask
    weights, wide = operands.masks.to(delta.dtype).mT, accumulator_dtype(delta.dtype)
    if in_one_batch(dx):
        with matmul_precision(operands.precision):
            if d_delta.dtype == delta.dtype:
                by_mask(d_delta).baddbmm_(weights, by_mask(dx))
            else:
                by_mask(d_delta).add_(torch.bmm(weights, by_mask(dx)))
            d_masks = torch.bmm(by_mask(dx), by_mask(delta).mT).to(wide)
        return d_masks, dx.sum(2, dtype=wide) if token_sums else None
    d_masks = torch.empty(operands.masks.shape, dtype=wide)
    for m, rows in enumerate(operands.rows_of_masks()):
        block = dx[:, rows].flatten(1)  # [J, n]
        target = d_delta[:, rows].flatten(1)  # [S, n], a view
        if d_delta.dtype == delta.dtype:
            target.addmm_(weights[m], block)
        else:
            target += weights[m] @ block
        d_masks[m] = block @ delta[:, rows].flatten(1).T
    return d_masks, dx.sum(2, dtype=wide) if token_sums else None


# ---- Triton ----------------------------------------------------------------------------------------------------------


# Longer than 60 lines: both gradients come from one pass over delta, with their sums in registers.
@triton.jit
def mix_backward_kernel(  # type: ignore[no-untyped-def]
    dx,  # [J, R, d], R = B * T tokens
    masks,  # [M, J, S]
    delta,  # [S, R, d]
    d_delta,  # [S, R, d], added to
    partial,  # [B, splits, J, S]: the part of d_masks of one row and one split of d
    sums,  # [J, B, d], or None
    J,
    S,
    R,
    T,
    d,
    rows_per_mask,
    mask_stride,
    destination_stride,
    splits,
    chunks_per_split,
    BJ: tl.constexpr,
    BS: tl.constexpr,
    BD: tl.constexpr,
    PRECISION: tl.constexpr,
    UP: tl.constexpr,
):
    """One program: one row, BS sources, one split of d, all tokens and all J <= BJ destinations.

    No two programs write to one place.
    """
    n_blocks = tl.cdiv(S, BS)  # blocks of sources of one row run side by side and share its dx in L2
    block = tl.program_id(0) % n_blocks
    split = tl.program_id(0) // n_blocks % splits
    b = (tl.program_id(0) // n_blocks // splits).to(tl.int64)
    j = tl.arange(0, BJ)
    s = block * BS + tl.arange(0, BS)
    edge = (j[:, None] < J) & (s[None, :] < S)  # [BJ, BS]
    weights = tl.load(
        masks + (b // rows_per_mask) * mask_stride + j[:, None].to(tl.int64) * destination_stride + s[None, :],
        mask=edge,
        other=0.0,
    )
    weights = factor(weights.to(delta.dtype.element_ty), PRECISION, UP)
    dm = tl.zeros([BJ, BS], tl.float32)
    for chunk in range(split * chunks_per_split, tl.minimum((split + 1) * chunks_per_split, tl.cdiv(d, BD))):
        i = chunk * BD + tl.arange(0, BD)
        is_dx = (j[:, None] < J) & (i[None, :] < d)
        is_delta = (s[:, None] < S) & (i[None, :] < d)
        total = tl.zeros([BJ, BD], tl.float32)
        for t in range(0, T):
            token = b * T + t
            g = tl.load(dx + (j[:, None].to(tl.int64) * R + token) * d + i[None, :], mask=is_dx, other=0.0)
            at = (s[:, None].to(tl.int64) * R + token) * d + i[None, :]
            out = tl.load(delta + at, mask=is_delta, other=0.0)
            grad = tl.load(d_delta + at, mask=is_delta, other=0.0).to(tl.float32)
            if sums is not None:
                total += g.to(tl.float32)
            g = factor(g, PRECISION, UP)
            dm = tl.dot(g, tl.trans(factor(out, PRECISION, UP)), dm, input_precision=PRECISION)
            grad = tl.dot(tl.trans(weights), g, grad, input_precision=PRECISION)
            tl.store(d_delta + at, rounded(grad, d_delta.dtype.element_ty, UP), mask=is_delta)
        if sums is not None:
            tl.store(sums + (j[:, None].to(tl.int64) * (R // T) + b) * d + i[None, :], total, mask=is_dx & (block == 0))
    at = partial + ((b * splits + split) * J + j[:, None]) * S + s[None, :]
    tl.store(at, dm, mask=edge)


def mix_backward_tiles(J: int, dtype: torch.dtype, precision: Precision) -> dict[str, int]:
    """Tile sizes and launch options of `mix_backward_kernel`, which takes J <= MAX_BJ.

    BD is a cache line; for the rest see `mix_tiles`.
    """
    BJ = destinations_of_program(J)
    in_bf16, on_cuda_cores = dtype == torch.bfloat16, dtype == torch.float32 and precision == "ieee"
    return {
        "BJ": BJ,
        "BS": 32,
        "BD": 128 // dtype.itemsize,
        "num_warps": 8 if BJ == MAX_BJ else 4,
        # 2 spilled 40 bytes on the CUDA cores; 3 spilled 8 in TF32, and 12 in bf16 for few destinations.
        "num_stages": 3 if on_cuda_cores or (in_bf16 and BJ == MAX_BJ) else 2,
    }


def _mix_backward_triton(
    dx: Tensor, operands: Operands, d_delta: Tensor, token_sums: bool
) -> tuple[Tensor, Tensor | None]:
    masks, delta, (J, B, T, d) = operands.masks, operands.delta, dx.shape
    M, _, S = masks.shape
    d_masks = dx.new_empty(M, J, S, dtype=torch.float32)
    sums = dx.new_empty(J, B, d, dtype=torch.float32) if token_sums else None
    for j0 in range(0, J, MAX_BJ):
        j = slice(j0, min(j0 + MAX_BJ, J))
        tiles = mix_backward_tiles(j.stop - j0, delta.dtype, operands.precision)
        blocks, chunks = triton.cdiv(S, tiles["BS"]), triton.cdiv(d, tiles["BD"])
        chunks_per_split = triton.cdiv(chunks, min(chunks, triton.cdiv(PROGRAMS, B * blocks)))
        splits = triton.cdiv(chunks, chunks_per_split)
        partial = dx.new_empty(B, splits, j.stop - j0, S, dtype=torch.float32)
        mix_backward_kernel[(B * splits * blocks,)](
            dx[j],
            masks[:, j],
            delta,
            d_delta,
            partial,
            None if sums is None else sums[j],
            J=j.stop - j0,
            S=S,
            R=B * T,
            T=T,
            d=d,
            rows_per_mask=B // M,
            mask_stride=masks.stride(0),
            destination_stride=masks.stride(1),
            splits=splits,
            chunks_per_split=chunks_per_split,
            PRECISION=operands.precision,
            UP=INTERPRETED,
            **tiles,
        )
        torch.sum(partial.view(M, -1, *partial.shape[2:]), 1, out=d_masks[:, j])
    return d_masks, sums
