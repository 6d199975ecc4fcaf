from functools import cache

import pytest
import torch
from kernel_cases import (
    ARITHMETIC,
    BACKENDS,
    CASES,
    DEVICE,
    Problem,
    assert_rivals,
    brute_force_constants,
    brute_force_mix,
    brute_force_norm,
    brute_force_read,
    error,
    poisoned,  # noqa: F401 - a fixture for every test
)
from masked_autograd import input_gradient, masked_read
from oakernels import Projection, mix, mix_and_scale, mix_backward, project, project_backward
from oakernels.projection import _scaled

EPS = 1e-2  # large enough to matter
NAMES = ("y", "d_base", "d_masks", "d_delta", "d_constants")


def gradient_of(p: Problem, dtype: torch.dtype) -> torch.Tensor:
    """Some dy [J, B, T, k], the same for all dtypes up to rounding."""
    shape = (p.masks.shape[1], *p.delta.shape[1:3], p.weight.shape[2])
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(DEVICE, dtype)


def by_brute_force(p: Problem, dy: torch.Tensor, eps: float | None = EPS) -> list[torch.Tensor]:
    p, dy = p.double(), dy.double().cpu()
    operands = [x.requires_grad_() for x in (p.base, p.masks, p.delta)]
    y = brute_force_read(p, *operands, eps)
    gradients = torch.autograd.grad(y, operands, dy)
    return [
        y.detach(),
        *gradients,
        brute_force_constants(Problem(**{**vars(p), "masks": p.masks.detach()}), true_input_gradient(p, dy, eps)),
    ]


def true_input_gradient(p: Problem, dy: torch.Tensor, eps: float | None = EPS) -> torch.Tensor:
    """dx [J, B, T, d] by autograd through normalise-then-project."""
    x = brute_force_mix(p.base.detach(), p.masks.detach(), p.delta.detach()).requires_grad_()
    y = torch.einsum("jbtd,jdk->jbtk", brute_force_norm(x, eps), p.weight)
    return torch.autograd.grad(y, x, dy)[0]


@cache
def solved(case: str, dtype: torch.dtype) -> tuple[Problem, torch.Tensor, list[torch.Tensor]]:
    """The case in a dtype, its dy, and the answers in float64."""
    p = CASES[case].to(dtype)
    dy = gradient_of(p, dtype)
    return p, dy, by_brute_force(p, dy)


def by_op(
    p: Problem,
    dy: torch.Tensor,
    backend: str,
    precision: str = "ieee",
    store_inputs: bool = False,
    eps: float | None = EPS,
) -> list[torch.Tensor]:
    operands = [x.detach().clone().requires_grad_() for x in (p.base, p.masks, p.delta, p.constants)]
    base, masks, delta, constants = operands
    projection, how = Projection(p.weight, p.bias, eps), {"backend": backend, "precision": precision}
    y = masked_read(base, masks, delta, projection, constants, store_inputs=store_inputs, **how)
    return [y, *torch.autograd.grad(y, operands, dy)]


@pytest.mark.parametrize("store_inputs", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_eager_equals_brute_force_in_double(case: str, store_inputs: bool) -> None:
    p, dy, truths = solved(case, torch.float64)
    for name, value, truth in zip(NAMES, by_op(p, dy, "eager", store_inputs=store_inputs), truths, strict=True):
        assert error(value, truth) < 1e-12, name


@pytest.mark.parametrize("store_inputs", [False, True])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("dtype", "precision"), ARITHMETIC)
@pytest.mark.parametrize("backend", BACKENDS)
def test_error_does_not_exceed_that_of_eager(
    backend: str, dtype: torch.dtype, precision: str, case: str, store_inputs: bool
) -> None:
    p, dy, truths = solved(case, dtype)
    eager = [error(*pair) for pair in zip(by_op(p, dy, "eager", precision, store_inputs), truths, strict=True)]
    assert max(eager) < (1e-5 if (dtype, precision) == (torch.float32, "ieee") else 3e-2)
    if backend == "triton":
        values = by_op(p, dy, backend, precision, store_inputs)
        for name, value, truth, rival in zip(NAMES, values, truths, eager, strict=True):
            assert_rivals(error(value, truth), rival, dtype, precision, name)


@pytest.mark.parametrize("store_inputs", [False, True])
@pytest.mark.parametrize("case", ["shared masks", "positional", "wide"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_without_a_norm(backend: str, case: str, store_inputs: bool) -> None:
    """In double by eager, in fp32 by the kernels around it."""
    p = CASES[case].to(torch.float64 if backend == "eager" else torch.float32)
    dy = gradient_of(p, p.delta.dtype)
    found, truths = by_op(p, dy, backend, store_inputs=store_inputs, eps=None), by_brute_force(p, dy, eps=None)
    for name, value, truth in zip(NAMES, found, truths, strict=True):
        assert error(value, truth) < (1e-12 if backend == "eager" else 1e-5), name


@pytest.mark.parametrize("store_inputs", [False, True])
@pytest.mark.parametrize("case", ["shared masks", "positional"])
def test_gradcheck(case: str, store_inputs: bool) -> None:
    p = CASES[case].to(torch.float64)
    d = 4
    operands = tuple(x[..., :d].contiguous().requires_grad_() for x in (p.base, p.delta))
    masks = p.masks.requires_grad_()

    def op(base: torch.Tensor, delta: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
        projection = Projection(p.weight[:, :d].contiguous(), p.bias, EPS)
        return masked_read(base, masks, delta, projection, store_inputs=store_inputs, backend="eager")

    assert torch.autograd.gradcheck(op, (*operands, masks))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scale_and_bias_at_once(dtype: torch.dtype) -> None:
    """As a GPU does: rounded once to the outputs' dtype."""
    generator = torch.Generator().manual_seed(0)
    y, bias = (torch.randn(shape, generator=generator).to(dtype) for shape in ((3, 4, 5, 6), (3, 1, 1, 6)))
    rstd = torch.rand(3, 4, 5, 1, generator=generator)
    wanted = y.double() * rstd + bias.double()
    found = _scaled(y, rstd, bias, at_once=True)
    assert found is y
    torch.testing.assert_close(found, wanted.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES)
def test_functional_forms_without_bias(case: str, backend: str) -> None:
    """As the engine calls them: d_delta added to, dx written over x."""
    p = CASES[case].to(torch.float32)
    reference = Problem(
        **{**vars(CASES[case].to(torch.float32).double()), "bias": torch.zeros(p.bias.shape, dtype=torch.float64)}
    )
    dy = gradient_of(p, torch.float32)
    dx = true_input_gradient(reference, dy.double().cpu())
    operands, projection = p.operands(backend), Projection(p.weight, None, EPS)
    x, rstd = mix_and_scale(p.base, operands, EPS)
    y = project(x, rstd, projection)
    assert error(y, brute_force_read(reference, reference.base, reference.masks, reference.delta, EPS)) < 1e-6
    d_delta = torch.ones_like(p.delta)
    own_dx = input_gradient(dy, y, rstd, x, p.base, operands, projection)
    d_masks = mix_backward(own_dx, operands, d_delta=d_delta)
    truth = by_brute_force(reference, dy)
    assert error(d_masks, truth[2]) < 1e-5
    assert error(d_delta, truth[3] + 1) < 1e-5
    assert torch.equal(x, mix(p.base, operands))  # a stored x survives
    in_place = project_backward(dy, y, rstd, x, projection, out=x, backend=backend)
    assert in_place is x
    assert error(x, dx) < 1e-5


def test_a_weight_that_is_not_contiguous_is_refused() -> None:
    with pytest.raises(ValueError, match=r"weight .*allowed: contiguous"):
        Projection(torch.zeros(2, 5, 3).mT, None, EPS)
