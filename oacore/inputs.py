"""What stages share: the gated model, a task's prompts, and the provenance of a task's files."""

from pathlib import Path
from typing import Any

import torch

from oacore.config.model import SHIPPED_DEMO
from oacore.config.run import Config
from oacore.config.tasks import TASKS
from oacore.engine.prompts import read_prompts
from oacore.errors import UserError
from oacore.jobs import Files
from oacore.models.load import Loaded, load
from oacore.store.artefacts import digest_of_file, read_json
from oacore.store.layout import Layout
from oacore.store.provenance import Provenance
from oacore.tasks.prompts import SPLITS, Prompts


def model_source(config: Config, model_json: Path) -> str:
    """What to load the model and its data from: a directory or a hub name. A demo model that was trained here lies
    beside model.json.

    Raises:
        UserError: a file of the demo model is missing, damaged or edited.
    """
    if not config.is_demo:
        return config.model
    folder = model_json.with_name("demo") if config.trains_demo else SHIPPED_DEMO
    mend = f"delete {folder} to train anew" if config.trains_demo else "install oacore anew"
    for name, digest in read_json(folder / "training.json")["files"].items():
        if not (folder / name).exists() or digest_of_file(folder / name) != digest:
            raise UserError(f"{folder / name}: missing, damaged or edited, its checksum does not fit; {mend}")
    return str(folder)


def settings_with_file(config: Config, model_json: Path, task: str) -> Any:
    """A task's settings with the path of its file, if it has one; the demo model comes with files of its own."""
    row, settings = TASKS[task], config.tasks.selected()[task]
    if not row.file:
        return settings
    path = getattr(settings, "path", None)
    demo_file = Path(model_source(config, model_json)) / row.demo_file
    return settings.model_copy(update={"path": demo_file if path is None else path})


def gated_model(config: Config, model_json: Path) -> Loaded:
    """The model that passed the parity gate, and no other.

    Raises:
        UserError: the weights have changed since the gate.
    """
    facts = read_json(model_json)
    torch.set_num_threads(config.limits.threads)
    source = model_source(config, model_json)
    loaded = load(source, revision=facts["revision"] or config.revision, dtype=config.dtype, device=config.device)
    if loaded.weight_hash != facts["model_hash"]:
        raise UserError(
            f"model: {source!r} has the weight hash {loaded.weight_hash[:12]}, but {model_json} was written for "
            f"{facts['model_hash'][:12]}; delete {model_json.parent} if the model has really changed"
        )
    return loaded


def provenance_of(config: Config, model_json: Path, task: str) -> Provenance:
    """Where a task's files come from: they require the model and the task's settings, by its folder's name."""
    facts = read_json(model_json)
    folder = Path(Layout(config).task_dir(task)).name
    required = {"model_hash": facts["model_hash"], "task": task, "task_folder": folder}
    return Provenance(required, {"model": facts["model"], "dtype": config.dtype, "seed": config.seed})


def read_splits(config: Config, inputs: Files, task: str) -> tuple[dict[str, Prompts], Provenance]:
    """A task's prompts by split, and the provenance of what is computed from them, which requires these prompts.

    Args:
        inputs: with `model` and `prompts`.
    """
    provenance = provenance_of(config, inputs["model"], task)
    splits = {split: read_prompts(inputs["prompts"], split, provenance) for split in SPLITS}
    return splits, provenance.requiring(prompts_hash=hashes(splits))


def hashes(splits: dict[str, Prompts]) -> dict[str, Any]:
    """The hash of each split's prompts."""
    return {split: prompts.digest() for split, prompts in splits.items()}
