"""A model's canonical weights on disk, as the parity gate has passed them: one safetensors file that is mapped into
memory, so that a stage neither imports transformers nor reads what it does not use.
"""

import json
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from oacore.errors import UserError
from oacore.models.weights import Block, Model, Norm, Rotary, named_tensors
from oacore.store.atomic import atomic_path
from oacore.store.fingerprint import fingerprint

_CLASSES = {kind.__name__: kind for kind in (Model, Block, Norm, Rotary)}
_CLASS, _TENSOR = "class", "tensor"


def write_model(path: str | Path, model: Model) -> None:
    """Write a model; tensors that share their memory, as tied embeddings do, are written once."""
    from safetensors.torch import save_file

    first: dict[tuple[int, torch.Size], str] = {}
    names = {
        name: first.setdefault((tensor.data_ptr(), tensor.shape), name) for name, tensor in named_tensors(model).items()
    }
    tensors = {name: tensor for name, tensor in named_tensors(model).items() if names[name] == name}
    with atomic_path(path) as temporary:
        metadata = {"oacore": json.dumps(_structure(model, "", names))}  # one entry: several come in random order
        save_file({name: tensor.cpu() for name, tensor in tensors.items()}, temporary, metadata=metadata)


def read_model(path: str | Path, digest: str) -> Model:
    """A model on the CPU.

    Args:
        digest: of the file, by `fingerprint`.

    Raises:
        UserError: the file is missing, damaged or edited.
    """
    from safetensors import safe_open

    if not Path(path).is_file():
        raise UserError(f"{path}: missing; run the same command again")
    try:
        if fingerprint(path) != digest:
            raise UserError(f"{path}: damaged or edited, its checksum does not fit; delete it and run again")
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            model: Model = _built(json.loads(file.metadata()["oacore"]), tensors)
    except OSError as error:
        raise UserError(f"{path}: can't be read: {error.strerror}; run the same command again") from None
    return model


def _structure(value: Any, path: str, names: dict[str, str]) -> Any:
    """A dataclass tree as JSON, its tensors by name."""
    if isinstance(value, Tensor):
        return {_TENSOR: names[path]}
    if isinstance(value, tuple):
        return [_structure(item, f"{path}.{index}", names) for index, item in enumerate(value)]
    if is_dataclass(value):
        inner = {
            field.name: _structure(getattr(value, field.name), f"{path}.{field.name}".lstrip("."), names)
            for field in fields(value)
        }
        return {_CLASS: type(value).__name__} | inner
    return value


def _built(value: Any, tensors: dict[str, Tensor]) -> Any:
    """What `_structure` was made of."""
    if isinstance(value, list):
        return tuple(_built(item, tensors) for item in value)
    if isinstance(value, dict):
        if _TENSOR in value:
            return tensors[value[_TENSOR]]
        kind = _CLASSES[value[_CLASS]]
        return kind(**{name: _built(item, tensors) for name, item in value.items() if name != _CLASS})
    return value
