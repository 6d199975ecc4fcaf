"""What the pipeline keeps in HDF5 per model and task: the prompts, and what later stages need of the model's clean runs on them.

`activations.h5` holds, per split, `final` [N, d], what the unembedding reads at the last position (the clean target distribution
without the vocabulary), `residual` [N, L, d], what enters each block there, and `attention` [N, L, d], what each block's attention adds;
and under `statistics` the moments of every source over the training prompts. The model runs once per prompt, whatever experiments follow.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from oacore.ablation import Batch, Clean, Statistics, clean_pass, first_pooled
from oacore.cache import Reader, Writer, to_torch
from oacore.forward import at, attention_write, final_norm, unembed
from oacore.model import Model
from oacore.progress import progress
from oacore.tasks.prompts import Prompts

ARRAYS = ("tokens", "lengths", "counterfactual", "answers", "wrong_answers", "subject", "continuation")
KINDS = ("input", "head", "mlp")  # the sources of the residual graph


def write_prompts(path: str | Path, splits: dict[str, Prompts], metadata: dict[str, Any]) -> None:
    """Store all splits of a task; `metadata` gains each split's hash and counts."""
    hashes = {split: prompts.digest() for split, prompts in splits.items()}
    counts = {split: {"n_prompts": len(prompts.tokens), **prompts.meta} for split, prompts in splits.items()}
    with Writer(path, {**metadata, "prompts_hash": hashes, "counts": counts}) as writer:
        for split, prompts in splits.items():
            for name in ARRAYS:
                writer.put(f"{split}/{name}", getattr(prompts, name))
            writer.put(f"{split}/text", prompts.text)


def read_prompts(path: str | Path, split: str, expect: dict[str, Any] | None = None) -> Prompts:
    """One split of a task's prompts.

    Raises:
        UserError: the file is damaged or does not hold what `expect` says.
    """
    with Reader(path, expect) as reader:
        arrays = {name: reader[f"{split}/{name}"][:] for name in ARRAYS}
        text = reader[f"{split}/text"][:]
        meta = reader.metadata["counts"][split]
        return Prompts(task=reader.metadata["task"], split=split, text=text, meta=meta, **arrays)


def read_facts(path: str | Path, expect: dict[str, Any]) -> dict[str, Any]:
    """A file's metadata: what it belongs to and, for prompts, `counts` per split and an `example`."""
    with Reader(path, expect) as reader:
        return dict(reader.metadata)


def batch_of(prompts: Prompts, device: torch.device | str = "cpu", *, counterfactual: bool = False) -> Batch:
    """The prompts, or their counterfactuals, as tensors."""
    tokens = torch.from_numpy(prompts.counterfactual if counterfactual else prompts.tokens).long()
    return Batch(tokens.to(device), torch.from_numpy(prompts.lengths).long().to(device))


class Moments:
    """Running sums, in float64, of what a batch of clean runs computes; position 0 (BOS) is in no pool."""

    def __init__(self, shortest: int):
        self.shortest = shortest
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, Tensor] = {}

    def add(self, name: str, values: Sequence[Tensor], lengths: Tensor) -> None:
        """Add values, one tensor [B, T, ...] per layer, on prompts of `lengths` [B].

        Layer by layer: float64 copies of all at once were 2.3 times the clean pass that they are taken from.
        """
        n_tokens = values[0].shape[1]
        position = torch.arange(n_tokens, device=values[0].device)
        real = position < lengths[:, None]  # [B, T]
        pool = (real & (position >= first_pooled(self.shortest))).flatten().double()  # [B T]
        table = torch.nn.functional.one_hot(position.clamp(max=self.shortest), self.shortest + 1)  # [T, P + 1]
        rows = (table * real[..., None]).flatten(0, 1).double()  # [B T, P + 1]
        sums = []
        for layer in values:
            wide = layer.double().flatten(0, 1).flatten(1)  # [B T, w]
            sums.append((rows.T @ wide, pool @ wide, pool @ wide.square()))
        counts = (rows.sum(0), pool.sum(), pool.sum())
        for kind, totals, count in zip(("positional", "mean", "second_moment"), zip(*sums, strict=True), counts, strict=True):
            self._sum(f"{name}/{kind}", torch.cat(totals, -1), count)

    def _sum(self, name: str, total: Tensor, count: Tensor) -> None:
        self.sums[name] = self.sums[name] + total if name in self.sums else total
        self.counts[name] = self.counts[name] + count if name in self.counts else count

    def mean(self, name: str, shape: Sequence[int] = (-1,)) -> Tensor:
        """A pooled mean, reshaped to `shape`."""
        return (self.sums[name] / self.counts[name]).float().reshape(*shape)

    def positional(self, name: str, shape: Sequence[int]) -> Tensor:
        """A positional table as [*shape[:-1], P + 1, shape[-1]]; its last row is the pooled mean where no prompt is longer than P."""
        counts = self.counts[f"{name}/positional"][:, None]
        table = torch.where(counts > 0, self.sums[f"{name}/positional"] / counts.clamp(min=1), self.mean(f"{name}/mean").double())
        return table.float().reshape(-1, *shape).movedim(0, -2)

    def std(self, name: str, shape: Sequence[int]) -> Tensor:
        """The standard deviation of the pool, from float64 sums: the square of the mean cancels most digits of the second moment."""
        pool = self.counts[f"{name}/mean"]
        mean, second = self.sums[f"{name}/mean"] / pool, self.sums[f"{name}/second_moment"] / pool
        return (second - mean.square()).clamp(min=0).sqrt().float().reshape(*shape)


def _add_sources(moments: Moments, clean: Clean, lengths: Tensor, prefix: str = "") -> None:
    moments.add(f"{prefix}input", clean.entering[:1], lengths)
    moments.add(f"{prefix}head", clean.z, lengths)
    moments.add(f"{prefix}mlp", clean.mlp, lengths)


def write_activations(
    path: str | Path, model: Model, splits: dict[str, Prompts], metadata: dict[str, Any], *, tokens_per_batch: int = 16384
) -> None:
    """Run the model once on every prompt and store what later stages read."""
    moments = Moments(int(splits["train"].lengths.min()))
    with Writer(path, metadata) as writer, progress(what="activations", unit="prompts", total=sum(map(_size, splits.values()))) as bar:
        for split, prompts in splits.items():
            for part, other in zip(
                batch_of(prompts, model.device).split(tokens_per_batch),
                batch_of(prompts, model.device, counterfactual=True).split(tokens_per_batch),
                strict=True,
            ):
                _write_last(writer, split, model, part, moments if split == "train" else None)
                if split == "train":
                    _add_sources(moments, clean_pass(model, other.tokens, other.lengths), other.lengths, "cf_")
                bar.update(len(part))
        _put_statistics(writer, model, moments)


def _write_last(writer: Writer, split: str, model: Model, part: Batch, moments: Moments | None) -> None:
    """One batch; its clean pass is freed on return, before the next one's."""
    clean = clean_pass(model, part.tokens, part.lengths)
    last = [at(residual, clean.last) for residual in clean.entering]  # L + 1 of [B, 1, d]
    writer.append(f"{split}/final", final_norm(model, last[-1])[:, 0])
    writer.append(f"{split}/residual", torch.cat(last[:-1], 1))
    added = [attention_write(model, layer, at(combined, clean.last)) for layer, combined in enumerate(clean.combined)]
    writer.append(f"{split}/attention", torch.cat(added, 1))
    if moments is not None:
        _add_sources(moments, clean, part.lengths)
        moments.add("token_embedding", [model.W_E[part.tokens] * model.embed_scale], part.lengths)
        moments.add("residual", clean.entering[:-1], part.lengths)


def write_every_position(
    path: str | Path, model: Model, splits: dict[str, Prompts], metadata: dict[str, Any], *, tokens_per_batch: int = 16384
) -> None:
    """Store `residual`, `attention` and `final` per split with a row for every token but BOS, prompt by prompt."""
    total = sum(map(_size, splits.values()))
    with Writer(path, metadata) as writer, progress(what="activations at every position", unit="prompts", total=total) as bar:
        for split, prompts in splits.items():
            for part in batch_of(prompts, model.device).split(tokens_per_batch):
                _write_all(writer, split, model, part)
                bar.update(len(part))


def _write_all(writer: Writer, split: str, model: Model, part: Batch) -> None:
    """One batch, as `_write_last`."""
    clean = clean_pass(model, part.tokens, part.lengths)
    position = torch.arange(part.tokens.shape[1], device=model.device)
    real = (position > 0) & (position < part.lengths[:, None])  # [B, T]
    residual = torch.stack([entering[real] for entering in clean.entering], 1)  # [rows, L + 1, d]
    added = [attention_write(model, layer, combined[real]) for layer, combined in enumerate(clean.combined)]
    writer.append(f"{split}/residual", residual[:, :-1].contiguous())
    writer.append(f"{split}/attention", torch.stack(added, 1))
    writer.append(f"{split}/final", final_norm(model, residual[:, -1]))


def _size(prompts: Prompts) -> int:
    return len(prompts.tokens)


def _put_statistics(writer: Writer, model: Model, moments: Moments) -> None:
    n_layers, d = model.n_layers, model.d_model
    shapes = {"input": (d,), "head": (n_layers, model.n_heads, model.d_head), "mlp": (n_layers, d)}
    writer.put("statistics/shortest", np.array([moments.shortest]))
    for kind, shape in shapes.items():
        tables = {
            "mean": moments.mean(f"{kind}/mean", shape),
            "std": moments.std(kind, shape),
            "mean_positional": moments.positional(kind, shape),
            "cf_mean": moments.positional(f"cf_{kind}", shape),
        }
        for name, table in tables.items():
            writer.put(f"statistics/{kind}/{name}", table.cpu().numpy())
    for kind, rows in {"token_embedding": (d,), "residual": (n_layers, d)}.items():
        for name in ("mean", "second_moment"):
            writer.put(f"statistics/{kind}/{name}", moments.mean(f"{kind}/{name}", rows).cpu().numpy())


def read_statistics(path: str | Path, expect: dict[str, Any] | None = None, device: torch.device | str = "cpu") -> Statistics:
    """The moments of heads and MLPs, for ablations."""
    with Reader(path, expect) as reader:
        tables = {
            name: {kind: torch.from_numpy(reader[f"statistics/{kind}/{name}"][:]).to(device) for kind in KINDS}
            for name in ("mean", "std", "mean_positional", "cf_mean")
        }
        return Statistics(shortest=int(reader["statistics/shortest"][0]), **tables)


def read_final(path: str | Path, split: str, expect: dict[str, Any] | None = None) -> Tensor:
    """What the unembedding reads [N, d] on every prompt of a split: the clean target distribution without the vocabulary."""
    with Reader(path, expect) as reader:
        stored = reader[f"{split}/final"]
        return to_torch(stored[:], stored.bfloat16)


def read_clean_log_probs(path: str | Path, model: Model, split: str, rows: slice, expect: dict[str, Any] | None = None) -> Tensor:
    """The clean target distribution [n, V] (log-probabilities, fp32) of some prompts, from the cache alone."""
    with Reader(path, expect) as reader:
        stored = reader[f"{split}/final"]
        final = to_torch(stored[rows], stored.bfloat16).to(model.device)
    return unembed(model, final).log_softmax(-1)
