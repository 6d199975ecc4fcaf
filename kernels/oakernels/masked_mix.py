"""The masked mix: what every destination reads from the residual stream when each edge is kept or ablated.

    x[j, b, t] = base[b, t] + sum_s masks[b, j, s] * delta[s, b, t]        delta = out - r, base = always-on biases + sum_s r_s

`out` is what a source writes and r its replacement. Position 0 (BOS) is never ablated: its keys and values are those of the clean run, so
it is in none of these buffers, and T counts the ablatable positions after it.

Rows share masks, base and constants in equal runs: row b uses mask b // (B / M), base b // (B / F), constants b // (B / Fc).

Symbols: B rows, T ablatable tokens, J destinations, S sources, d model width, M masks, F bases, Q positions at which they differ (1 or T).
"""

import math
from typing import Any

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor
from torch.autograd.function import once_differentiable

from oakernels.runtime import (
    INTERPRETED,
    Backend,
    Precision,
    accumulator_dtype,
    in_one_batch,
    matmul_precision,
    rounded,
    run,
)

ABLATED = 1e-3
"""Below this mask value an edge counts as ablated and trains its constant; a partially kept edge would bias it (Li & Janson, appendix)."""


def masked_mix(
    base: Tensor,
    masks: Tensor,
    delta: Tensor,
    *,
    constants: Tensor | None = None,
    backend: Backend = "auto",
    precision: Precision = "ieee",
) -> Tensor:
    """The masked mix, differentiable in base, masks, delta and constants.

    Args:
        base: [F, Q, d].
        masks: [M, J, S], unit stride in S; any strides otherwise.
        delta: [S, B, T, d], contiguous.
        constants: [Fc, S, Qc, d], receives a gradient and is not read: the replacements are already in delta (with -) and base (with +),
            which should be detached from them. The gradient is sum (1 - m) dx over the entries with m < ABLATED alone.
        backend: "eager" is torch, "triton" the fused kernels, "auto" see `runtime.run`.
        precision: of fp32 products on a GPU.

    Returns:
        x [J, B, T, d].

    Raises:
        ValueError: shapes, strides or dtypes that don't fit together.
    """
    return _MaskedMix.apply(base, masks, delta, constants, backend, precision)


class _MaskedMix(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        base: Tensor,
        masks: Tensor,
        delta: Tensor,
        constants: Tensor | None,
        backend: Backend,
        precision: Precision,
    ) -> Tensor:
        ctx.save_for_backward(masks, delta)
        ctx.base_shape, ctx.constants_shape = base.shape, None if constants is None else constants.shape
        ctx.options = {"backend": backend, "precision": precision}
        return mix(base, masks, delta, backend=backend, precision=precision)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor | None, ...]:
        masks, delta = ctx.saved_tensors
        return *mix_gradients(dx, masks, delta, ctx.base_shape, ctx.constants_shape, ctx.options), None, None


def mix_gradients(
    dx: Tensor,
    masks: Tensor,
    delta: Tensor,
    base_shape: torch.Size,
    constants_shape: torch.Size | None,
    options: dict[str, Any],
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """All gradients of a mix from dx [J, B, T, d]: of base, masks, delta and constants (None without constants_shape)."""
    T = dx.shape[2]
    dx, d_delta = dx.contiguous(), torch.zeros_like(delta)
    d_masks, sums = mix_backward(dx, masks, delta, d_delta=d_delta, token_sums=True, **options)
    assert sums is not None
    d_base = base_gradient(dx if base_shape[1] == T else sums, base_shape[0])
    d_constants = None
    if constants_shape is not None:
        d_constants = constant_gradient(masks, dx if constants_shape[2] == T else sums, constants_shape[0])
    return d_base, d_masks, d_delta, d_constants


def mix(
    base: Tensor,
    masks: Tensor,
    delta: Tensor,
    *,
    out: Tensor | None = None,
    backend: Backend = "auto",
    precision: Precision = "ieee",
) -> Tensor:
    """`masked_mix` without autograd, into out [J, B, T, d] (contiguous) if given; with J = 1, F = B, Q = T it may be base's own memory."""
    x = _checked_output(base, masks, delta, out)
    candidates = {
        "eager": lambda x: _mix_eager(base, masks, delta, x, precision),
        "triton": lambda x: _mix_triton(base, masks, delta, x, None, 0.0, precision),
    }
    return run(backend, ("mix", masks.shape, delta.shape, base.shape, precision), x, candidates)


def mix_and_scale(
    base: Tensor,
    masks: Tensor,
    delta: Tensor,
    eps: float,
    *,
    out: Tensor | None = None,
    backend: Backend = "auto",
    precision: Precision = "ieee",
) -> tuple[Tensor, Tensor]:
    """`mix`, and the RMS scale (mean_d x^2 + eps)^-1/2 of what it writes: x [J, B, T, d] and rstd [J, B, T] (fp32; fp64 for fp64)."""
    x = _checked_output(base, masks, delta, out)

    def eager(x: Tensor) -> tuple[Tensor, Tensor]:
        return x, rms_scale(_mix_eager(base, masks, delta, x, precision), eps)

    def fused(x: Tensor) -> tuple[Tensor, Tensor]:
        rstd = x.new_empty(x.shape[:3], dtype=torch.float32)
        return _mix_triton(base, masks, delta, x, rstd, eps, precision), rstd

    key = ("mix_and_scale", masks.shape, delta.shape, base.shape, precision)
    return run(backend, key, x, {"eager": eager, "triton": fused})


def rms_scale(x: Tensor, eps: float) -> Tensor:
    """(mean_d x^2 + eps)^-1/2 of x [..., d], without a copy of x: [...]."""
    norm = torch.linalg.vector_norm(x, dim=-1, dtype=accumulator_dtype(x.dtype))
    return norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()


def _mix_eager(base: Tensor, masks: Tensor, delta: Tensor, x: Tensor, precision: Precision) -> Tensor:
    """One batched GEMM over all masks, or on CPU one GEMM per mask (see `in_one_batch`); straight into x, without copies."""
    B, M, F, weights = x.shape[1], masks.shape[0], base.shape[0], masks.to(delta.dtype)
    if in_one_batch(x):
        if base.data_ptr() != x.data_ptr():  # else in place: base is there already
            x.unflatten(1, (F, -1)).copy_(base[:, None])  # [J, F, B / F, T, d]
        with matmul_precision(precision):
            _by_mask(x, M).baddbmm_(weights, _by_mask(delta, M))
        return x
    by_row = base.repeat_interleave(B // F, 0)  # [B, Q, d]
    for m in range(M):
        rows = slice(m * B // M, (m + 1) * B // M)
        block = x[:, rows]
        block.copy_(by_row[rows].expand(block.shape))  # mask by mask: still in cache when the GEMM adds to it
        block.flatten(1).addmm_(weights[m], delta[:, rows].flatten(1))
    return x


def mix_backward(
    dx: Tensor,
    masks: Tensor,
    delta: Tensor,
    *,
    d_delta: Tensor,
    token_sums: bool = False,
    backend: Backend = "auto",
    precision: Precision = "ieee",
) -> tuple[Tensor, Tensor | None]:
    """Backward of `mix` in one pass over delta.

    Args:
        dx: [J, B, T, d], contiguous.
        d_delta: [S, B, T, d], contiguous, of delta's dtype or fp32; what this mix adds to it is accumulated in place.
        token_sums: also return dx summed over tokens, as `constant_gradient` and `base_gradient` take it.

    Returns:
        d_masks [M, J, S] and token sums [J, B, d] or None, both fp32 (fp64 for fp64).
    """
    check_shapes(None, masks, delta)
    _check_contiguous("dx", dx, (masks.shape[1], *delta.shape[1:]), delta.dtype)
    _check_contiguous("d_delta", d_delta, delta.shape, delta.dtype, accumulator_dtype(delta.dtype))
    candidates = {
        "eager": lambda d_delta: _mix_backward_eager(dx, masks, delta, d_delta, token_sums, precision),
        "triton": lambda d_delta: _mix_backward_triton(dx, masks, delta, d_delta, token_sums, precision),
    }
    key = ("mix_backward", masks.shape, delta.shape, delta.dtype, token_sums, precision)
    return run(backend, key, d_delta, candidates)


def _mix_backward_eager(
    dx: Tensor, masks: Tensor, delta: Tensor, d_delta: Tensor, token_sums: bool, precision: Precision
) -> tuple[Tensor, Tensor | None]:
    B, M, weights, wide = dx.shape[1], len(masks), masks.to(delta.dtype).mT, accumulator_dtype(delta.dtype)
    if in_one_batch(dx):
        with matmul_precision(precision):
            if d_delta.dtype == delta.dtype:
                _by_mask(d_delta, M).baddbmm_(weights, _by_mask(dx, M))
            else:
                _by_mask(d_delta, M).add_(torch.bmm(weights, _by_mask(dx, M)))
            d_masks = torch.bmm(_by_mask(dx, M), _by_mask(delta, M).mT).to(wide)
        return d_masks, dx.sum(2, dtype=wide) if token_sums else None
    d_masks = torch.empty(masks.shape, dtype=wide)
    for m in range(M):
        rows = slice(m * B // M, (m + 1) * B // M)
        block = dx[:, rows].flatten(1)  # [J, n]
        target = d_delta[:, rows].flatten(1)  # [S, n], a view
        if d_delta.dtype == delta.dtype:
            target.addmm_(weights[m], block)
        else:
            target += weights[m] @ block
        d_masks[m] = block @ delta[:, rows].flatten(1).T
    return d_masks, dx.sum(2, dtype=wide) if token_sums else None


def constant_gradient(masks: Tensor, dx: Tensor, n_fits: int) -> Tensor:
    """Gradient of the constants of a mix: (1 - m) dx summed over destinations and rows, where m < ABLATED.

    Args:
        masks: [M, J, S].
        dx: [J, B, T, d], or its token sums [J, B, d].
        n_fits: Fc, a divisor of B.

    Returns:
        [Fc, S, Q, d] with Q = T, or 1 for token sums.
    """
    B, (M, _, S) = dx.shape[1], masks.shape
    n_groups = B // math.gcd(B // M, B // n_fits)  # runs of rows with one mask and one fit
    ablated = torch.where(masks < ABLATED, 1 - masks, 0).to(dx.dtype)  # [M, J, S]
    ablated = ablated.repeat_interleave(n_groups // M, 0).view(n_fits, -1, S)  # [Fc, groups * J, S]
    summed = dx.flatten(2).unflatten(1, (n_groups, -1)).sum(2)  # [J, groups, Q * d]
    summed = summed.transpose(0, 1).reshape(n_fits, -1, summed.shape[-1])  # [Fc, groups * J, Q * d]
    return (ablated.mT @ summed).unflatten(2, (-1, dx.shape[-1]))


def base_gradient(dx: Tensor, n_bases: int) -> Tensor:
    """Gradient of the base: dx [J, B, T, d] or its token sums [J, B, d] -> [F, T or 1, d]."""
    return dx.sum(0).view(n_bases, dx.shape[1] // n_bases, -1, dx.shape[-1]).sum(1)


def _by_mask(x: Tensor, n_masks: int) -> Tensor:
    """x [n, B, T, d], contiguous, as one matrix per mask [M, n, B / M * T * d]: a view."""
    return x.view(x.shape[0], n_masks, -1).transpose(0, 1)


def _checked_output(base: Tensor, masks: Tensor, delta: Tensor, out: Tensor | None) -> Tensor:
    """out, or a new x [J, B, T, d], once all shapes fit."""
    check_shapes(base, masks, delta)
    shape = (masks.shape[1], *delta.shape[1:])
    if out is None:
        return delta.new_empty(shape)
    _check_contiguous("out", out, shape, delta.dtype)
    return out


def _check_contiguous(name: str, x: Tensor, shape: tuple[int, ...], *dtypes: torch.dtype) -> None:
    if x.shape != shape or x.dtype not in dtypes or not x.is_contiguous():
        allowed = f"contiguous {' or '.join(map(str, dict.fromkeys(dtypes)))} {list(shape)}"
        raise ValueError(f"{name} {x.dtype} {list(x.shape)} of strides {x.stride()}; allowed: {allowed}")


def check_shapes(base: Tensor | None, masks: Tensor, delta: Tensor) -> None:
    """ValueError unless base [F, Q, d], masks [M, J, S] and delta [S, B, T, d] fit together."""
    if delta.ndim != 4 or not delta.is_contiguous():
        raise ValueError(f"delta {list(delta.shape)} of strides {delta.stride()}; allowed: contiguous [S, B, T, d]")
    S, B, T, d = delta.shape
    if masks.ndim != 3 or masks.shape[2] != S or B % masks.shape[0] or (masks.stride(2) != 1 and S > 1):
        raise ValueError(f"masks {list(masks.shape)} of strides {masks.stride()}; allowed: [M, J, {S}], M dividing {B}, unit stride in S")
    if masks.dtype not in (torch.float32, delta.dtype):
        raise ValueError(f"masks {masks.dtype}; allowed: torch.float32 or delta's {delta.dtype}")
    if base is not None and (base.ndim != 3 or base.shape[1] not in (1, T) or base.shape[2] != d or B % base.shape[0]):
        raise ValueError(f"base {list(base.shape)}; allowed: [F, 1 or {T}, {d}], F dividing {B}")


# ---- Triton ----------------------------------------------------------------------------------------------------------------------------


@triton.jit
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
    """One program: one token of one row, BJ destinations, all of d, so that it can sum the squares of what it writes."""
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
                delta + (s[:, None].to(tl.int64) * R + token) * d + i[None, :], mask=(s[:, None] < S) & (i[None, :] < d), other=0.0
            )
            weights = tl.load(mask_rows + s[None, :], mask=(j[:, None] < J) & (s[None, :] < S), other=0.0)
            if UP:
                out = out.to(tl.float32)
            acc = tl.dot(weights.to(out.dtype), out, acc, input_precision=PRECISION)
        squares += tl.sum(acc * acc, 1)
        at = x + (j[:, None].to(tl.int64) * R + token) * d + i[None, :]
        tl.store(at, rounded(acc, x.dtype.element_ty, UP), mask=(j[:, None] < J) & (i[None, :] < d))
    if rstd is not None:
        tl.store(rstd + j.to(tl.int64) * R + token, 1.0 / tl.sqrt(squares / d + eps), mask=j < J)


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
    """One program: one row, BS sources, one split of d, all tokens and all J <= BJ destinations; no two write to one place."""
    n_blocks = tl.cdiv(S, BS)  # blocks of sources of one row run side by side and share its dx in L2
    block = tl.program_id(0) % n_blocks
    split = tl.program_id(0) // n_blocks % splits
    b = (tl.program_id(0) // n_blocks // splits).to(tl.int64)
    j = tl.arange(0, BJ)
    s = block * BS + tl.arange(0, BS)
    edge = (j[:, None] < J) & (s[None, :] < S)  # [BJ, BS]
    weights = tl.load(
        masks + (b // rows_per_mask) * mask_stride + j[:, None].to(tl.int64) * destination_stride + s[None, :], mask=edge, other=0.0
    )
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
            if UP:
                g = g.to(tl.float32)
                out = out.to(tl.float32)
            dm = tl.dot(g, tl.trans(out), dm, input_precision=PRECISION)
            grad = tl.dot(tl.trans(weights.to(g.dtype)), g, grad, input_precision=PRECISION)
            tl.store(d_delta + at, rounded(grad, d_delta.dtype.element_ty, UP), mask=is_delta)
            if sums is not None:
                total += g.to(tl.float32)
        if sums is not None:
            tl.store(sums + (j[:, None].to(tl.int64) * (R // T) + b) * d + i[None, :], total, mask=is_dx & (block == 0))
    at = partial + ((b * splits + split) * J + j[:, None]) * S + s[None, :]
    tl.store(at, dm, mask=edge)


# What a program owns, by what fits without spilling on sm_80 and sm_90 (kernels/README.md). BD is 128 bytes of d in the backward kernel, a
# cache line. fp32 in ieee precision multiplies on the CUDA cores, where operands are held in registers: smaller tiles.


def mix_tiles(J: int, dtype: torch.dtype, precision: Precision) -> dict[str, int]:
    """Tile sizes and launch options of `mix_kernel`."""
    cuda_cores = dtype == torch.float32 and precision == "ieee"
    BJ = _block(J)
    return {"BJ": BJ, "BS": 32, "BD": 64 if cuda_cores else 128, "num_warps": 8 if BJ == MAX_BJ else 4, "num_stages": 3}


def mix_backward_tiles(J: int, dtype: torch.dtype, precision: Precision) -> dict[str, int]:
    """Tile sizes and launch options of `mix_backward_kernel`, which takes J <= MAX_BJ."""
    BJ = _block(J)
    tiles = {"BJ": BJ, "num_warps": 8 if BJ == MAX_BJ else 4, "num_stages": 3 if BJ == MAX_BJ else 2}
    if dtype == torch.bfloat16:
        return tiles | {"BS": 32, "BD": 64}
    if precision == "ieee":  # a stage less spilled 12 and 40 bytes
        return tiles | {"BS": 32, "BD": 32, "num_stages": tiles["num_stages"] + 1}
    return tiles | {"BS": 64, "BD": 32}


MAX_BJ = 64


def _block(J: int) -> int:
    """Destinations of a program: the 16 rows of a tensor-core tile, or MAX_BJ (32 spilled on sm_80, and memory traffic is the same)."""
    return 16 if J <= 16 else MAX_BJ


def _mix_triton(
    base: Tensor,
    masks: Tensor,
    delta: Tensor,
    x: Tensor,
    rstd: Tensor | None,
    eps: float,
    precision: Precision,
) -> Tensor:
    """x, with rstd [J, B, T] filled if given."""
    J, B, T, d = x.shape
    tiles = mix_tiles(J, delta.dtype, precision)
    mix_kernel[(B * T * triton.cdiv(J, tiles["BJ"]),)](
        x,
        rstd,
        base.contiguous(),
        masks,
        delta,
        J,
        delta.shape[0],
        B * T,
        T,
        d,
        B // masks.shape[0],
        B // base.shape[0],
        masks.stride(0),
        masks.stride(1),
        eps,
        BASE_PER_TOKEN=base.shape[1] == T,
        PRECISION=precision,
        UP=INTERPRETED,
        **tiles,
    )
    return x


def _mix_backward_triton(
    dx: Tensor, masks: Tensor, delta: Tensor, d_delta: Tensor, token_sums: bool, precision: Precision
) -> tuple[Tensor, Tensor | None]:
    (J, B, T, d), (M, _, S) = dx.shape, masks.shape
    d_masks = dx.new_empty(M, J, S, dtype=torch.float32)
    sums = dx.new_empty(J, B, d, dtype=torch.float32) if token_sums else None
    for j0 in range(0, J, MAX_BJ):
        j = slice(j0, min(j0 + MAX_BJ, J))
        tiles = mix_backward_tiles(j.stop - j0, delta.dtype, precision)
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
            j.stop - j0,
            S,
            B * T,
            T,
            d,
            B // M,
            masks.stride(0),
            masks.stride(1),
            splits,
            chunks_per_split,
            PRECISION=precision,
            UP=INTERPRETED,
            **tiles,
        )
        torch.sum(partial.view(M, -1, *partial.shape[2:]), 1, out=d_masks[:, j])
    return d_masks, sums


PROGRAMS = 1024
"""Programs that the backward pass is split into, where d allows: a few for each of an H100's 132 multiprocessors."""
