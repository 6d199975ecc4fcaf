"""`lenses:` latent prediction, and the registry of lenses."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from oacore.config.base import LocalPath, OptimalFit, Settings
from oacore.config.colors import ACCENT, BLUE, GOLD, GREEN, INK, PINK, PURPLE, SLATE, TEAL
from oacore.config.rows import Look, Row, registry

LENS_SECTIONS = ("faithfulness", "truthfulness")  # of `lenses:`
_VALUES = "oacore.estimate.lenses:values_"


UNKNOWN = Look(SLATE, "<")  # a lens that no row is of


@dataclass(frozen=True)
class LensRow(Row):
    """A lens; `code` is its class, see `oacore.lenses.lens`.

    Args:
        fit: the section of `lenses:` with the settings of its fit; empty for a lens that nothing is fitted for.
        reads: other keys of `lenses:` that its fit reads.
        inits: where its fits may start, of which the setting `init` chooses: there is one file for each. The fits of
            the first are drawn with full lines, those of others with dashed ones.
        teacher: the fitted lens whose output this one is fitted to; empty for the model's.
        shared: one fit serves all layers; else each layer has its own, with its own test of convergence.
        values: `package.module:name` of its number of values, for estimates.
        fitted_values: the same of the number of values that descend, where it is another one.
        runs_mlps: it runs the model's remaining MLPs; else it maps the residual straight away.
        runs_model: its fit runs the model, for the mean Jacobian of its layers.
        drawn: its place, from 1, among the grids of a picture; 0 is not drawn.
        highlighted: the lens that the others are compared with.
        look: in figures.
    """

    fit: str = ""
    reads: tuple[str, ...] = ()
    inits: tuple[str, ...] = ()
    teacher: str = ""
    shared: bool = False
    values: str = f"{_VALUES}none"
    fitted_values: str = ""
    runs_mlps: bool = False
    runs_model: bool = False
    drawn: int = 0
    highlighted: bool = False
    look: Look = UNKNOWN


LENSES = registry(
    (
        LensRow(
            "oca",
            "oacore.lenses.constant:OptimalConstants",
            "Optimal constant attention: the model's own MLPs, final norm and unembedding, with the output of every "
            "attention layer from l on replaced by a fitted constant vector; each layer l has constants of its own.",
            fit="oca",
            values=f"{_VALUES}per_layer_pair",
            runs_mlps=True,
            drawn=1,
            highlighted=True,
            look=Look(ACCENT, "o"),
        ),
        LensRow(
            "oca_shared",
            "oacore.lenses.constant:SharedConstants",
            "The same, with one constant vector per attention layer for all l.",
            fit="oca",
            shared=True,
            values=f"{_VALUES}per_layer",
            runs_mlps=True,
            look=Look(PINK, "P"),
        ),
        LensRow(
            "linear_oca",
            "oacore.lenses.affine:AffineLens",
            "An affine map of the residual stream before the final norm and unembedding, fitted to the output of the "
            "OCA lens.",
            fit="tuned",
            teacher="oca",
            values=f"{_VALUES}affine",
            look=Look(GOLD, "h"),
        ),
        LensRow(
            "tuned",
            "oacore.lenses.affine:AffineLens",
            "An affine map of the residual stream before the final norm and unembedding, fitted to the output of the "
            "model; its fits start at the identity or at random weights.",
            fit="tuned",
            inits=("identity", "random"),
            values=f"{_VALUES}affine",
            drawn=3,
            look=Look(BLUE, "s"),
        ),
        LensRow(
            "logit",
            "oacore.lenses.logit:LogitLens",
            "The final norm and unembedding straight away, with nothing fitted.",
            drawn=2,
            look=Look(INK, "X"),
        ),
        LensRow(
            "mean",
            "oacore.lenses.constant:MeanAttention",
            "The OCA lens with each attention layer's mean output over prompts in place of a fitted constant.",
            values=f"{_VALUES}per_layer",
            runs_mlps=True,
            look=Look(GREEN, "^"),
        ),
        LensRow(
            "resample",
            "oacore.lenses.constant:ResampledAttention",
            "The OCA lens with each attention layer's output on another prompt in place of a fitted constant.",
            values=f"{_VALUES}bank",
            runs_mlps=True,
            look=Look(PURPLE, "D"),
        ),
        LensRow(
            "grad",
            "oacore.lenses.affine:GradientLens",
            "The first-order expansion of the model's remaining layers, with their mean Jacobian and a fitted bias.",
            fit="tuned",
            reads=("grad_prompts",),
            values=f"{_VALUES}affine",
            fitted_values=f"{_VALUES}per_layer",
            runs_model=True,
            look=Look(TEAL, "v"),
        ),
    )
)
HIGHLIGHTED = next(row.name for row in LENSES.values() if row.highlighted)
INITS = tuple(dict.fromkeys(init for row in LENSES.values() for init in row.inits))

if TYPE_CHECKING:
    LensName = str
    LensInit = str
else:
    LensName = Literal[tuple(LENSES)]
    LensInit = Literal[INITS]


def lens_and_init(file: str) -> tuple[LensName, LensInit]:
    """The lens and the init, or an empty one, that a file `{lens}` or `{lens}-{init}` is named by."""
    lens, _, init = file.partition("-")
    return lens, init


class LensFit(OptimalFit):
    """Fitting of OCA's constants."""

    learning_rate: float = Field(
        0.1, gt=0, description="Adam step as a round begins, in standard deviations of a layer's attention output"
    )
    batch_size: int = Field(200, ge=1, description="cached rows a step, shared by all layers")
    first_round: int = Field(
        150,
        ge=1,
        description="steps of the first round, in which the rate falls to zero; every further one has twice as many",
    )
    max_steps: int = Field(9450, ge=1, description="cap on the steps of all rounds; the last one ends there")


class AffineFit(LensFit):
    """Fitting of affine lenses: tuned, linear_oca, and grad's bias."""

    learning_rate: float = Field(
        0.01,
        gt=0,
        description="Adam step, the paper's; 10 times that for SGD, from which the identity starts, the official "
        "recipe's",
    )


class Faithfulness(Settings):
    """Does a lens react as the model does when the residual is changed? The section's presence asks for it."""

    lenses: tuple[LensName, ...] = Field(
        ("oca", "linear_oca", "tuned", "logit"), min_length=1, description="lenses to try"
    )
    layers: tuple[Annotated[int, Field(ge=0)], ...] | None = Field(
        None, min_length=1, description="layers to try; none means all"
    )
    n_prompts: int = Field(25, ge=2, description="test prompts that are changed")
    n_directions: int = Field(20, ge=2, description="random directions, and singular directions, for each layer")
    resample_sizes: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (5, 20, 100), description="singular directions that are resampled together; at most the model's width"
    )
    target_kl: float = Field(0.2, gt=0, description="steering: mean KL in nats that the model itself changes by")


class Truthfulness(Settings):
    """At which layer does a wrong demonstration win? The section's presence asks for it."""

    datasets: tuple[LocalPath, ...] | None = Field(
        None,
        min_length=1,
        description="CSV or JSON lines files with text, label; only the demo model has one of its own",
    )
    n_demonstrations: int = Field(10, ge=1, description="labelled examples in a prompt")
    n_inputs: int = Field(500, ge=2, description="prompts for each data set, with true and with permuted labels")
    template: str = Field("{text} {label}", description="one demonstration; a prompt ends right before its label")
    separator: str = Field("\n", description="between demonstrations")
    lenses: tuple[LensName, ...] = Field(("oca", "tuned", "logit"), min_length=1, description="lenses to try")

    @model_validator(mode="after")
    def _template_ends_in_the_label(self) -> "Truthfulness":
        if "{text}" not in self.template or not self.template.endswith("{label}"):
            raise ValueError(f"template: {self.template!r}; allowed: a text with {{text}} that ends in {{label}}")
        return self


class Lenses(Settings):
    """Latent prediction: what each layer already knows. The section's presence asks for it."""

    tasks: tuple[str, ...] | None = Field(
        None, min_length=1, description="tasks to fit lenses on; none means text, or else all"
    )
    lenses: tuple[LensName, ...] = Field(
        ("oca", "linear_oca", "tuned", "logit", "mean", "resample", "grad"), min_length=1, description="what to compare"
    )
    init: tuple[LensInit, ...] = Field(INITS, min_length=1, description="where tuned lenses start, one for each")
    positions: Literal["last", "all"] = Field(
        "last", description="rows to fit on: the last position of each prompt, or every one but BOS"
    )
    oca: LensFit = LensFit()
    tuned: AffineFit = AffineFit()
    grad_prompts: int = Field(
        32, ge=1, description="grad: training prompts over which the model's Jacobian is averaged"
    )
    lengths: tuple[Annotated[int, Field(ge=3)], ...] = Field(
        (), description="text: other window lengths, in tokens with BOS, at which the lenses are tested too"
    )
    pictures: int = Field(2, ge=0, description="test prompts drawn token by token")
    faithfulness: Faithfulness | None = None
    truthfulness: Truthfulness | None = None

    @model_validator(mode="before")
    @classmethod
    def _empty_sections_mean_defaults(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return value | {name: {} for name in LENS_SECTIONS if name in value and value[name] is None}

    @model_serializer(mode="wrap")
    def _only_asked_for(self, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {
            name: value for name, value in serialise(self).items() if name not in LENS_SECTIONS or value is not None
        }

    @model_validator(mode="after")
    def _sections_take_lenses_that_there_are(self) -> "Lenses":
        for lens in self.lenses:
            row = LENSES[lens]
            if row.teacher and row.teacher not in self.lenses:
                raise ValueError(f"lenses: {lens} is fitted to {row.teacher}: list {row.teacher} too")
            if row.inits and not set(row.inits) & set(self.init):
                raise ValueError(f"init: {', '.join(self.init)}; allowed with {lens}: {', '.join(row.inits)}")
        for section in LENS_SECTIONS:
            asked = getattr(self, section)
            if asked is not None and (missing := [name for name in asked.lenses if name not in self.lenses]):
                raise ValueError(
                    f"{section}.lenses: {', '.join(missing)}; allowed: lenses.lenses: {', '.join(self.lenses)}"
                )
        for name in ("lenses", "init", "lengths"):
            if len(set(getattr(self, name))) < len(getattr(self, name)):
                raise ValueError(f"{name}: {', '.join(map(str, getattr(self, name)))} repeats a value")
        return self

    def files(self, lenses: Iterable[LensName] | None = None) -> tuple[str, ...]:
        """These lenses, or all, as their files are called: once for each init that a lens may start from."""
        wanted = self.lenses if lenses is None else tuple(lenses)
        return tuple(
            f"{lens}-{init}" if init else lens
            for lens in self.lenses
            if lens in wanted
            for init in [init for init in self.init if init in LENSES[lens].inits] or [""]
        )

    def fitted_files(self, lenses: Iterable[LensName] | None = None) -> tuple[str, ...]:
        """Those of these lenses, or of all, that are fitted, by the names of their files."""
        return tuple(file for file in self.files(lenses) if LENSES[lens_and_init(file)[0]].fit)

    def teacher(self, file: str) -> str | None:
        """The file of the lens whose output this one is fitted to; None for those that are fitted to the model's."""
        teacher = LENSES[lens_and_init(file)[0]].teacher
        return self.fitted_files([teacher])[0] if teacher else None

    def read_by_fit(self, file: str) -> dict[str, Any]:
        """The settings that the fit of a lens depends on, JSON-able: those of the others do not make it stale."""
        row, values = LENSES[lens_and_init(file)[0]], self.model_dump()
        return {key: values[key] for key in ("positions", row.fit, *row.reads)}

    def read_by_evaluation(self) -> dict[str, Any]:
        """The settings that the evaluation depends on, given the fitted lenses, JSON-able."""
        return self.model_dump(include={"lenses", "init", "positions", "lengths", "pictures"})

    def read_by_section(self, section: str) -> dict[str, Any]:
        """The settings that faithfulness or truthfulness depends on, given the fitted lenses, JSON-able."""
        values = self.model_dump()
        files = self.files(getattr(self, section).lenses)
        return {key: values[key] for key in ("positions", section)} | {"files": files}

    def drawn_files(self) -> tuple[str, ...]:
        """The lenses of a picture in order, each with its first init."""
        drawn = [LENSES[lens] for lens in self.lenses if LENSES[lens].drawn]
        return tuple(self.files([row.name])[0] for row in sorted(drawn, key=lambda row: row.drawn))

    def tables(self) -> tuple[str, ...]:
        """Names of the tables that these settings give, without suffix."""
        sections = tuple(name for name in LENS_SECTIONS if getattr(self, name) is not None)
        return ("loss", *(("lengths",) if self.lengths else ()), *sections)

    def figures(self) -> tuple[str, ...]:
        """Names of the figures that these settings give (`oacore.lenses.plots.lens_figures` draws them)."""
        faithful = ("similarity", "correlation") if self.faithfulness is not None else ()
        return (
            "loss",
            "agreement",
            *(("lengths",) if self.lengths else ()),
            *faithful,
            *(("truthfulness",) if self.truthfulness else ()),
        )
