"""A task's prompts on disk."""

from pathlib import Path
from typing import Any

from oacore.store.artefacts import ANY
from oacore.store.provenance import Provenance
from oacore.store.reader import Reader
from oacore.store.writer import Writer
from oacore.tasks.prompts import Prompts

ARRAYS = ("tokens", "lengths", "counterfactual", "answers", "wrong_answers", "subject", "continuation", "cluster")


def write_prompts(path: str | Path, splits: dict[str, Prompts], provenance: Provenance) -> None:
    """Store all splits of a task; the provenance gains each split's hash and counts."""
    hashes = {split: prompts.digest() for split, prompts in splits.items()}
    counts = {split: {"n_prompts": len(prompts.tokens), **prompts.meta} for split, prompts in splits.items()}
    with Writer(path, provenance.noting(prompts_hash=hashes, counts=counts)) as writer:
        for split, prompts in splits.items():
            for name in ARRAYS:
                writer.put(f"{split}/{name}", getattr(prompts, name))
            writer.put(f"{split}/text", prompts.text)


def read_prompts(path: str | Path, split: str, provenance: Provenance = ANY) -> Prompts:
    """One split of a task's prompts.

    Raises:
        UserError: the file is damaged or does not hold what `provenance` requires.
    """
    with Reader(path, provenance) as reader:
        arrays = {name: reader[f"{split}/{name}"][:] for name in ARRAYS}
        text = reader[f"{split}/text"][:]
        meta = reader.metadata["counts"][split]
        return Prompts(task=reader.metadata["task"], split=split, text=text, meta=meta, **arrays)


def read_facts(path: str | Path, provenance: Provenance) -> dict[str, Any]:
    """A file's metadata: what it belongs to and, for prompts, `counts` per split and an `example`."""
    with Reader(path, provenance) as reader:
        return dict(reader.metadata)
