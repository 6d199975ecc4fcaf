"""What circuit methods share: a task's prompts on the device, and losses of masked passes.

Rows of a pass are (fit, sample, prompt) or (circuit, prompt); `slots` says which of the chosen prompts each row has.
Rows go through the engine in parts that fit `limits.memory_gb`; an out-of-memory halves the part and goes on. Neither
changes what is computed.

Symbols: N prompts of a split, n chosen prompts, B rows, M masks, F fits, S sources, J destinations, t tokens after BOS,
P shortest prompt.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from oacore.circuits.numbers import PASS_BYTES_ON_CPU, PASS_SHARE, ROWS_WORTH_KEEPING
from oacore.config.circuits import Objective
from oacore.config.run import Limits
from oacore.engine.buffers import MaskedPrompts
from oacore.engine.clean import Batch
from oacore.engine.forward import unembed
from oacore.engine.masked import Engine
from oacore.errors import UserError, is_out_of_memory
from oacore.metrics import kl_divergence


@dataclass(frozen=True)
class Examples:
    """One split of a task on the model's device."""

    batch: Batch
    counterfactual: Batch
    prompts: MaskedPrompts
    final: Tensor  # [N, d] what the unembedding reads in the clean run, from the cache: the target distribution
    answers: Tensor  # [N, A] right next tokens, padded with -1
    wrong: Tensor  # [N, W] wrong ones, padded with -1

    def __len__(self) -> int:
        return len(self.batch)


def logit_difference(logits: Tensor, answers: Tensor, wrong: Tensor) -> Tensor:
    """Log odds [B] of the right answers [B, A] against the wrong ones [B, W] (padded with -1): with one of each, MIB's
    logit difference.

    NaN where there are no wrong answers.
    """

    def total(ids: Tensor) -> Tensor:
        return logits.gather(1, ids.clamp(min=0)).masked_fill(ids < 0, float("-inf")).logsumexp(-1)

    return torch.where((wrong >= 0).any(1), total(answers) - total(wrong), torch.nan)


def objective_losses(
    engine: Engine, objective: Objective, logits: Tensor, examples: Examples, prompts: Tensor
) -> Tensor:
    """Loss [B] of rows with logits [B, V] on the prompts [B]: KL(clean || masked) in nats, or the logit difference lost
    to the circuit.
    """
    clean = unembed(engine.model, examples.final[prompts])
    if objective == "kl":
        return kl_divergence(clean.log_softmax(-1), logits)
    answers, wrong = examples.answers[prompts], examples.wrong[prompts]
    return logit_difference(clean, answers, wrong) - logit_difference(logits, answers, wrong)


def pass_bytes(limits: Limits, device: torch.device) -> float:
    """What one masked pass may take. `auto` depends on the device alone on a CPU, whose sums round by the size of a
    part.
    """
    if limits.memory_gb != "auto":
        return limits.memory_gb * 1e9
    if device.type == "cpu":
        return PASS_BYTES_ON_CPU
    free, _ = torch.cuda.mem_get_info(device)
    return PASS_SHARE * (free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))


class Gradients(NamedTuple):
    """Losses of B rows, and the gradients of their sum in the masks and the constants."""

    losses: Tensor  # [B]
    masks: Tensor  # [M, J, S] of the sum of losses
    constants: Tensor | None  # [F, S, Q, d]


RowLosses = Callable[[Engine, Objective, Tensor, Examples, Tensor], Tensor]  # as `objective_losses`


class Passes:
    """Runs rows through the engine in parts.

    Args:
        losses_of: what a row's loss is; where another one is given, it stands wherever KL is spoken of below.
    """

    def __init__(
        self, engine: Engine, examples: Examples, memory_bytes: float, losses_of: RowLosses = objective_losses
    ):
        self.engine, self.examples, self.memory, self.losses_of = engine, examples, memory_bytes, losses_of
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
        apart: int = 1,
    ) -> Gradients:
        """Losses of B rows, and the gradients of their sum.

        Args:
            chosen: [n] prompts of the split; row b has prompt chosen[slots[b]].
            masks: [M, J, S], each for B / M consecutive rows.
            replacement: [F, S, Q, d] constants, each for B / F consecutive rows; or, `owned`, [n, S, t, d] of the
                chosen prompts.
            constants: also their gradient.
            contrast: [n, S, t, d] as `Engine.residual` takes it.
            skip_dead: leave out what no mask uses: gradients are exact where a mask is above 0 and 0 elsewhere.
            apart: that many equal runs of rows, of a fit or circuit each, whose results must not depend on the others
                to the bit: on a CPU they go through the engine one after the other.
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
            of_rows = self.losses_of(self.engine, objective, logits, self.examples, chosen[slot])
            of_rows.sum().backward()
            losses[rows] = of_rows.detach()
            assert own_masks.grad is not None
            d_masks[of_masks] += own_masks.grad
            if d_constants is not None and own_values.grad is not None:
                d_constants[of_fits] += own_values.grad

        self._parts(part, len(slots), len(masks), 1 if owned else len(replacement), apart, gradient=True)
        return Gradients(losses, d_masks, d_constants)

    def losses(
        self, objective: Objective, chosen: Tensor, slots: Tensor, masks: Tensor, replacement: Tensor, *, owned: bool
    ) -> Tensor:
        """Losses [B] of B rows without gradients; arguments as `gradients`."""
        kl, logit_diff = self.measure(chosen, slots, masks, replacement, owned=owned)
        return kl if objective == "kl" else self.clean_logit_difference(chosen)[slots] - logit_diff

    @torch.no_grad()
    def measure(
        self, chosen: Tensor, slots: Tensor, masks: Tensor, replacement: Tensor, *, owned: bool
    ) -> tuple[Tensor, Tensor]:
        """KL [B] in nats and logit difference [B] of B rows, those of each mask apart; arguments as `gradients`."""
        kl, logit_diff = (torch.empty(len(slots), device=masks.device) for _ in range(2))
        examples = self.examples

        def part(rows: slice, of_masks: slice, of_fits: slice, keep_inputs: bool) -> None:
            slot, row_masks = slots[rows], masks[of_masks]
            prompts = chosen[slot]
            logits = self.engine.logits(
                examples.prompts,
                prompts,
                row_masks,
                replacement if owned else replacement[of_fits],
                slot if owned else None,
                plan=self.engine.weights.plan(row_masks),
            )
            kl[rows] = self.losses_of(self.engine, "kl", logits, examples, prompts)
            logit_diff[rows] = logit_difference(logits, examples.answers[prompts], examples.wrong[prompts])

        self._parts(part, len(slots), len(masks), 1 if owned else len(replacement), len(masks), gradient=False)
        return kl, logit_diff

    @torch.no_grad()
    def clean_logit_difference(self, chosen: Tensor) -> Tensor:
        """The clean model's logit difference [n] on the chosen prompts, from the cache."""
        examples = self.examples
        return logit_difference(
            unembed(self.engine.model, examples.final[chosen]), examples.answers[chosen], examples.wrong[chosen]
        )

    def _parts(
        self,
        part: Callable[[slice, slice, slice, bool], None],
        B: int,
        M: int,
        n_fits: int,
        apart: int,
        *,
        gradient: bool,
    ) -> None:
        """Call `part(rows, masks, fits, keep_inputs)` until all rows are done: whole runs of rows (`apart`, or a fit's)
        at a time, else whole masks, else rows.
        """
        n_tokens, start = self.examples.prompts.n_tokens, 0

        def fitting(keep_inputs: bool) -> int:
            return min(
                self._most,
                int(self.memory // self.engine.row_bytes(n_tokens, gradient=gradient, keep_inputs=keep_inputs)),
            )

        per_fit, per_mask, per_run = B // n_fits, B // M, B // max(n_fits, apart)
        # On a CPU one run at a time: sums of products round by the size of their batch, and its pass leaves out all
        # that it does not use, which others may.
        alone = B if self.engine.model.device.type != "cpu" else per_run
        keep_inputs = fitting(True) >= min(alone, ROWS_WORTH_KEEPING)
        while start < B:
            most = max(1, min(alone, fitting(keep_inputs)))
            for unit, inside in ((per_run, B), (per_mask, per_run), (1, per_mask)):
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


def every_edge(passes: Passes) -> Tensor:
    """The mask of a run without ablations: every edge kept, [1, J, S]."""
    return (~passes.engine.no_edge).float()[None]
