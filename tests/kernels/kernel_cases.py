"""Problems for the kernel tests, their answers by brute force in float64, and the rule by which a kernel passes."""

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from oakernels import Operands
from oakernels.runtime import INTERPRETED
from poison import poisoned_memory
from torch import Tensor

DEVICE = torch.device("cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu")
BACKENDS = ("eager", "triton") if DEVICE.type == "cuda" or INTERPRETED else ("eager",)
"""Without a GPU the kernels run in Triton's interpreter, in a process of their own: test_compile.py starts it."""

ARITHMETIC = [
    (torch.float32, "ieee"),
    (torch.bfloat16, "ieee"),
    *([(torch.float32, "tf32")] if DEVICE.type == "cuda" else []),
]
"""(dtype, precision); on CPU, TF32 is no other than fp32."""


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """An element that no kernel writes shows: see poison.py."""
    with poisoned_memory():
        yield


@dataclass(frozen=True)
class Problem:
    """What masked mixes and reads take; symbols as in oakernels.operands."""

    base: Tensor  # [F, Q, d]
    masks: Tensor  # [M, J, S]
    delta: Tensor  # [S, B, T, d]
    constants: Tensor  # [Fc, S, Qc, d]
    weight: Tensor  # [J, d, k]
    bias: Tensor  # [J, k]

    def to(self, dtype: torch.dtype) -> "Problem":
        """A copy on the test device; masks stay in fp32 under bf16, as in the engine."""
        moved = {
            name: getattr(self, name).to(DEVICE, dtype, copy=True)
            for name in ("base", "delta", "constants", "weight", "bias")
        }
        masks = self.masks.to(DEVICE, torch.promote_types(dtype, torch.float32), copy=True)
        return Problem(**moved, masks=masks)

    def operands(self, backend: str = "auto", precision: str = "ieee") -> Operands:
        """The factors of the mix."""
        return Operands(self.masks, self.delta, precision, backend)

    def double(self) -> "Problem":
        """A copy of what the operands are after rounding, for the reference to start from."""
        return Problem(**{name: value.detach().double().cpu().clone() for name, value in vars(self).items()})


def problem(
    J: int, S: int, B: int, T: int, d: int, k: int = 5, M: int = 1, F: int = 1, Q: int = 1, Fc: int = 1, Qc: int = 1
) -> Problem:
    """Random operands: a third of the mask entries are 0, a third 1, the rest between.

    Some of these are close to the threshold of 1e-3.
    """
    g = torch.Generator().manual_seed(J * 1000 + S * 100 + B * 10 + T)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    masks = (torch.rand(M, J, S, generator=g, dtype=torch.float64) * 3 - 1).clamp(0, 1)
    masks[:, -1, -1], masks[:, 0, 0] = 2e-3, 5e-4
    return Problem(
        base=normal(F, Q, d),
        masks=masks,
        delta=normal(S, B, T, d),
        constants=normal(Fc, S, Qc, d),
        weight=normal(J, d, k) / d**0.5,
        bias=normal(J, k),
    )


CASES = {
    "one of each": problem(1, 1, 1, 1, 16),
    "own masks": problem(13, 53, 2, 3, 128, k=32, M=2),
    "shared masks": problem(7, 9, 6, 2, 37, M=2, F=3, Fc=6, Q=2),
    "masks shared over fits": problem(3, 11, 6, 4, 24, M=3, F=6, Fc=2, Qc=4),
    "fits and masks that straddle": problem(5, 6, 12, 2, 20, M=4, F=2, Fc=6, Qc=1),
    "many sources": problem(3, 255, 1, 2, 20, k=7),
    "wide": problem(2, 3, 1, 2, 507, k=37, Q=2, Qc=2),
    "many destinations": problem(66, 5, 2, 1, 33, k=65, M=2),
    "many tokens": problem(6, 10, 3, 17, 37, M=3),
    "positional": problem(4, 5, 6, 3, 40, M=2, F=6, Q=3, Fc=3, Qc=3),
}


def brute_force_mix(base: Tensor, masks: Tensor, delta: Tensor) -> Tensor:
    """x [J, B, T, d] from its definition, one entry of [J, B, T] at a time."""
    (_, B, T, d), J = delta.shape, masks.shape[1]
    x = [torch.zeros(d, dtype=torch.float64)] * (J * B * T)
    for j in range(J):
        for b in range(B):
            m = masks[b // (B // len(masks)), j]
            for t in range(T):
                r = base[b // (B // len(base)), t if base.shape[1] > 1 else 0]
                x[(j * B + b) * T + t] = r + m @ delta[:, b, t]
    return torch.stack(x).view(J, B, T, d)


def brute_force_norm(x: Tensor, eps: float | None) -> Tensor:
    """The RMS norm of x [..., d]; without an eps, x."""
    return x if eps is None else x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def brute_force_read(p: Problem, base: Tensor, masks: Tensor, delta: Tensor, eps: float | None) -> Tensor:
    """y [J, B, T, k] as the models compute it: normalise first, project after."""
    normed = brute_force_norm(brute_force_mix(base, masks, delta), eps)
    return torch.stack([normed[j] @ p.weight[j] + p.bias[j] for j in range(len(normed))])


def brute_force_constants(p: Problem, dx: Tensor) -> Tensor:
    """The constants' gradient [Fc, S, Qc, d], an entry of [J, B, T] at a time from its definition."""
    gradient = torch.zeros_like(p.constants)
    J, B, T, _ = dx.shape
    Fc, _, Qc, _ = p.constants.shape
    for b in range(B):
        for j in range(J):
            m = p.masks[b // (B // len(p.masks)), j]
            shares = torch.where(m < 1e-3, 1 - m, 0)
            for t in range(T):
                gradient[b // (B // Fc), :, t if Qc > 1 else 0] += shares[:, None] * dx[j, b, t]
    return gradient


def error(value: Tensor, truth: Tensor) -> float:
    """|value - truth| / |truth|, Frobenius; shapes must agree and nothing may be NaN."""
    assert value.shape == truth.shape, f"shape {list(value.shape)}, expected {list(truth.shape)}"
    value = value.detach().double().cpu()
    difference = value - truth
    worst = difference.abs().flatten().argsort(descending=True)[:5].tolist()
    report = [f"[{i}] {value.flatten()[i]:.6g} for {truth.flatten()[i]:.6g}" for i in worst]
    assert difference.isfinite().all(), (
        f"{value.isnan().sum()} NaN, {value.isinf().sum()} infinite of {list(value.shape)}: {report}"
    )
    return float(difference.norm() / truth.norm().clamp_min(1e-30))


def assert_rivals(kernel: float, eager: float, dtype: torch.dtype, precision: str = "ieee", what: str = "") -> None:
    """The kernel's error must not exceed eager's own in the same dtype, + 1e-6.

    In bf16 and TF32 twice that is allowed: kernel and BLAS round different intermediate results (masks, sums of more
    than 64 destinations).
    """
    factor = 2 if dtype == torch.bfloat16 or precision == "tf32" else 1
    assert kernel <= factor * eager + 1e-6, f"{what}: error {kernel:.3g}, eager's {eager:.3g}"
