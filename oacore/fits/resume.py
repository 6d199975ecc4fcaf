"""The state of long work in a file, so that a killed stage goes on where it was: a dictionary of tensors, and what it
belongs to.
"""

import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from oacore.store.artefacts import read_tensors, write_tensors
from oacore.store.codehash import codehash
from oacore.store.layout import short_hash
from oacore.store.provenance import Provenance

State = dict[str, Tensor]
ON_HOST = (
    "step",
    "curve_steps",
    "curve_losses",
    "step_losses",
    "step_sizes",
)  # parts of a fit's state that stay on the CPU
SECONDS_BETWEEN_SAVES = 60.0  # of loops whose parts are short


@dataclass(eq=False)
class Resumable:
    """Where long work keeps its state until its result is safe; a context manager around work and the writing of its
    result.

    Leaving it without an exception removes the file: the result is safe. After an error, Ctrl-C or a kill it stays, and
    the next call with the same identity goes on from it. A file with another identity is ignored and written over.

    Args:
        path: None keeps nothing.
        identity: what the state belongs to.
    """

    path: Path | None = None
    identity: str = ""
    _saved: float = field(default_factory=time.monotonic)
    _parts: list["Resumable"] = field(default_factory=list)

    @classmethod
    def beside(cls, output: str | Path, provenance: Provenance, code: str, *more: Any) -> "Resumable":
        """The hidden file beside a stage's output.

        Args:
            provenance: of the output, settings of the work among what it notes.
            code: the module that does the work: its hash, and PyTorch's version, are part of the identity.
            more: JSON-able values that the work depends on beside these.
        """
        output = Path(output)
        path = output.with_name(f".{output.stem}-checkpoint.safetensors")
        return cls(path, short_hash([provenance.facts, codehash(code), torch.__version__, *more]))

    def part(self, name: str, *more: Any) -> "Resumable":
        """One of several pieces of this work, with a file of its own; it goes when the whole work is safe.

        Args:
            more: JSON-able values that the piece depends on beside what the whole does.
        """
        path = None if self.path is None else self.path.with_stem(f"{self.path.stem}-{name}")
        self._parts.append(Resumable(path, short_hash([self.identity, *more])))
        return self._parts[-1]

    def load(self, device: Any = "cpu") -> State | None:
        """The state that was saved, or None if there is none or it belongs to something else.

        Raises:
            UserError: the file is damaged.
        """
        if self.path is None or not self.path.is_file():
            return None
        facts, state = read_tensors(self.path)
        if facts.get("identity") != self.identity:
            return None
        if "step" in state:
            print(f"{self.path}: going on at step {int(state['step'])}", file=sys.stderr)
        return {name: value.to("cpu" if name in ON_HOST else device) for name, value in state.items()}

    def save(self, state: State) -> None:
        """Write the state, atomically."""
        if self.path is not None:
            write_tensors(self.path, state, Provenance(noted={"identity": self.identity}))
            self._saved = time.monotonic()

    def save_sometimes(self, state: State) -> None:
        """Write the state if the last one is old enough."""
        if self.path is not None and time.monotonic() - self._saved >= SECONDS_BETWEEN_SAVES:
            self.save(state)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._remove()

    def _remove(self) -> None:
        if self.path is not None:
            self.path.unlink(missing_ok=True)
        for part in self._parts:
            part._remove()


NOT_KEPT = Resumable()
