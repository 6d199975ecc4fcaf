"""What the tracing stages share: the facts of every split before one model, and the places to trace."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from oacore import corruption
from oacore.config import Config, Position, Site, Tracing
from oacore.corruption import SubjectStatistics, subject_statistics
from oacore.errors import UserError
from oacore.layout import Layout
from oacore.model import Loaded
from oacore.stages.common import gated_model, need, read_splits, stamp
from oacore.tasks.prompts import Prompts
from oacore.tracing import Place, Recall, completes, place, recall_of


@dataclass(frozen=True)
class Setting:
    """The facts that the model completes, and what is asked about them."""

    config: Config
    layout: Layout
    tracing: Tracing
    loaded: Loaded
    recall: dict[str, Recall]  # by split
    test: Prompts
    test_rows: np.ndarray  # [N] of the prompts that `recall["test"]` holds
    statistics: SubjectStatistics
    counts: dict[str, dict[str, Any]]  # by split, for the report
    expect: dict[str, Any]  # of every file that belongs to these facts
    identity: dict[str, Any]

    @classmethod
    def open(cls, config: Config) -> "Setting":
        assert config.tracing is not None
        layout, answer = Layout(config), config.tracing.answer
        loaded = gated_model(config, layout)
        model = loaded.model
        splits, expect = read_splits(config, layout, "facts")
        recall: dict[str, Recall] = {}
        counts: dict[str, dict[str, Any]] = {}
        test_rows = np.arange(0)
        for split, prompts in splits.items():
            every = recall_of(prompts, answer, model.device)
            if int(every.lengths.max()) > model.max_length:
                raise UserError(
                    f"tracing.answer: 'joint' makes a fact {int(every.lengths.max())} tokens long; allowed: {model.max_length}, the "
                    "model's context"
                )
            # The prompts stage kept facts whose first answer token the model gets right; with several, all of them must be.
            right = (
                completes(model, every, config.limits.tokens_per_batch) if answer == "joint" else torch.ones(len(every), dtype=torch.bool)
            )
            counts[split] = {**prompts.meta, "n_wrong_later": int((~right).sum()), "n_traced": int(right.sum())}
            if counts[split]["n_traced"] < 2:
                raise UserError(f"tracing.answer: the model completes {counts[split]['n_traced']} {split} facts; at least 2 are needed")
            rows = right.nonzero()[:, 0].cpu()
            recall[split] = every.take(rows.to(model.device))
            test_rows = rows.numpy() if split == "test" else test_rows
        expect |= {"answer": answer}
        identity = stamp(config, layout, "facts") | expect
        statistics = subject_statistics(model, recall["train"])
        return cls(config, layout, config.tracing, loaded, recall, splits["test"], test_rows, statistics, counts, expect, identity)

    @property
    def settings(self) -> list[tuple[Site, Position, int]]:
        """(site, position, window) of every curve."""
        asked = self.tracing
        return [(site, position, width) for site in asked.sites for position in asked.positions for width in asked.windows]

    @property
    def places(self) -> list[Place]:
        """Every place of every curve once."""
        n_layers = self.loaded.model.n_layers
        found = [place(*setting[:2], layer, setting[2], n_layers) for setting in self.settings for layer in range(n_layers)]
        return list(dict.fromkeys(found))

    @property
    def pictured(self) -> list[int]:
        """Rows of the test facts to draw.

        Raises:
            UserError: a wanted prompt is not among the facts, or there are fewer facts than pictures.
        """
        texts, wanted = [self.test.text[row] for row in self.test_rows], self.tracing.pictures
        if isinstance(wanted, int):
            subjects = self.recall["test"].subject_numbers.tolist()
            rows = [subjects.index(number) for number in dict.fromkeys(subjects)]  # of each subject the first fact
            rows += [row for row in range(len(texts)) if row not in set(rows)]
            if len(rows) < wanted:
                raise UserError(f"tracing.pictures: {wanted}; allowed: up to the {len(rows)} test facts")
            return rows[:wanted]
        found = []
        for part in wanted:
            row = next((row for row, text in enumerate(texts) if part in text), None)
            if row is None:
                raise UserError(
                    f"tracing.pictures: no test fact that the model completes contains {part!r}; allowed: parts of {len(texts)} prompts: "
                    + "; ".join(repr(text) for text in texts[:5])
                )
            found.append(row)
        return found

    def constants(self, places: list[Place]) -> torch.Tensor:
        """The fitted constants [n, d] of the places.

        Raises:
            UserError: they are missing, damaged, or of another model or other facts.
        """
        path = need(self.layout.tracing("constants.safetensors"), "tracing_fit")
        return corruption.load(path, places, self.expect).to(self.loaded.model.device)
