"""What the ops share: which backend runs, and in which precision.

Symbols: B rows, T ablatable tokens, J destinations, S sources, d model width, M masks.
"""

import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Literal, TypeVar

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor
from triton.runtime.errors import OutOfResources  # type: ignore[import-untyped]

from oakernels.choices import Choices, size_class

Backend = Literal["auto", "triton", "eager"]
Precision = Literal["ieee", "tf32"]
Result = TypeVar("Result")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Kernels run on CPU tensors in Triton's interpreter. It is read once, here: kernels are decorated by it."""

choices = Choices()
"""What was measured, in this process or before it."""


def run(
    backend: Backend, key: tuple[object, ...], target: Tensor, candidates: dict[str, Callable[[Tensor], Result]]
) -> Result:
    """Call the candidate that `backend` names on target, which it writes to or adds to.

    With "auto" that is "eager" on CPU, and on CUDA the fastest one measured: the first call for a device, op, class of
    shapes and dtype times every candidate on a scratch target, so that no kernel runs where it does not pay; `choices`
    keeps the times. While a CUDA graph is captured nothing can be timed, and what is not measured takes "eager".

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
    named = " ".join((_device_name(target.device), *map(_named, (target.dtype, *key))))
    if choices.backend(named) is None and not torch.cuda.is_current_stream_capturing():
        choices.measured(named, {name: _milliseconds(name, call, target) for name, call in candidates.items()})
    fastest = "eager" if named in _failed else choices.backend(named) or "eager"
    if fastest == "eager" or named in _ran:
        return candidates[fastest](target)
    try:  # it is compiled now, before it changes anything; this process may lack what the one that measured had
        result = candidates[fastest](target)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        _warn(error)
        _failed.add(named)
        return candidates["eager"](target)
    _ran.add(named)
    return result


@cache
def _device_name(device: torch.device) -> str:
    """The device's model, and the versions whose kernels were measured."""
    return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}, triton {triton.__version__}:"


def _named(part: object) -> str:
    """A part of a key as text, sizes by their class."""
    return "x".join(str(size_class(n)) for n in part) if isinstance(part, torch.Size) else str(part)


_warned = set[str]()
_ran, _failed = set[str](), set[str]()  # keys whose kernel has run, or can't be compiled, in this process


def _warn(error: Exception) -> None:
    """Say once why there are no kernels: no C compiler, no ptxas, an unsupported device."""
    cause = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
    if cause not in _warned:
        _warned.add(cause)
        print(f"warning: Triton's kernels can't be compiled here, going on without them: {cause}", file=sys.stderr)


def _milliseconds(name: str, call: Callable[[Tensor], object], target: Tensor, repeats: int = 5) -> float:
    """Median time of a call on the device after one to compile; infinite if it needs more than the device has, or can't
    be compiled there: that is said once, and eager goes on.
    """
    try:
        scratch = torch.zeros_like(target)  # some candidates add to it
        call(scratch)
    except (OutOfResources, torch.OutOfMemoryError):
        return math.inf
    except Exception as error:
        if name == "eager":
            raise
        _warn(error)
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


# From 2.9 on PyTorch has the precision of products as a name, and refuses to read the older flag once that was set.
_FLAG = "fp32_precision" if hasattr(torch.backends.cuda.matmul, "fp32_precision") else "allow_tf32"
_VALUES = {"ieee": "ieee", "tf32": "tf32"} if _FLAG == "fp32_precision" else {"ieee": False, "tf32": True}


def current_precision() -> Precision:
    """How this process has cuBLAS multiply fp32 operands now."""
    return "tf32" if getattr(torch.backends.cuda.matmul, _FLAG) == _VALUES["tf32"] else "ieee"


@contextmanager
def matmul_precision(precision: Precision) -> Iterator[None]:
    """Let cuBLAS round fp32 operands to TF32, or not, within this block."""
    if precision not in ("ieee", "tf32"):
        raise ValueError(f"precision {precision!r}; allowed: ieee, tf32")
    before = current_precision()
    setattr(torch.backends.cuda.matmul, _FLAG, _VALUES[precision])
    try:
        yield
    finally:
        setattr(torch.backends.cuda.matmul, _FLAG, _VALUES[before])


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums over many terms are kept in: fp32, or fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)


def in_one_batch(x: Tensor) -> bool:
    """Whether eager runs all masks as one batched GEMM: always on a GPU; on CPU not in bf16.

    There it took twice the time of one GEMM per mask at S 100, J 37, d 768.
    """
    return x.device.type != "cpu" or x.dtype != torch.bfloat16


@triton.jit
def factor(x, PRECISION: tl.constexpr, UP: tl.constexpr):  # type: ignore[no-untyped-def]
    """x as a factor of `tl.dot`: for TF32, fp32 rounded to the nearest number of 10 mantissa bits, ties away from zero.

    Tensor cores ignore the other 13 bits, so that unrounded factors would be cut off towards zero: twice the error, and
    all of one sign. The interpreter has no assembly, and no products of bf16.

    The assembly is not declared pure: else the compiler moves it behind the change to each product's layout, and no
    longer copies ahead what it loads.
    """
    if PRECISION == "tf32" and x.dtype == tl.float32:
        if UP:
            bits = x.to(tl.int32, bitcast=True)
            nearest = ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
            x = tl.where(x == x, nearest, x)
        else:
            bits = tl.inline_asm_elementwise("cvt.rna.tf32.f32 $0, $1;", "=r,r", [x], tl.int32, is_pure=False, pack=1)
            x = bits.to(tl.float32, bitcast=True)
    return x.to(tl.float32) if UP else x


@triton.jit
def rounded(x, dtype: tl.constexpr, UP: tl.constexpr):  # type: ignore[no-untyped-def]
    """fp32 x in the dtype that it is stored in, to nearest even as a GPU does; the interpreter truncates to bf16."""
    if UP and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        x = (bits + 0x7FFF + ((bits >> 16) & 1)).to(tl.float32, bitcast=True)
    return x.to(dtype)
