"""`make gpu` on a CPU, at tiny shapes, so that the script does not die on the day that there is a GPU."""

import json
import subprocess
import sys
from pathlib import Path

import gpu_report
import pytest

ROOT = Path(__file__).parents[2]


def test_its_sections_run_on_a_cpu_and_write_nothing_into_docs(tmp_path):
    sections = [
        "exactness",
        "step",
        "learn",
    ]  # others start processes that have tests of their own
    before = {*ROOT.glob("docs/gpu/*")}
    command = [sys.executable, gpu_report.__file__, "--small", "--out", tmp_path, *sections]
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout[-2000:] + found.stderr[-2000:]
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert {row["section"] for row in rows} == {*sections}
    exact = {row["what"]: row for row in rows if row["section"] == "exactness"}
    for name in ("losses", "masks", "constants"):
        assert exact["ieee, eager"][name] < 1e-5 < exact["bf16, eager"][name] < 5e-2
    assert all(row["same_bits_twice"] for row in exact.values())
    assert "these numbers mean nothing" in (tmp_path / "report.md").read_text()
    assert {*ROOT.glob("docs/gpu/*")} == before


def step(what, ms, peak_gb):
    return {"section": "step", "what": what, "ms": ms, "peak_gb": peak_gb}


def test_verdicts():
    rows = [
        step("tf32, eager, graph", 12.0, 4.0),
        step("tf32, triton, graph", 7.0, 3.0),
        step("bf16, triton, launches", 6.0, 2.0),
        {"section": "kernels", "what": "mix, tf32, triton", "share": 0.7},
        {"section": "kernels", "what": "mix_backward, tf32, triton", "share": 0.5},
    ]
    assert gpu_report.verdicts(rows) == [
        "a step in tf32 in 8 ms: met, 7 ms (tf32, triton, graph)",
        "1.5 times as fast as plain in less memory, tf32: met, 1.71 times, 3 against 4 GB",
        "a step in bf16 in 5 ms: NOT met, 6 ms (bf16, triton, launches)",
        "60% of the roofline: NOT met, 50% (mix_backward, tf32, triton)",
    ]
    assert gpu_report.verdicts([])[0] == "a step in tf32 in 8 ms: not measured"


def test_a_section_that_takes_too_long_is_cut_and_told(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_report, "SECONDS", {"ceilings": 1e-3})
    monkeypatch.setattr(sys, "argv", ["gpu_report.py", "--small", "--out", str(tmp_path), "ceilings"])
    with pytest.raises(SystemExit) as end:
        gpu_report.main()
    assert end.value.code == 1
    assert "## ceilings: out of time" in (tmp_path / "report.md").read_text()
