"""What all sections of the config share."""

import difflib
from collections.abc import Iterable

from pydantic import BaseModel, ConfigDict, Field


class Settings(BaseModel):
    """Base of every section: unknown keys are refused, values never change after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class OptimalFit(Settings):
    """Fitting of optimal constants (methods: Li & Janson 2024, section 2.3)."""

    learning_rate: float = Field(0.2, gt=0, description="Adam step, in standard deviations of the component's output")
    batch_size: int = Field(16, ge=1, description="prompts a step, shared by all components")
    max_steps: int = Field(2000, ge=1, description="cap for components that do not converge")
    check_every: int = Field(20, ge=1, description="steps between convergence tests on the validation prompts")
    tolerance: float = Field(
        0.005, gt=0, lt=1, description="relative improvement of the validation gap that counts as progress"
    )
    patience: int = Field(2, ge=1, description="tests without progress before the learning rate drops")
    n_decays: int = Field(
        3, ge=0, description="drops of the learning rate (by 4) before a component counts as converged"
    )


def nearest(value: object, choices: Iterable[str]) -> str:
    """The choice that was probably meant, for the end of an error message; empty if none is near."""
    match = difflib.get_close_matches(str(value), list(choices), n=1)
    return f" (did you mean {match[0]!r}?)" if match else ""
