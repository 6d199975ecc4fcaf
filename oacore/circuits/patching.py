"""What circuit methods share: a task's prompts on the device, replacement values of every ablation type, and losses of masked passes.

Rows of a pass are (fit, sample, prompt) or (circuit, prompt); `slots` says which of the chosen prompts each row has. Rows go through
the engine in parts that fit `limits.memory_gb`; an out-of-memory halves the part and goes on. Neither changes what is computed.

Symbols: N prompts of a split, n chosen prompts, B rows, M masks, F fits, S sources, J destinations, t tokens after BOS, P shortest prompt.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from oacore.ablation import Batch, Statistics, derangement, first_pooled
from oacore.config import EdgeAblation, Objective
from oacore.errors import UserError, is_out_of_memory
from oacore.forward import unembed
from oacore.masked_forward import Engine, Prompts
from oacore.metrics import kl_divergence
from oacore.model import Model

PER_PROMPT: tuple[EdgeAblation, ...] = ("resample", "counterfactual")
ROWS_WORTH_KEEPING = 16  # fewer at a time, and storing the inputs of destinations costs more in small GEMMs than it saves


@dataclass(frozen=True)
class Examples:
    """One split of a task on the model's device."""

    batch: Batch
    counterfactual: Batch
    prompts: Prompts
    final: Tensor  # [N, d] what the unembedding reads in the clean run, from the cache: the target distribution
    answers: Tensor  # [N, A] right next tokens, padded with -1
    wrong: Tensor  # [N, W] wrong ones, padded with -1

    def __len__(self) -> int:
        return len(self.batch)


class Constants(NamedTuple):
    """Constants of every source where it lives: heads at z, before W_O (post-norm models: where they write); Q = 1, or P + 1 rows of a
    positional table, the last for all positions from P on."""

    input: Tensor  # [F, Q, d]
    head: Tensor  # [F, L, H, Q, k or d]
    mlp: Tensor  # [F, L, Q, d]

    def repeat(self, n: int) -> "Constants":
        """One fit's constants n times."""
        return Constants(*(part.expand(n, *part.shape[1:]).contiguous() for part in self))

    def writes(self, engine: Engine, n_tokens: int) -> Tensor:
        """What they write to the stream [F, S, Q or t, d]; differentiable."""
        heads = self.head
        if not engine.model.post_norm:
            # In the weights' dtype, as the model itself writes; fp32 copies of all W_O would stay in the graph.
            own = heads.to(engine.model.dtype)
            heads = torch.stack([own[:, layer] @ block.W_O for layer, block in enumerate(engine.model.blocks)], 1).to(heads.dtype)
        both = torch.cat((heads, self.mlp[:, :, None]), 2).flatten(1, 2)  # [F, L (H + 1), Q, d]
        table = torch.cat((self.input[:, None], both), 1)
        if table.shape[2] == 1:
            return table
        return table[:, :, torch.arange(1, n_tokens + 1, device=table.device).clamp(max=table.shape[2] - 1)]


class Replacements:
    """Replacement values of one ablation type for the prompts of one split.

    Args:
        start: constants of `mean`-like types, or those that fits start from; see `starting_constants`.
    """

    def __init__(self, engine: Engine, ablation: EdgeAblation, examples: Examples, start: Constants, seed: int = 0):
        self.engine, self.ablation, self.examples, self.seed = engine, ablation, examples, seed
        self.start = start
        self.per_prompt = ablation in PER_PROMPT
        self._fixed = None if self.per_prompt else start.writes(engine, examples.prompts.n_tokens)

    def of(self, chosen: Tensor, draw: int = 0) -> Tensor:
        """[1, S, Q, d] constants, or [n, S, t, d] for the chosen prompts [n]; `draw` numbers independent resamples."""
        if self._fixed is not None:
            return self._fixed
        examples, device = self.examples, chosen.device
        if self.ablation == "counterfactual":
            return self._sources(examples.counterfactual, chosen)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + draw)
        partner = derangement(len(examples), generator).to(device)[chosen]
        places = torch.rand(len(examples), examples.prompts.n_tokens, generator=generator).to(device)[chosen]  # in [0, 1)
        places = (places * (examples.prompts.last[partner] + 1)[:, None]).long()  # [n, t] of the partner's real tokens
        values = self._sources(examples.batch, partner)
        return torch.gather(values, 2, places[:, None, :, None].expand_as(values))

    def _sources(self, batch: Batch, chosen: Tensor) -> Tensor:
        return self.engine.sources(Batch(batch.tokens[chosen], batch.lengths[chosen]))


def starting_constants(engine: Engine, ablation: EdgeAblation, statistics: Statistics, train: Batch, counterfactual: Batch) -> Constants:
    """Zeros, or means over the training prompts: pooled, positional, or positional over counterfactuals. Fits start from means."""
    kind = {"cf_mean": "cf_mean", "mean_positional": "mean_positional", "optimal_positional": "mean_positional"}.get(ablation, "mean")
    table = {"mean": statistics.mean, "mean_positional": statistics.mean_positional, "cf_mean": statistics.cf_mean}[kind]
    values = {name: (part.float() if kind != "mean" else part.float().unsqueeze(-2))[None] for name, part in table.items()}
    if engine.model.post_norm:
        # The cache has z alone, and a post-normed head's share depends on all heads of its layer.
        values["head"] = _written_means(engine, counterfactual if kind == "cf_mean" else train, statistics.shortest, kind != "mean")
    constants = Constants(values["input"], values["head"], values["mlp"])
    return Constants(*(part.zero_() for part in map(torch.clone, constants))) if ablation == "zero" else constants


def _written_means(engine: Engine, batch: Batch, shortest: int, positional: bool) -> Tensor:
    """Means of what each head writes: [1, L, H, 1 or P + 1, d]."""
    model, graph = engine.model, engine.graph
    heads = [s for layer in range(graph.n_layers) for s in range(graph.heads(layer).start, graph.heads(layer).stop)]
    total: Tensor | None = None
    count = torch.zeros(shortest + 1 if positional else 1, dtype=torch.float64, device=model.device)
    for part in batch.split(4096):
        written = engine.sources(part)[:, heads].double()  # [B, L H, t, d]
        position = torch.arange(1, written.shape[2] + 1, device=model.device)
        real = position < part.lengths[:, None]
        if positional:
            row = torch.nn.functional.one_hot(position.clamp(max=shortest), shortest + 1).double()[None] * real[..., None]  # [B, t, P + 1]
        else:
            row = (real & (position >= first_pooled(shortest))).double()[..., None]
        sums = torch.einsum("bntd,btq->nqd", written, row)
        total = sums if total is None else total + sums
        count += row.sum((0, 1))
    assert total is not None
    mean = (total / count.clamp(min=1)[:, None]).float()
    return mean.unflatten(0, (graph.n_layers, graph.n_heads))[None]


def constant_scales(model: Model, statistics: Statistics) -> Constants:
    """Root mean square standard deviation of every source, the unit of the constants' learning rate, shaped to broadcast.

    Where heads have their constants in the stream (post-norms), a z of that scale is sent through the norm of W_O's rows.
    """
    rms = {name: part.float().square().mean(-1).sqrt() for name, part in statistics.std.items()}
    head = rms["head"]  # [L, H]
    if model.post_norm:
        head = head * torch.stack([block.W_O.float().square().sum((1, 2)).div(model.d_model).sqrt() for block in model.blocks])
    return Constants(rms["input"].reshape(1, 1, 1), head[None, :, :, None, None], rms["mlp"][None, :, None, None])


def logit_difference(logits: Tensor, answers: Tensor, wrong: Tensor) -> Tensor:
    """Log odds [B] of the right answers [B, A] against the wrong ones [B, W] (padded with -1): with one of each, MIB's logit difference.

    NaN where there are no wrong answers.
    """

    def total(ids: Tensor) -> Tensor:
        return logits.gather(1, ids.clamp(min=0)).masked_fill(ids < 0, float("-inf")).logsumexp(-1)

    return torch.where((wrong >= 0).any(1), total(answers) - total(wrong), torch.nan)


def objective_losses(engine: Engine, objective: Objective, logits: Tensor, examples: Examples, prompts: Tensor) -> Tensor:
    """Loss [B] of rows with logits [B, V] on the prompts [B]: KL(clean || masked) in nats, or the logit difference lost to the circuit."""
    clean = unembed(engine.model, examples.final[prompts])
    if objective == "kl":
        return kl_divergence(clean.log_softmax(-1), logits)
    answers, wrong = examples.answers[prompts], examples.wrong[prompts]
    return logit_difference(clean, answers, wrong) - logit_difference(logits, answers, wrong)


class Gradients(NamedTuple):
    losses: Tensor  # [B]
    masks: Tensor  # [M, J, S] of the sum of losses
    constants: Tensor | None  # [F, S, Q, d]


class Passes:
    """Runs rows through the engine in parts."""

    def __init__(self, engine: Engine, examples: Examples, memory_gb: float):
        self.engine, self.examples, self.memory = engine, examples, memory_gb * 1e9
        self._most = sys.maxsize  # rows a part may have after an out-of-memory

    def gradients(
        self,
        objective: Objective,
        chosen: Tensor,
        slots: Tensor,
        masks: Tensor,
        replacement: Tensor,
        *,
        owned: bool,
        constants: bool = False,
        contrast: Tensor | None = None,
        skip_dead: bool = False,
    ) -> Gradients:
        """Losses of B rows, and the gradients of their sum.

        Args:
            chosen: [n] prompts of the split; row b has prompt chosen[slots[b]].
            masks: [M, J, S], each for B / M consecutive rows.
            replacement: [F, S, Q, d] constants, each for B / F consecutive rows; or, `owned`, [n, S, t, d] of the chosen prompts.
            constants: also their gradient.
            contrast: [n, S, t, d] as `Engine.residual` takes it.
            skip_dead: leave out what no mask uses: gradients are exact where a mask is above 0 and 0 elsewhere.
        """
        d_masks = torch.zeros_like(masks)
        d_constants = torch.zeros_like(replacement) if constants else None
        losses = masks.new_empty(len(slots))

        def part(rows: slice, of_masks: slice, of_fits: slice, keep_inputs: bool) -> None:
            own_masks = masks[of_masks].detach().requires_grad_()
            own_values = (replacement if owned else replacement[of_fits]).detach().requires_grad_(constants)
            slot = slots[rows]
            logits = self.engine.logits(
                self.examples.prompts,
                chosen[slot],
                own_masks,
                own_values,
                slot if owned else None,
                contrast=None if contrast is None else contrast[slot].transpose(0, 1).contiguous(),
                plan=self.engine.weights.plan(own_masks) if skip_dead else None,
                keep_inputs=keep_inputs,
            )
            found = objective_losses(self.engine, objective, logits, self.examples, chosen[slot])
            found.sum().backward()
            losses[rows] = found.detach()
            assert own_masks.grad is not None
            d_masks[of_masks] += own_masks.grad
            if d_constants is not None and own_values.grad is not None:
                d_constants[of_fits] += own_values.grad

        self._parts(part, len(slots), len(masks), 1 if owned else len(replacement), gradient=True)
        return Gradients(losses, d_masks, d_constants)

    def losses(self, objective: Objective, chosen: Tensor, slots: Tensor, masks: Tensor, replacement: Tensor, *, owned: bool) -> Tensor:
        """Losses [B] of B rows without gradients; arguments as `gradients`."""
        kl, logit_diff = self.measure(chosen, slots, masks, replacement, owned=owned)
        return kl if objective == "kl" else self.clean_logit_difference(chosen)[slots] - logit_diff

    @torch.no_grad()
    def measure(self, chosen: Tensor, slots: Tensor, masks: Tensor, replacement: Tensor, *, owned: bool) -> tuple[Tensor, Tensor]:
        """KL [B] in nats and logit difference [B] of B rows; arguments as `gradients`."""
        kl, logit_diff = (torch.empty(len(slots), device=masks.device) for _ in range(2))
        examples = self.examples

        def part(rows: slice, of_masks: slice, of_fits: slice, keep_inputs: bool) -> None:
            slot, own = slots[rows], masks[of_masks]
            prompts = chosen[slot]
            logits = self.engine.logits(
                examples.prompts,
                prompts,
                own,
                replacement if owned else replacement[of_fits],
                slot if owned else None,
                plan=self.engine.weights.plan(own),
            )
            kl[rows] = objective_losses(self.engine, "kl", logits, examples, prompts)
            logit_diff[rows] = logit_difference(logits, examples.answers[prompts], examples.wrong[prompts])

        self._parts(part, len(slots), len(masks), 1 if owned else len(replacement), gradient=False)
        return kl, logit_diff

    @torch.no_grad()
    def clean_logit_difference(self, chosen: Tensor) -> Tensor:
        """The clean model's logit difference [n] on the chosen prompts, from the cache."""
        examples = self.examples
        return logit_difference(unembed(self.engine.model, examples.final[chosen]), examples.answers[chosen], examples.wrong[chosen])

    def _parts(self, part: Callable[[slice, slice, slice, bool], None], B: int, M: int, n_fits: int, *, gradient: bool) -> None:
        """Call `part(rows, masks, fits, keep_inputs)` until all rows are done: whole fits at a time, else whole masks, else rows."""
        n_tokens, start = self.examples.prompts.n_tokens, 0

        def fitting(keep_inputs: bool) -> int:
            return min(self._most, int(self.memory // self.engine.row_bytes(n_tokens, gradient=gradient, keep_inputs=keep_inputs)))

        keep_inputs = fitting(True) >= min(B, ROWS_WORTH_KEEPING)
        per_fit, per_mask = B // n_fits, B // M
        # On a CPU one fit or circuit at a time: its pass leaves out all that it does not use, which others may.
        alone = (
            B if self.engine.model.device.type != "cpu" else per_fit if n_fits > 1 else per_mask if per_mask >= ROWS_WORTH_KEEPING else B
        )
        while start < B:
            most = max(1, min(alone, fitting(keep_inputs)))
            for unit, inside in ((per_fit, B), (per_mask, per_fit), (1, per_mask)):
                if unit <= most and start % unit == 0:
                    stop = min(start - start % inside + inside, start + most // unit * unit)
                    break
            try:
                part(
                    slice(start, stop),
                    slice(start // per_mask, (stop - 1) // per_mask + 1),
                    slice(start // per_fit, (stop - 1) // per_fit + 1),
                    keep_inputs,
                )
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                self._most = (stop - start) // 2
                if self._most == 0:
                    raise UserError(
                        f"out of memory with a single prompt of {n_tokens + 1} tokens in one pass; "
                        "allowed: shorter prompts, a smaller model or a device with more memory"
                    ) from None
                print(f"out of memory: going on with {self._most} rows at a time", file=sys.stderr)
                continue
            start = stop
