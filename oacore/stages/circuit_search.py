"""Find the circuits of one method under one ablation type: every knob and seed."""

import resource
import time

import torch

from oacore.circuits.search import SearchRequest
from oacore.circuits.task import CircuitTask
from oacore.config.circuits import CIRCUIT_METHODS, EDGE_ABLATIONS, CircuitMethod, EdgeAblation
from oacore.config.run import Config
from oacore.fits.resume import Resumable
from oacore.jobs import Files
from oacore.store.artefacts import write_json
from oacore.store.codehash import codehash


def run(
    config: Config, inputs: Files, outputs: Files, task: str, method: CircuitMethod, ablation: EdgeAblation
) -> None:
    """Write search.safetensors, and timing.json beside it, which no equal run repeats to the bit."""
    settings = config.circuits
    assert settings is not None
    opened = CircuitTask.open(config, inputs, task)
    provenance = opened.provenance.requiring(method=method, ablation=ablation)
    provenance = provenance.noting(objective=settings.objective_of(method))
    depends_on = [settings.read_by(method, ablation), codehash(EDGE_ABLATIONS[ablation].module)]
    row, start = CIRCUIT_METHODS[method], time.perf_counter()
    with Resumable.beside(outputs["search"], provenance, row.module, *depends_on) as resumable:
        search = row.load()(SearchRequest(opened, settings, method, ablation, resumable))
        seconds = time.perf_counter() - start
        search.save(outputs["search"], provenance)
    timing = {"seconds": round(seconds, 3), "seconds_per_circuit": seconds / len(search.knobs), "peak_mb": peak_mb()}
    write_json(outputs["timing"], timing, provenance)
    sizes = ", ".join(str(int(n)) for n in search.masks.sum((1, 2)))
    print(f"{task} {method} {ablation}: {len(search.knobs)} circuits of {sizes} edges")


def peak_mb() -> float:
    """Peak memory in MB: of the GPU where there is one in use, else of this process."""
    if torch.cuda.is_initialized():
        return round(torch.cuda.max_memory_allocated() / 1e6, 1)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3, 1)
