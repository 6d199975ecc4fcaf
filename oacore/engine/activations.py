"""What the pipeline keeps in HDF5 per model and task: the prompts, and what later stages need of the model's clean runs
on them.

`activations.h5` holds, per split, `final` [N, d], what the unembedding reads at the last position (the clean target
distribution without the vocabulary), `residual` [N, L, d], what enters each block there, and `attention` [N, L, d],
what each block's attention adds; and under `statistics` the moments of every source over the training prompts. The
model runs once per prompt, whatever experiments follow.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

from oacore.engine.clean import Batch, Clean, clean_pass
from oacore.engine.forward import at, attention_write, final_norm, unembed
from oacore.engine.prompts import batch_of
from oacore.engine.statistics import Moments, Statistics
from oacore.errors import UserError
from oacore.models.weights import Model
from oacore.progress import progress
from oacore.store.artefacts import ANY
from oacore.store.provenance import Provenance
from oacore.store.reader import Reader, to_torch
from oacore.store.writer import Writer
from oacore.tasks.prompts import Prompts

KINDS = ("input", "head", "mlp")  # the sources of the residual graph
COPIED_ROWS = 1024  # at a time
NOWHERE: Mapping[str, Path] = MappingProxyType({})


def find_rows(paths: Iterable[Path], provenance: Provenance) -> dict[str, Path]:
    """Splits whose rows another task folder's file has already, and that file.

    The splits of a task are drawn apart, so another number of test prompts leaves the rows of the others as they were.

    Args:
        paths: finished files of the same kind and task.
        provenance: of the file that is wanted, with `prompts_hash` by split, and with all that its rows depend on.
    """
    wanted = provenance.facts
    same = Provenance({name: value for name, value in wanted.items() if name in ("model_hash", "dtype", "made_by")})
    found: dict[str, Path] = {}
    for path in sorted(paths):
        try:
            with Reader(path, same) as reader:
                hashes = reader.metadata["prompts_hash"]
        except UserError:  # of another model, other code, or damaged: whoever needs that one will be told
            continue
        found |= {split: path for split, digest in wanted["prompts_hash"].items() if hashes.get(split) == digest}
    if found:
        print(
            f"activations: those of {', '.join(found)} are taken from {', '.join(sorted({*map(str, found.values())}))}"
        )
    return found


def _copy(writer: Writer, path: Path, group: str) -> None:
    """Append all rows of a group of another file."""
    with Reader(path) as reader:
        for name in reader.names:
            if name.startswith(f"{group}/"):
                for rows in reader.batches(name, COPIED_ROWS):
                    writer.append(name, to_torch(rows, reader[name].bfloat16))


def _add_sources(moments: Moments, clean: Clean, lengths: Tensor, prefix: str = "") -> None:
    moments.add(f"{prefix}input", clean.entering[:1], lengths)
    moments.add(f"{prefix}head", clean.z, lengths)
    moments.add(f"{prefix}mlp", clean.mlp, lengths)


def write_activations(
    path: str | Path,
    model: Model,
    splits: dict[str, Prompts],
    provenance: Provenance,
    *,
    tokens_per_batch: int = 16384,
    known: Mapping[str, Path] = NOWHERE,
) -> None:
    """Run the model once on every prompt and store what later stages read.

    Args:
        known: as `find_rows` gives it; these splits are copied.
    """
    moments = Moments(int(splits["train"].lengths.min()))
    new = {split: prompts for split, prompts in splits.items() if split not in known}
    with (
        Writer(path, provenance) as writer,
        progress(what="activations", unit="prompts", total=sum(map(_size, new.values()))) as bar,
    ):
        for split, prompts in splits.items():
            if split in known:
                _copy(writer, known[split], split)
                continue
            for part, other in zip(
                batch_of(prompts, model.device).split(tokens_per_batch),
                batch_of(prompts, model.device, counterfactual=True).split(tokens_per_batch),
                strict=True,
            ):
                _write_last(writer, split, model, part, moments if split == "train" else None)
                if split == "train":
                    _add_sources(moments, clean_pass(model, other.tokens, other.lengths), other.lengths, "cf_")
                bar.update(len(part))
        if "train" in known:
            _copy(writer, known["train"], "statistics")
        else:
            _put_statistics(writer, model, moments)


@torch.no_grad()
def statistics_of(model: Model, batch: Batch, tokens_per_batch: int = 16384) -> Statistics:
    """The pooled moments over some prompts, without tables by position."""
    moments = Moments(int(batch.lengths.min()))
    for part in batch.split(tokens_per_batch):
        _add_sources(moments, clean_pass(model, part.tokens, part.lengths), part.lengths)
    shapes = _shapes(model)
    return Statistics(
        moments.shortest,
        {name: moments.mean(f"{name}/mean", shape) for name, shape in shapes.items()},
        {name: moments.std(name, shape) for name, shape in shapes.items()},
        {},
        {},
    )


def _shapes(model: Model) -> dict[str, tuple[int, ...]]:
    """Of what each kind of source computes, over all layers."""
    n_layers, d = model.n_layers, model.d_model
    return {"input": (d,), "head": (n_layers, model.n_heads, model.d_head), "mlp": (n_layers, d)}


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
    path: str | Path,
    model: Model,
    splits: dict[str, Prompts],
    provenance: Provenance,
    *,
    tokens_per_batch: int = 16384,
    known: Mapping[str, Path] = NOWHERE,
) -> None:
    """Store `residual`, `attention` and `final` per split with a row for every token but BOS, prompt by prompt; `known`
    as in `write_activations`.
    """
    total = sum(_size(prompts) for split, prompts in splits.items() if split not in known)
    with (
        Writer(path, provenance) as writer,
        progress(what="activations at every position", unit="prompts", total=total) as bar,
    ):
        for split, prompts in splits.items():
            if split in known:
                _copy(writer, known[split], split)
                continue
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
    shapes = _shapes(model)
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


def read_statistics(path: str | Path, provenance: Provenance = ANY, device: torch.device | str = "cpu") -> Statistics:
    """The moments of heads and MLPs, for ablations."""
    with Reader(path, provenance) as reader:
        tables = {
            name: {kind: torch.from_numpy(reader[f"statistics/{kind}/{name}"][:]).to(device) for kind in KINDS}
            for name in ("mean", "std", "mean_positional", "cf_mean")
        }
        return Statistics(shortest=int(reader["statistics/shortest"][0]), **tables)


def read_final(path: str | Path, split: str, provenance: Provenance = ANY) -> Tensor:
    """What the unembedding reads [N, d] on every prompt of a split: the clean target distribution without the
    vocabulary.
    """
    with Reader(path, provenance) as reader:
        stored = reader[f"{split}/final"]
        return to_torch(stored[:], stored.bfloat16)


def read_clean_log_probs(
    path: str | Path, model: Model, split: str, rows: slice, provenance: Provenance = ANY
) -> Tensor:
    """The clean target distribution [n, V] (log-probabilities, fp32) of some prompts, from the cache alone."""
    with Reader(path, provenance) as reader:
        stored = reader[f"{split}/final"]
        final = to_torch(stored[rows], stored.bfloat16).to(model.device)
    return unembed(model, final).log_softmax(-1)
