"""The stages, every job of a config in order, and the files that each reads and writes.

In the workflow a rule names the same files; `Files` come from there. Here they come from `Layout`, for the command
line.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from oacore.config.lenses import LENS_SECTIONS, Truthfulness
from oacore.config.read import compared_runs
from oacore.config.run import Config
from oacore.errors import UserError
from oacore.store.layout import IMAGES, WEIGHTS, Layout, circuit_file

# In the order in which they run; what each is run for beside the config.
STAGES: dict[str, tuple[str, tuple[str, ...]]] = {
    "demo": ("train the embedded model (model: demo-trained)", ()),
    "model": ("load the model, check it against Hugging Face, write model.json", ()),
    "prompts": ("generate a task's prompts", ("task",)),
    "activations": ("cache the model's clean activations on the prompts", ("task",)),
    "optimal": ("fit optimal constants", ("task", "method")),
    "gaps": ("measure every component's ablation loss gap", ("task",)),
    "figures": ("draw the figures", ("task",)),
    "circuits": ("find a method's circuits and judge them on held-out prompts", ("task", "method", "ablation")),
    "circuit_figures": ("draw the circuits and their Pareto fronts", ("task",)),
    "interaction_ranking": ("rank components by what ablating each alone costs", ("task",)),
    "interactions": ("measure direct and indirect effects, and what pairs cost", ("task", "ablation")),
    "interaction_figures": ("draw effects, paths and interactions", ("task",)),
    "removal": ("ablate a behaviour by one method, and measure what is kept", ("method", "ablation")),
    "removal_figures": ("draw what is forgotten against what is kept", ()),
    "tracing_fit": ("fit optimal constants for causal tracing", ("task",)),
    "tracing": ("trace where subjects' facts are recalled", ("task",)),
    "tracing_figures": ("draw where facts are recalled", ("task",)),
    "lens_activations": ("cache the model's activations at every position", ("task",)),
    "lens_fit": ("fit lenses", ("task", "lens")),
    "lens_evaluation": ("measure lenses on held-out prompts", ("task",)),
    "lens_faithfulness": ("compare how lenses and model react to changes", ("task",)),
    "lens_truthfulness": ("compare layers before true and wrong demonstrations", ("task",)),
    "lens_figures": ("draw the lenses' figures", ("task",)),
    "vision_model": ("train the network of vision:, or read a pretrained one", ()),
    "vision": ("measure the importance of a network's units", ("units",)),
    "vision_figures": ("draw importances and how methods agree", ()),
    "study_member": ("run all experiments on one member of a study", ("member",)),
    "study_cost": ("measure what methods cost on one member of a study", ("member",)),
    "study_figures": ("draw how cost grows with a model", ()),
    "comparison": ("set the run beside a finished one of compare:", ("other",)),
    "report": ("write the HTML report", ()),
}
DRAWING = (
    "figures", "circuit_figures", "interaction_figures", "removal_figures", "tracing_figures", "lens_figures",
    "vision_figures", "study_figures", "comparison", "report",
)  # fmt: skip
# What measures what a comparison joins.
MEASURING = ("gaps", "circuits", "interactions", "removal", "tracing", "lens_evaluation", "vision")
WITHOUT_GPU = ("demo", "vision_model", "vision", *DRAWING)

Named = dict[str, str | list[str]]


class Files:
    """Input or output files of a job by name: one path, or several, or none where a name's list is empty."""

    def __init__(self, named: Mapping[str, str | Sequence[str]]):
        self._named = {name: [paths] if isinstance(paths, str) else list(paths) for name, paths in named.items()}

    def __getitem__(self, name: str) -> Path:
        """The one file of a name.

        Raises:
            KeyError: there is no such name, or it has none or several files.
        """
        if len(self._named[name]) != 1:
            raise KeyError(f"{name}: {len(self._named[name])} files, not one")
        return Path(self._named[name][0])

    def all(self, name: str, suffix: str = "") -> list[Path]:
        """The files of a name in their order, or those of them with a suffix."""
        return [Path(path) for path in self._named[name] if path.endswith(suffix)]

    def every(self) -> list[Path]:
        """All files in order, whatever their names."""
        return [Path(path) for paths in self._named.values() for path in paths]

    def named(self) -> dict[str, list[str]]:
        """All files by name."""
        return dict(self._named)


def jobs(config: Config) -> Iterator[tuple[str, dict[str, str], str]]:
    """Every job of a config in order: stage, what it is run for, its main output."""
    for stage, wildcards in planned(config):
        yield stage, wildcards, str(files_of(Layout(config), stage, **wildcards)[1].every()[0])


def planned(config: Config) -> Iterator[tuple[str, dict[str, str]]]:
    """Stage and wildcards of every job in order. A study has its members' alone: each is a run with jobs of its own."""
    if config.study is not None:
        for member in config.study.models:
            yield "study_member", {"member": member}
            yield "study_cost", {"member": member}
        yield "study_figures", {}
        yield "report", {}
        return
    if config.trains_demo:
        yield "demo", {}
    yield "model", {}
    for task in config.tasks.selected():
        yield "prompts", {"task": task}
        if task in config.cached_tasks():
            yield "activations", {"task": task}
    for task in config.ablation_tasks():
        for method in config.ablation.fitted():
            yield "optimal", {"task": task, "method": method}
        yield "gaps", {"task": task}
        yield "figures", {"task": task}
    for task in config.circuit_tasks():
        assert config.circuits is not None
        for ablation in config.circuits.ablations:
            for method in config.circuits.methods:
                yield "circuits", {"task": task, "method": method, "ablation": ablation}
        yield "circuit_figures", {"task": task}
    for task in config.interaction_tasks():
        assert config.interactions is not None
        yield "interaction_ranking", {"task": task}
        for ablation in config.interactions.ablations:
            yield "interactions", {"task": task, "ablation": ablation}
        yield "interaction_figures", {"task": task}
    if config.removal is not None:
        for ablation in config.removal.ablations:
            for method in config.removal.methods:
                yield "removal", {"method": method, "ablation": ablation}
        yield "removal_figures", {}
    for task in config.tracing_tasks():
        assert config.tracing is not None
        if config.tracing.fitted:
            yield "tracing_fit", {"task": task}
        yield "tracing", {"task": task}
        yield "tracing_figures", {"task": task}
    for task in config.lens_tasks():
        assert config.lenses is not None
        if config.lenses.positions == "all":
            yield "lens_activations", {"task": task}
        lenses = config.lenses
        for lens in sorted(lenses.fitted_files(), key=lambda lens: bool(lenses.teacher(lens))):  # after its teacher
            yield "lens_fit", {"task": task, "lens": lens}
        yield "lens_evaluation", {"task": task}
        for section in LENS_SECTIONS:
            if getattr(config.lenses, section) is not None:
                yield f"lens_{section}", {"task": task}
        yield "lens_figures", {"task": task}
    if config.vision is not None:
        yield "vision_model", {}
        for kind in config.vision.units:
            yield "vision", {"units": kind}
        yield "vision_figures", {}
    for other in compared_runs(config):
        yield "comparison", {"other": other}
    yield "report", {}


def promised(layout: Layout) -> list[str]:
    """Every file of a run's results, the report first: what is missing of them is made again."""
    cached = set(layout.cache_files())
    files = [
        str(path)
        for stage, wildcards in planned(layout.config)
        for path in files_of(layout, stage, **wildcards)[1].every()
        if str(path) not in cached
    ]
    return list(dict.fromkeys([layout.report, *files]))


def files_of(layout: Layout, stage: str, **wildcards: str) -> tuple[Files, Files]:
    """What a job reads and what it writes, as its rule names them."""
    inputs, outputs = _FILES[stage](layout, **wildcards)
    return Files(inputs), Files(outputs)


def _demo(layout: Layout) -> tuple[Named, Named]:
    return {}, {"demo": layout.demo_model}


def _model(layout: Layout) -> tuple[Named, Named]:
    stored = [layout.weights] if layout.config.store_weights else []
    inputs: Named = {"demo": [layout.demo_model] if layout.config.trains_demo else []}
    return inputs, {"model": layout.model_json, "weights": stored}


def _prompts(layout: Layout, task: str) -> tuple[Named, Named]:
    return {"model": layout.model_json}, {"prompts": layout.prompts(task)}


def _activations(layout: Layout, task: str) -> tuple[Named, Named]:
    return _of_task(layout, task), {"activations": layout.activations(task)}


def _of_task(layout: Layout, task: str, *more: str) -> Named:
    """The model, a task's prompts, and its activations if asked for."""
    named: Named = {"model": layout.model_json, "prompts": layout.prompts(task)}
    return named | ({"activations": layout.activations(task)} if "activations" in more else {})


def _optimal(layout: Layout, task: str, method: str) -> tuple[Named, Named]:
    start = layout.config.ablation.starts_from(method)
    inputs = _of_task(layout, task, "activations") | {"start": [layout.constants(task, start)] if start else []}
    return inputs, {"constants": layout.constants(task, method)}


def _gaps(layout: Layout, task: str) -> tuple[Named, Named]:
    constants = [layout.constants(task, method) for method in layout.config.ablation.fitted()]
    inputs = _of_task(layout, task, "activations") | {"constants": constants}
    outputs: Named = {name: layout.ablation(task, f"{name}.csv") for name in ("gaps", "summary")}
    return inputs, outputs | {"by_prompt": layout.ablation(task, "gaps-by-prompt.safetensors")}


def _figures(layout: Layout, task: str) -> tuple[Named, Named]:
    constants = [layout.constants(task, method) for method in layout.config.ablation.fitted()]
    inputs: Named = {"model": layout.model_json, "gaps": layout.ablation(task, "gaps.csv"), "constants": constants}
    return inputs, {"figures": _drawn(layout.ablation(task, ""), layout.config.ablation.figures())}


def _drawn(folder: str, names: tuple[str, ...]) -> list[str]:
    """Every figure as SVG and PNG."""
    return [f"{folder}{name}.{suffix}" for name in names for suffix in ("svg", "png")]


def _circuits(layout: Layout, task: str, method: str, ablation: str) -> tuple[Named, Named]:
    settings = layout.config.circuits
    assert settings is not None
    takes = settings.takes_constants(method, ablation)
    inputs = _of_task(layout, task, "activations") | {"constants": [layout.constants(task, ablation)] if takes else []}

    def of(name: str) -> str:
        return layout.circuits(task, f"{method}-{ablation}/{name}")

    outputs: Named = {
        "search": of("search.safetensors"),
        "losses": of("losses.safetensors"),
        "pareto": of("pareto.csv"),
    }
    circuits = [of(circuit_file(knob, seed)) for knob in settings.knobs(method) for seed in settings.seeds]
    return inputs, outputs | {"circuits": circuits}


def _circuit_figures(layout: Layout, task: str) -> tuple[Named, Named]:
    settings = layout.config.circuits
    assert settings is not None
    judged = [
        files_of(layout, "circuits", task=task, method=method, ablation=ablation)[1]
        for ablation in settings.ablations
        for method in settings.methods
    ]
    inputs: Named = _of_task(layout, task)
    for name, of_each in {"losses": "losses", "paretos": "pareto", "circuits": "circuits"}.items():
        inputs[name] = [str(path) for files in judged for path in files.all(of_each)]
    tables = ("pareto", "fronts", "stability", "edge_frequency")
    outputs: Named = {name: layout.circuits(task, f"{name}.csv") for name in tables}
    outputs |= {"figures": _drawn(layout.circuits(task, "figures/"), settings.figures())}
    return inputs, outputs | {
        "drawings": [layout.circuits(task, f"figures/circuit_{name}.svg") for name in settings.ablations]
    }


INTERACTION_TABLES = ("effects", "paths", "interactions")


def _interaction_ranking(layout: Layout, task: str) -> tuple[Named, Named]:
    return _of_task(layout, task, "activations"), {"ranking": layout.interactions(task, "ranking.csv")}


def _interactions(layout: Layout, task: str, ablation: str) -> tuple[Named, Named]:
    inputs = _of_task(layout, task, "activations") | {"ranking": layout.interactions(task, "ranking.csv")}
    outputs: Named = {name: layout.interactions(task, f"{ablation}/{name}.csv") for name in INTERACTION_TABLES}
    return inputs, outputs | {"by_prompt": layout.interactions(task, f"{ablation}/by-prompt.safetensors")}


def _interaction_figures(layout: Layout, task: str) -> tuple[Named, Named]:
    settings = layout.config.interactions
    assert settings is not None
    inputs: Named = {"model": layout.model_json}
    for name in INTERACTION_TABLES:
        inputs[name] = [layout.interactions(task, f"{ablation}/{name}.csv") for ablation in settings.ablations]
    outputs: Named = {name: layout.interactions(task, f"{name}.csv") for name in INTERACTION_TABLES}
    return inputs, outputs | {"figures": _drawn(layout.interactions(task, "figures/"), settings.figures())}


def _removal(layout: Layout, method: str, ablation: str) -> tuple[Named, Named]:
    settings = layout.config.removal
    assert settings is not None
    inputs: Named = {"model": layout.model_json, "prompts": [layout.prompts(task) for task in settings.tasks()]}
    folder = f"{method}-{ablation}"
    return inputs, {
        "front": layout.removal(f"{folder}/front.csv"),
        "ablations": layout.removal(f"{folder}/ablations.safetensors"),
    }


def _removal_figures(layout: Layout) -> tuple[Named, Named]:
    settings = layout.config.removal
    assert settings is not None
    fronts = [
        layout.removal(f"{method}-{ablation}/front.csv")
        for ablation in settings.ablations
        for method in settings.methods
    ]
    inputs: Named = {"model": layout.model_json, "fronts": fronts}
    outputs: Named = {"front": layout.removal("front.csv")}
    return inputs, outputs | {"figures": _drawn(layout.removal("figures/"), settings.figures())}


def _tracing_fit(layout: Layout, task: str) -> tuple[Named, Named]:
    return _of_task(layout, task), {"constants": layout.tracing(task, "constants.safetensors")}


def _tracing(layout: Layout, task: str) -> tuple[Named, Named]:
    assert layout.config.tracing is not None
    constants = [layout.tracing(task, "constants.safetensors")] if layout.config.tracing.fitted else []
    outputs: Named = {name: layout.tracing(task, f"{name}.csv") for name in ("aie", "pictures")}
    outputs |= {"by_prompt": layout.tracing(task, "aie-by-prompt.safetensors")}
    return _of_task(layout, task) | {"constants": constants}, outputs | {"facts": layout.tracing(task, "facts.json")}


def _tracing_figures(layout: Layout, task: str) -> tuple[Named, Named]:
    assert layout.config.tracing is not None
    inputs: Named = {"model": layout.model_json}
    inputs |= {name: layout.tracing(task, f"{name}.csv") for name in ("aie", "pictures")}
    return inputs, {"figures": _drawn(layout.tracing(task, "figures/"), layout.config.tracing.figures())}


def _lens_activations(layout: Layout, task: str) -> tuple[Named, Named]:
    return _of_task(layout, task), {"rows": layout.lens_rows(task)}


def _lens_fit(layout: Layout, task: str, lens: str) -> tuple[Named, Named]:
    assert layout.config.lenses is not None
    teacher = layout.config.lenses.teacher(lens)
    inputs = _of_task(layout, task) | {
        "rows": layout.lens_rows(task),
        "teacher": [layout.lens(task, f"{teacher}.safetensors")] if teacher else [],
    }
    return inputs, {"lens": layout.lens(task, f"{lens}.safetensors")}


def _with_lenses(layout: Layout, task: str, kinds: tuple[str, ...]) -> Named:
    """The task's files, the rows and the fitted lenses of some kinds."""
    assert layout.config.lenses is not None
    fitted = layout.config.lenses.fitted_files(kinds)
    return _of_task(layout, task) | {
        "rows": layout.lens_rows(task),
        "lenses": [layout.lens(task, f"{name}.safetensors") for name in fitted],
    }


def _lens_evaluation(layout: Layout, task: str) -> tuple[Named, Named]:
    settings = layout.config.lenses
    assert settings is not None
    outputs: Named = {"loss": layout.lens(task, "loss.csv"), "pictures": layout.lens(task, "pictures.csv")}
    outputs |= {"lengths": [layout.lens(task, "lengths.csv")] if settings.lengths else []}
    outputs |= {"by_prompt": layout.lens(task, "loss-by-prompt.safetensors")}
    return _with_lenses(layout, task, settings.lenses), outputs


def _lens_faithfulness(layout: Layout, task: str) -> tuple[Named, Named]:
    assert layout.config.lenses is not None and layout.config.lenses.faithfulness is not None
    inputs = _with_lenses(layout, task, layout.config.lenses.faithfulness.lenses)
    return inputs, {"table": layout.lens(task, "faithfulness.csv")}


def _lens_truthfulness(layout: Layout, task: str) -> tuple[Named, Named]:
    assert layout.config.lenses is not None and layout.config.lenses.truthfulness is not None
    settings = layout.config.lenses.truthfulness
    inputs = _with_lenses(layout, task, settings.lenses) | {"datasets": data_sets(settings)}
    return inputs, {"table": layout.lens(task, "truthfulness.csv")}


def data_sets(settings: Truthfulness) -> list[str]:
    """The user's labelled files; absolute, so that no prefix of a workflow goes before them."""
    return [str(path.absolute()) for path in settings.datasets or ()]


def _lens_figures(layout: Layout, task: str) -> tuple[Named, Named]:
    settings = layout.config.lenses
    assert settings is not None
    inputs: Named = {"model": layout.model_json}
    inputs |= {name: layout.lens(task, f"{name}.csv") for name in (*settings.tables(), "pictures")}
    return inputs, {
        "figures": _drawn(layout.lens(task, "figures/"), settings.figures()),
        "drawings": [layout.lens(task, f"figures/prompt_{number}.svg") for number in range(settings.pictures)],
    }


VISION_TABLES = ("importance", "agreement", "curves", "sanity")


def _vision_model(layout: Layout) -> tuple[Named, Named]:
    return {}, {
        "model": layout.vision_model("model.json"),
        "weights": layout.vision_model(WEIGHTS),
        "images": layout.vision_model(IMAGES),
    }


def _vision(layout: Layout, units: str) -> tuple[Named, Named]:
    inputs = _vision_model(layout)[1]
    outputs: Named = {name: layout.vision(f"{units}/{name}.csv") for name in VISION_TABLES}
    return inputs, outputs | {"by_image": layout.vision(f"{units}/by-image.safetensors")}


def _vision_figures(layout: Layout) -> tuple[Named, Named]:
    settings = layout.config.vision
    assert settings is not None
    inputs: Named = {"model": layout.vision_model("model.json")}
    for name in VISION_TABLES:
        inputs[name] = [layout.vision(f"{units}/{name}.csv") for units in settings.units]
    outputs: Named = {name: layout.vision(f"{name}.csv") for name in VISION_TABLES}
    return inputs, outputs | {"figures": _drawn(layout.vision("figures/"), settings.figures())}


STUDY_PARTS = ("cost", "accuracy", "comparison")  # tables that each member has
STUDY_TABLES = (*STUDY_PARTS, "exponents", "payoff")


def _study_member(layout: Layout, member: str) -> tuple[Named, Named]:
    """All else that a member reads and writes is its own run's."""
    names = {"member": "run.json", "comparison": "comparison.csv"}
    return {}, {name: layout.study(f"{member}/{file}") for name, file in names.items()}


def _study_cost(layout: Layout, member: str) -> tuple[Named, Named]:
    inputs: Named = {"member": layout.study(f"{member}/run.json")}
    return inputs, {name: layout.study(f"{member}/{name}.csv") for name in ("cost", "accuracy")}


def _study_figures(layout: Layout) -> tuple[Named, Named]:
    config = layout.config
    assert config.study is not None
    inputs: Named = {"member": [layout.study(f"{member}/run.json") for member in config.study.models]}
    for name in STUDY_PARTS:
        inputs[name] = [layout.study(f"{member}/{name}.csv") for member in config.study.models]
    outputs: Named = {name: layout.study(f"{name}.csv") for name in STUDY_TABLES}
    figures = config.study.figures(config.study_tasks())
    return inputs, outputs | {"figures": _drawn(layout.study("figures/"), figures)}


def compared_jobs(config: Config, other: Config) -> Iterator[tuple[str, dict[str, str]]]:
    """The jobs of a run whose files its comparison with another reads: those that both have, and all that find circuits
    of a task of both, whose fronts are drawn over one another.
    """
    theirs, tasks = list(planned(other)), other.circuit_tasks()
    for stage, wildcards in planned(config):
        drawn = stage == "circuits" and wildcards["task"] in tasks
        if stage in MEASURING and (drawn or (stage, wildcards) in theirs):
            yield stage, wildcards


def comparison_files(layout: Layout, other: str) -> dict[str, str]:
    """What a comparison with the run `other` writes."""
    stem = f"{layout.results_dir}/compared-with-{other}"
    return {"numbers": f"{stem}.csv", "page": f"{stem}.html"}


def _comparison(layout: Layout, other: str) -> tuple[Named, Named]:
    """The other run's files are absolute, so that no prefix of a workflow goes before them."""

    def read(of: Layout, beside: Config) -> list[str]:
        jobs_of = compared_jobs(of.config, beside)
        written = (files_of(of, stage, **wildcards)[1].every() for stage, wildcards in jobs_of)
        return [str(path) for paths in written for path in paths]

    theirs = compared_runs(layout.config)[other]
    other_layout = Layout(theirs.config)
    others = [other_layout.model_json, *read(other_layout, layout.config)]
    inputs: Named = {"model": layout.model_json, "results": read(layout, theirs.config)}
    inputs |= {"config": str(theirs.file.absolute()), "others": [str(Path(path).absolute()) for path in others]}
    return inputs, {**comparison_files(layout, other)}


def check_compared(config: Config) -> None:
    """Look whether the runs of `compare:` are other ones and finished, before any work.

    Raises:
        UserError: naming the config and the file that is missing.
    """
    layout = Layout(config)
    for name, (file, other) in compared_runs(config).items():
        if Path(Layout(other).results_dir).resolve() == Path(layout.results_dir).resolve():
            raise UserError(f"compare: {file}: the results of this run itself; allowed: configs of other runs")
        read = files_of(layout, "comparison", other=name)[0]
        if missing := next((path for path in read.all("others") if not path.exists()), None):
            raise UserError(f"compare: {file}: {missing} is missing; allowed: configs of finished runs")


def _report(layout: Layout) -> tuple[Named, Named]:
    """Of each experiment and task its tables and figures: the outputs of the stages that come last there."""
    config = layout.config
    if config.study is not None:
        return _study_report(layout)
    inputs: Named = {"model": layout.model_json}
    inputs |= {f"prompts_{task}": layout.prompts(task) for task in config.tasks.selected()}
    stages = [("gaps", task) for task in config.ablation_tasks()] + [
        ("figures", task) for task in config.ablation_tasks()
    ]
    stages += [("circuit_figures", task) for task in config.circuit_tasks()]
    stages += [("interaction_figures", task) for task in config.interaction_tasks()]
    stages += [("removal_figures", "")] if config.removal is not None else []
    stages += [(name, task) for task in config.tracing_tasks() for name in ("tracing", "tracing_figures")]
    for task in config.lens_tasks():
        assert config.lenses is not None
        stages += [("lens_evaluation", task), ("lens_figures", task)]
        stages += [(f"lens_{name}", task) for name in LENS_SECTIONS if getattr(config.lenses, name) is not None]
    stages += [("vision_figures", "")] * (config.vision is not None)
    if config.vision is not None:
        inputs["vision_model"] = layout.vision_model("model.json")
    inputs["comparisons"] = [comparison_files(layout, other)["numbers"] for other in compared_runs(config)]
    for stage, task in stages:
        wildcards = {} if stage in ("removal_figures", "vision_figures") else {"task": task}
        for name, paths in files_of(layout, stage, **wildcards)[1].named().items():
            inputs[f"{stage}_{name}_{task}".rstrip("_")] = _shown(paths)
    return inputs, {"report": layout.report}


def _study_report(layout: Layout) -> tuple[Named, Named]:
    of_members, tables = _study_figures(layout)
    shown = {name: _shown(paths) for name, paths in Files(tables).named().items()}
    return {"member": of_members["member"], **shown}, {"report": layout.report}


def _shown(paths: list[str]) -> list[str]:
    """Those of a stage's outputs that the page has: tables, and figures as SVG."""
    return [path for path in paths if not path.endswith((".png", ".safetensors"))]


_FILES: dict[str, Callable[..., tuple[Named, Named]]] = {
    "demo": _demo, "model": _model, "prompts": _prompts, "activations": _activations, "optimal": _optimal,
    "gaps": _gaps, "figures": _figures, "circuits": _circuits,
    "circuit_figures": _circuit_figures, "interaction_ranking": _interaction_ranking,
    "interactions": _interactions, "interaction_figures": _interaction_figures,
    "removal": _removal, "removal_figures": _removal_figures,
    "tracing_fit": _tracing_fit, "tracing": _tracing,
    "tracing_figures": _tracing_figures, "lens_activations": _lens_activations, "lens_fit": _lens_fit,
    "lens_evaluation": _lens_evaluation, "lens_faithfulness": _lens_faithfulness,
    "lens_truthfulness": _lens_truthfulness, "lens_figures": _lens_figures,
    "vision_model": _vision_model, "vision": _vision, "vision_figures": _vision_figures,
    "study_member": _study_member, "study_cost": _study_cost, "study_figures": _study_figures,
    "comparison": _comparison, "report": _report,
}  # fmt: skip
