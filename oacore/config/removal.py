"""`removal:` which few edges, components or directions, replaced by constants, remove a behaviour and keep the rest."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from oacore.config.base import Settings
from oacore.config.circuits import EDGE_ABLATIONS, EdgeAblation, MaskFit, Refit
from oacore.config.colors import ACCENT, BLUE, GREEN, PALE, PURPLE, TEAL
from oacore.config.rows import Look, Row, registry

ROLES = ("forget", "paraphrases", "retain", "held_out")  # what is to go first


@dataclass(frozen=True)
class RemovalMethod(Row):
    """What chooses what to ablate; `code` is a function from a `oacore.removal.request.RemovalRequest` to an ablation
    for each of its knobs.

    Args:
        look: in figures.
        knob: the setting that it sweeps.
        unit: what is ablated: `edge`, `component` or `direction` of the residual stream.
        keys: settings that it reads beside those that all read.
        scattered: drawn as points, since no knob orders its ablations.
    """

    look: Look
    knob: str = "sizes"
    unit: Literal["edge", "component", "direction"] = "component"
    keys: tuple[str, ...] = ()
    scattered: bool = False


REMOVAL_METHODS = registry(
    (
        RemovalMethod(
            "ugs",
            "oacore.removal.learned:edges",
            "Uniform gradient sampling learns for each edge the probability that it is cut, at a price for each edge.",
            Look(ACCENT, "o"),
            knob="edge_prices",
            unit="edge",
            keys=("masks",),
        ),
        RemovalMethod(
            "ugs_components",
            "oacore.removal.learned:components",
            "The same for heads and MLPs, each with all edges out of it, at a price for each component.",
            Look(PURPLE, "D"),
            knob="component_prices",
            keys=("masks",),
        ),
        RemovalMethod(
            "gap",
            "oacore.removal.ranked:by_gap",
            "The components whose ablation alone costs most on the forgotten prompts.",
            Look(BLUE, "s"),
        ),
        RemovalMethod(
            "eap_ig",
            "oacore.removal.ranked:by_attribution",
            "The components whose ablation lowers the forgotten log odds most by EAP-IG's estimate, the sum over the "
            "edges out of them.",
            Look(TEAL, "v"),
            keys=("n_prompts", "ig_steps"),
        ),
        RemovalMethod(
            "random",
            "oacore.removal.ranked:at_random",
            "Components drawn at random: what no method may fall short of.",
            Look(PALE, "."),
            scattered=True,
        ),
        RemovalMethod(
            "linear_erasure",
            "oacore.removal.erasure:directions",
            "Directions of the residual stream in which right answers differ most, at one layer and every position.",
            Look(GREEN, "^"),
            knob="ranks",
            unit="direction",
        ),
    )
)

if TYPE_CHECKING:
    RemovalMethodName = str
else:
    RemovalMethodName = Literal[tuple(REMOVAL_METHODS)]


def _selection(value: Any) -> Any:
    """A task's name, a list of names, or a mapping of names to patterns, as a mapping; no pattern means all prompts."""
    if isinstance(value, str):
        return {value: ""}
    if isinstance(value, list | tuple) and all(isinstance(name, str) for name in value):
        return dict.fromkeys(value, "")
    if isinstance(value, dict):
        return {name: "" if pattern is None else pattern for name, pattern in value.items()}
    return value


def _patterns_compile(value: dict[str, str]) -> dict[str, str]:
    for task, pattern in value.items():
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{task}: {pattern!r} is no regular expression: {error}; allowed: one, or none") from None
    return value


Selection = Annotated[dict[str, str], BeforeValidator(_selection)]
Prices = tuple[Annotated[float, Field(ge=0)], ...]
Sizes = tuple[Annotated[int, Field(ge=1)], ...]


class Relearn(Settings):
    """Fine-tuning with the ablation in place, until the forgotten task's held-out accuracy is back."""

    n_prompts: int = Field(64, ge=1, description="forgotten training prompts that a step learns from, always the same")
    learning_rate: float = Field(1e-4, gt=0, description="Adam step of every weight")
    max_steps: int = Field(24, ge=0, description="steps that are tried at most; 0 measures none")


class Removal(Settings):
    """Removing a behaviour by ablations that keep the others. The section's presence asks for it.

    Prompts are selected by a task's name, or as `{task: pattern}` those whose text a regular expression finds.
    """

    forget: Selection = Field(description="the task to forget, or `{task: pattern}` for those of its prompts")
    retain: Selection = Field(description="what to keep, in learning too: tasks, or patterns by task")
    paraphrases: Selection = Field({}, description="other wordings of what is forgotten: measured, never learned from")
    held_out: Selection = Field({}, description="what to keep that learning does not see: measured only")
    methods: tuple[RemovalMethodName, ...] = Field(tuple(REMOVAL_METHODS), min_length=1, description="what to compare")
    ablations: tuple[EdgeAblation, ...] = Field(
        ("optimal", "zero"), min_length=1, description="what takes the place of what is ablated"
    )
    weight: float = Field(
        1.0, gt=0, description="of forgotten log odds above chance, in the loss beside the retained KL"
    )
    edge_prices: Prices = Field((1e-4, 1e-3, 1e-2), min_length=1, description="ugs: prices of an ablated edge in nats")
    component_prices: Prices = Field(
        (1e-3, 1e-2, 1e-1), min_length=1, description="ugs_components: prices of an ablated component in nats"
    )
    sizes: Sizes = Field((1, 2, 4, 8), min_length=1, description="gap, eap_ig, random: components to ablate")
    ranks: Sizes = Field((1, 2, 4, 8), min_length=1, description="linear_erasure: directions to erase")
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        (0,), min_length=1, description="an ablation of every knob for each"
    )
    n_prompts: int = Field(50, ge=1, description="eap_ig: forgotten training prompts that it looks at")
    ig_steps: int = Field(5, ge=1, description="eap_ig: interpolations of the input")
    masks: MaskFit = MaskFit()
    refit: Refit = Refit()
    relearn: Relearn = Relearn()

    def selections(self) -> Iterator[tuple[str, str, str]]:
        """Role, task and pattern of all that is read."""
        for role in ROLES:
            for task, pattern in getattr(self, role).items():
                yield role, task, pattern

    def tasks(self) -> tuple[str, ...]:
        """The tasks whose prompts are read."""
        return tuple(dict.fromkeys(task for _, task, _ in self.selections()))

    def knobs(self, method: RemovalMethodName) -> tuple[float, ...]:
        """What a method sweeps."""
        return tuple(float(knob) for knob in getattr(self, REMOVAL_METHODS[method].knob))

    def read_by(self, method: RemovalMethodName, ablation: EdgeAblation) -> dict[str, Any]:
        """The settings that one method's ablations depend on, JSON-able."""
        row = REMOVAL_METHODS[method]
        keys = {*ROLES, "weight", "relearn", "seeds", row.knob, *row.keys}
        if EDGE_ABLATIONS[ablation].fitted:
            keys.add("refit")
        return self.model_dump(mode="json", include=keys)

    def read_by_each(self, method: RemovalMethodName, ablation: EdgeAblation) -> dict[str, Any]:
        """What determines each ablation beside its own knob and seed."""
        values = self.read_by(method, ablation)
        each = {key: value for key, value in values.items() if key not in ("seeds", REMOVAL_METHODS[method].knob)}
        if "masks" in each:
            each["masks"] = {key: value for key, value in each["masks"].items() if key != "record_every"}
        return each

    def figures(self) -> tuple[str, ...]:
        """Names of the figures that these settings give (`oacore.removal.plots.removal_figures`)."""
        more = ("held_out",) if self.paraphrases or self.held_out else ()
        again = ("relearning",) if self.relearn.max_steps else ()
        return (*(f"front_{ablation}" for ablation in self.ablations), *more, *again)

    @model_validator(mode="after")
    def _makes_sense(self) -> "Removal":
        if len(self.forget) != 1:
            raise ValueError(f"forget: {', '.join(self.forget) or 'nothing'}; allowed: one task")
        if not self.retain:
            raise ValueError("retain: nothing; allowed: one task or more")
        for role in ROLES:
            _patterns_compile(getattr(self, role))
        allowed = [name for name, row in EDGE_ABLATIONS.items() if not row.per_prompt and not row.positional]
        if other := [name for name in self.ablations if name not in allowed]:
            raise ValueError(
                f"ablations: {other[0]!r} is no constant that holds at every position; allowed: {', '.join(allowed)}"
            )
        for name in ("methods", "ablations", "seeds", "edge_prices", "component_prices", "sizes", "ranks"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise ValueError(f"{name}: {', '.join(map(str, values))} repeats a value; allowed: each once")
        if not isinstance(self.masks.n_steps, int):
            raise ValueError("masks.n_steps: a number for each ablation type; allowed: one number")
        return self
