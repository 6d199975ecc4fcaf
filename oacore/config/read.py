"""Read and validate a config."""

import math
from collections.abc import Hashable
from pathlib import Path
from typing import IO, Any

import yaml
from pydantic import ValidationError

from oacore.config.explain import describe_error
from oacore.config.model import check_architecture, is_directory_name
from oacore.config.run import Config
from oacore.config.tasks import TASKS
from oacore.errors import UserError

MERGE = "tag:yaml.org,2002:merge"
LARGEST_TREE = 100_000  # values of a config: a few aliases of aliases make billions


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
    return config


def load_config(path: str | Path) -> Config:
    """Read and validate a YAML config file.

    Raises:
        UserError: as `read_yaml` and `parse_config`.
    """
    return parse_config(read_yaml(path))


def read_yaml(path: str | Path) -> object:
    """The values of a YAML file.

    Raises:
        UserError: it can't be read, is not YAML, gives a key twice, is nested too deeply, or its aliases make it larger
            than `LARGEST_TREE` values.
    """
    try:
        with open(path, encoding="utf-8") as file:
            return _parsed(file)
    except OSError as error:
        raise UserError(f"config file {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"config file {path}: not UTF-8 text") from None
    except yaml.YAMLError as error:
        raise UserError(f"config file {path}: not valid YAML: {error}") from None
    except RecursionError:
        raise UserError(f"config file {path}: nested too deeply") from None


class _UniqueKeys(yaml.SafeLoader):
    """Refuses a key that is given twice, of which YAML's own loaders take the second without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: dict[Hashable, yaml.Node] = {}
        for key, _ in node.value:
            if key.tag == MERGE:  # `<<`, whose keys may come again
                continue
            name = self.construct_object(key, deep=True)
            if isinstance(name, Hashable) and (first := seen.setdefault(name, key)) is not key:
                raise yaml.constructor.ConstructorError(
                    f"{name!r} is first given", first.start_mark, "and here once more; allowed: once", key.start_mark
                )
        return super().construct_mapping(node, deep)


def _parsed(file: IO[str]) -> object:
    loader = _UniqueKeys(file)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        if _size(node, {}) > LARGEST_TREE:
            raise yaml.YAMLError(f"more than {LARGEST_TREE} values, aliases counted as often as they stand there")
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _size(node: yaml.Node, known: dict[int, float]) -> float:
    """How many values a node stands for, its aliases written out; infinite if it holds itself."""
    if id(node) not in known:
        known[id(node)] = math.inf
        inner = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
        parts = [] if isinstance(node, yaml.ScalarNode) else inner
        known[id(node)] = 1 + sum(_size(part, known) for part in parts)
    return known[id(node)]


def _check_model(config: Config) -> None:
    if config.is_demo:
        return
    for name, task in config.tasks.selected().items():
        if TASKS[name].file and getattr(task, "path", None) is None:
            raise UserError(
                f"config is not valid\n  tasks.{name}.path: missing; only the demo model has {name} of its own; "
                f"allowed: {TASKS[name].file}"
            )
    if not is_directory_name(config.model):
        return
    directory = Path(config.model).expanduser()
    if not directory.is_dir():
        raise UserError(
            f"model: {config.model!r} is not a directory; allowed: demo, demo-trained, a Hugging Face name, or an "
            "existing model directory"
        )
    check_architecture(config.model, directory / "config.json")


def _check_paths(config: Config) -> None:
    for key, path in input_files(config):
        if not path.exists():
            folder = " or directory" if key == "tasks.text.path" else ""
            raise UserError(f"{key}: {str(path)!r} does not exist; allowed: an existing file{folder}")


def input_files(config: Config) -> list[tuple[str, Path]]:
    """The user's files that a config names, with their keys."""
    tasks = [(f"tasks.{name}.path", getattr(task, "path", None)) for name, task in config.tasks.selected().items()]
    truth = config.lenses.truthfulness if config.lenses is not None else None
    datasets = [("lenses.truthfulness.datasets", path) for path in (truth.datasets or () if truth is not None else ())]
    return [(key, path) for key, path in [*tasks, *datasets] if path is not None]
