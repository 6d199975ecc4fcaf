"""Files that one stage writes and a later one reads: tensors, JSON documents, tables and drawings.

Each carries a checksum and the facts that say what it belongs to, and is refused if it is damaged or another model's: a flipped bit
or a file copied from another run would give a wrong number without any error. Tensors, JSON and SVG hold both themselves; a CSV
table stays plain for every other program, and has them in a hidden seal beside it, `.{name}.seal`. (Caches: `oacore.cache`.)
"""

import hashlib
import json
import re
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import pandas as pd

from oacore import __version__
from oacore.checkpoint import atomic_path
from oacore.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

Facts = Mapping[str, Any]

SCHEMA_VERSION = 1
KEY = "sha256"
_SIGNATURE = re.compile(r"\n<!-- oacore (\{.*\}) -->\n?\Z")


def write_tensors(path: str | Path, tensors: "Mapping[str, Tensor]", facts: Facts) -> None:
    """Write safetensors atomically, with the facts as JSON metadata."""
    from safetensors.torch import save_file

    ready = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    signed = _plain({"schema_version": SCHEMA_VERSION, "package_version": __version__, **facts})
    signed[KEY] = digest_of_tensors(ready, signed)
    with atomic_path(path) as temporary:
        # One entry: safetensors writes several in random order, and equal files would differ in their bytes.
        save_file(ready, temporary, metadata={"oacore": json.dumps(signed)})


def read_tensors(path: str | Path, expect: Facts | None = None) -> "tuple[dict[str, Any], dict[str, Tensor]]":
    """The facts and tensors that `write_tensors` wrote.

    Raises:
        UserError: the file is missing, damaged, or its facts are not those that `expect` names.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            facts = json.loads(file.metadata()["oacore"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        damaged = facts.pop(KEY) != digest_of_tensors(tensors, facts)
    except (OSError, SafetensorError, AttributeError, TypeError, KeyError, ValueError, RuntimeError) as error:
        raise _unreadable(path, f"can't be read as safetensors of this package: {error}") from None
    _check(path, damaged, facts, expect)
    return facts, tensors


def write_json(path: str | Path, value: Facts) -> None:
    """Write an object atomically, indented, with a final line feed."""
    signed = _plain({"schema_version": SCHEMA_VERSION, **value})
    signed[KEY] = digest(signed)
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(signed, indent=2) + "\n", encoding="utf-8")


def read_json(path: str | Path, expect: Facts | None = None) -> dict[str, Any]:
    """The object that `write_json` wrote. Raises UserError as `read_tensors` does."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
        damaged = value.pop(KEY) != digest(value)
    except (OSError, AttributeError, TypeError, KeyError, ValueError) as error:
        raise _unreadable(path, f"can't be read as JSON of this package: {type(error).__name__}: {error}") from None
    _check(path, damaged, value, expect)
    return dict(value)


def write_table(path: str | Path, table: pd.DataFrame, facts: Facts) -> None:
    """Write CSV without the index, and its seal, each atomically."""
    with atomic_path(path) as temporary:
        table.to_csv(temporary, index=False)
        # Before the table's own rename: a crash in between leaves a table that its seal refuses, never one that it does not cover.
        write_json(_seal(path), {**facts, "table": hashlib.sha256(temporary.read_bytes()).hexdigest()})


def read_table(path: str | Path, expect: Facts | None = None, **options: Any) -> pd.DataFrame:
    """The table that `write_table` wrote; `options` are pandas's. Raises UserError as `read_tensors` does."""
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise _unreadable(path, f"can't be read: {error.strerror}") from None
    facts = read_json(_seal(path))
    damaged = facts.pop("table", None) != hashlib.sha256(content).hexdigest()
    _check(path, damaged, facts, expect)
    return pd.read_csv(BytesIO(content), **options)


def write_svg(path: str | Path, svg: str, facts: Facts) -> None:
    """Write a drawing atomically; checksum and facts are a comment at its end."""
    svg = svg.rstrip("\n")
    signed = {"schema_version": SCHEMA_VERSION, **facts, KEY: hashlib.sha256(svg.encode()).hexdigest()}
    with atomic_path(path) as temporary:
        temporary.write_text(f"{svg}\n<!-- oacore {json.dumps(signed)} -->\n", encoding="utf-8")


def read_svg(path: str | Path, expect: Facts | None = None) -> str:
    """The drawing that `write_svg` wrote, without the comment. Raises UserError as `read_tensors` does."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        match = _SIGNATURE.search(text)
        if match is None:
            raise ValueError("no checksum at its end")
        svg, facts = text[: match.start()], json.loads(match[1])
        damaged = facts.pop(KEY) != hashlib.sha256(svg.encode()).hexdigest()
    except (OSError, KeyError, ValueError) as error:
        raise _unreadable(path, f"can't be read as a drawing of this package: {error}") from None
    _check(path, damaged, facts, expect)
    return svg


def digest_of_file(path: str | Path) -> str:
    """sha256 of a file's bytes."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def digest(value: object) -> str:
    """sha256 of a JSON-able value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(_plain(value), sort_keys=True).encode()).hexdigest()


def digest_of_tensors(tensors: "Mapping[str, Tensor]", facts: Facts = MappingProxyType({})) -> str:
    """sha256 of names, shapes, dtypes and bytes, and of the facts."""
    import torch

    found = hashlib.sha256(digest(dict(facts)).encode())
    for name in sorted(tensors):
        value = tensors[name]
        found.update(f"{name} {tuple(value.shape)} {value.dtype}\n".encode())
        found.update(value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def _plain(value: Any) -> Any:
    """As JSON gives it back: tuples as lists."""
    return json.loads(json.dumps(value))


def _seal(path: str | Path) -> Path:
    path = Path(path)
    return path.with_name(f".{path.name}.seal")


def _unreadable(path: str | Path, cause: str) -> UserError:
    return UserError(f"{path}: {cause}; delete it and run the same command again")


def _check(path: str | Path, damaged: bool, facts: Facts, expect: Facts | None) -> None:
    if damaged:
        raise _unreadable(path, "damaged or edited, its checksum does not fit")
    for name, value in _plain({"schema_version": SCHEMA_VERSION} | dict(expect or {})).items():
        if facts.get(name) != value:
            raise UserError(f"{path}: {name} is {facts.get(name)!r}, expected {value!r}; delete it and run the same command again")
