"""The prompts of all tasks in their roles before one model: what is forgotten, retained, and only measured.

Symbols: N prompts, d model width, A right and W wrong answers, T tokens.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from oacore.circuits.passes import Examples, Passes, objective_losses, pass_bytes
from oacore.circuits.task import CircuitTask
from oacore.config.removal import ROLES, Removal
from oacore.config.run import Config
from oacore.config.tasks import task_row
from oacore.engine.activations import statistics_of
from oacore.engine.clean import Batch, clean_pass
from oacore.engine.forward import at, final_norm
from oacore.engine.masked import Engine
from oacore.errors import UserError
from oacore.inputs import gated_model, provenance_of_several, read_splits
from oacore.jobs import Files
from oacore.models.load import pick_precision
from oacore.models.weights import Model
from oacore.removal.loss import RemovalLoss
from oacore.store.provenance import Provenance
from oacore.tasks.prompts import SPLITS, Prompts

ANSWERED, MEASURED = ("forget", "paraphrases"), ("paraphrases", "held_out")  # roles: whose answers count; only measured
FEWEST = 2  # prompts of a selection in each split


@dataclass(frozen=True)
class Group:
    """The prompts of one task in one role and split, on the model's device.

    Args:
        final: [N, d] what the unembedding reads in the clean run.
        answers: [N, A] right next tokens, and `wrong` [N, W] the others, padded with -1; of a retained task unread.
        cluster: [N] what standard errors are over.
    """

    task: str
    batch: Batch
    final: Tensor
    answers: Tensor
    wrong: Tensor
    cluster: np.ndarray


@dataclass(frozen=True)
class Behaviours:
    """The engine, and everybody's prompts.

    Args:
        groups: by role, then by split; of what is only measured the test prompts alone.
        learning: forgotten and retained prompts together, whose loss is `RemovalLoss`.
        forgotten: the forgotten ones alone, whose losses are KL and the log odds lost.
        provenance: of what is computed from these prompts.
    """

    engine: Engine
    groups: Mapping[str, Mapping[str, Sequence[Group]]]
    learning: CircuitTask
    forgotten: CircuitTask
    provenance: Provenance
    tokens_per_batch: int

    @property
    def model(self) -> Model:
        """The model before any ablation."""
        return self.engine.model

    @classmethod
    def open(cls, config: Config, inputs: Files) -> "Behaviours":
        """Load the model and select the prompts.

        Args:
            inputs: with `model`, and `prompts` of all tasks that the settings name.

        Raises:
            UserError: a damaged file, too few prompts of a pattern, or none of the answers that forgetting compares.
        """
        settings = config.removal
        assert settings is not None
        model = gated_model(config, inputs["model"]).model
        splits, hashes = {}, dict[str, dict[str, str]]()
        for task, path in zip(settings.tasks(), inputs.all("prompts"), strict=True):
            of_task = Files({"model": str(inputs["model"]), "prompts": str(path)})
            splits[task], provenance = read_splits(config, of_task, task)
            hashes[task] = provenance.required["prompts_hash"]
        by_split = {split: {task: of_task[split] for task, of_task in hashes.items()} for split in SPLITS}
        together = provenance_of_several(config, inputs["model"], "removal", settings.tasks())
        engine = Engine(model, pick_precision(config.precision, model.device))
        return behaviours(engine, settings, splits, together.requiring(prompts_hash=by_split), config)


def behaviours(
    engine: Engine,
    settings: Removal,
    splits: Mapping[str, Mapping[str, Prompts]],
    provenance: Provenance,
    config: Config,
) -> Behaviours:
    """The prompts of all roles.

    Args:
        splits: prompts by task and split.

    Raises:
        UserError: as `Behaviours.open`.
    """
    n_tokens = config.limits.tokens_per_batch
    groups: dict[str, dict[str, list[Group]]] = {role: {split: [] for split in SPLITS} for role in ROLES}
    fewest = dict[str, int]()  # forgotten prompts of each split, which come first
    to_go = dict[tuple[str, str], set[int]]()  # prompts of a task's split that are to go
    for role, task, pattern in settings.selections():
        key = f"removal.{role}: {task}"
        rows = {split: _rows(prompts, pattern, key) for split, prompts in splits[task].items()}
        fewest = fewest or {split: len(of_split) for split, of_split in rows.items()}
        for split, of_split in rows.items():
            gone = to_go.setdefault((task, split), set())
            if role in ANSWERED:
                gone.update(of_split)
            elif both := gone.intersection(of_split):
                raise UserError(
                    f"{key}: {pattern!r} finds {splits[task][split].text[min(both)]!r}, which is to be forgotten; "
                    "allowed: patterns that find other prompts"
                )
        if role in MEASURED:
            rows["train"], rows["validation"] = [], []
        elif role == "retain":
            # As many as of the forgotten, so that a step sees of each task about as much.
            rows |= {split: rows[split][: fewest[split]] for split in ("train", "validation")}
        answers = _answers(splits[task], rows, key) if role in ANSWERED else None
        for split, prompts in splits[task].items():
            if not rows[split]:
                continue
            groups[role][split].append(_group(engine.model, prompts, rows[split], answers, n_tokens))
    passes, alone, memory_bytes = (
        dict[str, Passes](),
        dict[str, Passes](),
        pass_bytes(config.limits, engine.model.device),
    )
    for split in ("train", "validation"):
        (forget,) = groups["forget"][split]
        retain = groups["retain"][split]
        loss = _loss([forget, *retain], settings.weight)
        passes[split] = Passes(engine, _examples(engine, [forget, *retain]), memory_bytes, loss)
        alone[split] = Passes(engine, _examples(engine, [forget]), memory_bytes, objective_losses)
    learning, forgotten = (
        CircuitTask(
            "removal",
            engine,
            of,
            statistics_of(engine.model, of["train"].examples.batch, n_tokens),
            config.seed,
            np.zeros(0),
            provenance,
        )
        for of in (passes, alone)
    )
    return Behaviours(engine, groups, learning, forgotten, provenance, n_tokens)


def _rows(prompts: Prompts, pattern: str, key: str) -> list[int]:
    """The prompts that a pattern finds."""
    rows = [row for row, text in enumerate(prompts.text) if re.search(pattern, text)]
    if len(rows) < FEWEST:
        raise UserError(
            f"{key}: {pattern!r} finds {len(rows)} of {len(prompts.text)} {prompts.split} prompts, such as "
            f"{prompts.text[0]!r}; allowed: a regular expression that finds at least {FEWEST} of each split"
        )
    return rows


def _answers(splits: Mapping[str, Prompts], rows: Mapping[str, list[int]], key: str) -> dict[str, list[list[int]]]:
    """Wrong answers of every selected prompt by split: the task's own; where it has none of its own, all answers that
    are right for other selected prompts.
    """
    known = {int(a) for split, prompts in splits.items() for a in prompts.answers[rows[split]].ravel() if a >= 0}
    wrong: dict[str, list[list[int]]] = {}
    for split, prompts in splits.items():
        own = prompts.wrong_answers if task_row(prompts.task).wrong_answers else None
        wrong[split] = []
        for row in rows[split]:
            right = {int(a) for a in prompts.answers[row] if a >= 0}
            others = known - right if own is None else {int(a) for a in own[row] if a >= 0}
            if not right or not others:
                raise UserError(
                    f"{key}: the {split} prompt {prompts.text[row]!r} has no {'wrong' if right else 'right'} answers; "
                    "allowed: prompts with both, or whose answers differ"
                )
            wrong[split].append(sorted(others))
    return wrong


def _group(
    model: Model, prompts: Prompts, rows: list[int], wrong: dict[str, list[list[int]]] | None, n_tokens: int
) -> Group:
    """The selected prompts of a split."""
    device = model.device
    tokens, lengths = (torch.from_numpy(part[rows]).long().to(device) for part in (prompts.tokens, prompts.lengths))
    batch = Batch(tokens[:, : int(lengths.max())], lengths)
    finals = []
    for part in batch.split(n_tokens):
        clean = clean_pass(model, part.tokens, part.lengths)
        finals.append(final_norm(model, at(clean.entering[-1], clean.last))[:, 0])
    none = torch.tensor([[0, 1]], device=device).expand(len(rows), 2)  # of a retained prompt nobody reads it
    right, others = none[:, :1], none[:, 1:]
    if wrong is not None:
        right = torch.from_numpy(prompts.answers[rows]).long().to(device)
        widest = max(map(len, wrong[prompts.split]))
        padded = [ids + [-1] * (widest - len(ids)) for ids in wrong[prompts.split]]
        others = torch.tensor(padded, device=device)
    return Group(prompts.task, batch, torch.cat(finals), right, others, prompts.cluster[rows])


def _examples(engine: Engine, groups: Sequence[Group]) -> Examples:
    """The groups one after the other, as wide as the widest."""

    def together(parts: Sequence[Tensor], fill: int) -> Tensor:
        width = max(part.shape[1] for part in parts)
        return torch.cat([torch.nn.functional.pad(part, (0, width - part.shape[1]), value=fill) for part in parts])

    tokens = together([group.batch.tokens for group in groups], 0)
    batch = Batch(tokens, torch.cat([group.batch.lengths for group in groups]))
    answers, wrong = (together([getattr(group, name) for group in groups], -1) for name in ("answers", "wrong"))
    final = torch.cat([group.final for group in groups])
    return Examples(batch, batch, engine.prompts(batch), final, answers, wrong)  # constants need no counterfactual


def _loss(groups: Sequence[Group], weight: float) -> RemovalLoss:
    """Of the forgotten group, which is first, and the retained ones."""
    sizes = [len(group.batch) for group in groups]
    shares = [weight] + [1 / (len(groups) - 1)] * (len(groups) - 1)
    weights = [share * sum(sizes) / size for share, size in zip(shares, sizes, strict=True)]
    device = groups[0].final.device
    counts = torch.tensor(sizes, device=device)
    forgotten = torch.arange(len(groups), device=device).repeat_interleave(counts) == 0
    return RemovalLoss(forgotten, torch.tensor(weights, device=device).repeat_interleave(counts))
