"""Fit one lens to cached rows."""

from oacore.config.lenses import LENSES, lens_and_init
from oacore.config.run import Config
from oacore.fits.resume import Resumable
from oacore.jobs import Files
from oacore.lenses.fit import fit_lens, save_lens
from oacore.lenses.task import LensTask
from oacore.store.codehash import codehash


def run(config: Config, inputs: Files, outputs: Files, task: str, lens: str) -> None:
    """Write {lens}.safetensors."""
    opened = LensTask.open(config, inputs, task, inputs.all("teacher"))
    name, init = lens_and_init(lens)
    row, teacher = LENSES[name], opened.settings.teacher(lens)
    settings = getattr(opened.settings, row.fit)
    provenance = opened.provenance_of_fit(lens).noting(
        settings=settings.model_dump(), **{key: getattr(opened.settings, key) for key in row.reads}
    )
    depends_on = [codehash(row.module)]
    with Resumable.beside(outputs["lens"], provenance, "oacore.lenses.fit", *depends_on) as resumable:
        fitted, descent = fit_lens(
            row,
            init,
            opened.sources,
            settings,
            teacher=opened.lens(teacher) if teacher else None,
            resumable=resumable,
        )
        save_lens(outputs["lens"], fitted, descent, provenance)
    converged, steps = int(descent.converged.sum()), int(descent.n_steps.max())
    print(f"{task} {lens}: {converged} of {len(descent.converged)} fits converged in {steps} steps")
