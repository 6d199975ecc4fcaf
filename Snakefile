"""Optimal ablation: model -> prompts -> activations -> constants, gaps, circuits, interactions, removal, tracing, lenses,
vision -> report; or, of a study, each member's run -> costs -> report.
"""

import sys

from snakemake.utils import min_version

min_version("9.0")

from oacore.config.read import compared_runs, parse_config
from oacore.config.yaml_file import read_yaml
from oacore.errors import UserError
from oacore.estimate.run import estimated
from oacore.jobs import (
    INTERACTION_TABLES,
    STUDY_PARTS,
    STUDY_TABLES,
    VISION_TABLES,
    check_compared,
    comparison_files,
    data_sets,
    files_of,
    promised,
)
from oacore.store.codehash import codehash
from oacore.store.layout import (
    Layout,
    circuit_file,
    model_settings,
    task_settings,
    vision_settings,
)
from oacore.store.locks import hold_for_pipeline, mark_cache_complete
from oacore.tasks.generate import check_files

# Only without --configfile: Snakemake would merge the two, and the demo's keys would become part of every run.
if not workflow.config_settings.configfiles:

    configfile: "config/demo.yaml"


# What `snakemake --report` begins with.
report: "workflow/report/workflow.rst"


try:
    # For keys that are given twice, of which Snakemake takes the second.
    if workflow.is_main_process:
        for file in workflow.config_settings.configfiles or ():
            read_yaml(file)
    run_config = parse_config(config)
    check_files(run_config)
    if workflow.is_main_process:
        check_compared(run_config)
    # What a run would need, before it starts; nothing of this in jobs, which are processes of their own, nor in real
    # runs.
    if workflow.is_main_process and workflow.output_settings.dryrun:
        print(estimated(run_config), file=sys.stderr)
        print(
            "what of it is in the store already: python -m oacore plan FILE",
            file=sys.stderr,
        )
except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)

layout = Layout(run_config)
# The same where it lies: as a module of another workflow this one may have a prefix, which Snakemake puts before rules'
# paths alone.
placed = Layout(run_config, prefix=workflow.modifier.path_modifier.modify(""))
SELECTED = list(run_config.tasks.selected())
# One job takes the whole GPU where it may use one; the profiles say how many there are.
GPUS = 0 if run_config.device == "cpu" else 1


wildcard_constraints:
    task="|".join(SELECTED),
    task_dir="|".join(layout.task_folders),


# The first rule is what a call without targets makes. In a workflow that has this one as a module, that workflow's own
# is.
rule all:
    input:
        promised(layout),
    localrule: True


include: "workflow/rules/common.smk"


# Before Snakemake looks at any file: it plans by what is there.
if workflow.is_main_process and (asked := asked_for()) is not None:
    # As a module of another workflow this one leaves the terminal to that.
    is_whole = workflow.modifier.parent_modifier is None
    if is_whole and not (asked.verbose or asked.printshellcmds):
        hush(logger.handlers)
    keep_others_out(wait=not asked.unlock)

    onsuccess:
        if not asked.targets:
            mark_cache_complete(placed)
            if is_whole:
                print(results_shown(placed), file=sys.stderr)


include: "workflow/rules/model.smk"
include: "workflow/rules/prompts.smk"
include: "workflow/rules/activations.smk"
include: "workflow/rules/ablation.smk"
include: "workflow/rules/circuits.smk"
include: "workflow/rules/interactions.smk"
include: "workflow/rules/removal.smk"
include: "workflow/rules/tracing.smk"
include: "workflow/rules/lenses.smk"
include: "workflow/rules/vision.smk"
include: "workflow/rules/study.smk"
include: "workflow/rules/comparison.smk"
include: "workflow/rules/report.smk"
