"""The members of a study: runs of their own, where they lie, and whether what lies there is today's.

Free of torch, because the Snakefile asks for identities.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from oacore.config.ablation import ABLATION_TYPES
from oacore.config.circuits import CIRCUIT_METHODS, EDGE_ABLATIONS
from oacore.config.lenses import LENSES
from oacore.config.read import input_files
from oacore.config.removal import REMOVAL_METHODS
from oacore.config.rows import Row
from oacore.config.run import Config
from oacore.config.tasks import task_row
from oacore.config.tracing import CORRUPTIONS
from oacore.jobs import files_of, planned
from oacore.store.artefacts import digest_of_json
from oacore.store.atomic import atomic_path
from oacore.store.codehash import codehash
from oacore.store.fingerprint import fingerprint
from oacore.store.layout import Layout, model_settings, short_hash
from oacore.store.provenance import Provenance

NOT_COMPUTED = {"limits", "device", "store_weights", "cache_dir", "results_dir"}  # what decides no number
MARK = ".study"  # in a member's results folder: the identity of what lies there


def identity(member: Config) -> str:
    """A hash of the settings, and of the files and code, that decide a member's results."""
    files = {key: fingerprint(path) for key, path in input_files(member)}
    settings = [member.model_dump(mode="json", exclude=NOT_COMPUTED), model_settings(member), files]
    stages = dict.fromkeys(f"oacore.stages.{stage}" for stage, _ in planned(member))
    return short_hash([settings, codehash(*stages, *(row.module for row in _rows(member)))])


def _rows(member: Config) -> list[Row]:
    """The registry rows that the member's sections may name."""
    sections: dict[str, tuple[Row, ...]] = {
        "ablation": tuple(ABLATION_TYPES.values()),
        "circuits": (*CIRCUIT_METHODS.values(), *EDGE_ABLATIONS.values()),
        "interactions": tuple(EDGE_ABLATIONS.values()),
        "removal": (*REMOVAL_METHODS.values(), *CIRCUIT_METHODS.values(), *EDGE_ABLATIONS.values()),
        "tracing": tuple(CORRUPTIONS.values()),
        "lenses": tuple(LENSES.values()),
    }
    tasks: list[Row] = [task_row(task) for task in member.tasks.selected()]
    return tasks + [row for name, rows in sections.items() if getattr(member, name) is not None for row in rows]


def placed(config: Config, name: str, file: Path) -> Config:
    """A member's config with its folders where the study lies: under a prefix, if its workflow is a module of another.

    Args:
        file: one of the study's own files of this member, `study/{name}/...`.
    """
    member = config.members()[name]
    expected = Layout(config).study(f"{name}/{file.name}")
    layout = Layout(member, prefix=str(file).removesuffix(expected))
    folders = {"cache_dir": Path(layout.model_dir).parent, "results_dir": Path(layout.results_dir).parent}
    return member.model_copy(update=folders)


def of_all(facts: Mapping[str, Mapping[str, Any]]) -> Provenance:
    """Where tables of all members come from.

    Args:
        facts: what run.json says of each.
    """
    hashes = {name: of["model_hash"] for name, of in facts.items()}
    return Provenance({"model_hash": digest_of_json(hashes), "members": hashes})


def clear_stale(layout: Layout) -> None:
    """Remove a member's results unless they are of today's settings and code; what they were computed from, the store's
    items, stays, and so do checkpoints, which know what they belong to.
    """
    mark, own = Path(layout.results_dir) / MARK, identity(layout.config)
    if mark.exists() and mark.read_text() == own:
        return
    shared = {Path(path) for path in layout.cache_files()}
    for stage, wildcards in planned(layout.config):
        for path in files_of(layout, stage, **wildcards)[1].every():
            if path not in shared:
                path.unlink(missing_ok=True)
    with atomic_path(mark) as temporary:
        temporary.write_text(own)
