"""What lies in a cache, who needs it, and its removal: nothing else ever deletes.

Beside its first output every job leaves the names of the items that it asked for, `.{output}.items.json`. A config
needs those of its run, its tasks' folders and its model's; what no config of a list needs can go.
"""

import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from oacore.config.run import Config
from oacore.errors import UserError
from oacore.store.artefacts import read_json, write_json
from oacore.store.items import FOLDER
from oacore.store.layout import Layout
from oacore.store.locks import hold

NEEDED = ".items.json"  # the end of a list's name
DAY, MB = 86_400, 1e6


def write_needed(output: Path, items: Sequence[Path]) -> None:
    """Write the list of a job's items beside its first output."""
    write_json(output.with_name(f".{output.stem}{NEEDED}"), {"items": [path.name for path in items]})


@dataclass(frozen=True)
class Piece:
    """Something in a cache that is needed or removed as a whole: an item, or the folder of a task or model."""

    path: Path
    model: Path  # folder
    what: str
    needed: bool

    @property
    def files(self) -> list[Path]:
        """All its files."""
        return [self.path] if self.path.is_file() else [path for path in self.path.rglob("*") if path.is_file()]

    @property
    def n_bytes(self) -> int:
        """Its size on disk."""
        return sum(path.stat().st_size for path in self.files)

    @property
    def written(self) -> float:
        """When the latest of its files was, in seconds."""
        return max((path.stat().st_mtime for path in self.files), default=0.0)


def pieces(configs: Sequence[Config]) -> list[Piece]:
    """All that lies in the configs' caches, and whether one of them needs it.

    Raises:
        UserError: a config has not been run, so that what it needs is not known.
    """
    layouts, items = [Layout(config) for config in configs], set[str]()
    for layout in layouts:
        lists = list(Path(layout.results_dir).rglob(f".*{NEEDED}"))
        if not lists:
            raise UserError(f"{layout.results_dir}: no list of what it needs; allowed: configs of finished runs")
        for path in lists:
            items |= set(read_json(path)["items"])
    folders = {Path(layout.model_dir) for layout in layouts}
    folders |= {Path(layout.task_dir(task)) for layout in layouts for task in layout.config.tasks.selected()}
    caches = dict.fromkeys(Path(layout.model_dir).parent for layout in layouts)
    return [piece for cache in caches for piece in _pieces_of(cache, folders, items)]


def _pieces_of(cache: Path, folders: set[Path], items: set[str]) -> Iterator[Piece]:
    for model in sorted(path.parent for path in cache.glob("*/model.json")):
        if model not in folders:
            yield Piece(model, model, "model and all of it", False)
            continue
        for folder in sorted(path.parent for path in model.glob("*/prompts.h5")):
            yield Piece(folder, model, f"prompts and activations of {folder.name}", folder in folders)
        for path in sorted((model / FOLDER).rglob("*.safetensors")):
            task, kind = path.relative_to(model / FOLDER).parts[:2]
            yield Piece(path, model, f"{task} {kind}", path.name in items)


def table(found: Sequence[Piece]) -> str:
    """What there is by model, kind and need: number, size, and days since the last was written."""
    groups: dict[tuple[str, str, bool], list[Piece]] = {}
    for piece in found:
        groups.setdefault((piece.model.name, piece.what, piece.needed), []).append(piece)
    lines = [f"{'':9} {'number':>6} {'MB':>9} {'days':>5}"]
    for (model, what, needed), group in sorted(groups.items()):
        size, age = sum(piece.n_bytes for piece in group) / MB, time.time() - max(piece.written for piece in group)
        lines.append(f"{'' if needed else 'unneeded':9} {len(group):6} {size:9.1f} {age / DAY:5.1f}  {model} {what}")
    return "\n".join(lines)


def remove(found: Sequence[Piece]) -> int:
    """Remove what is not needed; returns the bytes that were freed.

    Raises:
        UserError: a run is at work in a cache.
    """
    unneeded = [piece for piece in found if not piece.needed]
    models = dict.fromkeys(piece.model for piece in unneeded)
    locks = [hold(model / name, str(model), wait=False) for model in models for name in (".lock", ".jobs.lock")]
    freed = sum(piece.n_bytes for piece in unneeded)
    for piece in unneeded:
        if piece.path.is_dir():
            shutil.rmtree(piece.path)
        else:
            piece.path.unlink()
    for lock in locks:
        if lock is not None:
            lock.close()
    return freed
