"""Long stages killed at random moments: what comes out after going on is what an undisturbed run writes, bit for bit.

One kill for each stage by default; `OA_KILLS=n` (`make test-kill`) takes n.
"""

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from oacore.config.read import parse_config
from oacore.runner import run_stage
from oacore.store.artefacts import read_tensors
from oacore.store.items import FOLDER
from oacore.store.layout import Layout

ROOT = Path(__file__).parents[2]
N_KILLS = int(os.environ.get("OA_KILLS", "1"))
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
LONG = {"first_round": 5, "tolerance": 1e-6}

# stage, and which part of it: (what it is run for, changes that make it long, its outputs, its checkpoint, steps
# between two checkpoints)
STAGES = {
    "optimal": (
        {"task": "ioi", "method": "optimal"},
        {"ablation": {"optimal": LONG | {"max_steps": 75}}},
        lambda layout: [layout.constants("ioi", "optimal")],
        lambda layout: layout.ablation("ioi", ".constants-optimal-checkpoint-fit.safetensors"),
        5,
    ),
    "circuits, found": (
        {"task": "ioi", "method": "ugs", "ablation": "optimal"},
        {"circuits": {"masks": {"n_steps": 20, "record_every": 2}}},
        lambda layout: [layout.circuits("ioi", "ugs-optimal/search.safetensors")],
        lambda layout: layout.circuits("ioi", "ugs-optimal/.search-checkpoint-search.safetensors"),
        2,
    ),
    "circuits, judged": (
        {"task": "ioi", "method": "acdc", "ablation": "optimal"},
        {"circuits": {"methods": ["acdc"], "refit": LONG | {"first_round": 3, "max_steps": 93}}},
        lambda layout: [
            layout.circuits("ioi", f"acdc-optimal/{name}") for name in ("constants.safetensors", "pareto.csv")
        ],
        lambda layout: layout.circuits("ioi", "acdc-optimal/.search-checkpoint-fit.safetensors"),
        3,
    ),
    "tracing_fit": (
        {"task": "facts"},
        {"tracing": {"sites": ["mlp"], "windows": [1], "fit": LONG | {"max_steps": 155}}},
        lambda layout: [layout.tracing("facts", "constants.safetensors")],
        lambda layout: layout.tracing("facts", ".constants-checkpoint-fit.safetensors"),
        5,
    ),
    "lens_fit": (
        {"task": "text", "lens": "oca"},
        {"lenses": {"oca": LONG | {"max_steps": 155}}},
        lambda layout: [layout.lens("text", "oca.safetensors")],
        lambda layout: layout.lens("text", ".oca-checkpoint-fit.safetensors"),
        5,
    ),
}


def merged(values, changes):
    return values | {
        key: merged(values[key], value) if isinstance(value, dict) else value for key, value in changes.items()
    }


def files_under(layout):
    return {
        path for folder in (layout.model_dir, layout.results_dir) for path in Path(folder).rglob("*") if path.is_file()
    }


def items(layout):
    return set((Path(layout.model_dir) / FOLDER).rglob("*.safetensors"))


@pytest.mark.parametrize("case", STAGES)
def test_killed_at_a_random_moment(own_copy, tmp_path, capfd, case):
    (what, changes, outputs, checkpoint, interval), stage = STAGES[case], case.partition(",")[0]
    config = parse_config(merged(own_copy.model_dump(mode="json"), changes))
    layout = Layout(config)
    kept, written = Path(checkpoint(layout)), [Path(path) for path in outputs(layout)]
    before = items(layout)
    run_stage(stage, config, **what)
    reference = {path: path.read_bytes() for path in written}
    after = files_under(layout)
    assert items(layout) > before, "what the stage computes is in the store"
    assert not kept.exists()

    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    command = [
        sys.executable,
        "-m",
        "oacore",
        stage,
        "--config",
        path,
        *(f"--{name}={value}" for name, value in what.items()),
    ]
    options = {
        "cwd": ROOT,
        "stdout": subprocess.DEVNULL,
        "stderr": subprocess.PIPE,
        "env": os.environ | {"OMP_NUM_THREADS": "1"},
    }
    for number in range(N_KILLS):
        dice = random.Random(f"{case} {number}")
        for file in (*written, *(items(layout) - before)):
            file.unlink()
        process = subprocess.Popen(command, **options)
        seen, wanted, last = 0, dice.randint(1, 3), None
        while seen < wanted and process.poll() is None:
            time.sleep(0.002)
            if kept.exists() and (now := kept.stat().st_mtime_ns) != last:
                seen, last = seen + 1, now
        time.sleep(dice.random() * 0.1)
        process.send_signal(SIGNALS[(number + list(STAGES).index(case)) % len(SIGNALS)])
        errors = process.communicate()[1].decode()
        assert process.returncode != 0, "it was over before the kill"
        assert "Traceback" not in errors, errors
        assert not any(file.exists() for file in written), "an output before its end"
        step = int(read_tensors(kept)[1]["step"])
        assert step >= wanted * interval and step % interval == 0
        capfd.readouterr()
        run_stage(stage, config, **what)
        assert re.search(rf"going on at step {step}$", capfd.readouterr().err, re.M), (
            "it did not go on from the last checkpoint"
        )
        for file in written:
            assert file.read_bytes() == reference[file], file
        assert files_under(layout) == after, "something was left behind"
