"""What the ops work on, checked once: the factors of a mix, and each destination's projection.

Symbols, here and in the modules of the ops: B rows, T ablatable tokens, J destinations, S sources, d model width,
k head width, M masks, F bases, Q positions at which they differ (1 or T).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from oakernels.runtime import Backend, Precision


@dataclass(frozen=True)
class Operands:
    """The two factors of a mix, and how they are multiplied.

    Args:
        masks: [M, J, S] in fp32 or delta's dtype, unit stride in S, any strides otherwise; B / M consecutive rows
            share one.
        delta: [S, B, T, d], contiguous: what each source writes minus its replacement.
        precision: of fp32 products on a GPU.
        backend: "eager" is torch, "triton" the fused kernels, "auto" see `runtime.run`.

    Raises:
        ValueError: shapes, strides or dtypes that don't fit together.
    """

    masks: Tensor
    delta: Tensor
    precision: Precision = "ieee"
    backend: Backend = "auto"

    def __post_init__(self) -> None:
        masks, delta = self.masks, self.delta
        if delta.ndim != 4 or not delta.is_contiguous():
            raise ValueError(f"delta {list(delta.shape)} of strides {delta.stride()}; allowed: contiguous [S, B, T, d]")
        S, B = delta.shape[:2]
        if masks.ndim != 3 or masks.shape[2] != S or B % masks.shape[0] or (masks.stride(2) != 1 and S > 1):
            raise ValueError(
                f"masks {list(masks.shape)} of strides {masks.stride()}; "
                f"allowed: [M, J, {S}], M dividing {B}, unit stride in S"
            )
        if masks.dtype not in (torch.float32, delta.dtype):
            raise ValueError(f"masks {masks.dtype}; allowed: torch.float32 or delta's {delta.dtype}")

    @property
    def mixed_shape(self) -> tuple[int, int, int, int]:
        """[J, B, T, d] of what is mixed, and of its gradient."""
        return self.masks.shape[1], *self.delta.shape[1:]

    @property
    def key(self) -> tuple[object, ...]:
        """What decides, beside the device, which backend is the fastest."""
        return self.masks.shape, self.delta.shape, self.delta.dtype, self.precision

    def check_base(self, base: Tensor) -> None:
        """ValueError unless base is [F, 1 or T, d] with F dividing B."""
        _, B, T, d = self.delta.shape
        if base.ndim != 3 or base.shape[1] not in (1, T) or base.shape[2] != d or B % base.shape[0]:
            raise ValueError(f"base {list(base.shape)}; allowed: [F, 1 or {T}, {d}], F dividing {B}")

    def by_mask(self, x: Tensor) -> Tensor:
        """x [n, B, T, d], contiguous, as one matrix per mask [M, n, B / M * T * d]: a view."""
        return x.view(x.shape[0], len(self.masks), -1).transpose(0, 1)

    def rows_of_masks(self) -> Iterator[slice]:
        """Mask by mask, the rows that share it."""
        rows = self.delta.shape[1] // len(self.masks)
        return (slice(m * rows, (m + 1) * rows) for m in range(len(self.masks)))


@dataclass(frozen=True)
class Projection:
    """What each destination does with its mixed input: RMS scale, if any, and a projection of its own, which gets no
    gradient.

    Args:
        weight: [J, d, k], contiguous, with the norm's weight folded in.
        bias: [J, k].
        eps: of the norm; None without one.

    Raises:
        ValueError: a weight that is not contiguous.
    """

    weight: Tensor
    bias: Tensor | None
    eps: float | None

    def __post_init__(self) -> None:
        check_contiguous("weight", self.weight, self.weight.shape, self.weight.dtype)


def check_contiguous(name: str, x: Tensor, shape: tuple[int, ...], *dtypes: torch.dtype) -> None:
    """ValueError unless x is contiguous, of this shape and of one of these dtypes."""
    if x.shape != shape or x.dtype not in dtypes or not x.is_contiguous():
        allowed = f"contiguous {' or '.join(map(str, dict.fromkeys(dtypes)))} {list(shape)}"
        raise ValueError(f"{name} {x.dtype} {list(x.shape)} of strides {x.stride()}; allowed: {allowed}")
