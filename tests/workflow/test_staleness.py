"""What re-runs after which change, exactly: every config key and every module, on a finished run, by Snakemake's own plan."""

import io
from collections import Counter
from contextlib import redirect_stderr
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
TINY = yaml.safe_load((ROOT / "tests/configs/tiny.yaml").read_text())


def planned(values, path):
    """Jobs by rule that Snakemake would run for a config, without starting a process for each of some 200 questions."""
    from snakemake.api import SnakemakeApi
    from snakemake.settings.types import ConfigSettings, DAGSettings, OutputSettings, Quietness, ResourceSettings

    path.write_text(yaml.safe_dump(values))
    with redirect_stderr(io.StringIO()), SnakemakeApi(OutputSettings(quiet={Quietness.ALL}, dryrun=True)) as api:
        api = api.workflow(
            resource_settings=ResourceSettings(cores=2), config_settings=ConfigSettings(configfiles=[path]), snakefile=ROOT / "Snakefile"
        )
        api.dag(DAGSettings())
        workflow = api._workflow
        workflow._prepare_dag(forceall=False, ignore_incomplete=True, lock_warn_only=True)
        workflow._build_dag()
        return Counter(job.rule.name for job in workflow.dag.needrun_jobs()) - Counter(["all"])
