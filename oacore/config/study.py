"""`study:` the same experiments on several models, and what each method costs there; and the registry of the methods
whose cost is measured.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from oacore.config.base import OptimalFit, Settings
from oacore.config.colors import ACCENT, BLUE, GREEN, INK, PURPLE, SLATE
from oacore.config.rows import Look, Row, registry

Whole = Annotated[int, Field(ge=1)]
MemberName = Annotated[str, Field(pattern=r"^[\w.-]*\w$")]
OF_ALL = ("run", "study")  # keys that no member has of its own: they say what the whole is


@dataclass(frozen=True)
class Estimator(Row):
    """A way to estimate every component's importance within a number of passes; `code` is its function, see
    `oacore.study.estimates`.

    Args:
        look: in figures.
        fitted: constants are fitted, with a part of the passes.
        gradient: it takes gradients of the logit difference, which say something about all components at once.
    """

    look: Look
    fitted: bool = False
    gradient: bool = False


_ESTIMATES = "oacore.study.estimates"
ESTIMATORS = registry(
    (
        Estimator(
            "optimal",
            f"{_ESTIMATES}:fit_and_ablate",
            "Half of the passes fit each component's constant, the others measure the gap with it.",
            Look(ACCENT, "o"),
            fitted=True,
        ),
        Estimator("mean", f"{_ESTIMATES}:ablate", "The gap under mean ablation.", Look(SLATE, "s")),
        Estimator("zero", f"{_ESTIMATES}:ablate", "The gap under zero ablation.", Look(INK, "X")),
        Estimator("resample", f"{_ESTIMATES}:ablate", "The gap under resampling.", Look(GREEN, "D")),
        Estimator(
            "counterfactual", f"{_ESTIMATES}:ablate", "The gap under counterfactual patching.", Look(BLUE, "^")
        ),
        Estimator(
            "attribution",
            f"{_ESTIMATES}:attribute",
            "The first-order change of the logit difference under mean ablation: (mean - value) times the gradient at "
            "the clean run, as a size; one gradient serves all components.",
            Look(PURPLE, "P"),
            gradient=True,
        ),
    )
)  # fmt: skip

if TYPE_CHECKING:
    EstimatorName = str
else:
    EstimatorName = Literal[tuple(ESTIMATORS)]


class ReferenceFit(OptimalFit):
    """Fitting of the constants that all estimates are held against; at a budget it is cut short."""


class Study(Settings):
    """Several models side by side. With this section a run is its members alone, each with a run of its own."""

    models: dict[MemberName, dict[str, Any]] = Field(
        min_length=1,
        description="a member's name -> its own values of any keys of this file, over the file's: `small: { model: "
        "EleutherAI/pythia-70m }`",
    )
    tasks: tuple[str, ...] | None = Field(
        None, min_length=1, description="tasks to measure cost on; none means all whose components are ablated"
    )
    methods: tuple[EstimatorName, ...] = Field(
        tuple(ESTIMATORS), min_length=1, description="methods to measure the cost of"
    )
    budgets: tuple[Whole, ...] = Field(
        (16, 64, 256, 1024, 4096),
        min_length=1,
        description="passes for each component, of one prompt each: a forward pass is one, a gradient three",
    )
    fit: ReferenceFit = ReferenceFit()

    @field_validator("models", mode="before")
    @classmethod
    def _empty_members_are_the_file(cls, value: Any) -> Any:
        return {str(name): own or {} for name, own in value.items()} if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _it_makes_sense(self) -> "Study":
        for name, own in self.models.items():
            if refused := [key for key in OF_ALL if key in own]:
                raise ValueError(f"models.{name}.{refused[0]}: the study's own; allowed: other keys of a config")
        for name in ("methods", "budgets"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise ValueError(f"{name}: {', '.join(map(str, values))} repeats a value; allowed: each once")
        return self

    def read_by(self) -> dict[str, Any]:
        """What the measurements of a member depend on beside its own config, JSON-able."""
        return self.model_dump(mode="json", include={"methods", "budgets", "fit"})

    @staticmethod
    def figures(tasks: tuple[str, ...]) -> tuple[str, ...]:
        """Names of the figures of these tasks (`oacore.study.plots.study_figures`)."""
        return tuple(f"{figure}_{task}" for task in tasks for figure in ("cost", "accuracy", "payoff"))


def member_values(base: Mapping[str, Any], run: str, models: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Each member's config before validation: the base with its own values put in, section by section.

    Args:
        base: the file's values without `study`.
        run: the study's name; a member's is `{run}-{member}`.
    """
    return {name: merged(base, own) | {"run": f"{run}-{name}"} for name, own in models.items()}


def merged(base: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """The base with `own` values over it; mappings are merged, everything else is replaced."""
    found = dict(base)
    for key, value in own.items():
        old = found.get(key)
        if isinstance(old, Mapping) and (value is None or isinstance(value, Mapping)):
            found[key] = merged(old, value or {})
        else:
            found[key] = value
    return found
