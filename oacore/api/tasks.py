"""A task's prompts."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from oacore.api.model import Model
from oacore.api.settings import config_of
from oacore.config.tasks import NAME, RESERVED, TASKS
from oacore.inputs import model_source, provenance_of
from oacore.models.hub import load_tokenizer
from oacore.running import run_behind
from oacore.tasks.prompts import SPLITS, Ints
from oacore.tasks.stored import read_facts, read_prompts


@dataclass(frozen=True, repr=False)
class Task:
    """Make it with `pairs` or `task`.

    Args:
        name: as tables, items and folders of results have it.
        settings: its section of the config.
        counts: prompts by split.
    """

    model: Model
    name: str
    settings: Mapping[str, Any]
    counts: Mapping[str, int]

    def __repr__(self) -> str:
        return f"{self.name}: {', '.join(f'{self.counts[split]} {split}' for split in SPLITS)} prompts"

    def prompts(self, split: str = "test") -> pd.DataFrame:
        """The prompts of a split: text, counterfactual, answers, wrong_answers, cluster.

        Answers are those that a prediction is read for, first tokens, with `|` between them. Prompts of one cluster are
        not independent: standard errors are over clusters.

        Raises:
            ValueError: no such split.
        """
        if split not in SPLITS:
            raise ValueError(f"split {split!r}; allowed: {', '.join(SPLITS)}")
        config = config_of(self.model.settings, {self.name: self.settings})
        layout = run_behind(config, "prompts")
        model_json = Path(layout.model_json)
        prompts = read_prompts(layout.prompts(self.name), split, provenance_of(config, model_json, self.name))
        tokenizer = load_tokenizer(model_source(config, model_json), self.model.facts["revision"])

        def shown(answers: Ints) -> list[str]:
            return ["|".join(tokenizer.decode([id_]) for id_ in row if id_ >= 0) for row in answers.tolist()]

        corrupt = zip(prompts.counterfactual, prompts.lengths, strict=True)
        return pd.DataFrame(
            {
                "text": prompts.text,
                "counterfactual": [tokenizer.decode(row[1:length]) for row, length in corrupt],
                "answers": shown(prompts.answers),
                "wrong_answers": shown(prompts.wrong_answers),
                "cluster": prompts.cluster,
            }
        )


def task(name: str, model: Model, **settings: Any) -> Task:
    """A task of the config under its name there: `ioi`, `greater_than`, `facts`, `text`.

    Args:
        settings: of its section: `n_train`, `n_validation`, `n_test`; facts and text also `path`.

    Raises:
        UserError: an unknown task or setting, a bad file, or a tokenizer that does not suit the task.
    """
    config = config_of(model.settings, {name: settings})
    path = run_behind(config, "prompts").prompts(name)
    counts = read_facts(path, provenance_of(config, Path(path).parents[1] / "model.json", name))["counts"]
    return Task(model, name, settings, {split: counts[split]["n_prompts"] for split in SPLITS})


def pairs(path: str | Path, model: Model, *, name: str | None = None, **settings: Any) -> Task:
    """A task from a file of clean and corrupt prompts with their answers, docs/tasks.md.

    Args:
        name: by default the file's, as far as the config allows it.
        settings: `n_train`, `n_validation`, `n_test`, `align`.

    Raises:
        UserError: a bad setting, or the bad rows of the file.
    """
    return task(_name(Path(path)) if name is None else name, model, pairs=str(path), **settings)


def _name(path: Path) -> str:
    """A file's name as a task's: `My pairs-2.csv` is my_pairs_2."""
    name = re.sub(r"[^a-z0-9]+", "_", path.stem.lower()).strip("_")
    return name if NAME.fullmatch(name) and name not in (*TASKS, *RESERVED) else f"pairs_{name}"
