"""Two finished runs, and what both have measured."""

from collections.abc import Iterator
from dataclasses import dataclass

import pandas as pd

from oacore.jobs import Files, files_of, planned
from oacore.store.artefacts import read_table
from oacore.store.layout import Layout


@dataclass(frozen=True)
class Runs:
    """Two finished runs, the first of which the second is compared with."""

    first: Layout
    second: Layout

    @property
    def names(self) -> tuple[str, str]:
        """What the page calls them; of one name, by their folders."""
        names = self.first.config.run, self.second.config.run
        return names if names[0] != names[1] else (self.first.results_dir, self.second.results_dir)

    def of_both(self, *stages: str) -> Iterator[tuple[dict[str, str], Files, Files]]:
        """Of each job that both have: what it was run for, and the files that it wrote for either."""
        theirs = list(planned(self.first.config))
        for stage, wildcards in planned(self.second.config):
            if stage in stages and (stage, wildcards) in theirs:
                first, second = (files_of(layout, stage, **wildcards)[1] for layout in (self.first, self.second))
                yield wildcards, first, second

    @property
    def circuit_tasks(self) -> list[str]:
        """The tasks that both have circuits of."""
        theirs = self.first.config.circuit_tasks()
        return [task for task in self.second.config.circuit_tasks() if task in theirs]

    def pareto(self, task: str) -> tuple[pd.DataFrame, pd.DataFrame]:
        """The tables of all circuits of a task, of the first run and of the second."""
        first, second = (
            pd.concat([read_table(files["pareto"]) for files in _circuits(layout, task)], ignore_index=True)
            for layout in (self.first, self.second)
        )
        return first, second


def _circuits(layout: Layout, task: str) -> Iterator[Files]:
    """What each of a run's circuit jobs of a task wrote."""
    for stage, wildcards in planned(layout.config):
        if stage == "circuits" and wildcards["task"] == task:
            yield files_of(layout, stage, **wildcards)[1]
