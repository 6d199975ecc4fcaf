"""The masked read: mix, RMS scale, and each destination's own projection, in one op.

    x = masked mix (see masked_mix.py)     rstd = (mean_d x^2 + eps)^-1/2     y[j, b, t] = rstd * (x[j, b, t] @ weight[j]) + bias[j]

The scale commutes with the projection, so x need never be written. Norm weights are folded into weight and bias; a model with LayerNorm
has all its writers centred over d, and its readers too, and then an RMS scale is its norm. Weights are frozen: they get no gradient.

Backward, from dy, with the norm's inner product taken in head space, where it costs k instead of d:

    a = rstd^2 / d * sum_k dy * (y - bias)     dx = rstd * dy @ weight^T - a * x     then the backward of the mix

Symbols: as in masked_mix.py, and k head width.
"""

from typing import Any

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor
from torch.autograd.function import once_differentiable

from oakernels.masked_mix import check_shapes, mix, mix_and_scale, mix_backward, mix_gradients
from oakernels.runtime import INTERPRETED, Backend, Precision, matmul_precision, rounded, run


def masked_read(
    base: Tensor,
    masks: Tensor,
    delta: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    *,
    constants: Tensor | None = None,
    backend: Backend = "auto",
    precision: Precision = "ieee",
    store_inputs: bool = False,
) -> Tensor:
    """The masked read, differentiable in base, masks, delta and constants.

    Args:
        base, masks, delta, constants, backend, precision: as in `masked_mix`.
        weight: [J, d, k], contiguous.
        bias: [J, k].
        eps: of the norm.
        store_inputs: keep x [J, B, T, d] for the backward pass instead of mixing again.

    Returns:
        y [J, B, T, k].

    Raises:
        ValueError: shapes, strides or dtypes that don't fit together; weight or bias that ask for a gradient.
    """
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        raise ValueError("weight or bias requires a gradient; allowed: frozen weights")
    return _MaskedRead.apply(base, masks, delta, weight, bias, eps, constants, backend, precision, store_inputs)


class _MaskedRead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        base: Tensor,
        masks: Tensor,
        delta: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        eps: float,
        constants: Tensor | None,
        backend: Backend,
        precision: Precision,
        store_inputs: bool,
    ) -> Tensor:
        options: dict[str, Any] = {"backend": backend, "precision": precision}
        y, rstd, x = read(base, masks, delta, weight, bias, eps, store_inputs=store_inputs, **options)
        ctx.save_for_backward(base, masks, delta, weight, bias, y, rstd, x)
        ctx.constants_shape, ctx.options = None if constants is None else constants.shape, options
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        base, masks, delta, weight, bias, y, rstd, x = ctx.saved_tensors
        options = ctx.options
        dx = _read_input_gradient(dy.contiguous(), y, rstd, base, masks, delta, weight, bias, x, options)
        gradients = mix_gradients(dx, masks, delta, base.shape, ctx.constants_shape, options)
        return *gradients[:3], None, None, None, gradients[3], None, None, None


def read(
    base: Tensor,
    masks: Tensor,
    delta: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    *,
    store_inputs: bool = False,
    backend: Backend = "auto",
    precision: Precision = "ieee",
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`masked_read` without autograd.

    Returns:
        y [J, B, T, k], rstd [J, B, T] (fp32; fp64 for fp64), and x [J, B, T, d] with store_inputs, else None.
    """
    check_shapes(base, masks, delta)

    def composed(y: Tensor, kernel: Backend) -> tuple[Tensor, Tensor, Tensor | None]:
        x, rstd = mix_and_scale(base, masks, delta, eps, backend=kernel, precision=precision)
        return project(x, rstd, weight, bias, out=y, precision=precision), rstd, x if store_inputs else None

    def fused(y: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        return *_read_triton(base, masks, delta, weight, bias, eps, y, precision), None

    candidates = {"eager": lambda y: composed(y, "eager"), "triton": lambda y: composed(y, "triton")}
    if not store_inputs:  # both kernels are candidates: writing x costs bandwidth, keeping it in registers reads the weights once per row
        candidates |= {"triton": fused, "triton, x written": lambda y: composed(y, "triton")}
    y = delta.new_empty(masks.shape[1], *delta.shape[1:3], weight.shape[2])
    key = ("read", masks.shape, delta.shape, base.shape, weight.shape, bias is None, store_inputs, precision)
    return run(backend, key, y, candidates)


def read_backward(
    dy: Tensor,
    y: Tensor,
    rstd: Tensor,
    base: Tensor,
    masks: Tensor,
    delta: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    x: Tensor | None = None,
    d_delta: Tensor,
    token_sums: bool = False,
    backend: Backend = "auto",
    precision: Precision = "ieee",
) -> tuple[Tensor, Tensor | None]:
    """Backward of `read` from dy [J, B, T, k], contiguous, and what `read` returned (x None: mixed again). As `mix_backward` otherwise."""
    options: dict[str, Any] = {"backend": backend, "precision": precision}
    dx = _read_input_gradient(dy, y, rstd, base, masks, delta, weight, bias, x, options)
    return mix_backward(dx, masks, delta, d_delta=d_delta, token_sums=token_sums, **options)


def _read_input_gradient(
    dy: Tensor,
    y: Tensor,
    rstd: Tensor,
    base: Tensor,
    masks: Tensor,
    delta: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    x: Tensor | None,
    options: dict[str, Any],
) -> Tensor:
    """dx [J, B, T, d]; a recomputed x is overwritten by it, a stored one is kept."""
    if x is None:
        x = out = mix(base, masks, delta, **options)
    else:
        out = torch.empty_like(x)
    return project_backward(dy, y, rstd, x, weight, bias, out=out, **options)


def project(
    x: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    out: Tensor | None = None,
    precision: Precision = "ieee",
) -> Tensor:
    """x [J, B, T, d], rstd [J, B, T], weight [J, d, k], bias [J, k] -> y [J, B, T, k].

    One batched GEMM in torch on every backend: nothing is left to fuse but a scale of the small y.
    """
    y = x.new_empty(*x.shape[:3], weight.shape[2]) if out is None else out
    with matmul_precision(precision):
        torch.bmm(x.flatten(1, 2), weight, out=y.flatten(1, 2))
    y *= rstd[..., None]
    if bias is not None:
        y += bias[:, None, None]
    return y


def project_backward(
    dy: Tensor,
    y: Tensor,
    rstd: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    out: Tensor,
    backend: Backend = "auto",
    precision: Precision = "ieee",
) -> Tensor:
    """dx [J, B, T, d] of RMS scale and projection, from dy and y [J, B, T, k], written to out, which may be x's own memory."""
    for name, tensor in (("dy", dy), ("y", y), ("x", x), ("weight", weight), ("out", out)):
        if not tensor.is_contiguous():
            raise ValueError(f"{name} {list(tensor.shape)} of strides {tensor.stride()}; allowed: contiguous")
    candidates = {
        "eager": lambda out: _project_backward_eager(dy, y, rstd, x, weight, bias, out, precision),
        "triton": lambda out: _project_backward_triton(dy, y, rstd, x, weight, bias, out, precision),
    }
    return run(backend, ("project_backward", x.shape, y.shape, bias is None, precision), out, candidates)


def _project_backward_eager(
    dy: Tensor, y: Tensor, rstd: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, precision: Precision
) -> Tensor:
    centred = y if bias is None else y - bias[:, None, None]
    a = (dy.to(rstd.dtype) * centred).sum(-1) * rstd.square() / x.shape[-1]  # [J, B, T]
    scaled = (dy * rstd[..., None]).to(dy.dtype)
    torch.mul(x, -a[..., None], out=out)
    with matmul_precision(precision):
        out.flatten(1, 2).baddbmm_(scaled.flatten(1, 2), weight.mT)
    return out


# ---- Triton ----------------------------------------------------------------------------------------------------------------------------


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
    """One program: BJ destinations, BT tokens of one row, BK of the projection; x lives in registers, BD of its d at a time."""
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
        w = tl.load(at_weight, mask=(j[:, None, None] < J) & (i[None, :, None] < d) & (column[None, None, :] < k), other=0.0)
        if UP:
            w = w.to(tl.float32)
        acc = tl.dot(x.to(w.dtype), w, acc, input_precision=PRECISION)
    scale = 1.0 / tl.sqrt(squares / d + eps)  # [BJ, BT]
    acc *= scale[:, :, None]
    if bias is not None:
        acc += tl.load(bias + j[:, None] * k + column[None, :], mask=(j[:, None] < J) & (column[None, :] < k), other=0.0).to(tl.float32)[
            :, None, :
        ]
    token = j[:, None].to(tl.int64) * R + b * T + t[None, :]  # [BJ, BT]
    inside = (j[:, None] < J) & (t[None, :] < T)
    tl.store(rstd + token, scale, mask=inside)
    at_y = y + token[:, :, None] * k + column[None, None, :]
    tl.store(at_y, rounded(acc, y.dtype.element_ty, UP), mask=inside[:, :, None] & (column[None, None, :] < k))


@triton.jit
def project_backward_kernel(  # type: ignore[no-untyped-def]
    dx,  # [J, R, d], may be x
    dy,  # [J, R, k]
    y,  # [J, R, k]
    rstd,  # [J, R]
    x,  # [J, R, d]
    weight,  # [J, d, k]
    bias,  # [J, k], or None
    R,
    d,
    k,
    BR: tl.constexpr,
    BD: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
    UP: tl.constexpr,
):
    """One program: BR tokens of one destination, BD of d."""
    n_d = tl.cdiv(d, BD)
    n_r = tl.cdiv(R, BR)
    block = tl.program_id(0)
    i = (block % n_d) * BD + tl.arange(0, BD)
    r = (block // n_d % n_r) * BR + tl.arange(0, BR)
    j = (block // n_d // n_r).to(tl.int64)
    row = j * R + r  # [BR]
    acc = tl.zeros([BR, BD], tl.float32)
    inner = tl.zeros([BR], tl.float32)
    for k0 in range(0, k, BK):
        column = k0 + tl.arange(0, BK)
        is_y = (r[:, None] < R) & (column[None, :] < k)
        g = tl.load(dy + row[:, None] * k + column[None, :], mask=is_y, other=0.0)
        value = tl.load(y + row[:, None] * k + column[None, :], mask=is_y, other=0.0).to(tl.float32)
        at_weight = weight + (j * d + i[:, None]) * k + column[None, :]
        w = tl.load(at_weight, mask=(i[:, None] < d) & (column[None, :] < k), other=0.0)  # [BD, BK]
        if bias is not None:
            value -= tl.load(bias + j * k + column, mask=column < k, other=0.0).to(tl.float32)[None, :]
        if UP:
            g = g.to(tl.float32)
            w = w.to(tl.float32)
        inner += tl.sum(g.to(tl.float32) * value, 1)
        acc = tl.dot(g, tl.trans(w), acc, input_precision=PRECISION)
    scale = tl.load(rstd + row, mask=r < R, other=0.0)
    at = row[:, None] * d + i[None, :]
    is_x = (r[:, None] < R) & (i[None, :] < d)
    old = tl.load(x + at, mask=is_x, other=0.0).to(tl.float32)
    new = scale[:, None] * acc - (scale * scale / d * inner)[:, None] * old
    tl.store(dx + at, rounded(new, dx.dtype.element_ty, UP), mask=is_x)


READ_TILES = {"BJ": 16, "BT": 16, "BS": 16, "BD": 16, "BK": 64, "num_warps": 8, "num_stages": 2}
"""16 x 16 x 64 sums of y and 16 x 16 x 16 of x fill the registers of 8 warps; BS = 32 spilled 44 bytes on sm_80, BK = 128 over 300."""

PROJECT_BACKWARD_TILES = {"BR": 64, "BD": 128, "BK": 64, "num_warps": 8, "num_stages": 2}


def _read_triton(
    base: Tensor,
    masks: Tensor,
    delta: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    y: Tensor,
    precision: Precision,
) -> tuple[Tensor, Tensor]:
    (J, B, T, k), (S, _, _, d) = y.shape, delta.shape
    rstd = y.new_empty(J, B, T, dtype=torch.float32)
    tiles = READ_TILES
    grid = B * triton.cdiv(T, tiles["BT"]) * triton.cdiv(J, tiles["BJ"]) * triton.cdiv(k, tiles["BK"])
    read_kernel[(grid,)](
        y,
        rstd,
        base.contiguous(),
        masks,
        delta,
        weight,
        bias,
        J,
        S,
        B * T,
        T,
        d,
        k,
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
    return y, rstd


def _project_backward_triton(
    dy: Tensor, y: Tensor, rstd: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, precision: Precision
) -> Tensor:
    (J, B, T, d), k, tiles = x.shape, y.shape[3], PROJECT_BACKWARD_TILES
    grid = J * triton.cdiv(B * T, tiles["BR"]) * triton.cdiv(d, tiles["BD"])
    project_backward_kernel[(grid,)](out, dy, y, rstd, x, weight, bias, B * T, d, k, PRECISION=precision, UP=INTERPRETED, **tiles)
    return out
