"""What the ops share: which backend runs, and in which precision.

Symbols: B rows, T ablatable tokens, J destinations, S sources, d model width, M masks.
"""

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, TypeVar

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor
from triton.runtime.errors import OutOfResources  # type: ignore[import-untyped]

Backend = Literal["auto", "triton", "eager"]
Precision = Literal["ieee", "tf32"]
Result = TypeVar("Result")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Kernels run on CPU tensors in Triton's interpreter. It is read once, here: kernels are decorated by it."""

_fastest: dict[tuple[object, ...], str] = {}


def run(
    backend: Backend, key: tuple[object, ...], target: Tensor, candidates: dict[str, Callable[[Tensor], Result]]
) -> Result:
    """Call the candidate that `backend` names on target, which it writes to or adds to.

    With "auto" that is "eager" on CPU, and on CUDA the fastest one measured: the first call for a key (op, shapes,
    dtypes) times every candidate on a scratch target and remembers the winner, so that no kernel runs where it does
    not pay. While a CUDA graph is captured nothing can be timed, and an unmeasured key takes "eager".

    Raises:
        ValueError: an unknown backend, or "triton" where there is no kernel: CPU tensors outside the interpreter, and
            other dtypes than fp32 and bf16.
    """
    has_kernel = (target.is_cuda or INTERPRETED) and target.dtype in (torch.float32, torch.bfloat16)
    if backend not in ("auto", "triton", "eager"):
        raise ValueError(f"backend {backend!r}; allowed: auto, triton, eager")
    if backend == "triton" and not has_kernel:
        raise ValueError(
            f"backend 'triton' for {target.dtype} on {target.device}; "
            "allowed: fp32 and bf16, on CUDA or with TRITON_INTERPRET=1"
        )
    if backend != "auto":
        return candidates[backend](target)
    if not (target.is_cuda and has_kernel):
        return candidates["eager"](target)
    key = (target.device, target.dtype, *key)
    if key not in _fastest and not torch.cuda.is_current_stream_capturing():
        scratch = torch.zeros_like(target)  # some candidates add to it
        times = {name: _milliseconds(call, scratch) for name, call in candidates.items()}
        _fastest[key] = min(times, key=lambda name: times[name])
    return candidates[_fastest.get(key, "eager")](target)


def _milliseconds(call: Callable[[Tensor], object], scratch: Tensor, repeats: int = 5) -> float:
    """Median time of a call on the device after one to compile; infinite if it needs more than the device has."""
    try:
        call(scratch)
    except (OutOfResources, torch.OutOfMemoryError):
        return math.inf
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call(scratch)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[repeats // 2]


@contextmanager
def matmul_precision(precision: Precision) -> Iterator[None]:
    """Let cuBLAS round fp32 operands to TF32, or not, within this block."""
    if precision not in ("ieee", "tf32"):
        raise ValueError(f"precision {precision!r}; allowed: ieee, tf32")
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums over many terms are kept in: fp32, or fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)


def in_one_batch(x: Tensor) -> bool:
    """Whether eager runs all masks as one batched GEMM: always on CUDA; on CPU not in bf16.

    There it took twice the time of one GEMM per mask at S 100, J 37, d 768.
    """
    return x.is_cuda or x.dtype != torch.bfloat16


@triton.jit
def rounded(x, dtype: tl.constexpr, UP: tl.constexpr):  # type: ignore[no-untyped-def]
    """fp32 x in the dtype that it is stored in, to nearest even as a GPU does; the interpreter truncates to bf16."""
    if UP and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        x = (bits + 0x7FFF + ((bits >> 16) & 1)).to(tl.float32, bitcast=True)
    return x.to(dtype)
