"""Train the embedded model."""

from oacore.config.run import Config
from oacore.fits.resume import Resumable
from oacore.jobs import Files
from oacore.models import demo
from oacore.store.provenance import Provenance


def run(config: Config, inputs: Files, outputs: Files) -> None:
    """Write the demo model's directory."""
    provenance = Provenance(noted={"settings": config.demo_model.model_dump()})
    with Resumable.beside(outputs["demo"], provenance, "oacore.models.demo") as resumable:
        held_out = demo.build_demo(outputs["demo"], config.demo_model, resumable)
    print("demo model, held out: " + ", ".join(f"{name} {value:.3f}" for name, value in held_out.items()))
