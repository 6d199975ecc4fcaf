"""What all sections of the config share."""

import difflib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator

LARGEST = 2**31 - 1  # of whole numbers: counts and seeds beyond it overflow somewhere


def _at_home(path: Path) -> Path:
    try:
        return path.expanduser()
    except RuntimeError:  # `~name`, and there is nobody of that name
        raise ValueError(f"{str(path)!r}: no such home directory; allowed: a path") from None


LocalPath = Annotated[Path, AfterValidator(_at_home)]


class Settings(BaseModel):
    """Base of every section: unknown keys are refused, values never change after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @field_validator("*", mode="before")
    @classmethod
    def _numbers_are_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        """`yes` in YAML is true, which pydantic would take for 1; and no count or seed has ten digits."""
        assert info.field_name is not None
        kinds = list(_types(cls.model_fields[info.field_name].annotation))
        if bool in kinds or not (int in kinds or float in kinds):
            return value
        for item in value if isinstance(value, list | tuple) else [value]:
            if isinstance(item, bool):
                raise ValueError(f"{item}: neither true nor false (yes, no, on, off) is allowed here")
            if isinstance(item, int) and abs(item) > LARGEST:
                raise ValueError(f"{item}; allowed: whole numbers up to {LARGEST}")
        return value


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


def _types(annotation: Any) -> Iterator[Any]:
    """The types that an annotation is made of."""
    yield annotation
    for part in get_args(annotation):
        yield from _types(part)
