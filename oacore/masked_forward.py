"""The masked-edge forward pass: every edge of the residual graph scaled by its own mask, with gradients for masks and constants.

`x_j = sum_s m_js out_s + (1 - m_js) r_s (+ all b_O so far)` for every destination j (Li & Janson 2024, section 3). What makes it fast:

* A source is kept once, as what it writes minus what replaces it (`delta`), in one preallocated buffer. A layer mixes them for all its
  destinations in one GEMM per mask and projects afterwards: W_O is applied once per head, not once per edge.
* With `oacore.folded` every norm is an RMS scale, which commutes with the projection after it.
* Position 0 (BOS) is never ablated: its keys and values are those of the clean run, and it is in no buffer.
* In the last block only keys and values are computed at more than the last position.
* The backward pass is written by hand around the mixes: gradients of sources accumulate in one buffer, and the destinations' inputs are
  stored or mixed again. Attention and MLP are small autograd graphs of their own.

Symbols: B rows, M masks, F fits, P prompts, t = T - 1 tokens after BOS, S sources, J destinations, H heads, KV key/value heads, k head
width, d model width, Q = 1 or t positions of a replacement.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from oakernels.masked_mix import constant_gradient, mix, mix_and_scale, mix_backward
from oakernels.masked_read import project, project_backward, read
from oakernels.runtime import Precision
from torch import Tensor

from oacore.ablation import Batch, clean_pass
from oacore.folded import Folded, Layer, Plan, Weights
from oacore.forward import embed, key_value, logits_of, rotary_tables, rotate, run_block
from oacore.model import ACTIVATIONS, Block, Model, Norm

MATH_ATTENTION = 64  # tokens: up to here plain GEMMs are faster on the CPU than scaled_dot_product_attention with a mask


@dataclass(frozen=True)
class Prompts:
    """What masked passes need of their prompts; made once, used for any number of passes."""

    input: Tensor  # [P, t, d] embeddings after BOS, centred for LayerNorm
    bos: tuple[tuple[Tensor, Tensor], ...]  # per layer the clean keys (rotated) and values of every first token, [U, KV, k] each
    first: Tensor  # [P] which of the U first tokens a prompt has; nearly always the same one
    last: Tensor  # [P] the last token's place among t
    rotary: tuple[Tensor, Tensor] | None  # cos, sin [t, r]

    def __len__(self) -> int:
        return len(self.input)

    @property
    def n_tokens(self) -> int:
        return self.input.shape[1]


class Engine:
    """Masked-edge passes of one model.

    Args:
        precision: of fp32 mixes and projections on a GPU.
        fused: where inputs are not stored, project them in the kernel that mixes them, so that they are never written. By default on a
            GPU only, where the kernel is picked for the shapes on which it is the faster one.
    """

    def __init__(self, model: Model, precision: Precision = "ieee", fused: bool | None = None):
        self.model, self.graph, self.weights = model, model.graph, Weights(model)
        self.precision: Precision = precision
        self.fused = model.device.type == "cuda" if fused is None else fused
        # Entries that are no edges count as 1 where constants look for ablated edges.
        self.no_edge = torch.tensor(~model.graph.valid).to(model.device)

    @torch.no_grad()
    def prompts(self, batch: Batch) -> Prompts:
        """Embeddings, and the clean run of position 0.

        Raises:
            ValueError: a prompt of one token has nothing to ablate.
        """
        if batch.tokens.shape[1] < 2 or int(batch.lengths.min()) < 2:
            raise ValueError("a prompt of one token has nothing to ablate: position 0 is always clean")
        tokens, first = batch.tokens[:, 0].unique(return_inverse=True)
        bos, residual = [], embed(self.model, tokens[:, None])  # [U, 1, d]
        for layer in range(self.model.n_layers):
            key, value = key_value(self.model, layer, residual)  # [U, 1, KV, k]
            bos.append((key[:, 0], value[:, 0]))
            residual = run_block(self.model, layer, residual)
        inputs = embed(self.model, batch.tokens)
        rotary = None
        if self.model.rotary is not None:
            cos, sin = rotary_tables(self.model, inputs)
            rotary = cos[1:], sin[1:]
        return Prompts(self.weights.centre(inputs[:, 1:]).contiguous(), tuple(bos), first, batch.lengths - 2, rotary)

    @torch.no_grad()
    def sources(self, batch: Batch) -> Tensor:
        """What every source writes in a clean run: [P, S, t, d], centred for LayerNorm. As a replacement: counterfactuals, resampling."""
        model, clean = self.model, clean_pass(self.model, batch.tokens, batch.lengths)
        written = [clean.entering[0][:, 1:, None]]  # [P, t, n, d] each
        for block, z, out in zip(model.blocks, clean.z, clean.mlp, strict=True):
            heads = torch.einsum("pthk,hkd->pthd", z[:, 1:], block.W_O)
            norm = block.attention_post_norm
            written += [heads if norm is None else _post_norm(norm, heads, heads.sum(2, keepdim=True)), out[:, 1:, None]]
        return self.weights.centre(torch.cat(written, 2).transpose(1, 2))

    def residual(
        self,
        prompts: Prompts,
        rows: Tensor,
        masks: Tensor,
        replacement: Tensor,
        owner: Tensor | None = None,
        *,
        contrast: Tensor | None = None,
        plan: Plan | None = None,
        keep_inputs: bool = True,
    ) -> Tensor:
        """The residual [B, d] that the final norm reads at each row's last position.

        Args:
            rows: [B] the prompt of each row.
            masks: [M, J, S] in [0, 1], 0 where there is no edge; B / M consecutive rows share one.
            replacement: [F, S, Q, d] in the residual stream, each for B / F consecutive rows: constants, fp32 or the weights' dtype.
            owner: [B] which of the F replacements a row takes, if they are activations as `sources` gives them, without a gradient.
            contrast: [S, B, t, d] what the gradient of a mask multiplies, instead of what its edge changes in this very pass.
            plan: what to compute, from `weights.plan`; default everything.
            keep_inputs: store the destinations' inputs for the backward pass instead of mixing them again: faster, more memory.

        Returns:
            Differentiable in the masks, and in a replacement where a mask is below 1e-3: a partially ablated edge would bias it.
        """
        replacement = (self.weights.centre(replacement) if owner is None else replacement).to(self.model.dtype)
        contrast = None if contrast is None else contrast.to(self.model.dtype)
        one_pass = _Pass(self, prompts, rows, owner, contrast, plan or self.weights.all, keep_inputs)
        return _MaskedForward.apply(masks, replacement, one_pass)

    def logits(self, *args: Any, **kwargs: Any) -> Tensor:
        """Logits [B, V] in fp32 at each row's last position; arguments as `residual`."""
        return logits_of(self.model, self.residual(*args, **kwargs))

    def row_bytes(self, n_tokens: int, *, gradient: bool, keep_inputs: bool) -> int:
        """Estimated memory of one row of a pass with n_tokens after BOS, weights apart.

        `bench_step.py` peaked at 0.68 GB above its weights where this says 0.85 (GPT-2-small, 12 rows of 21 tokens, inputs stored), and at
        0.11 for 0.11 (4 layers of width 128, 60 rows of 16 tokens).
        """
        model, graph = self.model, self.graph
        S, J, H, KV, d, f = (
            graph.n_sources,
            graph.n_destinations,
            graph.n_heads,
            graph.n_kv_heads,
            model.d_model,
            model.blocks[0].W_in.shape[1],
        )
        inner = graph.first_source(graph.n_layers - 1)
        layer = (H + 2 * KV + 1) * d + (H + 2 * KV) * 2 * model.d_head + 2 * H * (n_tokens + 1) + 3 * f  # one layer's temporaries
        values = inner * d + layer
        if gradient:
            values = 2 * inner * d + layer * 2 + graph.n_layers * (5 * H * model.d_head + 2 * H * (n_tokens + 1) + 3 * f + 4 * d)
            values += J * d if keep_inputs else 0
        return (values * n_tokens + S * J + 4 * S * d + 5 * model.d_vocab) * torch.finfo(model.dtype).bits // 8


class _MaskedForward(torch.autograd.Function):
    """A whole pass as one operation of autograd."""

    @staticmethod
    def forward(ctx: Any, masks: Tensor, replacement: Tensor, one_pass: "_Pass") -> Tensor:
        ctx.one_pass = one_pass
        ctx.save_for_backward(masks, replacement)
        return one_pass.forward(masks.detach(), replacement.detach(), keep=any(ctx.needs_input_grad))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        masks, replacement = ctx.saved_tensors
        one_pass, ctx.one_pass = ctx.one_pass, None
        return *one_pass.backward(masks, replacement, gradients[0], constants=ctx.needs_input_grad[1]), None


@dataclass
class _Read:
    """One projection of destinations' inputs."""

    rows: slice  # which destinations
    weights: slice  # which of the layer's projections
    y: Tensor  # [J, B, t, k]
    scale: Tensor  # [J, B, t]
    inputs: Tensor | None  # [J (+ 1), B, t, d], with the MLP's row after them; None: mix them again


@dataclass
class _Tape:
    """What a layer's backward pass needs."""

    base: Tensor
    reads: list[_Read]
    written: Tensor | None = None  # by the heads; its graph leads to the reads' y
    mlp: tuple[Tensor, Tensor] | None = None  # input and output


class _Pass:
    """One pass of B rows. The last block's queries, MLP and everything after them live in buffers of one position."""

    def __init__(
        self, engine: Engine, prompts: Prompts, rows: Tensor, owner: Tensor | None, contrast: Tensor | None, plan: Plan, keep_inputs: bool
    ):
        self.weights, self.model, self.graph, self.no_edge = engine.weights, engine.model, engine.graph, engine.no_edge
        self.precision, self.fused = engine.precision, engine.fused and not keep_inputs
        self.prompts, self.rows, self.plan, self.keep_inputs = prompts, rows, plan, keep_inputs
        self.consecutive, self.contrast = owner is None, contrast
        self.owner = owner  # [B], filled in for consecutive ones
        self.last = prompts.last[rows]  # [B]
        self.every_row = torch.arange(len(rows), device=rows.device)
        self.n_inner = plan.layers[-1].first_source  # sources before the last block

    # ---- Forward ---------------------------------------------------------------------------------------------------------------

    def forward(self, masks: Tensor, replacement: Tensor, *, keep: bool) -> Tensor:
        B, t, d = len(self.rows), self.prompts.n_tokens, self.model.d_model
        self.keep, self.tapes = keep, list[_Tape]()
        self.masks = masks if self.plan.sources is None else masks[:, self.plan.destinations][:, :, self.plan.sources]
        if self.owner is None:
            self.owner = self.every_row // (B // len(replacement))
        self.delta = replacement.new_empty((self.n_inner, B, t, d))
        self.last_delta = replacement.new_empty((self.plan.n_sources, B, 1, d))
        torch.add(self.prompts.input[self.rows], self._negated(replacement[:, :1], False)[0], out=self.delta[0])
        base = replacement[:, 0]  # [F or P, Q, d] what replaces all sources so far, and biases
        for layer in self.plan.layers:
            final = layer is self.plan.layers[-1]
            if final:
                self.last_delta[: self.n_inner, :, 0] = self.delta[:, self.every_row, self.last]
            base = self._layer(layer, base, replacement, final)
        out = mix(self._base(base, True), self.masks[:, -1:], self.last_delta)[0, :, 0]
        if not keep:
            del self.delta, self.last_delta
        return out

    def _layer(self, layer: Layer, base: Tensor, replacement: Tensor, final: bool) -> Tensor:
        """One block; returns the base of the next."""
        sources = self.last_delta if final else self.delta
        n, m = layer.first_source, layer.mlp_source
        values = replacement[:, self.graph.heads(layer.number)]  # [F or P, all H, Q, d]
        middle = base + values.sum(1)
        if layer.folded.b_O is not None:
            middle = middle + layer.folded.b_O
        tape, x_mlp = _Tape(base, []), None
        if layer.n_heads:
            if final:
                tape.reads.append(self._read(layer, base, layer.q, slice(0, layer.n_heads), True)[0])
                tape.reads.append(self._read(layer, base, layer.kv, slice(layer.n_heads, None), False)[0])
            else:
                # The MLP's row comes along, so that early sources are gone through once.
                rows = slice(layer.q.start, layer.kv.stop if self.fused else layer.mlp.stop)
                own, x = self._read(layer, base, rows, slice(None), False)
                tape.reads.append(own)
                x_mlp = x[-1] if x is not None and layer.has_mlp else None
            with torch.set_grad_enabled(self.keep):
                tape.written = self._attend(layer, [read.y.requires_grad_(self.keep) for read in tape.reads], final)
            target, written = sources[n:m], tape.written.detach()
            target.copy_(self._negated(values[:, layer.heads], final))
            if layer.folded.block.attention_post_norm is None:
                target.flatten(1, 2).baddbmm_(written.flatten(1, 2), layer.write)
            else:
                target.add_(written)
        if layer.has_mlp:
            # A serial MLP also reads the heads of its own layer, when they have been written.
            reach, before = (n, base) if self.model.parallel else (m, middle)
            if x_mlp is None:
                x_mlp = self._mix(before, layer.mlp, reach, final)[0]
            elif reach > n:
                x_mlp = (
                    x_mlp + mix(self._base(before - base, final), self.masks[:, layer.mlp, n:m], sources[n:m], precision=self.precision)[0]
                )
            x_mlp = x_mlp.detach().requires_grad_(self.keep)
            with torch.set_grad_enabled(self.keep):
                out = self._mlp(layer.folded, x_mlp)
            tape.mlp = x_mlp, out
            value = replacement[:, self.graph.mlp_source(layer.number)][:, None]
            torch.add(out.detach(), self._negated(value, final)[0], out=sources[m])
        if self.keep:
            self.tapes.append(tape)
        return middle + replacement[:, self.graph.mlp_source(layer.number)]

    def _mix(self, base: Tensor, rows: slice, n: int, final: bool) -> Tensor:
        """Inputs [J, B, t or 1, d] of some destinations from the first n sources."""
        sources = self.last_delta if final else self.delta
        return mix(self._base(base, final), self.masks[:, rows, :n], sources[:n], precision=self.precision)

    def _read(self, layer: Layer, base: Tensor, rows: slice, weights: slice, final: bool) -> tuple[_Read, Tensor | None]:
        """Mix and project the inputs of destinations; also the inputs, if they were written.

        `rows` may hold the MLP's row beyond the projections, which is mixed and left alone.
        """
        n, weight = layer.first_source, layer.read[weights]
        bias = None if layer.read_bias is None else layer.read_bias[weights]
        eps, precision = layer.folded.block.attention_norm.eps, self.precision
        store, base = self.keep and self.keep_inputs, self._base(base, final)
        masks, sources = self.masks[:, rows, :n], (self.last_delta if final else self.delta)[:n]
        if self.fused and masks.shape[1] == len(weight):
            y, scale, x = read(base, masks, sources, weight, bias, eps, store_inputs=store, precision=precision)
        else:
            x, scale = mix_and_scale(base, masks, sources, eps, precision=precision)
            y = project(x[: len(weight)], scale[: len(weight)], weight, bias, precision=precision)
        return _Read(rows, weights, y, scale[: len(weight)], x if store else None), x

    def _attend(self, layer: Layer, reads: list[Tensor], final: bool) -> Tensor:
        """q, k and v [., B, t, k] -> each head's z [H, B, t or 1, k]; for post-norm models what the heads write [H, B, t or 1, d]."""
        H, KV, block = layer.n_heads, layer.n_kv_heads, layer.folded.block
        q, k, v = (reads[0], *reads[1].split(KV)) if final else reads[0].split((H, KV, KV))
        if self.prompts.rotary is not None:
            cos, sin = self.prompts.rotary
            k = rotate(k, cos, sin)
            q = rotate(q, cos[self.last][:, None], sin[self.last][:, None]) if final else rotate(q, cos, sin)
        first = self.prompts.first[self.rows]
        bos = (clean[first].transpose(0, 1)[layer.groups][:, :, None] for clean in self.prompts.bos[layer.number])  # [KV, B, 1, k]
        k, v = (torch.cat(pair, 2) for pair in zip(bos, (k, v), strict=True))  # [KV, B, T, k]
        if layer.key_of_head is not None:
            k, v = k[layer.key_of_head], v[layer.key_of_head]
        z = _attention(block, q, k, v, self._seen(block, final))
        norm = block.attention_post_norm
        if norm is None:
            return z
        out = (z.flatten(1, 2) @ layer.write).unflatten(1, z.shape[1:3])  # [H, B, t, d]
        return _post_norm(norm, out, out.sum(0))

    def _seen(self, block: Block, final: bool) -> Tensor:
        """Which keys a query sees: bool [t, T], or [B, 1, T] at the last position."""
        key = torch.arange(self.prompts.n_tokens + 1, device=self.last.device)
        query = (self.last[:, None, None] if final else key[:-1, None]) + 1
        seen = key <= query
        return seen if block.window is None else seen & (key > query - block.window)

    def _mlp(self, folded: Folded, x: Tensor) -> Tensor:
        """What the MLP writes [B, t, d], given its input [B, t, d]."""
        activation, norm = ACTIVATIONS[self.model.activation], folded.block.mlp_post_norm
        flat = (x * _rms_scale(x, folded.block.mlp_norm.eps)).flatten(0, 1)
        hidden = flat @ folded.W_in if folded.b_in is None else torch.addmm(folded.b_in, flat, folded.W_in)
        hidden = activation(hidden) if folded.W_gate is None else activation(flat @ folded.W_gate) * hidden
        out = hidden @ folded.W_out if folded.b_out is None else torch.addmm(folded.b_out, hidden, folded.W_out)
        return (out if norm is None else _post_norm(norm, out, out)).unflatten(0, x.shape[:2])

    def _base(self, base: Tensor, final: bool) -> Tensor:
        """A base [F or P, Q, d] as rows take it: [F or B, Q, d], at the last position [., 1, d]."""
        if final and base.shape[1] > 1:
            return base[self.owner, self.last][:, None]
        return base if self.consecutive else base[self.owner]

    def _negated(self, values: Tensor, final: bool) -> Tensor:
        """Minus the values [F or P, n, Q, d], for each row: [n, B or 1, t or 1, d]."""
        if final and values.shape[2] > 1:
            return -values[self.owner, :, self.last].transpose(0, 1)[:, :, None]
        return -(values if len(values) == 1 else values[self.owner]).transpose(0, 1)

    # ---- Backward --------------------------------------------------------------------------------------------------------------

    def backward(self, masks: Tensor, replacement: Tensor, gradient: Tensor, *, constants: bool) -> tuple[Tensor, Tensor | None]:
        """Gradients of masks [M, J, S] and constants [F, S, Q, d] from that of the residual [B, d]."""
        if constants and not self.consecutive:
            raise ValueError("replacements with an owner are data: only constants have a gradient")
        self.d_masks = torch.zeros_like(self.masks)
        self.d_delta, self.d_last = torch.zeros_like(self.delta), torch.zeros_like(self.last_delta)
        self.d_constants = torch.zeros_like(replacement, dtype=self.d_masks.dtype) if constants else None
        if constants:
            with_destinations = masks if self.plan.destinations is None else masks[:, self.plan.destinations]
            no_edge = self.no_edge if self.plan.destinations is None else self.no_edge[self.plan.destinations]
            self.edge_masks = with_destinations.masked_fill(no_edge, 1.0)
        n_rows = self.masks.shape[1]
        self._mix_backward(gradient[None, :, None].contiguous(), slice(n_rows - 1, n_rows), self.plan.n_sources, True)
        for layer in reversed(self.plan.layers):
            self._layer_backward(layer, self.tapes.pop(), layer is self.plan.layers[-1])
        del self.delta, self.last_delta, self.d_delta, self.d_last
        if self.plan.sources is None or self.plan.destinations is None:
            return self.d_masks.to(masks.dtype), self.d_constants
        full = torch.zeros_like(masks)
        full[:, self.plan.destinations[:, None], self.plan.sources] = self.d_masks.to(masks.dtype)
        return full, self.d_constants

    def _layer_backward(self, layer: Layer, tape: _Tape, final: bool) -> None:
        n, m, gradients = layer.first_source, layer.mlp_source, self.d_last if final else self.d_delta
        d_mlp = None
        if tape.mlp is not None:
            (d_mlp,) = torch.autograd.grad(tape.mlp[1], tape.mlp[0], gradients[m])
            d_mlp, tape.mlp = d_mlp[None], None
            if final or not layer.n_heads:
                self._mix_backward(d_mlp, layer.mlp, n if self.model.parallel else m, final)
            elif not self.model.parallel:
                self._mix_backward_of(d_mlp, layer.mlp, slice(n, m), final)
        if tape.written is not None:
            d_written = gradients[n:m]
            if layer.folded.block.attention_post_norm is None:
                d_written = torch.bmm(d_written.flatten(1, 2), layer.write.transpose(1, 2)).unflatten(1, d_written.shape[1:3])
            d_reads = torch.autograd.grad(tape.written, [read.y for read in tape.reads], d_written)
            tape.written = None
            for read, dy in zip(tape.reads, d_reads, strict=True):
                at_last = final and read is tape.reads[0]
                x = self._mix(tape.base, read.rows, n, at_last) if read.inputs is None else read.inputs
                self._project_backward(layer, read, x, dy.contiguous())
                together = d_mlp is not None and len(x) > len(read.y)
                if together and d_mlp is not None:
                    x[-1:] = d_mlp
                self._mix_backward(x, read.rows, n, at_last)
                if not final and d_mlp is not None and not together:
                    self._mix_backward(d_mlp, layer.mlp, n, False)
        if final:
            self.d_delta[:, self.every_row, self.last] += self.d_last[:n, :, 0]

    def _project_backward(self, layer: Layer, read: _Read, x: Tensor, dy: Tensor) -> None:
        """Write the gradient of a projection's inputs over them."""
        weight = layer.read[read.weights]
        bias = None if layer.read_bias is None else layer.read_bias[read.weights]
        own = x[: len(weight)]
        project_backward(dy, read.y.detach(), read.scale, own, weight, bias, out=own, precision=self.precision)

    def _mix_backward(self, dx: Tensor, rows: slice, n: int, final: bool) -> None:
        """Backward of `_mix`, and the constants' gradient: through ablated edges of all these destinations read, left out or not."""
        sums = self._mix_backward_of(dx, rows, slice(0, n), final)
        if self.d_constants is None:
            return
        if self.d_constants.shape[2] == 1:
            at = dx.sum(2) if sums is None else sums
        elif final:
            at = dx.new_zeros((len(dx), *self.delta.shape[1:]))
            at[:, self.every_row, self.last] = dx[:, :, 0]
        else:
            at = dx
        self.d_constants += constant_gradient(self.edge_masks[:, rows], at, len(self.d_constants))

    def _mix_backward_of(self, dx: Tensor, rows: slice, columns: slice, final: bool) -> Tensor | None:
        sources, gradients = (self.last_delta, self.d_last) if final else (self.delta, self.d_delta)
        token_sums = self.d_constants is not None and self.d_constants.shape[2] == 1
        d_masks, sums = mix_backward(
            dx, self.masks[:, rows, columns], sources[columns], d_delta=gradients[columns], token_sums=token_sums, precision=self.precision
        )
        if self.contrast is not None:
            contrast = self.contrast[columns][:, self.every_row, self.last][:, :, None] if final else self.contrast[columns]
            d_masks, _ = mix_backward(dx, self.masks[:, rows, columns], contrast, d_delta=torch.zeros_like(contrast), token_sums=False)
        self.d_masks[:, rows, columns] += d_masks
        return sums


def _rms_scale(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean x^2 + eps) of x [..., d]: [..., 1], computed in fp32 or wider."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
    return torch.rsqrt(norm.square() / x.shape[-1] + eps).to(x.dtype)


def _post_norm(norm: Norm, x: Tensor, scaled_by: Tensor) -> Tensor:
    """x [..., d] times the scale that the RMSNorm of `scaled_by` [..., d] has: a head's share of a post-normed sum of heads."""
    return (x * (_rms_scale(scaled_by, norm.eps) * norm.weight)).to(x.dtype)


def _attention(block: Block, q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """q [H, B, t, k], k and v [H, B, T, k], seen bool [., t, T] -> z [H, B, t, k]."""
    if block.attention_softcap is None and k.shape[2] > MATH_ATTENTION:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=block.attention_scale)
    scores = (q * block.attention_scale) @ k.transpose(2, 3)
    if block.attention_softcap is not None:
        scores = torch.tanh(scores / block.attention_softcap) * block.attention_softcap
    return scores.masked_fill(~seen, float("-inf")).softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(v.dtype) @ v
