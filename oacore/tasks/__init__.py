"""The tasks: prompts, counterfactuals and answers from settings, a tokenizer, a seed and a split."""

from types import ModuleType
from typing import Any

from oacore.errors import UserError
from oacore.tasks import facts, greater_than, ioi, text
from oacore.tasks.facts import Complete
from oacore.tasks.prompts import SPLITS, Prompts

__all__ = ["SPLITS", "TASKS", "Complete", "Prompts", "check_files", "generate"]

TASKS: dict[str, ModuleType] = {"ioi": ioi, "greater_than": greater_than, "facts": facts, "text": text}


def check_files(tasks: dict[str, Any]) -> None:
    """Read what can be wrong in the tasks' files without a tokenizer, so that it is said before any work.

    Raises:
        UserError: bad rows of facts, with their line numbers.
    """
    own = tasks.get("facts")
    if own is not None and own.path is not None:
        facts.read(own.path.expanduser())


def generate(name: str, settings: Any, tokenizer: Any, seed: int, split: str, complete: Complete | None = None) -> Prompts:
    """One split of a task; the same tokenizer, settings, seed and split give the same arrays.

    settings: attributes n_train, n_validation, n_test; facts and text also path; text also n_tokens. tokenizer: a Hugging Face fast
    tokenizer. complete: the model's argmax at the last token, (tokens [N, T], lengths [N]) -> ids [N], which filters facts.
    Raises UserError for an unknown name and whatever the task cannot do with its settings and tokenizer.
    """
    if name not in TASKS:
        raise UserError(f"tasks.{name}: no such task; allowed are {', '.join(TASKS)}")
    prompts: Prompts = TASKS[name].generate(settings, tokenizer, seed, split, complete=complete)
    return prompts
