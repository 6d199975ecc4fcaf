"""One task's prompts before one model: what searches for circuits and their evaluation start from."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from oacore.circuits.constants import Constants, constant_scales
from oacore.circuits.passes import Examples, Passes, pass_bytes
from oacore.circuits.replacements import Replacements, TrainingPrompts, starting_constants
from oacore.config.circuits import EdgeAblation
from oacore.config.run import Config
from oacore.engine.activations import read_final, read_statistics
from oacore.engine.masked import Engine
from oacore.engine.prompts import batch_of
from oacore.engine.statistics import Statistics
from oacore.errors import UserError
from oacore.fits.record import read_fitted
from oacore.inputs import gated_model, read_splits
from oacore.jobs import Files
from oacore.models.load import pick_precision
from oacore.store.provenance import Provenance
from oacore.tasks.prompts import Prompts


@dataclass(frozen=True)
class CircuitTask:
    """The engine, and a task's splits on its device.

    Args:
        passes: by split.
        seed: of resampled replacements.
        clusters: [N], what standard errors over the test prompts are over.
        provenance: of every file that belongs to these prompts.
        fitted: the components' fitted constants, for a search that takes them.
    """

    name: str
    engine: Engine
    passes: dict[str, Passes]
    statistics: Statistics
    seed: int
    clusters: np.ndarray
    provenance: Provenance
    fitted: Path | None = None

    @classmethod
    def open(cls, config: Config, inputs: Files, task: str) -> "CircuitTask":
        """Load model, prompts and statistics.

        Args:
            inputs: with `model`, `prompts`, `activations` and, for a search, `constants`.

        Raises:
            UserError: a file is damaged or belongs to something else, or a prompt is BOS alone.
        """
        model = gated_model(config, inputs["model"]).model
        splits, provenance = read_splits(config, inputs, task)
        engine, activations = Engine(model, pick_precision(config.precision, model.device)), inputs["activations"]
        examples = {split: _examples(engine, prompts, activations, provenance) for split, prompts in splits.items()}
        memory_bytes = pass_bytes(config.limits, model.device)
        passes = {split: Passes(engine, of_split, memory_bytes) for split, of_split in examples.items()}
        statistics = read_statistics(activations, provenance, model.device)
        fitted = next(iter(inputs.all("constants")), None) if "constants" in inputs.named() else None
        clusters = splits["test"].cluster
        return cls(task, engine, passes, statistics, config.seed, clusters, provenance, fitted)

    @property
    def constant_scales(self) -> Constants:
        """The unit of the constants' learning rate."""
        return constant_scales(self.engine.model, self.statistics)

    def start(self, ablation: EdgeAblation) -> Constants:
        """What constants of an ablation type are, or what their fits start from."""
        train = self.passes["train"].examples
        prompts = TrainingPrompts(self.engine, self.statistics, train.batch, train.counterfactual)
        return starting_constants(ablation, prompts)

    def component_constants(self, ablation: EdgeAblation) -> Constants:
        """For searches that judge edges without training constants: each component's own, where these were fitted."""
        start = self.start(ablation)
        if self.fitted is None:
            return start
        model, graph = self.engine.model, self.engine.graph
        fitted = read_fitted(self.fitted, graph.source_names[1:], self.provenance.requiring(method=ablation))
        layers = [list(fitted.values())[graph.first_source(n) - 1 : graph.mlp_source(n)] for n in range(graph.n_layers)]
        head = torch.stack([torch.stack(parts[:-1]) for parts in layers])[None].to(model.device)  # [1, L, H, Q, k]
        mlp = torch.stack([parts[-1] for parts in layers])[None].to(model.device)  # [1, L, Q, d]
        # A post-normed head writes in proportion to its whole layer: a constant z is no constant there, and its mean is
        # taken.
        return Constants(start.input, start.head if model.post_norm else head, mlp)

    def replacements(self, ablation: EdgeAblation, split: str, start: Constants) -> Replacements:
        """The replacement values of an ablation type on one split."""
        return Replacements(self.engine, ablation, self.passes[split].examples, start, self.seed)


def _examples(engine: Engine, prompts: Prompts, activations: Path, provenance: Provenance) -> Examples:
    """One split on the engine's device."""
    device = engine.model.device
    if int(prompts.lengths.min()) < 2:
        raise UserError(
            f"tasks.{prompts.task}: a {prompts.split} prompt is BOS alone; allowed: prompts of at least one token, for "
            "edges to ablate"
        )
    batch, counterfactual = batch_of(prompts, device), batch_of(prompts, device, counterfactual=True)
    final = read_final(activations, prompts.split, provenance).to(device)
    answers, wrong = (torch.from_numpy(ids).long().to(device) for ids in (prompts.answers, prompts.wrong_answers))
    return Examples(batch, counterfactual, engine.prompts(batch), final, answers, wrong)
