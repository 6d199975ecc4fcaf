"""Constants of every source of the residual graph, where it lives."""

from typing import NamedTuple

import torch
from torch import Tensor

from oacore.circuits.numbers import WIDEST_BLOCK
from oacore.engine.masked import Engine
from oacore.engine.statistics import Statistics
from oacore.models.weights import Model


class Constants(NamedTuple):
    """Constants of every source where it lives: heads at z, before W_O (post-norm models: where they write); Q = 1, or
    P + 1 rows of a positional table, the last for all positions from P on."""

    input: Tensor  # [F, Q, d]
    head: Tensor  # [F, L, H, Q, k or d]
    mlp: Tensor  # [F, L, Q, d]

    def repeat(self, n: int) -> "Constants":
        """One fit's constants n times."""
        return Constants(*(part.expand(n, *part.shape[1:]).contiguous() for part in self))

    def unflattened(self, values: Tensor) -> "Constants":
        """Values [F, n] of all fits as constants of these shapes, one after the other."""
        shapes = [part.shape[1:] for part in self]
        parts = values.split([shape.numel() for shape in shapes], 1)
        return Constants(*(part.unflatten(1, shape) for part, shape in zip(parts, shapes, strict=True)))

    def blocks(self) -> list[int]:
        """Widths of the vectors that a fit's flattened constants consist of, in parts of at most `WIDEST_BLOCK`; none
        of constants by position, whose moments would take that many times the memory.
        """
        if self.input.shape[1] > 1:
            return []
        vectors = [width for part in self for width in [part.shape[-1]] * part[0].shape[:-1].numel()]
        return [min(WIDEST_BLOCK, width - begin) for width in vectors for begin in range(0, width, WIDEST_BLOCK)]

    def writes(self, engine: Engine, n_tokens: int) -> Tensor:
        """What they write to the stream [F, S, Q or t, d]; differentiable."""
        heads = self.head
        if not engine.model.post_norm:
            # In the weights' dtype, as the model itself writes; fp32 copies of all W_O would stay in the graph.
            by_layer = heads.to(engine.model.dtype).unbind(1)
            written = [_through(z, block.W_O) for z, block in zip(by_layer, engine.model.blocks, strict=True)]
            heads = torch.stack(written, 1).to(heads.dtype)
        both = torch.cat((heads, self.mlp[:, :, None]), 2).flatten(1, 2)  # [F, L (H + 1), Q, d]
        table = torch.cat((self.input[:, None], both), 1)
        if table.shape[2] == 1:
            return table
        return table[:, :, torch.arange(1, n_tokens + 1, device=table.device).clamp(max=table.shape[2] - 1)]


def _through(z: Tensor, W_O: Tensor) -> Tensor:
    """z [F, H, Q, k] after W_O [H, k, d]. On a CPU fit by fit: for several at once W_O is copied, for one it is read
    where the mapped file has it, and products round by where their operands lie. A fit's bits must not depend on
    what is fitted beside it.
    """
    return torch.stack([of_fit @ W_O for of_fit in z]) if z.device.type == "cpu" else z @ W_O


def constant_scales(model: Model, statistics: Statistics) -> Constants:
    """Root mean square standard deviation of every source, the unit of the constants' learning rate, shaped to
    broadcast.

    Where heads have their constants in the stream (post-norms), a z of that scale is sent through the norm of W_O's
    rows.
    """
    rms = {name: part.float().square().mean(-1).sqrt() for name, part in statistics.std.items()}
    head = rms["head"]  # [L, H]
    if model.post_norm:
        head = head * torch.stack(
            [block.W_O.float().square().sum((1, 2)).div(model.d_model).sqrt() for block in model.blocks]
        )
    return Constants(rms["input"].reshape(1, 1, 1), head[None, :, :, None, None], rms["mlp"][None, :, None, None])
