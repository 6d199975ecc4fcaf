"""What lies in a cache, who needs it, and its removal: nothing else ever deletes.

Beside its first output every job leaves the names of the items that it asked for, `.{output}.items.json`. A config
needs those of its run, its tasks' folders and its model's; what no config of a list needs can go.
"""

import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
    runs: tuple[str, ...]  # of the list, that need it

    @property
    def needed(self) -> bool:
        """Whether some run of the list does."""
        return bool(self.runs)

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
    with_members = [each for config in configs for each in (config, *config.members().values())]
    layouts, runs = [Layout(config) for config in with_members], dict[str | Path, list[str]]()

    def needs(layout: Layout, things: Iterable[str | Path]) -> None:
        for thing in dict.fromkeys(things):
            runs.setdefault(thing, []).append(layout.config.run)

    for layout in layouts:
        lists = list(Path(layout.results_dir).rglob(f".*{NEEDED}"))
        if not lists:
            raise UserError(f"{layout.results_dir}: no list of what it needs; allowed: configs of finished runs")
        needs(layout, (name for path in lists for name in read_json(path)["items"]))
        needs(
            layout,
            [*map(Path, layout.cache_folders), *(Path(layout.task_dir(t)) for t in layout.config.tasks.selected())],
        )
    caches = dict.fromkeys(Path(layout.model_dir).parent for layout in layouts)
    return [piece for cache in caches for piece in _pieces_of(cache, {key: tuple(of) for key, of in runs.items()})]


def _pieces_of(cache: Path, runs: Mapping[str | Path, tuple[str, ...]]) -> Iterator[Piece]:
    for model in sorted(path.parent for path in cache.glob("*/model.json")):
        if model not in runs:
            yield Piece(model, model, "model and all of it", ())
            continue
        for folder in sorted(path.parent for path in model.glob("*/prompts.h5")):
            yield Piece(folder, model, f"prompts and activations of {folder.name}", runs.get(folder, ()))
        for path in sorted((model / FOLDER).rglob("*.safetensors")):
            task, kind = path.relative_to(model / FOLDER).parts[:2]
            yield Piece(path, model, f"{task} {kind}", runs.get(path.name, ()))


def table(found: Sequence[Piece]) -> str:
    """What there is by model, kind and need, and by run, what others need too and what it alone does: number, size, and
    days since the last was written.
    """
    groups: dict[tuple[str, str, bool], list[Piece]] = {}
    for piece in found:
        groups.setdefault((piece.model.name, piece.what, piece.needed), []).append(piece)
    lines = [f"{'':9} {'number':>6} {'MB':>9} {'days':>5}"]
    for (model, what, needed), group in sorted(groups.items()):
        lines.append(f"{'' if needed else 'unneeded':9} {_counted(group)}  {model} {what}")
    for run in sorted({run for piece in found for run in piece.runs}):
        of_run = [piece for piece in found if run in piece.runs]
        lines.append(f"{'':9} {_counted(of_run)}  run {run}")
        if alone := [piece for piece in of_run if len(piece.runs) == 1]:
            lines.append(f"{'':9} {_counted(alone)}  run {run} alone")
    return "\n".join(lines)


def _counted(group: Sequence[Piece]) -> str:
    size, age = sum(piece.n_bytes for piece in group) / MB, time.time() - max(piece.written for piece in group)
    return f"{len(group):6} {size:9.1f} {age / DAY:5.1f}"


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
