"""Train the embedded model."""

from oacore.config.run import Config
from oacore.jobs import Files
from oacore.models import demo


def run(config: Config, inputs: Files, outputs: Files) -> None:
    """Write the demo model's directory."""
    held_out = demo.build_demo(outputs["demo"], config.demo_model)
    print("demo model, held out: " + ", ".join(f"{name} {value:.3f}" for name, value in held_out.items()))
