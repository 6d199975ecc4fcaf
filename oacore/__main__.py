"""The pipeline's stages without Snakemake, and its tools: `python -m oacore COMMAND`."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import shtab

from oacore import __version__
from oacore.config.read import load_config
from oacore.config.run import OPTIONAL_SECTIONS
from oacore.errors import UserError
from oacore.estimate.run import estimated
from oacore.jobs import STAGES, WITHOUT_GPU, check_compared, jobs
from oacore.plan import plan, shown
from oacore.runner import run_missing, run_stage, stop_on_sigterm
from oacore.store.housekeeping import MB, pieces, remove, table
from oacore.store.locks import hold_gpu
from oacore.tasks.generate import check_files
from oacore.verify import record, verify

Given = argparse.Namespace
DEFAULT = Path("config/demo.yaml")
SCRIPT = "oacore"  # as installed: shells complete commands of one word
# What a stage can be run for alone; all of the config by default.
ONE = {
    "task": "one task",
    "method": "one fitted ablation type, or circuit method",
    "ablation": "one ablation type of edges",
    "lens": "one lens",
    "units": "one kind of units",
    "member": "one member of a study",
    "other": "one run of compare:",
}


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and run; returns the exit status."""
    given = _parser().parse_args(arguments)
    stop_on_sigterm()
    try:
        status: int = given.run(given)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: nothing half-written remains; run the same command to go on", file=sys.stderr)
        return 130
    return status


def _parser() -> argparse.ArgumentParser:
    """Each command with the options that it takes."""
    parser = argparse.ArgumentParser(
        prog="python -m oacore",
        description=f"Optimal ablation {__version__}: the stages of a run, in order, and tools.",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(name: str, says: str, run: Callable[[Given], int]) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=says, description=f"{says[0].upper()}{says[1:]}.")
        added.set_defaults(run=run, command=name)
        return added

    for stage, (says, wildcards) in STAGES.items():
        of_stage = command(stage, says, _stage)
        _with_config(of_stage)
        for name in wildcards:
            of_stage.add_argument(f"--{name}", help=f"{ONE[name]} (default: all of the config)")
    _with_config(command("all", "run every stage whose output is missing", _all))
    says = "what a run would compute that is not in the store yet, and how long that will take"
    _with_file(command("plan", says, _plan))
    of_estimate = command("estimate", "memory and time of every GPU rule of a config, before it runs", _estimate)
    _with_file(of_estimate)
    of_estimate.add_argument("--model-config", type=Path, help="a config.json with the sizes, instead of the model's")
    of_estimate.add_argument("--tflops", type=float, help="of the device, instead of a measurement here")
    of_estimate.add_argument("--memory-gb", type=float, help="of the device, instead of this machine's")
    of_verify = command("verify", "the numbers of a finished run beside those that are expected of it", _verify)
    _with_file(of_verify)
    of_verify.add_argument(
        "--record",
        type=Path,
        nargs="+",
        metavar="RESULTS_DIR",
        help="write the expected numbers instead, from folders of finished runs, the reference first",
    )
    of_compare = command("compare", "two finished runs side by side: settings, numbers, fronts, circuits", _compare)
    of_compare.add_argument("files", nargs=2, type=Path, metavar="FILE", help="YAML files of finished runs")
    says = "a finished run's circuits, constants, lenses and tables, with a card, to the Hugging Face hub or a folder"
    of_push = command("push", says, _push)
    of_push.add_argument("file", type=Path, metavar="FILE", help="YAML file of a finished run")
    of_push.add_argument("--to", required=True, help="owner/name on the hub, or a new folder")
    of_push.add_argument("--license", help="for the card, as the hub names it (default: the card has none)")
    of_push.add_argument("--public", action="store_true", help="a new repository is public (default: private)")
    of_push.add_argument("--overwrite", action="store_true", help="files of the same names in a repository")
    of_pull = command("pull", "a run that was pushed, every file checked", _pull)
    of_pull.add_argument("source", help="owner/name on the hub, or a folder")
    of_pull.add_argument("--to", type=Path, required=True, help="a new folder")
    of_pull.add_argument("--revision", help="branch, tag or commit of the repository")
    of_cache = command("cache", "what the caches of finished runs hold, and which of it none of them needs", _cache)
    of_cache.add_argument("files", nargs="*", type=Path, default=[DEFAULT], metavar="FILE", help="YAML files of runs")
    of_cache.add_argument("--remove", action="store_true", help="remove what none of them needs")
    of_score = command("mib-score", "CPR and CMD of a circuit file, as the MIB benchmark defines them", _mib_score)
    of_export = command("mib-export", "a circuit and its constants in the formats of the MIB benchmark", _mib_export)
    for of_mib in (of_score, of_export):
        _with_config(of_mib)
        of_mib.add_argument("--circuit", type=Path, required=True, help="a circuit file")
        of_mib.add_argument("--task", help="its task, where the file names none")
    of_export.add_argument("--output", type=Path, required=True, help="a folder")
    says = "an ablation of components that removes a behaviour, as a Hugging Face model directory"
    of_removal = command("removal-export", says, _removal_export)
    _with_config(of_removal)
    of_removal.add_argument("--method", default="ugs_components", help="what chose the components (%(default)s)")
    of_removal.add_argument("--ablation", default="optimal", help="what takes their place (%(default)s)")
    of_removal.add_argument("--knob", type=float, required=True, help="the price or size, as in front.csv")
    of_removal.add_argument("--seed", type=int, default=0, help="the seed, as in front.csv (%(default)s)")
    of_removal.add_argument("--output", type=Path, required=True, help="a folder")
    of_completion = command("completion", "what makes a shell complete these commands and options", _completion)
    of_completion.add_argument("shell", choices=shtab.SUPPORTED_SHELLS, help="which shell")
    for each in commands.choices.values():
        for argument in each._actions:
            if argument.type is Path:
                argument.complete = shtab.FILE  # type: ignore[attr-defined]
    return parser


def _with_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, default=DEFAULT, metavar="FILE", help="YAML file (default: %(default)s)")


def _with_file(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "file", nargs="?", type=Path, default=DEFAULT, metavar="FILE", help="YAML file (default: %(default)s)"
    )


def _all(given: Given) -> int:
    config = load_config(given.config)
    check_files(config)
    check_compared(config)
    hold_gpu(config.device)
    run_missing(config)
    return 0


def _stage(given: Given) -> int:
    """All jobs of a stage, or those of one task, method, ablation type or lens."""
    config, stage = load_config(given.config), given.command
    check_files(config)
    check_compared(config)
    if stage not in WITHOUT_GPU:
        hold_gpu(config.device)
    all_of_stage = [what for name, what, _ in jobs(config) if name == stage]
    if not all_of_stage:
        section = next((name for name in OPTIONAL_SECTIONS if stage.startswith(name[:4])), None)
        raise UserError(
            f"{stage}: the config has nothing for this stage{f' (no {section}: section)' if section else ''}"
        )
    wanted = {name: value for name in STAGES[stage][1] if (value := getattr(given, name)) is not None}
    for name, value in wanted.items():
        allowed = list(dict.fromkeys(what[name] for what in all_of_stage))
        if value not in allowed:
            raise UserError(f"--{name}: {value!r}; allowed by the config: {', '.join(allowed)}")
    for what in all_of_stage:
        if wanted.items() <= what.items():
            run_stage(stage, config, **what)
    return 0


def _plan(given: Given) -> int:
    config = load_config(given.file)
    check_files(config)
    print(shown(plan(config)))
    return 0


def _estimate(given: Given) -> int:
    sizes, device = given.model_config, {"tflops": given.tflops, "memory_gb": given.memory_gb}
    print(estimated(load_config(given.file), model_config=sizes, fetch=True, **device))
    return 0


def _verify(given: Given) -> int:
    """1 where a number is not as expected."""
    config = load_config(given.file)
    if given.record:
        record(config, given.file, given.record)
        return 0
    return 0 if verify(config, given.file) else 1


def _compare(given: Given) -> int:
    from oacore.compare.page import compare  # draws

    page = compare(*map(load_config, given.files))
    print(f"page: {page.resolve()}")
    return 0


def _push(given: Given) -> int:
    from oacore.sharing.hub import push  # reads tables

    options = {"licence": given.license, "public": given.public, "overwrite": given.overwrite}
    print(f"pushed: {push(load_config(given.file), given.to, **options)}")
    return 0


def _pull(given: Given) -> int:
    from oacore.sharing.hub import pull  # reads tables

    files = pull(given.source, given.to, given.revision)
    print(f"pulled: {len(files)} files, whose checksums fit, to {given.to.expanduser().resolve()}")
    return 0


def _cache(given: Given) -> int:
    found = pieces([load_config(path) for path in given.files])
    print(table(found))
    if given.remove:
        print(f"removed {remove(found) / MB:.1f} MB")
    return 0


def _completion(given: Given) -> int:
    parser = _parser()
    parser.prog = SCRIPT
    print(shtab.complete(parser, given.shell))
    return 0


def _mib_score(given: Given) -> int:
    from oacore.circuits.mib_tools import print_score  # imports torch

    print_score(load_config(given.config), given.circuit, given.task)
    return 0


def _mib_export(given: Given) -> int:
    from oacore.circuits.mib_tools import export_circuit  # imports torch

    export_circuit(load_config(given.config), given.circuit, given.output, given.task)
    return 0


def _removal_export(given: Given) -> int:
    from oacore.removal.export import export  # imports torch

    export(load_config(given.config), given.output, given.method, given.ablation, given.knob, given.seed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
