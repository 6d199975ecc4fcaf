"""What stages share: the gated model, a task's prompts, and the facts that every artefact records and every reader expects."""

from pathlib import Path
from typing import Any

import torch

from oacore.ablation import Component, components_of
from oacore.activations import read_prompts
from oacore.artefacts import digest_of_file, read_json
from oacore.config import Config
from oacore.errors import UserError
from oacore.layout import SPLITS, Layout
from oacore.model import Loaded, Model, load
from oacore.tasks.prompts import Prompts


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
    return read_json(need(layout.model_json, "model"))


def model_source(layout: Layout) -> str:
    """What to load the model and its data from: a directory or a hub name.

    Raises:
        UserError: a file of the demo model is damaged.
    """
    if layout.config.model == "demo":
        folder = need(layout.demo_model, "demo")
        for name, found in read_json(folder / "training.json")["files"].items():
            if not (folder / name).exists() or digest_of_file(folder / name) != found:
                raise UserError(f"{folder / name}: missing, damaged or edited, its checksum does not fit; delete {folder} to train anew")
    return layout.source


def origin(layout: Layout, task: str) -> dict[str, Any]:
    """What every file of a task belongs to, and every reader of one expects: the model and the task's settings, by its folder's name."""
    return {"model_hash": model_facts(layout)["model_hash"], "task": task, "task_folder": Path(layout.task_dir(task)).name}


def stamp(config: Config, layout: Layout, task: str) -> dict[str, Any]:
    """What every artefact of a task records about where it comes from."""
    return {"model": model_facts(layout)["model"], "dtype": config.dtype, "seed": config.seed, **origin(layout, task)}


def read_splits(config: Config, layout: Layout, task: str) -> tuple[dict[str, Prompts], dict[str, Any]]:
    """A task's prompts by split, and what every file computed from them is expected to record."""
    path, expect = need(layout.prompts(task), "prompts"), origin(layout, task)
    splits = {split: read_prompts(path, split, expect) for split in SPLITS}
    return splits, expect | {"prompts_hash": {split: prompts.digest() for split, prompts in splits.items()}}


def gated_model(config: Config, layout: Layout) -> Loaded:
    """The model that passed the parity gate, and no other.

    Raises:
        UserError: the weights have changed since the gate.
    """
    facts = model_facts(layout)
    torch.set_num_threads(config.limits.threads)
    loaded = load(model_source(layout), revision=facts["revision"] or config.revision, dtype=config.dtype, device=config.device)
    if loaded.weight_hash != facts["model_hash"]:
        raise UserError(
            f"model: {layout.source!r} has the weight hash {loaded.weight_hash[:12]}, but {layout.model_json} was written for "
            f"{facts['model_hash'][:12]}; delete {layout.model_dir} if the model has really changed"
        )
    return loaded


def components(config: Config, model: Model) -> list[Component]:
    """What the config asks to ablate."""
    return components_of(model, config.ablation.components)
