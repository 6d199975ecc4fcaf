"""What all rules use. Every rule runs the stage of its own name (`oacore.stages`) through one script.

`params` hold exactly the settings that a stage's result depends on, and the hash of the code that computes it: Snakemake re-runs a job
when they change, and it sees neither changes of imported modules nor of the config as a whole. `conda` is used with
`--software-deployment-method conda` only.
"""

import sys
from functools import cache
from pathlib import Path

from oacore.estimate import known_sizes

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
        hold_for_pipeline(layout, wait=wait)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def code(stage):
    return codehash(f"oacore.stages.{stage}")


@cache
def first_mem_mb():
    """Enough for the weights, which a job loads before they go to a GPU; 16 GB where they are few or unknown."""
    sizes = known_sizes(run_config)
    weights = 0 if sizes is None else sizes.n_weights * sizes.bytes
    return max(16000, 8000 + int(1.25 * weights / 1e6))


def mem_mb(wildcards, attempt):
    return first_mem_mb() * attempt


def minutes(first):
    """The time limit on a cluster: `first` minutes, twice and three times that when it is tried again."""
    return lambda wildcards, attempt: first * attempt


def results(task, name):
    """A file of a task's ablation experiment; "{task}" makes it a pattern."""
    return layout.ablation(task, name)


def task_files(name):
    """A shared file of the task that a rule's wildcard names."""
    return lambda wildcards: f"{layout.task_dir(wildcards.task)}/{name}"


CIRCUITS = run_config.circuits.model_dump() if run_config.circuits else {}


def circuits(name):
    """A file of a task's circuits; "{task}" and others make it a pattern."""
    return layout.circuits("{task}", name)


def circuit_files(method):
    """What the evaluation writes for one method, with {task} and {ablation}."""
    knobs = run_config.circuits.knobs(method)
    names = [circuit_file(knob, seed) for knob in knobs for seed in CIRCUITS["seeds"]]
    return [
        circuits(f"{method}-{{ablation}}/{name}") for name in [*names, "pareto.csv"]
    ]


def search_minutes(wildcards, attempt):
    """Rankings and random circuits take a few passes over a few prompts, or none.

    They have jobs of their own even so: side by side in one SLURM job, each would add its GPU to the job's request, because the plugin
    (2.8) does not pass a limit on to it.
    """
    quick = wildcards.method in ("eap", "eap_ig", "random", "manual")
    return (30 if quick else 1440) * attempt


def search_settings(wildcards):
    """The keys that the method's search reads."""
    method = wildcards.method
    keys = ["seeds"]
    if method in LEARNED:
        keys += ["sizes" if method == "topk" else "lambdas", "masks"]
    elif method == "acdc":
        keys += ["thresholds", "n_prompts"]
    elif method not in ("random", "manual"):
        keys += ["sizes", "n_prompts"] + ["ig_steps"] * (method == "eap_ig")
    elif method == "random":
        keys += ["sizes"]
    objective = run_config.circuits.objective_of(method)
    return {"objective": objective} | {key: CIRCUITS[key] for key in keys}


TRACING = run_config.tracing.model_dump() if run_config.tracing else {}


LENSES = run_config.lenses.model_dump() if run_config.lenses else {}


def lenses(name):
    """A file of a task's lenses; "{task}" and others make it a pattern."""
    return layout.lens("{task}", name)


def lens_rows(wildcards):
    """The cache that lenses of the task are fitted to."""
    return layout.lens_rows(wildcards.task)


def lens_files(kinds):
    """The fitted lenses of these kinds."""
    fitted = run_config.lenses.fitted_files()
    return [
        lenses(f"{name}.safetensors") for name in fitted if name.split("-")[0] in kinds
    ]


def lens_settings(wildcards):
    """The keys that the lens's fit reads."""
    own = "oca" if wildcards.lens in ("oca", "oca_shared") else "tuned"
    keys = ["positions", own] + ["grad_prompts"] * (wildcards.lens == "grad")
    return {key: LENSES[key] for key in keys}


def labelled_files(wildcards):
    """The user's labelled data sets."""
    return [str(path) for path in run_config.lenses.truthfulness.datasets or ()]
