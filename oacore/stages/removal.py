"""Find what to ablate by one method under one ablation type, and measure what that forgets and keeps."""

from oacore.circuits.search import Knob
from oacore.config.circuits import EDGE_ABLATIONS, EdgeAblation
from oacore.config.removal import REMOVAL_METHODS, RemovalMethodName
from oacore.config.run import Config
from oacore.fits.resume import Resumable
from oacore.inputs import items_of
from oacore.jobs import Files
from oacore.removal.behaviours import Behaviours
from oacore.removal.measure import PART, front, measured
from oacore.removal.request import RemovalRequest
from oacore.store.artefacts import write_table, write_tensors
from oacore.store.items import Item
from oacore.tasks.prompts import SPLITS

MEASURED_BY = "oacore.removal.measure"


def run(config: Config, inputs: Files, outputs: Files, method: RemovalMethodName, ablation: EdgeAblation) -> None:
    """Write front.csv, and ablations.safetensors with what every ablation is made of."""
    settings = config.removal
    assert settings is not None
    row, behaviours = REMOVAL_METHODS[method], Behaviours.open(config, inputs)
    provenance = behaviours.provenance.requiring(method=method, ablation=ablation)
    items = items_of(
        config,
        inputs,
        "removals",
        behaviours.provenance,
        SPLITS,
        [row.module, MEASURED_BY, EDGE_ABLATIONS[ablation].module],
        method=method,
        ablation=ablation,
        settings=settings.read_by_each(method, ablation),
    )
    knobs = [Knob(value, seed) for value in settings.knobs(method) for seed in settings.seeds]
    wanted = [{"knob": knob.value, "seed": knob.seed} for knob in knobs]
    with Resumable.beside(outputs["front"], provenance, row.module) as resumable:

        def compute(new: list[int]) -> list[Item]:
            part = resumable.part("search", items.identity([wanted[index] for index in new]))
            what = f"removal {method} {ablation}"
            request = RemovalRequest(behaviours, settings, ablation, [knobs[index] for index in new], what, part)
            return [measured(behaviours, chosen, settings.relearn) for chosen in row.load()(request)]

        found = items.get(wanted, compute, f"removal {method} {ablation}")
        tensors = {
            f"{knob.value:g}-s{knob.seed}/{name.removeprefix(PART)}": part.clone()
            for knob, item in zip(knobs, found, strict=True)
            for name, part in item.tensors.items()
            if name.startswith(PART)
        }
        write_tensors(outputs["ablations"], tensors, provenance)
        write_table(outputs["front"], front(behaviours, method, ablation, knobs, found), provenance)
