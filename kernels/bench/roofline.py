"""What the kernel benchmarks share: tensors, time and peak memory of a call, and the least time that it can take.

The machine's bandwidth and rate are measured in the same run: a large copy, and a square matrix product in the same
arithmetic.
"""

import argparse
import csv
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch
from oakernels import Operands, Projection
from oakernels.runtime import Backend, Precision, matmul_precision
from torch import Tensor

EPS = 1e-5
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BACKENDS: tuple[Backend, ...] = ("eager", "triton", "auto") if DEVICE.type == "cuda" else ("eager",)
ARITHMETIC: dict[str, tuple[torch.dtype, Precision]] = {
    "fp32": (torch.float32, "ieee"),
    "bf16": (torch.bfloat16, "ieee"),
}
if DEVICE.type == "cuda":
    ARITHMETIC["tf32"] = (torch.float32, "tf32")


@dataclass(frozen=True)
class Shape:
    """A layer's block: J destinations, S sources, B rows with a mask each, T tokens, d model width, k head width."""

    J: int
    S: int
    B: int
    T: int
    d: int
    k: int


GPU_SHAPES = {
    "GPT-2-small, layer 6": Shape(37, 79, 60, 20, 768, 64),
    "GPT-2-small, layer 11": Shape(37, 144, 60, 20, 768, 64),
    "Llama-8B, layer 16": Shape(49, 529, 4, 20, 4096, 128),
}
CPU_SHAPES = {"L4 H4 d128, last layer": Shape(13, 16, 60, 15, 128, 32)}


@dataclass(frozen=True)
class Case:
    """Random tensors of a shape, for all ops."""

    base: Tensor  # [B, 1, d]
    masks: Tensor  # [B, J, S]
    delta: Tensor  # [S, B, T, d]
    projection: Projection
    dx: Tensor  # [J, B, T, d]
    dy: Tensor  # [J, B, T, k]

    @classmethod
    def random(cls, shape: Shape, dtype: torch.dtype) -> "Case":
        """Normal values, and masks uniform in [0, 1]."""
        J, S, B, T, d, k = vars(shape).values()

        def normal(*size: int) -> Tensor:
            return torch.randn(size, device=DEVICE, dtype=dtype)

        masks, projection = torch.rand(B, J, S, device=DEVICE), Projection(normal(J, d, k), normal(J, k), EPS)
        return cls(normal(B, 1, d), masks, normal(S, B, T, d), projection, normal(J, B, T, d), normal(J, B, T, k))


@dataclass(frozen=True)
class Work:
    """An op on a case: what it must move and multiply at least, and a call of it, given masks and delta to multiply."""

    name: str
    elements: int  # of the working dtype read or written
    fp32_elements: int
    multiply_adds: int
    call: Callable[[Operands], object]


def seconds_and_bytes(call: Callable[[], object], repeats: int) -> tuple[float, int | None]:
    """Median time, and peak memory in bytes over what was allocated before (None on CPU).

    Two calls come first, to compile and to measure backends.
    """
    call(), call()
    if DEVICE.type == "cpu":
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        return median(times), None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return median(times), torch.cuda.max_memory_allocated() - before


def bandwidth() -> float:
    """Bytes per second of a copy, read and write counted."""
    x = torch.zeros(2**28 if DEVICE.type == "cuda" else 2**25, device=DEVICE)
    y = torch.empty_like(x)
    return 2 * x.nbytes / seconds_and_bytes(lambda: y.copy_(x), 5)[0]


def rate(dtype: torch.dtype, precision: Precision) -> float:
    """Multiply-adds per second of a large matrix product."""
    n = 8192 if DEVICE.type == "cuda" else 1024
    x = torch.randn(n, n, device=DEVICE, dtype=dtype)
    with matmul_precision(precision):
        return n**3 / seconds_and_bytes(lambda: x @ x, 5)[0]


def main(description: str, work_of: Callable[[Shape, Case], list[Work]]) -> None:
    """The command line of a benchmark: time every op, arithmetic and backend."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--shape", type=int, nargs=6, metavar=tuple("JSBTdk"), help="instead of the built-in shapes")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--csv", metavar="FILE", help="write the table there, too")
    arguments = parser.parse_args()
    shapes = GPU_SHAPES if DEVICE.type == "cuda" else CPU_SHAPES
    if arguments.shape:
        shapes = {"given": Shape(*arguments.shape)}
    copy = bandwidth()
    if DEVICE.type == "cpu":
        print("no CUDA device: the eager path on CPU, at a small shape; no peak memory")
    print(f"{DEVICE.type}, torch {torch.__version__}, {torch.get_num_threads()} threads; copy {copy / 1e9:.1f} GB/s")
    rows = []
    for arithmetic, (dtype, precision) in ARITHMETIC.items():
        peak = rate(dtype, precision)
        print(f"{arithmetic}: matrix product {2 * peak / 1e12:.3f} TFLOP/s")
        for label, shape in shapes.items():
            case = Case.random(shape, dtype)
            for work in work_of(shape, case):
                moved = work.elements * dtype.itemsize + work.fp32_elements * 4
                floor = max(moved / copy, work.multiply_adds / peak)
                for backend in BACKENDS:
                    operands = Operands(case.masks, case.delta, precision, backend)
                    seconds, memory = seconds_and_bytes(partial(work.call, operands), arguments.repeats)
                    row = {
                        "shape": label,
                        "op": work.name,
                        "arithmetic": arithmetic,
                        "backend": backend,
                        "ms": f"{seconds * 1e3:.3f}",
                        "roofline_ms": f"{floor * 1e3:.3f}",
                        "share": f"{floor / seconds:.2f}",
                        "peak_mib": "" if memory is None else f"{memory / 2**20:.0f}",
                    }
                    print("  ".join(f"{name} {value}" for name, value in row.items() if value))
                    rows.append(row)
    if arguments.csv:
        with open(arguments.csv, "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
