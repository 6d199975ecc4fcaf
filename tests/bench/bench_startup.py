"""What a job takes before its own work begins: a fresh Python, the stage's imports, and the model where it needs one.

    python tests/bench/bench_startup.py --config config/demo.yaml

Needs the config's model stage to have run. Every stage is started `--times` times in a process of its own; printed is
the median, in seconds. Snakemake's own start of a job, which is beside this, is the last line.
"""

import argparse
import statistics
import subprocess
import sys
import time

from oacore.config.read import load_config
from oacore.jobs import WITHOUT_GPU, planned

MODEL_FREE = (*WITHOUT_GPU, "model")
START = """
import importlib, sys
from oacore.config.read import load_config
from oacore.inputs import gated_model
from oacore.store.layout import Layout
from pathlib import Path
stage, file, with_model = sys.argv[1:]
importlib.import_module(f"oacore.stages.{stage}")
if with_model == "yes":
    config = load_config(file)
    gated_model(config, Path(Layout(config).model_json))
"""


def seconds(command: list[str], times: int) -> float:
    """Median of a command's time."""
    took = []
    for _ in range(times):
        start = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        took.append(time.perf_counter() - start)
    return statistics.median(took)


def main() -> None:
    """Print a line for each stage of the config."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="config/demo.yaml")
    parser.add_argument("--times", type=int, default=3)
    given = parser.parse_args()
    for stage in dict.fromkeys(stage for stage, _ in planned(load_config(given.config))):
        with_model = "no" if stage in MODEL_FREE else "yes"
        command = [sys.executable, "-c", START, stage, given.config, with_model]
        print(f"{stage:20} {seconds(command, given.times):5.2f} s{'' if with_model == 'no' else ', model loaded'}")
    bare = [sys.executable, "-m", "snakemake", "--configfile", given.config, "--summary"]
    print(f"{'snakemake itself':20} {seconds(bare, given.times):5.2f} s")


if __name__ == "__main__":
    main()
