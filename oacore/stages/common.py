"""What stages share: the gated model, the facts that every artefact records, and JSON on disk."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from oacore.ablation import Component, components_of
from oacore.checkpoint import atomic_path
from oacore.config import Config
from oacore.errors import UserError
from oacore.layout import Layout
from oacore.model import Loaded, Model, load

SCHEMA_VERSION = 1  # of model.json


def write_json(path: str | Path, value: object) -> None:
    """Atomically, indented, with a final line feed."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def write_table(path: str | Path, table: pd.DataFrame) -> None:
    """Atomically, as CSV without the index."""
    with atomic_path(path) as temporary:
        table.to_csv(temporary, index=False)


def need(path: str | Path, stage: str) -> Path:
    """The path of an earlier stage's file.

    Raises:
        UserError: it is missing; names the stage that writes it.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: missing; run the stage `{stage}` first")
    return path


def model_facts(layout: Layout) -> dict[str, Any]:
    """The content of model.json."""
    facts: dict[str, Any] = json.loads(need(layout.model_json, "model").read_text(encoding="utf-8"))
    return facts


def gated_model(config: Config, layout: Layout) -> Loaded:
    """The model that passed the parity gate, and no other.

    Raises:
        UserError: the weights have changed since the gate.
    """
    facts = model_facts(layout)
    torch.set_num_threads(config.limits.threads)
    loaded = load(layout.source, revision=facts["revision"] or config.revision, dtype=config.dtype, device=config.device)
    if loaded.weight_hash != facts["model_hash"]:
        raise UserError(
            f"model: {layout.source!r} has the weight hash {loaded.weight_hash[:12]}, but {layout.model_json} was written for "
            f"{facts['model_hash'][:12]}; delete {layout.model_dir} if the model has really changed"
        )
    return loaded


def stamp(config: Config, layout: Layout, task: str, **more: Any) -> dict[str, Any]:
    """What every artefact of a task records about where it comes from."""
    facts = model_facts(layout)
    return {"model": facts["model"], "model_hash": facts["model_hash"], "dtype": config.dtype, "task": task, "seed": config.seed, **more}


def components(config: Config, model: Model) -> list[Component]:
    """What the config asks to ablate."""
    return components_of(model, config.ablation.components)
