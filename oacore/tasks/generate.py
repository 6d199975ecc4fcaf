"""Make a task's prompts, and look at the user's files before any work."""

from typing import Any

from oacore.config.rows import resolve
from oacore.config.run import Config
from oacore.config.tasks import PAIRS, TASKS, Pairs, task_row
from oacore.errors import UserError
from oacore.tasks.prompts import Complete, Prompts


def check_files(config: Config) -> None:
    """Read what can be wrong in the tasks' files without a tokenizer, so that it is said before any work.

    Raises:
        UserError: bad rows of facts or pairs, with their line numbers; rows or wrong answers that the config asks for
            and a file of pairs has not.
    """
    for name in config.tasks.selected():
        if check := task_row(name).check:
            resolve(check)(config, name)


def generate(
    name: str, settings: Any, tokenizer: Any, seed: int, split: str, complete: Complete | None = None
) -> Prompts:
    """One split of a task; the same tokenizer, settings, seed and split give the same arrays.

    Args:
        settings: with n_train, n_validation, n_test; facts and text also with path, text with n_tokens; `Pairs` for a
            task of the user's own.
        tokenizer: a Hugging Face fast tokenizer.
        complete: the model's argmax at the last token, (tokens [N, T], lengths [N]) -> ids [N], which filters facts.

    Raises:
        UserError: an unknown name, and whatever the task can't do with its settings and tokenizer.
    """
    row = task_row(name)
    if row is PAIRS and not isinstance(settings, Pairs):
        raise UserError(f"tasks.{name}: no such task; allowed are {', '.join(TASKS)}")
    told = {"task": name} if row is PAIRS else {}
    prompts: Prompts = row.load()(settings, tokenizer, seed, split, complete=complete, **told)
    return prompts
