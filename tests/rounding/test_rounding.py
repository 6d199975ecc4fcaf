"""The tiny run and the numeric tests as other CPUs round: with other vector units, sums in another order, and two
threads.

Not part of the plain `pytest`: `make test-rounding`. The gate runs a part of it, `make test-rounding SELECT=...` in
`.ci/run`.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from oacore.config.model import DEMO_TRAINED, SHIPPED_DEMO
from oacore.config.read import load_config
from oacore.store.layout import Layout

ROOT, TESTS = Path(__file__).parents[2], Path(__file__).parents[1]
TINY = TESTS / "configs/tiny.yaml"

# Read by torch, oneDNN and MKL when they are loaded. MKL_CBWR also tells MKL not to round by the number of threads and
# alignment.
VARIANTS = {
    "default": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_CBWR": "COMPATIBLE"},
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_CBWR": "AVX2"},
    "two_threads": {"OA_TEST_THREADS": "2"},
}
HERE = torch.backends.cpu.get_cpu_capability()
if HERE not in ("AVX2", "AVX512"):
    del VARIANTS["avx2"]  # Arm, and older CPUs

# All other tests are of files, processes, configurations and text; in these rooms, files, memory and pictures compute
# nothing.
ROOMS = (
    "ablation",
    "circuits",
    "engine",
    "fits",
    "interactions",
    "kernels",
    "lenses",
    "models",
    "planted",
    "removal",
    "study",
    "tracing",
    "vision",
)
NOT_NUMERIC = r"test_(demo|numbers|resume|\w+_plots)\.py"
NUMERIC = [TESTS / "test_metrics.py", TESTS / "test_poison.py"]
NUMERIC += sorted(
    path for room in ROOMS for path in TESTS.glob(f"{room}/test_*.py") if not re.fullmatch(NOT_NUMERIC, path.name)
)
WHOLE_RUNS = [
    TESTS / name
    for name in (
        "workflow/test_pipeline.py",
        "fits/test_numbers.py",
        "models/test_demo.py",
        "workflow/test_stories.py",
    )
]
PARTS = 6  # of the numeric files, each of a minute or less: the gate runs one of them
PROCESSES = "not interrupted and not ctrl_c and not bad_ and not same_bits and not nothing_to_be_done and not dry_runs"

variants = pytest.mark.parametrize("variant", VARIANTS)


def run(variant, *arguments, **more):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env=environment | VARIANTS[variant] | more,
        capture_output=True,
        text=True,
    )


def pytest_passes(variant, *arguments, **more):
    result = run(variant, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments, **more)
    assert result.returncode == 0, f"{variant}\n{result.stdout[-20_000:]}"
    passed = re.search(r"(\d+) passed", result.stdout)
    return int(passed[1]) if passed else 0


ROUNDED = """
import os, hashlib, torch
torch.set_num_threads(int(os.environ.get("OA_TEST_THREADS", "1")))
x = torch.randn(960, 512, generator=torch.Generator().manual_seed(0))
y = x.log_softmax(-1) @ x.T
sums = torch.stack([x[:n].exp().sum() for n in range(100, 960, 20)])  # about half differ between one thread and two
print(torch.backends.cpu.get_cpu_capability(), hashlib.sha256(y.numpy().tobytes() + sums.numpy().tobytes()).hexdigest())
"""


@variants
def test_this_machine_can_round_like_that(variant):
    """If torch no longer listened to its variables, the other tests here would say nothing."""
    here = subprocess.run([sys.executable, "-c", ROUNDED], capture_output=True, text=True, check=True).stdout.split()
    capability, bits = run(variant, "-c", ROUNDED).stdout.split()
    assert here[0] == HERE and capability == {"default": "DEFAULT", "avx2": "AVX2", "two_threads": HERE}[variant]
    assert bits != here[1] or (capability == HERE and variant != "two_threads"), "this CPU has nothing else"


@variants
@pytest.mark.parametrize("part", range(PARTS), ids=lambda part: f"part{part}")
def test_numeric(variant, part):
    assert pytest_passes(variant, *NUMERIC[part::PARTS], "-k", "not compile_for") > 150


@variants
def test_training(variant, tmp_path):
    """The demo model, trained with that rounding, is another one, and as good: it meets its requirements."""
    path = tmp_path / "config.yaml"
    values = {"model": DEMO_TRAINED, "tasks": {"ioi": {}}, "cache_dir": str(tmp_path)}
    path.write_text(yaml.safe_dump(values))
    result = run(variant, "-m", "oacore", "demo", "--config", path)
    assert result.returncode == 0, result.stderr[-10_000:]
    ours = Path(Layout(load_config(path)).demo_model, "model.safetensors").read_bytes()
    assert ours != (SHIPPED_DEMO / "model.safetensors").read_bytes()


@variants
def test_whole_runs(variant, tmp_path):
    """What holds for the tiny run must hold with that rounding all the same."""
    assert pytest_passes(variant, *WHOLE_RUNS, "-k", PROCESSES, OA_TEST_CACHE=str(tmp_path)) > 40


# What no fit and no choice has part in, in the tables of the tiny run: the rows (a column and its values) and their
# numbers.
UNFITTED = {
    "ioi/ablation/gaps.csv": (
        "method",
        ("zero", "mean", "resample", "counterfactual", "gaussian"),
        ("gap_nats", "se_nats"),
    ),
    "facts/ablation/gaps.csv": (
        "method",
        ("zero", "mean", "resample", "counterfactual", "gaussian"),
        ("gap_nats", "se_nats"),
    ),
    "facts/tracing/aie.csv": (
        "corruption",
        ("mean", "token_replacement", "gaussian-1", "gaussian-3"),
        ("aie", "se", "p_restored"),
    ),
    "text/lens/loss.csv": ("lens", ("logit", "mean", "resample"), ("kl_nats", "se_nats")),
    "ioi/circuits/pareto.csv": (
        "ablation",
        ("counterfactual",),
        ("kl_nats", "se_nats", "validation_kl_nats", "logit_diff"),
    ),
}


# What is shorter here than in the tiny run: every stage runs, for as few methods as the tables need. The others are in
# the numeric tests.
FEWER: dict[str, dict[str, list]] = {
    "ablation": {"methods": ["zero", "mean", "resample", "counterfactual", "gaussian", "optimal"]},
    "circuits": {"methods": ["ugs", "acdc", "random"], "seeds": [0]},
    "interactions": {"ablations": ["optimal"]},
    "tracing": {"windows": [3]},
}


@variants
def test_tiny_run(variant, tiny_run, tmp_path):
    """All stages finish, and what has no part in a fit is the same but for rounding."""
    _, theirs = tiny_run
    values = yaml.safe_load(TINY.read_text()) | {"cache_dir": str(tmp_path), "results_dir": str(tmp_path / "results")}
    for section, changed in FEWER.items():
        values[section] |= changed
    values["limits"]["threads"] = int(VARIANTS[variant].get("OA_TEST_THREADS", 1))
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    ours = Layout(load_config(path))
    result = run(variant, "-m", "oacore", "all", "--config", path)
    assert result.returncode == 0, result.stderr[-10_000:]
    assert Path(ours.report).is_file()
    for file, (column, names, numbers) in UNFITTED.items():
        new, old = (unfitted(f"{layout.results_dir}/{file}", column, names) for layout in (ours, theirs))
        assert set(names) == set(new[column])
        keys = [
            key
            for key in old
            if key not in numbers and not pd.api.types.is_float_dtype(old[key]) and key not in ("edges", "nodes")
        ]
        for key in keys:  # they have more seeds and windows
            old = old[old[key].isin(new[key])]
        pd.testing.assert_frame_equal(new[keys], old[keys].reset_index(drop=True))
        for number in numbers:
            np.testing.assert_allclose(new[number], old[number], rtol=1e-3, atol=1e-5, err_msg=f"{file} {number}")
    assert (pd.read_csv(ours.circuits("ioi", "pareto.csv"))["kl_nats"] >= 0).all()


def unfitted(file, column, names):
    """The rows of a table in which no fit and no choice has part."""
    table = pd.read_csv(file)
    rows = table[column].isin(names)
    if file.endswith("pareto.csv"):  # edges drawn at random, whatever was learned beside them
        rows &= table["method"] == "random"
    return table[rows].reset_index(drop=True)
