"""Fused kernels of the masked-edge engine; see kernels/README.md."""

from oakernels.constants import ablated_shares, constant_gradient, gradient_of_sums, summed_tokens
from oakernels.masked_mix import mix, mix_and_scale
from oakernels.masked_mix_backward import mix_backward
from oakernels.operands import Operands, Projection
from oakernels.projection import project, project_backward

__all__ = [
    "Operands",
    "Projection",
    "ablated_shares",
    "constant_gradient",
    "gradient_of_sums",
    "mix",
    "mix_and_scale",
    "mix_backward",
    "project",
    "project_backward",
    "summed_tokens",
]
