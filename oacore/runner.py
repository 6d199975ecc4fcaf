"""Run a stage: memory retry, signals, logs, and the adapter for Snakemake."""

import importlib
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from oacore.config.read import parse_config
from oacore.config.run import Config
from oacore.errors import UserError, disk_error, is_out_of_memory
from oacore.jobs import STAGES, Files, files_of, planned
from oacore.store.housekeeping import write_needed
from oacore.store.items import used_items
from oacore.store.layout import Layout
from oacore.store.locks import hold_for_job, hold_for_pipeline, hold_gpu, mark_cache_complete

SMALLEST_BATCH = 64  # tokens, the least that limits.tokens_per_batch may be


def run_stage(stage: str, config: Config, files: tuple[Files, Files] | None = None, /, **wildcards: str) -> None:
    """Run one stage, again with batches half as large whenever memory runs out; a fit goes on from its checkpoint.

    Modules are imported here, so that a stage which needs no model never imports torch or transformers.

    Args:
        files: inputs and outputs, as a rule has them; by default where `Layout` has them.
        wildcards: what the stage is run for, such as a task.

    Raises:
        UserError: bad input, an input is missing, or memory is too short for the smallest batches.
    """
    inputs, outputs = files or files_of(Layout(config), stage, **wildcards)
    _check_inputs(config, inputs)
    run = importlib.import_module(f"oacore.stages.{stage}").run
    used_items()
    while not _fits(lambda config: run(config, inputs, outputs, **wildcards), config):
        limits = config.limits
        if limits.tokens_per_batch < 2 * SMALLEST_BATCH:
            raise UserError(
                f"{stage}: out of memory with limits.tokens_per_batch {limits.tokens_per_batch}; allowed: smaller "
                "batch sizes of the stage's own settings, shorter prompts, dtype bf16, or a device with more memory "
                "(`python -m oacore estimate`)"
            )
        halved: dict[str, float] = {"tokens_per_batch": limits.tokens_per_batch // 2}
        if limits.memory_gb != "auto":  # a masked pass halves its own
            halved["memory_gb"] = limits.memory_gb / 2
        config = config.model_copy(update={"limits": limits.model_copy(update=halved)})
        batches = f"again with limits.tokens_per_batch {halved['tokens_per_batch']}"
        print(f"{stage}: out of memory; {batches}", file=sys.stderr, flush=True)
    if used := used_items():
        write_needed(outputs.every()[0], used)


def _check_inputs(config: Config, inputs: Files) -> None:
    """Name the first file that is missing, and the stage that writes it."""
    if (missing := next((path for path in inputs.every() if not path.exists()), None)) is None:
        return
    for stage, wildcards in planned(config):
        if missing in files_of(Layout(config), stage, **wildcards)[1].every():
            raise UserError(f"{missing}: missing; run the stage `{stage}` first")
    raise UserError(f"{missing}: missing")


def _fits(run: Callable[[Config], None], config: Config) -> bool:
    """Run a stage; False if memory ran out. The error, which keeps all its tensors alive, ends with this call."""
    try:
        run(config)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return False
    except Exception as error:
        if (told := disk_error(error)) is None:
            raise
        raise told from error
    finally:
        if (torch := sys.modules.get("torch")) is not None and torch.cuda.is_initialized():
            torch.cuda.empty_cache()
    return True


def run_missing(config: Config) -> None:
    """Run every job of which an output is missing. Unlike Snakemake it does not see that an output is stale."""
    layout = Layout(config)
    hold_for_pipeline(layout)
    for stage, wildcards in planned(config):
        outputs = files_of(layout, stage, **wildcards)[1].every()
        if all(path.exists() for path in outputs):
            print(f"{stage} {' '.join(wildcards.values())}: {outputs[0]} exists")
        else:
            run_stage(stage, config, **wildcards)
    mark_cache_complete(layout)


def run_in_workflow(job: Any) -> None:
    """Run the stage that a Snakemake job names, with its files and wildcards, copying what it prints to the rule's log.

    Exits with status 2 after a user error and 130 after Ctrl-C, without a traceback.
    """
    Path(job.log[0]).parent.mkdir(parents=True, exist_ok=True)
    with (
        open(job.log[0], "w", encoding="utf-8") as log,
        redirect_stdout(_Tee(sys.stdout, log)),
        redirect_stderr(_Tee(sys.stderr, log)),
    ):
        status = _attempt(job)
    sys.exit(status)


def stop_on_sigterm() -> None:
    """SIGTERM, which SLURM and `kill` send, ends a stage as Ctrl-C does: nothing half-written stays."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)


def _attempt(job: Any) -> int:
    stop_on_sigterm()
    try:
        config, stage = parse_config(job.config), job.params.stage
        wildcards = {name: _value(job, name, config) for name in STAGES[stage][1]}
        hold_for_job(_layout(job, config, stage, wildcards))
        if job.resources.get("gpu"):
            hold_gpu(config.device)
        files = _files(job.input), _files(job.output)
        start = time.monotonic()
        run_stage(stage, config, files, **wildcards)
        print(f"done in {_clock(time.monotonic() - start)}: {' '.join([stage, *wildcards.values()])}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception:  # printed here, while the log is open; then the job fails
        traceback.print_exc()
        return 1
    return 0


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


def _layout(job: Any, config: Config, stage: str, wildcards: dict[str, str]) -> Layout:
    """Where the job's run lies: under a prefix, if its workflow is a module of another one."""
    expected = str(files_of(Layout(config), stage, **wildcards)[1].every()[0])
    return Layout(config, prefix=job.output[0].removesuffix(expected))


def _files(named: Any) -> Files:
    """A rule's input or output by name."""
    return Files({name: [paths] if isinstance(paths, str) else list(paths) for name, paths in named.items()})


def _value(job: Any, name: str, config: Config) -> str:
    """A wildcard; shared files have the task's folder, `{task}-{hash}`, in its place."""
    wildcards = dict(job.wildcards.items())
    return wildcards[name] if name in wildcards else Layout(config).task_of(wildcards[f"{name}_dir"])


class _Tee:
    """A stream that writes to two."""

    def __init__(self, first: Any, second: Any):
        self.streams = (first, second)

    def write(self, text: str) -> int:
        for stream in self.streams:
            stream.write(text)
            stream.flush()
        return len(text)

    def flush(self) -> None:
        for stream in self.streams:
            stream.flush()

    def isatty(self) -> bool:
        return False
