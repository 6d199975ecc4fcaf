"""Fits on disk, written one way: what was fitted, by name, and how each fit came to it; as items of the store, and as
the files of a run.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from oacore.errors import UserError
from oacore.fits.descent import EACH, Descent
from oacore.store.artefacts import read_tensors, write_tensors
from oacore.store.items import Item
from oacore.store.provenance import Provenance

RECORD = (*EACH[1:], "curve_steps", "curve_losses")


def items_of_fits(descent: Descent, groups: Sequence[Sequence[int]]) -> list[Item]:
    """The fits of a descent as items, each of some of its rows, as if these had been alone."""
    return [_item(descent.take(rows)) for rows in groups]


def _item(alone: Descent) -> Item:
    points = int((alone.curve_steps <= alone.n_steps.max().cpu()).sum())
    curves = {"curve_steps": alone.curve_steps[:points], "curve_losses": alone.curve_losses[:points]}
    return Item({name: getattr(alone, name) for name in EACH} | curves)


def descent_of(items: Sequence[Item]) -> Descent:
    """The fits of several items of equal settings as one descent, on the CPU: shorter curves stay where they ended."""
    longest = max((item.tensors["curve_steps"] for item in items), key=len)
    losses = []
    for item in items:
        curve = item.tensors["curve_losses"]
        losses.append(torch.cat((curve, curve[-1:].expand(len(longest) - len(curve), -1))))
    each = {name: torch.cat([item.tensors[name] for item in items]) for name in EACH}
    return Descent(curve_steps=longest, curve_losses=torch.cat(losses, 1), **each)


def recorded(values: Mapping[str, Tensor], descent: Descent) -> dict[str, Tensor]:
    """What was fitted, by the names that readers ask for, and as `fit.*` the record of the n fits."""
    return {**values, **{f"fit.{name}": getattr(descent, name) for name in RECORD}}


def write_fits(path: str | Path, tensors: Mapping[str, Tensor], names: Sequence[str], provenance: Provenance) -> None:
    """Write fits.

    Args:
        tensors: as `recorded` gives them.
        names: of the n fits, in the order of the record.
    """
    write_tensors(path, tensors, provenance.noting(fits=list(names)))


def read_fitted(path: str | Path, wanted: Sequence[str] | None, provenance: Provenance) -> dict[str, Tensor]:
    """The fitted tensors by name; all of them if none are named.

    Raises:
        UserError: the file is damaged, belongs to something else, or lacks a name.
    """
    _, tensors = read_tensors(path, provenance)
    fitted = {name: value for name, value in tensors.items() if not name.startswith("fit.")}
    if missing := [name for name in wanted or () if name not in fitted]:
        raise UserError(
            f"{path}: nothing fitted for {', '.join(missing[:5])}; delete it and run the same command again"
        )
    return {name: fitted[name] for name in (fitted if wanted is None else wanted)}
