"""Optimal ablation for interpretability: the library under the Snakemake pipeline.

The house, from the top down; imports point down:

* `__main__`, the workflow and `api`, whose functions are this package's own (`oacore.load`, ...), are the three ways
  in; `estimate` says before what a stage will take; `sharing/` pushes and pulls finished runs
* `stages/`, one module per rule: read files, call one experiment, write files
* `runner` runs a stage by name: memory retry, signals, logs; `running`, what is missing or stale behind one
* `compare/`: two finished runs side by side
* `interactions/  removal/  study/`, the experiments that stand on `circuits/` or `ablation/`
* `ablation/  circuits/  tracing/  lenses/  vision/`, the experiments: each has its science, figures and part of
  the report, and none knows another
* `inputs`: the gated model and a task's prompts for all of them; `engine/`: clean and masked passes, statistics, parity
* `models/`: weights, hub, residual graph, demo; `tasks/`: prompts; `fits/`: descent, replayed steps, resume, record;
  `report/`: numbers, figures, page; `jobs`: every job and its files
* `store/`: artefacts with checksums and provenance, HDF5, locks, paths, code hashes
* `config/`: the settings, and the registry rows that names in them come from
* `metrics  draws  progress  errors`, and `kernels/oakernels`, which knows nothing of all this
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# In the order in which they are used. Whoever names one imports `oacore.api`; until then this package is a name.
API = (
    "register",
    "load",
    "pairs",
    "task",
    "gaps",
    "circuit",
    "fronts",
    "effects",
    "remove",
    "trace",
    "lens",
    "importance",
)


def __getattr__(name: str) -> Any:
    if name in API:
        return getattr(import_module("oacore.api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *API]
