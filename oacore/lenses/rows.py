"""Cached rows that lenses read: residuals, attention outputs and targets."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from oacore.draws import uploaded
from oacore.engine.clean import Batch, clean_pass
from oacore.engine.forward import at, attention_write, final_norm
from oacore.models.weights import Model
from oacore.store.provenance import Provenance
from oacore.store.reader import Reader, to_torch


@dataclass(frozen=True)
class LensRows:
    """Rows of one split on the model's device."""

    residual: Tensor  # [B, L, d] entering each block
    attention: Tensor  # [B, L, d] what each block's attention wrote
    target: Tensor  # [B, d] what the unembedding read

    def __len__(self) -> int:
        return len(self.target)

    def take(self, rows: slice) -> "LensRows":
        """Some of the rows."""
        return LensRows(self.residual[rows], self.attention[rows], self.target[rows])

    @classmethod
    def joined(cls, parts: "Sequence[LensRows]") -> "LensRows":
        """All rows of some parts."""
        arrays = zip(*((part.residual, part.attention, part.target) for part in parts), strict=True)
        return cls(*map(torch.cat, arrays))

    def in_batches(self, size: int) -> "Iterator[LensRows]":
        """All rows in order, so many at a time."""
        return (self.take(slice(first, first + size)) for first in range(0, len(self), size))


class FitRows(NamedTuple):
    """What fits read of some rows."""

    residual: Tensor  # [B, L, d]
    target: Tensor  # [B, d]


PARTS = ("residual", "attention", "final")  # as the cache has them
FITTED_ON = ("residual", "final")


@dataclass(frozen=True)
class RowCache:
    """A task's cache of rows.

    Every method raises UserError if the file is damaged, or of another model or other prompts.
    """

    path: Path
    provenance: Provenance
    device: torch.device | str = "cpu"

    def read(self, split: str, most: int | None = None) -> LensRows:
        """All rows of a split, or the first `most`."""
        with Reader(self.path, self.provenance) as reader:
            arrays = {f"{split}/{name}": reader[f"{split}/{name}"][:most] for name in PARTS}
            return LensRows(*_on_device(reader, arrays, self.device))

    def shuffled(self, size: int, seed: int) -> "ShuffledRows":
        """Random batches of the training rows."""
        return ShuffledRows(self, size, seed)

    @torch.no_grad()
    def attention_moments(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation [L, d] of what attention wrote, over the training rows."""
        first = second = torch.zeros(())
        count = 0
        with Reader(self.path, self.provenance) as reader:
            stored = reader["train/attention"]
            for array in reader.batches("train/attention", 4096):
                values = to_torch(array, stored.bfloat16).double()
                first, second, count = first + values.sum(0), second + values.square().sum(0), count + len(values)
        mean = first / count
        std = (second / count - mean.square()).clamp(min=0).sqrt()
        return mean.float().to(self.device), std.float().to(self.device)

    def attention_of_some(self, most: int, seed: int) -> Tensor:
        """What attention wrote in random training rows, at most so many, in their order: [n, L, d], on the CPU."""
        with Reader(self.path, self.provenance) as reader:
            stored = reader["train/attention"]
            order = torch.randperm(len(stored), generator=torch.Generator().manual_seed(seed))[:most].sort().values
            return torch.cat([to_torch(stored[int(row) : int(row) + 1], stored.bfloat16) for row in order])


class ShuffledRows:
    """Random batches of the training rows for a fit, every row once an epoch, read ahead from disk; step n is the same
    whenever it is asked for. A context manager: leaving it closes the file.
    """

    def __init__(self, cache: RowCache, size: int, seed: int):
        self.reader, self.size, self.seed = Reader(cache.path, cache.provenance), size, seed
        self.names = [f"train/{name}" for name in FITTED_ON]
        self.per_epoch = -(-len(self.reader[self.names[0]]) // size)
        self.next_step, self.batches = -1, iter(())

    def at(self, step: int) -> FitRows:
        """The batch of a step, on the CPU; steps in order are a stream."""
        if step != self.next_step or step % self.per_epoch == 0:
            epoch, index = divmod(step, self.per_epoch)
            self.batches = self.reader.shuffled(self.names, self.size, self.seed * 1_000_003 + epoch)
            for _ in range(index):  # after a restart
                next(self.batches)
        self.next_step = step + 1
        return FitRows(*_on_device(self.reader, next(self.batches), "cpu"))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.reader.close()


def _on_device(reader: Reader, arrays: Mapping[str, Any], device: torch.device | str) -> Iterator[Tensor]:
    return (uploaded(to_torch(array, reader[name].bfloat16), device) for name, array in arrays.items())


@torch.no_grad()
def rows_of(model: Model, batch: Batch) -> LensRows:
    """Run the model on prompts that are not cached, and keep what lenses read at the last position."""
    clean = clean_pass(model, batch.tokens, batch.lengths)
    last = [at(entering, clean.last)[:, 0] for entering in clean.entering]
    written = [
        attention_write(model, layer, at(combined, clean.last))[:, 0] for layer, combined in enumerate(clean.combined)
    ]
    return LensRows(torch.stack(last[:-1], 1), torch.stack(written, 1), final_norm(model, last[-1]))
