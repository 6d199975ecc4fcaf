"""Fitted constants on disk: safetensors, one tensor per component, with the fit's record and, as JSON, what it belongs to."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from oacore.ablation import Component
from oacore.artefacts import read_tensors, write_tensors
from oacore.errors import UserError
from oacore.optimal import Fit

RECORD = ("validation_gap", "n_steps", "converged", "curve_steps", "curve_gaps")


def save(path: str | Path, fit: Fit, widths: Sequence[int], metadata: dict[str, Any]) -> None:
    """Write `constants.{component}` [1, w] or [P + 1, w], the fit's record as `fit.*`, and `metadata` as JSON."""
    tensors = {
        f"constants.{component.name}": fit.constants[index, :, :w]
        for index, (component, w) in enumerate(zip(fit.components, widths, strict=True))
    }
    tensors |= {f"fit.{name}": getattr(fit, name) for name in RECORD}
    write_tensors(path, tensors, {**metadata, "components": [component.name for component in fit.components]})


def load(path: str | Path, components: Sequence[Component], expect: dict[str, Any]) -> Tensor:
    """The constants [C, Q, W] of the components, padded with zeros to the widest.

    Raises:
        UserError: the file is damaged, of another model, task or prompts, or lacks a component.
    """
    facts, tensors = read_tensors(path, expect)
    if missing := [item.name for item in components if item.name not in facts.get("components", ())]:
        raise UserError(f"{path}: no constants for {', '.join(missing)}; delete it and run the same command again")
    rows = [tensors[f"constants.{item.name}"] for item in components]
    widest = max(row.shape[1] for row in rows)
    return torch.stack([torch.nn.functional.pad(row, (0, widest - row.shape[1])) for row in rows])


def load_curves(path: str | Path, method: str, expect: dict[str, Any]) -> pd.DataFrame:
    """The record of the convergence tests in long form: step, component, method, validation_gap_nats; a curve ends where its fit did."""
    facts, tensors = read_tensors(path, expect)
    names = facts["components"]
    steps, gaps, ends = (tensors[f"fit.{name}"] for name in ("curve_steps", "curve_gaps", "n_steps"))
    table = pd.DataFrame(gaps.numpy(), columns=names, index=pd.Index(steps.numpy(), name="step")).reset_index()
    long = table.melt("step", var_name="component", value_name="validation_gap_nats")
    end = dict(zip(names, ends.tolist(), strict=True))
    return long[long["step"] <= long["component"].map(end)].assign(method=method)
