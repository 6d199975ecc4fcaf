"""RMS scale and projection of mixed inputs, forward and backward:

    y[j, b, t] = rstd * (x[j, b, t] @ weight[j]) + bias[j]
    a = rstd^2 / d * sum_k dy * (y - bias)     dx = rstd * dy @ weight^T - a * x

The norm's inner product a is taken in head space, where it costs k instead of d. Without a norm, where rstd is None, it
is one batched GEMM in torch either way. Symbols: as in operands.py.
"""

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from oakernels.operands import Projection, check_contiguous
from oakernels.runtime import INTERPRETED, Backend, Precision, factor, matmul_precision, rounded, run


def project(
    x: Tensor,
    rstd: Tensor | None,
    projection: Projection,
    *,
    out: Tensor | None = None,
    precision: Precision = "ieee",
) -> Tensor:
    """Scale and project what `mix_and_scale` returned, x [J, B, T, d] and rstd [J, B, T].

    One batched GEMM in torch on every backend: nothing is left to fuse but a scale of the small y.

    Returns:
        y [J, B, T, k]: out, or new.
    """
    y = x.new_empty(*x.shape[:3], projection.weight.shape[2]) if out is None else out
    with matmul_precision(precision):
        torch.bmm(x.flatten(1, 2), projection.weight, out=y.flatten(1, 2))
    bias = None if projection.bias is None else projection.bias[:, None, None]
    return _scaled(y, None if rstd is None else rstd[..., None], bias, at_once=y.device.type != "cpu")


def _scaled(y: Tensor, rstd: Tensor | None, bias: Tensor | None, *, at_once: bool) -> Tensor:
    """y * rstd + bias, in place; at once it rounds once, and so otherwise than a CPU's recorded numbers."""
    if rstd is not None and bias is not None and at_once:
        return torch.addcmul(bias, y, rstd, out=y)
    if rstd is not None:
        y *= rstd
    if bias is not None:
        y += bias
    return y


def project_backward(
    dy: Tensor,
    y: Tensor,
    rstd: Tensor | None,
    x: Tensor,
    projection: Projection,
    *,
    out: Tensor,
    backend: Backend = "auto",
    precision: Precision = "ieee",
) -> Tensor:
    """Backward of RMS scale and projection together.

    Args:
        dy, y: [J, B, T, k], contiguous.
        rstd: [J, B, T].
        x: [J, B, T, d], contiguous.
        out: [J, B, T, d], contiguous, to write to; it may be x's own memory.

    Returns:
        dx [J, B, T, d]: out.

    Raises:
        ValueError: an operand that is not contiguous.
    """
    for name, tensor in (("dy", dy), ("y", y), ("x", x), ("out", out)):
        check_contiguous(name, tensor, tensor.shape, tensor.dtype)
    if rstd is None:
        with matmul_precision(precision):
            torch.bmm(dy.flatten(1, 2), projection.weight.mT, out=out.flatten(1, 2))
        return out
    candidates = {
        "eager": lambda out: _project_backward_eager(dy, y, rstd, x, projection, out, precision),
        "triton": lambda out: _project_backward_triton(dy, y, rstd, x, projection, out, precision),
    }
    key = ("project_backward", x.shape, y.shape, projection.bias is None, precision)
    return run(backend, key, out, candidates)


def _project_backward_eager(
    dy: Tensor, y: Tensor, rstd: Tensor, x: Tensor, projection: Projection, out: Tensor, precision: Precision
) -> Tensor:
    centred = y if projection.bias is None else y - projection.bias[:, None, None]
    a = (dy.to(rstd.dtype) * centred).sum(-1) * rstd.square() / x.shape[-1]  # [J, B, T]
    scaled = (dy * rstd[..., None]).to(dy.dtype)
    torch.mul(x, -a[..., None], out=out)
    with matmul_precision(precision):
        out.flatten(1, 2).baddbmm_(scaled.flatten(1, 2), projection.weight.mT)
    return out


# ---- Triton ----------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["R"])
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
        inner += tl.sum(g.to(tl.float32) * value, 1)
        acc = tl.dot(factor(g, PRECISION, UP), tl.trans(factor(w, PRECISION, UP)), acc, input_precision=PRECISION)
    scale = tl.load(rstd + row, mask=r < R, other=0.0)
    at = row[:, None] * d + i[None, :]
    is_x = (r[:, None] < R) & (i[None, :] < d)
    old = tl.load(x + at, mask=is_x, other=0.0).to(tl.float32)
    new = scale[:, None] * acc - (scale * scale / d * inner)[:, None] * old
    tl.store(dx + at, rounded(new, dx.dtype.element_ty, UP), mask=is_x)


PROJECT_BACKWARD_TILES = {"BR": 64, "BD": 128, "BK": 64, "num_warps": 8, "num_stages": 2}


def _project_backward_triton(
    dy: Tensor, y: Tensor, rstd: Tensor, x: Tensor, projection: Projection, out: Tensor, precision: Precision
) -> Tensor:
    (J, B, T, d), k, tiles = x.shape, y.shape[3], PROJECT_BACKWARD_TILES
    grid = J * triton.cdiv(B * T, tiles["BR"]) * triton.cdiv(d, tiles["BD"])
    project_backward_kernel[(grid,)](
        out,
        dy,
        y,
        rstd,
        x,
        projection.weight,
        projection.bias,
        R=B * T,
        d=d,
        k=k,
        PRECISION=precision,
        UP=INTERPRETED,
        **tiles,
    )
    return out
