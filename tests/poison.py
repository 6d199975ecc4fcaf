"""Uninitialised memory that shows: every buffer that torch allocates without filling it holds NaN, and no product may
read one.

A product that reads rows it should not can be right on one machine and wrong on another: on AMX, torch's batched bf16
product lets a NaN row of its left operand spoil rows that have nothing to do with it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

PRODUCTS = {"mm", "bmm", "addmm", "baddbmm", "addbmm", "mv", "addmv", "dot"}  # of torch.ops.aten; in place with a _
PRODUCTS.add("_scaled_dot_product_flash_attention_for_cpu")


class FiniteProducts(TorchDispatchMode):
    """AssertionError if an operand of a matrix product is not finite; counts the products."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function.overloadpacket.__name__.removesuffix("_") in PRODUCTS:
            self.count += 1
            unread = (kwargs or {}).get("beta", 1) == 0  # the first operand, whatever it holds
            for place, operand in list(enumerate(args))[unread:]:
                if isinstance(operand, torch.Tensor) and not operand.isfinite().all():
                    bad = int((~operand.isfinite()).sum())
                    raise AssertionError(
                        f"{function}: operand {place} {list(operand.shape)} has {bad} elements that are not finite"
                    )
        return function(*args, **(kwargs or {}))


@contextmanager
def poisoned_memory() -> Iterator[FiniteProducts]:
    """Within this block memory is poisoned, and products are watched."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # cuBLAS without a workspace setting would raise otherwise
    assert torch.utils.deterministic.fill_uninitialized_memory
    try:
        with FiniteProducts() as products:
            yield products
    finally:
        torch.use_deterministic_algorithms(before)
