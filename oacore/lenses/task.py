"""One task's rows before one model, and the task's lenses: what every lens stage starts from."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from oacore.config.lenses import LENSES, Lenses, LensName, lens_and_init
from oacore.config.run import Config
from oacore.engine.prompts import batch_of
from oacore.inputs import gated_model, read_splits
from oacore.jobs import Files
from oacore.lenses.fit import load_lens
from oacore.lenses.lens import Lens, LensSources
from oacore.lenses.rows import RowCache
from oacore.models.load import Loaded
from oacore.store.artefacts import digest_of_tensors
from oacore.store.codehash import codehash
from oacore.store.provenance import Provenance
from oacore.tasks.prompts import Prompts


@dataclass(frozen=True)
class LensTask:
    """The model, a task's prompts and the cache of rows.

    Args:
        provenance: of every table of these lenses.
        files: of the fitted lenses, by name.
    """

    name: str
    loaded: Loaded
    splits: dict[str, Prompts]
    sources: LensSources
    provenance: Provenance
    files: dict[str, Path]

    @classmethod
    def open(cls, config: Config, inputs: Files, task: str, files: Iterable[Path] = ()) -> "LensTask":
        """Load the model and the prompts.

        Args:
            inputs: with `model`, `prompts` and `rows`.
            files: of fitted lenses, which are called `{lens}.safetensors` or `{lens}-{init}.safetensors`.

        Raises:
            UserError: a file is damaged or belongs to something else.
        """
        assert config.lenses is not None
        loaded = gated_model(config, inputs["model"])
        splits, provenance = read_splits(config, inputs, task)
        device = loaded.model.device
        cache, prompts = RowCache(inputs["rows"], provenance, device), batch_of(splits["train"], device)
        limit = config.limits.tokens_per_batch
        sources = LensSources(loaded.model, cache, prompts, config.lenses, config.seed, limit)
        return cls(task, loaded, splits, sources, provenance, {path.stem: path for path in files})

    @property
    def settings(self) -> Lenses:
        """The section `lenses:`."""
        return self.sources.settings

    def provenance_of_fit(self, file: str) -> Provenance:
        """What a fitted lens belongs to: beside the prompts, which of their positions, and its own name."""
        return self.provenance.requiring(positions=self.settings.positions, file=file)

    def lens(self, file: str) -> Lens:
        """A lens by the name of its file, from there if it is a fitted one.

        Raises:
            UserError: its file is damaged, or of another model or other prompts.
        """
        name, init = lens_and_init(file)
        if LENSES[name].fit:
            return load_lens(self.files[file], name, init, self.sources.model, self.provenance_of_fit(file))
        lens: Lens = LENSES[name].load().of_rows(name, self.sources)
        return lens

    def determined_by(self, lens: Lens) -> dict[str, str]:
        """What determines what a lens predicts, for items of the store."""
        return {
            "lens": f"{lens.name}-{lens.init}" if lens.init else lens.name,
            "values": digest_of_tensors(lens.values),
            "code of the lens": codehash(LENSES[lens.name].module),
        }

    def lenses(self, names: Iterable[LensName]) -> dict[str, Lens]:
        """Every lens of these names by its file, those that have inits with each."""
        return {file: self.lens(file) for file in self.settings.files(names)}
