"""Files that one stage writes and a later one reads: tensors, JSON documents, tables and drawings.

Each carries a checksum and its provenance, and is refused if it is damaged or another model's: a flipped bit
or a file copied from another run would give a wrong number without any error. Tensors, JSON and SVG hold both
themselves; a CSV table stays plain for every other program, and has them in a hidden seal beside it, `.{name}.seal`.
(Caches: `oacore.store.writer`.)
"""

import hashlib
import json
import re
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from oacore import __version__
from oacore.errors import UserError
from oacore.store.atomic import atomic_path
from oacore.store.provenance import Provenance

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor


SCHEMA_VERSION = 1
ANY = Provenance()  # requires nothing
KEY = "sha256"
_SIGNATURE = re.compile(r"\n<!-- oacore (\{.*\}) -->\n?\Z")


def write_tensors(path: str | Path, tensors: "Mapping[str, Tensor]", provenance: Provenance) -> None:
    """Write safetensors atomically, with the provenance as JSON metadata."""
    from safetensors.torch import save_file

    ready = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    signed = _plain({"schema_version": SCHEMA_VERSION, "package_version": __version__, **provenance.facts})
    signed[KEY] = digest_of_tensors(ready, signed)
    with atomic_path(path) as temporary:
        # One entry: safetensors writes several in random order, and equal files would differ in their bytes.
        save_file(ready, temporary, metadata={"oacore": json.dumps(signed)})


def read_tensors(path: str | Path, provenance: Provenance = ANY) -> "tuple[dict[str, Any], dict[str, Tensor]]":
    """The facts and tensors that `write_tensors` wrote.

    Raises:
        UserError: the file is missing, damaged, or it belongs to something else than `provenance` requires.
    """
    return _read(path, provenance, "pt")


def read_arrays(path: str | Path, provenance: Provenance = ANY) -> "tuple[dict[str, Any], dict[str, NDArray[Any]]]":
    """The same as numpy arrays, without torch, whose import takes seconds. There is no array of bfloat16."""
    return _read(path, provenance, "numpy")


def read_tensor_facts(path: str | Path) -> dict[str, Any]:
    """The facts of what `write_tensors` wrote, without reading its tensors; {} where they can't be read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "numpy") as file:
            facts: dict[str, Any] = json.loads(file.metadata()["oacore"])
    except (OSError, SafetensorError, TypeError, KeyError, ValueError):
        return {}
    return facts


def _read(path: str | Path, provenance: Provenance, framework: str) -> tuple[dict[str, Any], dict[str, Any]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework) as file:
            facts = json.loads(file.metadata()["oacore"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        damaged = facts.pop(KEY) != digest_of_tensors(tensors, facts)
    except (OSError, SafetensorError, AttributeError, TypeError, KeyError, ValueError, RuntimeError) as error:
        raise _unreadable(path, f"can't be read as safetensors of this package: {error}") from None
    _check(path, damaged, facts, provenance)
    return facts, tensors


def write_json(path: str | Path, value: Mapping[str, Any], provenance: Provenance = ANY) -> None:
    """Write an object atomically, indented, with a final line feed; its provenance is among its keys."""
    signed = _plain({"schema_version": SCHEMA_VERSION, **provenance.facts, **value})
    signed[KEY] = digest_of_json(signed)
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(signed, indent=2) + "\n", encoding="utf-8")


def read_json(path: str | Path, provenance: Provenance = ANY) -> dict[str, Any]:
    """The object that `write_json` wrote. Raises UserError as `read_tensors` does."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
        damaged = value.pop(KEY) != digest_of_json(value)
    except (OSError, AttributeError, TypeError, KeyError, ValueError) as error:
        raise _unreadable(path, f"can't be read as JSON of this package: {type(error).__name__}: {error}") from None
    _check(path, damaged, value, provenance)
    return dict(value)


def write_table(path: str | Path, table: pd.DataFrame, provenance: Provenance) -> None:
    """Write CSV without the index, and its seal, each atomically."""
    with atomic_path(path) as temporary:
        table.to_csv(temporary, index=False)
        # Before the table's own rename: a crash in between leaves a table that its seal refuses, never one that it does
        # not cover.
        write_json(_seal(path), {"table": hashlib.sha256(temporary.read_bytes()).hexdigest()}, provenance)


def read_table(path: str | Path, provenance: Provenance = ANY, **options: Any) -> pd.DataFrame:
    """The table that `write_table` wrote; `options` are pandas's. Raises UserError as `read_tensors` does."""
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise _unreadable(path, f"can't be read: {error.strerror}") from None
    if not _seal(path).exists():  # as after `cp results/*`
        raise _unreadable(path, f"has lost its seal, {_seal(path).name}")
    facts = read_json(_seal(path))
    damaged = facts.pop("table", None) != hashlib.sha256(content).hexdigest()
    _check(path, damaged, facts, provenance)
    return pd.read_csv(BytesIO(content), **options)


def write_svg(path: str | Path, svg: str, provenance: Provenance) -> None:
    """Write a drawing atomically; checksum and provenance are a comment at its end."""
    svg = svg.rstrip("\n")
    signed = {"schema_version": SCHEMA_VERSION, **provenance.facts, KEY: hashlib.sha256(svg.encode()).hexdigest()}
    with atomic_path(path) as temporary:
        temporary.write_text(f"{svg}\n<!-- oacore {json.dumps(signed)} -->\n", encoding="utf-8")


def read_svg(path: str | Path, provenance: Provenance = ANY) -> str:
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
    _check(path, damaged, facts, provenance)
    return svg


def digest_of_file(path: str | Path) -> str:
    """sha256 of a file's bytes."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def digest_of_json(value: object) -> str:
    """sha256 of a JSON-able value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(_plain(value), sort_keys=True).encode()).hexdigest()


def digest_of_tensors(
    tensors: "Mapping[str, Tensor | NDArray[Any]]", facts: Mapping[str, Any] = MappingProxyType({})
) -> str:
    """sha256 of names, shapes, dtypes and bytes, and of the facts; the same of an array as of a tensor."""
    hashed = hashlib.sha256(digest_of_json(dict(facts)).encode())
    for name in sorted(tensors):
        value = tensors[name]
        dtype = str(value.dtype).removeprefix("torch.")
        hashed.update(f"{name} {tuple(value.shape)} torch.{dtype}\n".encode())
        hashed.update(_bytes(value))
    return hashed.hexdigest()


def _bytes(value: "Tensor | NDArray[Any]") -> memoryview:
    """The items in order; bfloat16, which numpy lacks, by its bits."""
    if not isinstance(value, np.ndarray):
        import torch

        value = value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return np.ascontiguousarray(value).reshape(-1).view(np.uint8).data


def _plain(value: Any) -> Any:
    """As JSON gives it back: tuples as lists."""
    return json.loads(json.dumps(value))


def _seal(path: str | Path) -> Path:
    path = Path(path)
    return path.with_name(f".{path.name}.seal")


def _unreadable(path: str | Path, cause: str) -> UserError:
    return UserError(f"{path}: {cause}; delete it and run the same command again")


def _check(path: str | Path, damaged: bool, facts: Mapping[str, Any], provenance: Provenance) -> None:
    if damaged:
        raise _unreadable(path, "damaged or edited, its checksum does not fit")
    for name, value in _plain({"schema_version": SCHEMA_VERSION, **provenance.required}).items():
        if facts.get(name) != value:
            raise UserError(
                f"{path}: {name} is {facts.get(name)!r}, expected {value!r}; delete it and run the same command again"
            )
