"""The clean run of a batch, kept: all that ablations of any component need of the layers below it."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from oacore.draws import uploaded
from oacore.engine.forward import at, attention_write, combine_heads, embed, heads, logits_of, mlp
from oacore.models.weights import Model


@dataclass(frozen=True)
class Batch:
    """Right-padded prompts on the model's device."""

    tokens: Tensor  # [N, T]
    lengths: Tensor  # [N]

    def __len__(self) -> int:
        return len(self.tokens)

    @cached_property
    def host_lengths(self) -> NDArray[np.int64]:
        """[N], for what the host decides; asked for once, it waits for the device, and what is taken has its own."""
        lengths: NDArray[np.int64] = self.lengths.cpu().numpy()
        return lengths

    def take(self, rows: Tensor | slice) -> "Batch":
        """Some of the prompts, as wide as the longest of them.

        Args:
            rows: on the CPU, or the host waits for them.
        """
        index, host_lengths = taken(rows, self.lengths.device, self.host_lengths)
        batch = Batch(self.tokens[index][:, : host_lengths.max()], self.lengths[index])
        batch.__dict__["host_lengths"] = host_lengths
        return batch

    def split(self, tokens_per_batch: int) -> "Iterator[Batch]":
        """All prompts in order, in batches of about so many tokens."""
        size = max(1, tokens_per_batch // self.tokens.shape[1])
        for start in range(0, len(self), size):
            yield self.take(slice(start, start + size))


def taken(
    rows: Tensor | slice, device: torch.device, host_lengths: NDArray[np.int64]
) -> tuple[Tensor | slice, NDArray[np.int64]]:
    """Rows as an index on the device, and their lengths on the host."""
    if isinstance(rows, slice):
        return rows, host_lengths[rows]
    on_host = rows.cpu()
    return uploaded(on_host, device) if rows.device != device else rows, host_lengths[on_host.tolist()]


@dataclass(frozen=True)
class Clean:
    """One clean pass over a batch: all that ablations of any component need of the layers below it."""

    last: Tensor  # [B] last real position
    entering: tuple[Tensor, ...]  # per layer and one after all: residual [B, T, d]
    z: tuple[Tensor, ...]  # per layer [B, T, H, k]
    combined: tuple[Tensor, ...]  # per layer [B, T, d]: heads summed after W_O, with b_O, before any post-norm
    mlp: tuple[Tensor, ...]  # per layer [B, T, d]


@torch.no_grad()
def clean_pass(model: Model, tokens: Tensor, lengths: Tensor) -> Clean:
    """Run the model on right-padded tokens [B, T] with lengths [B]."""
    residual = embed(model, tokens)
    entering, z, combined, mlps = [residual], [], [], []
    for layer in range(model.n_layers):
        z.append(heads(model, layer, residual))
        combined.append(combine_heads(model, layer, z[-1]))
        middle = residual + attention_write(model, layer, combined[-1])
        mlps.append(mlp(model, layer, residual if model.parallel else middle))
        residual = middle + mlps[-1]
        entering.append(residual)
    return Clean(lengths - 1, tuple(entering), tuple(z), tuple(combined), tuple(mlps))


def clean_log_probs(model: Model, clean: Clean) -> Tensor:
    """The clean next-token log-probabilities at the last position: [B, V], fp32."""
    return logits_of(model, at(clean.entering[-1], clean.last)[:, 0]).log_softmax(-1)
