"""`tasks:` what the model is asked to do, and the registry of tasks."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, create_model, model_serializer, model_validator

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


class Text(Task):
    """Windows of plain text; the target is the model's own next-token distribution."""

    path: LocalPath | None = Field(
        None,
        description="text file, directory of .txt files, or JSON list of strings; only the demo model has text of its "
        "own",
    )
    n_tokens: int = Field(25, ge=3, description="window length, BOS included")


@dataclass(frozen=True)
class TaskRow(Row):
    """A task; `code` is its function `generate`, see docs/extending.md.

    Args:
        settings: its section of the config.
        prompt_tokens: of the longest prompt with BOS, by GPT-2's tokenizer or about so, for estimates; a setting
            `n_tokens` goes before it.
        wrong_answers: prompts have wrong answers, which logit differences compare the right ones with.
        completed: only prompts that the model completes rightly are kept, so that the model runs to make them.
        file: what the setting `path` wants; empty for a task that reads no file of the user's.
        demo_file: the demo model's own file in place of it.
        check: `package.module:name` of what reads the file before any work; empty if a tokenizer is needed for that.
    """

    settings: type[Task] = Task
    prompt_tokens: int = 16
    wrong_answers: bool = True
    completed: bool = False
    file: str = ""
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
            completed=True,
            file="a CSV or JSON lines file",
            demo_file="facts.csv",
            check="oacore.tasks.facts:read_facts_file",
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

if TYPE_CHECKING:
    TaskName = str
else:
    TaskName = Literal[tuple(TASKS)]

# One optional field for each row.
_sections: dict[str, Any] = {
    row.name: (row.settings | None, Field(None, description=row.note)) for row in TASKS.values()
}
_Sections: Any = create_model("_Sections", __base__=Settings, **_sections)


class Tasks(_Sections):
    """The tasks that are asked for: an empty section takes the defaults, a missing one is not asked for."""

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

    def selected(self) -> dict[str, Task]:
        """The tasks that the config names, in the order of the registry."""
        return {name: task for name in TASKS if (task := getattr(self, name)) is not None}
