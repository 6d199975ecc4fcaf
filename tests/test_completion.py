"""What a shell completes."""

import subprocess

from oacore.__main__ import main
from oacore.jobs import STAGES

COMPLETE = """
source "$1"
COMP_WORDS=("${@:2}")
COMP_CWORD=$(($# - 2))
_shtab_oacore
printf '%s\\n' "${COMPREPLY[@]}"
"""


def test_bash_completes_commands_and_the_options_that_each_takes(tmp_path, capsys):
    assert main(["completion", "bash"]) == 0
    script = tmp_path / "oacore.bash"
    script.write_text(capsys.readouterr().out)

    def completed(*typed):
        run = subprocess.run(["bash", "-c", COMPLETE, "bash", script, "oacore", *typed], capture_output=True, text=True)
        return set(run.stdout.split())

    assert {*STAGES, "plan", "compare", "completion"} <= completed("")
    assert completed("circ") == {"circuits", "circuit_figures"}
    assert completed("circuits", "--") == {"--help", "--config", "--task", "--method", "--ablation"}
    assert completed("report", "--") == {"--help", "--config"}
