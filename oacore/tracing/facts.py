"""The facts that are traced: of every split, the prompts with a subject that the model completes."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from oacore.config.tracing import CORRUPTIONS, Tracing
from oacore.errors import UserError
from oacore.models.weights import Model
from oacore.tasks.prompts import Prompts
from oacore.tracing.recall import Recall, completes, recall_of
from oacore.tracing.subjects import SubjectStatistics, subject_statistics


@dataclass(frozen=True)
class TracedFacts:
    """The facts that the model completes, by split, and what is known of them."""

    recall: Mapping[str, Recall]  # by split
    text: list[str]  # the prompts of the N test facts
    statistics: SubjectStatistics  # of the training facts
    counts: Mapping[str, dict[str, Any]]  # by split, for the report

    @property
    def test(self) -> Recall:
        """The facts that every reported number is measured on."""
        return self.recall["test"]

    def pictured(self, wanted: int | tuple[str, ...]) -> list[int]:
        """Rows of the test facts to draw: so many, of different subjects as far as there are, or those asked for.

        Raises:
            UserError: a wanted prompt is not among the facts, or there are fewer facts than pictures.
        """
        if isinstance(wanted, int):
            subjects = self.test.subject_numbers.tolist()
            rows = [subjects.index(number) for number in dict.fromkeys(subjects)]  # of each subject the first fact
            rows += [row for row in range(len(subjects)) if row not in set(rows)]
            if len(rows) < wanted:
                raise UserError(f"tracing.pictures: {wanted}; allowed: up to the {len(rows)} test facts")
            return rows[:wanted]
        return [self._row_with(part) for part in wanted]

    def _row_with(self, part: str) -> int:
        """The first test fact whose prompt contains `part`."""
        for row, text in enumerate(self.text):
            if part in text:
                return row
        some = "; ".join(repr(text) for text in self.text[:5])
        raise UserError(
            f"tracing.pictures: no test fact that the model completes contains {part!r}; allowed: parts of "
            f"{len(self.text)} prompts: {some}"
        )


def traced_facts(model: Model, splits: Mapping[str, Prompts], tracing: Tracing, tokens_per_batch: int) -> TracedFacts:
    """The facts of every split that the model completes, by the first token of the answer or by all of them.

    Raises:
        UserError: a fact with its whole answer is longer than the model's context; a split has less than two facts; the
            subject's tokens are to be replaced by a corrupt prompt's, which has the same.
    """
    recall, rows_of = dict[str, Recall](), dict[str, list[int]]()
    counts: dict[str, dict[str, Any]] = {}
    for split, prompts in splits.items():
        every = recall_of(prompts, tracing.answer, model.device)
        _check_other_subjects(every, prompts, tracing)
        if (longest := int(every.lengths.max())) > model.max_length:
            raise UserError(
                f"tracing.answer: 'joint' makes a fact {longest} tokens long; allowed: {model.max_length}, the "
                "model's context"
            )
        right = completes(model, every, tokens_per_batch)
        n_traced = int(right.sum())
        counts[split] = {**prompts.meta, "n_not_completed": int((~right).sum()), "n_traced": n_traced}
        if n_traced < 2:
            raise UserError(
                f"tracing.tasks: of {len(every)} {split} prompts of {prompts.task} the model completes {n_traced} "
                f"(answer: {tracing.answer}); at least 2 are needed"
            )
        rows = right.nonzero()[:, 0].to(model.device)
        recall[split] = replace(every.take(rows), numbers=torch.arange(n_traced, device=model.device))
        rows_of[split] = rows.tolist()
    text = [splits["test"].text[row] for row in rows_of["test"]]
    return TracedFacts(recall, text, subject_statistics(model, recall["train"]), counts)


def _check_other_subjects(recall: Recall, prompts: Prompts, tracing: Tracing) -> None:
    """UserError where a corruption takes another subject's tokens and they are the subject's own."""
    names = [name for name in tracing.corruption_kinds() if CORRUPTIONS[name].other_subject]
    same = ((recall.tokens == recall.other) | ~recall.in_subject).all(1).nonzero()[:, 0].tolist()
    if names and same:
        some = "; ".join(repr(prompts.text[row]) for row in same[:5])
        raise UserError(
            f"tracing.corruptions: {names[0]!r} takes the corrupt prompt's tokens at the subject's place, which are "
            f"the subject's own in {len(same)} {prompts.split} prompts of {prompts.task}: {some}; allowed: corrupt "
            "prompts about another subject, or other corruptions"
        )
