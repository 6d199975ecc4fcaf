from dataclasses import dataclass, replace
from functools import cache

import pytest
import torch
from kernel_cases import (
    ARITHMETIC,
    BACKENDS,
    DEVICE,
    assert_rivals,
    error,
    poisoned,  # noqa: F401 - a fixture for every test
)
from oakernels import Attention, attend, attend_backward

NAMES = ("z", "dq", "dk", "dv")


@dataclass(frozen=True)
class Heads:
    """What attention takes, and the gradient of what it gives; symbols as in oakernels.attention."""

    q: torch.Tensor  # [H, B, q, k]
    k: torch.Tensor  # [KV, B, t, k]
    v: torch.Tensor  # [KV, B, t, k]
    clean: torch.Tensor  # [2, U, KV, k] keys and values
    first: torch.Tensor  # [B]
    position: torch.Tensor  # [B, q] of the queries, the first token counted
    dz: torch.Tensor  # [H, B, q, k]
    window: int
    softcap: float | None

    def to(self, dtype: torch.dtype) -> "Heads":
        """A copy in a dtype, on the test device."""
        moved = {name: getattr(self, name).to(DEVICE, dtype) for name in ("q", "k", "v", "clean", "dz")}
        return replace(self, first=self.first.to(DEVICE), **moved)

    def double(self) -> "Heads":
        """A copy of what the operands are after rounding, for the reference to start from."""
        return replace(self, **{name: getattr(self, name).double().cpu() for name in ("q", "k", "v", "clean", "dz")})

    @property
    def scale(self) -> float:
        """Of the scores, so that they differ by a few units."""
        return 1.7 / self.q.shape[3] ** 0.5

    def sees(self, b: int, i: int) -> range:
        """The keys that a query sees."""
        here = int(self.position[b, i])
        return range(max(0, here - self.window + 1), here + 1)

    def given(self, backend: str, precision: str = "ieee") -> Attention:
        """Everything but q, k and v, as the engine gives it: the rows' queries are at the same positions, or one."""
        B, T = len(self.first), self.k.shape[2] + 1
        hidden = torch.tensor(
            [[[n not in self.sees(b, i) for n in range(T)] for i in range(self.q.shape[2])] for b in range(B)]
        )
        hidden = hidden if self.q.shape[2] == 1 else hidden[0]
        keys, values = self.clean
        return Attention(keys, values, self.first, hidden.to(DEVICE), self.scale, self.softcap, precision, backend)


def heads(
    H: int,
    KV: int,
    B: int,
    t: int,
    k: int,
    U: int = 1,
    window: int = 64,
    softcap: float | None = None,
    last: bool = False,
) -> Heads:
    """Random operands: queries at all t positions after the first, or at each row's last, which is its own."""
    g = torch.Generator().manual_seed(H * 1000 + B * 100 + t)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    position = (t - torch.arange(B) % t)[:, None] if last else torch.arange(1, t + 1).expand(B, -1)
    n = position.shape[1]
    first = torch.arange(B).flip(0) % U
    q, dz = normal(2, H, B, n, k)
    keys, values = normal(2, KV, B, t, k)
    return Heads(q, keys, values, normal(2, U, KV, k), first, position, dz, window, softcap)


CASES = {
    "one position, one head": heads(1, 1, 3, 1, 16),
    "grouped, several first tokens": heads(4, 2, 3, 5, 24, U=3),
    "window, softcap": heads(2, 2, 2, 20, 16, window=4, softcap=2.0),
    "last positions, grouped, softcap": heads(4, 2, 3, 6, 40, U=2, softcap=30.0, last=True),
    "last positions, window": heads(1, 1, 4, 18, 7, window=3, last=True),
    "as many keys as fit": heads(2, 1, 1, 63, 33),
}


def by_brute_force(p: Heads) -> list[torch.Tensor]:
    """z from its definition, query by query, and by autograd its gradients, in float64."""
    p = p.double()
    operands = q, k, v = [x.detach().requires_grad_() for x in (p.q, p.k, p.v)]
    H, B, n, _ = q.shape
    group = H // len(k)
    z = []
    for h in range(H):
        for b in range(B):
            keys, values = (
                torch.cat((clean[p.first[b], h // group][None], x[h // group, b]))
                for clean, x in zip(p.clean, (k, v), strict=True)
            )
            for i in range(n):
                seen = list(p.sees(b, i))
                scores = keys[seen] @ q[h, b, i] * p.scale
                if p.softcap is not None:
                    scores = p.softcap * torch.tanh(scores / p.softcap)
                z.append(scores.softmax(0) @ values[seen])
    found = torch.stack(z).view(q.shape)
    return [found.detach(), *torch.autograd.grad(found, operands, p.dz)]


@cache
def solved(case: str, dtype: torch.dtype) -> tuple[Heads, list[torch.Tensor]]:
    """The case in a dtype, and the answers in float64."""
    p = CASES[case].to(dtype)
    return p, by_brute_force(p)


def by_op(p: Heads, backend: str, precision: str = "ieee", *, keep: bool = True) -> list[torch.Tensor]:
    given = p.given(backend, precision)
    z, kept = attend(p.q, p.k, p.v, given)
    return [z, *attend_backward(p.dz, p.q, p.k, p.v, given, kept if keep else ())]


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_eager_equals_brute_force_in_double(case: str, keep: bool) -> None:
    """Also the backward pass that has nothing to go by but the operands, as after the kernel."""
    p, truths = solved(case, torch.float64)
    for name, value, truth in zip(NAMES, by_op(p, "eager", keep=keep), truths, strict=True):
        assert error(value, truth) < 1e-12, name


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("dtype", "precision"), ARITHMETIC)
@pytest.mark.parametrize("backend", BACKENDS)
def test_error_does_not_exceed_that_of_eager(backend: str, dtype: torch.dtype, precision: str, case: str) -> None:
    p, truths = solved(case, dtype)
    eager = [error(*pair) for pair in zip(by_op(p, "eager", precision), truths, strict=True)]
    assert max(eager) < (1e-5 if (dtype, precision) == (torch.float32, "ieee") else 3e-2)
    if backend == "triton":
        values = by_op(p, backend, precision)
        for name, value, truth, rival in zip(NAMES, values, truths, eager, strict=True):
            assert_rivals(error(value, truth), rival, dtype, precision, name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_operands_of_any_strides(backend: str) -> None:
    p = CASES["grouped, several first tokens"].to(torch.float32)
    turned = {name: getattr(p, name).transpose(0, 1).contiguous().transpose(0, 1) for name in ("q", "k", "v", "dz")}
    for value, expected in zip(by_op(replace(p, **turned), backend), by_op(p, backend), strict=True):
        assert torch.equal(value, expected)


@pytest.mark.skipif("triton" not in BACKENDS, reason="needs a GPU, or Triton's interpreter")
def test_triton_keeps_nothing_and_gives_the_same_bits_again() -> None:
    p = CASES["grouped, several first tokens"].to(torch.float32)
    assert attend(p.q, p.k, p.v, p.given("triton"))[1] == ()
    for value, again in zip(by_op(p, "triton"), by_op(p, "triton"), strict=True):
        assert torch.equal(value, again)


def test_what_does_not_fit_is_refused() -> None:
    p = CASES["grouped, several first tokens"].to(torch.float32)
    given = p.given("eager")
    with pytest.raises(ValueError, match=r"k \[2, 3, 4, 24\].*allowed: .*twice \[2, 3, 5, 24\]"):
        attend(p.q, p.k[:, :, 1:], p.v, given)
    with pytest.raises(ValueError, match=r"q \[3, 3, 5, 24\].*2 dividing H"):
        attend(p.q[1:], p.k, p.v, given)
    with pytest.raises(ValueError, match=r"dz \[4, 3, 1, 24\]; allowed: \[4, 3, 5, 24\]"):
        attend_backward(p.dz[:, :, :1], p.q, p.k, p.v, given, ())
    with pytest.raises(ValueError, match=r"hidden .*\[5, 65\].*T up to 64"):
        replace(given, hidden=torch.zeros(5, 65, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"clean_values .*allowed: contiguous"):
        replace(given, clean_values=given.clean_values.mT)
