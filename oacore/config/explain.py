"""Errors and keys of the config in words."""

from collections.abc import Mapping
from typing import Any, get_args

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from oacore.config.ablation import ABLATION_TYPES
from oacore.config.base import nearest
from oacore.config.circuits import CIRCUIT_METHODS, EDGE_ABLATIONS
from oacore.config.lenses import LENSES
from oacore.config.removal import REMOVAL_METHODS
from oacore.config.rows import Row
from oacore.config.run import Config
from oacore.config.study import ESTIMATORS
from oacore.config.tasks import PAIRS, TASKS, Pairs, Tasks
from oacore.config.tracing import CORRUPTIONS
from oacore.config.vision import REPLACEMENTS


def describe_error(error: ErrorDetails) -> str:
    """One line: key path, value, what is allowed, nearest match."""
    location = [part for part in error["loc"] if part not in ("tuple", "function-before")]
    path = ".".join(f"[{part}]" if isinstance(part, int) else str(part) for part in location).replace(".[", "[")
    value, kind, context = error["input"], error["type"], error.get("ctx", {})
    if kind == "extra_forbidden":
        allowed = _fields_at(location[:-1])
        own = ", or a task of your own with `pairs`" if _model_at(location[:-1]) is Tasks else ""
        return (
            f"{path}: unknown key (value {_short(value)}); allowed: "
            f"{', '.join(allowed)}{own}{nearest(location[-1], allowed)}"
        )
    if kind == "missing":
        return f"{path}: missing; allowed: {_description_at(location) or 'a value'}"
    if kind == "literal_error":
        choices = [choice.strip("'") for choice in str(context["expected"]).replace(" or ", ", ").split(", ")]
        return f"{path}: {_short(value)}; allowed: {', '.join(choices)}{nearest(value, choices)}"
    if kind == "value_error":
        message = str(context["error"])
        names_a_key = message.replace(":", ".").split(".")[0] in _fields_at(location)  # the message begins with one
        return f"{path}{'.' if names_a_key else ': '}{message}" if path else message
    if kind in ("model_type", "model_attributes_type"):
        return f"{path}: {_short(value)}; allowed: a mapping with the keys {', '.join(_fields_at(location))}"
    return f"{path}: {_short(value)}; allowed: {error['msg'].removeprefix('Input should be ')}"


def _model_at(location: list[Any]) -> type[BaseModel] | None:
    model: type[BaseModel] | None = Config
    for part in location:
        field = model.model_fields.get(part) if model and isinstance(part, str) else None
        if field is None and model is Tasks:  # a name of the user's own
            model = Pairs
            continue
        if field is None:
            return None
        candidates = (field.annotation, *get_args(field.annotation))
        model = next((kind for kind in candidates if isinstance(kind, type) and issubclass(kind, BaseModel)), None)
    return model


def _fields_at(location: list[Any]) -> list[str]:
    model = _model_at(location)
    return list(model.model_fields) if model else []


def _description_at(location: list[Any]) -> str | None:
    model = _model_at(location[:-1])
    return model.model_fields[location[-1]].description if model and location[-1] in model.model_fields else None


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def describe_fields(model: type[BaseModel] = Config, prefix: str = "") -> list[tuple[str, str, str]]:
    """(key path, default, description) of every key, for config/README.md."""
    rows: list[tuple[str, str, str]] = []
    for name, field in model.model_fields.items():
        inner = next(
            (
                kind
                for kind in (field.annotation, *get_args(field.annotation))
                if isinstance(kind, type) and issubclass(kind, BaseModel)
            ),
            None,
        )
        if inner is not None:
            rows += describe_fields(inner, f"{prefix}{name}.")
            if inner is Tasks:
                rows += describe_fields(Pairs, f"{prefix}{name}.{PAIRS.name}.")
            continue
        default = "required" if field.is_required() else _default(field.default)
        rows.append((f"{prefix}{name}", default, field.description or ""))
    return rows


def describe_names() -> list[tuple[str, str, str]]:
    """(key, name, note) of every registry row, for config/README.md."""
    registries: dict[str, Mapping[str, Row]] = {
        "tasks": {**TASKS, PAIRS.name: PAIRS},
        "ablation.methods": ABLATION_TYPES,
        "circuits.methods": CIRCUIT_METHODS,
        "circuits.ablations": EDGE_ABLATIONS,
        "removal.methods": REMOVAL_METHODS,
        "tracing.corruptions": CORRUPTIONS,
        "lenses.lenses": LENSES,
        "vision.replacements": REPLACEMENTS,
        "study.methods": ESTIMATORS,
    }
    return [(key, row.name, row.note) for key, rows in registries.items() for row in rows.values()]


def _default(value: object) -> str:
    if isinstance(value, tuple):
        return ", ".join(map(str, value))
    return "none" if value is None else str(value).replace("\n", "\\n")  # a table's row is one line
