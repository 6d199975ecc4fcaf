"""Run the stage that has the rule's name."""

from oacore.__main__ import run_in_workflow

run_in_workflow(snakemake)  # noqa: F821
