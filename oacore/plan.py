"""What a run would compute that no run before it has, and how long that will take, without computing it: `python -m
oacore plan`.

Every stage that keeps items is run as far as the first that is not in the store; until there it only reads, and what it
writes goes to a folder that is thrown away.
"""

import importlib
import io
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path

from oacore.config.run import Config
from oacore.estimate.table import duration
from oacore.jobs import DRAWING, STAGES, Files, files_of, planned
from oacore.store.items import NotStoredError, only_looking
from oacore.store.layout import Layout
from oacore.store.locks import CACHE_STAGES

MEMBER = "study_member"  # a run of its own, whose jobs are spoken of
# What reads the store first and then computes. Stages of the cache make their files whole; those that draw take seconds
# and are not spoken of.
WITH_ITEMS = tuple(stage for stage in STAGES if stage not in (*CACHE_STAGES, *DRAWING))


@dataclass(frozen=True)
class Step:
    """One job of a run.

    Args:
        job: stage and what it is run for.
        says: what is new, or what has to come first.
        n_new: items to compute; None where that is not known yet.
        seconds: that these take; None where nothing like them is in the store.
    """

    job: str
    says: str
    n_new: int | None = 0
    seconds: float | None = 0.0


def plan(config: Config) -> list[Step]:
    """The jobs of a config that keep items, and those before them that have not run yet."""
    with tempfile.TemporaryDirectory() as folder:
        return list(_steps(config, Path(folder)))


def _steps(config: Config, folder: Path) -> Iterator[Step]:
    layout = Layout(config)
    coming = dict[Path, str]()  # files that are not known yet, and the job that makes them
    made = dict[Path, Path]()  # files that the store gives, and where they lie for now
    members = config.members()
    for stage, wildcards in planned(config):
        if stage == MEMBER:
            steps = list(_steps(members[wildcards["member"]], folder))
            yield from (replace(step, job=f"{wildcards['member']}: {step.job}") for step in steps)
            made_by_it = files_of(layout, stage, **wildcards)[1].every()
            if any(step.n_new != 0 for step in steps) or not all(path.exists() for path in made_by_it):
                coming |= dict.fromkeys(made_by_it, f"{stage} {wildcards['member']}")
            continue
        (inputs, outputs), job = files_of(layout, stage, **wildcards), " ".join([stage, *wildcards.values()])
        if stage not in WITH_ITEMS and (stage not in CACHE_STAGES or all(path.exists() for path in outputs.every())):
            continue
        if first := next((coming[path] for path in inputs.every() if path in coming), None):
            step = Step(job, f"known after {first}", None)
        elif stage in CACHE_STAGES:
            step = Step(job, "to be made", None)
        else:
            elsewhere = {path: folder / path.absolute().relative_to("/") for path in outputs.every()}
            step = _looked(config, stage, job, _moved(inputs, made), _moved(outputs, elsewhere), wildcards)
            made |= elsewhere
        if step.n_new != 0:
            coming |= dict.fromkeys(outputs.every(), job)
        yield step


def _moved(files: Files, places: Mapping[Path, Path]) -> Files:
    """The same files, some of them elsewhere."""
    return Files({name: [str(places.get(Path(path), path)) for path in paths] for name, paths in files.named().items()})


def _looked(config: Config, stage: str, job: str, inputs: Files, outputs: Files, wildcards: Mapping[str, str]) -> Step:
    """What the stage finds in the store."""
    run = importlib.import_module(f"oacore.stages.{stage}").run
    try:
        with only_looking(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            run(config, inputs, outputs, **wildcards)
    except NotStoredError as new:
        return Step(job, new.said, new.n_new, new.seconds)
    return Step(job, "all is in the store")


def shown(steps: list[Step]) -> str:
    """A line for each job, and a sum."""
    width = max((len(step.job) for step in steps), default=0)
    lines = [f"{step.job:{width}}  {step.says}{_time(step)}" for step in steps]
    n_new, later = sum(step.n_new or 0 for step in steps), sum(step.n_new is None for step in steps)
    seconds, untimed = sum(step.seconds or 0 for step in steps), sum(step.seconds is None for step in steps)
    total = f"{_count(n_new, 'new item')}, at least {duration(seconds)}" if n_new else "nothing new"
    if untimed:
        total += f" and the time of {_count(untimed, 'job')} with nothing alike in the store"
    return "\n".join([*lines, total + (f"; known later: {_count(later, 'job')}" if later else "")])


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}{'s' * (n != 1)}"


def _time(step: Step) -> str:
    if not step.n_new:
        return ""
    # At least: what is found first is measured afterwards.
    return f"; at least {duration(step.seconds)}" if step.seconds is not None else "; time unknown"
