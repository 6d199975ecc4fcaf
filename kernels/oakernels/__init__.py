"""Fused kernels of the masked-edge engine; see kernels/README.md."""

from oakernels.attention import Attention, attend
from oakernels.attention_backward import attend_backward
from oakernels.constants import ablated_shares, constant_gradient, gradient_of_sums, summed_tokens
from oakernels.masked_mix import mix, mix_and_scale
from oakernels.masked_mix_backward import mix_backward
from oakernels.operands import Operands, Projection
from oakernels.projection import project, project_backward
from oakernels.rms import rms_scaled, rms_scaled_backward

__all__ = [
    "Attention",
    "Operands",
    "Projection",
    "ablated_shares",
    "attend",
    "attend_backward",
    "constant_gradient",
    "gradient_of_sums",
    "mix",
    "mix_and_scale",
    "mix_backward",
    "project",
    "project_backward",
    "rms_scaled",
    "rms_scaled_backward",
    "summed_tokens",
]
