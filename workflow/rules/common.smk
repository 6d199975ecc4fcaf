"""What all rules use. Every rule runs the stage of its own name (`oacore.stages`) through one script.

`params` hold exactly the settings that a stage's result depends on, and the hash of the code that computes it: Snakemake re-runs a job
when they change, and it sees neither changes of imported modules nor of the config as a whole. `conda` is used with
`--software-deployment-method conda` only.
"""


def code(stage):
    return codehash(f"oacore.stages.{stage}")


def mem_mb(wildcards, attempt):
    return 16000 * attempt


def results(task, name):
    """A file of a task's ablation experiment; "{task}" makes it a pattern."""
    return layout.ablation(task, name)


def task_files(name):
    """A shared file of the task that a rule's wildcard names."""
    return lambda wildcards: f"{layout.task_dir(wildcards.task)}/{name}"
