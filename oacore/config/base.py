"""What all sections of the config share."""

import difflib
from collections.abc import Iterable

from pydantic import BaseModel, ConfigDict, Field


class Settings(BaseModel):
    """Base of every section: unknown keys are refused, values never change after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class OptimalFit(Settings):
    """Fitting of optimal constants (methods: Li & Janson 2024, section 2.3)."""

    learning_rate: float = Field(
        0.2, gt=0, description="Adam step as a round begins, in standard deviations of the component's output"
    )
    batch_size: int = Field(16, ge=1, description="prompts a step, shared by all components")
    first_round: int = Field(
        50,
        ge=1,
        description="steps of the first round, in which the rate falls to zero; every further one has twice as many",
    )
    max_steps: int = Field(3150, ge=1, description="cap on the steps of all rounds; the last one ends there")
    tolerance: float = Field(
        0.01,
        gt=0,
        lt=1,
        description="share of the validation loss that further rounds may still gain, about, when a fit has converged",
    )

    @property
    def round_ends(self) -> list[int]:
        """The steps at which rounds end: each has twice the last one's steps, the last what is left of the cap."""
        ends, length = [0], self.first_round
        while ends[-1] + 3 * length <= self.max_steps:  # or too little would be left for another
            ends.append(ends[-1] + length)
            length *= 2
        return [*ends[1:], self.max_steps]


def nearest(value: object, choices: Iterable[str]) -> str:
    """The choice that was probably meant, for the end of an error message; empty if none is near."""
    match = difflib.get_close_matches(str(value), list(choices), n=1)
    return f" (did you mean {match[0]!r}?)" if match else ""
