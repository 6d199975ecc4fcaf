"""Make a task's prompts, and look at the user's files before any work."""

from importlib import import_module
from typing import Any

from oacore.config.tasks import TASKS, Task
from oacore.errors import UserError
from oacore.tasks.prompts import Complete, Prompts


def check_files(tasks: dict[str, Task]) -> None:
    """Read what can be wrong in the tasks' files without a tokenizer, so that it is said before any work.

    Raises:
        UserError: bad rows of facts, with their line numbers.
    """
    for name, settings in tasks.items():
        path = getattr(settings, "path", None)
        if TASKS[name].check and path is not None:
            module, _, function = TASKS[name].check.partition(":")
            getattr(import_module(module), function)(path)


def generate(
    name: str, settings: Any, tokenizer: Any, seed: int, split: str, complete: Complete | None = None
) -> Prompts:
    """One split of a task; the same tokenizer, settings, seed and split give the same arrays.

    Args:
        settings: with n_train, n_validation, n_test; facts and text also with path, text with n_tokens.
        tokenizer: a Hugging Face fast tokenizer.
        complete: the model's argmax at the last token, (tokens [N, T], lengths [N]) -> ids [N], which filters facts.

    Raises:
        UserError: an unknown name, and whatever the task can't do with its settings and tokenizer.
    """
    if name not in TASKS:
        raise UserError(f"tasks.{name}: no such task; allowed are {', '.join(TASKS)}")
    prompts: Prompts = TASKS[name].load()(settings, tokenizer, seed, split, complete=complete)
    return prompts
