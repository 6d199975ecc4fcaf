from functools import cache
from typing import Any

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
    error,
    poisoned,  # noqa: F401 - a fixture for every test
    problem,
)
from masked_autograd import masked_mix
from oakernels import Operands, ablated_shares, constant_gradient, masked_mix_backward, mix, mix_and_scale, mix_backward
from oakernels.constants import ABLATED, gradient_of_sums, summed_tokens
from oakernels.runtime import run

NAMES = ("x", "d_base", "d_masks", "d_delta", "d_constants")


def gradient_of(p: Problem, dtype: torch.dtype) -> torch.Tensor:
    """Some dx [J, B, T, d], the same for all dtypes up to rounding."""
    shape = (p.masks.shape[1], *p.delta.shape[1:])
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(DEVICE, dtype)


def by_brute_force(p: Problem, dx: torch.Tensor) -> list[torch.Tensor]:
    p, dx = p.double(), dx.double().cpu()
    operands = [x.requires_grad_() for x in (p.base, p.masks, p.delta)]
    x = brute_force_mix(*operands)
    gradients = torch.autograd.grad(x, operands, dx)
    return [x.detach(), *gradients, brute_force_constants(Problem(**{**vars(p), "masks": p.masks.detach()}), dx)]


@cache
def solved(case: str, dtype: torch.dtype) -> tuple[Problem, torch.Tensor, list[torch.Tensor]]:
    """The case in a dtype, its dx, and the answers in float64."""
    p = CASES[case].to(dtype)
    dx = gradient_of(p, dtype)
    return p, dx, by_brute_force(p, dx)


def by_op(p: Problem, dx: torch.Tensor, backend: str, precision: str = "ieee") -> list[torch.Tensor]:
    operands = [x.detach().clone().requires_grad_() for x in (p.base, p.masks, p.delta, p.constants)]
    base, masks, delta, constants = operands
    x = masked_mix(base, masks, delta, constants, backend=backend, precision=precision)
    return [x, *torch.autograd.grad(x, operands, dx)]


@pytest.mark.parametrize("case", CASES)
def test_eager_equals_brute_force_in_double(case: str) -> None:
    p, dx, truths = solved(case, torch.float64)
    for name, value, truth in zip(NAMES, by_op(p, dx, "eager"), truths, strict=True):
        assert error(value, truth) < 1e-13, name


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("dtype", "precision"), ARITHMETIC)
@pytest.mark.parametrize("backend", BACKENDS)
def test_error_does_not_exceed_that_of_eager(backend: str, dtype: torch.dtype, precision: str, case: str) -> None:
    p, dx, truths = solved(case, dtype)
    eager = [error(*pair) for pair in zip(by_op(p, dx, "eager", precision), truths, strict=True)]
    assert max(eager) < (1e-5 if (dtype, precision) == (torch.float32, "ieee") else 2e-2)
    if backend == "triton":
        values = by_op(p, dx, backend, precision)
        for name, value, truth, rival in zip(NAMES, values, truths, eager, strict=True):
            assert_rivals(error(value, truth), rival, dtype, precision, name)


@pytest.mark.parametrize(("M", "F", "Q"), [(4, 1, 1), (2, 2, 3), (1, 4, 1)])
def test_gradcheck(M: int, F: int, Q: int) -> None:
    p = problem(3, 5, 4, 3, 4, M=M, F=F, Q=Q).to(torch.float64)
    operands = tuple(x.requires_grad_() for x in (p.base, p.masks, p.delta))
    assert torch.autograd.gradcheck(lambda *x: masked_mix(*x, backend="eager"), operands)


@pytest.mark.parametrize("backend", BACKENDS)
def test_with_binary_masks_the_constants_get_their_true_gradient(backend: str) -> None:
    """Where no edge is partial the rule drops nothing: autograd through delta = out - r, base = sum r says the same."""
    p = problem(4, 6, 4, 2, 16, M=4, Fc=2).to(torch.float32)
    masks, out = (p.masks > 0.5).float(), p.delta
    by_row = p.constants.detach().repeat_interleave(2, 0).requires_grad_()  # [B, S, 1, d]
    delta = out - by_row.transpose(0, 1)
    x = torch.einsum("bjs,sbtd->jbtd", masks, delta) + by_row.sum(1)
    dx = gradient_of(p, torch.float32)
    (truth,) = torch.autograd.grad(x, by_row, dx)
    constants = p.constants.requires_grad_()
    mixed = masked_mix(by_row.detach().sum(1), masks, delta.detach(), constants, backend=backend)
    (value,) = torch.autograd.grad(mixed, constants, dx)
    assert error(mixed, x.detach().double().cpu()) < 1e-6
    assert error(value, truth.view(2, 2, *truth.shape[1:]).sum(1).double().cpu()) < 1e-6


def test_the_threshold_of_the_constants() -> None:
    masks = torch.tensor([[[0.0, 5e-4, ABLATED, 2e-3, 1.0]]])
    gradient = constant_gradient(ablated_shares(masks, 1, n_fits=1), torch.ones(1, 1, 1))
    assert gradient.flatten().tolist() == pytest.approx([1, 1 - 5e-4, 0, 0, 0])


@pytest.mark.parametrize("n_masks", [2, 6, 12])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_constants_gradient_of_all_destinations_at_once(n_masks: int, dtype: torch.dtype) -> None:
    """Two fits of six rows, of fewer, as many and more masks than fits: what reads give one by one, added up."""
    generator = torch.Generator().manual_seed(0)
    masks = torch.rand(n_masks, 7, 5, generator=generator).round().double()
    shares = ablated_shares(masks, 12, n_fits=2)
    dx = torch.randn(7, 12, 3, 4, generator=generator, dtype=torch.float64).to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    sums = torch.full((shares.shape[0] * shares.shape[1], 7, 4), torch.nan, dtype=wide)
    wanted = torch.zeros(2, 5, 1, 4, dtype=torch.float64)
    for rows in (slice(0, 3), slice(3, 7)):
        summed_tokens(dx[rows], len(sums), sums[:, rows])
        wanted += constant_gradient(shares[:, :, rows], dx[rows].double().sum(2))
    torch.testing.assert_close(gradient_of_sums(shares.to(wide), sums).double(), wanted, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_views_of_packed_buffers_need_no_copy(dtype: torch.dtype, backend: str) -> None:
    """A layer's block of a packed mask [M, J_all, S_all], the sources so far, results into slices of larger buffers."""
    J, S = slice(3, 10), slice(0, 13)
    p = problem(12, 16, 4, 3, 24, M=2, F=4).to(dtype)
    masks, delta, dx = p.masks[:, J, S], p.delta[S], gradient_of(p, dtype)[J]
    x = torch.full((12, 4, 3, 24), torch.nan, dtype=dtype, device=DEVICE)
    d_delta = torch.ones_like(p.delta)
    operands = Operands(masks, delta, backend=backend)
    mix(p.base, operands, out=x[J])
    d_masks = mix_backward(dx, operands, d_delta=d_delta[S])
    dense = Problem(
        **{**vars(p), "masks": masks.contiguous(), "delta": delta.contiguous(), "constants": p.constants[:, S]}
    )
    truth = by_brute_force(dense, dx)
    tolerance = 1e-6 if dtype == torch.float32 else 2e-2
    assert error(x[J], truth[0]) < tolerance
    assert error(d_masks, truth[2]) < tolerance
    assert error(d_delta[S] - 1, truth[3]) < tolerance
    assert x[:3].isnan().all() and x[10:].isnan().all() and (d_delta[13:] == 1).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gradient_that_is_not_added_to_is_not_read(dtype: torch.dtype, backend: str) -> None:
    """Uninitialised memory is NaN in these tests."""
    p = CASES["own masks"].to(dtype)
    dx, operands = gradient_of(p, dtype), p.operands(backend)
    for accumulated in {dtype, torch.float32}:
        added, new = torch.zeros_like(p.delta, dtype=accumulated), torch.empty_like(p.delta, dtype=accumulated)
        d_masks = [mix_backward(dx, operands, d_delta=added), mix_backward(dx, operands, d_delta=new, add=False)]
        torch.testing.assert_close(new, added, rtol=0, atol=0)
        torch.testing.assert_close(*d_masks, rtol=0, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_program_of_several_tiles_adds_up_its_part_of_d_masks(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    p, dx, truths = solved("own masks", torch.float32)
    monkeypatch.setattr(masked_mix_backward, "PROGRAMS", 1)
    d_masks = mix_backward(dx, p.operands(backend), d_delta=torch.zeros_like(p.delta))
    assert error(d_masks, truths[NAMES.index("d_masks")]) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_bf16_gradients_accumulate_in_fp32_if_asked(backend: str) -> None:
    """bf16 has no number between 256 and 258: there, adding 1 twice changes nothing."""
    p = problem(1, 1, 1, 1, 16).to(torch.bfloat16)
    masks, dx = torch.ones_like(p.masks), torch.ones(1, 1, 1, 16, dtype=torch.bfloat16, device=DEVICE)
    for dtype, total in ((torch.float32, 258), (torch.bfloat16, 256)):
        d_delta = torch.full_like(p.delta, 256, dtype=dtype)
        for _ in range(2):
            mix_backward(dx, Operands(masks, p.delta, backend=backend), d_delta=d_delta)
        assert (d_delta == total).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES)
def test_the_scale_of_a_mix(case: str, backend: str) -> None:
    p = CASES[case].to(torch.float32)
    x, rstd = mix_and_scale(p.base, p.operands(backend), 1e-5)
    torch.testing.assert_close(x, mix(p.base, p.operands(backend)), rtol=0, atol=0)
    assert error(rstd, (x.double().cpu().square().mean(-1) + 1e-5).rsqrt()) < 1e-6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"delta": torch.zeros(4, 3, 2, 5).transpose(1, 2)}, r"delta .*contiguous \[S, B, T, d\]"),
        ({"masks": torch.zeros(2, 2, 4)}, r"masks \[2, 2, 4\].*M dividing 3"),
        ({"masks": torch.zeros(1, 2, 8)[:, :, ::2]}, "unit stride in S"),
        ({"masks": torch.zeros(1, 2, 4, dtype=torch.bool)}, "masks torch.bool"),
        ({"base": torch.zeros(1, 3, 5)}, r"base \[1, 3, 5\]; allowed: \[F, 1 or 2, 5\]"),
        ({"out": torch.zeros(2, 3, 2, 6)[..., :5]}, r"out .* allowed: contiguous torch.float32 \[2, 3, 2, 5\]"),
        ({"backend": "cuda"}, "backend 'cuda'; allowed: auto, triton, eager"),
    ],
)
def test_operands_that_do_not_fit_are_refused(change: dict, message: str) -> None:
    def mixed(base: torch.Tensor, out: torch.Tensor | None = None, **operands: Any) -> torch.Tensor:
        return mix(base, Operands(**operands), out=out)

    good = {"base": torch.zeros(1, 1, 5), "masks": torch.zeros(1, 2, 4), "delta": torch.zeros(4, 3, 2, 5)}
    mixed(**good)
    with pytest.raises(ValueError, match=message):
        mixed(**{**good, **change})


def test_triton_is_refused_where_it_has_no_kernel() -> None:
    p = problem(1, 1, 1, 1, 16).to(torch.float64)
    with pytest.raises(ValueError, match=r"backend 'triton' for torch\.float64"):
        mix(p.base, p.operands("triton"))


@pytest.mark.skipif(DEVICE.type != "cuda", reason="no CUDA device")
def test_auto_measures_once_and_takes_the_faster() -> None:
    calls = {"eager": 0, "triton": 0}

    def candidate(name: str, size: int) -> object:
        def call(target: torch.Tensor) -> str:
            calls[name] += 1
            x = torch.zeros(size, size, device=DEVICE)
            target.add_((x @ x)[0, 0])
            return name

        return call

    target = torch.zeros(1, device=DEVICE)
    for fast, slow in (("eager", "triton"), ("triton", "eager")):
        candidates = {fast: candidate(fast, 8), slow: candidate(slow, 8192)}
        assert run("auto", ("test", fast), target, candidates) == fast
        before = calls[slow]
        assert run("auto", ("test", fast), target, candidates) == fast
        assert calls[slow] == before


def test_auto_on_cpu_is_eager() -> None:
    assert run("auto", ("test",), torch.zeros(1), {"eager": lambda _: "eager", "triton": lambda _: "triton"}) == "eager"
