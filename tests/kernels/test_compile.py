"""The kernels without a GPU: compiled for two of them, and run in Triton's interpreter.

Both need processes of their own, since TRITON_INTERPRET decides what a kernel is when it is decorated.
"""

import csv
import os
import re
import subprocess
import sys
from pathlib import Path

from kernel_cases import CASES

ROOT = Path(__file__).parents[2]
SHARED_MEMORY = {
    "80": 166912,
    "90": 232448,
    "100": 232448,
}  # bytes per block: CUDA programming guide, compute capabilities, less 1 KiB reserved


def process(*arguments: str, interpret: bool) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if interpret:
        environment["TRITON_INTERPRET"] = "1"
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)


def test_kernels_compile_for_three_generations_within_their_limits() -> None:
    result = process("kernels/bench/compile_report.py", "--csv", interpret=False)
    assert result.returncode == 0, result.stderr
    rows = list(csv.DictReader(result.stdout.splitlines()))
    combinations = {(row["kernel"], row["arithmetic"], row["arch"]) for row in rows}
    assert len(combinations) == (5 * 3 + 2 * 2) * 3  # the RMS scale's have no products, and so no TF32
    for row in rows:
        if row["products"] == "does not compile":  # eager goes on there: kernels/README.md
            assert (row["arch"], row["arithmetic"]) == ("100", "tf32"), row
            continue
        assert int(row["shared_bytes"]) <= SHARED_MEMORY[row["arch"]], row
        assert int(row["wide_loads"]) or row["variant"] == "ones", row
        assert row["to_nearest"] == str(row["arithmetic"] == "tf32"), row
        of_no_products = ("none",) if row["kernel"].startswith("rms") else ()
        if row["arithmetic"] == "ieee":
            assert row["products"] in ("fma", *of_no_products), row  # tensor cores have no fp32
        else:
            assert row["spilled_bytes"] == "0" or row["variant"] == "ones", row
            assert row["products"] in ("mma", "wgmma", "tcgen05", *of_no_products), row


def test_kernels_in_the_interpreter() -> None:
    """All tests of this folder with a triton case."""
    result = process(
        "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "triton", str(Path(__file__).parent), interpret=True
    )
    assert result.returncode == 0, result.stdout[-4000:]
    passed = re.search(r"(\d+) passed", result.stdout)
    assert passed is not None and int(passed[1]) > 4 * len(CASES), result.stdout
