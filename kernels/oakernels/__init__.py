"""Fused kernels of the masked-edge engine; see kernels/README.md."""

from oakernels.masked_mix import ABLATED, base_gradient, constant_gradient, masked_mix, mix, mix_and_scale, mix_backward
from oakernels.masked_read import masked_read, project, project_backward, read, read_backward

__all__ = [
    "ABLATED",
    "base_gradient",
    "constant_gradient",
    "masked_mix",
    "masked_read",
    "mix",
    "mix_and_scale",
    "mix_backward",
    "project",
    "project_backward",
    "read",
    "read_backward",
]
