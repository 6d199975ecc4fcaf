"""What the lens stages share: the model, the cached rows, and the lenses of a task."""

from dataclasses import dataclass
from typing import Any

from oacore import lens
from oacore.config import Config, LensName
from oacore.layout import Layout
from oacore.lens import Lens
from oacore.model import Loaded
from oacore.stages.common import gated_model, need, read_splits, stamp
from oacore.tasks.prompts import Prompts


@dataclass(frozen=True)
class Setting:
    """One task's rows before one model."""

    config: Config
    layout: Layout
    task: str
    loaded: Loaded
    splits: dict[str, Prompts]
    expect: dict[str, Any]  # of the cache
    identity: dict[str, Any]

    @classmethod
    def open(cls, config: Config, task: str) -> "Setting":
        layout = Layout(config)
        loaded = gated_model(config, layout)
        splits, expect = read_splits(config, layout, task)
        assert config.lenses is not None
        identity = stamp(config, layout, task) | expect | {"positions": config.lenses.positions}
        return cls(config, layout, task, loaded, splits, expect, identity)

    @property
    def rows(self) -> str:
        """The cache of residuals."""
        need(self.layout.lens_rows(self.task), "activations")
        return self.layout.lens_rows(self.task)

    def path(self, name: str) -> str:
        return self.layout.lens(self.task, f"{name}.safetensors")

    def lens(self, name: str) -> Lens:
        """A lens by the name of its file, from there if it is a fitted one.

        Raises:
            UserError: its file is missing, damaged, or of another model or other prompts.
        """
        assert self.config.lenses is not None
        if name in self.config.lenses.fitted_files():
            expect = self.expect | {"positions": self.config.lenses.positions, "file": name}
            return lens.load(need(self.path(name), "lens_fit"), self.loaded.model, expect)
        plain: LensName = name  # type: ignore[assignment]  # what is not fitted has no init in its name
        return lens.unfitted(self.loaded.model, plain, self.rows, self.expect, self.config.seed)

    def lenses(self, names: tuple[LensName, ...]) -> list[Lens]:
        """Every lens of these kinds, the tuned one with each init."""
        assert self.config.lenses is not None
        return [self.lens(name) for name in self.config.lenses.files() if name.split("-")[0] in names]
