"""The masked-edge forward pass: every edge of the residual graph scaled by its own mask, with gradients.

`x_j = sum_s m_js out_s + (1 - m_js) r_s (+ all b_O so far)` for every destination j (Li & Janson 2024, section 3), with
gradients for masks and for the constants r. What makes it fast:

* A source is kept once, as what it writes minus what replaces it (`delta`), in one preallocated buffer. A layer mixes
  them for all its destinations in one GEMM per mask and projects afterwards: W_O is applied once per head, not once per
  edge.
* With `oacore.engine.folded` every norm is an RMS scale, which commutes with the projection after it.
* Position 0 (BOS) is never ablated: its keys and values are those of the clean run, and it is in no buffer.
* In the last block only keys and values are computed at more than the last position (`oacore.engine.buffers`).
* The backward pass is written by hand around the mixes (`oacore.engine.masked_backward`): gradients of sources
  accumulate in one buffer, of all sources or of two layers' at a time, and the destinations' inputs are stored or mixed
  again. Attention and MLP are small autograd graphs of their own.

Symbols: B rows, M masks, F fits, P prompts, t = T - 1 tokens after BOS, S sources, J destinations, H heads,
KV key/value heads, k head width, d model width, Q = 1 or t positions of a replacement.
"""

from typing import Any

import torch
from oakernels.runtime import Precision
from torch import Tensor

from oacore.engine.buffers import MaskedPrompts, Rows
from oacore.engine.clean import Batch, clean_pass
from oacore.engine.folded import Plan, Weights
from oacore.engine.forward import embed, key_value, logits_of, rotary_of, rotary_tables, run_block
from oacore.engine.masked_backward import Backward
from oacore.engine.masked_blocks import post_norm
from oacore.engine.masked_pass import Forward, MaskedPass
from oacore.models.weights import Model

LAYERS_AT_ONCE = 2
"""Of whose sources a GPU takes the gradient at a time: see kernels/README.md. A CPU takes that of all."""


class Engine:
    """Masked-edge passes of one model.

    Args:
        precision: of fp32 mixes and projections on a GPU.
        layers_at_once: where inputs are stored, the sources of so many layers get their gradient at a time, from all
            later readers; by default `LAYERS_AT_ONCE` on a GPU and all on a CPU.
    """

    def __init__(self, model: Model, precision: Precision = "ieee", layers_at_once: int | None = None):
        self.model, self.graph, self.weights = model, model.graph, Weights(model)
        self.precision: Precision = precision
        default = model.n_layers if model.device.type == "cpu" else LAYERS_AT_ONCE
        self.layers_at_once = default if layers_at_once is None else layers_at_once
        # Entries that are no edges count as 1 where constants look for ablated edges.
        self.no_edge = torch.tensor(~model.graph.valid).to(model.device)

    @torch.no_grad()
    def prompts(self, batch: Batch) -> MaskedPrompts:
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
        centred = self.weights.centre(inputs[:, 1:]).contiguous()
        return MaskedPrompts(centred, tuple(bos), first, batch.lengths - 2, self._rotary(inputs))

    def _rotary(self, inputs: Tensor) -> tuple[tuple[Tensor, Tensor] | None, ...]:
        """Per layer cos and sin [t, r] after BOS, at the positions of inputs [P, T, d]; made once for layers alike."""
        tables: dict[int | None, tuple[Tensor, Tensor] | None] = {None: None}
        kinds = []
        for block in self.model.blocks:
            rotary = rotary_of(self.model, block)
            kinds.append(None if rotary is None else rotary.frequencies.data_ptr())
            if kinds[-1] not in tables:
                cos, sin = rotary_tables(self.model, block, inputs)
                tables[kinds[-1]] = cos[1:], sin[1:]
        return tuple(tables[kind] for kind in kinds)

    @torch.no_grad()
    def sources(self, batch: Batch) -> Tensor:
        """What every source writes in a clean run: [P, S, t, d], centred for LayerNorm.

        These are the replacements of counterfactual and resampling ablation.
        """
        model, clean = self.model, clean_pass(self.model, batch.tokens, batch.lengths)
        written = [clean.entering[0][:, 1:, None]]  # [P, t, n, d] each
        for block, z, out in zip(model.blocks, clean.z, clean.mlp, strict=True):
            heads = torch.einsum("pthk,hkd->pthd", z[:, 1:], block.W_O)
            norm = block.attention_post_norm
            if norm is not None:
                heads = post_norm(norm, heads, heads.sum(2, keepdim=True))
            written += [heads, out[:, 1:, None]]
        return self.weights.centre(torch.cat(written, 2).transpose(1, 2))

    def residual(
        self,
        prompts: MaskedPrompts,
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
            replacement: [F, S, Q, d] in the residual stream, fp32 or the weights' dtype: constants, each for B / F
                consecutive rows.
            owner: [B] which of the F replacements a row takes, if they are activations as `sources` gives them, without
                a gradient.
            contrast: [S, B, t, d] what the gradient of a mask multiplies instead of what its edge changes in this pass.
            plan: what to compute, from `weights.plan`; default everything.
            keep_inputs: store the destinations' inputs for the backward pass instead of mixing them again: faster, more
                memory.

        Returns:
            Differentiable in the masks, and in a replacement where a mask is below 1e-3: a partially ablated edge would
            bias it.

        Raises:
            ValueError: shapes that don't fit together; in the backward pass, an owned replacement with a gradient.
        """
        replacement = (self.weights.centre(replacement) if owner is None else replacement).to(self.model.dtype)
        contrast = None if contrast is None else contrast.to(self.model.dtype)
        setup = MaskedPass(
            self.model,
            plan or self.weights.all,
            Rows.of(prompts, rows, owner, len(replacement)),
            self.no_edge,
            contrast,
            precision=self.precision,
            keep_inputs=keep_inputs,
            layers_at_once=self.layers_at_once if keep_inputs else self.model.n_layers,
        )
        return _MaskedForward.apply(masks, replacement, setup)

    def logits(self, *args: Any, **kwargs: Any) -> Tensor:
        """Logits [B, V] in fp32 at each row's last position; arguments as `residual`."""
        return logits_of(self.model, self.residual(*args, **kwargs))

    def row_bytes(self, n_tokens: int, *, gradient: bool, keep_inputs: bool) -> int:
        """Estimated memory of one row of a pass with n_tokens after BOS, weights apart.

        `bench_step.py` peaked at 0.68 GB above its weights where this says 0.85 (GPT-2-small, 12 rows of 21 tokens,
        inputs stored), and at 0.11 for 0.11 (4 layers of width 128, 60 rows of 16 tokens).
        """
        model, graph = self.model, self.graph
        S, J, H, KV = graph.n_sources, graph.n_destinations, graph.n_heads, graph.n_kv_heads
        d, k, f, L = model.d_model, model.d_head, model.blocks[0].W_in.shape[1], graph.n_layers
        inner, probabilities = graph.first_source(L - 1), 2 * H * (n_tokens + 1)
        temporaries = (H + 2 * KV + 1) * d + (H + 2 * KV) * 2 * k + probabilities + 3 * f  # of one layer
        values = inner * d + temporaries
        if gradient:
            values = 2 * (inner * d + temporaries) + L * (5 * H * k + probabilities + 3 * f + 4 * d)
            values += J * d if keep_inputs else 0
        fp32 = J * d if gradient and keep_inputs and self.layers_at_once < L else 0  # sums over tokens for constants
        n_bytes = torch.finfo(model.dtype).bits // 8
        return (values * n_tokens + S * J + 4 * S * d + 5 * model.d_vocab) * n_bytes + 4 * fp32


class _MaskedForward(torch.autograd.Function):
    """A whole pass as one operation of autograd."""

    @staticmethod
    def forward(ctx: Any, masks: Tensor, replacement: Tensor, setup: MaskedPass) -> Tensor:
        keep = any(ctx.needs_input_grad)
        forward = Forward(setup, masks.detach(), replacement.detach(), keep=keep)
        ctx.save_for_backward(masks, replacement)  # for autograd to notice if they are changed before the backward pass
        ctx.forward = forward if keep else None
        return forward.run()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        masks, _ = ctx.saved_tensors
        forward, ctx.forward = ctx.forward, None  # its buffers are used up
        return *Backward(forward, masks, constants=ctx.needs_input_grad[1]).run(gradients[0]), None
