"""Read a YAML file, more strictly than YAML's own loaders."""

import math
from collections.abc import Hashable
from pathlib import Path
from typing import IO, Any

import yaml

from oacore.errors import UserError

MERGE = "tag:yaml.org,2002:merge"
LARGEST_TREE = 100_000  # values of a config: a few aliases of aliases make billions


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
