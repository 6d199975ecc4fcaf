"""Numbers that are not finite, found without waiting for the device."""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from oacore.errors import UserError

NEVER = math.inf


class Watch:
    """Finds the first step at which a fit meets a number that is not finite, without waiting for the device at every
    step.

    Args:
        checkpoint: the fit's file, and `saved`, the step that it holds.
    """

    def __init__(self, checkpoint: Path | None, saved: int):
        self.checkpoint, self.saved = checkpoint, saved
        self._first: dict[
            str, tuple[Tensor, Tensor]
        ] = {}  # what -> steps of the first bad number (or NEVER), rows of the fit

    def see(self, what: str, values: Tensor, step: float | Tensor, rows: Tensor) -> None:
        """Values [m, ...] of the fits `rows` [m], which stay the same until the next `check`; what is noted of them is
        changed in place, for a step that a GPU replays.
        """
        finite = values.reshape(len(values), -1).isfinite().all(1)
        if what not in self._first or self._first[what][1] is not rows:
            self._first[what] = torch.full(rows.shape, NEVER, dtype=torch.float64, device=rows.device), rows
        first = self._first[what][0]
        first.copy_(torch.where(finite, first, first.clamp(max=step)))

    def check(self, names: Sequence[str], advice: str) -> None:
        """Raise UserError if anything seen since the last check was not finite."""
        bad = {what: (first, rows) for what, (first, rows) in self._first.items() if float(first.min()) < NEVER}
        if not bad:
            return
        step = min(int(first.min()) for first, _ in bad.values())
        bad_fits = {what: [names[row] for row in rows[first <= step].tolist()] for what, (first, rows) in bad.items()}
        named = "; ".join(f"{what} of {', '.join(rows)}" for what, rows in bad_fits.items() if rows)
        kept = (
            f"{self.checkpoint}, step {self.saved}"
            if self.checkpoint is not None and self.checkpoint.exists()
            else "none"
        )
        raise UserError(f"step {step}: not finite: {named}; last good checkpoint: {kept}; {advice}")
