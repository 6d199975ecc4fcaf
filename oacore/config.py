"""The whole configuration of a run as one pydantic tree.

Imported by the Snakefile at every start, so it must stay free of torch and transformers. Unknown keys are errors: a
misspelled key that silently keeps its default is the costliest bug a pipeline can have.
"""

import difflib
import json
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)
from pydantic_core import ErrorDetails

from oacore.errors import UserError

# Hugging Face `model_type` of every family that oacore.model can read.
ARCHITECTURES = ("gpt2", "gpt_neox", "llama", "qwen2", "gemma2")

TaskName = Literal["ioi", "greater_than", "facts", "text"]
Method = Literal[
    "zero",
    "mean",
    "mean_positional",
    "resample",
    "resample_positional",
    "cf_mean",
    "counterfactual",
    "gaussian",
    "optimal",
    "optimal_positional",
]
ComponentKind = Literal["head", "mlp", "attention_layer"]
FITTED: tuple[Method, ...] = ("optimal", "optimal_positional")
EdgeAblation = Literal[
    "zero", "mean", "mean_positional", "cf_mean", "resample", "counterfactual", "optimal", "optimal_positional"
]  # of edges in circuits
Site = Literal["attention", "mlp", "block"]
Position = Literal["last", "last_subject", "all_subject"]
Corruption = Literal["oat", "oat_shared", "gaussian", "gaussian_scalar", "mean", "token_replacement"]
AnswerKind = Literal["first_token", "joint"]
LensName = Literal["oca", "oca_shared", "linear_oca", "tuned", "logit", "mean", "resample", "grad"]
LensInit = Literal["identity", "random"]
CircuitMethod = Literal["ugs", "hcgs", "topk", "eap", "eap_ig", "acdc", "exact", "random", "manual"]
Objective = Literal["kl", "logit_diff"]
FITTED_LENSES: tuple[LensName, ...] = ("oca", "oca_shared", "linear_oca", "tuned", "grad")
LEARNED: tuple[CircuitMethod, ...] = ("ugs", "hcgs", "topk")
LENS_SECTIONS = ("faithfulness", "truthfulness")  # of `lenses:`
OPTIONAL_SECTIONS = ("circuits", "tracing", "lenses")  # whose presence asks for an experiment
RANKED: tuple[CircuitMethod, ...] = ("eap", "eap_ig", "exact")  # scores first, circuits of any size from them


class Settings(BaseModel):
    """Base of every section: unknown keys are refused, values never change after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Limits(Settings):
    """Bounds on memory and CPU. They change speed and rounding, never what is computed: no stage re-runs when they change."""

    tokens_per_batch: int = Field(
        16384,
        ge=64,
        description="tokens (rows x positions) in one forward pass; a fit keeps the activations of as many for its backward pass",
    )
    memory_gb: float = Field(
        4.0,
        gt=0,
        description="memory of one masked-edge pass beside the weights; its rows go in parts that fit, and out of memory halves them",
    )
    threads: int = Field(2, ge=1, description="CPU threads of one job; results are bit-identical for equal numbers of threads")


class DemoModel(Settings):
    """Training of the embedded model (`model: demo`)."""

    seed: int = Field(0, ge=0, description="seed of its initial weights and training sentences")
    n_steps: int = Field(600, ge=1, description="training steps")
    batch_size: int = Field(128, ge=1, description="sentences a step")
    learning_rate: float = Field(2e-3, gt=0, description="peak of the one-cycle schedule")
    n_subjects: int = Field(40, ge=2, description="people that the model learns facts about")
    min_ioi_accuracy: float = Field(0.98, ge=0, le=1, description="held-out IOI accuracy below which training counts as failed")
    min_year_mass: float = Field(
        0.9, ge=0, le=1, description="held-out probability mass on valid years below which training counts as failed"
    )
    min_fact_accuracy: float = Field(
        0.9, ge=0, le=1, description="accuracy on held-out wordings of facts below which training counts as failed"
    )


class Task(Settings):
    n_train: int = Field(1000, ge=2, description="prompts that constants are fitted on and means are taken over")
    n_validation: int = Field(128, ge=2, description="prompts that decide when a fit has converged")
    n_test: int = Field(500, ge=2, description="prompts that every reported number is measured on")


class Ioi(Task):
    """Indirect object identification: 'Then, Mary and John went to the store. John gave a drink to' -> ' Mary'."""


class GreaterThan(Task):
    """'The war lasted from the year 1743 to the year 17' -> any of 44 ... 99."""


class Facts(Task):
    """Facts that the model completes correctly, split by subject."""

    path: Path | None = Field(
        None,
        description="CSV or JSON lines file with subject, prompt, answer; only `model: demo` has facts of its own and may leave it out",
    )
    unseen: Literal["subjects", "subjects_and_relations"] = Field(
        "subjects", description="what no two splits share; relations too leaves fewer facts, and needs three of them in the file"
    )


class Text(Task):
    """Windows of plain text; the target is the model's own next-token distribution."""

    path: Path | None = Field(
        None, description="text file, directory of .txt files, or JSON list of strings; only `model: demo` has text of its own"
    )
    n_tokens: int = Field(25, ge=3, description="window length, BOS included")


class Tasks(Settings):
    ioi: Ioi | None = Field(None, description="indirect object identification")
    greater_than: GreaterThan | None = Field(None, description="years greater than the start year")
    facts: Facts | None = Field(None, description="factual recall")
    text: Text | None = Field(None, description="plain text of your own")

    @model_validator(mode="before")
    @classmethod
    def _empty_section_means_defaults(cls, value: Any) -> Any:
        return {name: {} if task is None else task for name, task in value.items()} if isinstance(value, dict) else value

    @model_serializer(mode="wrap")
    def _only_selected(self, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # A task that is not selected must not come back as an empty section, which selects it.
        return {name: task for name, task in serialise(self).items() if task is not None}

    def selected(self) -> dict[str, Task]:
        """The tasks that the config names, in the order of `TaskName`."""
        return {name: task for name in get_args(TaskName) if (task := getattr(self, name)) is not None}


class OptimalFit(Settings):
    """Fitting of optimal constants (methods: Li & Janson 2024, section 2.3)."""

    learning_rate: float = Field(0.2, gt=0, description="Adam step, in standard deviations of the component's output")
    batch_size: int = Field(16, ge=1, description="prompts a step, shared by all components")
    max_steps: int = Field(2000, ge=1, description="cap for components that do not converge")
    check_every: int = Field(20, ge=1, description="steps between convergence tests on the validation prompts")
    tolerance: float = Field(0.005, gt=0, lt=1, description="relative improvement of the validation gap that counts as progress")
    patience: int = Field(2, ge=1, description="tests without progress before the learning rate drops")
    n_decays: int = Field(3, ge=0, description="drops of the learning rate (by 4) before a component counts as converged")


class Ablation(Settings):
    """Single-component ablation."""

    tasks: tuple[TaskName, ...] | None = Field(None, description="tasks to ablate components on; none means all of the config")
    methods: tuple[Method, ...] = Field(get_args(Method), min_length=1, description="ablation types to compare")
    components: tuple[ComponentKind, ...] = Field(("head", "mlp"), min_length=1, description="what to ablate")
    optimal: OptimalFit = OptimalFit()

    @model_validator(mode="after")
    def _optimal_starts_positional(self) -> "Ablation":
        if "optimal_positional" in self.methods and "optimal" not in self.methods:
            raise ValueError("optimal_positional starts from the optimal constants: list optimal too")
        return self

    def fitted(self) -> tuple[Method, ...]:
        """The methods that have constants to fit."""
        return tuple(method for method in FITTED if method in self.methods)

    def figures(self) -> tuple[str, ...]:
        """Names of the figures that these methods allow (`oacore.plots.ablation_figures` draws them)."""
        fitted = ("layer_head_heatmap", "convergence_curves") if self.fitted() else ()
        compared = ("optimal_against_counterfactual",) if {"optimal", "counterfactual"} <= set(self.methods) else ()
        return ("gap_distributions", *compared, *fitted)


class MaskFit(Settings):
    """Learning of edge masks by UGS, HCGS and top-k (Li & Janson 2024, section 3)."""

    n_steps: int = Field(3000, ge=1, description="steps; the paper takes 6000 where constants are trained along (optimal ablations)")
    n_samples: int = Field(12, ge=1, description="mask samples per prompt and step")
    n_prompts: int = Field(5, ge=1, description="prompts a step")
    learning_rate: float = Field(1.0, gt=0, description="times the paper's learning rates of the logits: 0.15 for small lambdas to 0.05")
    constants_rate: float = Field(0.02, gt=0, description="Adam step of constants trained along, in standard deviations of a source")
    dynamic_window: bool = Field(False, description="UGS, top-k: widen the window of edges whose gradient is noisy")
    record_every: int = Field(50, ge=1, description="steps between points of the curves, each a checkpoint")


class Refit(OptimalFit):
    """Constants fitted anew for every circuit of every method, for optimal ablations: equal terms for all."""

    learning_rate: float = Field(0.1, gt=0, description="Adam step, in standard deviations of a source's output")
    batch_size: int = Field(32, ge=1, description="prompts a step, shared by all circuits")
    max_steps: int = Field(1000, ge=1, description="cap for circuits whose constants do not converge")
    patience: int = Field(1, ge=1, description="tests without progress before the learning rate drops")
    n_decays: int = Field(2, ge=0, description="drops of the learning rate (by 4) before a circuit's constants count as converged")


class TracingFit(OptimalFit):
    """Fitting of the constants of causal tracing: the loss is the answer's probability that is lost."""

    learning_rate: float = Field(0.1, gt=0, description="Adam step, in standard deviations of the subjects' token embeddings")
    batch_size: int = Field(20, ge=1, description="facts a step, shared by all places")
    max_steps: int = Field(1000, ge=1, description="cap for places whose constants do not converge; the paper's number of steps")
    n_decays: int = Field(2, ge=0, description="drops of the learning rate (by 4) before a place's constant counts as converged")


class Tracing(Settings):
    """Causal tracing of the facts task: where is a fact recalled? The section's presence asks for it."""

    corruptions: tuple[Corruption, ...] = Field(
        get_args(Corruption), min_length=1, description="what replaces the subject's token embeddings"
    )
    noise_scales: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        (1.0, 3.0, 5.0), min_length=1, description="gaussian, gaussian_scalar: standard deviations of the noise, one corruption for each"
    )
    n_draws: int = Field(5, ge=1, description="gaussian, gaussian_scalar: draws of the noise per fact")
    sites: tuple[Site, ...] = Field(("attention", "mlp"), min_length=1, description="what is restored")
    positions: tuple[Position, ...] = Field(get_args(Position), min_length=1, description="where it is restored")
    windows: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (1, 5, 9), min_length=1, description="how many layers are restored, around each; odd, clipped at the ends of the model"
    )
    answer: AnswerKind = Field(
        "first_token", description="whose probability counts: the answer's first token's, or the joint one of all its tokens"
    )
    pictures: int | tuple[str, ...] = Field(
        3, description="test facts drawn token by token: how many, or a list of prompts or parts of them"
    )
    fit: TracingFit = TracingFit()

    @model_validator(mode="after")
    def _has_no_even_window_and_no_repeats(self) -> "Tracing":
        if even := [width for width in self.windows if width % 2 == 0]:
            raise ValueError(f"windows: {', '.join(map(str, even))}; allowed: odd numbers, a layer and as many on either side")
        for name in ("corruptions", "noise_scales", "sites", "positions", "windows"):
            if len(set(getattr(self, name))) < len(getattr(self, name)):
                raise ValueError(f"{name}: {', '.join(map(str, getattr(self, name)))} repeats a value")
        if isinstance(self.pictures, int) and self.pictures < 0:
            raise ValueError(f"pictures: {self.pictures}; allowed: 0 or more, or a list of prompts")
        return self

    @property
    def fitted(self) -> bool:
        """Whether constants are to be fitted."""
        return bool({"oat", "oat_shared"} & set(self.corruptions))

    def corruption_names(self) -> tuple[str, ...]:
        """The corruptions as tables call them: noise once for each scale."""
        return tuple(
            name
            for kind in self.corruptions
            for name in ([f"{kind}-{scale:g}" for scale in self.noise_scales] if kind.startswith("gaussian") else [kind])
        )

    def figures(self) -> tuple[str, ...]:
        """Names of the figures that these settings give (`oacore.tracing_plots.tracing_figures` draws them)."""
        scales = [name for name in self.corruption_names() if name.startswith("gaussian")]
        n_pictures = self.pictures if isinstance(self.pictures, int) else len(self.pictures)
        return (
            *(f"aie_{site}" for site in self.sites),
            *(["noise_scales"] if len(scales) > 1 else []),
            *(f"fact_{number}" for number in range(n_pictures)),
        )


class LensFit(OptimalFit):
    """Fitting of OCA's constants."""

    learning_rate: float = Field(0.1, gt=0, description="Adam step, in standard deviations of a layer's attention output")
    batch_size: int = Field(200, ge=1, description="cached rows a step, shared by all layers")
    max_steps: int = Field(10000, ge=1, description="cap for layers that do not converge")
    check_every: int = Field(100, ge=1, description="steps between convergence tests on the validation rows")
    tolerance: float = Field(0.002, gt=0, lt=1, description="relative improvement of the validation KL that counts as progress")
    n_decays: int = Field(3, ge=0, description="drops of the learning rate (by 4) before a layer counts as converged")


class AffineFit(LensFit):
    """Fitting of affine lenses: tuned, linear_oca, and grad's bias."""

    learning_rate: float = Field(
        0.01, gt=0, description="Adam step, the paper's; 10 times that for SGD, from which the identity starts, the official recipe's"
    )


class Faithfulness(Settings):
    """Does a lens react as the model does when the residual is changed? The section's presence asks for it."""

    lenses: tuple[LensName, ...] = Field(("oca", "linear_oca", "tuned", "logit"), min_length=1, description="lenses to try")
    layers: tuple[Annotated[int, Field(ge=0)], ...] | None = Field(None, min_length=1, description="layers to try; none means all")
    n_prompts: int = Field(25, ge=2, description="test prompts that are changed")
    n_directions: int = Field(20, ge=2, description="random directions, and singular directions, for each layer")
    resample_sizes: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (5, 20, 100), description="singular directions that are resampled together; at most the model's width"
    )
    target_kl: float = Field(0.2, gt=0, description="steering: mean KL in nats that the model itself changes by")


class Truthfulness(Settings):
    """At which layer does a wrong demonstration win? The section's presence asks for it."""

    datasets: tuple[Path, ...] | None = Field(
        None, min_length=1, description="CSV or JSON lines files with text, label; only `model: demo` has one of its own"
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

    tasks: tuple[TaskName, ...] | None = Field(None, min_length=1, description="tasks to fit lenses on; none means text, or else all")
    lenses: tuple[LensName, ...] = Field(
        ("oca", "linear_oca", "tuned", "logit", "mean", "resample", "grad"), min_length=1, description="what to compare"
    )
    init: tuple[LensInit, ...] = Field(get_args(LensInit), min_length=1, description="where tuned lenses start, one for each")
    positions: Literal["last", "all"] = Field("last", description="rows to fit on: the last position of each prompt, or every one but BOS")
    oca: LensFit = LensFit()
    tuned: AffineFit = AffineFit()
    grad_prompts: int = Field(32, ge=1, description="grad: training prompts over which the model's Jacobian is averaged")
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
        return {name: value for name, value in serialise(self).items() if name not in LENS_SECTIONS or value is not None}

    @model_validator(mode="after")
    def _sections_take_lenses_that_there_are(self) -> "Lenses":
        if "linear_oca" in self.lenses and "oca" not in self.lenses:
            raise ValueError("lenses: linear_oca is fitted to oca: list oca too")
        for section in LENS_SECTIONS:
            asked = getattr(self, section)
            if asked is not None and (missing := [name for name in asked.lenses if name not in self.lenses]):
                raise ValueError(f"{section}.lenses: {', '.join(missing)}; allowed: lenses.lenses: {', '.join(self.lenses)}")
        for name in ("lenses", "init", "lengths"):
            if len(set(getattr(self, name))) < len(getattr(self, name)):
                raise ValueError(f"{name}: {', '.join(map(str, getattr(self, name)))} repeats a value")
        return self

    def files(self) -> tuple[str, ...]:
        """The lenses as their files are called: the tuned one once for each init."""
        return tuple(name for lens in self.lenses for name in ([f"tuned-{init}" for init in self.init] if lens == "tuned" else [lens]))

    def fitted_files(self) -> tuple[str, ...]:
        """Those of them that are fitted."""
        return tuple(name for name in self.files() if name.split("-")[0] in FITTED_LENSES)

    def tables(self) -> tuple[str, ...]:
        """Names of the tables that these settings give, without suffix."""
        sections = tuple(name for name in LENS_SECTIONS if getattr(self, name) is not None)
        return ("loss", *(("lengths",) if self.lengths else ()), *sections)

    def figures(self) -> tuple[str, ...]:
        """Names of the figures that these settings give (`oacore.lens_plots.lens_figures` draws them)."""
        faithful = ("similarity", "correlation") if self.faithfulness is not None else ()
        return ("loss", "agreement", *(("lengths",) if self.lengths else ()), *faithful, *(("truthfulness",) if self.truthfulness else ()))


class Circuits(Settings):
    """Circuit discovery: every method, ablation type, knob and seed is one circuit. The section's presence asks for it."""

    tasks: tuple[TaskName, ...] | None = Field(None, min_length=1, description="tasks to find circuits for; none means all of the config")
    methods: tuple[CircuitMethod, ...] = Field(
        ("ugs", "hcgs", "eap", "eap_ig", "acdc", "random"), min_length=1, description="what to compare"
    )
    ablations: tuple[EdgeAblation, ...] = Field(
        ("optimal", "counterfactual"), min_length=1, description="what replaces an ablated edge's source"
    )
    objective: Objective = Field("kl", description="loss of mask learning, EAP-IG, ACDC and exact; EAP always takes the logit difference")
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field((0,), min_length=1, description="one circuit of every knob for each")
    lambdas: tuple[Annotated[float, Field(ge=0)], ...] = Field(
        (2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2), min_length=1, description="ugs, hcgs: prices of an edge in nats"
    )
    thresholds: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1), min_length=1, description="acdc: rises of the loss below which an edge goes"
    )
    sizes: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2),
        min_length=1,
        description="topk, eap, eap_ig, exact, random: edges, or below 1 their share",
    )
    n_prompts: int = Field(50, ge=1, description="eap, eap_ig, exact, acdc: training prompts that edges are judged on")
    ig_steps: int = Field(5, ge=1, description="eap_ig: interpolations of the input")
    masks: MaskFit = MaskFit()
    refit: Refit = Refit()

    def objective_of(self, method: str) -> Objective:
        """What a method's search looks at: KL has no gradient at the clean run, where EAP takes it."""
        return "logit_diff" if method == "eap" else self.objective

    def figures(self) -> tuple[str, ...]:
        """Names of the figures that these settings give (`oacore.circuit_plots.circuit_figures` draws them)."""
        compared = (f"ablation_types_{'ugs' if 'ugs' in self.methods else self.methods[0]}",) if len(self.ablations) > 1 else ()
        return (*(f"pareto_{ablation}" for ablation in self.ablations), *compared)

    def knobs(self, method: CircuitMethod) -> tuple[float, ...]:
        """What one method sweeps."""
        if method in ("ugs", "hcgs"):
            return self.lambdas
        return {"acdc": self.thresholds, "manual": (1.0,)}.get(method, self.sizes)

    @model_validator(mode="after")
    def _knobs_have_names_of_their_own(self) -> "Circuits":
        for name in ("seeds", "lambdas", "thresholds", "sizes", "methods", "ablations"):
            shown = [f"{value:g}" if isinstance(value, float) else str(value) for value in getattr(self, name)]
            if len(set(shown)) < len(shown):
                raise ValueError(f"{name}: {', '.join(shown)} repeats a value; each names files of its own")
        return self


def _name(value: Any) -> Any:
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


class Config(Settings):
    """One run."""

    run: Annotated[str, BeforeValidator(_name)] = Field(
        "demo", pattern=r"^[\w.-]*\w$", description="name of the run; its results go to {results_dir}/{run}"
    )
    model: str = Field("demo", min_length=1, description="`demo`, a Hugging Face name, or a local model directory")
    revision: str | None = Field(None, description="branch, tag or commit of a Hugging Face model; a commit pins the weights")
    dtype: Literal["fp32", "bf16"] = Field("fp32", description="precision of weights and activations; losses are always fp32")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto takes a GPU when there is one")
    seed: int = Field(0, ge=0, description="seed of prompts, fits and resampling")
    cache_dir: Path = Field(Path("cache"), description="what runs share: models, prompts, activations (a cluster's scratch)")
    results_dir: Path = Field(Path("results"), description="what one run concludes")
    limits: Limits = Limits()
    demo_model: DemoModel = DemoModel()
    tasks: Tasks = Field(description="what the model is asked to do; an empty section takes the defaults")
    ablation: Ablation = Ablation()
    circuits: Circuits | None = None
    tracing: Tracing | None = None
    lenses: Lenses | None = None

    @model_validator(mode="before")
    @classmethod
    def _empty_sections_mean_defaults(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return value | {name: {} for name in OPTIONAL_SECTIONS if name in value and value[name] is None}

    @model_serializer(mode="wrap")
    def _only_asked_for(self, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # A section that was not asked for must not come back as an empty one, which asks for it.
        return {name: value for name, value in serialise(self).items() if name not in OPTIONAL_SECTIONS or value is not None}

    def ablation_tasks(self) -> tuple[str, ...]:
        """The tasks to ablate single components on."""
        return tuple(self.tasks.selected()) if self.ablation.tasks is None else self.ablation.tasks

    @model_validator(mode="after")
    def _ablation_has_its_tasks(self) -> "Config":
        selected = self.tasks.selected()
        if missing := [task for task in self.ablation_tasks() if task not in selected]:
            raise ValueError(f"ablation.tasks: {', '.join(missing)}; allowed: the config's tasks: {', '.join(selected)}")
        return self

    def circuit_tasks(self) -> tuple[str, ...]:
        """The tasks to find circuits for."""
        if self.circuits is None:
            return ()
        return self.circuits.tasks or tuple(self.tasks.selected())

    @model_validator(mode="after")
    def _circuits_make_sense(self) -> "Config":
        circuits = self.circuits
        if circuits is None:
            return self
        selected = self.tasks.selected()
        if missing := [task for task in circuits.tasks or () if task not in selected]:
            raise ValueError(f"circuits.tasks: {', '.join(missing)}; allowed: the config's tasks: {', '.join(selected)}")
        tasks = self.circuit_tasks()
        if "manual" in circuits.methods and (tasks != ("ioi",) or self.model == "demo"):
            raise ValueError(
                "circuits.methods: 'manual' is the published IOI circuit of GPT-2-small: it needs that model and circuits.tasks: [ioi]"
            )
        without_answers = [task for task in tasks if task in ("text", "facts")]
        for asked, why in (
            ("eap" in circuits.methods, "circuits.methods: 'eap' takes the logit difference, since KL has no gradient at the clean run"),
            (circuits.objective == "logit_diff", "circuits.objective: 'logit_diff' compares right and wrong answers"),
        ):
            if asked and without_answers:
                raise ValueError(f"{why}; {', '.join(without_answers)} has no wrong answers: list other circuits.tasks, or leave it out")
        judged = [method for method in circuits.methods if method in (*RANKED, "acdc")]
        for ablation in circuits.ablations:
            if ablation in FITTED and judged:
                fitted = ablation in self.ablation.methods and {"head", "mlp"} <= set(self.ablation.components)
                if not fitted or not set(tasks) <= set(self.ablation_tasks()):
                    raise ValueError(
                        f"circuits.ablations: {ablation!r} with {', '.join(judged)} takes the components' fitted constants; "
                        f"ablation.methods must list {ablation}, ablation.components head and mlp, and ablation.tasks these tasks"
                    )
        return self

    @model_validator(mode="after")
    def _tracing_needs_facts(self) -> "Config":
        if self.tracing is not None and self.tasks.facts is None:
            raise ValueError("tracing: it traces the facts task, which the config does not select; allowed: with tasks.facts")
        return self

    def lens_tasks(self) -> tuple[str, ...]:
        """The tasks to fit lenses on."""
        if self.lenses is None:
            return ()
        return self.lenses.tasks or (("text",) if self.tasks.text is not None else tuple(self.tasks.selected()))

    @model_validator(mode="after")
    def _lenses_make_sense(self) -> "Config":
        if self.lenses is None:
            return self
        selected = self.tasks.selected()
        if missing := [task for task in self.lenses.tasks or () if task not in selected]:
            raise ValueError(f"lenses.tasks: {', '.join(missing)}; allowed: the config's tasks: {', '.join(selected)}")
        if self.lenses.lengths and "text" not in self.lens_tasks():
            raise ValueError(f"lenses.lengths: {', '.join(map(str, self.lenses.lengths))}; allowed: with the task text, which has windows")
        truth = self.lenses.truthfulness
        if truth is not None and truth.datasets is None and self.model != "demo":
            raise ValueError(
                "lenses.truthfulness.datasets: missing; only `model: demo` has one of its own; allowed: CSV or JSON lines files"
            )
        return self

    @model_validator(mode="after")
    def _needs_a_task(self) -> "Config":
        if not self.tasks.selected():
            raise ValueError(f"tasks: none given; allowed: {', '.join(get_args(TaskName))}")
        return self


def parse_config(values: object) -> Config:
    """Validate a parsed YAML tree.

    Raises:
        UserError: one line per problem: key path, value found, what is allowed, nearest match; also for files and
            architectures that can be seen to be wrong without loading a model.
    """
    if not isinstance(values, dict):
        raise UserError(f"config: {values!r} is not a mapping of keys to values (allowed keys: {', '.join(Config.model_fields)})")
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        details = error.errors()
        # A list with a bad item is also reported as too short, after the item was dropped: name the item only.
        blamed = {detail["loc"][:-1] for detail in details}
        lines = [f"  {_describe(detail)}" for detail in details if not (detail["type"] == "too_short" and detail["loc"] in blamed)]
        raise UserError("config is not valid\n" + "\n".join(lines)) from None
    _check_model(config)
    _check_paths(config)
    return config


def load_config(path: str | Path) -> Config:
    """Read and validate a YAML config file."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"config file {path}: {error.strerror if isinstance(error, OSError) else 'not UTF-8 text'}") from None
    try:
        return parse_config(yaml.safe_load(text))
    except yaml.YAMLError as error:
        raise UserError(f"config file {path}: not valid YAML: {error}") from None


def is_directory_name(model: str) -> bool:
    """Whether `model:` means a directory: it exists, or it looks like a path (a hub name is `name` or `owner/name`)."""
    return Path(model).expanduser().is_dir() or model.startswith((".", "/", "~")) or model.count("/") > 1


def _check_model(config: Config) -> None:
    if config.model == "demo":
        return
    for name, task, wanted in (
        ("facts", config.tasks.facts, "a CSV or JSON lines file"),
        ("text", config.tasks.text, "a text file, a directory of .txt files, or a JSON list of strings"),
    ):
        if task is not None and task.path is None:
            raise UserError(
                f"config is not valid\n  tasks.{name}.path: missing; only `model: demo` has {name} of its own; allowed: {wanted}"
            )
    if not is_directory_name(config.model):
        return
    directory = Path(config.model).expanduser()
    if not directory.is_dir():
        raise UserError(f"model: {config.model!r} is not a directory; allowed: demo, a Hugging Face name, or an existing model directory")
    check_architecture(config.model, directory / "config.json")


def check_architecture(model: str, path: Path) -> str:
    """The `model_type` that a model's config.json names.

    Raises:
        UserError: the file is missing or unreadable, or the architecture is not one of `ARCHITECTURES`.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError):
        raise UserError(f"model: {model!r} has no readable config.json; allowed: a directory as written by save_pretrained") from None
    if found not in ARCHITECTURES:
        raise UserError(
            f"model: {model!r} has the architecture {found!r}; allowed: {', '.join(ARCHITECTURES)}{_nearest(found, ARCHITECTURES)}"
        )
    return str(found)


def _check_paths(config: Config) -> None:
    for key, path in input_files(config):
        if not path.expanduser().exists():
            folder = " or directory" if key == "tasks.text.path" else ""
            raise UserError(f"{key}: {str(path)!r} does not exist; allowed: an existing file{folder}")


def input_files(config: Config) -> list[tuple[str, Path]]:
    """The user's files that a config names, with their keys."""
    tasks = [(f"tasks.{name}.path", getattr(task, "path", None)) for name, task in config.tasks.selected().items()]
    truth = config.lenses.truthfulness if config.lenses is not None else None
    datasets = [("lenses.truthfulness.datasets", path) for path in (truth.datasets or () if truth is not None else ())]
    return [(key, path) for key, path in [*tasks, *datasets] if path is not None]


def _describe(error: ErrorDetails) -> str:
    """One line: key path, value, what is allowed, nearest match."""
    location = [part for part in error["loc"] if part not in ("tuple", "function-before")]
    path = ".".join(f"[{part}]" if isinstance(part, int) else str(part) for part in location).replace(".[", "[")
    value, kind, context = error["input"], error["type"], error.get("ctx", {})
    if kind == "extra_forbidden":
        allowed = _fields_at(location[:-1])
        return f"{path}: unknown key (value {_short(value)}); allowed: {', '.join(allowed)}{_nearest(location[-1], allowed)}"
    if kind == "missing":
        return f"{path}: missing; allowed: {_description_at(location) or 'a value'}"
    if kind == "literal_error":
        choices = [choice.strip("'") for choice in str(context["expected"]).replace(" or ", ", ").split(", ")]
        return f"{path}: {_short(value)}; allowed: {', '.join(choices)}{_nearest(value, choices)}"
    if kind == "value_error":
        message = str(context["error"])
        own = message.replace(":", ".").split(".")[0] in _fields_at(location)  # it begins with a key of the section
        return f"{path}{'.' if own else ': '}{message}" if path else message
    if kind in ("model_type", "model_attributes_type"):
        return f"{path}: {_short(value)}; allowed: a mapping with the keys {', '.join(_fields_at(location))}"
    return f"{path}: {_short(value)}; allowed: {error['msg'].removeprefix('Input should be ')}"


def _model_at(location: list[Any]) -> type[BaseModel] | None:
    model: type[BaseModel] | None = Config
    for part in location:
        field = model.model_fields.get(part) if model and isinstance(part, str) else None
        if field is None:
            return None
        candidates = (field.annotation, *get_args(field.annotation))
        model = next((kind for kind in candidates if isinstance(kind, type) and issubclass(kind, BaseModel)), None)
    return model


def _fields_at(location: list[Any]) -> list[str]:
    model = _model_at(location)
    return list(model.model_fields) if model else []


def _description_at(location: list[Any]) -> str | None:
    model = _model_at(location[:-1])
    return model.model_fields[location[-1]].description if model and location[-1] in model.model_fields else None


def _nearest(value: object, choices: Any) -> str:
    match = difflib.get_close_matches(str(value), list(choices), n=1)
    return f" (did you mean {match[0]!r}?)" if match else ""


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def describe_fields(model: type[BaseModel] = Config, prefix: str = "") -> list[tuple[str, str, str]]:
    """(key path, default, description) of every key, for config/README.md."""
    rows: list[tuple[str, str, str]] = []
    for name, field in model.model_fields.items():
        inner = next(
            (kind for kind in (field.annotation, *get_args(field.annotation)) if isinstance(kind, type) and issubclass(kind, BaseModel)),
            None,
        )
        if inner is not None:
            rows += describe_fields(inner, f"{prefix}{name}.")
            continue
        default = "required" if field.is_required() else _default(field.default)
        rows.append((f"{prefix}{name}", default, field.description or ""))
    return rows


def _default(value: object) -> str:
    if isinstance(value, tuple):
        return ", ".join(map(str, value))
    return "none" if value is None else str(value)


if __name__ == "__main__":
    print("| key | default | meaning |\n|---|---|---|")
    for row in describe_fields():
        print("| `{}` | {} | {} |".format(*row))
