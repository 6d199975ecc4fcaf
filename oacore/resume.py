"""The state of long work in a file, so that a killed stage goes on where it was: a dictionary of tensors, and what it belongs to."""

import sys
import time
from pathlib import Path
from typing import Any

from torch import Tensor

from oacore.artefacts import read_tensors, write_tensors

State = dict[str, Tensor]
ON_HOST = ("step", "curve_steps", "curve_losses", "curve_sizes")  # parts of a fit's state that stay on the CPU
SECONDS_BETWEEN_SAVES = 60.0  # of loops whose parts are short


def save_state(path: Path, state: State, identity: str) -> None:
    """Write a state atomically."""
    write_tensors(path, state, {"identity": identity})


def load_state(path: Path | None, identity: str, device: Any) -> State | None:
    """The state that `save_state` wrote, or None if there is none or it belongs to something else. Raises UserError for a damaged one."""
    if path is None or not path.is_file():
        return None
    facts, state = read_tensors(path)
    if facts.get("identity") != identity:
        return None
    if "step" in state:
        print(f"{path}: going on at step {int(state['step'])}", file=sys.stderr)
    return {name: value.to("cpu" if name in ON_HOST else device) for name, value in state.items()}


class Kept:
    """The state of a loop, saved once a minute.

    Args:
        path: None keeps nothing.
        identity: what the state belongs to; a file with another identity is ignored.
    """

    def __init__(self, path: str | Path | None, identity: str = ""):
        self.path, self.identity = None if path is None else Path(path), identity
        self._saved = time.monotonic()

    def load(self) -> State | None:
        """What an earlier call kept, on the CPU."""
        return load_state(self.path, self.identity, "cpu")

    def save(self, state: State) -> None:
        """Keep the state if the last one is old enough."""
        if self.path is not None and time.monotonic() - self._saved >= SECONDS_BETWEEN_SAVES:
            save_state(self.path, state, self.identity)
            self._saved = time.monotonic()

    def remove(self) -> None:
        """The result is safe."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)
