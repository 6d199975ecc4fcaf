"""The masked mix and read as operations of autograd, for tests to differentiate; the engine has no use for them."""

from typing import Any

import torch
from oakernels import (
    Operands,
    Projection,
    ablated_shares,
    constant_gradient,
    mix,
    mix_and_scale,
    mix_backward,
    project,
    project_backward,
)
from torch import Tensor
from torch.autograd.function import once_differentiable


def masked_mix(base: Tensor, masks: Tensor, delta: Tensor, constants: Tensor | None = None, **how: Any) -> Tensor:
    """x [J, B, T, d], differentiable in base, masks, delta and constants.

    Args:
        base: [F, Q, d].
        masks: [M, J, S].
        delta: [S, B, T, d].
        constants: [Fc, S, Qc, d], receives a gradient and is not read: the replacements are already in delta (with -)
            and base (with +), which should be detached from them.
        how: backend and precision, of `Operands`.
    """
    return _MaskedMix.apply(base, masks, delta, constants, how)


def masked_read(
    base: Tensor,
    masks: Tensor,
    delta: Tensor,
    projection: Projection,
    constants: Tensor | None = None,
    *,
    store_inputs: bool = False,
    **how: Any,
) -> Tensor:
    """y [J, B, T, k], differentiable as `masked_mix`; store_inputs: keep x for the backward pass, else mix again."""
    return _MaskedRead.apply(base, masks, delta, projection, constants, store_inputs, how)


class _MaskedMix(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, base: Tensor, masks: Tensor, delta: Tensor, constants: Tensor | None, how: dict[str, Any]
    ) -> Tensor:
        ctx.save_for_backward(masks, delta)
        ctx.shapes, ctx.how = (base.shape, _shape(constants)), how
        return mix(base, Operands(masks, delta, **how))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor | None, ...]:
        return *_mix_gradients(dx, Operands(*ctx.saved_tensors, **ctx.how), *ctx.shapes), None


class _MaskedRead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        base: Tensor,
        masks: Tensor,
        delta: Tensor,
        projection: Projection,
        constants: Tensor | None,
        store_inputs: bool,
        how: dict[str, Any],
    ) -> Tensor:
        x, rstd = mix_and_scale(base, Operands(masks, delta, **how), projection.eps)
        y = project(x, rstd, projection, precision=how.get("precision", "ieee"))
        ctx.save_for_backward(base, masks, delta, y, rstd, x if store_inputs else None)
        ctx.projection, ctx.shapes, ctx.how = projection, (base.shape, _shape(constants)), how
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        base, masks, delta, y, rstd, x = ctx.saved_tensors
        operands = Operands(masks, delta, **ctx.how)
        dx = input_gradient(dy.contiguous(), y, rstd, x, base, operands, ctx.projection)
        d_base, d_masks, d_delta, d_constants = _mix_gradients(dx, operands, *ctx.shapes)
        return d_base, d_masks, d_delta, None, d_constants, None, None


def input_gradient(
    dy: Tensor,
    y: Tensor,
    rstd: Tensor,
    x: Tensor | None,
    base: Tensor,
    operands: Operands,
    projection: Projection,
) -> Tensor:
    """dx [J, B, T, d] of a read, over an x that is mixed again, or beside a stored one."""
    how = {"backend": operands.backend, "precision": operands.precision}
    if x is None:
        x = out = mix(base, operands)
    else:
        out = torch.empty_like(x)
    return project_backward(dy, y, rstd, x, projection, out=out, **how)


def _mix_gradients(
    dx: Tensor, operands: Operands, base_shape: torch.Size, constants_shape: torch.Size | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """All gradients of a mix from dx [J, B, T, d]: of base, masks, delta and constants (None without their shape)."""
    (F, Q, _), (_, B, T, d) = base_shape, dx.shape
    dx, d_delta = dx.contiguous(), torch.empty_like(operands.delta)
    d_masks = mix_backward(dx, operands, d_delta=d_delta, add=False)
    sums = dx.sum(2, dtype=torch.promote_types(dx.dtype, torch.float32))
    d_base = (dx if Q == T else sums).sum(0).view(F, B // F, -1, d).sum(1)
    d_constants = None
    if constants_shape is not None:
        at = dx if constants_shape[2] == T else sums
        d_constants = constant_gradient(ablated_shares(operands.masks, B, constants_shape[0]), at)
    return d_base, d_masks, d_delta, d_constants


def _shape(x: Tensor | None) -> torch.Size | None:
    return None if x is None else x.shape
