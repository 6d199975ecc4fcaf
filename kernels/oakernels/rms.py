"""RMS scale of what an MLP reads, forward and backward:

    y = rstd * x     rstd = (mean_d x^2 + eps)^-1/2     dx = rstd * (dy - y * mean_d(dy * y))

y is made again in the backward pass, from x, which is there anyway. Symbols: R rows of d numbers, d model width.
"""

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from oakernels.operands import check_contiguous
from oakernels.runtime import INTERPRETED, Backend, accumulator_dtype, rounded, run


def rms_scaled(x: Tensor, eps: float, *, backend: Backend = "auto") -> tuple[Tensor, Tensor]:
    """x [..., d], contiguous, times its RMS scale.

    Returns:
        y [..., d] and rstd [...] in fp32 (fp64 for fp64).

    Raises:
        ValueError: an x that is not contiguous.
    """
    check_contiguous("x", x, x.shape, x.dtype)
    candidates = {
        "eager": lambda y: _rms_scaled_eager(x, eps, y),
        "triton": lambda y: _rms_scaled_triton(x, eps, y),
    }
    return run(backend, ("rms_scaled", x.shape), torch.empty_like(x), candidates)


def rms_scaled_backward(dy: Tensor, x: Tensor, rstd: Tensor, *, backend: Backend = "auto") -> Tensor:
    """Backward of `rms_scaled`.

    Args:
        dy, x: [..., d], contiguous.
        rstd: [...], as it was returned.

    Returns:
        dx [..., d].

    Raises:
        ValueError: shapes, strides or dtypes that don't fit together.
    """
    for name, tensor in (("dy", dy), ("x", x)):
        check_contiguous(name, tensor, x.shape, x.dtype)
    check_contiguous("rstd", rstd, x.shape[:-1], accumulator_dtype(x.dtype))
    candidates = {
        "eager": lambda dx: _rms_scaled_backward_eager(dy, x, rstd, dx),
        "triton": lambda dx: _rms_scaled_backward_triton(dy, x, rstd, dx),
    }
    return run(backend, ("rms_scaled_backward", x.shape), torch.empty_like(x), candidates)


def rms_scale(x: Tensor, eps: float) -> Tensor:
    """(mean_d x^2 + eps)^-1/2 of x [..., d], without a copy of x: [...], in fp32 or wider."""
    norm = torch.linalg.vector_norm(x, dim=-1, dtype=accumulator_dtype(x.dtype))
    return norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()


def _rms_scaled_eager(x: Tensor, eps: float, y: Tensor) -> tuple[Tensor, Tensor]:
    rstd = rms_scale(x, eps)
    return torch.mul(x, rstd.to(x.dtype)[..., None], out=y), rstd


def _rms_scaled_backward_eager(dy: Tensor, x: Tensor, rstd: Tensor, dx: Tensor) -> Tensor:
    scale = rstd.to(x.dtype)[..., None]
    y = torch.mul(x, scale, out=dx)
    inner = (dy.to(rstd.dtype) * y).mean(-1, keepdim=True)
    return torch.addcmul(dy, y, inner.to(x.dtype), value=-1, out=dx).mul_(scale)


# ---- Triton ----------------------------------------------------------------------------------------------------------


@triton.jit
def rms_kernel(  # type: ignore[no-untyped-def]
    y,  # [R, d]
    rstd,  # [R]
    x,  # [R, d]
    d,
    eps,
    BD: tl.constexpr,
    UP: tl.constexpr,
):
    """One program: one row."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BD)
    at = row * d + i
    value = tl.load(x + at, mask=i < d, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(value * value, 0) / d + eps)
    tl.store(y + at, rounded(value * scale, y.dtype.element_ty, UP), mask=i < d)
    tl.store(rstd + row, scale)


@triton.jit
def rms_backward_kernel(  # type: ignore[no-untyped-def]
    dx,  # [R, d]
    dy,  # [R, d]
    x,  # [R, d]
    rstd,  # [R]
    d,
    BD: tl.constexpr,
    UP: tl.constexpr,
):
    """One program: one row."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BD)
    at = row * d + i
    gradient = tl.load(dy + at, mask=i < d, other=0.0).to(tl.float32)
    scale = tl.load(rstd + row)
    value = tl.load(x + at, mask=i < d, other=0.0).to(tl.float32) * scale
    new = scale * (gradient - value * (tl.sum(gradient * value, 0) / d))
    tl.store(dx + at, rounded(new, dx.dtype.element_ty, UP), mask=i < d)


def rms_tiles(d: int) -> dict[str, int]:
    """Tile size and launch options of both kernels: a row in registers, 8 numbers a thread up to d 4096."""
    BD = triton.next_power_of_2(d)
    return {"BD": BD, "num_warps": min(max(BD // 256, 1), 16)}


def _rms_scaled_triton(x: Tensor, eps: float, y: Tensor) -> tuple[Tensor, Tensor]:
    d, rstd = x.shape[-1], x.new_empty(x.shape[:-1], dtype=torch.float32)
    rms_kernel[(rstd.numel(),)](y, rstd, x, d=d, eps=eps, UP=INTERPRETED, **rms_tiles(d))
    return y, rstd


def _rms_scaled_backward_triton(dy: Tensor, x: Tensor, rstd: Tensor, dx: Tensor) -> Tensor:
    d = x.shape[-1]
    rms_backward_kernel[(rstd.numel(),)](dx, dy, x, rstd, d=d, UP=INTERPRETED, **rms_tiles(d))
    return dx
