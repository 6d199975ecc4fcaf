"""Optimal ablation: model -> prompts -> activations -> constants, gaps, circuits, tracing, lenses -> report."""

import sys

from snakemake.utils import min_version

min_version("9.0")

from oacore.__main__ import estimated
from oacore.codehash import codehash
from oacore.config import FITTED, LEARNED, LENS_SECTIONS, RANKED, parse_config
from oacore.errors import UserError
from oacore.layout import Layout, circuit_file, model_settings, task_settings
from oacore.locks import hold_for_pipeline, mark_cache_complete
from oacore.tasks import check_files

# Only without --configfile: Snakemake would merge the two, and the demo's keys would become part of every run.
if not workflow.config_settings.configfiles:

    configfile: "config/demo.yaml"


try:
    run_config = parse_config(config)
    check_files(run_config.tasks.selected())
except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)

# What a run would need, before it starts; nothing of this in jobs, which are processes of their own, nor in real runs.
if workflow.is_main_process and workflow.output_settings.dryrun:
    print(estimated(run_config), file=sys.stderr)

layout = Layout(run_config)
TASKS = list(run_config.tasks.selected())
# One job takes the whole GPU where it may use one; the profiles say how many there are.
GPUS = 0 if run_config.device == "cpu" else 1


wildcard_constraints:
    task="|".join(TASKS),
    task_dir="|".join(layout.task_folders),


include: "workflow/rules/common.smk"


# Before Snakemake looks at any file: it plans by what is there.
if workflow.is_main_process and (asked := asked_for()) is not None:
    keep_others_out(wait=not asked.unlock)

    onsuccess:
        if not asked.targets:
            mark_cache_complete(layout)


include: "workflow/rules/model.smk"
include: "workflow/rules/prompts.smk"
include: "workflow/rules/activations.smk"
include: "workflow/rules/ablation.smk"
include: "workflow/rules/circuits.smk"
include: "workflow/rules/tracing.smk"
include: "workflow/rules/lenses.smk"
include: "workflow/rules/report.smk"


rule all:
    default_target: True
    input:
        layout.report,
    localrule: True
