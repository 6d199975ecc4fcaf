"""Attention and RMS scale of a masked pass as single operations of autograd, with the kernels' own backward passes.

Only a GPU takes them: there a launch costs more than what it computes. A CPU goes on as `masked_blocks` has it, to the
same bits as ever.
"""

from typing import Any

import torch
from oakernels.attention import MAX_KEYS, Attention, attend
from oakernels.attention_backward import attend_backward
from oakernels.rms import rms_scaled, rms_scaled_backward
from oakernels.runtime import current_precision
from torch import Tensor
from torch.autograd.function import once_differentiable

from oacore.engine.buffers import Buffer
from oacore.engine.folded import Layer


def fuses(x: Tensor) -> bool:
    """Whether operations on x are fused."""
    return x.device.type != "cpu"


def fuses_attention(layer: Layer, q: Tensor, k: Tensor) -> bool:
    """Whether attention of q [H, B, q, k] over k [KV, B, t, k] is one: with all heads, and keys that fit one tile."""
    return fuses(q) and isinstance(layer.heads, slice) and k.shape[2] < MAX_KEYS


def fused_attention(layer: Layer, buffer: Buffer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """z [H, B, q, k] of q [H, B, q, k] and of k and v [KV, B, t, k], which follow the clean first token's."""
    block, rows = layer.folded.block, buffer.rows
    keys, values = rows.prompts.bos[layer.number]
    given = Attention(
        keys.contiguous(),
        values.contiguous(),
        rows.first,
        buffer.hidden(block.window),
        block.attention_scale,
        block.attention_softcap,
        current_precision(),
    )
    z: Tensor = _Attention.apply(q, k, v, given)
    return z


def fused_rms_scale(x: Tensor, eps: float) -> Tensor:
    """x [..., d] times (mean x^2 + eps)^-1/2."""
    y: Tensor = _RmsScale.apply(x, eps)
    return y


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, given: Attention) -> Tensor:
        z, kept = attend(q, k, v, given)
        ctx.save_for_backward(q, k, v, *kept)
        ctx.given = given
        return z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dz: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *kept = ctx.saved_tensors
        return *attend_backward(dz, q, k, v, ctx.given, tuple(kept)), None


class _RmsScale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> Tensor:
        y, rstd = rms_scaled(x, eps)
        ctx.save_for_backward(x, rstd)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return rms_scaled_backward(dy.contiguous(), *ctx.saved_tensors), None
