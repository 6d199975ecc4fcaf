"""The pipeline's stages without Snakemake: `python -m oacore STAGE --config FILE`."""

import argparse
import sys
from pathlib import Path

from oacore import __version__
from oacore.config.read import load_config
from oacore.config.run import OPTIONAL_SECTIONS, Config
from oacore.errors import UserError
from oacore.estimate.run import estimated
from oacore.jobs import STAGES, WITHOUT_GPU, jobs
from oacore.plan import plan, shown
from oacore.runner import run_missing, run_stage, stop_on_sigterm
from oacore.store.housekeeping import MB, pieces, remove, table
from oacore.store.locks import hold_gpu
from oacore.tasks.generate import check_files
from oacore.verify import record, verify

TOOLS = {
    "mib-score": "CPR and CMD of a circuit file, as the MIB benchmark defines them",
    "mib-export": "a circuit and its constants in the formats of the MIB benchmark",
    "estimate": "memory and time that every GPU rule of a config takes, before it runs",
    "plan": "what a run would compute that is not in the store yet, and how long that will take",
    "verify": "the numbers of a finished run beside those that are expected of it",
    "compare": "two finished runs side by side: settings, numbers, fronts, circuits; FILE FILE",
    "cache": "what the caches of some finished runs hold, and which of it none of them needs; --remove removes that",
}


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and run; returns the exit status."""
    listing = "\n".join(f"  {name:18} {help}" for name, (help, _) in STAGES.items())
    tools = "\n".join(f"  {name:18} {help}" for name, help in TOOLS.items())
    parser = argparse.ArgumentParser(
        prog="python -m oacore",
        description=f"Optimal ablation {__version__}. Stages, in order:\n{listing}\n  {'all':18} every stage whose "
        f"output is missing\n\nTools:\n{tools}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("stage", choices=[*STAGES, "all", *TOOLS], metavar="STAGE")
    parser.add_argument(
        "files", nargs="*", metavar="FILE", help="estimate, plan, verify, compare, cache: YAML files, as --config"
    )
    parser.add_argument("--remove", action="store_true", help="cache: remove what no FILE's run needs")
    parser.add_argument("--config", default="config/demo.yaml", help="YAML file (default: %(default)s)")
    parser.add_argument("--task", help="one task (default: all of the config)")
    parser.add_argument("--method", help="one fitted ablation type, or circuit method (default: all of the config)")
    parser.add_argument("--lens", help="lens_fit: one lens (default: all of the config)")
    parser.add_argument("--ablation", help="circuits: one ablation type (default: all of the config)")
    parser.add_argument("--circuit", type=Path, help="mib-score, mib-export: a circuit file")
    parser.add_argument("--output", type=Path, help="mib-export: a folder")
    parser.add_argument(
        "--model-config", type=Path, help="estimate: a config.json with the sizes, instead of the model's"
    )
    parser.add_argument("--tflops", type=float, help="estimate: of the device, instead of a measurement here")
    parser.add_argument("--memory-gb", type=float, help="estimate: of the device, instead of this machine's")
    parser.add_argument(
        "--record",
        type=Path,
        nargs="+",
        metavar="RESULTS_DIR",
        help="verify: write the expected numbers instead, from folders of finished runs, the reference first",
    )
    given = parser.parse_args(arguments)
    if given.files and given.stage not in ("estimate", "plan", "verify", "compare", "cache"):
        parser.error(f"unrecognized argument: {given.files[0]}; allowed: --config {given.files[0]}")
    if given.stage == "compare" and len(given.files) != 2:
        parser.error(f"compare needs two files, not {len(given.files)}")
    if len(given.files) > 1 and given.stage not in ("compare", "cache"):
        parser.error(f"unrecognized argument: {given.files[1]}; allowed: one file")
    if given.remove and given.stage != "cache":
        parser.error("--remove: only with cache")
    if given.stage.startswith("mib-") and (
        given.circuit is None or (given.stage == "mib-export" and given.output is None)
    ):
        parser.error(f"{given.stage} needs --circuit{' and --output' if given.stage == 'mib-export' else ''}")
    stop_on_sigterm()
    try:
        if given.stage in TOOLS:
            return _run_tool(given)
        config = load_config(given.config)
        check_files(config)
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


def _run_tool(given: argparse.Namespace) -> int:
    """The exit status; 1 where a number is not as expected."""
    files = given.files or [given.config]
    file = files[0]
    if given.stage == "cache":
        found = pieces([load_config(path) for path in files])
        print(table(found))
        if given.remove:
            print(f"removed {remove(found) / MB:.1f} MB")
        return 0
    if given.stage == "compare":
        from oacore.compare import compare

        print(f"page: {compare(*map(load_config, files)).resolve()}")
        return 0
    config = load_config(file)
    if given.stage == "verify" and given.record:
        record(config, file, given.record)
        return 0
    if given.stage == "verify":
        return 0 if verify(config, file) else 1
    if given.stage == "plan":
        check_files(config)
        print(shown(plan(config)))
        return 0
    if given.stage == "estimate":
        print(
            estimated(
                config, model_config=given.model_config, tflops=given.tflops, memory_gb=given.memory_gb, fetch=True
            )
        )
        return 0
    from oacore.circuits.mib_tools import export_circuit, print_score

    if given.stage == "mib-score":
        print_score(config, given.circuit, given.task)
    else:
        export_circuit(config, given.circuit, given.output, given.task)
    return 0


def _run(stage: str, config: Config, given: dict[str, str | None]) -> None:
    if stage == "all":
        if narrowed := [f"--{name}" for name, value in given.items() if value is not None]:
            raise UserError(f"{', '.join(narrowed)}: not with `all`, which runs every stage; allowed: with one stage")
        run_missing(config)
        return
    all_of_stage = [what for name, what, _ in jobs(config) if name == stage]
    if not all_of_stage:
        section = next((name for name in OPTIONAL_SECTIONS if stage.startswith(name[:4])), None)
        raise UserError(
            f"{stage}: the config has nothing for this stage{f' (no {section}: section)' if section else ''}"
        )
    for name in STAGES[stage][1]:
        if (value := given[name]) is not None:
            allowed = list(dict.fromkeys(what[name] for what in all_of_stage))
            if value not in allowed:
                raise UserError(f"--{name}: {value!r}; allowed by the config: {', '.join(allowed)}")
    for what in all_of_stage:
        if all(given[name] in (None, value) for name, value in what.items()):
            run_stage(stage, config, **what)


if __name__ == "__main__":
    sys.exit(main())
