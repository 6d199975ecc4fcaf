"""What stages share: the gated model, a task's prompts, the provenance of a task's files, and its store of items.

Only what needs PyTorch imports it: that takes more than two seconds, and drawing needs none of it.
"""

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oacore.config.model import SHIPPED_DEMO
from oacore.config.run import Config
from oacore.config.tasks import task_row
from oacore.errors import UserError
from oacore.jobs import Files
from oacore.store.artefacts import digest_of_file, read_json
from oacore.store.codehash import codehash
from oacore.store.items import FOLDER, Items
from oacore.store.layout import WEIGHTS, Layout
from oacore.store.provenance import Provenance
from oacore.tasks.prompts import SPLITS, Prompts
from oacore.tasks.stored import read_prompts

if TYPE_CHECKING:
    from oacore.models.load import Loaded


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
    row, settings = task_row(task), config.tasks.selected()[task]
    if not row.file or getattr(settings, row.file_key) is not None:
        return settings
    demo_file = Path(model_source(config, model_json)) / row.demo_file
    return settings.model_copy(update={row.file_key: demo_file})


def gated_model(config: Config, model_json: Path) -> "Loaded":
    """The model that passed the parity gate, and no other: its weights as that stored them, else the source's.

    Raises:
        UserError: the weights have changed since the gate.
    """
    import torch

    from oacore.models.load import Loaded, load, pick_device, set_precision
    from oacore.models.stored import read_model
    from oacore.models.weights import to_device

    facts = read_json(model_json)
    torch.set_num_threads(config.limits.threads)
    set_precision(config.precision, device := pick_device(config.device))
    source = model_source(config, model_json)
    if config.store_weights and facts["weights"] is not None:
        model = read_model(model_json.with_name(WEIGHTS), facts["weights"])
        revision = facts["revision"] or config.revision
        return Loaded(to_device(model, device), source, revision, facts["model_hash"])
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


def provenance_of_several(config: Config, model_json: Path, name: str, tasks: Sequence[str]) -> Provenance:
    """Where the files of an experiment that reads several tasks come from; `name` stands for the task."""
    facts, layout = read_json(model_json), Layout(config)
    folders = {task: Path(layout.task_dir(task)).name for task in tasks}
    required = {"model_hash": facts["model_hash"], "task": name, "task_folders": folders}
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


def made_by(config: Config, *modules: str) -> dict[str, str]:
    """What computes: the kind of device and its precision, PyTorch's release, and the code of these modules."""
    import torch

    from oacore.models.load import pick_device, pick_precision

    device = pick_device(config.device)
    precision = pick_precision(config.precision, device)
    return {"device": device.type, "precision": precision, "torch": torch.__version__, "code": codehash(*modules)}


def items_of(
    config: Config,
    inputs: Files,
    kind: str,
    provenance: Provenance,
    splits: Sequence[str],
    modules: Sequence[str],
    **shared: Any,
) -> Items:
    """The items of one kind that a stage of a task works on.

    Whatever else, they are determined by the model, the kind of device, PyTorch, the prompts and the code: an item of
    another release of PyTorch, or of a GPU where this is a CPU, is another item. The release of transformers, which
    only loads the weights, is noted: the gate has checked what it loaded.

    Args:
        inputs: with `model`, beside which the store lies.
        provenance: as `read_splits` gives it.
        splits: whose prompts determine the items.
        modules: that compute them.
        shared: JSON-able, what else determines all of them.
    """
    required = provenance.required
    determined = {
        "model_hash": required["model_hash"],
        "dtype": config.dtype,
        **made_by(config, *modules),
        "task": required["task"],
        "prompts": {split: required["prompts_hash"][split] for split in splits},
        "seed": config.seed,
    }
    noted = {"run": config.run, "transformers": version("transformers")}
    return Items(inputs["model"].parent / FOLDER / required["task"], kind, determined | shared, noted)
