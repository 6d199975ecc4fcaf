"""`circuits:` circuit discovery, and the registries of how circuits are found and of what ablated edges carry."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from oacore.config.base import OptimalFit, Settings
from oacore.config.colors import ACCENT, BLUE, GOLD, GREEN, INK, PALE, PINK, PURPLE, SLATE, TEAL
from oacore.config.rows import Look, Row, registry

Objective = Literal["kl", "logit_diff"]


@dataclass(frozen=True)
class SearchMethod(Row):
    """A way to find circuits; `code` is its function `search`, see `oacore.circuits.search`.

    Args:
        look: of its fronts in figures.
        knob: the key of `circuits:` that it sweeps, one circuit for each value; empty for a method that has one
        circuit.
        keys: what its search reads of `circuits:` beside `seeds`, the knob and the objective.
        ranks: it gives scores of all edges for a seed, whose best edges are the circuits of all sizes.
        objective: the one loss that it can look at; empty for a method that takes `circuits.objective`.
        takes_constants: it judges edges without training constants, so that under a fitted edge ablation it takes the
            constants that were fitted for each component alone.
        baseline: it looks at no loss, so that any other method must beat it.
        scattered: its circuits are drawn as points without a front.
        only_task, only_model: the one task and model whose circuit it knows; empty for a method that searches.
        cost: `package.module:name` of the formula of its memory and arithmetic, and for that formula:
        parameters: learned numbers of an edge.
        gradient_passes: the key that says how many gradient passes a prompt takes; empty for one.
        contrast: gradients are multiplied by the clean run's differences, which are held beside.
        masks_at_once: masks that are judged side by side, for each knob if `sweeps_each_knob`.
        sweeps_each_knob: the edges are gone through for every knob, and not once for all of them.
        most_passes: the search refuses a model and prompts that take more; 0 for no limit.
    """

    look: Look
    knob: str = "sizes"
    keys: tuple[str, ...] = ()
    ranks: bool = False
    objective: Literal["", "kl", "logit_diff"] = ""
    takes_constants: bool = False
    baseline: bool = False
    scattered: bool = False
    only_task: str = ""
    only_model: str = ""
    cost: str = "oacore.estimate.circuits:nothing"
    parameters: int = 1
    gradient_passes: str = ""
    contrast: bool = False
    masks_at_once: int = 1
    sweeps_each_knob: bool = False
    most_passes: int = 0


_COST = "oacore.estimate.circuits"
CIRCUIT_METHODS = registry(
    (
        SearchMethod(
            "ugs",
            "oacore.circuits.ugs:search",
            "Uniform gradient sampling: learns for each edge the probability that it stays, from masks that are mostly "
            "0 or 1 and now and then uniform between, which makes the gradient unbiased.",
            Look(ACCENT, "o"),
            knob="lambdas",
            keys=("masks",),
            cost=f"{_COST}:mask_learning",
        ),
        SearchMethod(
            "hcgs",
            "oacore.circuits.hcgs:search",
            "Hard-concrete gradient sampling, the relaxation of Edge Pruning: learns a stretched and clipped concrete "
            "mask for each edge.",
            Look(BLUE, "s"),
            knob="lambdas",
            keys=("masks",),
            cost=f"{_COST}:mask_learning",
            parameters=2,
        ),
        SearchMethod(
            "topk",
            "oacore.circuits.topk:search",
            "Learns a score for each edge, and keeps as many of the highest as asked for.",
            Look(PURPLE, "D"),
            keys=("masks",),
            cost=f"{_COST}:mask_learning",
        ),
        SearchMethod(
            "eap",
            "oacore.circuits.eap:rank",
            "Edge attribution patching: scores each edge by the first-order estimate of what ablating it changes.",
            Look(GREEN, "^"),
            ranks=True,
            keys=("n_prompts",),
            objective="logit_diff",
            takes_constants=True,
            cost=f"{_COST}:gradient_scores",
        ),
        SearchMethod(
            "eap_ig",
            "oacore.circuits.eap:rank_integrated",
            "The same, with gradients averaged along the path from the counterfactual input to the prompt's.",
            Look(TEAL, "v"),
            ranks=True,
            keys=("n_prompts", "ig_steps"),
            takes_constants=True,
            cost=f"{_COST}:gradient_scores",
            gradient_passes="ig_steps",
            contrast=True,
        ),
        SearchMethod(
            "acdc",
            "oacore.circuits.acdc:search",
            "Walks the edges from the logits back to the input and drops each one whose ablation raises the loss by "
            "less than a threshold.",
            Look(PINK, "P"),
            knob="thresholds",
            keys=("n_prompts",),
            takes_constants=True,
            cost=f"{_COST}:edge_by_edge",
            # More waste passes where an edge stays, fewer leave a GPU idle.
            masks_at_once=4,
            sweeps_each_knob=True,
        ),
        SearchMethod(
            "exact",
            "oacore.circuits.exact:rank",
            "Scores each edge by the loss when it alone is ablated, without an approximation.",
            Look(SLATE, "X"),
            ranks=True,
            keys=("n_prompts",),
            takes_constants=True,
            cost=f"{_COST}:edge_by_edge",
            masks_at_once=32,
            # Beyond it a model is not small.
            most_passes=500_000,
        ),
        SearchMethod(
            "manual",
            "oacore.circuits.manual:search",
            "The published circuit that people found by hand.",
            Look(INK, "*"),
            knob="",
            baseline=True,
            only_task="ioi",
            only_model="GPT-2-small",
        ),
        SearchMethod(
            "random",
            "oacore.circuits.random:search",
            "Edges drawn at random, as many as the other circuits have: what no method may fall short of.",
            Look(PALE, "."),
            baseline=True,
            scattered=True,
        ),
    )
)


@dataclass(frozen=True)
class EdgeAblationType(Row):
    """What an ablated edge carries; `code` gives the values, see `oacore.circuits.replacements`.

    Args:
        look: of its fronts in figures.
        per_prompt: values differ from prompt to prompt; otherwise they are constants.
        drawn: they are those of another prompt, which is drawn at random.
        positional: there is one constant per position.
        fitted: constants are fitted, from what `code` gives.
    """

    look: Look
    per_prompt: bool = False
    drawn: bool = False
    positional: bool = False
    fitted: bool = False


_VALUES = "oacore.circuits.replacements"
EDGE_ABLATIONS = registry(
    (
        EdgeAblationType("zero", f"{_VALUES}:zero", "An ablated edge carries zeros.", Look(INK, "X")),
        EdgeAblationType(
            "mean",
            f"{_VALUES}:mean",
            "An ablated edge carries its source's mean output over prompts and positions.",
            Look(GREEN, "^"),
        ),
        EdgeAblationType(
            "mean_positional",
            f"{_VALUES}:mean_positional",
            "It carries its source's mean output over prompts, position by position.",
            Look(GREEN, ">"),
            positional=True,
        ),
        EdgeAblationType(
            "resample",
            f"{_VALUES}:resample",
            "It carries its source's output on another prompt, at shuffled positions.",
            Look(PURPLE, "D"),
            per_prompt=True,
            drawn=True,
        ),
        EdgeAblationType(
            "resample_positional",
            f"{_VALUES}:resample_positional",
            "It carries its source's output on another prompt, at the same position as far as that prompt goes.",
            Look(PURPLE, "<"),
            per_prompt=True,
            drawn=True,
        ),
        EdgeAblationType(
            "cf_mean",
            f"{_VALUES}:counterfactual_mean",
            "It carries its source's mean output over the counterfactual prompts, position by position.",
            Look(TEAL, "v"),
            positional=True,
        ),
        EdgeAblationType(
            "counterfactual",
            f"{_VALUES}:counterfactual",
            "It carries its source's output on the prompt's own counterfactual.",
            Look(BLUE, "s"),
            per_prompt=True,
        ),
        EdgeAblationType(
            "optimal",
            f"{_VALUES}:mean",
            "It carries a constant of its source, fitted to each circuit on training prompts such that the loss is "
            "smallest.",
            Look(ACCENT, "o"),
            fitted=True,
        ),
        EdgeAblationType(
            "optimal_positional",
            f"{_VALUES}:mean_positional",
            "It carries a constant of its source for each position, fitted to each circuit on training prompts.",
            Look(GOLD, "h"),
            positional=True,
            fitted=True,
        ),
    )
)

if TYPE_CHECKING:
    CircuitMethod = str
    EdgeAblation = str
else:
    CircuitMethod = Literal[tuple(CIRCUIT_METHODS)]
    EdgeAblation = Literal[tuple(EDGE_ABLATIONS)]


def leading(methods: Iterable[str]) -> str:
    """The method that a figure of one method is about: the first of the registry that is among these."""
    names = list(methods)
    return next((name for name in CIRCUIT_METHODS if name in names), names[0])


def _readers(key: str) -> str:
    """The methods that read a key, for its description."""
    return ", ".join(row.name for row in CIRCUIT_METHODS.values() if key in (row.knob, *row.keys))


class MaskFit(Settings):
    """Learning of edge masks by UGS, HCGS and top-k (Li & Janson 2024, section 3)."""

    n_steps: Annotated[int, Field(ge=1)] | dict[EdgeAblation, Annotated[int, Field(ge=1)]] = Field(
        3000,
        description="steps, or a number for each ablation type: the paper takes {optimal: 6000}, where constants are "
        "trained along, and 3000 otherwise",
    )
    n_samples: int = Field(12, ge=1, description="mask samples per prompt and step")
    n_prompts: int = Field(5, ge=1, description="prompts a step")
    learning_rate: float = Field(
        1.0, gt=0, description="times the paper's learning rates of the logits: 0.15 for small lambdas to 0.05"
    )
    constants_rate: float = Field(
        0.02, gt=0, description="Adam step of constants trained along, in standard deviations of a source"
    )
    dynamic_window: bool = Field(False, description="UGS, top-k: widen the window of edges whose gradient is noisy")
    record_every: int = Field(50, ge=1, description="steps between points of the curves, each a checkpoint")

    @property
    def steps(self) -> int:
        """The number of steps, of settings for one ablation type (`Circuits.masks_under`)."""
        assert isinstance(self.n_steps, int)
        return self.n_steps


class Refit(OptimalFit):
    """Constants fitted anew for every circuit of every method, for optimal ablations: equal terms for all."""

    learning_rate: float = Field(
        0.2, gt=0, description="Adam step as a round begins, in standard deviations of a source's output"
    )
    batch_size: int = Field(16, ge=1, description="prompts a step, shared by all circuits")


class Circuits(Settings):
    """Circuit discovery: every method, ablation type, knob and seed is one circuit. The section's presence asks for
    it.
    """

    tasks: tuple[str, ...] | None = Field(
        None, min_length=1, description="tasks to find circuits for; none means all of the config"
    )
    methods: tuple[CircuitMethod, ...] = Field(
        ("ugs", "hcgs", "eap", "eap_ig", "acdc", "random"), min_length=1, description="what to compare"
    )
    ablations: tuple[EdgeAblation, ...] = Field(
        ("optimal", "counterfactual"), min_length=1, description="what replaces an ablated edge's source"
    )
    objective: Objective = Field(
        "kl", description="loss of mask learning, EAP-IG, ACDC and exact; EAP always takes the logit difference"
    )
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        (0,), min_length=1, description="one circuit of every knob for each"
    )
    lambdas: tuple[Annotated[float, Field(ge=0)], ...] = Field(
        (2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2),
        min_length=1,
        description=f"{_readers('lambdas')}: prices of an edge in nats",
    )
    thresholds: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
        min_length=1,
        description=f"{_readers('thresholds')}: rises of the loss below which an edge goes",
    )
    sizes: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2),
        min_length=1,
        description=f"{_readers('sizes')}: edges, or below 1 their share",
    )
    n_prompts: int = Field(50, ge=1, description=f"{_readers('n_prompts')}: training prompts that edges are judged on")
    ig_steps: int = Field(5, ge=1, description=f"{_readers('ig_steps')}: interpolations of the input")
    masks: MaskFit = MaskFit()
    refit: Refit = Refit()

    def objective_of(self, method: CircuitMethod) -> Objective:
        """What a method's search looks at: KL has no gradient at the clean run, where EAP takes it."""
        return CIRCUIT_METHODS[method].objective or self.objective

    def takes_constants(self, method: CircuitMethod, ablation: EdgeAblation) -> bool:
        """Whether a search judges edges with the components' fitted constants, because it trains none of its own."""
        return CIRCUIT_METHODS[method].takes_constants and EDGE_ABLATIONS[ablation].fitted

    def knobs(self, method: CircuitMethod) -> tuple[float, ...]:
        """What one method sweeps; a method without a knob has one circuit, of knob 1."""
        key = CIRCUIT_METHODS[method].knob
        return getattr(self, key) if key else (1.0,)

    def masks_under(self, ablation: EdgeAblation) -> "MaskFit":
        """How masks are learned under one ablation type, with its number of steps."""
        steps = self.masks.n_steps
        return self.masks.model_copy(update={"n_steps": steps if isinstance(steps, int) else steps[ablation]})

    def read_by(self, method: CircuitMethod, ablation: EdgeAblation) -> dict[str, Any]:
        """The settings that one method's search depends on under one ablation type, JSON-able: those of the others do
        not make it stale.
        """
        row = CIRCUIT_METHODS[method]
        values, keys = self.model_dump(), [key for key in ("seeds", row.knob, *row.keys) if key]
        values["masks"] = self.masks_under(ablation).model_dump() if "masks" in keys else None
        return {"objective": self.objective_of(method)} | {key: values[key] for key in keys}

    def read_by_each(self, method: CircuitMethod, ablation: EdgeAblation) -> dict[str, Any]:
        """What determines each circuit of a search beside its own knob and seed: how often a fit is recorded does
        not.
        """
        values = self.read_by(method, ablation)
        each = {key: value for key, value in values.items() if key not in ("seeds", CIRCUIT_METHODS[method].knob)}
        if each.get("masks"):
            each["masks"] = {key: value for key, value in each["masks"].items() if key != "record_every"}
        return each

    def figures(self) -> tuple[str, ...]:
        """Names of the figures that these settings give (`oacore.circuits.plots.circuit_figures` draws them)."""
        compared = (f"ablation_types_{leading(self.methods)}",) if len(self.ablations) > 1 else ()
        return (*(f"pareto_{ablation}" for ablation in self.ablations), *compared)

    @model_validator(mode="after")
    def _every_ablation_has_steps(self) -> "Circuits":
        steps = self.masks.n_steps
        if isinstance(steps, dict) and (missing := [name for name in self.ablations if name not in steps]):
            raise ValueError(
                f"masks.n_steps: no number for {', '.join(missing)}; allowed: one for each of the ablations"
            )
        return self

    @model_validator(mode="after")
    def _knobs_have_names_of_their_own(self) -> "Circuits":
        for name in ("seeds", "lambdas", "thresholds", "sizes", "methods", "ablations"):
            shown = [f"{value:g}" if isinstance(value, float) else str(value) for value in getattr(self, name)]
            if len(set(shown)) < len(shown):
                raise ValueError(f"{name}: {', '.join(shown)} repeats a value; each names files of its own")
        return self
