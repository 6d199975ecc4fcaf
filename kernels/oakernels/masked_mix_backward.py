"""Backward of the masked mix, from dx:

    d_delta[s, b, t] (+)= sum_j masks[b, j, s] * dx[j, b, t]     d_masks[m, j, s] = sum_bt <dx[j, b, t], delta[s, b, t]>

with b over the rows of mask m. Symbols: as in operands.py.
"""

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from oakernels.operands import Operands, check_contiguous
from oakernels.runtime import (
    INTERPRETED,
    accumulator_dtype,
    factor,
    in_one_batch,
    matmul_precision,
    rounded,
    run,
)

PROGRAMS = 1024
"""Programs that a call is split into, where its size allows: a few for each of an H100's 132 multiprocessors."""


def mix_backward(dx: Tensor, operands: Operands, *, d_delta: Tensor, add: bool = True) -> Tensor:
    """Backward of `mix` in one pass over dx and delta.

    Args:
        dx: [J, B, T, d], contiguous.
        d_delta: [S, B, T, d], contiguous, of delta's dtype or fp32, to write to.
        add: add this mix's gradient to what d_delta has; else d_delta is not read.

    Returns:
        d_masks [M, J, S] in fp32 (fp64 for fp64).

    Raises:
        ValueError: shapes, strides or dtypes that don't fit together.
    """
    delta = operands.delta
    check_contiguous("dx", dx, operands.mixed_shape, delta.dtype)
    check_contiguous("d_delta", d_delta, delta.shape, delta.dtype, accumulator_dtype(delta.dtype))
    candidates = {
        "eager": lambda d_delta: _mix_backward_eager(dx, operands, d_delta, add),
        "triton": lambda d_delta: _mix_backward_triton(dx, operands, d_delta, add),
    }
    return run(operands.backend, ("mix_backward", add, *operands.key), d_delta, candidates)


def _mix_backward_eager(dx: Tensor, operands: Operands, d_delta: Tensor, add: bool) -> Tensor:
    delta, by_mask, beta = operands.delta, operands.by_mask, 1 if add else 0
    weights, wide = operands.masks.to(delta.dtype).mT, accumulator_dtype(delta.dtype)
    if in_one_batch(dx):
        with matmul_precision(operands.precision):
            if d_delta.dtype == delta.dtype:
                by_mask(d_delta).baddbmm_(weights, by_mask(dx), beta=beta)
            else:
                product = torch.bmm(weights, by_mask(dx))
                by_mask(d_delta).add_(product) if add else by_mask(d_delta).copy_(product)
            return torch.bmm(by_mask(dx), by_mask(delta).mT).to(wide)
    d_masks = dx.new_empty(operands.masks.shape, dtype=wide)
    for m, rows in enumerate(operands.rows_of_masks()):
        block = dx[:, rows].flatten(1)  # [J, n]
        target = d_delta[:, rows].flatten(1)  # [S, n], a view
        if d_delta.dtype == delta.dtype:
            target.addmm_(weights[m], block, beta=beta)
        else:
            product = weights[m] @ block
            target.add_(product) if add else target.copy_(product)
        d_masks[m] = block @ delta[:, rows].flatten(1).T
    return d_masks


# ---- Triton ----------------------------------------------------------------------------------------------------------


# Longer than 60 lines: both gradients come from one pass over dx and delta, d_delta with its sum in registers.
@triton.jit(do_not_specialize=["J", "S", "B", "rows_per_mask", "splits", "tiles_per_split"])
def mix_backward_kernel(  # type: ignore[no-untyped-def]
    dx,  # [J, B, n], n = T * d
    masks,  # [M, J, S]
    delta,  # [S, B, n]
    d_delta,  # [S, B, n]
    partial,  # [B, splits, J, S]: the part of d_masks of one row and one split of n
    J,
    S,
    B,
    n,
    rows_per_mask,
    mask_stride,
    destination_stride,
    splits,
    tiles_per_split,
    ADD: tl.constexpr,
    BJ: tl.constexpr,
    BS: tl.constexpr,
    BN: tl.constexpr,
    PRECISION: tl.constexpr,
    UP: tl.constexpr,
):
    """One program: one row, BS sources, a run of tiles of BN numbers of n, all destinations.

    No two programs write to one place.
    """
    n_blocks = tl.cdiv(S, BS)  # blocks of sources of one row run side by side and share its dx in L2
    block = tl.program_id(0) % n_blocks
    split = tl.program_id(0) // n_blocks % splits
    b = (tl.program_id(0) // n_blocks // splits).to(tl.int64)
    s = block * BS + tl.arange(0, BS)
    of_row = masks + (b // rows_per_mask) * mask_stride + s[None, :]
    part = partial + (b * splits + split) * J * S + s[None, :]
    first = split * tiles_per_split
    for tile in range(first, tl.minimum(first + tiles_per_split, tl.cdiv(n, BN))):
        i = tile * BN + tl.arange(0, BN)
        at = (s[:, None].to(tl.int64) * B + b) * n + i[None, :]
        inside = (s[:, None] < S) & (i[None, :] < n)
        out = factor(tl.load(delta + at, mask=inside, other=0.0), PRECISION, UP)
        grad = tl.zeros([BS, BN], tl.float32)
        if ADD:
            grad += tl.load(d_delta + at, mask=inside, other=0.0).to(tl.float32)
        for j0 in range(0, J, BJ):
            j = j0 + tl.arange(0, BJ)
            edge = (j[:, None] < J) & (s[None, :] < S)  # [BJ, BS]
            at_dx = dx + (j[:, None].to(tl.int64) * B + b) * n + i[None, :]
            g = tl.load(at_dx, mask=(j[:, None] < J) & (i[None, :] < n), other=0.0)
            weights = tl.load(of_row + j[:, None].to(tl.int64) * destination_stride, mask=edge, other=0.0).to(g.dtype)
            g = factor(g, PRECISION, UP)
            grad = tl.dot(tl.trans(factor(weights, PRECISION, UP)), g, grad, input_precision=PRECISION)
            dm = tl.dot(g, tl.trans(out), input_precision=PRECISION)
            at_dm = part + j[:, None] * S
            dm += tl.load(at_dm, mask=edge & (tile > first), other=0.0)
            tl.store(at_dm, dm, mask=edge)
        tl.store(d_delta + at, rounded(grad, d_delta.dtype.element_ty, UP), mask=inside)
        tl.debug_barrier()  # the next tile's threads read what others of this program wrote to `partial`


MIX_BACKWARD_TILES = {"BJ": 16, "BS": 32, "BN": 256, "num_warps": 8, "num_stages": 3}
"""By what fits without spilling: with BJ 32 or BN 512 the registers of 8 warps do not hold both sums and their factors.

A program reads BJ x BN of dx for each BJ x BS of d_masks that it adds to in L2.
"""


def _mix_backward_triton(dx: Tensor, operands: Operands, d_delta: Tensor, add: bool) -> Tensor:
    masks, delta, (J, B, T, d) = operands.masks, operands.delta, dx.shape
    (M, _, S), tiles = masks.shape, MIX_BACKWARD_TILES
    blocks, n_tiles = triton.cdiv(S, tiles["BS"]), triton.cdiv(T * d, tiles["BN"])
    tiles_per_split = triton.cdiv(n_tiles, min(n_tiles, triton.cdiv(PROGRAMS, B * blocks)))
    splits = triton.cdiv(n_tiles, tiles_per_split)
    partial = dx.new_empty(M, B // M * splits, J, S, dtype=torch.float32)
    mix_backward_kernel[(B * splits * blocks,)](
        dx,
        masks,
        delta,
        d_delta,
        partial,
        J=J,
        S=S,
        B=B,
        n=T * d,
        rows_per_mask=B // M,
        mask_stride=masks.stride(0),
        destination_stride=masks.stride(1),
        splits=splits,
        tiles_per_split=tiles_per_split,
        ADD=add,
        PRECISION=operands.precision,
        UP=INTERPRETED,
        **tiles,
    )
    return partial.sum(1)
