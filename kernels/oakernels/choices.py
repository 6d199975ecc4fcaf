"""Which backend is the fastest, by device, op and class of shapes: measured once, then known to every later process.

The file is JSON, {key: {"backend": name, "ms": {candidate: milliseconds, or null where it can't run}}}; the key names
device and versions, too. An entry is never measured again, so that a fit that is resumed runs what it began with; to
measure anew, delete the file. It is `$OAKERNELS_CHOICES`, by default oakernels/choices.json in the user's cache folder.
"""

import json
import math
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

VARIABLE = "OAKERNELS_CHOICES"


def choices_file() -> Path:
    """Where measurements are kept."""
    own = os.environ.get(VARIABLE)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return Path(own) if own else cache / "oakernels" / "choices.json"


def size_class(n: int) -> int:
    """The next power of two: sizes that a measurement stands for."""
    return 1 << max(0, n - 1).bit_length()


class Choices:
    """Measurements of a file, read when the first is asked for."""

    def __init__(self, path: Path | None = None):
        self.path = choices_file() if path is None else path
        self.used: dict[str, str] = {}  # by this process
        self._known: dict[str, Any] | None = None

    def backend(self, key: str) -> str | None:
        """The fastest backend, if it was measured."""
        if self._known is None:
            self._known = self._read()
        if key not in self._known:
            return None
        self.used[key] = self._known[key]["backend"]
        return self.used[key]

    def measured(self, key: str, milliseconds: dict[str, float]) -> None:
        """Keep a measurement, infinite where a candidate can't run; what another process has kept meanwhile stays. Of
        equally fast ones "eager" is taken.
        """
        fastest = min(milliseconds, key=lambda name: (milliseconds[name], name != "eager"))
        ms = {name: round(value, 4) if math.isfinite(value) else None for name, value in milliseconds.items()}
        self._known = {key: {"backend": fastest, "ms": ms}} | (self._known or {}) | self._read()
        self._write()

    def _read(self) -> dict[str, Any]:
        try:
            return dict(json.loads(self.path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            print(f"warning: {self.path}: not readable, measuring anew: {error}", file=sys.stderr)
            return {}

    def _write(self) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=self.path.parent, prefix=".choices-")
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(self._known, file, indent=1, sort_keys=True)
            os.replace(name, self.path)
        except OSError as error:
            print(f"warning: {self.path}: not written, the next run measures again: {error}", file=sys.stderr)
