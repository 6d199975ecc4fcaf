"""`tracing:` causal tracing, and the registry of what may replace a subject's token embeddings."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import isnan
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, get_args

from pydantic import Field, model_validator

from oacore.config.base import OptimalFit, Settings
from oacore.config.colors import ACCENT, BLUE_GREY, GOLD, INK, PALE_SLATE, SLATE
from oacore.config.rows import Row, registry

Site = Literal["attention", "mlp", "block"]
Position = Literal["last", "last_subject", "all_subject"]
AnswerKind = Literal["first_token", "joint"]
# What figures and reports call them, in the order in which they show them.
SITES: Mapping[str, str] = {"attention": "attention output", "mlp": "MLP output", "block": "block output"}
POSITIONS: Mapping[str, str] = {
    "last": "last token",
    "last_subject": "last subject token",
    "all_subject": "all subject tokens",
}
USUAL_NOISE = 3.0  # standard deviations, of ROME and the paper: the scale to compare with, or the nearest there is

LineStyle = Literal["-"] | tuple[float, tuple[float, ...]]


class Stroke(NamedTuple):
    """How a curve is drawn: told apart by stroke and shape where the colours are not."""

    color: str = SLATE
    style: LineStyle = "-"
    marker: str = "<"
    width: float = 1.1
    band: float = 0.07  # opacity of its interval


UNKNOWN = Stroke()  # a corruption that no row is of


@dataclass(frozen=True)
class CorruptionRow(Row):
    """What replaces a subject's token embeddings; `code` gives the corrupted residuals, see
    `oacore.tracing.corruptions`.

    Args:
        scaled: it is noise of so many standard deviations: one corruption for each of `noise_scales`, which tables call
            `{name}-{scale}`, averaged over `n_draws` draws; its note has {scale} where the number belongs.
        other_subject: it takes tokens of the prompt about another subject, a corrupt prompt where the task has those.
        constants: which of the constants that are fitted first it takes: the one that is best for the corrupted run
            (`shared`), each restored place's own (`own`), or its own only where that is better beyond chance
            (`cautious`); the last two have a corrupted run for each place. Empty for a corruption without constants.
        pictured: single facts are drawn token by token under it: a fitted one wherever constants are fitted, noise with
            the scale nearest to the usual one. Not for constants of places: no constant is fitted to one token.
        look: of its curves; noise of several scales takes other line styles.
    """

    scaled: bool = False
    other_subject: bool = False
    constants: Literal["", "shared", "own", "cautious"] = ""
    pictured: bool = False
    look: Stroke = UNKNOWN

    @property
    def fitted(self) -> bool:
        """Whether constants are fitted for it."""
        return bool(self.constants)

    @property
    def per_place(self) -> bool:
        """Whether each restored place has a corrupted run of its own."""
        return self.constants in ("own", "cautious")


_VALUES = "oacore.tracing.corruptions"
# The first is drawn on top, and reports begin with it.
CORRUPTIONS = registry(
    (
        CorruptionRow(
            "oat",
            f"{_VALUES}:constant",
            "Optimal ablation: one constant vector in place of the embedding of every subject token, trained on other "
            "facts to lose the least probability of the answer; a constant of its own for each restored place, and one "
            "for the fully corrupted run: the paper's estimator.",
            constants="own",
            look=Stroke(ACCENT, marker="o", width=2.1, band=0.2),
        ),
        CorruptionRow(
            "oat_cautious",
            f"{_VALUES}:constant",
            "The same, but a place has the corrupted run's constant unless its own is better on the validation facts "
            "by more than two standard errors, so that fits which differ by chance do not pass for effects.",
            constants="cautious",
            look=Stroke(GOLD, marker="h", width=1.6, band=0.1),
        ),
        CorruptionRow(
            "oat_shared",
            f"{_VALUES}:constant",
            "The constant that optimal ablation trains for the fully corrupted run, whatever is restored.",
            constants="shared",
            pictured=True,
            look=Stroke(SLATE, (0, (5, 1.8)), "D"),
        ),
        CorruptionRow(
            "gaussian",
            f"{_VALUES}:gaussian",
            "Adds normal noise to the subject tokens' embeddings, of {scale} times each coordinate's standard "
            "deviation over the subject tokens of the training facts; averaged over draws.",
            scaled=True,
            pictured=True,
            look=Stroke(BLUE_GREY, marker="P"),
        ),
        CorruptionRow(
            "gaussian_scalar",
            f"{_VALUES}:gaussian_scalar",
            "Adds normal noise to the subject tokens' embeddings, of {scale} times one standard deviation for all "
            "coordinates together, as in ROME; averaged over draws.",
            scaled=True,
            look=Stroke(PALE_SLATE, marker="X"),
        ),
        CorruptionRow(
            "mean",
            f"{_VALUES}:mean",
            "Every subject token's embedding becomes the mean embedding of the subject tokens of the training facts.",
            look=Stroke(INK, (0, (1, 1.4)), "^"),
        ),
        CorruptionRow(
            "token_replacement",
            f"{_VALUES}:token_replacement",
            "The subject's tokens become those of another subject of the same length; in a task from a file, those of "
            "the corrupt prompt.",
            other_subject=True,
            look=Stroke(INK, (0, (6, 1.6, 1, 1.6)), "v"),
        ),
    )
)

if TYPE_CHECKING:
    Corruption = str
else:
    Corruption = Literal[tuple(CORRUPTIONS)]


def kind_and_scale(name: str) -> tuple[str, float]:
    """A corruption as tables call it, taken apart: `gaussian-3` is of kind gaussian and scale 3; without noise the
    scale is NaN.
    """
    kind, _, scale = name.partition("-")
    return (kind, float(scale)) if scale and kind in CORRUPTIONS and CORRUPTIONS[kind].scaled else (name, float("nan"))


def corruptions_in_order(names: Iterable[str]) -> list[str]:
    """Each corruption once, in the order of the registry, noise by its scale; unknown ones last, as they come."""
    kinds = list(CORRUPTIONS)

    def key(name: str) -> tuple[int, float]:
        kind, scale = kind_and_scale(name)
        return (kinds.index(kind) if kind in kinds else len(kinds), 0.0 if isnan(scale) else scale)

    return sorted(dict.fromkeys(names), key=key)


def noises(names: Iterable[str]) -> list[str]:
    """The corruptions that are noise of some scale, in order."""
    return [name for name in corruptions_in_order(names) if not isnan(kind_and_scale(name)[1])]


def usual_noise(names: Iterable[str]) -> str | None:
    """The noise to compare with: of the kind that the registry has first, of the scale nearest to `USUAL_NOISE`, the
    larger of two; None if none of the corruptions is noise.
    """
    kinds = list(CORRUPTIONS)

    def key(name: str) -> tuple[int, float, float]:
        kind, scale = kind_and_scale(name)
        return kinds.index(kind), abs(scale - USUAL_NOISE), -scale

    return min(noises(names), key=key, default=None)


class TracingFit(OptimalFit):
    """Fitting of the constants of causal tracing: the loss is the answer's probability that is lost."""

    learning_rate: float = Field(
        0.1, gt=0, description="Adam step as a round begins, in standard deviations of the subjects' token embeddings"
    )
    batch_size: int = Field(20, ge=1, description="facts a step, shared by all places")


_NOISE = ", ".join(row.name for row in CORRUPTIONS.values() if row.scaled)


class Tracing(Settings):
    """Causal tracing: where is a fact about a subject recalled? The section's presence asks for it."""

    tasks: tuple[str, ...] | None = Field(
        None,
        min_length=1,
        description="facts, and tasks from files whose rows all have a subject (docs/tasks.md); omitted: facts",
    )
    corruptions: tuple[Corruption, ...] = Field(
        tuple(CORRUPTIONS), min_length=1, description="what replaces the subject's token embeddings"
    )
    noise_scales: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        (1.0, 3.0, 5.0),
        min_length=1,
        description=f"{_NOISE}: standard deviations of the noise, one corruption for each",
    )
    n_draws: int = Field(5, ge=1, description=f"{_NOISE}: draws of the noise per fact")
    sites: tuple[Site, ...] = Field(("attention", "mlp"), min_length=1, description="what is restored")
    positions: tuple[Position, ...] = Field(get_args(Position), min_length=1, description="where it is restored")
    windows: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (1, 5, 9),
        min_length=1,
        description="how many layers are restored, around each; odd, clipped at the ends of the model",
    )
    answer: AnswerKind = Field(
        "first_token",
        description="whose probability counts: the answer's first token's, or the joint one of all its tokens",
    )
    pictures: int | tuple[str, ...] = Field(
        3, description="test facts drawn token by token: how many, or a list of prompts or parts of them"
    )
    fit: TracingFit = TracingFit()

    @model_validator(mode="after")
    def _has_no_even_window_and_no_repeats(self) -> "Tracing":
        if even := [width for width in self.windows if width % 2 == 0]:
            raise ValueError(
                f"windows: {', '.join(map(str, even))}; allowed: odd numbers, a layer and as many on either side"
            )
        for name in ("tasks", "corruptions", "noise_scales", "sites", "positions", "windows"):
            values = getattr(self, name) or ()
            if len(set(values)) < len(values):
                raise ValueError(f"{name}: {', '.join(map(str, values))} repeats a value")
        if isinstance(self.pictures, int) and self.pictures < 0:
            raise ValueError(f"pictures: {self.pictures}; allowed: 0 or more, or a list of prompts")
        return self

    @property
    def fitted(self) -> bool:
        """Whether constants are to be fitted."""
        return any(CORRUPTIONS[kind].fitted for kind in self.corruptions)

    @property
    def per_place(self) -> bool:
        """Whether every place is to have a constant of its own, beside that of the corrupted run."""
        return any(CORRUPTIONS[kind].per_place for kind in self.corruptions)

    def read_by_fit(self) -> dict[str, Any]:
        """The settings that the fit of the constants depends on, JSON-able."""
        values = self.model_dump()
        keys = ("sites", "positions", "windows", "answer", "fit")
        return {key: values[key] for key in keys} | {"per_place": self.per_place}

    def read_by_trace(self) -> dict[str, Any]:
        """The settings that tracing depends on, given the constants, JSON-able."""
        return self.model_dump(exclude={"fit", "tasks"})

    def corruption_names(self) -> tuple[str, ...]:
        """The corruptions as tables call them: noise once for each scale."""
        return tuple(name for kind in self.corruptions for name in self._names_of(kind))

    def pictured_corruptions(self) -> tuple[str, ...]:
        """The corruptions that single facts are drawn under, as tables call them; the first of all if none is for
        it.
        """
        names = [
            usual_noise(self._names_of(row.name)) or row.name
            for row in CORRUPTIONS.values()
            if row.pictured and (row.name in self.corruptions or (row.fitted and self.fitted))
        ]
        return tuple(names or self.corruption_names()[:1])

    def corruption_kinds(self) -> tuple[Corruption, ...]:
        """The rows of all corruptions that are run, for the tables or for the pictures of single facts."""
        pictured = (kind_and_scale(name)[0] for name in self.pictured_corruptions())
        return tuple(dict.fromkeys([*self.corruptions, *pictured]))

    def draws_of(self, corruption: str) -> int:
        """How many draws a corruption, as tables call it, is averaged over."""
        return self.n_draws if noises([corruption]) else 1

    def figures(self) -> tuple[str, ...]:
        """Names of the figures that these settings give (`oacore.tracing.plots.tracing_figures` draws them)."""
        n_pictures = self.pictures if isinstance(self.pictures, int) else len(self.pictures)
        return (
            *(f"aie_{site}" for site in self.sites),
            *(["noise_scales"] if len(noises(self.corruption_names())) > 1 else []),
            *(f"fact_{number}" for number in range(n_pictures)),
        )

    def _names_of(self, kind: Corruption) -> list[str]:
        return [f"{kind}-{scale:g}" for scale in self.noise_scales] if CORRUPTIONS[kind].scaled else [kind]
