"""The experiments as Python functions, docs/python.md: `import oacore as oa`.

A function builds the config that a YAML file would give, runs the stages that are missing, and reads their files.
"""

from oacore.api.circuits import Circuit, circuit
from oacore.api.experiments import effects, fronts, gaps, importance, lens, remove, trace
from oacore.api.model import Model, load
from oacore.api.register import register
from oacore.api.results import Drawing, Result
from oacore.api.tasks import Task, pairs, task

__all__ = [
    "Circuit", "Drawing", "Model", "Result", "Task",
    "circuit", "effects", "fronts", "gaps", "importance", "lens", "load",
    "pairs", "register", "remove", "task", "trace",
]  # fmt: skip
