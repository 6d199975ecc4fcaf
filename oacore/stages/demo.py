"""Train the embedded model."""

from oacore import demo
from oacore.config import Config
from oacore.layout import Layout


def run(config: Config) -> None:
    """Write the demo model's directory."""
    measured = demo.build(Layout(config).demo_model, config.demo_model)
    print("demo model, held out: " + ", ".join(f"{name} {value:.3f}" for name, value in measured.items()))
