"""Find the circuits of one method under one ablation type: every knob and seed."""

from dataclasses import replace

from oacore.circuits.search import SearchRequest, find
from oacore.circuits.task import CircuitTask
from oacore.config.circuits import CIRCUIT_METHODS, EDGE_ABLATIONS, CircuitMethod, EdgeAblation
from oacore.config.run import Config
from oacore.fits.resume import Resumable
from oacore.inputs import items_of
from oacore.jobs import Files
from oacore.store.artefacts import digest_of_tensors, write_json


def run(
    config: Config, inputs: Files, outputs: Files, task: str, method: CircuitMethod, ablation: EdgeAblation
) -> None:
    """Write search.safetensors, and timing.json beside it, which no equal run repeats to the bit."""
    settings = config.circuits
    assert settings is not None
    opened = CircuitTask.open(config, inputs, task)
    provenance = opened.provenance.requiring(method=method, ablation=ablation)
    provenance = provenance.noting(objective=settings.objective_of(method))
    row, constants = CIRCUIT_METHODS[method], None
    if settings.takes_constants(method, ablation):
        constants = digest_of_tensors(opened.component_constants(ablation)._asdict())
    items = items_of(
        config,
        inputs,
        "circuits",
        opened.provenance,
        ["train"],
        [row.module, EDGE_ABLATIONS[ablation].module],
        method=method,
        ablation=ablation,
        settings=settings.read_by_each(method, ablation),
        constants=constants,
    )
    request = SearchRequest.of_all(opened, settings, method, ablation)
    with Resumable.beside(outputs["search"], provenance, row.module) as resumable:
        search, took = find(replace(request, resumable=resumable), items)
        search.save(outputs["search"], provenance)
        timing = {name: [note[name] for note in took] for name in ("seconds", "peak_mb")}
        write_json(outputs["timing"], timing, provenance)
    sizes = ", ".join(str(int(n)) for n in search.masks.sum((1, 2)))
    print(f"{task} {method} {ablation}: {len(search.knobs)} circuits of {sizes} edges")
