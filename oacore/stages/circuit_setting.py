"""What the circuit stages share: the engine, a task's splits on the device, starting constants, and the files of a search."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from oacore import constants
from oacore.ablation import Statistics, components_of
from oacore.activations import batch_of, read_final, read_statistics
from oacore.artefacts import read_tensors, write_tensors
from oacore.circuits.patching import Constants, Examples, Passes, Replacements, constant_scales, starting_constants
from oacore.config import FITTED, CircuitMethod, Config, EdgeAblation
from oacore.errors import UserError
from oacore.layout import Layout
from oacore.masked_forward import Engine
from oacore.stages.common import gated_model, need, read_splits, stamp


@dataclass(frozen=True)
class Setting:
    """One task's prompts before one model."""

    config: Config
    layout: Layout
    task: str
    engine: Engine
    passes: dict[str, Passes]  # by split
    statistics: Statistics
    expect: dict[str, Any]  # of every file that belongs to these prompts
    identity: dict[str, Any]

    @classmethod
    def open(cls, config: Config, task: str) -> "Setting":
        layout = Layout(config)
        model = gated_model(config, layout).model
        splits, expect = read_splits(config, layout, task)
        engine, passes = Engine(model), {}
        for split, prompts in splits.items():
            if int(prompts.lengths.min()) < 2:
                raise UserError(f"tasks.{task}: a {split} prompt is BOS alone; allowed: prompts of at least one token, for edges to ablate")
            batch, other = batch_of(prompts, model.device), batch_of(prompts, model.device, counterfactual=True)
            final = read_final(need(layout.activations(task), "activations"), split, expect).to(model.device)
            answers, wrong = (torch.from_numpy(ids).long().to(model.device) for ids in (prompts.answers, prompts.wrong_answers))
            passes[split] = Passes(engine, Examples(batch, other, engine.prompts(batch), final, answers, wrong), config.limits.memory_gb)
        statistics = read_statistics(layout.activations(task), expect, model.device)
        return cls(config, layout, task, engine, passes, statistics, expect, stamp(config, layout, task) | expect)

    @property
    def scales(self) -> Constants:
        return constant_scales(self.engine.model, self.statistics)

    def start(self, ablation: EdgeAblation) -> Constants:
        """What fits start from: the mean, or what the ablation type says."""
        train = self.passes["train"].examples
        return starting_constants(self.engine, ablation, self.statistics, train.batch, train.counterfactual)

    def of_components(self, ablation: EdgeAblation) -> Constants:
        """For methods that judge edges without training constants: where these are fitted, each component's own."""
        start = self.start(ablation)
        if ablation not in FITTED:
            return start
        model = self.engine.model
        items = components_of(model, ("head", "mlp"))
        path = need(self.layout.constants(self.task, ablation), "optimal")
        rows = constants.load(path, items, {**self.expect, "method": ablation}).to(model.device)  # [C, Q, W]
        rows = rows.unflatten(0, (model.n_layers, model.n_heads + 1))
        # A post-normed head writes in proportion to its whole layer: a constant z is no constant there, and its mean is taken.
        head = start.head if model.post_norm else rows[None, :, :-1, :, : model.d_head].contiguous()
        return Constants(start.input, head, rows[None, :, -1].contiguous())

    def replacements(self, ablation: EdgeAblation, split: str, start: Constants) -> Replacements:
        return Replacements(self.engine, ablation, self.passes[split].examples, start, self.config.seed)


@dataclass(frozen=True)
class Found:
    """Circuits of one method and ablation type, before they are judged."""

    masks: Tensor  # bool [C, J, S]
    scores: Tensor  # fp32 [C, J, S]
    knobs: list[float]
    seeds: list[int]
    curves: dict[str, Tensor]

    def save(self, path: str | Path, facts: dict[str, Any]) -> None:
        tensors = {"masks": self.masks, "scores": self.scores.float()} | {f"curves/{name}": value for name, value in self.curves.items()}
        write_tensors(path, tensors, {**facts, "knobs": self.knobs, "seeds": self.seeds})

    @classmethod
    def load(cls, path: str | Path, expect: dict[str, Any]) -> "Found":
        """UserError for a damaged file, or one of another model or other prompts."""
        facts, tensors = read_tensors(path, expect)
        curves = {name.removeprefix("curves/"): value for name, value in tensors.items() if name.startswith("curves/")}
        return cls(tensors["masks"], tensors["scores"], facts["knobs"], facts["seeds"], curves)


def circuit_folder(layout: Layout, task: str, method: CircuitMethod, ablation: EdgeAblation) -> Path:
    return Path(layout.circuits(task, f"{method}-{ablation}"))


def edges_of(size: float, n_edges: int) -> int:
    """A size of the config in edges: those below 1 are shares."""
    return max(1, round(size * n_edges)) if size < 1 else int(size)


def check_sizes(sizes: tuple[float, ...], n_edges: int) -> list[int]:
    """All sizes in edges; UserError for one beyond the graph."""
    found = [edges_of(size, n_edges) for size in sizes]
    if too_large := [f"{size:g}" for size, edges in zip(sizes, found, strict=True) if edges > n_edges]:
        raise UserError(f"circuits.sizes: {', '.join(too_large)}; allowed: up to the graph's {n_edges} edges, or shares below 1")
    return found


def bool_masks(masks: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(masks, bool))
