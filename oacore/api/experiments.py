"""The experiments, on one model and task each."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from oacore.api.model import Model
from oacore.api.results import Result, result_of
from oacore.api.settings import config_of, constants_for, given
from oacore.api.tasks import Task, task
from oacore.config.circuits import Circuits
from oacore.config.lenses import LENS_SECTIONS

Selection = str | Sequence[str] | Mapping[str, str]  # prompts by their task's name, and there by a pattern


def gaps(
    model: Model,
    task: Task,
    *,
    methods: Sequence[str] | None = None,
    components: Sequence[str] | None = None,
    **settings: Any,
) -> Result:
    """The ablation loss gap of every component under every method, in nats, on held-out prompts: docs/ablation.md.

    Tables: `gaps`, `summary`.

    Args:
        methods: ablation types; by default all.
        components: of `head`, `mlp`, `attention_layer`; by default the first two.
        settings: more keys of the section `ablation`, such as `optimal={"max_steps": 350}`.

    Raises:
        UserError: a bad setting.
    """
    section = given(methods=methods, components=components) | {"tasks": [task.name]} | settings
    return result_of(config_of(model.settings, {task.name: task.settings}, section), "gaps", "figures")


def fronts(
    model: Model,
    task: Task,
    *,
    methods: Sequence[str] | None = None,
    ablations: Sequence[str] | None = None,
    optimal: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Result:
    """The circuits of several methods and ablation types, with their Pareto fronts of KL in nats over edges:
    docs/circuits.md.

    Tables: `pareto`, `fronts`, `stability`, `edge_frequency`.

    Args:
        optimal: how the components' constants are fitted, for methods that take them: `ablation.optimal`.
        settings: more keys of the section `circuits`, such as `lambdas`, `sizes` or `masks={"n_steps": 1000}`.

    Raises:
        UserError: a bad setting.
    """
    section = given(methods=methods, ablations=ablations) | settings
    constants = constants_for(methods or _default("methods"), ablations or _default("ablations"), optimal)
    config = config_of(model.settings, {task.name: task.settings}, constants, circuits=section)
    return result_of(config, "circuit_figures")


def _default(key: str) -> Sequence[str]:
    names: Sequence[str] = Circuits.model_fields[key].default
    return names


def effects(
    model: Model,
    task: Task,
    *,
    ablations: Sequence[str] | None = None,
    components: Sequence[str] | None = None,
    **settings: Any,
) -> Result:
    """Direct and indirect effects of single components, and what pairs of them cost beyond each alone, in nats:
    docs/interactions.md.

    Tables: `effects`, `paths`, `interactions`.

    Args:
        components: to measure in any case, beside the `n_components` that matter most.
        settings: more keys of the section `interactions`, such as `n_components` or `refit={"max_steps": 140}`.

    Raises:
        UserError: a bad setting.
    """
    section = given(ablations=ablations, components=components) | settings
    return result_of(config_of(model.settings, {task.name: task.settings}, interactions=section), "interaction_figures")


def remove(
    model: Model,
    tasks: Sequence[Task],
    *,
    forget: Selection,
    retain: Selection,
    methods: Sequence[str] | None = None,
    ablations: Sequence[str] | None = None,
    **settings: Any,
) -> Result:
    """Which few edges, components or directions, ablated, remove a behaviour and keep the rest: docs/removal.md.

    Tables: `front`, accuracies and KL in nats on held-out prompts.

    Args:
        tasks: all whose prompts are read.
        forget: the name of the one to forget, or `{name: pattern}` for those of its prompts that a regular expression
            finds; `retain` likewise, or several names.
        settings: more keys of the section `removal`, such as `paraphrases`, `held_out` or `relearn={"max_steps": 16}`.

    Raises:
        UserError: a bad setting, or too few prompts of a pattern.
    """
    section = {"forget": forget, "retain": retain} | given(methods=methods, ablations=ablations) | settings
    config = config_of(model.settings, {task.name: task.settings for task in tasks}, removal=section)
    return result_of(config, "removal_figures")


def trace(model: Model, facts: Task | None = None, **settings: Any) -> Result:
    """Where facts about subjects are recalled: average indirect effects on held-out prompts, docs/tracing.md.

    Tables: `aie`, `pictures`.

    Args:
        facts: the task `facts`, or one whose pairs have subjects; by default the demo model's own facts.
        settings: keys of the section `tracing`.

    Raises:
        UserError: a bad setting, or a task without subjects.
    """
    facts = task("facts", model) if facts is None else facts
    config = config_of(model.settings, {facts.name: facts.settings}, tracing={"tasks": [facts.name]} | settings)
    return result_of(config, "tracing", "tracing_figures")


def lens(model: Model, task: Task, *, lenses: Sequence[str] | None = None, **settings: Any) -> Result:
    """What each layer already knows: the KL in nats of several lenses by layer, on held-out prompts: docs/lenses.md.

    Tables: `loss`, `pictures` and, where asked for, `lengths`, `faithfulness`, `truthfulness`.

    Args:
        settings: more keys of the section `lenses`, such as `oca={"max_steps": 350}` or `faithfulness={}`.

    Raises:
        UserError: a bad setting.
    """
    section = given(lenses=lenses) | settings
    config = config_of(model.settings, {task.name: task.settings}, lenses=section)
    return result_of(config, "lens_evaluation", *(f"lens_{name}" for name in LENS_SECTIONS), "lens_figures")


def importance(
    model: str | None = None,
    folder: str | Path | None = None,
    *,
    units: Sequence[str] | None = None,
    replacements: Sequence[str] | None = None,
    revision: str | None = None,
    seed: int = 0,
    cache_dir: str | Path = "cache",
    results_dir: str | Path = "results",
    limits: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Result:
    """The importance of channels, branches and blocks of a convolutional network, in nats, by several methods and at
    equal numbers of forward passes: docs/vision.md.

    Tables: `importance`, `agreement`, `curves`, `sanity`.

    Args:
        model: Hugging Face name or directory of a ResNet for image classification; by default a small one is trained on
            digits.
        folder: of the images that `model` is looked at on.
        units: of `channels`, `branches`, `blocks`; by default all.
        replacements: what a replaced unit carries; by default all.
        settings: more keys of the section `vision`, such as `layer`, `budgets`, or `images={"n_train": 100}`.

    Raises:
        UserError: a bad setting.
    """
    section = given(units=units, replacements=replacements) | settings
    if model is not None or folder is not None:
        section["pretrained"] = given(model=model, images=folder and str(folder), revision=revision)
    places = {"cache_dir": str(cache_dir), "results_dir": str(results_dir)}
    return result_of(
        config_of({"seed": seed, **places, **given(limits=limits)}, {"ioi": {}}, vision=section), "vision_figures"
    )
