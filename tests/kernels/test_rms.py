import pytest
import torch
from kernel_cases import (
    ARITHMETIC,
    BACKENDS,
    DEVICE,
    assert_rivals,
    brute_force_norm,
    error,
    poisoned,  # noqa: F401 - a fixture for every test
)
from oakernels import rms_scaled, rms_scaled_backward

EPS = 1e-2  # large enough to matter
SHAPES = [(1, 1), (2, 3, 32), (5, 507), (3, 1, 1025)]


def operands(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(len(shape))
    x, dy = torch.randn(2, *shape, generator=g, dtype=torch.float64).to(DEVICE, dtype)
    return x, dy


def by_brute_force(x: torch.Tensor, dy: torch.Tensor) -> list[torch.Tensor]:
    x = x.double().cpu().requires_grad_()
    y = brute_force_norm(x, EPS)
    return [y.detach(), (y.detach() / x.detach())[..., 0], *torch.autograd.grad(y, x, dy.double().cpu())]


def by_op(x: torch.Tensor, dy: torch.Tensor, backend: str) -> list[torch.Tensor]:
    y, rstd = rms_scaled(x, EPS, backend=backend)
    return [y, rstd, rms_scaled_backward(dy, x, rstd, backend=backend)]


@pytest.mark.parametrize("shape", SHAPES)
def test_eager_equals_brute_force_in_double(shape: tuple[int, ...]) -> None:
    given = operands(shape, torch.float64)
    for name, value, truth in zip(("y", "rstd", "dx"), by_op(*given, "eager"), by_brute_force(*given), strict=True):
        assert error(value, truth) < 1e-12, name


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "precision"), ARITHMETIC)
@pytest.mark.parametrize("backend", BACKENDS)
def test_error_does_not_exceed_that_of_eager(
    backend: str, dtype: torch.dtype, precision: str, shape: tuple[int, ...]
) -> None:
    given = operands(shape, dtype)
    truths = by_brute_force(*given)
    eager = [error(*pair) for pair in zip(by_op(*given, "eager"), truths, strict=True)]
    assert max(eager) < (1e-5 if dtype == torch.float32 else 3e-2)
    if backend == "triton":
        for value, truth, rival in zip(by_op(*given, backend), truths, eager, strict=True):
            assert_rivals(error(value, truth), rival, dtype, precision)


def test_what_is_not_contiguous_is_refused() -> None:
    x, dy = operands((4, 6), torch.float32)
    with pytest.raises(ValueError, match=r"x .*allowed: contiguous"):
        rms_scaled(x.mT, EPS)
    with pytest.raises(ValueError, match=r"rstd .*\[6\].*allowed: contiguous torch.float32 \[4\]"):
        rms_scaled_backward(dy, x, torch.ones(6))
