"""Finished pieces of work, each in a file of its own that is named by all that determines it.

A stage asks for the items that its config wants and computes the rest as one batch, so that a longer list costs what it
adds and a shorter one nothing, and every run that shares a cache finds what others have computed: a circuit whose
lambda, seed, settings, prompts, model and code are the same is the same circuit, to the bit on a CPU.

Files appear whole, their names are their content's, and nobody ever changes one: writers need no lock.
"""

import errno
import hashlib
import json
import re
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oacore.errors import UserError
from oacore.store.artefacts import read_tensor_facts, read_tensors, write_tensors
from oacore.store.provenance import Provenance

if TYPE_CHECKING:
    from torch import Tensor

FOLDER = "items"  # of a model's shared folder
DIGITS = 32  # hex digits of a name
SHOWN = 4  # new items that a stage names
_HASH = re.compile("[0-9a-f]{10,}")


_used = set[Path]()  # by this process since the last call of `used_items`


def used_items() -> list[Path]:
    """The files of all items that were asked for since the last call, for the list that says what a run needs."""
    paths = sorted(_used)
    _used.clear()
    return paths


class NotStoredError(Exception):
    """Items that a stage would compute now, if it did not only look.

    Args:
        said: how many of how many are new, and which.
        seconds: that these will take, by what others like them took; None where there is none.
    """

    def __init__(self, said: str, n_new: int, seconds: float | None):
        super().__init__(said)
        self.said, self.n_new, self.seconds = said, n_new, seconds


_only_looks = False


@contextmanager
def only_looking() -> Iterator[None]:
    """Within, who asks for items that are not in the store gets `NotStoredError` raised, and nothing is computed."""
    global _only_looks
    _only_looks = True
    try:
        yield
    finally:
        _only_looks = False


@dataclass(frozen=True)
class Item:
    """One finished piece of work.

    Args:
        tensors: by name, on the CPU.
        facts: JSON-able, for whoever asked.
        noted: what it took: seconds, peak_mb, and the versions that computed it.
    """

    tensors: Mapping[str, "Tensor"]
    facts: Mapping[str, Any] = field(default_factory=dict)
    noted: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Items:
    """The items of one kind that a stage works on.

    Args:
        folder: where the items of the task lie.
        kind: names their folder.
        shared: JSON-able, what determines all of them; what determines one alone comes when it is asked for.
        noted: JSON-able, what is written beside a new one, for people.
    """

    folder: Path
    kind: str
    shared: Mapping[str, Any]
    noted: Mapping[str, Any] = field(default_factory=dict)

    def get(
        self,
        wanted: Sequence[Mapping[str, Any]],
        compute: Callable[[list[int]], Iterable[Item]],
        what: str = "",
    ) -> list[Item]:
        """An item for each of `wanted`, in its order.

        Args:
            wanted: what determines each of them beside `shared`; no two are equal.
            compute: (which of `wanted` are new) -> these, in order; called once, or not at all. What it yields one by
                one is stored one by one, and is there after a kill.
            what: named in the line that says how many are new; empty says nothing.
        """
        _used.update(self.path(own) for own in wanted)
        items = [self._read(own) for own in wanted]
        new = [index for index, item in enumerate(items) if item is None]
        if new and _only_looks:
            each = self._seconds_each()
            said = f"{what or self.kind}: {_counted(wanted, new)}"
            raise NotStoredError(said, len(new), None if each is None else each * len(new))
        if what:
            print(f"{what}: {_counted(wanted, new)}", flush=True)
        if new:
            begun = time.perf_counter()
            computed = compute(new)
            share = (time.perf_counter() - begun) / len(new)  # of a list; what is yielded has not begun
            begun = time.perf_counter()
            for index, item in zip(new, computed, strict=True):
                took = {"seconds": share + time.perf_counter() - begun, "peak_mb": peak_mb()}
                items[index] = self._write(wanted[index], item, took)
                begun = time.perf_counter()
        return [item for item in items if item is not None]

    def identity(self, wanted: Sequence[Mapping[str, Any]]) -> str:
        """A hash of what determines these items, for the checkpoint of the work on them."""
        return hashlib.sha256(json.dumps([self._of(own) for own in wanted], sort_keys=True).encode()).hexdigest()

    def _of(self, own: Mapping[str, Any]) -> dict[str, Any]:
        """All that determines an item, as JSON gives it back."""
        of: dict[str, Any] = json.loads(json.dumps({"kind": self.kind, **self.shared, **own}))
        return of

    def path(self, own: Mapping[str, Any]) -> Path:
        """The file of an item."""
        name = hashlib.sha256(json.dumps(self._of(own), sort_keys=True).encode()).hexdigest()[:DIGITS]
        return self.folder / self.kind / name[:2] / f"{name}.safetensors"

    def _read(self, own: Mapping[str, Any]) -> Item | None:
        """The stored item, or None. A damaged one is said to be so, and computed again."""
        path = self.path(own)
        if not path.is_file():
            return None
        try:
            written, tensors = read_tensors(path, Provenance({"of": self._of(own)}))
        except UserError as error:
            print(f"warning: {str(error).partition(';')[0]}; computing it again", file=sys.stderr, flush=True)
            return None
        return Item(tensors, written["facts"], written["noted"])

    def _seconds_each(self) -> float | None:
        """What an item took, as a median over those in the store that most of what determines these determined, too."""
        took: dict[int, list[float]] = {}
        for path in (self.folder / self.kind).rglob("*.safetensors"):
            facts = read_tensor_facts(path)
            alike = sum(facts.get("of", {}).get(name) == value for name, value in self._of({}).items())
            if "seconds" in facts.get("noted", {}):
                took.setdefault(alike, []).append(facts["noted"]["seconds"])
        return statistics.median(took[max(took)]) if took else None

    def _write(self, own: Mapping[str, Any], item: Item, took: Mapping[str, Any]) -> Item:
        """Store a new item; returns it as it would be read."""
        tensors = {name: value.detach().cpu().contiguous() for name, value in item.tensors.items()}
        whole = json.loads(json.dumps({"facts": item.facts, "noted": {**self.noted, **item.noted, **took}}))
        try:
            write_tensors(self.path(own), tensors, Provenance({"of": self._of(own)}, whole))
        except OSError as error:  # a cache that others own is read all the same
            if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
                raise
            print(f"warning: {error.filename}: not stored: {error.strerror}", file=sys.stderr, flush=True)
        return Item(tensors, whole["facts"], whole["noted"])


def _counted(wanted: Sequence[Mapping[str, Any]], new: Sequence[int]) -> str:
    """How many are new, and which, by what they have of their own."""
    if not new:
        return f"all {len(wanted)} are in the store"
    named = [name for index in new[:SHOWN] if (name := _named(wanted[index]))]
    more = [f"and {len(new) - SHOWN} more"] if named and len(new) > SHOWN else []
    return f"{len(new)} of {len(wanted)} are new{': ' if named else ''}{', '.join(named + more)}"


def _named(own: Mapping[str, Any]) -> str:
    """Numbers and words, without hashes."""
    shown = [f"{value:g}" if isinstance(value, float) else str(value) for value in own.values() if value is not None]
    return " ".join(word for word in shown if not _HASH.fullmatch(word))


def peak_mb() -> float:
    """Peak memory in MB: of the GPU where there is one in use, else of this process."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return round(torch.cuda.max_memory_allocated() / 1e6, 1)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3, 1)


def reset_peak() -> None:
    """Begin `peak_mb` anew, at what is held now; where the system does not let a process do so, it goes on."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak resident set size
