"""`ablation:` single-component ablation, and the registry of what may replace a component's output."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from oacore.config.base import OptimalFit, Settings
from oacore.config.colors import ACCENT, BLUE, GOLD
from oacore.config.rows import Row, registry


@dataclass(frozen=True)
class AblationType(Row):
    """What replaces a component's output; `code` gives the values, see `oacore.ablation.replacements`.

    Args:
        fitted: constants are fitted first.
        positional: there is one constant per position.
        starts_from: the fitted type whose constants its fit may start from.
        of_partner, of_counterfactual: it takes the clean run of another prompt, or of the prompt's counterfactual.
        color: in figures, where most types are alike and few stand out; empty for those.
    """

    fitted: bool = False
    positional: bool = False
    starts_from: str = ""
    of_partner: bool = False
    of_counterfactual: bool = False
    color: str = ""


_VALUES = "oacore.ablation.replacements"
ABLATION_TYPES = registry(
    (
        AblationType("zero", f"{_VALUES}:zero", "The component's output becomes the zero vector."),
        AblationType("mean", f"{_VALUES}:mean", "Its mean output over prompts and positions."),
        AblationType(
            "mean_positional", f"{_VALUES}:mean_positional", "Its mean output over prompts, position by position."
        ),
        AblationType(
            "resample", f"{_VALUES}:resample", "Its output on another prompt, at shuffled positions.", of_partner=True
        ),
        AblationType(
            "resample_positional",
            f"{_VALUES}:resample_positional",
            "Its output on another prompt, at the same positions.",
            of_partner=True,
        ),
        AblationType(
            "cf_mean",
            f"{_VALUES}:counterfactual_mean",
            "Its mean output over the counterfactual prompts, position by position.",
        ),
        AblationType(
            "counterfactual",
            f"{_VALUES}:counterfactual",
            "Its output on the prompt's own counterfactual.",
            of_counterfactual=True,
            color=BLUE,
        ),
        AblationType(
            "gaussian",
            f"{_VALUES}:gaussian",
            "Its own output plus Gaussian noise of three standard deviations per coordinate.",
        ),
        AblationType(
            "optimal",
            f"{_VALUES}:optimal",
            "The one constant vector that makes the gap smallest, fitted on training prompts.",
            fitted=True,
            color=ACCENT,
        ),
        AblationType(
            "optimal_positional",
            f"{_VALUES}:optimal_positional",
            "The constant vectors, one per position, that make the gap smallest, fitted on training prompts.",
            fitted=True,
            positional=True,
            starts_from="optimal",
            color=GOLD,
        ),
    )
)

if TYPE_CHECKING:
    Method = str
else:
    Method = Literal[tuple(ABLATION_TYPES)]
ComponentKind = Literal["head", "mlp", "attention_layer"]


class Ablation(Settings):
    """Single-component ablation."""

    tasks: tuple[str, ...] | None = Field(
        None, description="tasks to ablate components on; none means all of the config"
    )
    methods: tuple[Method, ...] = Field(tuple(ABLATION_TYPES), min_length=1, description="ablation types to compare")
    components: tuple[ComponentKind, ...] = Field(("head", "mlp"), min_length=1, description="what to ablate")
    optimal: OptimalFit = OptimalFit()

    @model_validator(mode="after")
    def _fits_have_their_starts(self) -> "Ablation":
        for method in self.methods:
            start = ABLATION_TYPES[method].starts_from
            if start and start not in self.methods:
                raise ValueError(f"{method} starts from the {start} constants: list {start} too")
        return self

    def fitted(self) -> tuple[Method, ...]:
        """The methods that have constants to fit, in the order of the registry."""
        return tuple(row.name for row in ABLATION_TYPES.values() if row.fitted and row.name in self.methods)

    def starts_from(self, method: Method) -> Method:
        """The method whose constants the fit of this one may start from; empty if there is none."""
        return ABLATION_TYPES[method].starts_from

    def figures(self) -> tuple[str, ...]:
        """Names of the figures that these methods allow (`oacore.ablation.plots.ablation_figures` draws them)."""
        fitted = ("layer_head_heatmap", "convergence_curves") if self.fitted() else ()
        compared = ("optimal_against_counterfactual",) if {"optimal", "counterfactual"} <= set(self.methods) else ()
        return ("gap_distributions", *compared, *fitted)
