"""Run the stage that has the rule's name."""

import sys
from pathlib import Path

# Under `--software-deployment-method conda` the job's environment holds the dependencies, but not this repository.
sys.path.append(str(Path(snakemake.scriptdir).parents[1]))  # noqa: F821

from oacore.runner import run_in_workflow

run_in_workflow(snakemake)  # noqa: F821
