"""What a disk refuses is one line for the user; anything else stays what it is."""

import errno
import os
from pathlib import Path

import pytest
from safetensors import SafetensorError

from oacore.config.read import load_config
from oacore.errors import UserError, disk_error
from oacore.runner import run_stage
from oacore.stages import figures

TINY = Path(__file__).parent / "configs/tiny.yaml"


@pytest.mark.parametrize(
    ("number", "parts"),
    [
        (errno.ENOSPC, ["a/b.csv: can't be written: No space left on device", "a disk with room"]),
        (errno.EROFS, ["Read-only file system", "may write"]),
        (errno.ENAMETOOLONG, ["File name too long", "a shorter cache_dir, results_dir or run"]),
    ],
)
def test_errors_of_a_disk_are_one_line(number, parts):
    message = str(disk_error(OSError(number, os.strerror(number), "a/b.csv")))
    assert all(part in message for part in parts) and "\n" not in message


def test_a_full_disk_under_safetensors():
    """Its errors have the system's as text. (Never save to /dev/full: as root, safetensors renames a file over it.)"""
    text = "Error while serializing: I/O error: No space left on device (os error 28)"
    assert "No space left on device; allowed: a disk with room" in str(disk_error(SafetensorError(text)))


def test_other_errors_are_not_of_a_disk():
    assert disk_error(FileNotFoundError(errno.ENOENT, "no such file", "x")) is None
    assert disk_error(ValueError("(os error 28)")) is None


def test_a_stage_on_a_full_disk_stops_with_one_line(monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "results/gaps.csv")

    monkeypatch.setattr(figures, "run", full)
    monkeypatch.setattr("oacore.runner._check_inputs", lambda *_: None)
    with pytest.raises(UserError, match=r"results/gaps\.csv: can't be written: No space left"):
        run_stage("figures", load_config(TINY), task="ioi")
