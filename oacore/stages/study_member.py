"""Run one member of a study: all experiments that its config asks for."""

from pathlib import Path

from oacore.config.run import Config
from oacore.inputs import provenance_of
from oacore.jobs import Files
from oacore.running import run_behind
from oacore.store.artefacts import read_json, write_json, write_table
from oacore.store.provenance import Provenance
from oacore.study.comparison import comparison
from oacore.study.member import clear_stale, placed


def run(config: Config, inputs: Files, outputs: Files, member: str) -> None:
    """Run what is missing of it, one job after another; write run.json, what was run, and comparison.csv."""
    own = placed(config, member, outputs["member"])
    print(f"{member}: the run {own.run}", flush=True)
    layout = run_behind(own, "report", begin=clear_stale)
    facts = read_json(layout.model_json)
    provenance = Provenance({"model_hash": facts["model_hash"], "member": member}, {"run": own.run, "seed": own.seed})
    of_tasks = {task: provenance_of(own, Path(layout.model_json), task) for task in own.tasks.selected()}
    write_table(outputs["comparison"], comparison(own, of_tasks), provenance)
    trained = {"held_out": read_json(Path(layout.demo_model) / "training.json")["held_out"]} if own.trains_demo else {}
    about = {"model": facts["model"], "n_weights": facts["sizes"]["n_weights"], "report": layout.report}
    write_json(outputs["member"], {**about, **trained}, provenance)
