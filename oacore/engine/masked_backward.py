"""A masked pass, backward: gradients of sources accumulate in the buffers, those of masks edge by edge.

Symbols: as in masked_pass.py.
"""

import torch
from oakernels.constants import constant_gradient
from oakernels.masked_mix_backward import mix_backward
from oakernels.operands import Operands
from oakernels.projection import project_backward
from torch import Tensor

from oacore.engine.buffers import Buffer
from oacore.engine.folded import Layer
from oacore.engine.masked_pass import BlockTape, Forward


class Backward:
    """The backward pass of a forward pass, whose buffers and tapes it uses up.

    Args:
        masks: [M, J, S] of the whole graph.
        constants: also the constants' gradient.

    Raises:
        ValueError: replacements that belong to prompts are data and have no gradient.
    """

    def __init__(self, forward: Forward, masks: Tensor, *, constants: bool):
        setup, destinations = forward.setup, forward.setup.plan.destinations
        if constants and not setup.rows.in_runs:
            raise ValueError("replacements with an owner are data: only constants have a gradient")
        self.setup, self.forward, self.graph_masks = setup, forward, masks
        self.d_masks = torch.zeros_like(forward.masks)
        self.d_constants: Tensor | None = None
        if constants:
            self.d_constants = torch.zeros_like(forward.replacement, dtype=masks.dtype)
            read = masks if destinations is None else masks[:, destinations]
            no_edge = setup.no_edge if destinations is None else setup.no_edge[destinations]
            self.edge_masks = read.masked_fill(no_edge, 1.0)

    def run(self, gradient: Tensor) -> tuple[Tensor, Tensor | None]:
        """Gradients of masks [M, J, S] and constants [F, S, Q, d] from that of the residual [B, d]."""
        plan, every, last = self.setup.plan, self.forward.every, self.forward.last
        n_rows = self.d_masks.shape[1]
        self._mix(gradient[None, :, None].contiguous(), slice(n_rows - 1, n_rows), plan.n_sources, last)
        *inner, final = plan.layers
        self._block(final, self.forward.blocks.pop(), last)
        last.hand_back(every)
        for layer in reversed(inner):
            self._block(layer, self.forward.blocks.pop(), every)
        if plan.sources is None or plan.destinations is None:
            return self.d_masks.to(self.graph_masks.dtype), self.d_constants
        full = torch.zeros_like(self.graph_masks)
        full[:, plan.destinations[:, None], plan.sources] = self.d_masks.to(full.dtype)
        return full, self.d_constants

    def _block(self, layer: Layer, tape: BlockTape, buffer: Buffer) -> None:
        d_mlp = None if tape.mlp is None else self._mlp(layer, tape.mlp, buffer)
        tape.mlp = None
        if tape.written is not None:
            self._heads(layer, tape, tape.written, d_mlp, buffer)

    def _mlp(self, layer: Layer, mlp: tuple[Tensor, Tensor], buffer: Buffer) -> Tensor | None:
        """Backward of the MLP; returns dx [1, B, q, d] where the sources before its block are still to get it."""
        n, m, parallel = layer.first_source, layer.mlp_source, self.setup.model.parallel
        x, out = mlp
        dx = torch.autograd.grad(out, x, buffer.gradient()[m])[0][None]
        if buffer is self.forward.last or not layer.n_heads:
            self._mix(dx, layer.mlp, n if parallel else m, buffer)
            return None
        if not parallel:
            self._mix_of(dx, layer.mlp, slice(n, m), buffer)
        return dx

    def _heads(self, layer: Layer, tape: BlockTape, written: Tensor, d_mlp: Tensor | None, buffer: Buffer) -> None:
        """Backward of attention and its reads, and of the MLP's from the same sources where d_mlp is given."""
        n, d_written = layer.first_source, buffer.gradient()[layer.first_source : layer.mlp_source]
        if layer.folded.block.attention_post_norm is None:
            d_written = torch.bmm(d_written.flatten(1, 2), layer.write.transpose(1, 2)).unflatten(1, written.shape[1:3])
        d_reads = torch.autograd.grad(written, [read.y for read in tape.reads], d_written)
        tape.written = None
        for read, dy in zip(tape.reads, d_reads, strict=True):
            x = read.inputs
            if x is None:
                x = self.forward.mix(tape.base, read.rows, slice(n), read.buffer)
            own, precision = x[: len(read.y)], self.setup.precision
            project_backward(
                dy.contiguous(), read.y.detach(), read.scale, own, read.projection, out=own, precision=precision
            )
            if d_mlp is not None and len(x) > len(own):  # the MLP's row came along
                x[-1:], d_mlp = d_mlp, None
            self._mix(x, read.rows, n, read.buffer)
        if d_mlp is not None:
            self._mix(d_mlp, layer.mlp, n, buffer)

    def _mix(self, dx: Tensor, rows: slice, n: int, buffer: Buffer) -> None:
        """Backward of a mix of the first n sources, from dx [J, B, q, d], with the constants' gradient.

        That goes through the ablated edges of all that these destinations read, left out by the plan or not.
        """
        sums = self._mix_of(dx, rows, slice(n), buffer)
        if self.d_constants is not None:
            where = buffer.extended(dx) if sums is None else sums
            self.d_constants += constant_gradient(self.edge_masks[:, rows], where, len(self.d_constants))

    def _mix_of(self, dx: Tensor, rows: slice, sources: slice, buffer: Buffer) -> Tensor | None:
        """Backward of a mix but for constants; returns dx summed over positions [J, B, d] if they have one for all."""
        token_sums = self.d_constants is not None and self.d_constants.shape[2] == 1
        masks = self.forward.masks[:, rows, sources]
        operands = Operands(masks, buffer.delta[sources], self.setup.precision)
        d_masks, sums = mix_backward(dx, operands, d_delta=buffer.gradient()[sources], token_sums=token_sums)
        if self.setup.contrast is not None:
            contrast = buffer.restricted(self.setup.contrast[sources])
            d_masks, _ = mix_backward(dx, Operands(masks, contrast), d_delta=torch.zeros_like(contrast))
        self.d_masks[:, rows, sources] += d_masks
        return sums
