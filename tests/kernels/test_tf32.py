"""Factors of TF32 products are rounded to the nearest TF32 number, not cut off towards zero."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from kernel_cases import BACKENDS, DEVICE, Problem, problem
from oakernels import Attention, Projection, attend, attend_backward, mix_and_scale, mix_backward, project_backward
from oakernels.runtime import INTERPRETED, factor
from torch import Tensor

pytestmark = pytest.mark.skipif("triton" not in BACKENDS, reason="needs a GPU, or Triton's interpreter")


@triton.jit
def factor_kernel(y, x, n, BLOCK: tl.constexpr, PRECISION: tl.constexpr, UP: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, factor(tl.load(x + i, mask=i < n), PRECISION, UP), mask=i < n)


def factors(x: Tensor, precision: str) -> Tensor:
    y = torch.empty_like(x)
    factor_kernel[(triton.cdiv(x.numel(), 1024),)](y, x, x.numel(), BLOCK=1024, PRECISION=precision, UP=INTERPRETED)
    return y


def nearest(x: Tensor) -> Tensor:
    """The nearest number of 11 significant bits, of two equally near ones the larger in size, by exact arithmetic."""
    wide = x.double().cpu().numpy()
    exponent = np.maximum(np.frexp(wide)[1], -125) - 11  # below 2^-126 the spacing does not shrink any more
    with np.errstate(invalid="ignore"):
        value = np.copysign(np.floor(np.ldexp(np.abs(wide), -exponent) + 0.5), wide)
    value = np.where(np.isfinite(wide), np.ldexp(value, exponent), wide)
    return torch.from_numpy(value).float().to(x.device)


def every_kind() -> Tensor:
    """Numbers of all exponents and signs with all kinds of bits to round, infinities, and zeros of both signs."""
    high = torch.randint(-(2**18), 2**18, (4096, 1), generator=torch.Generator().manual_seed(0)) * 2**13
    low = torch.tensor([0, 1, 0xFFF, 0x1000, 0x1001, 0x1FFF])
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, 1.0, torch.finfo(torch.float32).max, 1e-45])
    values = torch.cat(((high + low).flatten().int().view(torch.float32), special))
    return values[~values.isnan()].to(DEVICE)


def test_triton_rounds_to_the_nearest_and_ties_away_from_zero() -> None:
    x = every_kind()
    assert torch.equal(factors(x, "tf32").view(torch.int32), nearest(x).view(torch.int32))
    assert torch.equal(factors(x, "ieee").view(torch.int32), x.view(torch.int32))


@pytest.mark.parametrize("bits", [0x7FFFFFFF, 0x7FC00000, -1, 0x7F800001])
def test_triton_keeps_what_is_not_a_number(bits: int) -> None:
    """0x7FFFFFFF is what NVIDIA's arithmetic makes; adding to its bits alone would make it -0."""
    x = torch.tensor([bits], dtype=torch.int32, device=DEVICE).view(torch.float32)
    assert factors(x, "tf32").isnan().all()


def mixed(p: Problem, precision: str) -> tuple[Tensor, ...]:
    return mix_and_scale(p.base, p.operands("triton", precision), 1e-5)


def mixed_backward(p: Problem, precision: str) -> tuple[Tensor, ...]:
    J, d_delta = p.masks.shape[1], torch.zeros_like(p.delta)
    dx = p.weight.flatten()[: J * d_delta[0].numel()].view(J, *d_delta.shape[1:])
    d_masks = mix_backward(dx, p.operands("triton", precision), d_delta=d_delta)
    return d_delta, d_masks


def projected_backward(p: Problem, precision: str) -> tuple[Tensor, ...]:
    J, (_, B, T, d), k = p.masks.shape[1], p.delta.shape, p.weight.shape[2]
    dy = p.delta.flatten()[: J * B * T * k].view(J, B, T, k)
    y, ones = (
        torch.zeros_like(dy),
        torch.ones(J, B, T, device=DEVICE),
    )  # y = 0: the norm's part, which is no product, is 0
    projection, out = Projection(p.weight, None, 1e-5), torch.empty(J, B, T, d, device=DEVICE)
    return (
        project_backward(
            dy, y, ones, torch.zeros_like(out), projection, out=out, backend="triton", precision=precision
        ),
    )


def heads(p: Problem, precision: str) -> tuple[tuple[Tensor, ...], Attention]:
    """q, k and v of two heads, and what goes with them."""
    q, k, v, clean = p.delta.flatten()[: 4 * 240].view(4, 2, 3, 5, 8)
    keys, values = clean.flatten()[:32].view(2, 1, 2, 8)
    hidden = torch.ones(5, 6, dtype=torch.bool, device=DEVICE).triu(2)
    first = torch.zeros(3, dtype=torch.int64, device=DEVICE)
    return (q, k, v), Attention(keys, values, first, hidden, 0.5, None, precision, "triton")


def attended(p: Problem, precision: str) -> tuple[Tensor, ...]:
    operands, given = heads(p, precision)
    return attend(*operands, given)[:1]


def attended_backward(p: Problem, precision: str) -> tuple[Tensor, ...]:
    operands, given = heads(p, precision)
    return attend_backward(p.weight.flatten()[:240].view(2, 3, 5, 8), *operands, given, ())


@pytest.mark.parametrize("op", [mixed, mixed_backward, projected_backward, attended, attended_backward])
def test_triton_rounds_all_factors_of_its_products(op: Callable[[Problem, str], tuple[Tensor, ...]]) -> None:
    """Factors that are TF32 numbers already change nothing; those that are not, do."""
    p = problem(9, 40, 2, 3, 70, k=20, M=2).to(torch.float32)
    factors_of = ("masks", "delta", "weight")
    on_grid = Problem(**{**vars(p), **{name: nearest(getattr(p, name)) for name in factors_of}})
    for value, expected, exact in zip(op(p, "tf32"), op(on_grid, "tf32"), op(p, "ieee"), strict=True):
        assert torch.equal(value, expected)
        assert not torch.equal(value, exact)
