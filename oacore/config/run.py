"""The whole configuration of a run as one pydantic tree.

Imported by the Snakefile at every start, so it must stay free of torch and transformers. Unknown keys are errors: a
misspelled key that silently keeps its default is the costliest bug a pipeline can have.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from oacore.config.ablation import Ablation
from oacore.config.base import LocalPath, Settings, nearest
from oacore.config.circuits import CIRCUIT_METHODS, Circuits
from oacore.config.interactions import Interactions
from oacore.config.lenses import Lenses
from oacore.config.model import DEMO, DEMO_TRAINED, DemoModel
from oacore.config.removal import Removal
from oacore.config.study import ESTIMATORS, Study, member_values
from oacore.config.tasks import TASKS, Tasks, task_row
from oacore.config.tracing import Tracing
from oacore.config.vision import Vision

FACTS = "facts"  # the task that is traced unless others are named
LOGIT_DIFFERENCE = "takes the logit difference, since KL has no gradient at the clean run"
OPTIONAL_SECTIONS = (
    "circuits",
    "interactions",
    "removal",
    "tracing",
    "lenses",
    "vision",
    "study",
)  # whose presence asks for an experiment


class Limits(Settings):
    """Bounds on memory and CPU. They change speed and rounding, never what is computed: no stage re-runs when they
    change.
    """

    tokens_per_batch: int = Field(
        16384,
        ge=64,
        description="tokens (rows x positions) in one forward pass; a fit keeps the activations of as many for its "
        "backward pass",
    )
    memory_gb: Annotated[float, Field(gt=0)] | Literal["auto"] = Field(
        "auto",
        description="memory of one masked-edge pass beside the weights; its rows go in parts that fit, and out of "
        "memory halves them; auto is what is free on a GPU, and 4 on a CPU",
    )
    threads: int = Field(
        2, ge=1, description="CPU threads of one job; results are bit-identical for equal numbers of threads"
    )


def _name(value: Any) -> Any:
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


class Config(Settings):
    """One run."""

    run: Annotated[str, BeforeValidator(_name)] = Field(
        "demo", pattern=r"^[\w.-]*\w$", description="name of the run; its results go to {results_dir}/{run}"
    )
    model: str = Field(
        DEMO,
        min_length=1,
        description="`demo`, which is shipped; `demo-trained`, the same trained in the workflow; a Hugging Face name, "
        "or a local model directory, also one that `oa.register` wrote",
    )
    revision: str | None = Field(
        None, description="branch, tag or commit of a Hugging Face model; a commit pins the weights"
    )
    dtype: Literal["fp32", "bf16"] = Field(
        "fp32", description="precision of weights and activations; losses are always fp32"
    )
    precision: Literal["auto", "ieee", "tf32"] = Field(
        "auto",
        description="of products of fp32 numbers on a GPU: tf32 rounds both factors to 10 bits, for its tensor cores, "
        "and adds in fp32; auto is tf32; model.json has what that changes. A CPU rounds nothing",
    )
    store_weights: bool = Field(
        True,
        description="keep the weights, as the model stage checked them, in the cache, from where other jobs map them; "
        "false saves their size on disk, and every job loads the model anew",
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto takes a GPU when there is one")
    seed: int = Field(0, ge=0, description="seed of prompts, fits and resampling")
    cache_dir: LocalPath = Field(
        Path("cache"), description="what runs share: models, prompts, activations (a cluster's scratch)"
    )
    results_dir: LocalPath = Field(Path("results"), description="what one run concludes")
    limits: Limits = Limits()
    demo_model: DemoModel = DemoModel()
    tasks: Tasks = Field(description="what the model is asked to do; an empty section takes the defaults")
    ablation: Ablation = Ablation()
    circuits: Circuits | None = None
    interactions: Interactions | None = None
    removal: Removal | None = None
    tracing: Tracing | None = None
    lenses: Lenses | None = None
    vision: Vision | None = None
    study: Study | None = None
    compare: tuple[LocalPath, ...] = Field(
        (), description="configs of finished runs to set this one beside, in its report and on a page each"
    )

    @model_validator(mode="before")
    @classmethod
    def _empty_sections_mean_defaults(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return value | {name: {} for name in OPTIONAL_SECTIONS if name in value and value[name] is None}

    @model_serializer(mode="wrap")
    def _only_asked_for(self, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # A section that was not asked for must not come back as an empty one, which asks for it.
        values = {
            name: value for name, value in serialise(self).items() if name not in OPTIONAL_SECTIONS or value is not None
        }
        if not self.trains_demo:
            values.pop("demo_model", None)
        return values

    @property
    def is_demo(self) -> bool:
        """Whether it is the embedded model, which brings facts, a text and labels of its own."""
        return self.model in (DEMO, DEMO_TRAINED)

    @property
    def trains_demo(self) -> bool:
        """Whether the workflow trains the embedded model; else the shipped one is taken."""
        return self.model == DEMO_TRAINED

    @model_validator(mode="after")
    def _training_is_of_a_model_that_is_trained(self) -> "Config":
        if "demo_model" in self.model_fields_set and not self.trains_demo:
            raise ValueError(
                f"demo_model: it is for training, and model is {self.model!r}; allowed: with model: {DEMO_TRAINED}"
            )
        return self

    def _check_tasks(self, key: str, tasks: Iterable[str]) -> None:
        """ValueError where `key` lists a task that the config has not."""
        selected = self.tasks.selected()
        if missing := [task for task in tasks if task not in selected]:
            raise ValueError(
                f"{key}: {', '.join(missing)}; allowed: the config's tasks: {', '.join(selected)}"
                f"{nearest(missing[0], selected)}"
            )

    def ablation_tasks(self) -> tuple[str, ...]:
        """The tasks to ablate single components on."""
        return tuple(self.tasks.selected()) if self.ablation.tasks is None else self.ablation.tasks

    @model_validator(mode="after")
    def _ablation_has_its_tasks(self) -> "Config":
        self._check_tasks("ablation.tasks", self.ablation_tasks())
        return self

    def circuit_tasks(self) -> tuple[str, ...]:
        """The tasks to find circuits for."""
        if self.circuits is None:
            return ()
        return self.circuits.tasks or tuple(self.tasks.selected())

    def comparing_answers(self) -> tuple[str, ...]:
        """The circuit settings that compare right answers with wrong ones, which all of their tasks need then."""
        circuits = self.circuits
        if circuits is None:
            return ()
        methods = [method for method in circuits.methods if CIRCUIT_METHODS[method].objective == "logit_diff"]
        objective = "circuits.objective: 'logit_diff' compares right and wrong answers"
        return (
            *(f"circuits.methods: {name!r} {LOGIT_DIFFERENCE}" for name in methods),
            *((objective,) if circuits.objective == "logit_diff" else ()),
        )

    @model_validator(mode="after")
    def _circuits_make_sense(self) -> "Config":
        circuits = self.circuits
        if circuits is None:
            return self
        tasks = self.circuit_tasks()
        self._check_tasks("circuits.tasks", tasks)
        for row in (CIRCUIT_METHODS[method] for method in circuits.methods):
            if row.only_task and (tasks != (row.only_task,) or self.is_demo):
                raise ValueError(
                    f"circuits.methods: {row.name!r} is the published IOI circuit of {row.only_model}: it needs that "
                    f"model and circuits.tasks: [{row.only_task}]"
                )
        without_answers = [task for task in tasks if not task_row(task).wrong_answers]
        if without_answers and (comparing := self.comparing_answers()):
            raise ValueError(
                f"{comparing[0]}; {', '.join(without_answers)} has no wrong answers: list other circuits.tasks, or "
                "leave it out"
            )
        for ablation in circuits.ablations:
            if judged := [method for method in circuits.methods if circuits.takes_constants(method, ablation)]:
                fitted = ablation in self.ablation.methods and {"head", "mlp"} <= set(self.ablation.components)
                if not fitted or not set(tasks) <= set(self.ablation_tasks()):
                    raise ValueError(
                        f"circuits.ablations: {ablation!r} with {', '.join(judged)} takes the components' fitted "
                        f"constants; ablation.methods must list {ablation}, ablation.components head and mlp, and "
                        "ablation.tasks these tasks"
                    )
        return self

    def interaction_tasks(self) -> tuple[str, ...]:
        """The tasks to measure effects and interactions on."""
        if self.interactions is None:
            return ()
        return self.interactions.tasks or tuple(self.tasks.selected())

    @model_validator(mode="after")
    def _interactions_have_their_tasks(self) -> "Config":
        self._check_tasks("interactions.tasks", self.interaction_tasks())
        return self

    def tracing_tasks(self) -> tuple[str, ...]:
        """The tasks to trace."""
        if self.tracing is None:
            return ()
        return self.tracing.tasks or (FACTS,)

    @model_validator(mode="after")
    def _removal_has_its_tasks(self) -> "Config":
        if self.removal is not None:
            selected = self.tasks.selected()
            for role, task, _ in self.removal.selections():
                if task not in selected:
                    raise ValueError(
                        f"removal.{role}.{task}: unknown key; allowed: the config's tasks: {', '.join(selected)}"
                        f"{nearest(task, selected)}"
                    )
        return self

    @model_validator(mode="after")
    def _tracing_has_subjects(self) -> "Config":
        tasks = self.tasks.selected()
        if self.tracing is not None and self.tracing.tasks is None and FACTS not in tasks:
            raise ValueError(
                f"tracing: without tracing.tasks it traces {FACTS}, which the config does not select; allowed: with "
                f"tasks.{FACTS}, or tracing.tasks: a list of tasks whose prompts have subjects"
            )
        self._check_tasks("tracing.tasks", self.tracing_tasks())
        if without := [task for task in self.tracing_tasks() if not task_row(task).subjects]:
            raise ValueError(
                f"tracing.tasks: {', '.join(without)} has no subjects; allowed: {FACTS}, and tasks from files with "
                "subjects"
            )
        return self

    def lens_tasks(self) -> tuple[str, ...]:
        """The tasks to fit lenses on."""
        if self.lenses is None:
            return ()
        return self.lenses.tasks or (("text",) if "text" in self.tasks.selected() else tuple(self.tasks.selected()))

    def cached_tasks(self) -> tuple[str, ...]:
        """The tasks of which an experiment reads clean activations at the last position."""
        of_lenses = self.lens_tasks() if self.lenses is not None and self.lenses.positions == "last" else ()
        return tuple(
            dict.fromkeys((*self.ablation_tasks(), *self.circuit_tasks(), *self.interaction_tasks(), *of_lenses))
        )

    @model_validator(mode="after")
    def _lenses_make_sense(self) -> "Config":
        if self.lenses is None:
            return self
        self._check_tasks("lenses.tasks", self.lenses.tasks or ())
        if self.lenses.lengths and "text" not in self.lens_tasks():
            raise ValueError(
                f"lenses.lengths: {', '.join(map(str, self.lenses.lengths))}; allowed: with the task text, which has "
                "windows"
            )
        truth = self.lenses.truthfulness
        if truth is not None and truth.datasets is None and not self.is_demo:
            raise ValueError(
                "lenses.truthfulness.datasets: missing; only the demo model has one of its own; allowed: CSV or JSON "
                "lines files"
            )
        return self

    def members(self) -> "dict[str, Config]":
        """The configs of the members of `study:` by name; none without that section."""
        return {name: Config.model_validate(values) for name, values in self.of_members().items()}

    def of_members(self) -> dict[str, dict[str, Any]]:
        """What `members` validates."""
        if self.study is None:
            return {}
        base = self.model_dump(mode="json", exclude={"study"}, exclude_unset=True)
        of_each = member_values(base, self.run, self.study.models)
        for name, own in self.study.models.items():
            # The file may say how a model is trained that not every member is.
            if of_each[name].get("model") != DEMO_TRAINED and "demo_model" not in own:
                of_each[name].pop("demo_model", None)
        return of_each

    def study_tasks(self) -> tuple[str, ...]:
        """The tasks on which cost is measured."""
        if self.study is None:
            return ()
        return self.study.tasks or self.ablation_tasks()

    @model_validator(mode="after")
    def _study_has_its_tasks(self) -> "Config":
        if self.study is None:
            return self
        if self.compare:
            raise ValueError("compare: with study, which has no results to compare; allowed: as a key of its members")
        self._check_tasks("study.tasks", self.study_tasks())
        if without := [task for task in self.study_tasks() if task not in self.ablation_tasks()]:
            raise ValueError(
                f"study.tasks: {', '.join(without)}; allowed: tasks whose components are ablated: "
                f"{', '.join(self.ablation_tasks()) or 'none (ablation.tasks)'}"
            )
        gradients = [name for name in self.study.methods if ESTIMATORS[name].gradient]
        if gradients and (without := [task for task in self.study_tasks() if not task_row(task).wrong_answers]):
            raise ValueError(
                f"study.methods: {gradients[0]!r} {LOGIT_DIFFERENCE}; {', '.join(without)} has no wrong answers: list "
                "other study.tasks, or leave it out"
            )
        return self

    @model_validator(mode="after")
    def _needs_a_task(self) -> "Config":
        if not self.tasks.selected():
            raise ValueError(f"tasks: none given; allowed: {', '.join(TASKS)}, or one of your own with `pairs`")
        return self
