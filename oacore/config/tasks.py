"""`tasks:` what the model is asked to do, and the registry of tasks."""

import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    create_model,
    model_serializer,
    model_validator,
)
from pydantic_core import PydanticKnownError

from oacore.config.base import LocalPath, Settings
from oacore.config.rows import Row, registry


class Task(Settings):
    """What all tasks can be asked for."""

    n_train: int = Field(1000, ge=2, description="prompts that constants are fitted on and means are taken over")
    n_validation: int = Field(128, ge=2, description="prompts that decide when a fit has converged")
    n_test: int = Field(500, ge=2, description="prompts that every reported number is measured on")


class Facts(Task):
    """Facts that the model completes correctly, split by subject."""

    path: LocalPath | None = Field(
        None,
        description="CSV or JSON lines file with subject, prompt, answer; only the demo model has facts of its own "
        "and may leave it out",
    )
    unseen: Literal["subjects", "subjects_and_relations"] = Field(
        "subjects",
        description="what no two splits share; relations too leaves fewer facts, and needs three of them in the file",
    )


def _count(value: Any) -> Any:
    is_count = isinstance(value, int) and value >= 2
    if value == "all" or is_count or (isinstance(value, float) and 0 < value < 1):
        return value
    raise ValueError(f"{value!r}; allowed: a whole number of at least 2, a share between 0 and 1, or all")


Count = Annotated[int | float | Literal["all"], BeforeValidator(_count)]  # of what a file has for a split


class Text(Settings):
    """Windows of plain text; the target is the model's own next-token distribution."""

    n_train: Count = Field(
        1000,
        description="windows that constants are fitted on and means are taken over: a number, a share of those that "
        "the text has, or all",
    )
    n_validation: Count = Field(128, description="windows that decide when a fit has converged, likewise")
    n_test: Count = Field(500, description="windows that every reported number is measured on, likewise")
    path: LocalPath | None = Field(
        None,
        description="text file, directory of .txt files, or JSON list of strings; only the demo model has text of its "
        "own",
    )
    passages: Literal["paragraphs", "lines"] = Field(
        "paragraphs", description="what a text file has a passage in: each block between blank lines, or each line"
    )
    n_tokens: int = Field(25, ge=3, description="window length, BOS included")
    windows: Literal["side_by_side", "first", "anywhere"] = Field(
        "side_by_side",
        description="of each passage: side by side from its start; its first one alone, as people read it; or side by "
        "side from a place that is drawn",
    )


class Pairs(Settings):
    """Pairs of clean and corrupt prompts from a file, docs/tasks.md."""

    pairs: LocalPath = Field(
        description="CSV or JSON lines file with clean, corrupt, right and, optionally, wrong, split, group, subject; "
        "or a YAML file with wordings and words, which gives such rows"
    )
    n_train: Count = Field(
        "all", description="rows that constants are fitted on and means are taken over: a number, a share, or all"
    )
    n_validation: Count = Field("all", description="rows that decide when a fit has converged, likewise")
    n_test: Count = Field("all", description="rows that every reported number is measured on, likewise")
    align: Literal["refuse", "drop"] = Field(
        "refuse", description="a row whose prompts have different numbers of tokens: refuse the file, or drop the row"
    )


@dataclass(frozen=True)
class TaskRow(Row):
    """A task; `code` is its function `generate`, see docs/extending.md.

    Args:
        settings: its section of the config.
        prompt_tokens: of the longest prompt with BOS, by GPT-2's tokenizer or about so, for estimates; a setting
            `n_tokens` goes before it.
        wrong_answers: prompts have wrong answers, which logit differences compare the right ones with.
        subjects: prompts have subjects, or may have, which causal tracing corrupts.
        completed: only prompts that the model completes rightly are kept, so that the model runs to make them.
        file: what the setting `file_key` wants; empty for a task that reads no file of the user's.
        file_key: the setting that names the file.
        demo_file: the demo model's own file in place of it.
        check: `package.module:name` of what is called with the config and the task's name before any work, and reads
            the file; empty if a tokenizer is needed for that.
    """

    settings: type[Settings] = Task
    prompt_tokens: int = 16
    wrong_answers: bool = True
    subjects: bool = False
    completed: bool = False
    file: str = ""
    file_key: str = "path"
    demo_file: str = ""
    check: str = ""


TASKS = registry(
    (
        TaskRow("ioi", "oacore.tasks.ioi:generate", "indirect object identification", prompt_tokens=21),
        TaskRow(
            "greater_than",
            "oacore.tasks.greater_than:generate",
            "years greater than the start year",
            prompt_tokens=13,
        ),
        TaskRow(
            "facts",
            "oacore.tasks.facts:generate",
            "factual recall",
            settings=Facts,
            wrong_answers=False,
            subjects=True,
            completed=True,
            file="a CSV or JSON lines file",
            demo_file="facts.csv",
            check="oacore.tasks.facts:check",
        ),
        TaskRow(
            "text",
            "oacore.tasks.text:generate",
            "plain text of your own",
            settings=Text,
            wrong_answers=False,
            file="a text file, a directory of .txt files, or a JSON list of strings",
            demo_file="text.json",
        ),
    )
)

# The row of every task of the user's own, whatever its name. Its `generate` is told the name.
PAIRS = TaskRow(
    "<name>",
    "oacore.tasks.pairs:generate",
    "pairs of prompts from a file of your own, under a name of your own",
    settings=Pairs,
    subjects=True,
    file="a CSV or JSON lines file, or a YAML template",
    file_key="pairs",
    check="oacore.tasks.pairs:check",
)
NAME = re.compile(r"[a-z][a-z0-9_]*")
RESERVED = ("logs", "removal")  # beside the tasks' folders in a run's results


def task_row(name: str) -> TaskRow:
    """The row of a task that a config selects."""
    return TASKS.get(name, PAIRS)


# One optional field for each row.
_sections: dict[str, Any] = {
    row.name: (row.settings | None, Field(None, description=row.note)) for row in TASKS.values()
}
_Sections: Any = create_model("_Sections", __base__=Settings, **_sections)


def _names_a_file(value: Any) -> Any:
    if isinstance(value, Pairs) or (isinstance(value, dict) and "pairs" in value):
        return value
    raise PydanticKnownError("extra_forbidden")  # a misspelled name


class Tasks(_Sections):
    """The tasks that are asked for: an empty section takes the defaults, a missing one is not asked for. Any other name
    whose section has `pairs` is a task of the user's own.
    """

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Annotated[Pairs, BeforeValidator(_names_a_file)]]

    @model_validator(mode="before")
    @classmethod
    def _empty_section_means_defaults(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {name: {} if task is None else task for name, task in value.items()}

    @model_serializer(mode="wrap")
    def _only_selected(self, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # A task that is not selected must not come back as an empty section, which selects it.
        return {name: task for name, task in serialise(self).items() if task is not None}

    @model_validator(mode="after")
    def _names_make_folders(self) -> "Tasks":
        for name in self.__pydantic_extra__:
            if not NAME.fullmatch(name) or name in RESERVED:
                raise ValueError(
                    f"{name!r} is no name for a task; allowed: lower-case letters, digits and _, a letter first, and "
                    f"not {', '.join(RESERVED)}"
                )
        return self

    def selected(self) -> dict[str, Settings]:
        """The tasks that the config names: the built-in ones in the order of the registry, then the user's own."""
        built_in = {name: task for name in TASKS if (task := getattr(self, name)) is not None}
        return built_in | self.__pydantic_extra__
