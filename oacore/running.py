"""Run in this process what an experiment needs and is missing or stale.

Results lie in a folder that is named by all that determines them, or whose caller removes what is not: they are
missing, or right. What runs share is named by its settings alone, so a hidden file beside each, `.{name}.code`, says
which code has made it. A file without one is Snakemake's: it is stale if the last pipeline that found the cache
complete was of other code.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from oacore.config.run import Config
from oacore.config.tasks import task_row
from oacore.jobs import files_of, planned
from oacore.runner import run_stage
from oacore.store.atomic import atomic_path
from oacore.store.codehash import codehash
from oacore.store.layout import Layout
from oacore.store.locks import CACHE_STAGES, cache_is_outdated, holding_for_pipeline, mark_cache_complete


def run_behind(config: Config, *stages: str, begin: Callable[[Layout], object] = lambda layout: None) -> Layout:
    """Run the jobs of these stages that are missing or stale, and those that they need; returns where the files are.

    The locks of a pipeline are held meanwhile.

    Args:
        begin: called first, with the locks held.

    Raises:
        UserError: as `run_stage`.
    """
    layout = Layout(config)
    with holding_for_pipeline(layout):
        begin(layout)
        for stage, wildcards in _to_run(layout, stages):
            run_stage(stage, config, **wildcards)
            if stage in CACHE_STAGES:
                with atomic_path(_note(layout, stage, wildcards)) as temporary:
                    temporary.write_text(_code_of(stage, wildcards))
        mark_cache_complete(layout)
    return layout


def _to_run(layout: Layout, stages: Sequence[str]) -> list[tuple[str, dict[str, str]]]:
    """Stage and wildcards of the jobs, in order: back from what is asked for, as far as files are missing or stale."""
    needed, jobs, stale = set[Path](), [], _stale(layout)
    for stage, wildcards in reversed(list(planned(layout.config))):
        inputs, outputs = (files.every() for files in files_of(layout, stage, **wildcards))
        asked = stage in stages or not needed.isdisjoint(outputs)
        if asked and not all(path.exists() and path not in stale for path in outputs):
            needed.update(inputs)
            jobs.append((stage, wildcards))
    return jobs[::-1]


def _stale(layout: Layout) -> set[Path]:
    """The shared files that other code has made, or that were made from such files."""
    stale, outdated = set[Path](), cache_is_outdated(layout)
    for stage, wildcards in planned(layout.config):
        if stage not in CACHE_STAGES:
            continue
        inputs, outputs = (files.every() for files in files_of(layout, stage, **wildcards))
        note = _note(layout, stage, wildcards)
        of_other_code = note.read_text() != _code_of(stage, wildcards) if note.exists() else outdated
        if of_other_code or not stale.isdisjoint(inputs):
            stale.update(outputs)
    return stale


def _note(layout: Layout, stage: str, wildcards: Mapping[str, str]) -> Path:
    main = files_of(layout, stage, **wildcards)[1].every()[0]
    return main.with_name(f".{main.name}.code")


def _code_of(stage: str, wildcards: Mapping[str, str]) -> str:
    """A hash of the code that a shared file depends on, as its rule has it."""
    return codehash(f"oacore.stages.{stage}", *(task_row(task).module for task in wildcards.values()))
