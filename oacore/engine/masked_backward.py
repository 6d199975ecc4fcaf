"""A masked pass, backward: gradients of sources accumulate in the buffers, those of masks edge by edge.

Layers come in groups, from the last. What a layer's readers say goes at once to the sources of its own group, and when
a group's turn comes, its sources first gather what all later layers' readers have left in `Forward.inputs`. One group
of all layers gathers nothing and keeps nothing; groups of two read and write a sixth of the sources' gradients.

Symbols: as in masked_pass.py.
"""

from collections.abc import Iterator

import torch
from oakernels.constants import ablated_shares, constant_gradient, gradient_of_sums, summed_tokens
from oakernels.masked_mix_backward import mix_backward
from oakernels.operands import Operands
from oakernels.projection import project_backward
from oakernels.runtime import accumulator_dtype
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
        self.token_sums: Tensor | None = None
        if constants:
            self.d_constants = torch.zeros_like(forward.replacement, dtype=masks.dtype)
            read = masks if destinations is None else masks[:, destinations]
            no_edge = setup.no_edge if destinations is None else setup.no_edge[destinations]
            n_fits, n_rows = len(self.d_constants), len(setup.rows)
            self.ablated = ablated_shares(read.masked_fill(no_edge, 1.0), n_rows, n_fits)
            # Where layers come in groups, on a GPU, all destinations give it in one product. In one group, on a CPU, it
            # is added up read by read: sums in another order would not have the bits that were recorded.
            if self.d_constants.shape[2] == 1 and forward.inputs is not None:
                _, n_runs, n_read, _ = self.ablated.shape
                self.token_sums = self.d_constants.new_zeros((n_fits * n_runs, n_read, self.d_constants.shape[3]))

    def run(self, gradient: Tensor) -> tuple[Tensor, Tensor | None]:
        """Gradients of masks [M, J, S] and constants [F, S, Q, d] from that of the residual [B, d]."""
        plan, every, last = self.setup.plan, self.forward.every, self.forward.last
        n_rows, final = self.d_masks.shape[1], plan.layers[-1]
        last.open(slice(0, plan.n_sources)).zero_()
        self._mix(gradient[None, :, None].contiguous(), slice(n_rows - 1, n_rows), plan.n_sources, last)
        for sources, layers in self._groups():
            if layers[-1] is final:
                every.open(sources).zero_()
                self._block(layers.pop(), self.forward.blocks.pop(), last)
            else:
                self._gather(sources, slice(layers[-1].mlp.stop, final.kv.stop))
            last.hand_back(every)
            for layer in reversed(layers):
                self._block(layer, self.forward.blocks.pop(), every)
        if self.token_sums is not None:
            self.d_constants = gradient_of_sums(self.ablated, self.token_sums)
        if plan.sources is None or plan.destinations is None:
            return self.d_masks.to(self.graph_masks.dtype), self.d_constants
        full = torch.zeros_like(self.graph_masks)
        full[:, plan.destinations[:, None], plan.sources] = self.d_masks.to(full.dtype)
        return full, self.d_constants

    def _groups(self) -> Iterator[tuple[slice, list[Layer]]]:
        """From the last, layers whose sources get their gradient together, and these sources at every position."""
        layers, n = self.setup.plan.layers, self.setup.layers_at_once
        starts = [0, *(layer.first_source for layer in layers[1:]), layers[-1].first_source]
        for first in reversed(range(0, len(layers), n)):
            stop = min(first + n, len(layers))
            yield slice(starts[first], starts[stop]), list(layers[first:stop])

    def _gather(self, sources: slice, rows: slice) -> None:
        """Open sources with the gradient from all destinations of later layers, whose dx is kept."""
        inputs, every = self.forward.inputs, self.forward.every
        assert inputs is not None
        every.open(sources)
        self._mix_of(inputs[rows], rows, sources, every, add=False)

    def _block(self, layer: Layer, tape: BlockTape, buffer: Buffer) -> None:
        d_mlp = None if tape.mlp is None else self._mlp(layer, tape.mlp, buffer)
        tape.mlp = None
        if tape.written is not None:
            self._heads(layer, tape, tape.written, d_mlp, buffer)

    def _mlp(self, layer: Layer, mlp: tuple[Tensor, Tensor], buffer: Buffer) -> Tensor | None:
        """Backward of the MLP; returns dx [1, B, q, d] where the sources before its block are still to get it."""
        n, m, parallel = layer.first_source, layer.mlp_source, self.setup.model.parallel
        x, out = mlp
        dx = torch.autograd.grad(out, x, buffer.gradient(slice(m, m + 1))[0])[0][None]
        if buffer is self.forward.last or not layer.n_heads:
            if self.forward.inputs is not None and buffer is self.forward.every:
                self.forward.inputs[layer.mlp] = dx
            self._mix(dx, layer.mlp, n if parallel else m, buffer)
            return None
        if not parallel:
            self._mix_of(dx, layer.mlp, slice(n, m), buffer)
        return dx

    def _heads(self, layer: Layer, tape: BlockTape, written: Tensor, d_mlp: Tensor | None, buffer: Buffer) -> None:
        """Backward of attention and its reads, and of the MLP's from the same sources where d_mlp is given."""
        n, d_written = layer.first_source, buffer.gradient(slice(layer.first_source, layer.mlp_source))
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
            if d_mlp is not None:  # the MLP's row came along
                x[-1:] = d_mlp
            self._mix(x, read.rows, n, read.buffer)

    def _mix(self, dx: Tensor, rows: slice, n: int, buffer: Buffer) -> None:
        """Backward of a mix of the first n sources, from dx [J, B, q, d], for those that are open, with the constants'
        gradient.

        That goes through the ablated edges of all that these destinations read, left out by the plan or not.
        """
        if buffer.opened.start < n:
            self._mix_of(dx, rows, slice(buffer.opened.start, n), buffer)
        if self.token_sums is not None:
            summed_tokens(dx, len(self.token_sums), self.token_sums[:, rows])
        elif self.d_constants is not None:
            per_position = self.d_constants.shape[2] > 1
            where = buffer.extended(dx) if per_position else dx.sum(2, dtype=accumulator_dtype(dx.dtype))
            self.d_constants += constant_gradient(self.ablated[:, :, rows], where)

    def _mix_of(self, dx: Tensor, rows: slice, sources: slice, buffer: Buffer, *, add: bool = True) -> None:
        """Backward of a mix but for constants, of sources that are open."""
        masks = self.forward.masks[:, rows, sources]
        operands = Operands(masks, buffer.delta[sources], self.setup.precision)
        d_masks = mix_backward(dx, operands, d_delta=buffer.gradient(sources), add=add)
        if self.setup.contrast is not None:
            contrast = buffer.restricted(self.setup.contrast[sources])
            d_masks = mix_backward(dx, Operands(masks, contrast), d_delta=torch.zeros_like(contrast))
        self.d_masks[:, rows, sources].add_(d_masks)  # += would copy the sum onto itself
