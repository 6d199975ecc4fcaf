"""What all rules use. Every rule names its stage (`oacore.stages`) and its files; one script runs it.

`params` hold exactly the settings that a stage's result depends on (`read_by_*` of the sections, rows of registries)
and the hash of the code that computes it: Snakemake re-runs a job when they change, and it sees neither changes of
imported modules nor of the config as a whole. `conda` is used with `--software-deployment-method conda` only.
"""

import logging
import re
import sys
from functools import cache
from pathlib import Path

from snakemake.logging import get_event, logger

from oacore.config.ablation import ABLATION_TYPES
from oacore.config.circuits import CIRCUIT_METHODS, EDGE_ABLATIONS
from oacore.config.lenses import LENS_SECTIONS, LENSES, lens_and_init
from oacore.config.removal import REMOVAL_METHODS
from oacore.config.rows import computed, shown
from oacore.config.study import ESTIMATORS
from oacore.config.tasks import task_row
from oacore.config.tracing import CORRUPTIONS
from oacore.config.vision import MEASURES, REPLACEMENTS
from oacore.estimate.sizes import known_sizes
from oacore.study.member import identity

LOOKING = ["dryrun", "lint", "list_rules", "summary", "detailed_summary", "dag"]
LOOKING += ["rulegraph", "filegraph", "d3dag", "list_untracked", "report"]


def asked_for():
    """The command line, or None if it only looks. Snakemake tells its workflow too late, after it has planned."""
    from snakemake.cli import get_argument_parser

    if (
        "snakemake" not in Path(sys.argv[0]).parts
    ):  # run through Snakemake's Python interface
        return None
    asked, _ = get_argument_parser().parse_known_args(sys.argv[1:])
    return None if any(getattr(asked, name, None) for name in LOOKING) else asked


def keep_others_out(wait):
    """Take the run's locks, or say who has them."""
    try:
        hold_for_pipeline(placed, wait=wait)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def code(stage, *rows):
    """The hash of a stage's code, and of what computes the rows of a registry that it is about."""
    return codehash(f"oacore.stages.{stage}", *(row.module for row in rows))


@cache
def first_mem_mb(member=None):
    """Enough for the weights, which a job loads before they go to a GPU; 16 GB where they are few or unknown.

    Of the run's model, or of a study's member.
    """
    try:
        sizes = known_sizes(run_config if member is None else MEMBERS[member])
    except UserError:  # of a model that can't be run: the job that loads it says so
        sizes = None
    weights_bytes = 0 if sizes is None else sizes.weights_bytes
    return max(16000, 8000 + int(1.25 * weights_bytes / 1e6))


def mem_mb(wildcards, attempt):
    return first_mem_mb() * attempt


def vision_mem_mb(wildcards, attempt):
    return (4000 + VISION.images_mb) * attempt


def member_mem_mb(wildcards, attempt):
    """Of a study's member."""
    return first_mem_mb(wildcards.member) * attempt


def minutes(first):
    """The time limit on a cluster: `first` minutes, twice and three times that when it is tried again."""
    return lambda wildcards, attempt: first * attempt


def benchmarked(name):
    """Where Snakemake writes what a job took: seconds, memory, reading and writing. Not of shared files, which a job may
    find in Snakemake's own cache.
    """
    return f"{layout.results_dir}/benchmarks/{name}.tsv"


def results(task, name):
    """A file of a task's ablation experiment; "{task}" makes it a pattern."""
    return layout.ablation(task, name)


def task_files(name):
    """A shared file of the task that a rule's wildcard names."""
    return lambda wildcards: f"{layout.task_dir(wildcards.task)}/{name}"


# What `snakemake --report` calls the experiments; each has a caption of its name in workflow/report.
CATEGORIES = {
    "ablation": "Single components",
    "circuits": "Circuits",
    "interactions": "Effects and interactions",
    "removal": "Behaviour removal",
    "tracing": "Tracing of facts",
    "lenses": "Lenses",
    "vision": "Vision",
    "study": "Models and cost",
    "comparison": "Other runs",
    "page": "Page",
}


def told(experiment, path, task="{task}"):
    """A table, figure or page that `snakemake --report` shows under its experiment and, within, its task."""
    kinds = {".csv": "table", ".svg": "figure", ".html": "page"}
    return report(
        path,
        caption=f"../report/{experiment}.rst",
        category=CATEGORIES[experiment],
        subcategory=task,
        labels={"what": kinds[Path(path).suffix], "name": Path(path).stem},
    )


def drawn(experiment, path, names, task="{task}"):
    """The figures of these names as SVG, which the report shows, and PNG; `path` makes a file name a path."""
    return [
        each
        for name in names
        for each in (told(experiment, path(f"{name}.svg"), task), path(f"{name}.png"))
    ]


def inputs_of(stage, **wildcards):
    """A stage's inputs by name from the jobs of the command line."""
    return files_of(layout, stage, **wildcards)[0].named()


# The settings that pages print; others change no result.
asked_of_a_run = run_config.model_dump(
    mode="json", exclude={"limits", "device", "store_weights"}
)


# Files of the experiments.

CIRCUITS = run_config.circuits
INTERACTIONS = run_config.interactions
REMOVAL = run_config.removal
TRACING = run_config.tracing
LENS_SETTINGS = run_config.lenses
VISION = run_config.vision
STUDY = run_config.study
MEMBERS = run_config.members()


def constants(wildcards):
    """The constants of a task's fitted ablation types."""
    return [
        layout.constants(wildcards.task, method)
        for method in run_config.ablation.fitted()
    ]


def circuits(name):
    """A file of a task's circuits; "{task}" and others make it a pattern."""
    return layout.circuits("{task}", name)


def circuit_files(method, knobs):
    """A method's circuits under an ablation type, with {task} and {ablation}."""
    return [
        circuits(f"{method}-{{ablation}}/{circuit_file(knob, seed)}")
        for knob in knobs
        for seed in CIRCUITS.seeds
    ]


def of_every_ablation(pattern):
    """Files with {task} and {ablation} in their names, for all ablation types of a task."""
    names = list(pattern)
    return lambda wildcards: [
        name.format(task=wildcards.task, ablation=ablation)
        for ablation in CIRCUITS.ablations
        for name in names
    ]


def interactions(name):
    """A file of a task's effects and interactions; "{task}" and others make it a pattern."""
    return layout.interactions("{task}", name)


def traced(name):
    """A file of a task's causal tracing; "{task}" makes it a pattern."""
    return layout.tracing("{task}", name)


def place_constants(wildcards):
    """The constants of causal tracing, if some are fitted."""
    return (
        traced("constants.safetensors").format(task=wildcards.task)
        if TRACING.fitted
        else []
    )


def lenses(name):
    """A file of a task's lenses; "{task}" and others make it a pattern."""
    return layout.lens("{task}", name)


def lens_rows(wildcards):
    """The cache that lenses of the task are fitted to."""
    return layout.lens_rows(wildcards.task)


def lens_files(names):
    """The fitted lenses of these names."""
    return [lenses(f"{file}.safetensors") for file in LENS_SETTINGS.fitted_files(names)]


def teacher_file(wildcards):
    """The lens that this one is fitted to the output of."""
    teacher = LENS_SETTINGS.teacher(wildcards.lens)
    return layout.lens(wildcards.task, f"{teacher}.safetensors") if teacher else []


def lens_row(wildcards):
    """The row of the lens that a file is of."""
    return LENSES[lens_and_init(wildcards.lens)[0]]


def lens_code(stage, names):
    """The code of a stage, and of these lenses."""
    return code(stage, *(LENSES[name] for name in names))


# What the report says of registry rows; each experiment adds its own.
EXPERIMENT_ROWS = [shown(ABLATION_TYPES, run_config.ablation.methods)]


# What the terminal shows.

LOUD = {"job_info", "job_started", "job_finished", "group_info", "resources_info"}
LOUD_LINES = ("Select jobs to execute", "Execute ", "Workflow defines that rule")


def hush(handlers):
    """Leave Snakemake's progress, warnings and errors on the terminal; its log file keeps every job's files and reason."""

    def is_shown(record):
        if record.getMessage().startswith(LOUD_LINES):
            return False
        loud = getattr(get_event(record), "value", None) in LOUD
        return record.levelno > logging.INFO or not loud

    for handler in handlers:
        if handler.name == "DefaultStreamHandler":
            handler.addFilter(is_shown)


def results_shown(layout):
    """The report, and the tables by folder."""
    folders, files = {}, sorted(map(Path, promised(layout)))
    for path in files:
        # Folders of one method, or of one ablation type, have parts of the tables above.
        if path.suffix == ".csv" and path.parents[1] / path.name not in files:
            folders.setdefault(path.parent, []).append(path.name)
    lines = [f"{folder}: {', '.join(names)}" for folder, names in folders.items()]
    return "\n".join([*lines, f"report: {layout.report}"])
