"""`interactions:` direct and indirect effects of the components that matter most, and what pairs of them cost."""

from typing import Any, Literal

from pydantic import Field, model_validator

from oacore.config.base import Settings
from oacore.config.circuits import EDGE_ABLATIONS, EdgeAblation, Refit


class Interactions(Settings):
    """Effects and interactions under each ablation type. The section's presence asks for them."""

    tasks: tuple[str, ...] | None = Field(
        None, min_length=1, description="tasks to measure effects on; none means all of the config"
    )
    ablations: tuple[EdgeAblation, ...] = Field(
        ("optimal", "mean", "zero", "resample", "counterfactual"),
        min_length=1,
        description="what an ablated edge carries; components are ranked under the first",
    )
    n_components: int = Field(
        8, ge=0, description="how many heads and MLPs to measure: those whose ablation costs most on validation prompts"
    )
    components: tuple[str, ...] = Field(
        (), description="components to measure in any case, by name: a3.h1, m3, or input"
    )
    mediators: Literal["component", "layer"] = Field(
        "component", description="what indirect effects are split by: each later component, or each later layer"
    )
    refit: Refit = Refit()

    def read_by(self, ablation: EdgeAblation) -> dict[str, Any]:
        """The settings that the effects under one ablation type depend on, JSON-able."""
        return self.model_dump(mode="json", include={"n_components", "components", "mediators"}) | self.fit(ablation)

    def fit(self, ablation: EdgeAblation) -> dict[str, Any]:
        """The settings of the constants' fit, JSON-able; empty of an ablation type that has none."""
        return {"refit": self.refit.model_dump(mode="json")} if EDGE_ABLATIONS[ablation].fitted else {}

    def figures(self) -> tuple[str, ...]:
        """Names of the figures that these settings give (`oacore.interactions.plots.interaction_figures`)."""
        return (
            "direct_against_total",
            *(f"{kind}_{ablation}" for kind in ("interactions", "paths") for ablation in self.ablations),
        )

    @model_validator(mode="after")
    def _there_is_something_to_measure(self) -> "Interactions":
        if not self.n_components and not self.components:
            raise ValueError("n_components: 0 without components; allowed: 1 or more, or components by name")
        for name in ("components", "ablations"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise ValueError(f"{name}: {', '.join(values)} repeats a value; allowed: each once")
        return self
