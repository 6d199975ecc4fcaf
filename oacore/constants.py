"""Fitted constants on disk: safetensors, one tensor per component, with the fit's record and, as JSON, what it belongs to."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from oacore import __version__
from oacore.ablation import Component
from oacore.checkpoint import atomic_path
from oacore.errors import UserError
from oacore.optimal import Fit

SCHEMA_VERSION = 1
RECORD = ("validation_gap", "n_steps", "converged", "curve_steps", "curve_gaps")


def save(path: str | Path, fit: Fit, widths: Sequence[int], metadata: dict[str, Any]) -> None:
    """Write `constants.{component}` [1, w] or [P + 1, w], the fit's record as `fit.*`, and `metadata` as JSON."""
    tensors = {
        f"constants.{component.name}": fit.constants[index, :, :w].cpu().contiguous()
        for index, (component, w) in enumerate(zip(fit.components, widths, strict=True))
    }
    tensors |= {f"fit.{name}": getattr(fit, name).cpu().contiguous() for name in RECORD}
    names = [component.name for component in fit.components]
    facts = {"schema_version": SCHEMA_VERSION, "package_version": __version__, **metadata, "components": names}
    with atomic_path(path) as temporary:
        # One entry: safetensors writes several in random order, and equal fits would differ in their bytes.
        save_file(tensors, temporary, metadata={"oacore": json.dumps(facts)})


def load(path: str | Path, components: Sequence[Component], expect: dict[str, Any]) -> Tensor:
    """The constants [C, Q, W] of the components, padded with zeros to the widest.

    Raises:
        UserError: the file is damaged, of another model, task or prompts, or lacks a component.
    """
    with _open(path) as file:
        metadata = _facts(path, file)
        for name, value in expect.items():
            if metadata.get(name) != value:
                raise UserError(f"{path}: {name} is {metadata.get(name)!r}, expected {value!r}; delete the file to fit it anew")
        if missing := [item.name for item in components if item.name not in metadata["components"]]:
            raise UserError(f"{path}: no constants for {', '.join(missing)}")
        rows = [file.get_tensor(f"constants.{item.name}") for item in components]
    widest = max(row.shape[1] for row in rows)
    return torch.stack([torch.nn.functional.pad(row, (0, widest - row.shape[1])) for row in rows])


def load_curves(path: str | Path, method: str) -> pd.DataFrame:
    """The record of the convergence tests in long form: step, component, method, validation_gap_nats; a curve ends where its fit did."""
    with _open(path) as file:
        names = _facts(path, file)["components"]
        steps, gaps, ends = (file.get_tensor(f"fit.{name}") for name in ("curve_steps", "curve_gaps", "n_steps"))
    table = pd.DataFrame(gaps.numpy(), columns=names, index=pd.Index(steps.numpy(), name="step")).reset_index()
    long = table.melt("step", var_name="component", value_name="validation_gap_nats")
    end = dict(zip(names, ends.tolist(), strict=True))
    return long[long["step"] <= long["component"].map(end)].assign(method=method)


def _facts(path: str | Path, file: Any) -> dict[str, Any]:
    try:
        facts: dict[str, Any] = json.loads(file.metadata()["oacore"])
    except (TypeError, KeyError, ValueError):
        raise UserError(f"{path}: no constants of this package, or of an old version; delete the file to fit it anew") from None
    return facts


def _open(path: str | Path) -> Any:
    try:
        return safe_open(path, "pt")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: can't be read as safetensors: {error}") from None
