"""Where every file of a run lies.

What runs share is named by what determines it, so equal settings find each other's files and different ones never
collide: `{cache_dir}/{model}-{hash}/{task}-{hash}/`. What one run concludes lies under `{results_dir}/{run}/`.
"""

import hashlib
import json
import re
from pathlib import Path

from oacore.config.base import Settings
from oacore.config.model import SHIPPED_DEMO, is_directory_name
from oacore.config.run import Config
from oacore.config.tasks import task_row
from oacore.store.fingerprint import fingerprint

SPLITS = ("train", "validation", "test")
WEIGHTS = "weights.safetensors"  # beside model.json
IMAGES = "images.safetensors"  # beside that of `vision:`


def short_hash(value: object) -> str:
    """Ten hex digits of a JSON-able value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:10]


def model_settings(config: Config) -> dict[str, object]:
    """What determines the model's outputs."""
    asked = {} if config.precision == "auto" else {"precision": config.precision}
    return {**_model_files(config), "dtype": config.dtype, **asked}


def _model_files(config: Config) -> dict[str, object]:
    if config.trains_demo:
        return {"demo": config.demo_model.model_dump()}
    if config.is_demo:  # training.json has the digests of the other files
        return {"shipped": fingerprint(SHIPPED_DEMO / "training.json")}
    if is_directory_name(config.model):
        return {"files": fingerprint(config.model)}
    return {"name": config.model, "revision": config.revision}


def task_settings(config: Config, task: str) -> dict[str, object]:
    """What determines a task's prompts, for a given model."""
    settings: Settings = config.tasks.selected()[task]
    values, key = settings.model_dump(), task_row(task).file_key
    if values.get(key) is not None:
        values[key] = fingerprint(values[key])
    return {"seed": config.seed, **values}


def vision_settings(config: Config) -> dict[str, object]:
    """What determines the network of `vision:` and its images."""
    assert config.vision is not None
    named, files = config.vision.pretrained, {}
    if named is not None:
        model = fingerprint(named.model) if is_directory_name(named.model) else named.model
        files = {"model": model, "folder": fingerprint(named.images)}
    return {"seed": config.seed, **config.vision.of_network(), **files}


def _name_of(model: str) -> str:
    """What a model's folder is called."""
    base = Path(model).expanduser().resolve().name if is_directory_name(model) else model
    return re.sub(r"[^\w.]+", "--", base)


def _vision_name(config: Config) -> str:
    assert config.vision is not None
    named = config.vision.pretrained
    return f"{'digits' if named is None else _name_of(named.model)}-{short_hash(vision_settings(config))}"


def circuit_file(knob: float, seed: int) -> str:
    """Name of a circuit's file in its method's folder."""
    return f"{knob:g}-s{seed}.json"


class Layout:
    """Paths of one run, as Snakemake wants them: strings relative to the working directory where the config's are.

    Args:
        prefix: goes before relative paths, as Snakemake's does where this workflow is a module of another.
    """

    def __init__(self, config: Config, prefix: str = ""):
        self.config = config
        cache, results = (
            path if path.is_absolute() or str(path).startswith("..") else f"{prefix}{path}"
            for path in (config.cache_dir, config.results_dir)
        )
        self.model_dir = f"{cache}/{_name_of(config.model)}-{short_hash(model_settings(config))}"
        self.results_dir = f"{results}/{config.run}"
        self.report = f"{self.results_dir}/report.html"
        self.model_json = f"{self.model_dir}/model.json"
        self.weights = f"{self.model_dir}/{WEIGHTS}"
        self.demo_model = f"{self.model_dir}/demo"  # where the workflow trains it; the shipped one is not there
        self.vision_dir = f"{cache}/{_vision_name(config)}" if config.vision is not None else ""
        self._task_dirs = {
            task: f"{task}-{short_hash(task_settings(config, task))}" for task in config.tasks.selected()
        }

    def task_dir(self, task: str) -> str:
        """The folder of what runs share of a task: its prompts and activations."""
        return f"{self.model_dir}/{self._task_dirs[task]}"

    def task_of(self, folder: str) -> str:
        """The task of a folder name `{task}-{hash}`."""
        return next(task for task, name in self._task_dirs.items() if name == folder)

    @property
    def task_folders(self) -> list[str]:
        """Names of the tasks' shared folders."""
        return list(self._task_dirs.values())

    def prompts(self, task: str) -> str:
        """A task's prompts."""
        return f"{self.task_dir(task)}/prompts.h5"

    def activations(self, task: str) -> str:
        """A task's clean activations at the last position."""
        return f"{self.task_dir(task)}/activations.h5"

    def lens_rows(self, task: str) -> str:
        """The cache that lenses are fitted to."""
        every = self.config.lenses is not None and self.config.lenses.positions == "all"
        return f"{self.task_dir(task)}/{'activations-all' if every else 'activations'}.h5"

    @property
    def cache_folders(self) -> list[str]:
        """The folders of models that this run reads from, or writes to: the language model's, and that of `vision:`.
        A study has none; its members have theirs.
        """
        if self.config.study is not None:
            return []
        return [self.model_dir, *([self.vision_dir] if self.vision_dir else [])]

    def cache_files(self) -> list[str]:
        """All that this run reads from, or writes to, the folder that runs share."""
        config = self.config
        if config.study is not None:
            return []
        tasks = [self.prompts(task) for task in config.tasks.selected()]
        tasks += [self.activations(task) for task in config.cached_tasks()]
        rows = [self.lens_rows(task) for task in config.lens_tasks()]
        stored = [self.weights] * config.store_weights
        rows += [self.vision_model(name) for name in ("model.json", WEIGHTS, IMAGES) if config.vision is not None]
        return [self.demo_model] * config.trains_demo + [self.model_json, *stored, *tasks, *rows]

    def ablation(self, task: str, file: str) -> str:
        """A file of a task's single-component ablation."""
        return f"{self.results_dir}/{task}/ablation/{file}"

    def circuits(self, task: str, file: str) -> str:
        """A file of a task's circuits."""
        return f"{self.results_dir}/{task}/circuits/{file}"

    def interactions(self, task: str, file: str) -> str:
        """A file of a task's effects and interactions."""
        return f"{self.results_dir}/{task}/interactions/{file}"

    def removal(self, file: str) -> str:
        """A file of behaviour removal."""
        return f"{self.results_dir}/removal/{file}"

    def lens(self, task: str, file: str) -> str:
        """A file of a task's lenses."""
        return f"{self.results_dir}/{task}/lens/{file}"

    def vision_model(self, file: str) -> str:
        """A file of the network of `vision:`, which runs share."""
        return f"{self.vision_dir}/{file}"

    def vision(self, file: str) -> str:
        """A file of the importance of that network's units."""
        return f"{self.results_dir}/vision/{file}"

    def study(self, file: str) -> str:
        """A file of a study: a table of all its members, or `{member}/{file}`."""
        return f"{self.results_dir}/study/{file}"

    def tracing(self, task: str, file: str) -> str:
        """A file of a task's causal tracing."""
        return f"{self.results_dir}/{task}/tracing/{file}"

    def constants(self, task: str, method: str) -> str:
        """The fitted constants of an ablation type."""
        return self.ablation(task, f"constants-{method}.safetensors")
