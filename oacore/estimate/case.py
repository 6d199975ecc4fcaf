"""One config before one model: what all formulas start from."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from oacore.config.circuits import CircuitMethod
from oacore.config.model import SHIPPED_DEMO
from oacore.config.run import Config
from oacore.config.tasks import Pairs, Text, task_row
from oacore.estimate.need import Parts
from oacore.estimate.passes import statistics_bytes
from oacore.estimate.sizes import Sizes
from oacore.tasks import pairs, text
from oacore.tasks.counts import FileSizes
from oacore.tasks.prompts import SPLITS


@dataclass(frozen=True)
class Case:
    """One config before one model.

    Args:
        gpu: jobs run on a GPU, else on the CPU, where passes take one fit or circuit at a time.
        memory_bytes: of the device, 0 where unknown.
    """

    config: Config
    sizes: Sizes
    gpu: bool
    memory_bytes: float = 0.0

    @property
    def tokens_per_batch(self) -> int:
        """The most tokens of one batch."""
        return self.config.limits.tokens_per_batch

    @cached_property
    def _files(self) -> dict[str, FileSizes]:
        """What the files of the user's own tasks have, and a text of which shares are wanted."""
        found = {}
        for name, task in self.config.tasks.selected().items():
            if isinstance(task, Pairs):
                found[name] = pairs.sizes(task, name, self.config.seed)
            elif isinstance(task, Text) and any(not isinstance(getattr(task, f"n_{split}"), int) for split in SPLITS):
                found[name] = text.sizes(task, task.path or SHIPPED_DEMO / task_row(name).demo_file)
        return found

    def prompt_tokens(self, task: str) -> int:
        """T of a task's longest prompt, as its settings, its file or else its row says."""
        if task in self._files:
            return self._files[task].longest
        return int(getattr(self.config.tasks.selected()[task], "n_tokens", task_row(task).prompt_tokens))

    def n_prompts(self, task: str) -> tuple[int, int, int]:
        """Train, validation, test; of a file of facts, which may have fewer, at most."""
        settings: Any = self._files.get(task, self.config.tasks.selected()[task])
        return settings.n_train, settings.n_validation, settings.n_test

    def at_once(self, n: int, T: int) -> int:
        """How many of n prompts of T tokens go into one batch."""
        return min(n, max(1, self.tokens_per_batch // T))

    def held(self, task: str) -> Parts:
        """What a stage of a task holds throughout."""
        return {
            "weights": self.sizes.weights_bytes,
            "constants": statistics_bytes(self.sizes, self.prompt_tokens(task)),
        }

    def n_circuits(self, method: CircuitMethod) -> int:
        """Circuits of one method: one for each knob and seed."""
        assert self.config.circuits is not None
        return len(self.config.circuits.knobs(method)) * len(self.config.circuits.seeds)
