"""Fit one lens to cached rows."""

from oacore.config.lenses import LENSES, lens_and_init
from oacore.config.run import Config
from oacore.fits.resume import Resumable
from oacore.inputs import items_of
from oacore.jobs import Files
from oacore.lenses.fit import fit_lens, item_of, save_lens
from oacore.lenses.task import LensTask
from oacore.store.artefacts import digest_of_tensors
from oacore.store.items import Item


def run(config: Config, inputs: Files, outputs: Files, task: str, lens: str) -> None:
    """Write {lens}.safetensors."""
    opened = LensTask.open(config, inputs, task, inputs.all("teacher"))
    name, init = lens_and_init(lens)
    row, taught_by = LENSES[name], opened.settings.teacher(lens)
    settings, teacher = getattr(opened.settings, row.fit), opened.lens(taught_by) if taught_by else None
    reads = {key: getattr(opened.settings, key) for key in row.reads}
    items = items_of(
        config,
        inputs,
        "lenses",
        opened.provenance,
        ["train", "validation"],
        ["oacore.lenses.fit", row.module],
        positions=opened.settings.positions,
        settings=settings.model_dump(),
        reads=reads,
    )
    own = {"lens": lens, "teacher": digest_of_tensors(teacher.values) if teacher else None}
    provenance = opened.provenance_of_fit(lens).noting(settings=settings.model_dump(), **reads)
    with Resumable.beside(outputs["lens"], provenance, "oacore.lenses.fit") as resumable:

        def compute(_: list[int]) -> list[Item]:
            part = resumable.part("fit", items.identity([own]))
            return [item_of(*fit_lens(row, init, opened.sources, settings, teacher=teacher, resumable=part))]

        (item,) = items.get([own], compute, task)
        save_lens(outputs["lens"], row, init, opened.loaded.model.n_layers, item, provenance)
    converged, steps = item.tensors["fit.converged"], int(item.tensors["fit.n_steps"].max())
    print(f"{task} {lens}: {int(converged.sum())} of {len(converged)} fits converged in {steps} steps")
