"""The pipeline's stages without Snakemake: `python -m oacore STAGE --config FILE`."""

import argparse
import importlib
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from oacore import __version__, estimate
from oacore.config import LENS_SECTIONS, OPTIONAL_SECTIONS, Config, load_config, parse_config
from oacore.errors import UserError, is_out_of_memory
from oacore.layout import Layout
from oacore.locks import hold_for_job, hold_for_pipeline, hold_gpu, mark_cache_complete
from oacore.tasks import check_files

# In the order in which they run; what each is run for beside the config.
STAGES: dict[str, tuple[str, tuple[str, ...]]] = {
    "demo": ("train the embedded model (model: demo)", ()),
    "model": ("load the model, check it against Hugging Face, write model.json", ()),
    "prompts": ("generate a task's prompts", ("task",)),
    "activations": ("cache the model's clean activations on the prompts", ("task",)),
    "optimal": ("fit optimal constants", ("task", "method")),
    "gaps": ("measure every component's ablation loss gap", ("task",)),
    "figures": ("draw the figures", ("task",)),
    "circuit_search": ("find circuits", ("task", "method", "ablation")),
    "circuit_evaluation": ("judge circuits on held-out prompts", ("task", "ablation")),
    "circuit_figures": ("draw the circuits and their Pareto fronts", ("task",)),
    "tracing_fit": ("fit optimal constants for causal tracing", ()),
    "tracing": ("trace facts", ()),
    "tracing_figures": ("draw where facts are recalled", ()),
    "lens_activations": ("cache the model's activations at every position", ("task",)),
    "lens_fit": ("fit lenses", ("task", "lens")),
    "lens_evaluation": ("measure lenses on held-out prompts", ("task",)),
    "lens_faithfulness": ("compare how lenses and model react to changes", ("task",)),
    "lens_truthfulness": ("compare layers before true and wrong demonstrations", ("task",)),
    "lens_figures": ("draw the lenses' figures", ("task",)),
    "report": ("write the HTML report", ()),
}


WITHOUT_GPU = ("demo", "figures", "circuit_figures", "tracing_figures", "lens_figures", "report")
SMALLEST_BATCH = 64  # tokens, the least that limits.tokens_per_batch may be

TOOLS = {
    "mib-score": "CPR and CMD of a circuit file, as the MIB benchmark defines them",
    "mib-export": "a circuit and its constants in the formats of the MIB benchmark",
    "estimate": "memory and time that every GPU rule of a config takes, before it runs",
}


def run_stage(stage: str, config: Config, **what: str) -> None:
    """Run one stage, again with batches half as large whenever memory runs out; a fit goes on from its checkpoint.

    Modules are imported here, so that a stage which needs no model never imports torch or transformers.

    Raises:
        UserError: bad input, or memory is too short for the smallest batches.
    """
    run = importlib.import_module(f"oacore.stages.{stage}").run
    while not _fits(run, config, what):
        limits = config.limits
        if limits.tokens_per_batch < 2 * SMALLEST_BATCH:
            raise UserError(
                f"{stage}: out of memory with limits.tokens_per_batch {limits.tokens_per_batch}; allowed: smaller batch sizes of the "
                "stage's own settings, shorter prompts, dtype bf16, or a device with more memory (`python -m oacore estimate`)"
            )
        halved = {"tokens_per_batch": limits.tokens_per_batch // 2, "memory_gb": limits.memory_gb / 2}
        config = config.model_copy(update={"limits": limits.model_copy(update=halved)})
        print(f"{stage}: out of memory; again with limits.tokens_per_batch {halved['tokens_per_batch']}", file=sys.stderr, flush=True)


def _fits(run: Callable[..., None], config: Config, what: dict[str, str]) -> bool:
    """Run a stage; False if memory ran out. The error, which keeps all its tensors alive, ends with this call."""
    try:
        run(config, **what)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return False
    finally:
        if (torch := sys.modules.get("torch")) is not None and torch.cuda.is_initialized():
            torch.cuda.empty_cache()
    return True


def jobs(config: Config) -> Iterator[tuple[str, dict[str, str], str]]:
    """Every job of a config in order: stage, what it is run for, its main output."""
    layout = Layout(config)
    if config.model == "demo":
        yield "demo", {}, f"{layout.demo_model}/training.json"
    yield "model", {}, layout.model_json
    for task in config.tasks.selected():
        yield "prompts", {"task": task}, layout.prompts(task)
        yield "activations", {"task": task}, layout.activations(task)
    for task in config.ablation_tasks():
        for method in config.ablation.fitted():
            yield "optimal", {"task": task, "method": method}, layout.constants(task, method)
        yield "gaps", {"task": task}, layout.ablation(task, "gaps.csv")
        yield "figures", {"task": task}, layout.ablation(task, f"{config.ablation.figures()[-1]}.svg")
    for task in config.circuit_tasks():
        assert config.circuits is not None
        for ablation in config.circuits.ablations:
            for searcher in config.circuits.methods:
                what = {"task": task, "method": searcher, "ablation": ablation}
                yield "circuit_search", what, layout.circuits(task, f"{searcher}-{ablation}/search.safetensors")
            last = layout.circuits(task, f"{config.circuits.methods[-1]}-{ablation}/pareto.csv")
            yield "circuit_evaluation", {"task": task, "ablation": ablation}, last
        yield "circuit_figures", {"task": task}, layout.circuits(task, f"figures/circuit_{config.circuits.ablations[-1]}.svg")
    if config.tracing is not None:
        if config.tracing.fitted:
            yield "tracing_fit", {}, layout.tracing("constants.safetensors")
        yield "tracing", {}, layout.tracing("aie.csv")
        yield "tracing_figures", {}, layout.tracing(f"figures/{config.tracing.figures()[-1]}.svg")
    yield from _lens_jobs(config, layout)
    yield "report", {}, layout.report


def _lens_jobs(config: Config, layout: Layout) -> Iterator[tuple[str, dict[str, str], str]]:
    settings = config.lenses
    for task in config.lens_tasks():
        assert settings is not None
        if settings.positions == "all":
            yield "lens_activations", {"task": task}, layout.lens_rows(task)
        for lens in settings.fitted_files():
            yield "lens_fit", {"task": task, "lens": lens}, layout.lens(task, f"{lens}.safetensors")
        yield "lens_evaluation", {"task": task}, layout.lens(task, "loss.csv")
        for section in LENS_SECTIONS:
            if getattr(settings, section) is not None:
                yield f"lens_{section}", {"task": task}, layout.lens(task, f"{section}.csv")
        yield "lens_figures", {"task": task}, layout.lens(task, f"figures/{settings.figures()[-1]}.svg")


def run_missing(config: Config) -> None:
    """Run every job whose output is missing. Unlike Snakemake it does not see that an output is stale."""
    hold_for_pipeline(Layout(config))
    for stage, what, output in jobs(config):
        if Path(output).exists():
            print(f"{stage} {' '.join(what.values())}: {output} exists")
        else:
            run_stage(stage, config, **what)
    mark_cache_complete(Layout(config))


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and run; returns the exit status."""
    listing = "\n".join(f"  {name:18} {help}" for name, (help, _) in STAGES.items())
    tools = "\n".join(f"  {name:18} {help}" for name, help in TOOLS.items())
    parser = argparse.ArgumentParser(
        prog="python -m oacore",
        description=f"Optimal ablation {__version__}. Stages, in order:\n{listing}\n  {'all':18} every stage whose output is missing\n\n"
        f"Tools:\n{tools}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("stage", choices=[*STAGES, "all", *TOOLS], metavar="STAGE")
    parser.add_argument("file", nargs="?", help="estimate: the YAML file, as --config")
    parser.add_argument("--config", default="config/demo.yaml", help="YAML file (default: %(default)s)")
    parser.add_argument("--task", help="one task (default: all of the config)")
    parser.add_argument("--method", help="one fitted ablation type, or circuit method (default: all of the config)")
    parser.add_argument("--lens", help="lens_fit: one lens (default: all of the config)")
    parser.add_argument("--ablation", help="circuits: one ablation type (default: all of the config)")
    parser.add_argument("--circuit", type=Path, help="mib-score, mib-export: a circuit file")
    parser.add_argument("--output", type=Path, help="mib-export: a folder")
    parser.add_argument("--model-config", type=Path, help="estimate: a config.json with the sizes, instead of the model's")
    parser.add_argument("--tflops", type=float, help="estimate: of the device, instead of a measurement here")
    parser.add_argument("--memory-gb", type=float, help="estimate: of the device, instead of this machine's")
    given = parser.parse_args(arguments)
    if given.file is not None and given.stage != "estimate":
        parser.error(f"unrecognized argument: {given.file}; allowed: --config {given.file}")
    if given.stage.startswith("mib-") and (given.circuit is None or (given.stage == "mib-export" and given.output is None)):
        parser.error(f"{given.stage} needs --circuit{' and --output' if given.stage == 'mib-export' else ''}")
    _stop_on_sigterm()
    try:
        if given.stage in TOOLS:
            _run_tool(given)
            return 0
        config = load_config(given.config)
        check_files(config.tasks.selected())
        if given.stage not in WITHOUT_GPU:
            hold_gpu(config.device)
        _run(given.stage, config, {name: getattr(given, name) for name in ("task", "method", "ablation", "lens")})
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: nothing half-written remains; run the same command to go on", file=sys.stderr)
        return 130
    return 0


def _run_tool(given: argparse.Namespace) -> None:
    config = load_config(given.file or given.config)
    if given.stage == "estimate":
        print(estimated(config, model_config=given.model_config, tflops=given.tflops, memory_gb=given.memory_gb, fetch=True))
        return
    from oacore.stages import mib

    if given.stage == "mib-score":
        mib.score(config, given.circuit, given.task)
    else:
        mib.export(config, given.circuit, given.output, given.task)


def estimated(
    config: Config, *, model_config: Path | None = None, tflops: float | None = None, memory_gb: float | None = None, fetch: bool = False
) -> str:
    """The table of what GPU rules need.

    Args:
        model_config: a config.json to take the sizes from.
        tflops, memory_gb: of the device: without them its name alone is known, unless fetching.
        fetch: ask the hub for sizes, and measure the device; imports torch. Without it an unknown model gets one line.

    Raises:
        UserError: the sizes can't be had, or there is no such device.
    """
    sizes = estimate.known_sizes(config, model_config)
    if sizes is None and not fetch:
        return f"estimate: the sizes of {config.model!r} are not on this machine; `python -m oacore estimate CONFIG` asks the hub"
    if sizes is None:
        from oacore.model import hugging_face_config

        facts = hugging_face_config(config.model, revision=config.revision).to_dict()
        sizes = estimate.Sizes.of(facts, estimate.itemsize(config))
    gpu = estimate.has_gpu(config)
    memory, throughput = 0.0 if gpu else estimate.host_memory(), None
    if fetch and (tflops is None or memory_gb is None):
        from oacore.throughput import measured

        device = measured(config)
        gpu, memory, throughput = device.name == "cuda", device.memory, device.throughput
    memory = memory if memory_gb is None else memory_gb * 1e9
    throughput = throughput if tflops is None else tflops * 1e12
    needs = estimate.needs(estimate.Case(config, sizes, gpu), jobs(config))
    return estimate.table(needs, device="GPU" if gpu else "CPU", memory=memory, throughput=throughput)


def _run(stage: str, config: Config, given: dict[str, str | None]) -> None:
    if stage == "all":
        run_missing(config)
        return
    all_of_stage = [what for name, what, _ in jobs(config) if name == stage]
    if not all_of_stage:
        section = next((name for name in OPTIONAL_SECTIONS if stage.startswith(name[:4])), None)
        raise UserError(f"{stage}: the config has nothing for this stage{f' (no {section}: section)' if section else ''}")
    for name in STAGES[stage][1]:
        if (value := given[name]) is not None:
            allowed = list(dict.fromkeys(what[name] for what in all_of_stage))
            if value not in allowed:
                raise UserError(f"--{name}: {value!r}; allowed by the config: {', '.join(allowed)}")
    for what in all_of_stage:
        if all(given[name] in (None, value) for name, value in what.items()):
            run_stage(stage, config, **what)


def run_in_workflow(job: Any) -> None:
    """Run the stage named like a Snakemake rule, with its wildcards, copying what it prints to the rule's log.

    Exits with status 2 after a user error and 130 after Ctrl-C, without a traceback.
    """
    Path(job.log[0]).parent.mkdir(parents=True, exist_ok=True)
    with open(job.log[0], "w", encoding="utf-8") as log, redirect_stdout(_Tee(sys.stdout, log)), redirect_stderr(_Tee(sys.stderr, log)):
        status = _attempt(job)
    sys.exit(status)


def _stop_on_sigterm() -> None:
    """SIGTERM, which SLURM and `kill` send, ends a stage as Ctrl-C does: nothing half-written stays."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)


def _attempt(job: Any) -> int:
    _stop_on_sigterm()
    try:
        config = parse_config(job.config)
        hold_for_job(Layout(config))
        if job.resources.get("gpu"):
            hold_gpu(config.device)
        run_stage(job.rule, config, **{name: _value(job, name, config) for name in STAGES[job.rule][1]})
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


if __name__ == "__main__":
    sys.exit(main())
