"""Read and validate a config."""

from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from pydantic import ValidationError

from oacore.config.explain import describe_error
from oacore.config.model import check_architecture, description_of, is_directory_name
from oacore.config.run import Config
from oacore.config.tasks import task_row
from oacore.config.vision import IMAGE_FILES, image_files
from oacore.config.yaml_file import read_yaml
from oacore.errors import UserError

EXISTING = {  # what else than a file a path may name
    "tasks.text.path": "file or directory",
    "vision.pretrained.images": "folder of images",
    "vision.pretrained.model": "model directory, or a Hugging Face name",
}


def parse_config(values: object) -> Config:
    """Validate a parsed YAML tree.

    Raises:
        UserError: one line per problem: key path, value found, what is allowed, nearest match; also for files and
            architectures that can be seen to be wrong without loading a model.
    """
    if not isinstance(values, dict):
        raise UserError(
            f"config: {values!r} is not a mapping of keys to values (allowed keys: {', '.join(Config.model_fields)})"
        )
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        details = error.errors()
        # A list with a bad item is also reported as too short, after the item was dropped: name the item only.
        blamed = {detail["loc"][:-1] for detail in details}
        lines = [
            f"  {describe_error(detail)}"
            for detail in details
            if not (detail["type"] == "too_short" and detail["loc"] in blamed)
        ]
        raise UserError("config is not valid\n" + "\n".join(lines)) from None
    _check_model(config)
    _check_paths(config)
    _check_images(config)
    _check_packages(config)
    _check_members(config)
    return config


def load_config(path: str | Path) -> Config:
    """Read and validate a YAML config file.

    Raises:
        UserError: as `read_yaml` and `parse_config`.
    """
    return parse_config(read_yaml(path))


def _check_model(config: Config) -> None:
    if config.is_demo:
        return
    for name, task in config.tasks.selected().items():
        row = task_row(name)
        if row.file and getattr(task, row.file_key) is None:
            raise UserError(
                f"config is not valid\n  tasks.{name}.{row.file_key}: missing; only the demo model has {name} of its "
                f"own; allowed: {row.file}"
            )
    if not is_directory_name(config.model):
        return
    directory = Path(config.model).expanduser()
    if not directory.is_dir():
        raise UserError(
            f"model: {config.model!r} is not a directory; allowed: demo, demo-trained, a Hugging Face name, or an "
            "existing model directory"
        )
    check_architecture(config.model, description_of(directory))


def _check_paths(config: Config) -> None:
    for key, path in input_files(config):
        if not path.exists():
            kind = EXISTING.get(key, "file")
            raise UserError(f"{key}: {str(path)!r} does not exist; allowed: an existing {kind}")


def _check_images(config: Config) -> None:
    pretrained = config.vision.pretrained if config.vision is not None else None
    if config.vision is None or pretrained is None:
        return
    there, asked = len(image_files(pretrained.images)), config.vision.splits
    if there < sum(asked.values()):
        raise UserError(
            f"vision.images: {sum(asked.values())} in all splits; allowed: as many as {str(pretrained.images)!r} "
            f"has: {there} ({', '.join(IMAGE_FILES)})"
        )


class Compared(NamedTuple):
    """A finished run of `compare:`."""

    file: Path
    config: Config


def compared_runs(config: Config) -> dict[str, Compared]:
    """The finished runs that a config compares itself with, by their names.

    Raises:
        UserError: a config is not valid, or two are of one name.
    """
    runs: dict[str, Compared] = {}
    for file in config.compare:
        try:
            other = load_config(file)
        except UserError as error:
            raise UserError(f"compare: {file}: {error}") from None
        if other.run in runs:
            raise UserError(f"compare: {file}: a second run {other.run!r}; allowed: each `run:` once")
        runs[other.run] = Compared(file, other)
    return runs


def _check_packages(config: Config) -> None:
    if config.vision is not None and (
        missing := [name for module, name in config.vision.packages.items() if find_spec(module) is None]
    ):
        raise UserError(
            f"vision: {' and '.join(missing)} can't be imported; allowed: without this section, or after "
            "`pip install 'oacore[vision]'`"
        )


def _check_members(config: Config) -> None:
    """Each member of a study as a config of its own."""
    for name, values in config.of_members().items():
        try:
            member = parse_config(values)
        except UserError as error:
            message = str(error).removeprefix("config is not valid\n").strip()
            lines = "\n".join(f"  study.models.{name}.{line.strip()}" for line in message.splitlines())
            raise UserError(f"config is not valid\n{lines}") from None
        if missing := [task for task in config.study_tasks() if task not in member.ablation_tasks()]:
            raise UserError(
                f"config is not valid\n  study.models.{name}.ablation.tasks: without {', '.join(missing)}; allowed: "
                "with all tasks of the study"
            )


def input_files(config: Config) -> list[tuple[str, Path]]:
    """The user's files that a config names, with their keys."""
    tasks = [
        (f"tasks.{name}.{key}", getattr(task, key, None))
        for name, task in config.tasks.selected().items()
        for key in [task_row(name).file_key]
    ]
    truth = config.lenses.truthfulness if config.lenses is not None else None
    datasets = [("lenses.truthfulness.datasets", path) for path in (truth.datasets or () if truth is not None else ())]
    pretrained = config.vision.pretrained if config.vision is not None else None
    of_vision = [("vision.pretrained.images", pretrained.images)] if pretrained is not None else []
    if pretrained is not None and is_directory_name(pretrained.model):
        of_vision.append(("vision.pretrained.model", Path(pretrained.model).expanduser()))
    compared = [("compare", path) for path in config.compare]
    return [(key, path) for key, path in [*tasks, *datasets, *of_vision, *compared] if path is not None]
