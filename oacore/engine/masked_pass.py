"""A masked pass, forward: block by block, each source once into a buffer, mixed for the destinations that read it.

Symbols: B rows, M masks, F fits, P prompts, t tokens after BOS, q = t or 1 positions of a buffer, S sources,
J destinations, H heads, KV key/value heads, k head width, d model width, Q = 1 or t positions of a replacement.
"""

from dataclasses import dataclass, field

import torch
from oakernels.masked_mix import mix, mix_and_scale
from oakernels.operands import Operands, Projection
from oakernels.projection import project
from oakernels.runtime import Precision
from torch import Tensor

from oacore.engine.buffers import Buffer, EveryPosition, LastPosition, Rows
from oacore.engine.folded import Layer, Plan
from oacore.engine.masked_blocks import attend, masked_mlp
from oacore.models.weights import Model


@dataclass(frozen=True)
class MaskedPass:
    """What one pass computes, masks and replacements apart."""

    model: Model
    plan: Plan
    rows: Rows
    no_edge: Tensor  # bool [J, S] of the whole graph
    contrast: Tensor | None  # [S, B, t, d] what a mask's gradient multiplies; None: what its edge changes in this pass
    precision: Precision
    keep_inputs: bool  # store the destinations' inputs for the backward pass
    layers_at_once: int  # whose sources get their gradient at a time


@dataclass
class Read:
    """One projection of destinations' inputs."""

    rows: slice  # which destinations
    buffer: Buffer  # what they read, at its positions
    projection: Projection
    y: Tensor  # [J, B, q, k]
    scale: Tensor | None  # [J, B, q]; None without a norm
    inputs: Tensor | None  # [J (+ 1), B, q, d], with the MLP's row after them; None: mix them again


@dataclass
class BlockTape:
    """What a block's backward pass needs."""

    base: Tensor  # [F or P, Q, d] of its queries, keys and values
    reads: list[Read] = field(default_factory=list)
    written: Tensor | None = None  # by the heads; its graph leads to the reads' y
    mlp: tuple[Tensor, Tensor] | None = None  # input and output


class Forward:
    """The forward pass; what it leaves in its fields is what the backward pass starts from.

    The last block's queries, its MLP and everything after them live in a buffer of one position.

    Args:
        masks: [M, J, S].
        replacement: [F or P, S, Q, d].
        keep: a backward pass follows.
    """

    def __init__(self, setup: MaskedPass, masks: Tensor, replacement: Tensor, *, keep: bool):
        self.setup, self.replacement, self.keep = setup, replacement, keep
        plan, rows = setup.plan, setup.rows
        masks = masks if plan.sources is None else masks[:, plan.destinations][:, :, plan.sources]
        self.masks = masks if masks.device.type == "cpu" else _aligned(masks)
        self.every = EveryPosition(rows, plan.layers[-1].first_source, replacement)
        self.last = LastPosition(rows, plan.n_sources, replacement)
        # All inputs at every position, over which their gradients are written for the sources whose turn comes later.
        self.inputs: Tensor | None = None
        if keep and setup.layers_at_once < len(plan.layers):
            final = plan.layers[-1]
            self.inputs = replacement.new_empty((final.kv.stop, *self.every.delta.shape[1:]))
            self.inputs[final.q] = 0  # these are at the last position alone, and no part of this
        self.blocks: list[BlockTape] = []

    def run(self) -> Tensor:
        """The residual [B, d] that the final norm reads at each row's last position."""
        rows, replacement = self.setup.rows, self.replacement
        replaced = self.every.of_rows(replacement[:, :1])[0]
        torch.sub(rows.prompts.input[rows.prompt], replaced, out=self.every.delta[0])
        base = replacement[:, 0]  # [F or P, Q, d] what replaces all sources so far, and biases
        *inner, final = self.setup.plan.layers
        for layer in inner:
            base = self._block(layer, base, self.every)
        self.last.take_over(self.every)
        base = self._block(final, base, self.last)
        # In ieee precision whatever the setting: one destination at one position costs nothing.
        return mix(self.last.base(base), Operands(self.masks[:, -1:], self.last.delta))[0, :, 0]

    def mix(self, base: Tensor, rows: slice, sources: slice, buffer: Buffer) -> Tensor:
        """Inputs [J, B, q, d] of the destinations `rows` from some sources of a buffer, and a base [F or P, Q, d]."""
        operands = Operands(self.masks[:, rows, sources], buffer.delta[sources], self.setup.precision)
        return mix(buffer.base(base), operands)

    def _block(self, layer: Layer, base: Tensor, buffer: Buffer) -> Tensor:
        """One block, whose queries, MLP and sources are in `buffer`; returns the base of the next."""
        graph = self.setup.model.graph
        values = self.replacement[:, graph.heads(layer.number)]  # [F or P, all H, Q, d]
        middle = base + values.sum(1)
        if layer.folded.b_O is not None:
            middle = middle + layer.folded.b_O
        tape, x_mlp = BlockTape(base), None
        if layer.n_heads:
            x_mlp = self._heads(layer, tape, values[:, layer.heads], buffer)
        value = self.replacement[:, graph.mlp_source(layer.number)]
        if layer.has_mlp:
            self._mlp(layer, tape, x_mlp, middle, value[:, None], buffer)
        if self.keep:
            self.blocks.append(tape)
        return middle + value

    def _heads(self, layer: Layer, tape: BlockTape, values: Tensor, buffer: Buffer) -> Tensor | None:
        """Attention into the buffer; returns the MLP's input from earlier sources [B, q, d] if it came along."""
        x_mlp = None
        if buffer is self.last:
            tape.reads.append(self._read(layer, tape.base, layer.q, slice(0, layer.n_heads), self.last)[0])
            tape.reads.append(self._read(layer, tape.base, layer.kv, slice(layer.n_heads, None), self.every)[0])
        else:
            # The MLP's row comes along, so that early sources are gone through once.
            rows = slice(layer.q.start, layer.mlp.stop)
            own, x = self._read(layer, tape.base, rows, slice(None), self.every)
            tape.reads.append(own)
            x_mlp = x[-1] if layer.has_mlp else None
        H, KV = layer.n_heads, layer.n_kv_heads
        with torch.set_grad_enabled(self.keep):
            first, *rest = (own.y.requires_grad_(self.keep) for own in tape.reads)
            q, k, v = (first, *rest[0].split(KV)) if rest else first.split((H, KV, KV))
            tape.written = attend(layer, buffer, q, k, v)
        target, written = buffer.delta[layer.first_source : layer.mlp_source], tape.written.detach()
        torch.neg(buffer.of_rows(values).expand_as(target), out=target)
        if layer.folded.block.attention_post_norm is None:
            target.flatten(1, 2).baddbmm_(written.flatten(1, 2), layer.write)
        else:
            target.add_(written)
        return x_mlp

    def _read(self, layer: Layer, base: Tensor, rows: slice, weights: slice, buffer: Buffer) -> tuple[Read, Tensor]:
        """Mix and project the inputs of destinations; also the inputs [J (+ 1), B, q, d].

        `rows` may hold the MLP's row beyond the projections, which is mixed and left alone.
        """
        bias = None if layer.read_bias is None else layer.read_bias[weights]
        norm = layer.folded.block.attention_norm
        projection = Projection(layer.read[weights], bias, None if norm is None else norm.eps)
        n, precision, base = layer.first_source, self.setup.precision, buffer.base(base)
        operands = Operands(self.masks[:, rows, :n], buffer.delta[:n], precision)
        out = None if self.inputs is None or buffer is self.last else self.inputs[rows]
        x, scale = mix_and_scale(base, operands, projection.eps, out=out)
        n_projected = len(projection.weight)
        scale = None if scale is None else scale[:n_projected]
        y = project(x[:n_projected], scale, projection, precision=precision)
        stored = x if self.keep and self.setup.keep_inputs else None
        return Read(rows, buffer, projection, y, scale, stored), x

    def _mlp(
        self, layer: Layer, tape: BlockTape, x: Tensor | None, middle: Tensor, value: Tensor, buffer: Buffer
    ) -> None:
        """The MLP into the buffer.

        Args:
            x: [B, q, d] what it reads of the sources before this block, if that is mixed already.
            middle: [F or P, Q, d] the base with this block's heads, which a serial MLP reads, too.
            value: [F or P, 1, Q, d] its replacement.
        """
        n, m, parallel = layer.first_source, layer.mlp_source, self.setup.model.parallel
        if x is None:
            reach, before = (n, tape.base) if parallel else (m, middle)
            x = self.mix(before, layer.mlp, slice(reach), buffer)[0]
        elif not parallel:
            x = x + self.mix(middle - tape.base, layer.mlp, slice(n, m), buffer)[0]
        elif self.inputs is not None:
            x = x.clone()  # what is written to the other inputs would count as a change of this one, too
        x = x.detach().requires_grad_(self.keep)
        with torch.set_grad_enabled(self.keep):
            out = masked_mlp(self.setup.model.activation, layer.folded, x)
        tape.mlp = x, out
        torch.sub(out.detach(), buffer.of_rows(value)[0], out=buffer.delta[m])


def _aligned(masks: Tensor) -> Tensor:
    """Masks [M, J, S] whose rows begin at multiples of 32 bytes, as GPUs' products and wide loads like them."""
    padded = masks.new_empty((*masks.shape[:2], -(-masks.shape[2] // 8) * 8))[..., : masks.shape[2]]
    return padded.copy_(masks)
